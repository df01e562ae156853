"""Would it fit? What an attention call will need, by formula, beside the memory that is free.

A machine that runs out of memory seldom raises an error: it swaps, or the system ends a process. So a call that would
take much of what is free is left out before it is made, and the formula is the reason that is given.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import torch

from orchestrator.evaluation.cases import Case

MOST = 0.5  # of the free memory: the formulas leave out what is small
ASSUMED_FREE = 4 * 2**30  # bytes, where the system does not tell
EAGER_TABLES = 3  # (B, H, T, T) alive at the worst moment: scores and two of weights; in backward a gradient for scores
MASK_BYTES = {"eager": 2, "flex_attention": 10}  # for each of T x T pairs: bools; flex's rules compare in int64 too


def free_memory(device: str = "cpu") -> int:
    """Bytes that a process may still take on the device, as far as the system tells."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    if device == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    known = [free for free in (free_of_machine(), free_of_container()) if free is not None]
    return min(known, default=ASSUMED_FREE)


def free_of_machine() -> int | None:
    """MemAvailable on Linux (free, or quickly freed); None elsewhere."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return None


def free_of_container(folder: str = "/sys/fs/cgroup") -> int | None:
    """What a container's limit leaves (cgroup v2); None where there is no limit."""
    try:
        limit, used = (int((Path(folder) / name).read_text()) for name in ("memory.max", "memory.current"))
        words = (Path(folder) / "memory.stat").read_text().split()
    except (OSError, ValueError):  # no such file; "max": no limit
        return None
    cached_files = int(words[words.index("inactive_file") + 1]) if "inactive_file" in words else 0  # quickly freed
    return max(0, limit - used + cached_files)


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


def mib(size: float) -> str:
    return f"{size / 2**20:,.0f} MiB"
