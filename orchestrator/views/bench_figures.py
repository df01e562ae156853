"""Figures of `python -m orchestrator attention-bench`: time and peak memory by sequence length, on log axes.

On log-log axes a power of T is a straight line, and its slope is the exponent: grey lines show what growth with T and
with T squared look like. Lines differ in marker and dash too, so that they can be told apart in print.
"""

import math
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from orchestrator.views.figures import BLUE, GREEN, GREY, ORANGE

PURPLE, RED, TEAL, BROWN = "#6b46c1", "#9b2c2c", "#0f8b8d", "#744210"
STYLES = (  # colour, marker, line: each implementation has those of its place among them
    (BLUE, "o", "-"),
    (ORANGE, "s", "-"),
    (GREEN, "^", "-"),
    (PURPLE, "D", "--"),
    (RED, "v", "--"),
    (TEAL, "P", "-."),
    (BROWN, "X", "-."),
)
PANELS = {"forward": "forward", "forward_backward": "forward + backward"}
WIDTH_OF_NAMES = 0.34  # of a panel, on the right, where the names of the lines stand
HEIGHT_OF_LEGEND = 0.12  # of a panel, at the top
GAP = 0.05  # of a panel: how far apart names stand at least

Point = tuple[float, float, float, float]  # length, and the middle, low and high value there


def time_by_length(rows: Sequence[Mapping], *, title: str) -> Figure:
    """Median time of a call with its quartiles, forward and forward + backward.

    Args:
        rows: JSON-ready rows of `evaluation.attention_bench.run_bench`.
    """

    def milliseconds(row: Mapping, panel: str) -> list[float] | None:
        spread = row["seconds"][panel]
        return spread and [1000 * spread[key] for key in ("median", "lower_quartile", "upper_quartile")]

    title = f"Time by sequence length: {title}"
    return by_length(rows, milliseconds, title=title, ylabel="ms a call: median, quartiles as a band")


def memory_by_length(rows: Sequence[Mapping], *, title: str) -> Figure:
    """Peak memory of a call above its inputs and mask, forward and forward + backward.

    Args:
        rows: JSON-ready rows of `evaluation.attention_bench.run_bench`.
    """

    def mib(row: Mapping, panel: str) -> list[float] | None:
        peak = row["peak_bytes"][panel]
        return peak and [peak / 2**20] * 3

    ylabel = "MiB at the worst moment, above inputs and mask"
    title = f"Peak memory by sequence length: {title}"
    return by_length(rows, mib, title=title, ylabel=ylabel, notes=mask_notes(rows))


def by_length(
    rows: Sequence[Mapping], value: Callable, *, title: str, ylabel: str, notes: Sequence[str] = ()
) -> Figure:
    """Two panels with a line for each implementation; `value(row, panel)` is [middle, low, high], or None."""
    names = list(dict.fromkeys(row["implementation"] for row in rows))
    measured = [row for row in rows if row["not_measured"] is None]
    found = {panel: {name: [] for name in names} for panel in PANELS}
    for panel in PANELS:
        for row in measured:
            if at := value(row, panel):
                found[panel][row["implementation"]].append((row["length"], *at))
    points = [point for lines in found.values() for line in lines.values() for point in line]

    figure = Figure(figsize=(11.5, 5.8), layout="constrained")
    figure.suptitle(title, fontsize=11)
    panels = figure.subplots(1, 2, sharey=True)
    for axes, panel in zip(panels, PANELS, strict=True):
        axes.set(title=PANELS[panel], xscale="log", yscale="log", xlabel="sequence length T (tokens)")
        if not points:
            axes.text(0.5, 0.5, "nothing was measured", transform=axes.transAxes, ha="center", color=GREY)
            continue
        set_limits(axes, points)
        if len({point[0] for point in points}) > 1:
            draw_guides(axes, points)
        draw_lines(axes, found[panel])
    panels[0].set_ylabel(ylabel)
    panels[1].tick_params(labelleft=True)
    lines = [line for note in (*what_is_missing(rows), *notes) for line in textwrap.wrap(note, 150)]
    if lines:
        figure.supxlabel("\n".join(lines), fontsize=8.5)
    return figure


def set_limits(axes: Axes, points: Sequence[Point]) -> None:
    """Limits with room for the names and the legend, ticks where something was measured."""
    lengths = sorted({point[0] for point in points})
    left, right = math.log(lengths[0]), math.log(lengths[-1])
    width = max(right - left, 0.5) / (1 - WIDTH_OF_NAMES - 0.04)
    axes.set_xlim(math.exp(left - 0.04 * width), math.exp(max(right, left + 0.5) + WIDTH_OF_NAMES * width))
    shown = []
    for length in reversed(lengths):  # the longest is named always
        if not shown or math.log(shown[-1] / length) > 0.095 * width:
            shown.append(length)
    axes.xaxis.set_major_locator(FixedLocator(shown))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))

    low, high = math.log(min(point[2] for point in points)), math.log(max(point[3] for point in points))
    height = max(high - low, 1.0) / (1 - HEIGHT_OF_LEGEND - 0.1)
    axes.set_ylim(math.exp(low - 0.06 * height), math.exp(low + 0.94 * height))
    decades = height / math.log(10)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 3 else (1,), numticks=20))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axes.grid(alpha=0.25)


def draw_guides(axes: Axes, points: Sequence[Point]) -> None:
    """Grey lines of slope 1 and 2 from the lower left corner of what was measured, as far as they stay inside."""
    first, last = min(point[0] for point in points), max(point[0] for point in points)
    low, high = 0.8 * min(point[2] for point in points), max(point[3] for point in points)  # beside the lowest line
    for power, dashes, label in ((1, (6, 3), "grows with T"), (2, (1.5, 2), "grows with T squared")):
        end = min(last, first * (high / low) ** (1 / power))
        axes.plot(
            [first, end], [low, low * (end / first) ** power], color=GREY, linewidth=1, dashes=dashes, label=label,
            zorder=1,
        )  # fmt: skip
    axes.legend(loc="upper left", ncols=2, frameon=False, fontsize=8, handlelength=3.2)


def draw_lines(axes: Axes, found: Mapping[str, Sequence[Point]]) -> None:
    """A line with its band for each implementation, and its name: at the right, or where the line ends early."""
    longest = max((point[0] for points in found.values() for point in points), default=None)
    ends = {}
    for number, (name, points) in enumerate(found.items()):
        if not points:
            continue
        colour, marker, line = STYLES[number % len(STYLES)]
        lengths, middle, low, high = zip(*points, strict=True)
        axes.fill_between(lengths, low, high, color=colour, alpha=0.2, linewidth=0, zorder=2)
        axes.plot(lengths, middle, line, marker=marker, color=colour, markersize=5, linewidth=1.6, label=name, zorder=3)
        if lengths[-1] == longest:
            ends[name] = (longest, middle[-1], colour, marker)
        else:
            place = {"textcoords": "offset points", "xytext": (0, 8), "ha": "center"}
            axes.annotate(name, (lengths[-1], middle[-1]), color=colour, fontsize=9, zorder=4, **place)
    to_panel = axes.transData + axes.transAxes.inverted()
    heights = apart({name: to_panel.transform(end[:2])[1] for name, end in ends.items()})
    left = 1 - WIDTH_OF_NAMES + 0.055  # so far that it is read as a key, not as a point
    leader = {"arrowstyle": "-", "linewidth": 0.6, "alpha": 0.7, "shrinkA": 0, "shrinkB": 4, "relpos": (0, 0.5)}
    for name, (length, value, colour, marker) in ends.items():
        axes.plot(left, heights[name], marker, color=colour, markersize=5, transform=axes.transAxes)
        axes.annotate(
            name, (length, value), xytext=(left + 0.015, heights[name]), textcoords="axes fraction", color=colour,
            fontsize=9, va="center", zorder=4, arrowprops=leader | {"color": colour},
        )  # fmt: skip


def apart(heights: Mapping[str, float], gap: float = GAP) -> dict[str, float]:
    """The same heights (parts of a panel), moved as little as needed to be `gap` apart, in the same order, inside."""
    order = sorted(heights, key=heights.__getitem__)
    moved = dict(heights)
    for _ in range(100):  # neighbours that are too near push one another away by halves
        for below, above in pairwise(order):
            missing = gap - (moved[above] - moved[below])
            if missing > 1e-9:
                moved[below], moved[above] = moved[below] - missing / 2, moved[above] + missing / 2
        lift = max(0.0, gap / 2 - min(moved.values(), default=1.0))
        moved = {name: height + lift for name, height in moved.items()}
    return moved


def mask_notes(rows: Sequence[Mapping]) -> list[str]:
    """For each implementation that makes something large of a mask, once for all layers: how large at the longest T."""
    notes = []
    for row in {row["implementation"]: row for row in rows if row["not_measured"] is None}.values():
        first, later = row["first_peak_bytes"], row["peak_bytes"]["forward"]
        if first and first > 1.5 * later:
            what = f"{first / 2**20:,.1f} MiB in the first forward pass, which prepares the mask for the others"
            notes.append(f"{row['implementation']} at T = {row['length']}: {what}")
    return notes


def what_is_missing(rows: Sequence[Mapping]) -> list[str]:
    """What a reader would look for and not find: passes that an implementation lacks, lengths that were left out."""
    forward = dict.fromkeys(row["implementation"] for row in rows if not (row["gradients"] or row["not_measured"]))
    notes = [f"forward only: {', '.join(forward)}"] if forward else []
    for name in dict.fromkeys(row["implementation"] for row in rows):
        out = [row for row in rows if row["implementation"] == name and row["not_measured"]]
        if out:
            lengths, why = ", ".join(str(row["length"]) for row in out), out[0]["not_measured"]
            why = re.sub(r" \(.*\)", "", why)  # the formula stands in the table
            notes.append(f"{name} not measured at T = {lengths}; at {out[0]['length']}: {why}")
    return notes
