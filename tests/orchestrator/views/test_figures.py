"""Figures show what they were given: read back from the axes, not from the picture."""

import pytest
import torch

from orchestrator.training.loop import History
from orchestrator.views.figures import causality_map, implementations_chart, loss_curve


def test_the_causality_map_marks_exactly_the_positions_that_did_not_move():
    moved = torch.tensor([[0.5, 0.0, 0.0], [0.25, 1.0, 0.0], [0.125, 0.5, 2.0]])
    figure = causality_map(moved, title="a title")
    axes, colour_scale = figure.axes
    (marks,) = axes.lines
    assert set(zip(*marks.get_data(), strict=True)) == {(1, 0), (2, 0), (2, 1)}  # (changed, looked at)
    (image,) = axes.images
    assert torch.equal(torch.tensor(image.get_array().data) > 1e-6, moved > 0)
    assert axes.get_title() == "a title"
    assert "exactly 0" in colour_scale.get_ylabel()


def test_the_causality_map_shows_a_leak_into_the_past():
    """Nothing above the diagonal may look like 0 if it is not: the smallest change is no mark."""
    moved = torch.ones(4, 4).tril()
    moved[0, 3] = 1e-30
    (marks,) = causality_map(moved, title="").axes[0].lines
    assert (3, 0) not in set(zip(*marks.get_data(), strict=True))
    assert len(marks.get_xdata()) == 5


def test_the_loss_curve_draws_the_floor_where_it_is_and_how_much_is_left():
    history = History(train=[(0, 5.0), (1, 4.0)], validation=[(0, 5.1), (2, 0.6)])
    left, right = loss_curve(history, title="it", floor=0.5, limit=0.03).axes
    lines = {line.get_label(): line for line in left.lines}
    assert lines["floor, exact: 0.5000"].get_ydata()[0] == 0.5
    assert list(lines["held-out text"].get_ydata()) == [5.1, 0.6]
    assert list(lines["training batch"].get_xdata()) == [0, 1]
    assert list(right.lines[0].get_ydata()) == pytest.approx([4.6, 0.1])
    assert right.lines[1].get_ydata()[0] == 0.03
    (alone,) = loss_curve(history, title="it", baseline=("frequencies", 7.0)).axes
    assert [line.get_ydata()[0] for line in alone.lines if line.get_label().startswith("frequencies")] == [7.0]


def test_each_bar_stands_beside_its_own_name():
    rows = [
        {"implementation": name, "ratio": {"context": ratio, "dQ": ratio / 2}, "seconds_over_eager": time}
        for name, ratio, time in (("eager", 0.2, 1.0), ("sdpa", 0.4, 0.6), ("wrong", 3.0, 2.0))
    ]
    left, right = implementations_chart(rows, title="it").axes
    for axes, key in ((left, lambda row: max(row["ratio"].values())), (right, lambda row: row["seconds_over_eager"])):
        names = [label.get_text() for label in left.get_yticklabels()]
        widths = {names[round(bar.get_y() + bar.get_height() / 2)]: bar.get_width() for bar in axes.patches}
        assert widths == {row["implementation"]: key(row) for row in rows}
