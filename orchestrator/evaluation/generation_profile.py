"""Where the time of writing one token goes: torch's profiler over a few steps, its operators sorted into a few parts.

An operator's name does not say what it was for: a product with a weight matrix and one of attention are both a matmul.
So while the steps are watched, hooks mark which kind of module is at work, and each operator's own time goes to the
part of the nearest mark around it. A step is also timed without the profiler, which slows Python down far more than
operators: what they do not fill of that time is Python and waiting. Not run on a GPU.
"""

import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from orchestrator.evaluation.machine import wait_for

# Else torch 2.13's profiler writes a line to the screen at each start and stop. It is read when the first one starts.
os.environ.setdefault("KINETO_LOG_LEVEL", "6")

MATRICES, HEAD, ATTENTION, MOVED, REST, OUTSIDE = PARTS = (
    "weight matrices of the blocks",
    "vocabulary head",
    "attention itself",
    "keys and values moved",
    "norms, GELU, residuals, choosing",
    "Python and waiting",
)
MARK = "part: "
HEADS, ATTENTIONS = ("head", "lm_head"), ("attention", "attn")  # names of modules, here and in transformers
MOVES = (  # operators that store keys and values or fetch them, where they stand in attention
    "aten::index_select", "aten::index", "aten::gather", "aten::index_copy_", "aten::index_put_", "aten::copy_",
    "aten::_index_put_impl_", "aten::cat", "aten::clone", "aten::embedding", "aten::take_along_dim",
)  # fmt: skip
PRODUCTS = ("aten::linear", "aten::_weight_int8pack_mm")  # with a weight, also where no module is called


def part_of(module_name: str, module: nn.Module) -> str | None:
    """Which part a module's own operators belong to; None: that of what is around it."""
    last = module_name.rpartition(".")[2]
    if last in HEADS:
        return HEAD
    if last in ATTENTIONS:
        return ATTENTION
    tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    matrix = any(tensor.ndim == 2 for tensor in tensors)  # nn.Linear, transformers' Conv1D, int8
    return MATRICES if matrix and not isinstance(module, nn.Embedding) else None


class Marks:
    """Hooks that wrap the modules' calls in the profiler's marks, until `remove`."""

    def __init__(self, model: nn.Module):
        self.handles, self.open = [], []
        for name, module in model.named_modules():
            if (part := part_of(name, module)) is not None:
                self.handles.append(module.register_forward_pre_hook(self.enter(part)))
                self.handles.append(module.register_forward_hook(self.leave))

    def enter(self, part: str) -> Callable:
        def hook(*_):
            self.open.append(record_function(MARK + part))
            self.open[-1].__enter__()

        return hook

    def leave(self, *_) -> None:
        self.open.pop().__exit__(None, None, None)

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


@dataclass
class StepCosts:
    """Of one step, in seconds, the mean of those that were watched.

    Attributes:
        parts: {part of PARTS: seconds}; together they are `bare`, or more where the profiler slowed the operators.
        bare: of a step without the profiler. watched: of one under it, just after.
        steps: how many of each.
        tokens: that a step writes.
        operators: the five that took most, {name: seconds of a step}.
    """

    parts: dict[str, float]
    bare: float
    watched: float
    steps: int
    tokens: int
    operators: dict[str, float]


class StepWatch:
    """Told after each step; lets some pass, times some bare, and profiles as many.

    Args:
        model: whose modules are marked while the profiler runs.
        warm_up: steps that are let pass. steps: that are timed, and then profiled.
    Attributes:
        costs: a StepCosts when all were watched; None until then.
    """

    def __init__(self, model: nn.Module, steps: int, warm_up: int = 3, tokens: int = 1, device: str = "cpu"):
        self.model, self.steps, self.warm_up, self.tokens, self.device = model, steps, warm_up, tokens, device
        self.seen, self.costs = 0, None

    def step(self, *_: object) -> None:
        self.seen += 1
        if self.seen == self.warm_up:
            self.started = self.now()
        elif self.seen == self.warm_up + self.steps:
            self.bare = self.now() - self.started
            self.begin()
        elif self.seen == self.warm_up + 2 * self.steps:
            self.end()

    @property
    def done(self) -> bool:
        return self.costs is not None

    @property
    def needed(self) -> int:
        """Steps until it is done."""
        return self.warm_up + 2 * self.steps

    def now(self) -> float:
        wait_for(self.device)
        return time.perf_counter()

    def begin(self) -> None:
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * self.device.startswith("cuda")
        self.marks, self.profiler = Marks(self.model), profile(activities=activities)
        self.profiler.start()
        self.started = self.now()

    def end(self) -> None:
        watched = (self.now() - self.started) / self.steps
        self.marks.remove()
        self.profiler.stop()
        events = self.profiler.events()
        parts, operators = sort_events(events, "device" if self.device.startswith("cuda") else "cpu")
        parts, operators = ({name: us / 1e6 / self.steps for name, us in of.items()} for of in (parts, operators))
        bare = self.bare / self.steps
        parts[OUTSIDE] = max(0.0, bare - sum(parts.values()))
        top = dict(sorted(operators.items(), key=lambda pair: -pair[1])[:5])
        self.costs = StepCosts(parts, bare, watched, self.steps, self.tokens, top)


def sort_events(events: Iterable, kind: str) -> tuple[dict[str, float], dict[str, float]]:
    """Microseconds of all operators by part, and by name.

    Args:
        events: torch.profiler's FunctionEvents. kind: "cpu" or "device": whose time counts.
    """
    parts, names = dict.fromkeys(PARTS, 0.0), {}
    for event in events:
        if event.name.startswith("aten::") or event.name.startswith("mkldnn::"):
            own = getattr(event, f"self_{kind}_time_total")
            parts[part_of_event(event)] += own
            names[event.name] = names.get(event.name, 0.0) + own
    return parts, names


def part_of_event(event) -> str:
    """By the operator, what it stands in, and the nearest mark around it."""
    around = [event.name]
    mark = None
    while (event := event.cpu_parent) is not None:
        if event.name.startswith(MARK):
            mark = event.name.removeprefix(MARK)
            break
        around.append(event.name)
    if mark in (MATRICES, HEAD):
        return mark
    if any("scaled_dot_product" in name for name in around):
        return ATTENTION
    if any(name in PRODUCTS for name in around):
        return MATRICES
    if mark == ATTENTION:
        return MOVED if any(name in MOVES for name in around) else ATTENTION
    return REST
