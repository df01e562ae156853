"""Figures of training: several runs on one plot, and heads that begin to copy while the loss falls."""

import math
from collections.abc import Mapping, Sequence
from itertools import takewhile

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from torch import Tensor

from orchestrator.views.figures import BLUE, GREEN, GREY, ORANGE

PURPLE = "#553c9a"
LINES = ((BLUE, "-"), (ORANGE, "--"), (GREEN, "-."), (PURPLE, ":"), (GREY, "-"))  # told apart without colours too
NOTABLE = 0.1  # a head with less than this on the earlier places is one of "the others"
LEAST = 1e-3  # a log axis has no place for zero


def loss_curves(
    runs: Mapping[str, Sequence[float]],
    *,
    title: str,
    floor: float,
    window: int = 10,
    per_step: Mapping[str, float] | None = None,
    xlabel: str = "step",
    highest: float = 20.0,
) -> Figure:
    """Several runs on one plot: how far the training loss is above the floor, on a log axis.

    Args:
        runs: name -> the loss of each step, in nats per token, at most five runs. One that ended in NaN or infinity
            gets a cross where it ended.
        floor: the exact loss of a perfect model, in nats per token.
        window: each point is the mean of this many steps, itself the last: batches differ by chance.
        per_step: name -> how far one step moves along the axis, for runs whose steps are not alike; None: 1.
        xlabel: what that axis counts.
        highest: the axis ends there at the latest: a run that explodes must not press the others flat.
    Raises:
        ValueError: no runs, more than five, or a window below 1.
    """
    if not 1 <= len(runs) <= len(LINES) or window < 1:
        raise ValueError(
            f"loss_curves draws 1 to {len(LINES)} runs with a window from 1, got {len(runs)} and {window}."
        )
    figure = Figure(figsize=(8, 4.4))
    axes = figure.add_subplot()
    for (name, losses), (colour, style) in zip(runs.items(), LINES, strict=False):
        finite = list(takewhile(math.isfinite, losses))
        size = (per_step or {}).get(name, 1)
        xs = [size * (step + 1) for step in range(len(finite))]
        gaps = [max(gap, LEAST) for gap in above_floor(finite, floor, window)]
        ended = len(finite) < len(losses)
        label = f"{name} (ends in {losses[len(finite)]})" if ended else name
        axes.semilogy(xs, gaps, style, color=colour, linewidth=1.8, label=label)
        if ended and xs:
            end = min(gaps[-1], highest)
            axes.plot(xs[-1], end, "x", color=colour, markersize=10, markeredgewidth=2.5, clip_on=False, zorder=5)
    axes.set(xlabel=xlabel, ylabel="loss above the floor\n(nats per token)", title=title)
    axes.set_ylim(top=min(axes.get_ylim()[1], highest))
    plain(axes)
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.01, 0.5))
    figure.tight_layout()
    return figure


def above_floor(losses: Sequence[float], floor: float, window: int) -> list[float]:
    """The mean of the last `window` losses at each step (fewer at the start), minus the floor."""
    means = []
    for step in range(len(losses)):
        recent = losses[max(0, step + 1 - window) : step + 1]
        means.append(math.fsum(recent) / len(recent) - floor)
    return means


def copying_by_step(validation: Sequence[tuple[int, float]], scores: Mapping[int, Tensor], *, floor: float) -> Figure:
    """The loss above the floor, and below it how much weight each head puts on earlier places of the word to come.

    Args:
        validation: (step, loss in nats per token).
        scores: step -> (layers, heads), as `first_model.copying_scores` gives them.
    """
    figure = Figure(figsize=(8, 6))
    upper, lower = figure.subplots(2, 1, sharex=True)
    steps, losses = zip(*validation, strict=True)
    upper.semilogy(steps, [max(loss - floor, LEAST) for loss in losses], "o-", color=BLUE, markersize=3.5)
    upper.set(ylabel="loss above the floor\n(nats per token)", title="the loss falls as heads begin to copy")
    plain(upper)
    at = sorted(scores)
    last = scores[at[-1]]
    ranking = last.flatten().argsort(descending=True).tolist()
    copying = [index for index in ranking[:3] if last.flatten()[index] >= NOTABLE] or ranking[:1]
    named = dict(zip(copying, LINES, strict=False))
    for index in reversed(ranking):
        layer, head = divmod(index, last.shape[1])
        colour, style = named.get(index, (GREY, "-"))
        label = f"layer {layer}, head {head}" if index in named else None
        line = [100 * scores[step][layer, head].item() for step in at]
        lower.plot(at, line, style, color=colour, linewidth=2 if label else 0.9, alpha=1 if label else 0.6, label=label)
    lower.plot([], [], color=GREY, linewidth=0.9, alpha=0.6, label="the other heads")
    lower.set(xlabel="step", ylabel="weight on earlier places\nof the word to come (%)")
    lower.set_ylim(bottom=0)
    lower.grid(alpha=0.25)
    lower.legend(frameon=False)
    figure.tight_layout()
    return figure


def copying_rows(
    maps: Mapping[str, Tensor], words: Sequence[str], places: Tensor, *, title: str, widest: int = 14
) -> Figure:
    """One head at several moments: the rows of the words before which something is to be copied, each moment a strip.

    Args:
        maps: name of the moment -> (T, T), rows sum to 1.
        words: the T tokens as text.
        places: (T, T) bool, True where a word to come stood before, as `first_model.returns` gives them; ringed.
        widest: characters of a word that are shown.
    """
    rows = places.any(-1).nonzero()[:, 0].tolist()
    names = [word if len(word) <= widest else word[: widest - 1] + "…" for word in words]
    following = [*names[1:], ""]
    height = 0.19 * len(rows) + 0.35
    figure = Figure(figsize=(0.19 * len(words) + 2.6, height * len(maps) + 1.4), layout="constrained")
    panels = figure.subplots(len(maps), 1, squeeze=False)[:, 0]
    for axes, (name, weights) in zip(panels, maps.items(), strict=True):
        image = axes.imshow(weights[rows].numpy(), cmap="Blues", vmin=0, vmax=1, aspect="auto")
        rings = [(column, i) for i, row in enumerate(rows) for column in places[row].nonzero()[:, 0].tolist()]
        axes.plot(*zip(*rings, strict=True), "o", markersize=9, markerfacecolor="none", markeredgecolor=ORANGE)
        axes.set_yticks(range(len(rows)), [f"{names[row]} → {following[row]}" for row in rows], fontsize=8)
        axes.set_xticks(range(len(words)), names if axes is panels[-1] else [], rotation=90, fontsize=8)
        axes.set_title(name, fontsize=10, loc="left")
    panels[-1].set_xlabel("the word that is looked at")
    figure.supylabel("the word that looks → the word to come", fontsize=10)
    figure.suptitle(title, fontsize=11)
    figure.colorbar(image, ax=list(panels), label="attention weight", shrink=0.5, pad=0.01)
    return figure


def plain(axes: Axes) -> None:
    """Numbers such as 0.05 on a log axis, 1, 2 and 5 of each decade where they have room, and a light grid."""
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 200 * low else (1,)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.25, which="both")
