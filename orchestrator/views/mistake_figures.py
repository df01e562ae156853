"""The figure of planted mistakes: which check sees which."""

from collections.abc import Sequence

from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from orchestrator.views.figures import GREY, ORANGE

SEEN, SILENT, NOT_MADE = ORANGE, "#e2e8f0", "white"


def mistakes_chart(rows: Sequence[dict], headings: Sequence[str], *, title: str, groups: Sequence[int] = ()) -> Figure:
    """A table with a cell for each mistake and check: orange where the check sees it, grey where it stays silent.

    Args:
        rows: name, and cells: (text, seen, made) for each heading. What is seen also has a bold text.
        headings: of the columns.
        title: of the figure.
        groups: numbers of columns before which a gap is left.
    """
    lefts, at = [], 0.0
    for i in range(len(headings)):
        at += 0.25 * (i in groups)
        lefts.append(at)
        at += 1
    figure = Figure(figsize=(3.1 + 0.88 * at, 2.3 + 0.33 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    for y, row in enumerate(rows):
        for left, (text, seen, made) in zip(lefts, row["cells"], strict=True):
            colour = SEEN if seen else SILENT if made else NOT_MADE
            axes.add_patch(Rectangle((left + 0.03, y - 0.45), 0.94, 0.9, facecolor=colour, edgecolor="none"))
            axes.text(left + 0.5, y, text, ha="center", va="center", fontsize=8.5, weight="bold" if seen else "normal")
    axes.set_xlim(0, at)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_yticks(range(len(rows)), [row["name"] for row in rows], family="monospace", fontsize=9)
    axes.xaxis.tick_top()
    axes.set_xticks(
        [left + 0.5 for left in lefts], headings, fontsize=9, rotation=40, ha="left", rotation_mode="anchor"
    )
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    marks = [Patch(color=SEEN, label="the check sees it"), Patch(color=SILENT, label="silent")]
    marks += [Patch(facecolor=NOT_MADE, edgecolor=GREY, label="training does not meet it")]
    figure.legend(handles=marks, loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle(title, fontsize=11)
    return figure
