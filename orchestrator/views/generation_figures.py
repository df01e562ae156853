"""Figures of `benchmarks/generation_against_transformers.py`: why continuous batching is faster, and what a step costs.

The picture of the queue has a line for each request: how long it waits for its first token, how long it writes, and how
long a static batch goes on computing its row although its text is done. Below it, how many rows write at each moment.
"""

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from orchestrator.evaluation.generation_profile import PARTS
from orchestrator.views.bench_figures import PURPLE, TEAL
from orchestrator.views.figures import BLUE, GREEN, GREY, ORANGE

WAITING = "#e2e8f0"
COLOURS = dict(zip(PARTS, (BLUE, TEAL, ORANGE, PURPLE, GREEN, "#cbd5e0"), strict=True))
HATCHES = dict(zip(PARTS, ("", "//", "", "xx", "", ".."), strict=True))
QUEUE_NAMES = {  # in the order of the panels
    "transformers, static": "transformers, static batches of {batch}",
    "engine": "our engine, continuous batching",
}
BAR_NAMES = {
    "transformers, static": "transformers,\nstatic",
    "ours, static": "generate(),\nstatic",
    "engine": "engine",
}


def queue_picture(section: Mapping, dtype: str, *, note: str | None = None) -> Figure:
    """Requests over time in static batches and in the engine, rows at work, and the makespans.

    Args:
        section: "queue" of the results. dtype: one of those that were measured.
        note: said in the title, such as that this is no measurement.
    """
    here, asked = section[dtype], section["settings"]
    end = 1.03 * max(max(here["timeline"][name]["held"]) for name in QUEUE_NAMES)
    figure = Figure(figsize=(14, 8), layout="constrained")
    panels = figure.subplot_mosaic(
        [[*QUEUE_NAMES, "makespan"], [*(f"rows {name}" for name in QUEUE_NAMES), "makespan"]],
        height_ratios=(3.2, 1), width_ratios=(1, 1, 0.62),
    )  # fmt: skip
    most = 0
    for name, heading in QUEUE_NAMES.items():
        line, rows = here["timeline"][name], panels[f"rows {name}"]
        draw_requests(panels[name], line, end)
        panels[name].set_title(f"{heading.format(**asked)}: all done after {max(line['held']):.3g} s", fontsize=11)
        most = max(most, draw_rows(rows, line))
        rows.set(xlim=(0, end), xlabel="seconds after all requests were queued")
    for name in QUEUE_NAMES:
        panels[f"rows {name}"].set_ylim(0, 1.12 * most)
    first = next(iter(QUEUE_NAMES))
    panels[first].set_ylabel("request, in order of arrival")
    panels[f"rows {first}"].set_ylabel("rows in a step,\nprompts aside")
    draw_makespans(panels["makespan"], here)
    handles = [
        Patch(facecolor=WAITING, edgecolor=GREY, label="waits for its first token"),
        Patch(facecolor=BLUE, label="writes a token in each step"),
        Patch(facecolor="white", edgecolor=ORANGE, hatch="////", label="done, but its row is computed on: idle"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=10)
    said = (
        f"{asked['requests']} requests, prompts and texts of {asked['shortest']} to {asked['longest']} tokens, {dtype}"
    )
    figure.suptitle(said + (f"\n{note}" if note else ""), fontsize=12)
    return figure


def draw_requests(axes: Axes, line: Mapping[str, Sequence[float]], end: float) -> None:
    """A bar for each request: waiting, writing, and computed on for nothing."""
    for row, (first, last, held) in enumerate(zip(line["first"], line["last"], line["held"], strict=True)):
        axes.barh(row, first, color=WAITING, edgecolor="none", height=0.82)
        axes.barh(row, last - first, left=first, color=BLUE, edgecolor="none", height=0.82)
        if held > last:
            axes.barh(
                row, held - last, left=last, facecolor="white", edgecolor=ORANGE, hatch="////", height=0.82, linewidth=0
            )  # fmt: skip
    count = len(line["first"])
    axes.set(xlim=(0, end), ylim=(count - 0.4, -0.6))
    axes.set_yticks(range(0, count, 4 if count > 12 else 1))
    axes.tick_params(labelbottom=False)
    axes.axvline(max(line["held"]), color=GREY, linestyle="--", linewidth=1)


def draw_rows(axes: Axes, line: Mapping[str, Sequence[float]]) -> int:
    """Rows that write, and above them those that are computed for nothing; the most of both together."""
    moments = sorted({0.0, *line["first"], *line["last"], *line["held"]})
    at = lambda moment, until: sum(a <= moment < b for a, b in zip(line["first"], line[until], strict=True))  # noqa: E731
    writing, computed = ([at(moment, until) for moment in moments] for until in ("last", "held"))
    axes.fill_between(moments, writing, step="post", color=BLUE, linewidth=0)
    axes.fill_between(
        moments, writing, computed, step="post", facecolor="white", edgecolor=ORANGE, hatch="////", linewidth=0
    )  # fmt: skip
    axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.grid(alpha=0.25, axis="y")
    return max(computed)


def draw_makespans(axes: Axes, here: Mapping) -> None:
    """Median makespan of each, the rounds' extremes as a line, and how many times as fast as transformers."""
    for place, name in enumerate(BAR_NAMES):
        seconds = here["contenders"][name]["seconds"]
        colour = BLUE if name == "engine" else "#90b4d8" if name.startswith("ours") else GREY
        axes.bar(place, seconds["median"], color=colour, width=0.62)
        axes.plot([place] * 2, [seconds["min"], seconds["max"]], color="#1a202c", linewidth=1.6)
        speed = here["speed"].get(f"{name} against transformers, static")
        text = f"{seconds['median']:.3g} s" + (f"\n{speed['paired']['median']:.2f}x" if speed else "")
        above = {"xytext": (0, 5), "textcoords": "offset points", "ha": "center", "fontsize": 10}
        axes.annotate(text, (place, max(seconds["median"], seconds["max"])), **above)
    axes.set_xticks(range(len(BAR_NAMES)), BAR_NAMES.values(), fontsize=9)
    axes.set_xlim(-0.6, len(BAR_NAMES) - 0.4)
    axes.set_ylim(0, 1.18 * max(found["seconds"]["max"] for found in here["contenders"].values()))
    axes.set_title("makespan, and times as fast", fontsize=11)
    axes.set_ylabel("seconds until all are done: median, least to most")
    axes.grid(alpha=0.25, axis="y")
    axes.set_axisbelow(True)


def profile_bars(section: Mapping, *, note: str | None = None) -> Figure:
    """A stacked bar of milliseconds for each kind of step, and beside it the same for each token of the step.

    Args:
        section: "profile" of the results.
    """
    steps = section["contenders"]
    names = [name.replace(", ", "\n") for name in steps]
    figure = Figure(figsize=(13, 5.6), layout="constrained")
    panels = figure.subplots(1, 2)
    per_token = [of["tokens"] for of in steps.values()]
    for axes, divisors, heading in zip(
        panels, ([1] * len(names), per_token), ("a step", "a token: the step / the texts in it"), strict=True
    ):
        heights = [0.0] * len(names)
        for part in PARTS:
            values = [1e3 * of["parts"][part] / by for of, by in zip(steps.values(), divisors, strict=True)]
            style = {"color": COLOURS[part], "hatch": HATCHES[part], "edgecolor": "white", "linewidth": 0.5}
            axes.bar(range(len(names)), values, bottom=heights, width=0.6, label=part, **style)
            heights = [height + value for height, value in zip(heights, values, strict=True)]
        for place, height in enumerate(heights):
            above = {"xytext": (0, 4), "textcoords": "offset points", "ha": "center", "fontsize": 10}
            axes.annotate(f"{height:.3g} ms", (place, height), **above)
        axes.set_xticks(range(len(names)), names, fontsize=9)
        axes.set(title=heading, ylabel="ms", ylim=(0, 1.1 * max(heights)))
        axes.grid(alpha=0.25, axis="y")
        axes.set_axisbelow(True)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=10)
    figure.suptitle("Where the time of writing goes, float32" + (f"\n{note}" if note else ""), fontsize=12)
    return figure
