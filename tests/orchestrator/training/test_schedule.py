"""The learning rate against its closed forms, written another way: exact fractions, and cosines squared."""

import math
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.training.schedule import learning_rate

RUNS = {
    "max_steps": st.integers(1, 400),
    "warmup": st.integers(0, 420),
    "ratio": st.fractions(0, 1, max_denominator=64),
}


def rates(max_steps, warmup, ratio, schedule, decay_part=0.2, peak=0.75) -> list[float]:
    numbers = {"peak": peak, "warmup_steps": warmup, "max_steps": max_steps, "min_ratio": float(ratio)}
    return [learning_rate(s, **numbers, schedule=schedule, decay_part=decay_part) for s in range(max_steps)]


@given(**RUNS, schedule=st.sampled_from(["cosine", "wsd", "constant"]))
@settings(max_examples=100, deadline=None)
def test_the_warmup_is_a_straight_line_that_ends_at_the_peak(max_steps, warmup, ratio, schedule):
    found = rates(max_steps, warmup, ratio, schedule)[:warmup]
    wanted = [Fraction(3, 4) * (step + 1) / warmup for step in range(min(warmup, max_steps))]
    assert found == pytest.approx([float(rate) for rate in wanted], rel=1e-14)
    if warmup and warmup <= max_steps:
        assert found[-1] == 0.75


@given(**RUNS)
@settings(max_examples=100, deadline=None)
def test_cosine_is_the_square_of_half_the_angle(max_steps, warmup, ratio):
    # cos^2(a / 2) = (1 + cos a) / 2: the same curve by another formula
    found = rates(max_steps, warmup, ratio, "cosine")[warmup:]
    ways = max_steps - 1 - warmup
    for i, rate in enumerate(found):
        part = Fraction(i, ways) if ways else 0
        square = math.cos(float(part) * math.pi / 2) ** 2
        assert rate == pytest.approx(0.75 * (float(ratio) + (1 - float(ratio)) * square), abs=1e-12)
    if ways > 0:
        assert found[-1] == pytest.approx(0.75 * float(ratio), abs=1e-15)


@given(**RUNS, part=st.fractions(0, 1, max_denominator=50))
@settings(max_examples=200, deadline=None)
def test_wsd_stays_at_the_peak_and_then_falls_in_equal_steps_to_the_rest(max_steps, warmup, ratio, part):
    found = rates(max_steps, warmup, ratio, "wsd", float(part))[warmup:]
    if not found:
        return
    peak = Fraction(3, 4)
    falls = {
        max(1, min(math.floor(part * max_steps + half), len(found))) for half in (Fraction(1, 2), Fraction(49, 100))
    }
    options = []
    for fall in falls:  # a half may be rounded either way
        stable = [peak] * (len(found) - fall)
        options.append(stable + [peak * (1 - (1 - ratio) * Fraction(i, fall)) for i in range(1, fall + 1)])
    assert any(found == pytest.approx([float(rate) for rate in wanted], abs=1e-12) for wanted in options)


def test_the_first_and_the_last_step_of_the_fall_of_wsd():
    found = rates(100, 10, 0.5, "wsd", 0.2, peak=1.0)
    assert found[79] == 1.0  # step 80 of 100: the last at the peak
    assert found[80] == pytest.approx(1 - 0.5 / 20)  # the first of twenty equal steps down
    assert found[99] == pytest.approx(0.5)


@pytest.mark.parametrize(("part", "at_the_peak"), [(0, 89), (1, 0)])
def test_wsd_without_a_fall_and_with_nothing_else(part, at_the_peak):
    found = rates(100, 10, 0.1, "wsd", part, peak=1.0)
    assert found.count(1.0) == at_the_peak + 1  # and the last step of the warmup
    assert found[-1] == pytest.approx(0.1)


def test_a_run_that_ends_within_the_warmup_never_falls():
    for schedule in ("cosine", "wsd", "constant"):
        assert rates(5, 10, 0.1, schedule, peak=1.0) == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])


def test_a_longer_run_of_wsd_is_the_same_until_the_shorter_ones_fall():
    short, long = (rates(steps, 10, 0.1, "wsd", 0.2) for steps in (100, 500))
    assert short[:80] == long[:80]
    assert short[80] < long[80]
    cosine, longer = (rates(steps, 10, 0.1, "cosine") for steps in (100, 500))
    assert cosine[:80] != longer[:80]


@given(**RUNS)
@settings(max_examples=50, deadline=None)
def test_constant_is_constant(max_steps, warmup, ratio):
    assert set(rates(max_steps, warmup, ratio, "constant")[warmup:]) <= {0.75}
