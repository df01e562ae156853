"""Pages read by FlexAttention: the whole pool is one long row of keys, and a rule says which of them are whose.

The rule sees a key's place in the pool, not its place in a text. So each block table is turned round: for a sequence
and a block, the block's number in that sequence's text, or -1 where it does not hold it (a block that two sequences
share has a number in both). With it, key p of the pool is token number `turned[sequence, p // block_size] * block_size
+ p % block_size` of the query's sequence, and may be seen if that is the query's position or before. Which tiles of 128
places any query of a tile may see is known from the tables alone, so the rest of the pool is never looked at.

It is taken only when named. In a tile that it does look at, a place that nobody may see gets the weight 0, and 0 times
an infinity left there by another request is NaN: the other readers do not load such places. And its kernel is compiled
again when there are more sequences or tokens than TABLE_ROWS and TABLE_COLUMNS had room for.
Source: the idea is that of torch's experimental PagedAttention and of Dong et al., 2024, section 5.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from CMHA.implementations import flex_attention
from CMHA.implementations.flex_attention import TABLE_COLUMNS, TABLE_ROWS
from CMHA.paged_kv_cache import PagedMask, Pages
from CMHA.request import AttentionRequest, Reason

SUMMARY = "PyTorch's FlexAttention over the whole pool, compiled; when named"
TILE = 128  # queries, and places of the pool, in a tile of the BlockMask


def reasons(request: AttentionRequest, pages: Pages) -> list[Reason]:
    """Why FlexAttention cannot read these pages; empty when it can."""
    against = flex_attention.check(request)
    if pages.dtype != request.dtype:
        message = f"queries of {request.dtype} and keys of {pages.dtype} are not one dtype"
        remedy = "convert the model instead of using autocast, and make the cache in its dtype"
        against.append(Reason("cache_dtype", message, remedy))
    return against


def read(
    queries: Float[Tensor, "1 heads tokens head_dim"],
    keys: Float[Tensor, "blocks kv_heads block_size head_dim"],
    values: Float[Tensor, "blocks kv_heads block_size head_dim"],
    mask: PagedMask,
    *,
    scale: float,
    dropout: float = 0.0,
) -> Float[Tensor, "1 heads tokens head_dim"]:
    """Attention by FlexAttention. The BlockMask is built once a pass, and its kernel compiled once a process."""
    blocks = len(keys)
    block_mask = mask.once(f"paged_flex {blocks}", lambda: build_block_mask(mask, blocks, queries.device))
    # (blocks, kv_heads, block_size, D) -> (1, kv_heads, places, D), a view: in memory a block's tokens stand in order.
    keys, values = (pool.transpose(1, 2).flatten(0, 1).transpose(0, 1)[None] for pool in (keys, values))
    wanted = {"block_mask": block_mask, "scale": scale, "enable_gqa": keys.shape[1] != queries.shape[1]}
    with torch._dynamo.config.patch(recompile_limit=flex_attention.MOST_KERNELS):
        return flex_attention.compiled()(queries.detach(), keys.detach(), values.detach(), **wanted)


def build_block_mask(mask: PagedMask, blocks: int, device) -> BlockMask:
    """The rule, and for each tile of queries the tiles of the pool in which its sequences have keys."""
    size, tokens, places = mask.block_size, mask.query_len, blocks * mask.block_size
    tiles = [set() for _ in range(-(-tokens // TILE))]
    owner = []  # of each query
    for number, (sequence, held) in enumerate(zip(mask.sequences, mask.blocks, strict=True)):
        owner += [number] * sequence.mask.query_len
        reach = {place // TILE for block in held for place in (*range(block * size, (block + 1) * size, TILE),
                                                               (block + 1) * size - 1)}  # fmt: skip
        for tile in range(sequence.rows.start // TILE, (sequence.rows.stop - 1) // TILE + 1):
            tiles[tile] |= reach
    count = torch.tensor([len(tile) for tile in tiles], dtype=torch.int32, device=device)
    width = -(-places // TILE)
    listed = [sorted(tile) + [0] * (width - len(tile)) for tile in tiles]
    indices = torch.tensor(listed, dtype=torch.int32, device=device)

    turned = torch.full((len(mask.blocks), blocks), -1, dtype=torch.int64)
    for row, held in zip(turned, mask.blocks, strict=True):
        row[held] = torch.arange(len(held))
    turned, owner_of, position = (
        fixed_size(table.to(device)) for table in (turned, torch.tensor([owner]), mask.positions())
    )
    block_size = torch.tensor(size, device=device)

    # Lambdas, for the type checks of our tests wrap every `def`, and torch cannot compile the wrapping.
    text_block = lambda query, place: turned[owner_of[0, query], place // block_size]  # noqa: E731
    rule = lambda b, h, query, place: (  # noqa: E731
        (text_block(query, place) >= 0)
        & (text_block(query, place) * block_size + place % block_size <= position[0, query])
    )
    return BlockMask.from_kv_blocks(
        count[None, None], indices[None, None], BLOCK_SIZE=TILE, mask_mod=rule, seq_lengths=(tokens, places)
    )


def fixed_size(table: Int[Tensor, "rows columns"]) -> Int[Tensor, "more_rows more_columns"]:
    """Filled up to a size that seldom changes, and a constant of the kernel: see `flex_attention.fixed_size`."""
    table = F.pad(table, (0, -table.shape[1] % TABLE_COLUMNS, 0, -table.shape[0] % TABLE_ROWS))
    torch._dynamo.mark_static(table)
    return table
