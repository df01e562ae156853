"""Profile: a watcher that looks at a few steps closely: which operators take the time, and what memory they hold."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerAction, ProfilerActivity, profile

from GPT2Model.files import replace_file, replace_text
from orchestrator.report import make_folder
from orchestrator.training.watch import Watch, say_above_bar
from orchestrator.views.run_figures import memory_figure, save_figure, thinned

# Else torch 2.13's profiler writes a line to the screen at each start and stop. It is read when the first one starts.
os.environ.setdefault("KINETO_LOG_LEVEL", "6")

ROWS, WIDTH = 40, 60  # operators in the table, characters of their names
POINTS = 4000  # of the memory in memory.json
HISTORY = 1_000_000  # allocations that CUDA's snapshot remembers at most


class Profile(Watch):
    """Waits for a run to be warm, profiles a few steps, and writes what it saw; then it is out of the way.

    Into its folder: trace.json (every operator on a time axis, for Perfetto or chrome://tracing), operators.txt (where
    the time went), memory.png and memory.json (live tensor bytes over time), and on CUDA memory_snapshot.pickle (each
    allocation and the line of code that asked for it; https://pytorch.org/memory_viz draws it without unpickling).

    Why not torch's memory timeline by category: torch 2.13 calls it deprecated. Its events are read here one by one,
    as in `evaluation/memory.py`.

    Args:
        folder: made if it is not there.
        device: that the model is on.
        steps: so many are waited for, warm the profiler up, and are profiled. A shorter run waits less.
        say: told where the files are, and how to open them.
    """

    def __init__(
        self,
        folder: str | Path,
        device: str = "cpu",
        steps: tuple[int, int, int] = (3, 2, 3),
        say: Callable[[str], None] = say_above_bar,
    ):
        if len(steps) != 3 or min(steps[:2]) < 0 or steps[2] < 1:
            raise ValueError(f"steps must be (wait 0 or more, warmup 0 or more, active 1 or more), got {steps}.")
        self.folder, self.device, self.steps, self.tell = Path(folder), str(device), steps, say
        self.profiler, self.first, self.begins = None, 0, 0

    def __str__(self):
        return f"the profile in {self.folder}"

    def start(self, step, max_steps):
        wait, warmup, active = shortened(self.steps, max_steps - step)
        if not active:
            return
        make_folder(self.folder)
        self.begins, self.first = wait + warmup, step + wait + warmup + 1

        def phase(done: int) -> ProfilerAction:
            if done < wait or done >= self.begins + active:
                return ProfilerAction.NONE
            if done < self.begins:
                return ProfilerAction.WARMUP
            last = done == self.begins + active - 1
            return ProfilerAction.RECORD_AND_SAVE if last else ProfilerAction.RECORD

        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * self.on_cuda
        self.profiler = profile(
            activities=activities, schedule=phase, on_trace_ready=self.write, record_shapes=True, profile_memory=True
        )
        self.profiler.start()
        self.record_history()

    def step(self, record):
        if self.profiler is None:
            return
        self.profiler.step()  # writes the files after the last of its steps
        if self.profiler.current_action == ProfilerAction.NONE and self.profiler.step_num > self.begins:
            self.stop()
        else:
            self.record_history()

    def close(self):
        if self.profiler is None:
            return
        early = self.profiler.step_num < self.begins
        self.stop()  # writes what there is
        if early:
            self.tell(f"the run ended before step {self.first}, where its profile would have begun: nothing to show.")

    @property
    def on_cuda(self) -> bool:
        return self.device.startswith("cuda")

    def record_history(self) -> None:
        """From the first profiled step on, CUDA remembers who asked for what memory."""
        if self.on_cuda and self.profiler.step_num == self.begins:
            torch.cuda.memory._record_memory_history(max_entries=HISTORY)

    def stop(self) -> None:
        profiler, self.profiler = self.profiler, None
        try:
            profiler.stop()
        finally:
            if self.on_cuda:
                torch.cuda.memory._record_memory_history(enabled=None)

    def write(self, profiler: profile) -> None:
        """The files, when the profiled steps are over."""
        replace_file(self.folder / "trace.json", lambda beside: profiler.export_chrome_trace(str(beside)))
        order = "self_device_time_total" if self.on_cuda else "self_cpu_time_total"
        table = profiler.key_averages().table(sort_by=order, row_limit=ROWS, max_name_column_width=WIDTH)
        replace_text(self.folder / "operators.txt", table)
        facts = live_bytes(profiler.profiler.kineto_results.events(), self.on_cuda)
        title = f"memory in steps {self.first} to {self.first + len(facts['steps']) - 1}, on {self.device}"
        save_figure(memory_figure(facts, title=title), self.folder / "memory.png")
        ms, live = thinned(*zip(*facts["live"], strict=True), POINTS) if facts["live"] else ([], [])
        facts["live"] = [[round(float(at), 3), int(value)] for at, value in zip(ms, live, strict=True)]
        replace_text(self.folder / "memory.json", json.dumps(facts) + "\n")
        lines = [
            f"profile of {len(facts['steps'])} steps from step {self.first} on, in {self.folder}:",
            "  trace.json      the operators on a time axis: open it at https://ui.perfetto.dev or chrome://tracing",
            "  operators.txt   which of them took the time",
            f"  memory.png      live tensors, peak {facts['peak_bytes'] / 2**20:.1f} MiB above the start; memory.json",
        ]
        if self.on_cuda:
            snapshot = self.folder / "memory_snapshot.pickle"
            replace_file(snapshot, lambda beside: torch.cuda.memory._dump_snapshot(str(beside)))
            lines.append("  memory_snapshot.pickle   who asked for it: drop it on https://pytorch.org/memory_viz")
        self.tell("\n".join(lines))


def shortened(steps: tuple[int, int, int], left: int) -> tuple[int, int, int]:
    """What of (wait, warmup, active) fits into the steps that are left: the profiled ones first."""
    wait, warmup, active = steps
    active = min(active, max(left, 0))
    warmup = min(warmup, left - active) if active else 0
    return (min(wait, left - active - warmup) if active else 0), warmup, active


def live_bytes(events, on_cuda: bool = False) -> dict:
    """How many bytes of tensors lived at each moment, above what lived when the profile began.

    Args:
        events: torch's raw ones: only they have each allocation by itself.
        on_cuda: of the GPU's allocator, not of the CPU's.
    Returns:
        "peak_bytes", "peak_ms", "steps" ([begin, end] of each, ms), "live" ([ms, bytes] after each allocation).
    """
    kind = "CUDA" if on_cuda else "CPU"
    spans, allocations = [], []
    for event in events:
        if event.name().startswith("ProfilerStep#"):
            spans.append((event.start_ns(), event.start_ns() + event.duration_ns()))
        elif event.name() == "[memory]" and event.device_type().name == kind:
            allocations.append((event.start_ns(), event.nbytes()))  # negative where memory is given back
    spans = sorted(set(spans))
    allocations.sort(key=lambda allocation: allocation[0])
    zero = min([at for at, _ in spans[:1] + allocations[:1]], default=0)
    live, now, peak, peak_ms = [], 0, 0, 0.0
    for at, size in allocations:
        now += size
        ms = (at - zero) / 1e6
        live.append((ms, now))
        if now > peak:
            peak, peak_ms = now, ms
    steps = [[round((begin - zero) / 1e6, 3), round((end - zero) / 1e6, 3)] for begin, end in spans]
    return {"peak_bytes": peak, "peak_ms": round(peak_ms, 3), "steps": steps, "live": live}
