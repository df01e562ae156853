"""Perplexity by stride, beside what it costs, and what shorter numbers add to it."""

import math
from collections.abc import Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator, ScalarFormatter

from orchestrator.views.figures import BLUE, GREEN, GREY, ORANGE

COLOURS = (BLUE, ORANGE, GREEN, GREY)
MARKS = ("o", "s", "^", "D")


def perplexity_by_stride(rows: Sequence[dict], *, title: str, floor: float | None = None) -> Figure:
    """Left: perplexity by stride, a line for each precision. Right: tokens read, or the change against the first.

    With several strides the right side shows their price. With one, and several precisions, how much each of them adds.

    Args:
        rows: as the command leaves them in report.json.
        floor: nats per token of a perfect model, drawn as a line.
    """
    names = list(dict.fromkeys(row["precision"] for row in rows))
    strides = sorted({row["stride"] for row in rows})
    several = len(strides) > 1
    figure = Figure(figsize=(10.5, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    if several:
        for name, colour, mark in zip(names, COLOURS, MARKS, strict=False):
            of_it = sorted((row["stride"], row["perplexity"]) for row in rows if row["precision"] == name)
            left.plot(*zip(*of_it, strict=True), mark + "-", color=colour, label=name, markersize=5, alpha=0.85)
        read = {row["stride"]: row["tokens_read"] / row["tokens"] for row in rows}
        right.plot(strides, [read[stride] for stride in strides], "o-", color=BLUE, markersize=5)
        right.set(xlabel="stride (tokens)", ylabel="tokens read / tokens of the text", title="what it costs to read")
        for axes in (left, right):
            axes.set_xscale("log")
            axes.set_xticks(strides, [str(stride) for stride in strides])
            axes.xaxis.set_minor_locator(NullLocator())
        right.set_ylim(bottom=0)
        left.set(xlabel="stride (tokens)", ylabel="perplexity per token", title="what context is worth")
        left.yaxis.set_major_formatter(ScalarFormatter(useOffset=False))
    else:
        values = [row["perplexity"] for row in rows]
        left.barh(names[::-1], values[::-1], color=BLUE, height=0.5)
        left.set_xlim(0, max(values) * 1.2)
        left.set(xlabel="perplexity per token", title=f"stride {strides[0]}")
        changes = [100 * math.expm1(row["nats_per_token"] - rows[0]["nats_per_token"]) for row in rows]
        right.barh(names[::-1], changes[::-1], color=ORANGE, height=0.5)
        right.axvline(0, color=GREY, linewidth=1)
        reach = max(max(map(abs, changes)), 1e-6)
        right.set_xlim(-1.2 * reach if min(changes) < 0 else 0, 1.9 * reach)  # room for the figures
        right.set(xlabel=f"change of perplexity against {names[0]} (%)", title="what shorter numbers cost")
        for axes, numbers, form in ((left, values, "{:.4f}"), (right, changes, "{:+.3f} %")):
            for i, value in enumerate(numbers[::-1]):
                axes.annotate(form.format(value), (max(value, 0), i), textcoords="offset points", xytext=(4, -3))
    if floor is not None:
        line = left.axhline if several else left.axvline
        line(math.exp(floor), color=GREEN, linestyle="--", linewidth=1.3, label=f"perfect: {math.exp(floor):.4f}")
    for axes in (left, right):
        axes.grid(alpha=0.25)
    if several or floor is not None:
        left.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=3, fontsize=9)
    figure.suptitle(title)
    return figure
