"""experiment: everything that serves is measured in turn; what fails is reported; rates follow from medians. No timing
is asserted."""

from dataclasses import replace
from itertools import count
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from CMHA.implementations import IMPLEMENTATIONS, eager, sdpa
from CMHA.request import Reason
from orchestrator.evaluation import experiment as module
from orchestrator.evaluation.experiment import Experiment, Row, costs, rates, run_experiment
from orchestrator.evaluation.workloads import Training, Workload
from orchestrator.training import mfu
from orchestrator.training.mfu import Peak

SMALL = Workload("nano", 2, 24, prompt=8, new_tokens=3, vocab_size=31, changes={"n_layers": 1, "emb_dim": 32})
OTHER = replace(SMALL, tokens=16, changes={"n_layers": 2, "emb_dim": 16})
NAMES = ("eager", "sdpa", "flash_tiled")
NUMBERS = count()


def plant(monkeypatch, attention, check=lambda request: []) -> str:
    """Put an implementation into the registry, under a name that no other test used: choices are remembered by name."""
    name = f"planted_{next(NUMBERS)}_to_measure"
    module = SimpleNamespace(SUMMARY="planted", ALIASES=(), check=check, attention=attention)
    monkeypatch.setitem(IMPLEMENTATIONS, name, module)
    return name


def by_task(rows: list[Row]) -> dict[tuple, Row]:
    return {(row.workload, row.task, row.implementation): row for row in rows}


@pytest.fixture(autouse=True)
def short_look_at_the_peak(monkeypatch):
    monkeypatch.setattr(mfu, "SECONDS", 0.01)


@pytest.fixture(scope="module")
def measured():
    """One real run: (experiment, rows, rounds, peak, what the progress was told)."""
    experiment, told = Experiment([SMALL, OTHER], [*NAMES, "flash_attention_2"], rounds=3), []
    rows, rounds, peak = run_experiment(experiment, lambda doing, cost: told.append(cost))
    return experiment, rows, rounds, peak, told


def test_everything_that_serves_is_measured_at_both_tasks(measured):
    _, rows, rounds, _, _ = measured
    found = by_task(rows)
    assert len(found) == 2 * 2 * 4
    for (_, task, name), row in found.items():
        if name == "flash_attention_2":
            assert "CUDA" in row.not_measured
            assert not row.failed
            continue
        assert row.not_measured is None
        assert set(row.seconds) == ({"step"} if task == "training" else {"first_token", "later_tokens", "text"})
        assert row.peak_bytes > 0
        assert row.first_seconds > 0
    assert len(rounds) == 2 * 2 * 3


def test_the_order_changes_from_round_to_round(measured):
    _, _, rounds, _, _ = measured
    for workload in (SMALL, OTHER):
        for task in ("training", "generation"):
            here = [found for found in rounds if (found["workload"], found["task"]) == (str(workload), task)]
            assert {next(iter(found["seconds"])) for found in here} == set(NAMES)  # each goes first once in three


def test_the_figures_can_be_recomputed_from_the_rounds(measured):
    _, rows, rounds, _, _ = measured
    for (workload, task, name), row in by_task(rows).items():
        if row.not_measured:
            continue
        here = [found["seconds"] for found in rounds if (found["workload"], found["task"]) == (workload, task)]
        for what in row.seconds:
            mine, eagers = (np.array([found[each][what] for found in here]) for each in (name, "eager"))
            for values, shown in ((mine, row.seconds[what]), (mine / eagers, row.over_eager[what])):
                assert list(shown.values()) == pytest.approx(np.percentile(values, [0, 25, 50, 75, 100]))


def test_rates_are_what_the_medians_say_by_the_formulas(measured):
    _, rows, _, peak, _ = measured
    found = by_task(rows)
    row = found[str(SMALL), "training", "sdpa"]
    step = row.seconds["step"]["median"]
    assert row.rates["samples"] == pytest.approx(2 / step)
    assert row.rates["tokens"] == pytest.approx(48 / step)
    block = 4 * 32 + (32 * 96 + 96) + (32 * 32 + 32) + (2 * 32 * 128 + 128 + 32)
    flops = 6 * (31 * 32 + block + 64) + 6 * 1 * 32 * 24  # 6 N + 6 L C T
    assert row.rates["mfu"] == pytest.approx(48 / step * flops / peak.flops)
    row = found[str(SMALL), "generation", "sdpa"]
    assert row.rates["tokens"] == pytest.approx(2 / row.seconds["later_tokens"]["median"])
    assert row.rates["first_token"] == row.seconds["first_token"]["median"]


def test_at_rest_are_weights_and_the_optimizers_two_numbers_for_each(measured):
    _, rows, _, _, _ = measured
    found = by_task(rows)
    weights = found[str(SMALL), "generation", "sdpa"].resting_bytes
    training = found[str(SMALL), "training", "sdpa"].resting_bytes
    assert 3 * weights <= training < 3 * weights + 1000  # and a step counter for each tensor
    assert found[str(SMALL), "training", "eager"].peak_bytes > weights  # the gradients at least


def test_progress_comes_to_its_end(measured):
    experiment, _, _, _, told = measured
    assert sum(told) == costs(experiment)


def test_mfu_is_a_part_of_the_best_peak_that_was_seen(monkeypatch):
    speeds = iter([2e9, 8e9, 4e9])
    peaks = SimpleNamespace(
        peak_flops=lambda device, dtype: Peak(next(speeds), "a chip", "a test"),
        measured_peak=SimpleNamespace(cache_clear=lambda: None),
        mfu=lambda cfg, tokens, speed, peak: peak.flops,
    )
    monkeypatch.setattr(module, "mfu", peaks)
    rows, _, peak = run_experiment(Experiment([SMALL, OTHER], ["eager"], rounds=1))
    assert peak.flops == 8e9
    assert {row.rates["mfu"] for row in rows if row.task == "training"} == {8e9}


def test_one_that_fails_in_the_middle_is_reported_and_the_others_go_on(monkeypatch):
    calls = []

    def breaks(*args, **options):
        calls.append(1)
        if len(calls) > 2:
            raise RuntimeError("the kernel\nbroke")
        return sdpa.attention(*args, **options)

    planted = plant(monkeypatch, breaks)
    rows, rounds, _ = run_experiment(Experiment([SMALL], ["eager", planted, "sdpa"], rounds=3))
    found = by_task(rows)
    broken = found[str(SMALL), "training", planted]
    assert broken.failed
    assert broken.not_measured == "RuntimeError: the kernel"
    assert broken.rates is None
    assert found[str(SMALL), "training", "sdpa"].seconds["step"]["median"] > 0
    in_training = [found["seconds"] for found in rounds if found["task"] == "training"]
    assert [seconds.get(planted) is None for seconds in in_training] == [False, True, True]


class BreaksOnTheWayBack(torch.autograd.Function):
    """The identity, whose backward pass raises."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise RuntimeError("no backward kernel")


def test_what_half_a_step_left_is_no_part_of_the_next_ones_step(monkeypatch):
    before = []

    class Watched(Training):
        def turn(self):
            before.append(all(weight.grad is None for weight in self.model.parameters()))
            return super().turn()

    def breaks(queries, *args, **options):
        return sdpa.attention(BreaksOnTheWayBack.apply(queries), *args, **options)

    monkeypatch.setattr(module, "Training", Watched)
    planted = plant(monkeypatch, breaks)
    rows, _, _ = run_experiment(Experiment([SMALL], [planted, "eager"], rounds=1))
    assert by_task(rows)[str(SMALL), "training", planted].not_measured == "RuntimeError: no backward kernel"
    assert before == [True] * 4  # the one that breaks; eager's first turn, its round, its memory


def test_a_loss_that_is_no_number_is_a_failure(monkeypatch):
    def not_a_number(queries, *args, **options):
        context, weights = eager.attention(queries, *args, **options)
        return context * float("nan"), weights

    planted = plant(monkeypatch, not_a_number)
    rows, _, _ = run_experiment(Experiment([SMALL], [planted, "eager"], rounds=1))
    found = by_task(rows)
    assert found[str(SMALL), "training", planted].not_measured == "FloatingPointError: the loss is nan"
    assert found[str(SMALL), "training", "eager"].not_measured is None  # the model of both is still whole


def test_one_without_a_backward_pass_is_measured_at_generation_only(monkeypatch):
    reason = Reason("needs_grad", "it has no backward pass", "use sdpa")
    planted = plant(monkeypatch, sdpa.attention, lambda request: [reason] if request.needs_grad else [])
    rows, _, _ = run_experiment(Experiment([SMALL], ["eager", planted], rounds=1))
    found = by_task(rows)
    assert found[str(SMALL), "training", planted].not_measured == "it has no backward pass"
    assert found[str(SMALL), "generation", planted].seconds["text"]["median"] > 0


def test_each_runs_in_its_own_name_and_in_the_dtype(monkeypatch):
    seen = []

    def watched(queries, *args, **options):
        seen.append((queries.requires_grad, queries.dtype))
        return sdpa.attention(queries, *args, **options)

    planted = plant(monkeypatch, watched)
    run_experiment(Experiment([SMALL], ["eager", planted], dtype="bf16", rounds=2))
    trained = [dtype for gradient, dtype in seen if gradient]
    assert len(trained) == 4  # a first turn, two rounds, one for the memory; one layer
    assert len(seen) - len(trained) == 4 * 3  # three new tokens each
    assert {str(dtype) for _, dtype in seen} == {"torch.bfloat16"}


def test_what_would_not_fit_is_left_out_with_the_moment_that_is_too_large(monkeypatch):
    monkeypatch.setattr(module, "free_memory", lambda device: 2**17)
    rows, rounds, _ = run_experiment(Experiment([SMALL], ["eager"], rounds=1))
    training = by_task(rows)[str(SMALL), "training", "eager"]
    assert "it would take about" in training.not_measured
    assert "by formula" in training.not_measured
    assert not training.failed
    assert {found["task"] for found in rounds} == {"generation"}


def test_without_eager_there_is_no_ratio():
    row = Row("w", "training", "sdpa", seconds={"step": {"median": 0.5}})
    assert row.over_eager is None
    assert rates(row, SMALL, Peak(1e9, "", ""))["samples"] == 4
