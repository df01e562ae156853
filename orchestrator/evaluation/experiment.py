"""How fast does each implementation of attention train and write, in the whole model? Side by side, in one run.

In each round every implementation does a task of `workloads.py` once, in changing order, and its time is divided by
eager's of the same round: times of a machine swing with what else it does, ratios of one round much less. Not run on a
GPU.
"""

import logging
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from GPT2Model.gpt2 import GPTModel
from orchestrator.evaluation.attention_bench import orders, spread
from orchestrator.evaluation.device_timing import peak_memory, timed
from orchestrator.evaluation.memory_guard import explain, free_memory
from orchestrator.evaluation.training_memory import TrainingStep, training_peak
from orchestrator.evaluation.workloads import TASKS, Generation, Training, Workload, reason_against, strictly
from orchestrator.training import mfu
from orchestrator.training.precision import TORCH_DTYPES


@dataclass(frozen=True)
class Experiment:
    """What is measured.

    Attributes:
        implementations: names of the registry.
        dtype: of the matrix products in training, and of the weights in generation: "fp32", "bf16" or "fp16".
        rounds: turns that are timed, after a first one of each that is not.
        seed: of weights, tokens, and the order in each round.
        compile: train with torch.compile.
    """

    workloads: Sequence[Workload]
    implementations: Sequence[str]
    dtype: str = "fp32"
    device: str = "cpu"
    rounds: int = 12
    seed: int = 0
    compile: bool = False


@dataclass
class Row:
    """One implementation at one task of one workload.

    Attributes:
        not_measured: why there are no figures; None: there are.
        failed: it raised an error, and `not_measured` holds it.
        first_seconds: of the first turn, with what is compiled or loaded once.
        seconds, over_eager: {what: spread}, over_eager round by round, None without eager. In training "step"; in
            generation "first_token" (from the call to the first new token), "later_tokens" (all others), "text" (both).
        resting_bytes: alive between two turns: the weights, and in training the optimizer's numbers.
        peak_bytes: alive at the worst moment of a turn, above those; None: this device does not tell.
        rates: in training samples, tokens (per second) and mfu (0 to 1); in generation
            tokens (later ones per second) and first_token (seconds). All from medians.
    """

    workload: str
    task: str
    implementation: str
    not_measured: str | None = None
    failed: bool = False
    first_seconds: float | None = None
    seconds: dict[str, dict] | None = None
    over_eager: dict[str, dict] | None = None
    resting_bytes: int | None = None
    peak_bytes: int | None = None
    rates: dict[str, float] | None = None


@contextmanager
def without_announcements() -> Iterator[None]:
    """For the time of a `with`, no line for each model that is built; warnings are still heard."""
    logger = logging.getLogger("CMHA")
    level = logger.level
    logger.setLevel("WARNING")
    try:
        yield
    finally:
        logger.setLevel(level)


@without_announcements()
def run_experiment(
    experiment: Experiment, tick: Callable[[str, int], None] = lambda doing, cost: None
) -> tuple[list[Row], list[dict], mfu.Peak]:
    """Measure everything; an implementation that fails is left out from there on, and the others go on.

    Args:
        tick: told what was done and what part of `costs(experiment)` it was.
    Returns:
        a Row for each workload, task and implementation; and the rounds: {"workload", "task", "round", "seconds":
        {name: {what: s}}}, names in the order in which they ran, None for one that failed there. And the peak that MFU
        is a part of: where it is measured, the best of before, between and after the workloads, since another program
        may be busy at one of these moments.
    """
    rows, rounds, peak = [], [], mfu.peak_flops(experiment.device, experiment.dtype)
    for workload in experiment.workloads:
        for task in TASKS:
            here = [Row(str(workload), task, name) for name in experiment.implementations]
            refuse(experiment, workload, here)
            unit = workload.cost(task)
            tick(f"{workload}, {task}", unit * (experiment.rounds + 2) * sum(bool(row.not_measured) for row in here))
            if any(row.not_measured is None for row in here):
                rounds += run_task(experiment, workload, task, here, lambda doing, unit=unit: tick(doing, unit))
            rows += here
        mfu.measured_peak.cache_clear()
        peak = max(peak, mfu.peak_flops(experiment.device, experiment.dtype), key=lambda found: found.flops)
    for row in rows:
        if row.seconds is not None:
            workload = next(one for one in experiment.workloads if str(one) == row.workload)
            row.rates = rates(row, workload, peak)
    return rows, rounds, peak


def costs(experiment: Experiment) -> int:
    """What all turns cost together: a first one, the rounds and one for the memory, for each implementation."""
    turns = len(experiment.implementations) * (experiment.rounds + 2)
    return turns * sum(workload.cost(task) for workload in experiment.workloads for task in TASKS)


def refuse(experiment: Experiment, workload: Workload, rows: Sequence[Row]) -> None:
    """Say in the rows of one task which implementations cannot do it here, or would not fit into memory."""
    with torch.device("meta"):
        model = GPTModel(workload.cfg)
    for row in rows:
        training = row.task == "training"
        row.not_measured = reason_against(
            model, row.implementation, experiment.device, TORCH_DTYPES[experiment.dtype], training,
            workload.tokens if training else workload.prompt,
        )  # fmt: skip
        if row.not_measured is None and training:
            kind = "cuda" if experiment.device != "cpu" else "cpu"
            step = TrainingStep(
                workload.cfg, workload.batch, workload.tokens, experiment.dtype, row.implementation, device=kind
            )
            needed, free = training_peak(step), free_memory(torch.device(experiment.device).type)
            row.not_measured = explain(needed.bytes, free, f"by formula, at its worst moment: {needed.name}")


def run_task(
    experiment: Experiment, workload: Workload, task: str, rows: Sequence[Row], tick: Callable[[str], None]
) -> list[dict]:
    """Fill in the rows of one task that can run, and return its rounds."""
    about = (workload, experiment.dtype, experiment.device, experiment.seed)
    doer = Training(*about, experiment.compile) if task == "training" else Generation(*about)
    by_name = {row.implementation: row for row in rows if row.not_measured is None}

    def attempt(doing: Callable, name: str):
        """`doing()` under this implementation, or None if it raised."""
        try:
            with doer.model.using_attention(strictly(name)):
                return doing()
        except Exception as error:  # a kernel may raise anything, and the others should still be measured
            line = next(iter(str(error).splitlines()), "")
            by_name[name].not_measured, by_name[name].failed = f"{type(error).__name__}: {line}", True
            doer.clean()
            return None
        finally:
            tick(f"{workload}, {task}, {name}")

    def still_in() -> list[str]:
        return [name for name, row in by_name.items() if not row.failed]

    for name in still_in():
        by_name[name].first_seconds = attempt(lambda: timed(doer.turn, experiment.device), name)
    rounds = []
    for number, order in enumerate(in_turn(experiment, f"{workload} {task}", still_in())):
        seconds = {name: attempt(doer.turn, name) for name in order if name in still_in()}
        rounds.append({"workload": str(workload), "task": task, "round": number, "seconds": seconds})
    for name in still_in():
        by_name[name].peak_bytes = attempt(lambda: peak_memory(doer.turn, torch.device(doer.device).type), name)
    for name in still_in():
        by_name[name].resting_bytes = doer.resting_bytes()
        summarise(by_name[name], rounds, with_eager="eager" in still_in())
    return rounds


def in_turn(experiment: Experiment, what: str, names: Sequence[str]) -> Iterator[list[str]]:
    return orders(names, experiment.rounds, random.Random(f"{experiment.seed} {what}"))


def summarise(row: Row, rounds: Sequence[dict], with_eager: bool) -> None:
    """Fill in the row's spreads from its rounds; the ratio to eager is taken round by round, then its median."""
    mine = [taken["seconds"][row.implementation] for taken in rounds]
    row.seconds = {what: spread([times[what] for times in mine]) for what in mine[0]}
    if with_eager:
        eager = [taken["seconds"]["eager"] for taken in rounds]
        row.over_eager = {
            what: spread([a[what] / b[what] for a, b in zip(mine, eager, strict=True)]) for what in mine[0]
        }


def rates(row: Row, workload: Workload, peak: mfu.Peak) -> dict[str, float]:
    """What the medians mean per second."""
    median = {what: found["median"] for what, found in row.seconds.items()}
    if row.task == "generation":
        return {"tokens": (workload.new_tokens - 1) / median["later_tokens"], "first_token": median["first_token"]}
    tokens = workload.batch * workload.tokens / median["step"]
    return {
        "samples": workload.batch / median["step"],
        "tokens": tokens,
        "mfu": mfu.mfu(workload.cfg, workload.tokens, tokens, peak),
    }
