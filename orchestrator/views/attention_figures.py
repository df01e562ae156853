"""Figures that compare implementations of attention."""

import math
from collections.abc import Sequence

from matplotlib.figure import Figure

from orchestrator.views.figures import BLUE, GREEN, GREY, ORANGE

DTYPE_STYLE = {"float32": (BLUE, "o"), "bfloat16": (ORANGE, "s"), "float16": (GREEN, "^")}


def parity_chart(rows: Sequence[dict], *, title: str) -> Figure:
    """The largest error / bound of each implementation, forward and gradients, by dtype, on a log axis.

    Args:
        rows: from `evaluation.grading.summarise`.
    """
    names = list(dict.fromkeys(row["implementation"] for row in rows))
    figure = Figure(figsize=(9, 1.9 + 0.45 * len(names)), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, column in zip(panels, ("forward", "gradients"), strict=True):
        for row in rows:
            value = row[column]
            if value is None:
                axes.annotate("forward only", (0.012, names.index(row["implementation"])), fontsize=8, color=GREY)
                continue
            colour, marker = DTYPE_STYLE[row["dtype"]]
            dtypes = list(DTYPE_STYLE)
            y = names.index(row["implementation"]) + (dtypes.index(row["dtype"]) - 1) * 0.2
            shown = 10.0 if not value < 10 else max(value, 0.012)  # NaN too: at the right edge, with an arrow
            label = (
                f"{value:.2f}" if value < 10 else "NaN" if math.isnan(value) else f"{value:.0e} \N{RIGHTWARDS ARROW}"
            )
            axes.plot(
                shown, y, marker, color=colour, markersize=7, markerfacecolor="white" if row["failed"] else colour
            )
            left = 0.35 < value < 1  # else the label would lie on the bound's line
            place = {"xytext": (-7 if left else 7, -3), "ha": "right" if left else "left"}
            axes.annotate(label, (shown, y), textcoords="offset points", fontsize=8, **place)
        axes.axvline(1.0, color=GREY, linestyle="--", linewidth=1.2)
        axes.set_xscale("log")
        axes.set_xlim(0.01, 60)
        axes.set(xlabel="largest error / bound (1 = the bound)", title=column)
        axes.grid(alpha=0.25, axis="x", which="both")
    panels[0].set_yticks(range(len(names)), names)
    panels[0].set_ylim(len(names) - 0.5, -0.5)
    for dtype, (colour, marker) in DTYPE_STYLE.items():
        if any(row["dtype"] == dtype for row in rows):
            panels[1].plot([], [], marker, color=colour, label=dtype)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle(title)
    return figure
