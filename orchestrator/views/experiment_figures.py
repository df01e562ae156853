"""Figures of `experiment` and `compare-attention`: what each implementation costs, and whether the curves coincide."""

import textwrap
from collections.abc import Callable, Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from CMHA.implementations import IMPLEMENTATIONS
from orchestrator.views.bench_figures import STYLES
from orchestrator.views.figures import GREY

MIB = 2**20
SPREAD = ("median", "lower_quartile", "upper_quartile")
MEASURES = {  # title -> task, and row -> [middle, low, high] or None
    "training, tokens/s": ("training", lambda row: [row["rates"]["tokens"] * part for part in around(row, "step")]),
    "training, peak memory, MiB": ("training", lambda row: memory(row)),
    "generation, tokens/s after the first": (
        "generation",
        lambda row: [row["rates"]["tokens"] * part for part in around(row, "later_tokens")],
    ),
    "generation, ms to the first token": (
        "generation",
        lambda row: [1000 * row["seconds"]["first_token"][key] for key in SPREAD],
    ),
}


def around(row: Mapping, what: str) -> tuple[float, float, float]:
    """What a rate at the median is multiplied with: 1, and what it becomes at the upper and the lower quartile."""
    found = row["seconds"][what]
    return 1.0, found["median"] / found["upper_quartile"], found["median"] / found["lower_quartile"]


def memory(row: Mapping) -> list[float] | None:
    """MiB of everything together: what rests, and what a step needs at its worst moment."""
    peak = row["peak_bytes"]
    return peak and [(row["resting_bytes"] + peak) / MIB] * 3


def style_of(name: str) -> tuple[str, str, str]:
    """Colour, marker and line of an implementation, the same in every figure."""
    names = list(IMPLEMENTATIONS)
    return STYLES[(names.index(name) if name in names else len(names)) % len(STYLES)]


def costs_chart(rows: Sequence[Mapping], *, title: str) -> Figure:
    """A row of panels for each workload: speed and memory of training, speed of generation; a bar for each.

    Args:
        rows: JSON-ready rows of `evaluation.experiment.run_experiment`.
    """
    workloads = list(dict.fromkeys(row["workload"] for row in rows))
    names = list(dict.fromkeys(row["implementation"] for row in rows if row["not_measured"] is None))
    found = {(row["workload"], row["task"], row["implementation"]): row for row in rows}
    height = 0.9 + 0.3 * max(1, len(names))
    figure = Figure(figsize=(15, 1.2 + height * max(1, len(workloads))), layout="constrained")
    figure.suptitle(title, fontsize=11)
    panels = figure.subplots(max(1, len(workloads)), len(MEASURES), sharey=True, squeeze=False)
    for number, workload in enumerate(workloads):
        for axes, (what, (task, value)) in zip(panels[number], MEASURES.items(), strict=True):
            rows_here = [found[workload, task, name] for name in names]
            bars(axes, names, rows_here, value)
            axes.set_title(what if number == 0 else "", fontsize=10)
        panels[number][0].set_ylabel(workload.replace(", ", "\n"), fontsize=10)
    figure.supxlabel("bars: medians of the rounds; lines across their ends: quartiles", fontsize=8.5, color=GREY)
    return figure


def bars(axes: Axes, names: Sequence[str], rows: Sequence[Mapping], value: Callable) -> None:
    """One panel: a bar with its quartiles and its number for each implementation, the first on top."""
    values = [None if row["not_measured"] else value(row) for row in rows]
    most = max((each[2] for each in values if each), default=1.0)
    for place, (name, row, each) in enumerate(zip(names, rows, values, strict=True)):
        if each is None:
            axes.text(0.01 * most, place, "not measured: see the report", va="center", fontsize=8, color=GREY)
            continue
        middle, low, high = each
        axes.barh(place, middle, color=style_of(name)[0], alpha=0.85, height=0.62)
        if high > low:
            axes.plot([low, high], [place, place], color="black", linewidth=1.4, marker="|", markersize=6)
        text = f"{middle:,.0f}" if middle >= 100 else f"{middle:.3g}"
        if "mfu" in (row["rates"] or {}) and value is MEASURES["training, tokens/s"][1]:
            text += f" (MFU {100 * row['rates']['mfu']:.0f} %)"
        axes.annotate(
            text, (max(middle, high), place), textcoords="offset points", xytext=(5, 0), va="center", fontsize=8
        )
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlim(0, (1.75 if value is MEASURES["training, tokens/s"][1] else 1.35) * most)  # room for the numbers
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda number, _: f"{number:,g}"))
    axes.grid(axis="x", alpha=0.25)
    axes.tick_params(labelsize=8)


def rounds_chart(rows: Sequence[Mapping], rounds: Sequence[Mapping], *, title: str) -> Figure:
    """Every round as a dot: time / eager's time in the same round, for a step and for a text; a bar at the median.

    Why: a median says nothing about how sure it is. Where the dots lie on both sides of 1, nothing was shown.

    Args:
        rows, rounds: JSON-ready, of `evaluation.experiment.run_experiment`.
    """
    workloads = list(dict.fromkeys(row["workload"] for row in rows))
    with_ratio = [row for row in rows if row["over_eager"] and row["implementation"] != "eager"]
    names = list(dict.fromkeys(row["implementation"] for row in with_ratio))
    figure = Figure(figsize=(12, 1.6 + 0.34 * max(2, len(workloads) * (len(names) + 1))), layout="constrained")
    figure.suptitle(title, fontsize=11)
    panels = figure.subplots(1, 2, sharey=True)
    ticks = []
    for axes, task, what, label in zip(
        panels, ("training", "generation"), ("step", "text"), ("a training step", "a text, prompt and new tokens"),
        strict=True,
    ):  # fmt: skip
        place, ticks = 0.0, []
        for workload in workloads:
            for name in names:
                ticks.append((place, f"{workload}   {name}"))
                ratios = [
                    taken["seconds"][name][what] / taken["seconds"]["eager"][what]
                    for taken in rounds
                    if (taken["workload"], taken["task"]) == (workload, task)
                    and taken["seconds"].get(name) and taken["seconds"].get("eager")
                ]  # fmt: skip
                colour, marker, _ = style_of(name)
                if ratios:
                    middle = next(
                        row["over_eager"][what]["median"] for row in with_ratio
                        if (row["workload"], row["task"], row["implementation"]) == (workload, task, name)
                    )  # fmt: skip
                    axes.plot(
                        ratios, [place] * len(ratios), marker, color=colour, alpha=0.45, markersize=5, linewidth=0
                    )
                    axes.plot([middle] * 2, [place - 0.38, place + 0.38], color=colour, linewidth=2.2)
                    axes.annotate(
                        f"{middle:.2f}", (middle, place - 0.36), textcoords="offset points", xytext=(0, 1),
                        ha="center", va="bottom", fontsize=7.5, color=colour,
                        bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.4, "alpha": 0.8},
                    )  # fmt: skip
                place += 1
            place += 0.7
        axes.axvline(1.0, color=GREY, linestyle="--", linewidth=1.2)
        axes.set_xscale("log")
        low, high = axes.get_xlim()
        subs = (1, 1.5, 2, 3, 5, 7) if high < 10 * low else (1, 2, 5) if high < 100 * low else (1,)
        axes.xaxis.set_major_locator(LogLocator(subs=subs, numticks=30))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda number, _: f"{number:g}"))
        axes.set(title=label, xlabel="time / eager's in the same round (log axis; left of 1: faster)")
        axes.grid(axis="x", alpha=0.25)
    panels[0].set_yticks([at for at, _ in ticks], [text for _, text in ticks], fontsize=8)
    panels[0].set_ylim(max((at for at, _ in ticks), default=0) + 0.8, -0.9)
    return figure


def curves_chart(sections: Sequence[Mapping], *, title: str) -> Figure:
    """The curves on top of each other, and below how far each is from eager's, with the bound.

    Args:
        sections: for each dtype {"dtype", "curves": lines of `evaluation.compare_attention.judge` with "losses"}.
    """
    figure = Figure(figsize=(6.6 * len(sections) + 0.6, 7.6), layout="constrained")
    figure.suptitle("\n".join(textwrap.wrap(title, 75 * len(sections))), fontsize=11)
    panels = figure.subplots(2, len(sections), sharex="col", squeeze=False, height_ratios=(1, 1.15))
    for (top, bottom), section in zip(panels.T, sections, strict=True):
        curves = section["curves"]
        widths = [1.3 + 1.7 * (len(curves) - 1 - place) for place in range(len(curves))]  # all can be seen at once
        for curve, width in zip(curves, widths, strict=True):
            steps = range(1, len(curve["losses"]) + 1)
            top.plot(steps, curve["losses"], color=colour_of(curve), linewidth=width, label=named(curve))
        top.set(title=section["dtype"], ylabel="loss of the step's batch (nats per token)")
        top.legend(frameon=False, fontsize=8.5)
        top.grid(alpha=0.25)
        draw_differences(bottom, curves)
    return figure


def draw_differences(axes: Axes, curves: Sequence[Mapping]) -> None:
    """The lower panel: |loss - eager's| of each step, log axis; what is exactly equal stands at the bottom."""
    bound = max((curve["bound"] for curve in curves), key=len)
    shown = [value for curve in curves for value in curve["differences"] if value > 0 and value < float("inf")]
    lowest = min([*shown, *bound], default=1e-16) / 10
    for curve in curves:
        if curve["implementation"] != "eager":
            values = [max(value, lowest) for value in curve["differences"]]
            look = "-" if curve["yardstick"] else style_of(curve["implementation"])[1]
            axes.plot(
                range(1, len(values) + 1), values, look, color=colour_of(curve), markersize=3.5, linewidth=1,
                alpha=0.6 if curve["yardstick"] else 0.85, zorder=2 if curve["yardstick"] else 3,
                label=named(curve) + (f", largest {curve['largest']:.1e}" if values else ""),
            )  # fmt: skip
    axes.plot(range(1, len(bound) + 1), bound, color="black", linestyle="--", linewidth=1.4, label="the bound")
    axes.set_yscale("log")
    top = max([*bound, *shown])
    axes.set_ylim(lowest / 2.5, top * (top / lowest) ** 0.42)  # room for the legend
    axes.axhline(lowest, color=GREY, linewidth=0.6)
    decades = [10.0**power for power in range(-20, 6) if 3 * lowest < 10.0**power < top * 10]
    labelled = decades[:: max(1, len(decades) // 6)]
    axes.set_yticks([lowest, *labelled], ["equal", *(f"{value:.0e}" for value in labelled)], fontsize=9)
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set(xlabel="step", ylabel="distance from eager's loss (nats per token)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False, fontsize=8.5, loc="upper right")
    axes.grid(alpha=0.25)


def colour_of(curve: Mapping) -> str:
    return GREY if curve["yardstick"] else style_of(curve["implementation"])[0]


def named(curve: Mapping) -> str:
    """The name, and for what is judged the verdict."""
    verdict = {True: ": PASS", False: ": FAIL", None: " (yardstick)" if curve["yardstick"] else ""}[curve["passed"]]
    return curve["implementation"] + verdict
