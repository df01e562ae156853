"""Dropout that depends only on where a weight stands, so that it can be drawn again tile by tile.

torch's own dropout draws from a stream: the result depends on the order and the shapes of the calls. Flash
attention visits tiles, twice, in an order of its own, and must drop the same weights each time. So each weight's
fate is a hash of (seed, its index in the whole table): the same for any block size, forward and backward.
The hash is the finaliser of SplitMix64 (Steele, Lea, Flood: "Fast splittable pseudorandom number generators", 2014).
"""

import torch
from jaxtyping import Bool
from torch import Tensor

GOLDEN, FIRST, SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def signed(value: int) -> int:
    """The low 64 bits of `value` as torch's int64 holds them."""
    return (value + 2**63) % 2**64 - 2**63


def draw_seed() -> int:
    """A seed from torch's default generator, so that `torch.manual_seed` governs this dropout too."""
    return int(torch.randint(2**62, ()))


def keep_mask(
    seed: int, table: tuple[int, ...], rows: slice, columns: slice, dropout: float, device=None
) -> Bool[Tensor, "*leading rows columns"]:
    """Which weights of one tile are kept, each with probability 1 - dropout.

    Args:
        seed: from `draw_seed`.
        table: shape of the whole table, (..., query_len, key_len).
        rows, columns: the tile, as absolute positions.
        dropout: probability of dropping.
        device: where the answer is made.
    Returns:
        True where a weight is kept, shape (..., rows, columns).
    """
    *leading, query_len, key_len = table
    heads = torch.arange(torch.Size(leading).numel(), device=device).view(*leading, 1, 1)
    row = torch.arange(rows.start, rows.stop, device=device).view(-1, 1)
    column = torch.arange(columns.start, columns.stop, device=device)
    bits = (heads * query_len + row) * key_len + column  # int64: one index for each weight, wraps on overflow
    bits = (bits + 1) * signed(GOLDEN) + signed(seed * FIRST)
    bits = (bits ^ shift_right(bits, 30)) * signed(FIRST)
    bits = (bits ^ shift_right(bits, 27)) * signed(SECOND)
    bits = bits ^ shift_right(bits, 31)
    return shift_right(bits, 33) >= int(dropout * 2**31)


def shift_right(bits: Tensor, by: int) -> Tensor:
    """Logical shift: torch's >> on int64 copies the sign bit, which a hash must not."""
    return (bits >> by) & (2 ** (64 - by) - 1)
