"""Pages read by FlashAttention-2 from the package flash-attn, which takes a block table itself.

Two of its functions: `flash_attn_with_kvcache` for the sequences that write, one query each, where it splits long keys
among programs; `flash_attn_varlen_func` for those that read their prompt, packed end to end as ours are. Its blocks
hold multiples of 256 tokens.
Source: flash-attention 2.8.4, `flash_attn/flash_attn_interface.py` and `csrc/flash_attn/flash_api.cpp`.
"""

from itertools import accumulate

import torch
from jaxtyping import Float
from torch import Tensor

from CMHA.implementations import flash_attention_2, flash_package
from CMHA.paged_kv_cache import PagedMask, Pages
from CMHA.request import AttentionRequest, Reason

SUMMARY = "the package flash-attn: CUDA (Ampere or later), fp16 and bf16, blocks of 256 tokens"
MULTIPLE = 256  # tokens in a block, as flash_api.cpp demands


def reasons(request: AttentionRequest, pages: Pages) -> list[Reason]:
    """Why the package cannot read these pages; empty when it can."""
    message = "flash_attn_with_kvcache has no dropout"
    drops = [Reason("dropout", message, "write in eval mode")] if request.dropout else []
    against = [
        (pages.block_size % MULTIPLE != 0, "block_size",
         f"its blocks hold multiples of {MULTIPLE} tokens, not {pages.block_size}",
         f"make the cache with block_size={MULTIPLE}, or leave it to the Triton kernel"),
        (request.head_dim % 8 != 0, "head_dim",
         f"it would copy the whole cache to widen heads of {request.head_dim} to a multiple of 8",
         "leave it to the Triton kernel"),
        (pages.dtype != request.dtype, "cache_dtype",
         f"queries of {request.dtype} and keys of {pages.dtype} are not one dtype",
         "convert the model instead of using autocast, and make the cache in its dtype"),
    ]  # fmt: skip
    wrong = [Reason(code, message, remedy) for holds, code, message, remedy in against if holds]
    return wrong + drops + flash_attention_2.check(request)


def read(
    queries: Float[Tensor, "1 heads tokens head_dim"],
    keys: Float[Tensor, "blocks kv_heads block_size head_dim"],
    values: Float[Tensor, "blocks kv_heads block_size head_dim"],
    mask: PagedMask,
    *,
    scale: float,
    dropout: float = 0.0,
) -> Float[Tensor, "1 heads tokens head_dim"]:
    """Attention by flash-attn, at most one call for the sequences that write and one for those that read."""
    module = flash_package.first_importable("flash_attn_2")
    tokens = queries[0].transpose(0, 1)  # (tokens, heads, D)
    pools = keys.transpose(1, 2), values.transpose(1, 2)  # (blocks, block_size, kv_heads, D), as they lie
    context = torch.empty_like(tokens)
    options = {"softmax_scale": scale, "causal": True}
    if writing := mask.writing():
        part = mask.part(writing)
        given = {"cache_seqlens": part.lengths_there, "block_table": part.tables}
        found = module.flash_attn_with_kvcache(tokens[part.rows][:, None], *pools, **given, **options)
        context.index_copy_(0, part.rows, found[:, 0])
    if reading := mask.reading():
        part = mask.part(reading)
        starts_q, starts_k = (
            torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=tokens.device)
            for lengths in (part.new_tokens, part.lengths)
        )
        given = (starts_q, starts_k, max(part.new_tokens), max(part.lengths))
        found = module.flash_attn_varlen_func(tokens[part.rows], *pools, *given, block_table=part.tables, **options)
        context.index_copy_(0, part.rows, found)
    return context.transpose(0, 1)[None]
