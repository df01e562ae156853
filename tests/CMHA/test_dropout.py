"""Each weight's fate depends on the seed and on where the weight stands, and on nothing else."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from CMHA.dropout import draw_seed, keep_mask, shift_right, signed

TABLE = (2, 3, 40, 50)


def whole(seed: int, dropout: float, table=TABLE) -> torch.Tensor:
    return keep_mask(seed, table, slice(0, table[-2]), slice(0, table[-1]), dropout)


@given(st.integers(0, 39), st.integers(1, 40), st.integers(0, 49), st.integers(1, 50))
def test_a_tile_is_a_piece_of_the_whole_mask(row, rows, column, columns):
    rows, columns = slice(row, min(row + rows, 40)), slice(column, min(column + columns, 50))
    tile = keep_mask(7, TABLE, rows, columns, 0.3)
    assert torch.equal(tile, whole(7, 0.3)[..., rows, columns])


@pytest.mark.parametrize("dropout", [0.05, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("seed", [0, 1, 2**61])
def test_weights_are_dropped_at_the_rate_asked_for_within_four_sigma(dropout, seed):
    keep = whole(seed, dropout, (4, 8, 100, 100))
    sigma = math.sqrt(dropout * (1 - dropout) / keep.numel())
    assert abs((~keep).double().mean().item() - dropout) < 4 * sigma


def test_rows_columns_heads_and_seeds_are_dropped_independently():
    """Two independent masks at one half agree in half of the places, within four sigma."""
    keep = whole(3, 0.5, (4, 6, 64, 64))
    shifted = {
        "next row": (keep[..., 1:, :], keep[..., :-1, :]),
        "next column": (keep[..., 1:], keep[..., :-1]),
        "next head": (keep[:, 1:], keep[:, :-1]),
        "next sequence": (keep[1:], keep[:-1]),
        "next seed": (keep, whole(4, 0.5, (4, 6, 64, 64))),
    }
    for name, (one, other) in shifted.items():
        assert abs((one == other).double().mean().item() - 0.5) < 4 * 0.5 / math.sqrt(one.numel()), name


def test_nothing_is_dropped_at_zero_and_everything_at_one():
    assert whole(5, 0.0).all()
    assert not whole(5, 1.0).any()


def test_the_hash_is_splitmix64():
    """Against Python's unbounded integers, where nothing wraps and nothing has a sign."""

    def splitmix(value: int) -> int:
        value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        value = (value ^ value >> 27) * 0x94D049BB133111EB % 2**64
        return value ^ value >> 31

    seed, dropout, golden, first = 123456789, 0.25, 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9
    starts = [((index + 1) * golden + seed * first) % 2**64 for index in range(math.prod(TABLE))]
    expected = [splitmix(start) >> 33 >= int(dropout * 2**31) for start in starts]
    assert whole(seed, dropout).flatten().tolist() == expected


@given(st.integers(-(2**63), 2**63 - 1), st.integers(1, 63))
def test_the_shift_is_logical(value, by):
    assert shift_right(torch.tensor(value), by).item() == (value % 2**64) >> by
    assert signed(value % 2**64) == value


def test_the_seed_follows_torchs_own():
    torch.manual_seed(11)
    first, second = draw_seed(), draw_seed()
    torch.manual_seed(11)
    assert (draw_seed(), draw_seed()) == (first, second)
    assert first != second
