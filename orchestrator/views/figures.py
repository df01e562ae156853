"""Figures of what was run, drawn without pyplot, so that nothing global is touched and no window is opened."""

from collections.abc import Sequence

from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

BLUE, ORANGE, GREEN, GREY = "#2b6cb0", "#dd6b20", "#2f855a", "#718096"


def loss_curve(history, *, title: str, floor: float | None = None, limit: float | None = None, baseline=None) -> Figure:
    """Training and validation loss by step; where the floor is known, also how far above it, on a log axis.

    Args:
        history: a `training.loop.History`.
        floor: the exact loss of a perfect model on the validation split, in nats per token.
        limit: how far above the floor is good enough, drawn beside the distance.
        baseline: (name, loss) to beat, drawn where there is no floor.
    """
    steps, losses = zip(*history.validation, strict=True)
    figure = Figure(figsize=(7, 4.2) if floor is None else (11, 4.2))
    axes = figure.add_subplot(1, 1 if floor is None else 2, 1)
    axes.plot(*zip(*history.train, strict=True), color=BLUE, alpha=0.35, linewidth=1, label="training batch")
    axes.plot(steps, losses, "o-", color=BLUE, markersize=3.5, label="held-out text")
    if floor is not None:
        axes.axhline(floor, color=GREEN, linewidth=1.5, label=f"floor, exact: {floor:.4f}")
    if baseline is not None:
        axes.axhline(baseline[1], color=GREY, linestyle="--", linewidth=1.2, label=f"{baseline[0]}: {baseline[1]:.3f}")
    mark = {"textcoords": "offset points", "xytext": (-4, 9), "ha": "right", "fontsize": 9, "color": BLUE}
    axes.annotate(f"{losses[-1]:.4f}", (steps[-1], losses[-1]), **mark)
    axes.set(xlabel="step", ylabel="loss (nats per token)", title=title)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    if floor is not None:
        gaps = [max(loss - floor, 1e-5) for loss in losses]  # a log axis has no place for zero
        right = figure.add_subplot(1, 2, 2)
        right.semilogy(steps, gaps, "o-", color=BLUE, markersize=3.5)
        right.annotate(f"{losses[-1] - floor:.4f}", (steps[-1], gaps[-1]), **mark | {"xytext": (-4, -14)})
        right.set_ylim(bottom=min(gaps) / 2)
        if limit is not None:
            right.axhline(limit, color=GREY, linestyle="--", linewidth=1.2, label=f"good enough: {limit}")
            right.legend(frameon=False)
        right.set(xlabel="step", ylabel="nats per token above the floor", title="how much is left to learn")
        right.grid(alpha=0.25, which="both")
    figure.tight_layout()
    return figure


def implementations_chart(rows: Sequence[dict], *, title: str) -> Figure:
    """Error as a part of the bound, and time against eager, for each implementation.

    Args:
        rows: from `evaluation.parity.toggle_table`.
    """
    figure = Figure(figsize=(9, 1.6 + 0.55 * len(rows)))
    left, right = figure.subplots(1, 2, sharey=True)
    names = [row["implementation"] for row in rows][::-1]
    worst = [max(row["ratio"].values()) for row in rows][::-1]
    times = [row["seconds_over_eager"] for row in rows][::-1]
    left.barh(names, worst, color=[GREEN if value <= 1 else ORANGE for value in worst], height=0.55)
    left.axvline(1.0, color=GREY, linestyle="--", linewidth=1.2)
    left.set_xlim(0, max(1.15, *worst) * 1.05)
    left.set(xlabel="largest error / bound (1 = the bound)", title="against float64")
    right.barh(names, times, color=BLUE, height=0.55)
    right.set_xlim(0, max(times) * 1.2)
    right.axvline(1.0, color=GREY, linestyle="--", linewidth=1.2)
    right.set(xlabel="time, forward + backward (1 = eager)", title="speed")
    for axes, values, form in ((left, worst, "{:.2f}"), (right, times, "{:.2f}x")):
        for i, value in enumerate(values):
            axes.annotate(form.format(value), (value, i), textcoords="offset points", xytext=(4, -3), fontsize=9)
    figure.suptitle(title, y=1.04)
    return figure


def attention_map(
    weights: Tensor, words: Sequence[str], *, title: str, circled: Sequence[tuple[int, int]] = ()
) -> Figure:
    """One head: which earlier word (column) each word (row) looks at.

    Args:
        weights: (T, T), rows sum to 1.
        words: the T tokens as text.
        circled: (row, column) pairs to draw a ring around.
    """
    size = max(5.0, 0.17 * len(words))
    figure = Figure(figsize=(size, size))
    axes = figure.add_subplot()
    image = axes.imshow(weights.detach().float().cpu().numpy(), cmap="Blues", vmin=0, vmax=1)
    if circled:
        rows, columns = zip(*circled, strict=True)
        axes.scatter(columns, rows, s=34, facecolors="none", edgecolors=ORANGE, linewidths=1)
    for set_ticks, rotation in ((axes.set_xticks, 90), (axes.set_yticks, 0)):
        set_ticks(range(len(words)), words, fontsize=7, rotation=rotation)
    axes.set(xlabel="looked at (key)", ylabel="looking (query)", title=title)
    figure.colorbar(image, ax=axes, shrink=0.6, label="attention weight")
    return figure


def causality_map(moved: Tensor, *, title: str) -> Figure:
    """Which positions' logits moved when one token was changed: under a causal mask, a lower triangle.

    Args:
        moved: (T, T) largest changes; row: the position that is looked at; column: that of the changed token.
    """
    figure = Figure(figsize=(4.8, 3.9), layout="constrained")
    axes = figure.add_subplot()
    moved = moved.detach().float().cpu().numpy()
    rows, columns = (moved == 0).nonzero()
    image = axes.imshow(moved.clip(min=1e-12), cmap="Blues", norm=LogNorm(vmin=1e-3, vmax=10, clip=True))
    axes.plot(columns, rows, "x", color=GREY, markersize=4)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="the token that was changed", ylabel="the position that is looked at", title=title)
    figure.colorbar(image, ax=axes, label="largest change of a logit (x: exactly 0)")
    return figure
