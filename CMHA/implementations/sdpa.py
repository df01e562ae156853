"""Read 3 of 6. The same numbers from torch's fused op, scaled_dot_product_attention.

The op picks a kernel itself: on CUDA FlashAttention-2 (since torch 2.2) or memory-efficient attention, on CPU a
flash kernel, anywhere the plain formula ("math") when nothing else fits, dropout on a CPU for one. Only the
plain formula makes a T x T table. Next: `TransformerBlock/transformer_block.py`.
"""

from contextlib import nullcontext

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from CMHA.request import AttentionRequest, Reason

SUMMARY = "PyTorch's fused op; since torch 2.2 its own CUDA flash kernel is FlashAttention-2"
ALIASES = ("flash_attention_1", "flash_attn_1")


def kernels(device: str):
    """What the op may pick from. cuDNN's backward gave NaN with some masks on H100 (pytorch issue 196678): left out."""
    allowed = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    return sdpa_kernel(allowed) if device == "cuda" else nullcontext()


def check(request: AttentionRequest) -> list[Reason]:
    """Why torch's fused op cannot serve the request; empty when it can."""
    reasons = []
    if request.needs_weights:
        reasons.append(Reason("weights_wanted", "it never forms the attention weights", "ask eager for them"))
    if request.device == "mps" and request.mps_guard:
        message = "it gave NaN on MPS for left-padded batches in evaluation"
        reasons.append(Reason("mps_nan", message, "keep eager there, or set disable_mps_fix=True to use it anyway"))
    return reasons


def attention(
    queries: Float[Tensor, "batch heads query_len head_dim"],
    keys: Float[Tensor, "batch kv_heads key_len head_dim"],
    values: Float[Tensor, "batch kv_heads key_len head_dim"],
    mask,
    *,
    scale: float,
    dropout: float = 0.0,
) -> tuple[Float[Tensor, "batch heads query_len head_dim"], None]:
    """Attention without the table. The contract of the registry; the weights are None."""
    # is_causal aligns the mask to the upper left, which is right only for as many queries as keys.
    needs_table = not (mask.is_plain_causal or mask.hides_nothing)
    with kernels(queries.device.type):
        context = F.scaled_dot_product_attention(
            queries,
            keys,
            values,
            attn_mask=mask.dense() if needs_table else None,
            dropout_p=dropout,  # the op applies it in eval too: the caller passes 0 there
            is_causal=mask.is_plain_causal and not mask.hides_nothing,
            scale=scale,
            enable_gqa=keys.shape[1] != queries.shape[1],
        )
    return context, None
