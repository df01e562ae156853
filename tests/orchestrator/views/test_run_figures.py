"""The figures of a run show the numbers of its metrics, for runs of every length and kind."""

import io
import json
import math

import numpy as np
import pytest
from matplotlib.image import imread

from orchestrator.report import plain
from orchestrator.views.run_figures import (
    gradient_norm_figure,
    learning_rate_figure,
    loss_figure,
    memory_figure,
    save_run_figures,
    smoothed,
    speed_figure,
    thinned,
    usual_height,
)

NAMES = ["loss.png", "learning_rate.png", "gradient_norm.png", "speed.png"]


def step(number, loss=3.0, *, skipped=None, norm=0.5, speed=1000.0, **more) -> dict:
    return {
        "event": "step", "step": number, "loss": loss, "learning_rate": 1e-3 / number, "gradient_norm": norm,
        "tokens": 100, "seconds": 0.1, "tokens_per_second": speed, "skipped": skipped, **more,
    }  # fmt: skip


def evaluation(number, loss) -> dict:
    return {"event": "evaluation", "step": number, "loss": loss, "tokens": 100, "seconds": 1.0}


def run_of(count) -> list[dict]:
    noise = np.random.default_rng(0).normal(0, 0.1, count)
    return [
        step(i, 3 + 7 * math.exp(-10 * i / count) + noise[i - 1], norm=1 + abs(noise[i - 1]))
        for i in range(1, count + 1)
    ]


def line(axes, start):
    """The one line whose label begins so."""
    (found,) = [one for one in axes.get_lines() if str(one.get_label()).startswith(start)]
    return found


def data(found):
    return list(zip(*(np.asarray(part).tolist() for part in found.get_data()), strict=True))


def labels(axes) -> list[str]:
    return [text.get_text() for text in axes.get_legend().get_texts()]


def test_the_loss_has_each_step_the_held_out_text_the_floor_and_a_baseline():
    rows = [evaluation(0, 9.0)] + [step(i, 10 - i) for i in range(1, 6)] + [evaluation(5, 4.875)]
    (axes,) = loss_figure(rows, title="a run", floor=0.4972, baseline=("unigram", 6.5)).axes
    assert data(line(axes, "training batch")) == [(i, 10 - i) for i in range(1, 6)]
    held_out = line(axes, "held-out text")
    assert data(held_out) == [(0, 9.0), (5, 4.875)]
    assert held_out.get_marker() == "o"
    assert set(line(axes, "floor, exact: 0.4972").get_ydata()) == {0.4972}
    assert set(line(axes, "unigram: 6.5000").get_ydata()) == {6.5}
    assert [text.get_text() for text in axes.texts] == ["4.8750"]
    assert (axes.get_title(), axes.get_xlabel(), axes.get_ylabel()) == ("a run", "step", "loss (nats per token)")
    assert axes.get_yscale() == "linear"
    low, high = axes.get_ylim()
    assert low < 0.4972
    assert high > 9


def test_a_wild_batch_is_counted_and_does_not_press_the_curve_flat():
    rows = run_of(500)
    rows[300]["loss"], rows[400]["loss"] = 1e6, 1e7
    (axes,) = loss_figure(rows, title="t").axes
    assert axes.get_ylim()[1] < 15
    assert "not shown: 2 batches, up to 1e+07" in labels(axes)
    assert np.nanmax(line(axes, "mean of").get_ydata()) < 11
    (tame,) = loss_figure(run_of(500), title="t").axes
    assert not any("not shown" in label for label in labels(tame))


def test_where_a_run_begins_is_no_outlier():
    assert usual_height(np.array([10.9, 9.0] + [0.5] * 998), []) == math.inf
    assert usual_height(np.array([10.9] + [0.5] * 500 + [40.0] + [0.5] * 500), []) == 10.9
    assert usual_height(np.array([5.0] * 99 + [100.0] + [5.0] * 100), [6.0]) == 6.0
    assert usual_height(np.array([math.nan, math.inf]), []) == math.inf


def test_skipped_steps_and_a_resume_are_marked_in_every_figure():
    rows = [{"event": "start", "step": 0}, step(1), step(2, math.nan, norm=math.inf, skipped="the loss is nan")]
    rows += [{"event": "start", "step": 2}, step(3), {"event": "start", "step": 2}]
    figures = [
        draw(rows, title="t") for draw in (loss_figure, learning_rate_figure, gradient_norm_figure, speed_figure)
    ]
    for figure in figures:
        axes = figure.axes[0]
        assert list(line(axes, "skipped: 1 of 3 steps").get_xdata()) == [2]
        assert set(line(axes, "resumed").get_xdata()) == {2}
        picture(figure)
    norms = data(line(figures[2].axes[0], "each step"))
    assert norms[0] == (1, 0.5)
    assert math.isnan(norms[1][1])


def test_the_learning_rate_is_each_steps():
    (axes,) = learning_rate_figure(run_of(50), title="t").axes
    np.testing.assert_allclose(axes.get_lines()[0].get_ydata(), [1e-3 / i for i in range(1, 51)])
    assert axes.get_ylim()[0] == 0


def test_the_gradient_norm_is_on_a_log_axis_with_the_clip_and_how_often_it_was_passed():
    rows = [step(i, norm=norm) for i, norm in enumerate((8.0, 2.0, 0.5, 0.0, 0.25), start=1)]
    (axes,) = gradient_norm_figure(rows, title="t", clip=1.0).axes
    assert axes.get_yscale() == "log"
    assert set(line(axes, "clipped above 1 (50 % of the steps)").get_ydata()) == {1.0}
    (without,) = gradient_norm_figure(rows, title="t").axes
    assert labels(without) == ["each step"]


def test_speed_and_mfu_are_two_scales_of_one_line():
    rows = [step(i, speed=speed, mfu=speed / 5000) for i, speed in enumerate((10.0, 1000.0, 1200.0, 1100.0), start=1)]
    figure = speed_figure(rows, title="t")
    (axes,) = figure.axes
    assert [speed for _, speed in data(line(axes, "each step"))] == [10, 1000, 1200, 1100]
    assert set(line(axes, "median: 1,050 tokens/s").get_ydata()) == {1050}
    (right,) = axes.child_axes
    picture(figure)
    np.testing.assert_allclose(right.get_ylim(), np.array(axes.get_ylim()) / 5000)
    assert right.get_ylabel() == "MFU"
    assert speed_figure([step(1)], title="t").axes[0].child_axes == []


def test_the_mean_around_each_step_is_the_one_counted_by_hand():
    values = np.random.default_rng(1).normal(size=60)
    values[[0, 20, 21, 40]] = math.nan
    shown = smoothed(values, 11)
    for i in range(60):
        half = min(i, 5)  # narrower at the start
        around = values[i - half : i + half + 1]
        known = around[~np.isnan(around)]
        np.testing.assert_allclose(shown[i], known.mean() if len(known) else math.nan, atol=1e-12)


def test_a_straight_fall_is_not_shifted_by_the_mean():
    falling = np.linspace(10, 0, 200)
    np.testing.assert_allclose(smoothed(falling, 21)[1:189], falling[1:189], atol=1e-9)


def test_thinned_keeps_the_ends_and_every_peak_in_order():
    xs = np.arange(100_000)
    ys = np.sin(xs / 9000) + np.random.default_rng(2).normal(0, 0.01, 100_000)
    ys[[12_345, 77_777]] = 50, -50
    ys[500:900] = math.nan
    at, shown = thinned(xs, ys, 2000)
    assert 1000 < len(at) <= 2002
    assert list(at) == sorted(set(at))
    np.testing.assert_array_equal(shown, ys[at.astype(int)])
    assert {0, 12_345, 77_777, 99_999} <= set(at.astype(int))
    assert np.isnan(shown).any()  # the gap stays a gap
    short = thinned([1, 2], [3, 4], 2000)
    assert [part.tolist() for part in short] == [[1, 2], [3, 4]]


def picture(figure):
    """Draw it in full: some things fail, or take their place, only then."""
    file = io.BytesIO()
    figure.savefig(file, dpi=50)
    return imread(io.BytesIO(file.getvalue()))


def write(folder, rows):
    path = folder / "metrics.jsonl"
    path.write_text("".join(json.dumps(plain(row)) + "\n" for row in rows))
    return path


NAN = [step(i, math.nan, norm=math.nan, skipped="the loss is nan") for i in (1, 2, 3)]


@pytest.mark.filterwarnings("error")
def test_the_figures_of_a_run_are_written_as_files(tmp_path):
    rows = [{"event": "start", "step": 0}, *NAN, evaluation(3, math.nan), step(4), evaluation(4, 2.0)]
    drawn = save_run_figures(write(tmp_path, rows), tmp_path / "figures", title="t", floor=0.5, clip=1.0)
    assert drawn == [tmp_path / "figures" / name for name in NAMES]
    for path in drawn:
        height, width, _ = imread(path).shape
        assert height > 400
        assert width > 800
    assert sorted(path.name for path in (tmp_path / "figures").iterdir()) == sorted(NAMES)  # nothing half-written


def test_a_run_without_steps_has_fewer_figures_or_none(tmp_path):
    nothing = [{"event": "start", "step": 0}, {"event": "end", "step": 0}]
    assert save_run_figures(write(tmp_path, nothing), tmp_path / "figures", title="t") == []
    assert not (tmp_path / "figures").exists()
    path = write(tmp_path, [*nothing, evaluation(0, 3.5)])
    assert save_run_figures(path, tmp_path, title="t") == [tmp_path / "loss.png"]


@pytest.mark.parametrize(
    "rows",
    [[step(1)], [step(1), evaluation(1, 3.5)], NAN, [*NAN, evaluation(3, math.nan)], [step(1, norm=0.0, speed=0.0)]],
    ids=["one step", "and an evaluation", "all NaN", "NaN everywhere", "zeros"],
)
@pytest.mark.filterwarnings("error")
def test_every_kind_of_run_can_be_drawn(rows):
    figures = [loss_figure(rows, title="t", floor=0.5), learning_rate_figure(rows, title="t")]
    figures += [gradient_norm_figure(rows, title="t", clip=1.0), speed_figure(rows, title="t")]
    for figure in figures:
        assert picture(figure).std() > 0


def test_a_hundred_thousand_steps_are_drawn_from_few_points():
    rows = run_of(100_000)
    for draw in (loss_figure, learning_rate_figure, gradient_norm_figure, speed_figure):
        for one in draw(rows, title="t").axes[0].get_lines():
            assert len(one.get_xdata()) < 2100


def test_the_memory_of_the_steps_is_drawn_in_mebibytes_with_its_peak():
    facts = {"peak_bytes": 3 * 2**20, "peak_ms": 2.0, "steps": [[0, 3], [3, 6]]}
    facts["live"] = [[1.0, 2**20], [2.0, 3 * 2**20], [4.0, 0]]
    (axes,) = memory_figure(facts, title="t").axes
    curve, peak = axes.get_lines()
    assert data(curve) == [(1, 1), (2, 3), (4, 0)]
    assert data(peak) == [(2, 3)]
    assert [text.get_text() for text in axes.texts] == ["peak: 3.0 MiB"]
    assert len(axes.patches) == 2
    picture(memory_figure({"peak_bytes": 0, "peak_ms": 0.0, "steps": [], "live": []}, title="t"))
