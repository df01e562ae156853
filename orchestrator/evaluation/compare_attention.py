"""One training run under several implementations of attention: do the curves coincide, and what does each cost?

Every contender has the same weights, sees the same batches and has no dropout, so in exact arithmetic all losses would
be equal at every step. They train in turn, one step each, in changing order, through `training/loop.py`, so that what
they cost can be compared too. How far apart may they be?

    fp64         1e-9 nats, at every step: rounding leaves some 1e-15, a wrong formula does not
    fp32         MULTIPLE times what summing in another order does to eager itself: the yardstick is an eager model that
                 gets each batch with its rows in reverse order. The mean over the rows is the same, its rounding is not
    bf16, fp16   MULTIPLE times what the short dtype does to eager itself: the yardstick is an eager model in fp32

Rounding grows in training, since each step starts from where the last one ended: so a fixed bound would say nothing.
The yardstick counts with the largest difference that it has reached so far, which is taken over the first STEADY steps
at least, and as one unit in the last place of the loss (or of 1, if that is more) at least.

The lines for CUDA and MPS (waiting for the device, the allocator's peak) were not run on a GPU.
"""

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate

import torch

from GPT2Model.gpt2 import GPTModel
from orchestrator.evaluation.attention_bench import orders, spread
from orchestrator.evaluation.device_timing import peak_memory
from orchestrator.evaluation.estimates import count_parameters
from orchestrator.evaluation.experiment import without_announcements
from orchestrator.evaluation.machine import wait_for
from orchestrator.evaluation.memory_guard import explain, free_memory
from orchestrator.evaluation.training_memory import TrainingStep, training_peak
from orchestrator.evaluation.workloads import reason_against, resting_bytes, strictly
from orchestrator.text.samples import Batch, Samples
from orchestrator.training.loop import start, train
from orchestrator.training.precision import TORCH_DTYPES
from orchestrator.training.settings import TrainSettings
from orchestrator.training.state import TrainState
from orchestrator.training.watch import Watch

FP64_BOUND = 1e-9  # nats
MULTIPLE = 10
STEADY = 10  # steps
MEMORY_STEP = 2  # the third: the optimizer has its numbers, and nothing is set up any more
YARDSTICKS = {"fp64": None, "fp32": "eager, rows reversed", "bf16": "eager in fp32", "fp16": "eager in fp32"}
DTYPES = {"fp64": torch.float64, **TORCH_DTYPES}


@dataclass(frozen=True)
class Comparison:
    """What is trained.

    Attributes:
        cfg: of the model; its dropout must be 0.
        samples: what is learned; see `text/samples.py`.
        settings: of the loop; its dtype is not looked at.
        implementations: names of the registry, "eager" among them.
        dtype: a key of YARDSTICKS. device: of torch.
    """

    cfg: Mapping
    samples: Samples
    settings: TrainSettings
    implementations: Sequence[str]
    dtype: str = "fp32"
    device: str = "cpu"


@dataclass
class Curve:
    """One contender's run.

    Attributes:
        name: of an implementation, or of the yardstick.
        losses: nats per token of each step's own batch, before its update.
        seconds: of each step; None for the first and the one that was watched for memory.
        tokens: predicted in each step.
        validation: nats per token at the end.
        resting_bytes: weights and the optimizer's numbers. peak_bytes: alive at a step's worst moment above those.
        failed: why it ended early; None: it did not.
    """

    name: str
    losses: list[float] = field(default_factory=list)
    seconds: list[float | None] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    validation: float | None = None
    resting_bytes: int | None = None
    peak_bytes: int | None = None
    failed: str | None = None


class SharedSamples:
    """The samples of all contenders: each batch is made once, before their turns, so that none pays for it."""

    per_epoch = None

    def __init__(self, samples: Samples, settings: TrainSettings):
        self.samples, self.kept = samples, {}
        self.held_out = samples.validation(settings.eval_tokens, settings.batch_size)

    def batch(self, first: int, count: int) -> Batch:
        if (first, count) not in self.kept:
            self.kept = {(first, count): self.samples.batch(first, count)}
        return self.kept[first, count]

    def validation(self, tokens: int, batch_size: int) -> list[Batch]:
        return self.held_out


class Reversed(SharedSamples):
    """The same batches with their rows in reverse order: equal on paper, and summed in another order."""

    def __init__(self, shared: SharedSamples):
        self.shared, self.held_out = shared, shared.held_out

    def batch(self, first: int, count: int) -> Batch:
        return Batch(*(None if part is None else part.flip(0) for part in self.shared.batch(first, count)))


class Contender(Watch):
    """A model that trains one step at a time, and notes what it cost."""

    def __init__(self, comparison: Comparison, curve: Curve, samples: SharedSamples):
        yardstick = curve.name not in comparison.implementations
        in_fp32 = comparison.dtype in ("fp64", "fp32") or (yardstick and comparison.dtype != "fp32")
        self.settings = replace(comparison.settings, dtype="fp32" if in_fp32 else comparison.dtype, eval_on_start=False)
        self.curve, self.samples, self.device = curve, samples, comparison.device
        torch.manual_seed(comparison.settings.seed)
        model = GPTModel({**comparison.cfg, **strictly("eager" if yardstick else curve.name)}).to(comparison.device)
        self.state: TrainState = start(model.double() if comparison.dtype == "fp64" else model, self.settings)
        self.began = None

    def one_step(self) -> None:
        """The loop, from where it stopped, until it asks before the second step."""
        self.began = None
        train(self.state.model, self.samples, self.settings, state=self.state, watch=self, stop=self.stop)

    def stop(self) -> str | None:
        if self.began is not None:
            return "the next one's turn"
        wait_for(self.device)
        self.began = time.perf_counter()
        return None

    def step(self, record):
        wait_for(self.device)
        self.curve.seconds.append(time.perf_counter() - self.began)
        self.curve.losses.append(record.loss)
        self.curve.tokens.append(record.tokens)

    def evaluation(self, step, loss, tokens, seconds):
        self.curve.validation = loss

    def watched_step(self) -> None:
        """A step that is not timed, for its memory."""
        self.curve.peak_bytes = peak_memory(self.one_step, torch.device(self.device).type)
        self.curve.seconds[-1] = None


@without_announcements()
def refused(comparison: Comparison) -> dict[str, str]:
    """{name: why its own check says no to training this model here, in this dtype}."""
    with torch.device("meta"):
        model = GPTModel(comparison.cfg)
    tokens, dtype = comparison.cfg["context_length"], DTYPES[comparison.dtype]
    reasons = {
        name: reason_against(model, name, comparison.device, dtype, training=True, tokens=tokens)
        for name in comparison.implementations
    }
    return {name: why for name, why in reasons.items() if why is not None}


def names_of_curves(comparison: Comparison) -> list[str]:
    """The contenders: those implementations that can train here, and the yardstick."""
    out, yardstick = refused(comparison), YARDSTICKS[comparison.dtype]
    return [name for name in comparison.implementations if name not in out] + ([yardstick] if yardstick else [])


@without_announcements()
def run_comparison(comparison: Comparison, tick: Callable[[str, int], None] = lambda doing, count: None) -> list[Curve]:
    """Train them all, step by step in turn; one that fails is left out from there on, and the others go on.

    Args:
        tick: told after each step who made it, and how many of steps x `names_of_curves(comparison)` that was.
    """
    shared = SharedSamples(comparison.samples, comparison.settings)
    curves = {name: Curve(name) for name in names_of_curves(comparison)}
    contenders = {
        name: Contender(comparison, curve, Reversed(shared) if name == YARDSTICKS["fp32"] else shared)
        for name, curve in curves.items()
    }
    settings = comparison.settings
    for step, order in enumerate(orders(list(curves), settings.max_steps, random.Random(settings.seed))):
        shared.batch(step * settings.samples_per_step, settings.batch_size)
        for name in order:
            if curves[name].failed is None:
                attempt(contenders[name], watched=step == MEMORY_STEP)
            tick(name, 1)
    for name, curve in curves.items():
        if curve.seconds:
            curve.seconds[0] = None
        curve.resting_bytes = resting_bytes(contenders[name].state)
    return list(curves.values())


def attempt(contender: Contender, watched: bool) -> None:
    """One step, and in the curve why there was none."""
    try:
        (contender.watched_step if watched else contender.one_step)()
    except Exception as error:  # a kernel may raise anything, and the others should still be compared
        contender.curve.failed = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"


def too_large(comparison: Comparison) -> str | None:
    """Why the contenders would not fit into memory together; None: they should."""
    width = 2 if comparison.dtype == "fp64" else 1  # of a number, against fp32
    names, settings = names_of_curves(comparison), comparison.settings
    dtype = comparison.dtype if comparison.dtype in TORCH_DTYPES else "fp32"
    kind = "cpu" if comparison.device == "cpu" else "cuda"
    steps = [
        TrainingStep(comparison.cfg, settings.batch_size, comparison.cfg["context_length"], dtype, name, device=kind)
        for name in names
    ]
    at_rest = 12 * count_parameters(comparison.cfg) * width
    needed = len(names) * at_rest + max(training_peak(step).bytes for step in steps) * width
    what = f"{len(names)} models with their optimizers, and one training step, in {comparison.dtype}"
    return explain(needed, free_memory(torch.device(comparison.device).type), what)


def judge(curves: Sequence[Curve], dtype: str) -> list[dict]:
    """How far each contender's curve is from eager's, and whether that is within the bound. JSON-ready.

    Returns:
        for each contender: "implementation", "yardstick" (whether it is one), "passed" (None for the yardstick, and
        for eager, unless they failed), "failed", "differences" and "bound" (of each step), "largest" (difference),
        "largest_step", "of_bound" (the largest part of the bound that was reached; 1 is the bound),
        "validation", "validation_difference", "step_seconds" and "over_eager" (spreads), "seconds" (of all steps),
        "tokens_per_second", "resting_bytes", "peak_bytes".
    """
    by_name = {curve.name: curve for curve in curves}
    eager, yardstick = by_name["eager"], by_name.get(YARDSTICKS[dtype])
    bound = bounds(eager, yardstick)
    return [judged(curve, eager, bound, reference=curve in (eager, yardstick)) for curve in curves]


def bounds(eager: Curve, yardstick: Curve | None) -> list[float]:
    """The most that a contender's loss may differ from eager's at each step, in nats."""
    if yardstick is None:
        return [FP64_BOUND] * len(eager.losses)
    reached = [value if value == value else float("inf") for value in differences(yardstick, eager)]
    largest = list(accumulate(reached, max))
    eps = torch.finfo(torch.float32).eps  # the loss is a float32 number in every dtype but fp64
    return [
        MULTIPLE
        * max(largest[min(max(step, STEADY - 1), len(largest) - 1)] if largest else 0.0, eps * max(1.0, abs(loss)))
        for step, loss in enumerate(eager.losses)
    ]


def differences(curve: Curve, eager: Curve) -> list[float]:
    """|loss - eager's loss| of each step that both made."""
    return [abs(mine - its) for mine, its in zip(curve.losses, eager.losses, strict=False)]


def judged(curve: Curve, eager: Curve, bound: Sequence[float], reference: bool) -> dict:
    """One line of `judge`."""
    found = differences(curve, eager)
    parts = [value / limit for value, limit in zip(found, bound, strict=False)]
    validation = None
    if curve.validation is not None and eager.validation is not None:
        validation = abs(curve.validation - eager.validation)
    within = all(part <= 1 for part in parts) and validation is not None and validation <= bound[-1]  # NaN is not <= 1
    whole = curve.failed is None and len(found) == len(eager.losses) and eager.failed is None
    worst = max(range(len(found)), key=lambda i: (parts[i] != parts[i], parts[i]), default=None)
    largest = max(range(len(found)), key=lambda i: (found[i] != found[i], found[i]), default=None)
    timed = [value for value in curve.seconds if value is not None]
    tokens = [tokens for tokens, value in zip(curve.tokens, curve.seconds, strict=True) if value is not None]
    pairs = [(a, b) for a, b in zip(curve.seconds, eager.seconds, strict=False) if a is not None and b is not None]
    return {
        "implementation": curve.name,
        "yardstick": reference and curve.name != "eager",
        "passed": (whole and within) if not reference else (None if curve.failed is None else False),
        "failed": curve.failed,
        "differences": found,
        "bound": list(bound),
        "largest": None if largest is None else found[largest],
        "largest_step": None if largest is None else largest + 1,
        "of_bound": None if worst is None else parts[worst],
        "validation": curve.validation,
        "validation_difference": validation,
        "step_seconds": spread(timed) if timed else None,
        "over_eager": spread([a / b for a, b in pairs]) if pairs else None,
        "seconds": sum(timed),
        "tokens_per_second": sum(tokens) / sum(timed) if timed else None,
        "resting_bytes": curve.resting_bytes,
        "peak_bytes": curve.peak_bytes,
    }
