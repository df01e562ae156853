"""Figures of one run, drawn from its metrics.jsonl: loss, learning rate, gradient norm, speed; and of its memory."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

from GPT2Model.files import replace_file
from orchestrator.training.metrics import read_metrics
from orchestrator.views.figures import BLUE, GREEN, GREY, ORANGE
from orchestrator.views.training_figures import plain

POINTS = 2000  # more than a figure this wide can show apart
SIZE = (8, 4.2)


def save_run_figures(
    metrics_path: str | Path,
    folder: str | Path,
    *,
    title: str,
    floor: float | None = None,
    clip: float | None = None,
    baseline: tuple[str, float] | None = None,
) -> list[Path]:
    """Draw what a run left, as PNG files.

    Args:
        metrics_path: its metrics.jsonl.
        folder: for loss.png, learning_rate.png, gradient_norm.png and speed.png; made if it is not there.
        floor: the exact loss of a perfect model, nats per token. clip: of the gradient.
        baseline: (name, loss) to beat.
    Returns:
        the files; none of a run without a step and without an evaluation.
    Raises:
        FileNotFoundError: no metrics there.
    """
    rows = read_metrics(metrics_path)
    steps, folder = of(rows, "step"), Path(folder)
    figures = {}
    if steps or of(rows, "evaluation"):
        figures["loss.png"] = loss_figure(rows, title=title, floor=floor, baseline=baseline)
    if steps:
        figures["learning_rate.png"] = learning_rate_figure(rows, title=title)
        figures["gradient_norm.png"] = gradient_norm_figure(rows, title=title, clip=clip)
        figures["speed.png"] = speed_figure(rows, title=title)
    if figures:
        folder.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        save_figure(figure, folder / name)
    return [folder / name for name in figures]


def save_figure(figure: Figure, path: Path) -> None:
    """Write a PNG beside its place, and rename it."""
    replace_file(path, lambda beside: figure.savefig(beside, format="png", dpi=130, bbox_inches="tight"))


def loss_figure(
    rows: Sequence[Mapping], *, title: str, floor: float | None = None, baseline: tuple[str, float] | None = None
) -> Figure:
    """The loss of each step's batch, thin and smoothed; of the held-out text; the floor and a baseline if known.

    Args:
        rows: of `metrics.read_metrics`.
        floor: the exact loss of a perfect model, nats per token. baseline: (name, loss) to beat.
    """
    figure, axes = empty(title, "loss (nats per token)")
    steps, losses = column(rows, "loss")
    evaluated, held_out = column(rows, "loss", "evaluation")
    known = [value for value in (*held_out, floor, baseline and baseline[1]) if value is not None]
    highest = usual_height(losses, known)
    draw_noisy(axes, steps, losses, "training batch", highest)
    marker = {"marker": "o", "markersize": 4 if len(held_out) <= 60 else 2}
    if len(held_out):
        axes.plot(evaluated, held_out, color=ORANGE, linewidth=1.5, label="held-out text", **marker)
    for name, value, colour, style in (
        ("floor, exact", floor, GREEN, "-"),
        (*(baseline or ("", None)), GREY, "--"),
    ):
        if value is not None:
            axes.axhline(value, color=colour, linestyle=style, linewidth=1.5, label=f"{name}: {value:.4f}")
    if highest < math.inf:
        low = min(value for value in (*losses, *known) if math.isfinite(value))
        axes.set_ylim(low - 0.05 * (highest - low), highest + 0.1 * (highest - low))
        beyond = losses[np.isfinite(losses) & (losses > highest)]
        axes.plot([], [], " ", label=f"not shown: {len(beyond)} batches, up to {beyond.max():.3g}")
    finite = [(step, loss) for step, loss in zip(evaluated, held_out, strict=True) if math.isfinite(loss)]
    if finite:
        axes.annotate(
            f"{finite[-1][1]:.4f}", finite[-1], textcoords="offset points", xytext=(4, 9), ha="right",
            fontsize=9, color=ORANGE, bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1},
        )  # fmt: skip
    return finished(figure, axes, rows)


def learning_rate_figure(rows: Sequence[Mapping], *, title: str) -> Figure:
    """The learning rate of each step."""
    figure, axes = empty(title, "learning rate")
    steps, rates = column(rows, "learning_rate")
    axes.plot(*thinned(steps, rates), color=BLUE, linewidth=1.8, **dot_if_one(steps))
    axes.set_ylim(bottom=0)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3), useMathText=True)
    return finished(figure, axes, rows)


def gradient_norm_figure(rows: Sequence[Mapping], *, title: str, clip: float | None = None) -> Figure:
    """The length of each step's gradient before clipping, on a log axis, and where it is clipped."""
    figure, axes = empty(title, "gradient norm before clipping")
    steps, norms = column(rows, "gradient_norm")
    norms = np.where(norms > 0, norms, np.nan)  # a log axis has no place for zero
    axes.set_yscale("log")
    draw_noisy(axes, steps, norms, "each step")
    if clip is not None and math.isfinite(clip):
        part = np.mean(norms[np.isfinite(norms)] > clip) if np.isfinite(norms).any() else 0
        label = f"clipped above {clip:g} ({100 * part:.0f} % of the steps)"
        axes.axhline(clip, color=ORANGE, linestyle="--", linewidth=1.5, label=label)
    plain(axes)
    return finished(figure, axes, rows)


def speed_figure(rows: Sequence[Mapping], *, title: str) -> Figure:
    """Tokens per second of each step, without evaluation and saving; on the right the same as MFU, if it is known."""
    figure, axes = empty(title, "training tokens / s")
    steps, speeds = column(rows, "tokens_per_second")
    draw_noisy(axes, steps, speeds, "each step")
    finite = speeds[np.isfinite(speeds)]
    if len(finite):
        middle = float(np.median(finite))
        axes.axhline(middle, color=GREY, linestyle="--", linewidth=1.2, label=f"median: {middle:,.0f} tokens/s")
        axes.set_ylim(0, 1.15 * max(np.quantile(finite, 0.995), middle) or 1)
    axes.yaxis.set_major_formatter(
        FuncFormatter(lambda speed, _: f"{speed / 1e3:g}k" if speed >= 1e3 else f"{speed:g}")
    )
    parts = [row["mfu"] / row["tokens_per_second"] for row in of(rows, "step") if row.get("mfu")]
    if parts:
        each = parts[-1]  # one number for the whole run: MFU is tokens/s over what the peak would allow
        right = axes.secondary_yaxis("right", functions=(lambda speed: speed * each, lambda part: part / each))
        right.set_ylabel("MFU")
        right.yaxis.set_major_formatter(PercentFormatter(xmax=1))
    return finished(figure, axes, rows)


def memory_figure(facts: Mapping, *, title: str) -> Figure:
    """Live tensor bytes over the time of a few steps.

    Args:
        facts: "live", "steps", "peak_bytes", "peak_ms", as `training.profiling.live_bytes` gives them.
    """
    figure = Figure(figsize=SIZE, layout="constrained")
    axes = figure.add_subplot()
    for number, (begin, end) in enumerate(facts["steps"]):
        axes.axvspan(begin, end, color=GREY, alpha=0.10 if number % 2 else 0.22, linewidth=0)
    if facts["live"]:
        ms, live = thinned(*zip(*facts["live"], strict=True), 4 * POINTS)
        axes.step(ms, np.asarray(live) / 2**20, where="post", color=BLUE, linewidth=1.2)
        peak = facts["peak_bytes"] / 2**20
        axes.plot(facts["peak_ms"], peak, "o", color=ORANGE)
        beside = {"textcoords": "offset points", "xytext": (8, 4), "fontsize": 9, "color": ORANGE}
        axes.annotate(f"peak: {peak:,.1f} MiB", (facts["peak_ms"], peak), **beside)
        axes.set_ylim(top=1.12 * peak if peak else 1)
    axes.set(xlabel="time (ms); each band is a step", title=title)
    axes.set_ylabel("live tensors (MiB), above what\nthe steps before left (weights, optimizer)")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.25)
    return figure


def of(rows: Sequence[Mapping], event: str) -> list[Mapping]:
    return [row for row in rows if row["event"] == event]


def column(rows: Sequence[Mapping], name: str, event: str = "step") -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of one event; what is missing is NaN."""
    rows = of(rows, event)
    values = [row.get(name) for row in rows]
    values = [float("nan") if value is None else float(value) for value in values]
    return np.array([row["step"] for row in rows], dtype=float), np.array(values, dtype=float)


def empty(title: str, ylabel: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=SIZE, layout="constrained")
    axes = figure.add_subplot()
    axes.set(xlabel="step", ylabel=ylabel, title=title)
    return figure, axes


def finished(figure: Figure, axes: Axes, rows: Sequence[Mapping]) -> Figure:
    """The last touches: where steps were skipped and the run was resumed, whole steps, a light grid, a legend."""
    steps = of(rows, "step")
    skipped = [row["step"] for row in steps if row.get("skipped")]
    if skipped:
        axes.plot(
            skipped, [0.03] * len(skipped), "x", color="black", markersize=6, markeredgewidth=1.5,
            transform=axes.get_xaxis_transform(), label=f"skipped: {len(skipped)} of {len(steps)} steps",
        )  # fmt: skip
    for i, step in enumerate(sorted({row["step"] for row in of(rows, "start") if row["step"] > 0})):
        axes.axvline(step, color=GREY, linestyle=":", linewidth=1, zorder=0, label=None if i else "resumed")
    last = max([row["step"] for row in rows], default=1)
    axes.set_xlim(-0.02 * max(last, 1), 1.02 * max(last, 1))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.grid(alpha=0.25)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(framealpha=0.85, edgecolor="none")
    return figure


def draw_noisy(axes: Axes, steps: np.ndarray, values: np.ndarray, label: str, highest: float = math.inf) -> None:
    """A column that differs by chance from step to step: each step thin, and the mean around it.

    Args:
        highest: what is above it is not in the mean.
    """
    if not len(steps):
        return
    window = smoothing_window(len(steps))
    values = np.where(np.isfinite(values), values, np.nan)
    one = dot_if_one(values[np.isfinite(values)])
    axes.plot(*thinned(steps, values), color=BLUE, alpha=0.3 if window > 1 else 1, linewidth=0.8, label=label, **one)
    if window > 1:
        smooth = smoothed(np.where(values <= highest, values, np.nan), window)
        axes.plot(*thinned(steps, smooth), color=BLUE, linewidth=1.8, label=f"mean of {window} steps")


def smoothing_window(count: int) -> int:
    """Steps in one mean: about a fiftieth of the run, odd; none below 20 steps."""
    return 1 if count < 20 else 2 * max(1, count // 100) + 1


def smoothed(values: np.ndarray, window: int) -> np.ndarray:
    """The mean around each value, of those that are numbers.

    At the start the window is narrower, so that a steep fall stays where it is; at the end it lacks what is not there.
    """
    known = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(known, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(known)])
    at = np.arange(len(values))
    half = np.clip(at, window // 20, window // 2)
    low, high = np.maximum(at - half, 0), np.minimum(at + half + 1, len(values))
    with np.errstate(invalid="ignore"):
        return (sums[high] - sums[low]) / (counts[high] - counts[low])


def thinned(xs: Sequence, ys: Sequence, points: int = POINTS) -> tuple[np.ndarray, np.ndarray]:
    """At most about `points` points that draw the same line: the least and the greatest of each stretch, in order."""
    xs, ys = np.asarray(xs, dtype=float), np.asarray(ys, dtype=float)
    if len(xs) <= points:
        return xs, ys
    kept = {0, len(xs) - 1}
    for stretch in np.array_split(np.arange(len(xs)), points // 2):
        known = stretch[np.isfinite(ys[stretch])]
        kept |= {int(known[ys[known].argmin()]), int(known[ys[known].argmax()])} if len(known) else {int(stretch[0])}
    kept = sorted(kept)
    return xs[kept], ys[kept]


def usual_height(noisy: np.ndarray, shown: Sequence[float]) -> float:
    """Where the axis should end: a few wild batches must not press the curve flat. Infinity: there are none."""
    noisy = noisy[np.isfinite(noisy)]
    if not len(noisy):
        return math.inf
    begin = noisy[0]  # where the loss begins is no outlier
    usual = max([np.quantile(noisy, 0.99), begin, *(value for value in shown if math.isfinite(value))])
    return float(usual) if noisy.max() > 1.5 * usual else math.inf


def dot_if_one(values: Sequence) -> dict:
    """A line of one point is not seen: it gets a dot."""
    return {"marker": "o", "markersize": 5} if len(values) == 1 else {}
