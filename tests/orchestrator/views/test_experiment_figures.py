"""The figures of `experiment` and `compare-attention`: what they draw is what was measured, and nothing is cut off."""

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex

from orchestrator.views.experiment_figures import costs_chart, curves_chart, rounds_chart, style_of

NAMES = ("eager", "sdpa", "flash_tiled", "flex_attention")
FACTOR = {"eager": 1.0, "sdpa": 0.5, "flash_tiled": 1.3, "flex_attention": 4.0}
WORKLOADS = ("nano, 8 x 128", "gpt2, 1 x 1024")


def spread(middle: float) -> dict:
    return {"median": middle, "lower_quartile": 0.9 * middle, "upper_quartile": 1.25 * middle}


def row(workload: str, task: str, name: str) -> dict:
    found = {"workload": workload, "task": task, "implementation": name, "not_measured": None, "rates": None,
             "seconds": None, "over_eager": None, "peak_bytes": None, "resting_bytes": None}  # fmt: skip
    if (task, name) == ("training", "flex_attention"):
        return found | {"not_measured": "on a CPU it has no backward pass"}
    seconds = FACTOR[name] * (1 if workload == WORKLOADS[0] else 7)
    what = {"training": ("step",), "generation": ("first_token", "later_tokens", "text")}[task]
    rates = {"samples": 8 / seconds, "tokens": 1024 / seconds, "mfu": 0.4 / FACTOR[name]}
    if task == "generation":
        rates = {"tokens": 31 / seconds, "first_token": seconds}
    return found | {
        "seconds": {key: spread(seconds) for key in what}, "over_eager": {key: spread(FACTOR[name]) for key in what},
        "rates": rates, "peak_bytes": int(30 * seconds * 2**20), "resting_bytes": 5 * 2**20,
    }  # fmt: skip


ROWS = [row(workload, task, name) for workload in WORKLOADS for task in ("training", "generation") for name in NAMES]
ROUNDS = [
    {"workload": workload, "task": task, "round": number, "seconds": {
        name: {key: FACTOR[name] * (1 + 0.1 * number * (name != "eager")) for key in ("step", "text")}
        for name in NAMES if (task, name) != ("training", "flex_attention")
    }}
    for workload in WORKLOADS for task in ("training", "generation") for number in range(3)
]  # fmt: skip


def curve(name: str, differences: list[float], passed, yardstick: bool = False) -> dict:
    losses = [5.0 / (step + 1) + value for step, value in enumerate(differences)]
    return {"implementation": name, "differences": differences, "losses": losses, "bound": [1e-6] * 6, "passed": passed,
            "yardstick": yardstick, "largest": max(differences)}  # fmt: skip


SECTION = {
    "dtype": "fp32",
    "curves": [
        curve("eager", [0.0] * 6, None),
        curve("sdpa", [0.0, 1e-7, 0.0, 3e-7, 1e-7, 0.0], True),
        curve("flash_tiled", [0.0, 1e-4, 1e-3, 2e-3, 4e-3, 9e-3], False),
        curve("eager, rows reversed", [0.0, 1e-7, 1e-7, 1e-7, 0.0, 1e-7], None, yardstick=True),
    ],
}


def inside(figure) -> None:
    """Every text that is drawn lies in the picture."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    picture = figure.bbox
    texts = [text for axes in figure.axes for text in (axes.title, axes.xaxis.label, axes.yaxis.label, *axes.texts)]
    for axes in figure.axes:
        for axis, (low, high) in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, sorted(axes.get_ylim()))):
            texts += [tick.label1 for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
    for text in texts:
        box = text.get_window_extent(canvas.get_renderer())
        if text.get_visible() and text.get_text() and box.width:
            out = max(picture.x0 - box.x0, box.x1 - picture.x1, picture.y0 - box.y0, box.y1 - picture.y1)
            assert out <= 1, text.get_text()


@pytest.mark.parametrize("draw", [
    lambda: costs_chart(ROWS, title="a machine"), lambda: rounds_chart(ROWS, ROUNDS, title="a machine"),
    lambda: curves_chart([SECTION], title="a model"), lambda: curves_chart([SECTION, SECTION], title="a model"),
])  # fmt: skip
def test_nothing_is_cut_off(draw):
    inside(draw())


def test_every_bar_is_what_was_measured_in_its_own_colour():
    figure = costs_chart(ROWS, title="")
    panels = [figure.axes[i : i + 4] for i in (0, 4)]
    for factor, (speed, memory, writing, first) in zip((1, 7), panels, strict=True):
        expected = {
            speed: {name: 1024 / (factor * FACTOR[name]) for name in NAMES[:3]},
            memory: {name: 5 + 30 * factor * FACTOR[name] for name in NAMES[:3]},
            writing: {name: 31 / (factor * FACTOR[name]) for name in NAMES},
            first: {name: 1000 * factor * FACTOR[name] for name in NAMES},
        }
        for axes, values in expected.items():
            assert [bar.get_width() for bar in axes.patches] == pytest.approx(list(values.values()), rel=1e-6)
            assert [to_hex(bar.get_facecolor()) for bar in axes.patches] == [style_of(name)[0] for name in values]
            missing = [text.get_text() for text in axes.texts if "not measured" in text.get_text()]
            assert len(missing) == len(NAMES) - len(values)
    assert "(MFU 80 %)" in [text.get_text().partition(" ")[2] for text in figure.axes[0].texts]


def test_the_lines_across_the_bars_are_the_quartiles():
    axes = costs_chart(ROWS, title="").axes[3]  # ms to the first token
    assert list(axes.lines[0].get_xdata()) == pytest.approx([900, 1250])
    axes = costs_chart(ROWS, title="").axes[0]  # tokens/s: the slow quartile is the low one
    assert list(axes.lines[0].get_xdata()) == pytest.approx([1024 / 1.25, 1024 / 0.9])


def test_every_round_is_a_dot_at_its_ratio_and_the_bar_its_median():
    left, right = rounds_chart(ROWS, ROUNDS, title="").axes
    dots = [line for line in left.lines if len(line.get_xdata()) == 3]
    assert len(dots) == 2 * 2  # two workloads, sdpa and flash_tiled; flex_attention does not train
    assert list(dots[0].get_xdata()) == pytest.approx([0.5, 0.55, 0.6])
    labels = [label.get_text() for label in left.get_yticklabels()]
    assert labels[0] == "nano, 8 x 128   sdpa"
    assert len(labels) == 2 * 3
    assert len([line for line in right.lines if len(line.get_xdata()) == 3]) == 2 * 3
    assert "0.50" in [text.get_text() for text in left.texts]


def test_all_curves_and_their_distances_are_drawn_with_the_verdict():
    top, bottom = curves_chart([SECTION], title="").axes
    assert [line.get_label() for line in top.lines] == [
        "eager", "sdpa: PASS", "flash_tiled: FAIL", "eager, rows reversed (yardstick)",
    ]  # fmt: skip
    for line, drawn in zip(SECTION["curves"], top.lines, strict=True):
        assert list(drawn.get_ydata()) == line["losses"]
    assert bottom.get_yscale() == "log"
    found = {line.get_label().partition(",")[0].partition(":")[0]: line for line in bottom.lines}
    assert list(found["flash_tiled"].get_ydata())[1:] == SECTION["curves"][2]["differences"][1:]
    assert list(found["the bound"].get_ydata()) == [1e-6] * 6
    lowest = found["sdpa"].get_ydata()[0]
    assert 0 < lowest < 1e-7  # exactly equal: no place on a log axis, so at the bottom, under a name
    assert bottom.get_yticklabels()[0].get_text() == "equal"
    assert bottom.get_yticks()[0] == lowest
    low, high = bottom.get_ylim()
    assert low < lowest
    assert high > 9e-3


def test_a_curve_that_ended_in_no_number_is_drawn_as_far_as_it_goes():
    broken = curve("sdpa", [0.0, 1e-7], False) | {"differences": [1e-7, float("nan")], "losses": [5.0, float("nan")]}
    figure = curves_chart([{"dtype": "fp32", "curves": [SECTION["curves"][0], broken]}], title="")
    inside(figure)
    assert figure.axes[1].lines[0].get_ydata()[0] == 1e-7
