"""The registry: every way of computing attention that this version can run, by canonical name.

An implementation is one file here with `SUMMARY`, `ALIASES`, `check(request) -> list[Reason]`, and

    attention(queries, keys, values, mask, *, scale, dropout=0.0) -> (context, weights or None)

    queries (B, H, query_len, D); keys and values (B, kv_heads, key_len, D), H a multiple of kv_heads, all of one dtype
    mask: an AttentionMask; a query that may see nothing gives exactly 0
    scale: what the scores are multiplied by; dropout: probability of dropping a weight, 0.0 outside training
    context (B, H, query_len, D); weights (B, H, query_len, key_len), from an implementation that has them

`OPTIONS` names further keyword arguments that it takes. `wrong_tiles(query_block_size, kv_block_size)`, where it takes
not every size, says what is wrong with them, or None. `READS_PAGES`: keys and values are a paged cache's pools, and the
mask is a PagedMask. To add one, add its file and its line here: nothing else.
"""

from importlib import import_module

NAMES = (
    "eager",
    "sdpa",
    "flash_tiled",
    "flash_triton",
    "flash_attention_2",
    "flash_attention_3",
    "flex_attention",
    "paged_attention",
)
IMPLEMENTATIONS = {name: import_module(f"CMHA.implementations.{name}") for name in NAMES}
