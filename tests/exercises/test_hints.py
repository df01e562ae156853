"""Every hint is earned by a wrong solution, and by exactly the mistake that it names; stubs and solutions are known."""

import pytest

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
