"""How many bytes of tensors a function keeps alive at its worst moment, those inside fused kernels too.

Why not a TorchDispatchMode: it sees the tensors that operators return, and a kernel's own scratch, the T x T table
that torch's "math" attention makes inside one call for example, never passes through it. The allocator sees all.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass

from torch.profiler import ProfilerActivity, profile

# Else torch 2.13's profiler writes a line to the screen at each start and stop. It is read when the first one starts.
os.environ.setdefault("KINETO_LOG_LEVEL", "6")


@dataclass(frozen=True)
class PeakMemory:
    """What the CPU allocator was asked for while a function ran.

    Attributes:
        peak: bytes alive at the worst moment, above what lived before.
        largest: bytes of the largest single allocation.
    """

    peak: int
    largest: int


def peak_tensor_bytes(function: Callable[[], object]) -> PeakMemory:
    """Run `function` once and watch torch's CPU allocator.

    Why: "memory grows with T, not with T squared" is a claim about allocations, so allocations are what is counted.

    Args:
        function: called without arguments; what it returns stays alive until the measurement ends.
    Returns:
        PeakMemory, in bytes. Not seen: scratch that MKL or oneDNN take from the system, and worker threads' own.
        Memory that lived before and is freed inside is not subtracted.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = function()
    del result
    # profiler.events() adds the allocations up for each operator; only the raw events have them one by one.
    raw = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    alive = peak = largest = 0
    for event in sorted(raw, key=lambda event: event.start_ns()):
        alive += event.nbytes()  # negative where memory is given back
        peak, largest = max(peak, alive), max(largest, event.nbytes())
    return PeakMemory(peak, largest)
