"""The figures and tables of the benchmark of generation: drawn is what was found, and nothing covers anything."""

import copy

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgba

from orchestrator.evaluation.attention_bench import spread
from orchestrator.evaluation.generation_profile import OUTSIDE, PARTS
from orchestrator.views.figures import BLUE, ORANGE
from orchestrator.views.generation_figures import COLOURS, WAITING, profile_bars, queue_picture
from orchestrator.views.generation_tables import markdown_tables

FACTS = {"machine": {"device": "cpu, x86_64", "cpu": "A processor", "threads": 2,
                     "versions": {"torch": "2.13.0", "transformers": "5.23.0"}}}  # fmt: skip


def figures(seconds: float) -> dict:
    parts = {name: spread([0.1 * seconds, 0.3 * seconds]) for name in ("p50", "p90")}
    return {"seconds": spread([seconds, 1.1 * seconds]), "tokens_per_second": spread([5.0, 6.0]),
            "first_token": parts, "latency": parts}  # fmt: skip


@pytest.fixture
def queue() -> dict:
    speed = {"ratio_of_medians": 2.5, "paired": spread([2.4, 2.5, 2.6])}
    lines = {
        "transformers, static": {"first": [1, 1, 6, 6], "last": [3, 5, 7, 9], "held": [5, 5, 9, 9]},
        "ours, static": {"first": [1, 1, 5, 5], "last": [2, 4, 6, 8], "held": [4, 4, 8, 8]},
        "engine": {"first": [0.5, 0.5, 0.5, 1], "last": [1, 3, 2, 4], "held": [1, 3, 2, 4]},
    }
    lengths = {"mean": 20.0, "total": 80, "each": [20] * 4}
    return FACTS | {
        "settings": {"requests": 4, "shortest": 16, "longest": 256, "batch": 2, "seed": 0, "rounds": 5,
                     "queue_dtypes": ["float32"], "lengths": {"prompt": lengths, "new_tokens": lengths}},
        "float32": {
            "contenders": {name: figures(max(line["held"])) for name, line in lines.items()},
            "speed": {f"{name}": speed for name in ("engine against transformers, static",
                      "ours, static against transformers, static", "engine against ours, static")},
            "rows": {name: {"computed": 50, "useful": 40} for name in lines},
            "tokens": {name: {"requests": 4, "equal": 4, "differences": []} for name in lines},
            "timeline": lines,
        },
    }  # fmt: skip


@pytest.fixture
def steps() -> dict:
    def of(scale: float, tokens: int) -> dict:
        parts = {part: scale * (number + 1) / 1e3 for number, part in enumerate(PARTS)}
        return {"parts": parts, "bare": sum(parts.values()), "watched": 2 * sum(parts.values()), "tokens": tokens}

    contenders = {"ours, one text": of(1, 1), "engine, 8 running": of(3, 8)}
    return FACTS | {"settings": {"prompt": 64, "steps": 20}, "contenders": contenders}


def bars(axes, colour: str) -> list[tuple[float, float]]:
    """(left, width) of the bars of a colour, from the top."""
    found = [patch for patch in axes.patches if to_rgba(colour) in (patch.get_facecolor(), patch.get_edgecolor())]
    return [(patch.get_x(), patch.get_width()) for patch in found]


def test_a_request_waits_writes_and_is_computed_on_as_long_as_it_was_found_to(queue):
    static, engine, *_ = queue_picture(queue, "float32").axes
    assert bars(static, WAITING) == [(0, 1), (0, 1), (0, 6), (0, 6)]
    assert bars(static, BLUE) == [(1, 2), (1, 4), (6, 1), (6, 3)]
    assert bars(static, ORANGE) == [(3, 2), (7, 2)]  # who is last in a batch holds no row for nothing
    assert bars(engine, BLUE) == [(0.5, 0.5), (0.5, 2.5), (0.5, 1.5), (1, 3)]
    assert bars(engine, ORANGE) == []
    assert static.get_xlim() == engine.get_xlim()  # one second is as wide in both
    assert static.get_ylim()[0] > static.get_ylim()[1]  # the first that came is on top
    assert "static batches of 2: all done after 9 s" in static.get_title()
    assert "all done after 4 s" in engine.get_title()


def test_the_rows_below_are_the_requests_that_write_and_those_computed_for_nothing(queue):
    figure = queue_picture(queue, "float32")
    static, engine = (axes for axes in figure.axes if axes.get_xlabel())

    def highest(collection, start: float, end: float) -> float:
        """Of a step curve, strictly between two moments."""
        corners = [corner for path in collection.get_paths() for corner in path.vertices]
        return max((y for x, y in corners if start < x < end), default=0)

    writing, idle = static.collections
    assert (highest(writing, 0.9, 3.1), highest(writing, 3.1, 5.1), highest(writing, 5.1, 5.9)) == (2, 1, 0)
    assert (highest(idle, 3.1, 5.1), highest(writing, 7.1, 9.1)) == (2, 1)
    assert highest(engine.collections[0], 0, 5) == 4 - 1  # one is done when the last begins
    assert static.get_ylim() == engine.get_ylim()
    assert static.get_ylim()[1] > 3


def test_the_makespans_have_their_medians_as_height_and_the_ratio_above(queue):
    axes = queue_picture(queue, "float32").axes[2]
    assert [bar.get_height() for bar in axes.patches] == pytest.approx([1.05 * 9, 1.05 * 8, 1.05 * 4])
    assert [text.get_text() for text in axes.texts] == ["9.45 s", "8.4 s\n2.50x", "4.2 s\n2.50x"]


@pytest.mark.parametrize("which", ["queue", "profile"])
def test_no_text_stands_on_another_or_outside_and_a_note_is_in_the_title(which, queue, steps):
    note = "a tiny model: NOT A MEASUREMENT"
    figure = queue_picture(queue, "float32", note=note) if which == "queue" else profile_bars(steps, note=note)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    assert note in figure.get_suptitle()
    for axes in figure.axes:
        texts = [*axes.texts, axes.title]
        boxes = [text.get_window_extent(canvas.get_renderer()) for text in texts if text.get_text()]
        boxes += [label.get_window_extent() for label in axes.get_xticklabels() if label.get_text()]
        for at, box in enumerate(boxes):
            assert figure.bbox.x0 <= box.x0 < box.x1 <= figure.bbox.x1
            assert not any(box.overlaps(other) for other in boxes[at + 1 :])
        assert axes.get_xlabel() or axes.get_ylabel() or axes.get_title()


def test_a_bar_is_the_sum_of_its_parts_in_ms_and_the_right_panel_shares_it_among_the_texts(steps):
    left, right = profile_bars(steps).axes
    for axes, divisors in ((left, (1, 1)), (right, (1, 8))):
        heights = [0.0, 0.0]
        for number, patch in enumerate(axes.patches):
            place = number % 2
            assert patch.get_y() == pytest.approx(heights[place])
            heights[place] += patch.get_height()
            assert patch.get_facecolor() == to_rgba(COLOURS[PARTS[number // 2]])
        assert heights == pytest.approx([21 / divisors[0], 63 / divisors[1]])
    assert len(set(COLOURS.values())) == len(PARTS)


# ------------------------------------------------------------------ tables


def test_the_table_of_the_queue_says_whether_the_bar_is_reached_and_who_wrote_other_tokens(queue):
    said = markdown_tables({"queue": queue}, ["queue"])
    assert (
        "engine against transformers, static: 2.50 (2.45-2.55)x; ratio of medians 2.50x (wanted: 2x; reached)" in said
    )
    assert "A processor, 2 threads, torch 2.13.0, transformers 5.23.0; 5 interleaved rounds" in said
    assert said.count("| 1.25 | all |") == 3
    slow = copy.deepcopy(queue)
    slow["float32"]["speed"]["engine against transformers, static"]["paired"] = spread([1.9, 1.95, 1.99])
    found = [{"request": 3, "position": 7, "tokens": [1, 2], "gap": -1e-5}]
    slow["float32"]["tokens"]["engine"] = {"requests": 4, "equal": 3, "differences": found}
    said = markdown_tables({"queue": slow}, ["queue"])
    assert "(wanted: 2x; MISSED)" in said
    assert "| 3 of 4; widest gap of the two logits -1e-05 (request 3, token 7) |" in said


def test_the_table_of_steps_has_every_part_in_ms_and_its_share(steps):
    lines = markdown_tables({"profile": steps}, ["profile"]).splitlines()
    (outside,) = (line for line in lines if line.startswith(f"| {OUTSIDE} |"))
    assert outside == f"| {OUTSIDE} | 6.00 (29%) | 18.0 (29%) |"
    assert "| a step | 21.0 | 63.0 |" in lines
    assert "| a token | 21.0 | 7.88 |" in lines


def test_every_table_has_as_many_cells_as_headings(queue, steps):
    for line in markdown_tables({"queue": queue, "profile": steps}, ["queue", "profile"]).split("\n\n"):
        if line.startswith("|"):
            assert len({row.count("|") for row in line.splitlines()}) == 1
