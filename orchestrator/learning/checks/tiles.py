"""Exercise `tiled_attention`: the online softmax, one tile of keys after another, and how it goes wrong.

FlashAttention-2 (Dao, 2023), algorithm 1, for all queries at once.
"""

import math
from collections.abc import Callable

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from orchestrator.learning.checks.attention import SCALES, causal_mask
from orchestrator.learning.checks.exercise import Case, Exercise, Mistake, Numbers


def tiled_attention(
    queries, keys, values, mask, tile_size, *, scale="root of head_dim", rescale=("sum", "output"), maximum="running",
    lse="max + log sum", masked=True, ragged=True, empty="zero", normalised=True,
):  # fmt: skip
    B, H, Tq, _ = queries.shape
    Tk = keys.shape[-2]
    factor = SCALES[scale](queries, keys)
    running_max = queries.new_full((B, H, Tq, 1), -torch.inf if maximum in ("running", "tile") else 0.0)
    running_sum, output = queries.new_zeros(B, H, Tq, 1), queries.new_zeros(B, H, Tq, values.shape[-1])
    lowest = torch.finfo(queries.dtype).min if empty == "average" else -torch.inf
    stop = Tk if ragged else Tk // tile_size * tile_size

    for start in range(0, stop, tile_size):
        tile = slice(start, min(start + tile_size, Tk))
        scores = queries @ keys[..., tile, :].transpose(-2, -1) * factor
        if masked is True or (masked == "first tile" and start == 0):
            scores = scores.masked_fill(~mask[:, tile], lowest)
        new_max = torch.maximum(running_max, scores.amax(dim=-1, keepdim=True)) if maximum == "running" else running_max
        if maximum == "tile":
            new_max = scores.amax(dim=-1, keepdim=True)
        shift = new_max if empty == "nan" else new_max.masked_fill(new_max == -torch.inf, 0.0)
        weights = torch.exp(scores - shift)
        correction = torch.exp(running_max - shift)
        running_sum = running_sum * (correction if "sum" in rescale else 1) + weights.sum(dim=-1, keepdim=True)
        output = output * (correction if "output" in rescale else 1) + weights @ values[..., tile, :]
        running_max = new_max

    if normalised:
        unseen = (running_sum == 0) & (empty in ("zero", "lse"))
        output = output / running_sum.masked_fill(unseen, 1.0)
    log_sum_exp = {
        "max + log sum": running_max + running_sum.log(),
        "log sum": running_sum.log(),
        "max + sum": running_max + running_sum,
        "sum": running_sum,
        "max": running_max,
        "base 2": (running_max + running_sum.log()) / math.log(2),
    }[lse]
    if empty == "lse":
        log_sum_exp = log_sum_exp.masked_fill(running_sum == 0, 0.0)
    return output, log_sum_exp.squeeze(-1)


def tiled_cases() -> list[Case]:
    def case(label, seed, B, H, Tq, Tk, D, tile, scale=1.5, hidden=(), dtype=torch.float32):
        draw = Numbers(seed, dtype)
        mask = causal_mask(Tq, Tk)
        mask[list(hidden)] = False  # queries that may see nothing
        return Case(label, {
            "queries": draw(B, H, Tq, D, scale=scale), "keys": draw(B, H, Tk, D, scale=scale),
            "values": draw(B, H, Tk, D), "mask": mask, "tile_size": tile,
        })  # fmt: skip

    return [
        case("12 tokens, tiles of 4", 40, 2, 2, 12, 12, 8, 4),
        case("11 tokens, tiles of 4: the last holds 3", 41, 1, 3, 11, 11, 16, 4),
        case("one tile", 42, 2, 1, 5, 5, 8, 8),
        case("tiles of 1", 43, 1, 2, 6, 6, 4, 1),
        case("3 queries, 10 keys, tiles of 3", 44, 1, 2, 3, 10, 8, 3),
        case("two queries that may see nothing", 45, 2, 1, 8, 8, 8, 3, hidden=(0, 5)),
        case("scores of several hundred", 46, 1, 2, 9, 9, 16, 4, scale=14.0),
        case("float64", 47, 1, 1, 7, 7, 6, 2, dtype=torch.float64),
        case("1 query, 4,096 keys, tiles of 8", 49, 1, 1, 1, 4096, 4, 8),
    ]


class Sizes(TorchDispatchMode):
    """How many numbers each operation inside has made: every size that occurred."""

    def __init__(self):
        super().__init__()
        self.numbers: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.is_floating_point():
            self.numbers.add(result.numel())
        return result


def makes_too_much(function: Callable) -> str | None:
    """The whole table, or one query's whole row of it.

    First 64 queries and keys of width 4 in tiles of 8: a tile has 512 numbers, the table 4,096. Then one query with
    4,096 keys: a tile has 8 numbers, the row 4,096, and 4 * 4,096 are the keys themselves, of which a copy may be made.
    """
    draw, T = Numbers(48), 64
    q, k, v = draw(1, 1, T, 4), draw(1, 1, T, 4), draw(1, 1, T, 4)
    with Sizes() as table:
        function(queries=q, keys=k, values=v, mask=causal_mask(T, T), tile_size=8)
    if max(table.numbers, default=0) >= T * T:  # nothing is seen of what numpy does
        return "whole_table"
    long = tiled_cases()[-1].arguments
    with Sizes() as row:
        function(**long)
    all_keys = long["keys"].shape[-2]
    return "whole_row" if any(all_keys <= size < long["keys"].numel() for size in row.numbers) else None


TILED_ATTENTION = Exercise(
    "tiled_attention", "attention", 16, tiled_attention, tiled_cases,
    ("output (B, H, query_len, head_dim)", "log_sum_exp (B, H, query_len)"),
    (
        Mistake("nothing_rescaled",
                "when a tile raises the maximum, what was summed before belongs to the old maximum: multiply *both* "
                "the sum and the output so far by exp(old maximum - new maximum).", ({"rescale": ()},)),
        Mistake("output_not_rescaled",
                "the sum is rescaled when the maximum rises, the output so far is not. It needs the same factor, "
                "exp(old maximum - new maximum).", ({"rescale": ("sum",)},)),
        Mistake("sum_not_rescaled",
                "the output is rescaled when the maximum rises, the running sum is not. It needs the same factor, "
                "exp(old maximum - new maximum).", ({"rescale": ("output",)},)),
        Mistake("maximum_of_the_tile",
                "the maximum is that of the latest tile alone, and may fall. Keep the larger of the old one and the "
                "tile's.", ({"maximum": "tile", "rescale": ()},)),
        Mistake("no_maximum",
                "no maximum is subtracted: exp of a score above 88 is inf in float32.", ({"maximum": "none"},)),
        Mistake("lse_without_maximum",
                "log_sum_exp is the logarithm of the sum alone; the sum was taken relative to the maximum: add the "
                "maximum again.", ({"lse": "log sum"},)),
        Mistake("lse_without_logarithm",
                "log_sum_exp lacks the logarithm: maximum + log(sum).", ({"lse": "max + sum"}, {"lse": "sum"})),
        Mistake("lse_is_the_maximum", "log_sum_exp is the maximum alone: log(sum) is missing.", ({"lse": "max"},)),
        Mistake("lse_base_2", "log_sum_exp is a logarithm to base 2; the natural one is wanted.", ({"lse": "base 2"},)),
        Mistake("mask_ignored", "the mask is not used.", ({"masked": False},)),
        Mistake("mask_in_first_tile_only",
                "the mask is used in the first tile only. Each tile has columns of its own.",
                ({"masked": "first tile"},)),
        Mistake("nan_where_nothing_is_seen",
                "a query that has seen nothing yet has the maximum -inf, and -inf - (-inf) is NaN: subtract 0 there "
                "instead, and do not divide by a sum of 0.", ({"empty": "nan"}, {"empty": "0 / 0"})),
        Mistake("average_where_nothing_is_seen",
                "hidden scores are the lowest finite number instead of -inf: a query that may see nothing gets an "
                "average of values. It must get exactly 0, and -inf.", ({"empty": "average"},)),
        Mistake("lse_where_nothing_is_seen",
                "log_sum_exp of a query that sees nothing is 0 here; the logarithm of an empty sum is -inf.",
                ({"empty": "lse"},)),
        Mistake("last_tile_dropped",
                "the last tile is left out when it is not full. Let it be shorter.", ({"ragged": False},)),
        Mistake("not_divided", "the output is not divided by the running sum at the end.", ({"normalised": False},)),
        Mistake("scale_forgotten", "the scores are not divided by the square root of head_dim.", ({"scale": "none"},)),
        Mistake("scaled_by_width",
                "the scores are divided by head_dim, not by its square root.", ({"scale": "head_dim"},)),
        Mistake("whole_table",
                "the formula is right, but a table of all queries by all keys is made on the way. One tile of keys at "
                "a time: that is what saves the memory."),
        Mistake("whole_row",
                "the formula is right, but all scores of a query are made at once: one query with 4,096 keys in tiles "
                "of 8 got a tensor of 4,096 scores. Take tile_size keys at a time, and carry maximum, sum and output "
                "from tile to tile: the online softmax."),
    ),
    "notebooks/attention.ipynb, sections 4 and 5; CMHA/implementations/flash_tiled.py",
    afterwards=makes_too_much,
)  # fmt: skip
