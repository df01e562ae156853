"""The figures of `attention-bench`: log axes, a line and a name for each implementation, nothing over anything else."""

import itertools

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgba
from matplotlib.text import Annotation

from orchestrator.views.bench_figures import GAP, STYLES, apart, memory_by_length, time_by_length
from orchestrator.views.figures import GREY

LENGTHS = (128, 512, 2048)
FACTORS = {"eager": 1.0, "sdpa": 0.5, "flash_tiled": 0.52, "flex_attention": 0.48}  # three that are hard to tell apart


def row(name: str, length: int, *, gradients: bool = True, not_measured: str | None = None) -> dict:
    value = FACTORS[name] * length**1.5

    def spread(factor: float) -> dict:
        middle = factor * value / 1000
        return {"median": middle, "lower_quartile": 0.9 * middle, "upper_quartile": 1.2 * middle}

    made = {"implementation": name, "length": length, "gradients": gradients, "not_measured": not_measured}
    if not_measured:
        return made | {"seconds": None, "peak_bytes": None, "first_peak_bytes": None}
    both = {"forward": spread(1), "forward_backward": spread(3) if gradients else None}
    peaks = {"forward": int(value * 2**20), "forward_backward": int(3 * value * 2**20) if gradients else None}
    first = peaks["forward"] * (4 if name == "flex_attention" else 1)
    return made | {"seconds": both, "peak_bytes": peaks, "first_peak_bytes": first}


@pytest.fixture
def rows() -> list[dict]:
    """flex_attention has no backward pass, and eager's longest would not fit."""
    found = [row(name, length, gradients=name != "flex_attention") for length in LENGTHS for name in FACTORS]
    reason = "it would take about 9 MiB (3 T x T tables), more than half of the 2 MiB that are free"
    found[found.index(row("eager", 2048))] = row("eager", 2048, not_measured=reason)
    return found


BOTH = pytest.mark.parametrize("draw", [time_by_length, memory_by_length])


def lines_of(axes) -> dict:
    return {line.get_label(): line for line in axes.lines if not line.get_label().startswith("_")}


@BOTH
def test_all_axes_are_log_and_titled(draw, rows):
    figure = draw(rows, title="a machine")
    assert [axes.get_title() for axes in figure.axes] == ["forward", "forward + backward"]
    for axes in figure.axes:
        assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
        assert list(axes.get_xticks()) == sorted(LENGTHS, reverse=True)
        assert "tokens" in axes.get_xlabel()
    assert "a machine" in figure.get_suptitle()
    assert figure.axes[0].get_ylabel().startswith("ms" if draw is time_by_length else "MiB")


@BOTH
def test_each_implementation_has_its_line_and_its_name_in_its_colour(draw, rows):
    for axes, factor in zip(draw(rows, title="").axes, (1, 3), strict=True):
        lines = lines_of(axes)
        named = {text.get_text(): text for text in axes.texts}
        for name in FACTORS:
            if name == "flex_attention" and factor == 3:
                assert name not in lines
                assert name not in named
                continue
            lengths = [length for length in LENGTHS if (name, length) != ("eager", 2048)]
            assert list(lines[name].get_xdata()) == lengths
            expected = [factor * FACTORS[name] * length**1.5 for length in lengths]
            assert list(lines[name].get_ydata()) == pytest.approx(expected, rel=1e-6)
            assert named[name].get_color() == lines[name].get_color()


def test_the_band_of_a_time_is_its_quartiles(rows):
    bands = time_by_length(rows, title="").axes[0].collections
    low, high = (f(bands[1].get_paths()[0].vertices[:, 1]) for f in (min, max))
    assert low == pytest.approx(0.9 * FACTORS["sdpa"] * 128**1.5)
    assert high == pytest.approx(1.2 * FACTORS["sdpa"] * 2048**1.5)


@BOTH
def test_grey_lines_have_slope_one_and_two(draw, rows):
    import math

    for axes in draw(rows, title="").axes:
        for label, power in (("grows with T", 1), ("grows with T squared", 2)):
            line = lines_of(axes)[label]
            (x0, x1), (y0, y1) = line.get_data()
            assert math.log(y1 / y0) / math.log(x1 / x0) == pytest.approx(power)
            assert line.get_color() == GREY
        assert [text.get_text() for text in axes.get_legend().get_texts()] == ["grows with T", "grows with T squared"]


@BOTH
def test_what_is_missing_is_said_under_the_panels(draw, rows):
    said = draw(rows, title="").get_supxlabel()
    assert "forward only: flex_attention" in said
    assert "eager not measured at T = 2048" in said
    assert "more than half of the 2 MiB" in said
    assert ("prepares the mask" in said) == (draw is memory_by_length)


def test_nothing_is_said_under_the_panels_where_nothing_is_missing(rows):
    whole = [found for found in rows if found["implementation"] == "sdpa"]
    assert time_by_length(whole, title="").get_supxlabel() == ""


@BOTH
@pytest.mark.parametrize("longest", [128, 2048])
def test_no_name_stands_on_another_or_outside(draw, rows, longest):
    figure = draw([found for found in rows if found["length"] <= longest], title="two\nlines")
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    for axes in figure.axes:
        names = [text for text in axes.texts if isinstance(text, Annotation)]
        # Text.get_window_extent: an Annotation's own includes its leader
        boxes = [super(Annotation, text).get_window_extent(canvas.get_renderer()) for text in names]
        boxes.append(axes.get_legend().get_window_extent()) if axes.get_legend() else None
        assert len(boxes) >= 2
        for a, b in itertools.combinations(boxes, 2):
            assert not a.overlaps(b)
        for box in boxes:
            assert axes.bbox.x0 <= box.x0 < box.x1 <= axes.bbox.x1
            assert axes.bbox.y0 <= box.y0 < box.y1 <= axes.bbox.y1


def test_a_line_that_ends_early_has_its_name_where_it_ends(rows):
    figure = memory_by_length(rows, title="")
    FigureCanvasAgg(figure).draw()
    for axes in figure.axes:
        (name,) = (text for text in axes.texts if text.get_text() == "eager")
        box, end = name.get_window_extent(), axes.transData.transform(lines_of(axes)["eager"].get_xydata()[-1])
        assert (box.x0 + box.x1) / 2 == pytest.approx(end[0], abs=2)
        assert 0 < box.y0 - end[1] < 20


def test_lines_can_be_told_apart_without_colour():
    assert len({marker for _, marker, _ in STYLES}) == len(STYLES) >= 7
    assert len({to_rgba(colour) for colour, _, _ in STYLES}) == len(STYLES)


def test_heights_are_moved_apart_and_keep_their_order():
    heights = {"a": 0.5, "b": 0.5, "c": 0.51, "alone": 0.9, "bottom": 0.0}
    moved = apart(heights)
    order = sorted(moved.values())
    assert min(b - a for a, b in itertools.pairwise(order)) >= GAP - 1e-6
    assert sorted(moved, key=moved.get) == ["bottom", "a", "b", "c", "alone"]
    assert moved["alone"] == pytest.approx(0.9, abs=0.05)
    assert min(order) >= GAP / 2


def test_a_run_in_which_nothing_fitted_still_gives_a_figure():
    nothing = [row("eager", 128, not_measured="it would take 9 MiB")]
    assert [axes.texts[0].get_text() for axes in time_by_length(nothing, title="").axes] == ["nothing was measured"] * 2
