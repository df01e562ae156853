"""The figures of training show the numbers they are given."""

import math

import numpy as np
import pytest
import torch

from orchestrator.training.first_model import returns
from orchestrator.views.training_figures import above_floor, copying_by_step, copying_rows, loss_curves


def test_each_point_is_the_mean_of_the_last_steps_above_the_floor():
    losses = np.random.default_rng(0).uniform(1, 5, 40)
    shown = above_floor(losses.tolist(), floor=0.5, window=10)
    expected = [losses[max(0, i - 9) : i + 1].mean() - 0.5 for i in range(40)]
    np.testing.assert_allclose(shown, expected, rtol=0, atol=1e-12)


def test_a_run_is_drawn_at_its_own_pace_and_named():
    runs = {"two": [3.0] * 12, "eight": [2.0] * 3}
    axes = loss_curves(runs, title="t", floor=0.5, per_step={"two": 2, "eight": 8}, xlabel="stories").axes[0]
    two, eight = axes.get_lines()
    assert list(two.get_xdata()) == list(range(2, 25, 2))
    assert list(eight.get_xdata()) == [8, 16, 24]
    np.testing.assert_allclose(two.get_ydata(), 2.5)
    np.testing.assert_allclose(eight.get_ydata(), 1.5)
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["two", "eight"]
    assert two.get_linestyle() != eight.get_linestyle()  # told apart without colours
    assert (axes.get_xlabel(), axes.get_yscale()) == ("stories", "log")


@pytest.mark.parametrize("end", [math.nan, math.inf])
def test_a_run_that_ends_in_no_number_gets_a_cross_and_leaves_the_others_legible(end):
    axes = loss_curves({"wild": [5.0, 50.0, 5e6, end], "tame": [5.0, 1.0]}, title="t", floor=0.5, window=1).axes[0]
    (cross,) = [line for line in axes.get_lines() if line.get_marker() == "x"]
    assert cross.get_xdata()[0] == 3
    assert axes.get_ylim()[1] == 20
    assert cross.get_ydata()[0] <= 20
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [f"wild (ends in {end})", "tame"]


def test_a_loss_at_the_floor_or_below_it_still_has_a_place_on_the_log_axis():
    (line,) = loss_curves({"leak": [0.5, 0.1]}, title="t", floor=0.5, window=1).axes[0].get_lines()
    assert min(line.get_ydata()) > 0


@pytest.mark.parametrize(("runs", "window"), [({}, 1), ({str(i): [1.0] for i in range(6)}, 1), ({"a": [1.0]}, 0)])
def test_what_cannot_be_drawn_is_refused(runs, window):
    with pytest.raises(ValueError, match="1 to 5 runs"):
        loss_curves(runs, title="t", floor=0.5, window=window)


def test_the_copying_heads_are_named_and_drawn_in_per_cent():
    scores = {0: torch.full((2, 3), 0.03), 50: torch.tensor([[0.04, 0.4, 0.02], [0.03, 0.05, 0.25]])}
    upper, lower = copying_by_step([(0, 5.3), (50, 0.6)], scores, floor=0.5).axes
    np.testing.assert_allclose(upper.get_lines()[0].get_ydata(), [4.8, 0.1], atol=1e-12)
    named = {line.get_label(): line.get_ydata() for line in lower.get_lines() if not line.get_label().startswith("_")}
    assert set(named) == {"layer 0, head 1", "layer 1, head 2", "the other heads"}
    np.testing.assert_allclose(named["layer 0, head 1"], [3, 40], rtol=1e-5)
    np.testing.assert_allclose(named["layer 1, head 2"], [3, 25], rtol=1e-5)


def test_the_strips_hold_the_rows_before_a_word_comes_again_and_ring_where_it_stood():
    ids = torch.tensor([0, 5, 6, 7, 5, 6, 8])  # 5 and 6 come again: after 3, looking at 1; after 4, looking at 2
    words = ["start", "Max", "and", "a", "Max", "and", "an extraordinarily long word"]
    maps = {"before": torch.rand(7, 7), "after": torch.rand(7, 7)}
    figure = copying_rows(maps, words, returns(ids), title="head")
    before, after, _ = figure.axes
    for axes, name in ((before, "before"), (after, "after")):
        np.testing.assert_array_equal(axes.get_images()[0].get_array(), maps[name][[3, 4]].numpy())
        assert [label.get_text() for label in axes.get_yticklabels()] == ["a → Max", "Max → and"]
        (rings,) = axes.get_lines()
        assert list(zip(*rings.get_data(), strict=True)) == [(1, 0), (2, 1)]  # (column, strip's row)
    assert [label.get_text() for label in after.get_xticklabels()][-1] == "an extraordin…"
