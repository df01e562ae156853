"""Figures of the variants: computed from the code or the results, with nothing cut off."""

import math

import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex

from orchestrator.views import variant_figures
from orchestrator.views.variant_tables import LABELS, SIZES, TASKS


def results(speed: bool = True) -> dict:
    """Made up: variant number i learns to i * 0.01 above the floor, and takes 1 + i / 10 of GPT-2's time."""
    runs = [
        {
            "model": name,
            "seed": seed,
            "above_floor": 0.01 * i + 0.001 * seed,
            "grammatical": 90 + i,
            "curve": [[0, 4.5], [1000, 0.5], [2000, 0.01 * i + 0.001 * seed]],
        }
        for i, name in enumerate(LABELS)
        for seed in (0, 1)
    ]
    windows = [
        {"model": name, "seed": seed, "whole": [2.0, 1.0, 3.0 + seed, 4.0], "cut": [2.0, 1.0, 2.0, 1.0]}
        for name in ("gpt2", "rope")
        for seed in (0, 1)
    ]
    costs = {
        name: {"parameters": 1000 - 10 * i, "flops_per_token": 500, "cache_bytes_per_token": 64 // (1 + i)}
        for i, name in enumerate(LABELS)
    }
    length = {"learned": 32, "read": 64, "bin": 16, "runs": windows}
    made = {"losses": {"seeds": [0, 1], "steps": 20, "runs": runs, "windows": length}, "costs": costs}
    cells = {
        name: {"milliseconds": 5.0 + i, "ratio": [1 + i / 10, 1 + i / 20, 1 + i / 5]} for i, name in enumerate(LABELS)
    }
    return made | ({"speed": {size: dict.fromkeys(TASKS, cells) for size in SIZES}} if speed else {})


def texts_inside(figure) -> None:
    """Every title and label lies on the picture."""
    FigureCanvasAgg(figure).draw()
    width, height = figure.bbox.width, figure.bbox.height
    for axes in figure.axes:
        for text in (axes.title, axes.xaxis.label, axes.yaxis.label, *axes.texts):
            if text.get_text() and text.get_visible():
                box = text.get_window_extent()
                assert -1 <= box.x0 <= box.x1 <= width + 1, text
                assert -1 <= box.y0 <= box.y1 <= height + 1, text


@pytest.mark.parametrize("speed", [True, False])
def test_every_figure_is_drawn_and_nothing_is_cut_off(speed):
    figures = variant_figures.all_figures(results(speed))
    assert set(figures) == {"shared_heads", "turning_pairs", "learning_curves", "costs", "longer_than_learned"}
    for figure in figures.values():
        texts_inside(figure)


def test_query_heads_are_joined_to_the_head_that_attention_gives_them():
    figure = variant_figures.shared_heads(4)
    for axes, n_kv_heads in zip(figure.axes, (4, 2, 1), strict=True):
        places = {text.get_text(): text.get_position()[0] for text in axes.texts}
        assert len(axes.lines) == 4
        assert len(places) == 4 + n_kv_heads
        for query, line in enumerate(axes.lines):
            # F.scaled_dot_product_attention(..., enable_gqa=True) repeats each key-value head for its group
            head = torch.arange(n_kv_heads).repeat_interleave(4 // n_kv_heads)[query].item()
            assert list(line.get_xdata()) == [places[f"Q{query}"], places[f"K{head} V{head}"]]


def test_pairs_turn_by_position_times_their_own_speed():
    found = variant_figures.turned(torch.cat([torch.ones(16), torch.zeros(16)]), 50).double()
    for position, pair in ((0, 0), (1, 0), (7, 3), (49, 15)):
        angle = position * 10_000 ** (-2 * pair / 32)
        assert found[position, pair].item() == pytest.approx(math.cos(angle), abs=1e-6)
        assert found[position, pair + 16].item() == pytest.approx(math.sin(angle), abs=1e-6)


def test_the_score_is_the_same_wherever_query_and_key_stand():
    right = variant_figures.turning_pairs().axes[2]
    longest, *others = [line.get_ydata() for line in right.lines]
    for scores in others:
        assert scores == pytest.approx(longest[: len(scores)], abs=2e-5)
    assert max(longest) - min(longest) > 0.5  # and not the same at every distance


def test_each_seed_has_a_line_beside_those_of_gpt2():
    figure = variant_figures.learning_curves(results())
    names = [name for name in LABELS if name != "gpt2"]
    for axes, name in zip(figure.axes, names, strict=True):
        assert axes.get_title() == LABELS[name]
        assert axes.get_yscale() == "log"
        at = list(LABELS).index(name)
        assert [line.get_linestyle() for line in axes.lines] == ["--", "--", "-", "-"]
        assert all(list(line.get_xdata()) == [0, 1, 2] for line in axes.lines)  # thousands
        ends = [line.get_ydata()[-1] for line in axes.lines]
        assert ends == pytest.approx([5e-4, 0.001, 0.01 * at, 0.01 * at + 0.001])  # 0 has no place on a log axis
    assert "2 seeds" in figure.get_suptitle()


def test_bars_are_ratios_to_gpt2_and_timed_ones_have_their_quartiles():
    figure = variant_figures.costs(results())
    panels = {axes.get_title(): axes for axes in figure.axes if axes.axison}
    assert len(panels) == 3 + len(SIZES) * len(TASKS)
    order = list(LABELS)[::-1]
    widths = [bar.get_width() for bar in panels["parameters"].patches]
    assert widths == pytest.approx([(1000 - 10 * list(LABELS).index(name)) / 1000 for name in order])
    timed = panels["time: generation\n(nano)"]
    assert [bar.get_width() for bar in timed.patches] == pytest.approx([1 + list(LABELS).index(n) / 10 for n in order])
    spans = [list(line.get_xdata()) for line in timed.lines if to_hex(line.get_color()) == "#000000"]
    assert spans == [pytest.approx([1 + i / 20, 1 + i / 5]) for i in range(6, 0, -1)]
    assert [label.get_text() for label in panels["parameters"].get_yticklabels()] == [LABELS[name] for name in order]


def test_the_loss_by_position_shows_where_training_ended():
    axes = variant_figures.longer_than_learned(results()).axes[0]
    lines = {line.get_label(): line for line in axes.lines}
    assert list(lines["rotary positions, read in windows of 128"].get_xdata()) == [8, 24, 40, 56]
    assert list(lines["rotary positions, read in windows of 128"].get_ydata()) == [2.0, 1.0, 3.5, 4.0]
    assert list(lines["GPT-2, read in windows of 64"].get_ydata()) == [2.0, 1.0, 2.0, 1.0]
    border = next(line for line in axes.lines if line.get_linestyle() == "--")
    assert list(border.get_xdata()) == [32, 32]
