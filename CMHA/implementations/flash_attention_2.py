"""FlashAttention-2 from the package flash-attn, called directly.

Torch's own op has the same kernel on CUDA, but is handed a table for whatever is not plain causal, and takes a slower
kernel then. Asked directly, it leaves padding out instead of masking it, keeps packed documents apart, knows windows,
and is lower-right aligned: a few new queries may meet a whole KV cache.
Source: flash-attention 2.8.4; Dao (2023), "FlashAttention-2: Faster Attention with Better Parallelism and Work
Partitioning".
"""

from jaxtyping import Float
from torch import Tensor

from CMHA.implementations import flash_package
from CMHA.request import AttentionRequest, Reason

SUMMARY = "FlashAttention-2 from the package `flash-attn`: CUDA (Ampere or later), fp16 and bf16"
ALIASES = ("flash_attn_2", "fa2")
PADDED_QUERIES_GIVE_ZERO = True
SMALL_MEMORY = {(8, 6), (8, 9), (12, 0), (12, 1)}  # under 144 KB of shared memory a block: the RTX cards


def check(request: AttentionRequest) -> list[Reason]:
    """Why the package cannot serve the request; empty when it can."""
    reasons = flash_package.reasons_of_call(request)
    if request.capability is not None and request.capability < (8, 0):
        message = f"it needs compute capability 8.0 (Ampere) or later, this device has {request.capability}"
        reasons.append(Reason("capability", message, "use sdpa here"))
    if request.dropout >= 1:
        reasons.append(Reason("dropout", "it takes a dropout below 1", "choose a smaller dropout"))
    # There the package has no kernel for that backward pass and says nothing: the gradients would be uninitialised.
    if request.head_dim > 192 and request.dropout and request.needs_grad and request.capability in SMALL_MEMORY:
        message = "on this device it has no backward pass with dropout for heads wider than 192"
        reasons.append(Reason("dropout", message, "train without dropout, or use sdpa"))
    return reasons + flash_package.reasons_of_machine("flash_attn_2")


def attention(
    queries: Float[Tensor, "batch heads query_len head_dim"],
    keys: Float[Tensor, "batch kv_heads key_len head_dim"],
    values: Float[Tensor, "batch kv_heads key_len head_dim"],
    mask,
    *,
    scale: float,
    dropout: float = 0.0,
) -> tuple[Float[Tensor, "batch heads query_len head_dim"], None]:
    """Attention by flash-attn. The contract of the registry; the weights are None."""
    module = flash_package.first_importable("flash_attn_2")
    return flash_package.attend(module, queries, keys, values, mask, scale=scale, dropout_p=dropout)
