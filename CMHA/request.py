"""What is asked of an attention implementation, and why it says no.

Before a single number is computed, the layer describes its call as an `AttentionRequest`, and each
implementation answers with a list of `Reason`s. An empty list means: usable. Nothing here touches a
tensor's values, so the question can also be asked about a machine that is not this one.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Reason:
    """Why an implementation cannot serve a request.

    Attributes:
        code: short and stable, for reports and tests ("weights_wanted").
        message: one clause for a person ("it never forms the attention weights").
        remedy: what to do about it.
    """

    code: str
    message: str
    remedy: str


@dataclass(frozen=True)
class AttentionRequest:
    """One attention call, described without its numbers.

    Why: implementations differ in what they can do, and the choice among them must be explainable and
    testable without the hardware. The defaults describe the commonest call: a causal forward pass in fp32
    on a CPU.

    Attributes:
        device: torch's device type: "cpu", "cuda", "mps", ...
        dtype: of queries, keys and values.
        head_dim: width of one head.
        query_len, key_len: in tokens.
        num_heads, num_kv_heads: equal, or grouped (num_heads a multiple of num_kv_heads).
        mask_kind: `AttentionMask.kind`: "causal" or "full", with "+padding", "+documents", "+window" in this order.
        dropout: probability applied to the weights in this call (0.0 in eval).
        needs_grad: a backward pass will follow.
        needs_weights: the caller wants the attention weights back.
        paged: keys and values lie in the pages of a paged cache.
        capability: a CUDA device's compute capability, (9, 0) for an H100; None elsewhere, or where it is not known.
        mps_guard: refuse what gave NaN on Apple's MPS; `choose` sets it from `disable_mps_fix`.
    """

    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    head_dim: int = 64
    query_len: int = 1024
    key_len: int = 1024
    num_heads: int = 12
    num_kv_heads: int = 12
    mask_kind: str = "causal"
    dropout: float = 0.0
    needs_grad: bool = False
    needs_weights: bool = False
    paged: bool = False
    capability: tuple[int, int] | None = None
    mps_guard: bool = True

    @classmethod
    def describe(cls, queries: Tensor, keys: Tensor, mask, **wishes) -> "AttentionRequest":
        """The request that these tensors make. `wishes`: dropout, needs_weights, ...; they go before what is seen."""
        seen = {
            "device": queries.device.type,
            "dtype": queries.dtype,
            "head_dim": queries.shape[-1],
            "query_len": queries.shape[-2],
            "key_len": keys.shape[-2],
            "num_heads": queries.shape[1],
            "num_kv_heads": keys.shape[1],
            "mask_kind": mask.kind,
            "paged": mask.paged,
            "needs_grad": torch.is_grad_enabled() and (queries.requires_grad or keys.requires_grad),
            "capability": capability_of(queries.device),
        }
        return cls(**seen | wishes)


def capability_of(device: torch.device) -> tuple[int, int] | None:
    """A CUDA device's compute capability, (major, minor); None for any other device, and for AMD's."""
    if device.type != "cuda" or torch.version.hip or not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_capability(device)


# Reasons about this machine, which an installation could take away; the others are about the call. The compatibility
# table is made from the second kind alone, so that it is the same table on every machine.
MACHINE_CODES = frozenset({"not_installed", "import_failed", "no_compiler", "no_device"})
