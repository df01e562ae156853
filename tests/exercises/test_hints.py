"""Every hint is earned by a wrong solution, and by exactly the mistake that it names; stubs and solutions are known."""

import math

import pytest
import torch
import torch.nn.functional as F

from orchestrator.learning.checks.form import GENERAL
from orchestrator.learning.checks.judge import judge
from orchestrator.learning.checks.loading import ROOT, loaded
from orchestrator.learning.checks.registry import EXERCISES
from tests.exercises.wrong_solutions import SOLUTIONS, WRONG, source

REGISTRY = {(exercise.name, mistake.name) for exercise in EXERCISES.values() for mistake in exercise.mistakes}
ANYWHERE = {mistake.name for mistake in GENERAL}


def test_every_hint_has_a_wrong_solution():
    assert len(REGISTRY) > 150
    assert {entry for entry in WRONG if entry[1] not in ANYWHERE} == REGISTRY
    assert {name for _, name in WRONG if name in ANYWHERE} == ANYWHERE


def test_no_two_hints_of_an_exercise_share_a_name():
    for exercise in EXERCISES.values():
        names = [mistake.name for mistake in (*exercise.mistakes, *GENERAL)]
        assert len(names) == len(set(names))


@pytest.mark.parametrize(("exercise", "mistake"), sorted(WRONG))
def test_a_wrong_solution_earns_exactly_its_hint(exercise, mistake, tmp_path):
    file = tmp_path / "adapters.py"
    file.write_text(source(exercise, mistake), encoding="utf-8")
    with loaded(file) as module:
        verdict = judge(EXERCISES[exercise], getattr(module, exercise))
    assert (verdict.status, verdict.mistakes) == ("wrong", [mistake]), verdict.says
    assert verdict.points == 0


@pytest.mark.parametrize("name", EXERCISES)
def test_the_solution_is_right(name):
    with loaded(SOLUTIONS) as module:
        verdict = judge(EXERCISES[name], getattr(module, name))
    assert verdict.status == "right", verdict.says
    assert verdict.passed == verdict.cases >= 5


@pytest.mark.parametrize("name", EXERCISES)
def test_the_stub_is_not_started(name):
    with loaded(ROOT / "exercises" / "adapters.py") as module:
        verdict = judge(EXERCISES[name], getattr(module, name))
    assert (verdict.status, verdict.says) == ("not started", [])


# ------------------------------------------------------------------ what is right but for its last digits


def the_numbers(verdict) -> list[str]:
    """What was got and what is right, as they are printed."""
    line = next(line for line in verdict.says if line.startswith("first difference"))
    return line.rsplit(": got ", 1)[1].split(", right is ")


def test_a_whole_table_whose_digits_are_lost_is_told_both_and_the_digits_are_shown():
    def tiled_attention(queries, keys, values, mask, tile_size):
        scores = (queries @ keys.mT / math.sqrt(queries.shape[-1])).masked_fill(~mask, -torch.inf)
        log_sum_exp = scores.logsumexp(dim=-1)
        return (scores - log_sum_exp.masked_fill(~mask.any(dim=-1), 0.0)[..., None]).exp() @ values, log_sum_exp

    verdict = judge(EXERCISES["tiled_attention"], tiled_attention)
    assert verdict.mistakes == ["whole_table", "rounding"]
    assert verdict.passed == verdict.cases - 1
    got, right = the_numbers(verdict)
    assert got != right
    assert len(got) == len(right) > len("1.28595")
    assert float(got) == pytest.approx(float(right), rel=1e-4)


def test_what_went_through_bfloat16_is_told_so():
    def one_head(queries, keys, values, mask):
        parts = (part.bfloat16() for part in (queries, keys, values))
        return F.scaled_dot_product_attention(*parts, attn_mask=mask).to(queries.dtype)

    verdict = judge(EXERCISES["one_head"], one_head)
    assert (verdict.status, verdict.mistakes) == ("wrong", ["rounding"])
    assert "all numbers that came back are bfloat16's" in verdict.says


def test_a_formula_that_is_nearly_right_is_not_called_rounding():
    """Off by 0.00005 in float32 and in float64 alike."""
    verdict = judge(EXERCISES["gelu"], lambda x: F.gelu(x, approximate="tanh") + 5e-5)
    assert verdict.mistakes == []
    assert verdict.says[0] == "No known mistake fits."
    assert len(set(the_numbers(verdict))) == 2
