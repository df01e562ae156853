"""Pages read in plain PyTorch, on every device: look a sequence's blocks up, lay them end to end, attend as always.

It is the definition that the other readers of pages are held against. What it costs: each sequence's keys and values
are copied once more; the paper's kernel reads them where they lie.
Source: Kwon et al., 2023, section 4.1 and equation 4.
"""

from collections.abc import Iterable
from types import ModuleType

import torch
from jaxtyping import Float, Int
from torch import Tensor

from CMHA.implementations import eager, sdpa
from CMHA.paged_kv_cache import PagedSequence, Pages
from CMHA.request import AttentionRequest, Reason

SUMMARY = "each sequence's blocks gathered, then torch's fused op; every device"


def reasons(request: AttentionRequest, pages: Pages) -> list[Reason]:
    """Nothing is ever in the way of the definition."""
    return []


def read(
    queries: Float[Tensor, "1 heads tokens head_dim"],
    keys: Float[Tensor, "blocks kv_heads block_size head_dim"],
    values: Float[Tensor, "blocks kv_heads block_size head_dim"],
    mask,
    *,
    scale: float,
    dropout: float = 0.0,
) -> Float[Tensor, "1 heads tokens head_dim"]:
    """Each sequence's new tokens against all its tokens."""
    context = torch.empty_like(queries)
    read_into(context, mask.sequences, queries, keys, values, scale=scale, dropout=dropout)
    return context


def read_into(
    context: Float[Tensor, "1 heads tokens head_dim"],
    sequences: Iterable[PagedSequence],
    queries: Float[Tensor, "1 heads tokens head_dim"],
    keys: Float[Tensor, "blocks kv_heads block_size head_dim"],
    values: Float[Tensor, "blocks kv_heads block_size head_dim"],
    *,
    scale: float,
    dropout: float = 0.0,
) -> None:
    """The same for some of the sequences: their rows of `context` are written."""
    attention = ordinary(queries.device.type).attention
    for sequence in sequences:  # one at a time: what was gathered is still in the processor's cache when it is read
        own_keys, own_values = (gather(pool, sequence.table, sequence.mask.key_len) for pool in (keys, values))
        own = (queries[:, :, sequence.rows], own_keys, own_values, sequence.mask)
        context[:, :, sequence.rows] = attention(*own, scale=scale, dropout=dropout)[0]


def ordinary(device: str) -> ModuleType:
    """What attends to keys in one piece: sdpa, and eager on MPS, where sdpa gave NaN (see its check)."""
    return eager if device == "mps" else sdpa


def gather(
    pool: Float[Tensor, "blocks kv_heads block_size head_dim"], table: Int[Tensor, " held"], length: int
) -> Float[Tensor, "1 kv_heads length head_dim"]:
    """The blocks that a table names, end to end, without what is not filled of the last."""
    blocks = pool.transpose(1, 2).index_select(0, table)  # (held, block_size, kv_heads, D)
    return blocks.flatten(0, 1)[:length].transpose(0, 1)[None]
