"""Would it fit? What an attention call will need, by formula, beside the memory that is free.

A machine that runs out of memory seldom raises an error: it swaps, or the system ends a process. So a call that would
take much of what is free is left out before it is made, and the formula is the reason that is given.
"""

import math
from collections.abc import Sequence

import torch

from GPT2Model.free_memory import free_memory, mib
from orchestrator.evaluation.cases import Case

MOST = 0.5  # of the free memory: the formulas leave out what is small
EAGER_TABLES = 3  # (B, H, T, T) alive at the worst moment: scores and two of weights; in backward a gradient for scores
MASK_BYTES = {"eager": 2, "flex_attention": 10}  # for each of T x T pairs: bools; flex's rules compare in int64 too


def too_large(name: str, case: Case, earlier: Sequence[tuple[int, int]] = ()) -> str | None:
    """Why an implementation is not run on a case; None: it should fit.

    Args:
        name: of the implementation. The T x T tables of eager, and of what flex_attention makes of a mask, are known by
            formula; what another needs is read off its `earlier` figures.
        earlier: (length, peak bytes) that it was measured at, rising.
    """
    length = case.query_len
    if name in MASK_BYTES:
        needed, what = MASK_BYTES[name] * length**2, f"{MASK_BYTES[name]} bytes of mask for each of T x T pairs"
        if name == "eager":
            sizes = (case.batch_size, case.num_heads, length, length, case.dtype.itemsize)
            needed += EAGER_TABLES * table_bytes(case)
            what = f"{EAGER_TABLES} T x T tables of {' x '.join(f'{size:,}' for size in sizes)} bytes, and {what}"
    elif len(earlier) > 1:
        exponent = min(2.0, growth_exponent(*zip(*earlier, strict=True)))
        needed = round(earlier[-1][1] * (length / earlier[-1][0]) ** exponent)
        what = f"at the growth seen so far, T^{exponent:.1f}"
    else:
        return None
    return explain(needed, free_memory(case.device), what)


def inputs_too_large(case: Case) -> str | None:
    """As `too_large`, for what all implementations are given: queries, keys, values and the gradient of the context."""
    # Each is cut out of a projection three times as wide, which is drawn in fp32 and then converted.
    wide = 3 * case.batch_size * case.num_heads * case.query_len * case.head_dim
    needed = 4 * wide * (4 if case.dtype == torch.float32 else 4 + case.dtype.itemsize)
    return explain(needed, free_memory(case.device), "queries, keys, values and a gradient, with their projections")


def explain(needed: int, free: int, what: str) -> str | None:
    if needed <= MOST * free:
        return None
    return f"it would take about {mib(needed)} ({what}), more than half of the {mib(free)} that are free"


def table_bytes(case: Case) -> int:
    """Bytes of one table of scores: B * H * T * T * bytes of a number."""
    return case.batch_size * case.num_heads * case.query_len * case.key_len * case.dtype.itemsize


def growth_exponent(lengths: Sequence[float], values: Sequence[float]) -> float:
    """p of values ~ T^p between the last two points: the slope there on log-log axes."""
    return math.log(values[-1] / values[-2]) / math.log(lengths[-1] / lengths[-2])
