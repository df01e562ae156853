"""Figures show what they were given: read back from the axes, not from the picture."""

import torch

from orchestrator.views.figures import causality_map


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
