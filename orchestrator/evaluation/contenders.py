"""What a benchmark can time: the registry's implementations, and torch's fused op held to one of its kernels.

`sdpa` is what people call, and torch chooses the kernel. To be faster than "sdpa" says little where that choice is
poor, so a kernel can be named: `sdpa:flash` (on CUDA FlashAttention-2), `sdpa:cudnn`, `sdpa:efficient`, `sdpa:math`
(the plain formula). They stand beside the registry, not in it: nobody should train on a kernel that may not be there.
What each needs is as torch's own checks say (aten/src/ATen/native/transformers/cuda/sdp_utils.cpp).
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from CMHA.choosing import canonical_name
from CMHA.choosing.choose import reads_pages
from CMHA.implementations import IMPLEMENTATIONS, sdpa
from CMHA.request import AttentionRequest, Reason

PREFIX = "sdpa:"
KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
HALF = (torch.bfloat16, torch.float16)


class OneKernel:
    """torch's fused op with one kernel and no other, in the form of the registry's modules.

    Args:
        kernel: a name of KERNELS.
    """

    ALIASES = ()

    def __init__(self, kernel: str):
        self.kernel, self.__name__ = kernel, PREFIX + kernel
        self.SUMMARY = f"PyTorch's fused op, held to its {kernel} kernel"

    def check(self, request: AttentionRequest) -> list[Reason]:
        """Why this kernel cannot serve the request; empty when it should."""
        kernel, on_cuda = self.kernel, request.device == "cuda"
        dtype = str(request.dtype).removeprefix("torch.")
        old = request.capability is not None and request.capability < (8, 0)
        against = [
            (request.device not in ("cpu", "cuda"), "device", f"torch has one kernel on {request.device}"),
            (not on_cuda and kernel in ("cudnn", "efficient"), "cuda_only", f"torch's {kernel} kernel runs on CUDA"),
            (request.mask_kind not in ("causal", "full"), "mask", "it is measured with a causal mask or none"),
            (request.mask_kind == "causal" and request.query_len != request.key_len, "mask",
             "its causal mask needs as many queries as keys"),
            (on_cuda and kernel in ("flash", "cudnn") and request.dtype not in HALF, "dtype",
             f"torch's {kernel} kernel takes bfloat16 and float16, not {dtype}"),
            (on_cuda and kernel in ("flash", "cudnn") and old, "capability",
             f"torch's {kernel} kernel needs compute capability 8.0 (Ampere), this device has {request.capability}"),
            (on_cuda and kernel == "flash" and request.head_dim > 256, "head_dim",
             f"torch's flash kernel takes heads of a width up to 256, not {request.head_dim}"),
            (on_cuda and kernel == "cudnn" and request.head_dim > 128, "head_dim",
             f"torch's cudnn kernel is measured with heads of a width up to 128, not {request.head_dim}"),
            (kernel == "efficient" and request.num_heads != request.num_kv_heads, "grouped_heads",
             "torch's efficient kernel takes no grouped heads"),
        ]  # fmt: skip
        reasons = [Reason(code, message, "use sdpa") for holds, code, message in against if holds]
        return reasons + sdpa.check(request)

    def attention(
        self, queries: Tensor, keys: Tensor, values: Tensor, mask, *, scale: float, dropout: float = 0.0
    ) -> tuple[Tensor, None]:
        """The contract of the registry; the weights are None.

        Raises:
            RuntimeError: torch finds that the kernel cannot serve the call after all.
        """
        with sdpa_kernel(KERNELS[self.kernel]):
            context = F.scaled_dot_product_attention(
                queries, keys, values, dropout_p=dropout, is_causal=mask.is_plain_causal and not mask.hides_nothing,
                scale=scale, enable_gqa=keys.shape[1] != queries.shape[1],
            )  # fmt: skip
        return context, None


ONE_KERNEL = {PREFIX + kernel: OneKernel(kernel) for kernel in KERNELS}


def measurable() -> dict[str, object]:
    """The registry without what reads pages: no benchmark of single calls brings a paged cache."""
    return {name: module for name, module in IMPLEMENTATIONS.items() if not reads_pages(name)}


def contender(word: str) -> str:
    """The canonical name behind a name, an alias or `sdpa:KERNEL`.

    Raises:
        ValueError: there is no such thing, or nothing to measure for it.
    """
    word = word.strip()
    if word.startswith(PREFIX):
        if word not in ONE_KERNEL:
            raise ValueError(f"--implementations: torch's op has no kernel {word!r}: {', '.join(ONE_KERNEL)}.")
        return word
    name = canonical_name(word)
    if name not in measurable():
        known = ", ".join([*measurable(), *ONE_KERNEL])
        raise ValueError(f"--implementations: there is nothing to measure for {word}: {known}.")
    return name


def contenders(names) -> Mapping[str, object]:
    """{canonical name: module of the registry's form}, in the order given."""
    return {name: (IMPLEMENTATIONS | ONE_KERNEL)[name] for name in map(contender, names)}
