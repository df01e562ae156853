"""Figures of the variants around GPT-2: what grouped heads and rotary positions are, and what `tales` says of each.

The first two show the idea, computed by the code itself; the others draw what `benchmarks/variants_on_tales.py` found.
"""

import statistics
from collections.abc import Mapping

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from CMHA.masks import AttentionMask
from CMHA.rotary import RotaryPositions
from orchestrator.views.figures import BLUE, GREEN, GREY, ORANGE
from orchestrator.views.variant_tables import LABELS, LENGTH_LINES, SIZES, TASKS

LEAST = 5e-4  # nats: a log axis has no place for zero
GROUP_COLOURS = (BLUE, ORANGE, GREEN, "#6b46c1")


def all_figures(results: Mapping) -> dict[str, Figure]:
    """Every figure of docs/variants by its name."""
    return {
        "shared_heads": shared_heads(),
        "turning_pairs": turning_pairs(),
        "learning_curves": learning_curves(results),
        "costs": costs(results),
    } | ({"longer_than_learned": longer_than_learned(results)} if results["losses"]["windows"]["runs"] else {})


def shared_heads(n_heads: int = 4) -> Figure:
    """Which query heads share which key-value head: each its own, in pairs, and all of them one."""
    counts = (n_heads, n_heads // 2, 1)
    figure = Figure(figsize=(10.5, 3), layout="constrained")
    titles = (
        f"n_kv_heads = {counts[0]} (GPT-2)",
        f"n_kv_heads = {counts[1]} (grouped)",
        "n_kv_heads = 1 (multi-query)",
    )
    for axes, count, title in zip(figure.subplots(1, 3), counts, titles, strict=True):
        size = n_heads // count
        for query in range(n_heads):
            colour = GROUP_COLOURS[query // size % len(GROUP_COLOURS)]
            shared = (query // size) * size + (size - 1) / 2  # in the middle above its group
            axes.plot([query, shared], [0.28, 0.72], color=colour, linewidth=1.8)
            box(axes, query, 0.15, f"Q{query}", colour)
            if query % size == 0:
                box(axes, shared, 0.85, f"K{query // size} V{query // size}", colour, filled=True)
        axes.set_title(f"{title}\ncache: {count} of {n_heads} heads", fontsize=10)
        axes.set(xlim=(-0.6, n_heads - 0.4), ylim=(-0.02, 1.02))
        axes.axis("off")
    return figure


def box(axes: Axes, x: float, y: float, text: str, colour: str, filled: bool = False) -> None:
    width = 0.84 if filled else 0.6
    style = {"boxstyle": "round,pad=0,rounding_size=0.06", "edgecolor": colour, "linewidth": 1.5}
    axes.add_patch(
        FancyBboxPatch((x - width / 2, y - 0.11), width, 0.22, facecolor=colour if filled else "white", **style)
    )
    axes.text(x, y, text, ha="center", va="center", fontsize=10, color="white" if filled else colour)


def turned(vector: torch.Tensor, tokens: int) -> torch.Tensor:
    """(tokens, D): one vector as `RotaryPositions` turns it at each position."""
    rows = vector.expand(1, 1, tokens, -1)
    return RotaryPositions(len(vector))(rows, rows, AttentionMask(tokens, tokens))[0][0, 0]


def turning_pairs(tokens: int = 64, head_dim: int = 32) -> Figure:
    """Pairs turn by position, each at its own speed; a score depends on the distance alone."""
    figure = Figure(figsize=(12, 4.1), layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=(1, 1.15, 1.25))
    ones = torch.cat([torch.ones(head_dim // 2), torch.zeros(head_dim // 2)])  # every pair starts as (1, 0)
    points = turned(ones, tokens)
    circle = torch.linspace(0, 2 * torch.pi, 100)
    left.plot(circle.cos().tolist(), circle.sin().tolist(), color=GREY, linewidth=0.7)
    for pair, colour in ((0, BLUE), (4, ORANGE)):
        for position in range(6):
            x, y = points[position, pair].item(), points[position, pair + head_dim // 2].item()
            left.plot([0, x], [0, y], color=colour, linewidth=1.4, alpha=0.35 + 0.13 * position)
            left.plot(x, y, "o", color=colour, markersize=4)
            if pair == 0 or position in (0, 5):  # the slow pair's lie too near to one another
                away = 1.13 if pair == 0 else 0.88
                shift = 0 if pair == 0 else 0.1 if position else -0.1
                at = (away * x, away * y + shift)
                left.annotate(str(position), at, color=colour, ha="center", va="center", fontsize=9)
        speed = 10_000 ** (-2 * pair / head_dim)
        left.plot([], [], color=colour, label=f"pair {pair}: {speed:.2g} rad a token")
    left.set(xlim=(-1.3, 1.3), ylim=(-1.3, 1.75), aspect="equal", title="two pairs at positions 0 to 5")
    left.set(xlabel="first number of the pair", ylabel="second number")
    left.legend(loc="upper center", frameon=False, fontsize=8)

    image = middle.imshow(points[:, : head_dim // 2].T.tolist(), aspect="auto", cmap="RdBu", vmin=-1, vmax=1)
    middle.set(xlabel="position (tokens)", ylabel=f"pair (of {head_dim // 2})", title="cosine of each pair's angle")
    figure.colorbar(image, ax=middle, shrink=0.8)

    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, head_dim, generator=generator)
    queries, keys = turned(query, tokens), turned(key, tokens)
    for start, colour, style in ((0, BLUE, "-"), (16, ORANGE, "--"), (32, GREEN, ":")):
        distances = range(tokens - start)
        scores = [(queries[start + d] @ keys[start]).item() / head_dim**0.5 for d in distances]
        right.plot(distances, scores, style, color=colour, linewidth=2.4, label=f"key at position {start}")
    right.set(
        xlabel="distance of query and key (tokens)", ylabel="score", title="one query, one key: the curves coincide"
    )
    right.legend(frameon=False, fontsize=9)
    right.grid(alpha=0.25)
    return figure


def learning_curves(results: Mapping) -> Figure:
    """Each variant against GPT-2: nats above the floor by tokens, a line for each seed."""
    runs = results["losses"]["runs"]
    names = [name for name in LABELS if name != "gpt2" and any(run["model"] == name for run in runs)]
    columns = min(3, len(names))
    lines = -(-len(names) // columns)
    figure = Figure(figsize=(3.9 * columns + 0.6, 2.9 * lines + 0.5), layout="constrained")
    grid = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
    for axes, name in zip(grid.flat, names, strict=False):
        draw_seeds(axes, runs, "gpt2", GREY, "--")
        draw_seeds(axes, runs, name, BLUE, "-")
        axes.set_title(LABELS[name], fontsize=10)
        axes.grid(alpha=0.25)
    ends = [grid[0, 0].lines[0], grid[0, 0].lines[-1]]
    grid[0, 0].legend(ends, ["GPT-2", "the variant"], frameon=False, fontsize=9, loc="upper right")
    for axes in list(grid.flat)[len(names) :]:
        axes.axis("off")
    seeds = len(results["losses"]["seeds"])
    figure.supxlabel("tokens learned from (thousands)", fontsize=10)
    figure.supylabel("nats per token above the floor", fontsize=10)
    figure.suptitle(f"held-out tales: {seeds} seed{'s' * (seeds > 1)}, a line for each", fontsize=11)
    return figure


def draw_seeds(axes: Axes, runs: list, name: str, colour: str, style: str) -> None:
    """A line for each seed: a mean of one run that found what is to be copied and one that did not is neither."""
    for curve in (run["curve"] for run in runs if run["model"] == name):
        at, gaps = [tokens / 1000 for tokens, _ in curve], [max(gap, LEAST) for _, gap in curve]
        axes.semilogy(at, gaps, style, color=colour, linewidth=1.3, alpha=0.85)


def costs(results: Mapping) -> Figure:
    """What each model takes, GPT-2 = 1: by its shape, and, once it was measured, in time."""
    panels = {
        "parameters": {name: [own["parameters"]] for name, own in results["costs"].items()},
        "FLOPs per token": {name: [own["flops_per_token"]] for name, own in results["costs"].items()},
        "cache per token": {name: [own["cache_bytes_per_token"]] for name, own in results["costs"].items()},
    }
    for panel, values in panels.items():
        panels[panel] = {name: [value[0] / values["gpt2"][0]] for name, value in values.items()}
    for size in SIZES if "speed" in results else ():
        for task in TASKS:
            title = f"time: {task}\n({size})"
            panels[title] = {name: cell["ratio"] for name, cell in results["speed"][size][task].items()}
    names = list(LABELS)[::-1]
    columns, lines = (3, 1) if "speed" not in results else (4, 2)
    figure = Figure(figsize=(2.3 * columns + 1.8, 2.9 * lines + 0.3), layout="constrained")
    grid = figure.subplots(lines, columns, sharey=True, squeeze=False)
    if lines == 2:
        grid[0, 3].axis("off")
    places = [axes for axes in grid.flat if axes.axison]
    for axes, (title, values) in zip(places, panels.items(), strict=True):
        draw_bars(axes, values, names)
        axes.set_title(title, fontsize=10)
    figure.supxlabel("GPT-2 = 1" + ("; black: the middle half of the rounds" if "speed" in results else ""), fontsize=9)
    return figure


def draw_bars(axes: Axes, values: Mapping[str, list[float]], names: list[str]) -> None:
    """A bar for each model; a ratio that was timed has its quartiles as a line."""
    timed = len(values["gpt2"]) == 3
    end = max(max(value) for value in values.values())
    axes.axvline(1, color=GREY, linestyle="--", linewidth=1)
    for place, name in enumerate(names):
        if name in values:
            axes.barh(place, values[name][0], color=GREEN if timed else BLUE, height=0.6)
            if timed and name != "gpt2":
                axes.plot(values[name][1:], [place, place], color="black", linewidth=1.2)
            # at the foot of the bar: at its end stand the quartiles and the line of GPT-2
            axes.annotate(f"{values[name][0]:.2f}", (0.02 * end, place), va="center", fontsize=9, color="white")
    axes.set_xlim(0, 1.08 * end)
    axes.set_yticks(range(len(names)), [LABELS[name] for name in names])


def longer_than_learned(results: Mapping) -> Figure:
    """The loss by position in windows twice as long as those that were learned."""
    length = results["losses"]["windows"]
    figure = Figure(figsize=(7.6, 4), layout="constrained")
    axes = figure.add_subplot()
    middles = [at + length["bin"] / 2 for at in range(0, length["read"], length["bin"])]
    looks = {"gpt2": (GREY, "s"), "rope": (BLUE, "o")}
    for name, how, label in LENGTH_LINES:
        rows = list(zip(*(run[how] for run in length["runs"] if run["model"] == name), strict=True))
        if not rows:
            continue
        colour, marker = looks[name]
        style, face = ("-", colour) if how == "whole" else (":", "white")
        look = {"marker": marker, "markerfacecolor": face, "color": colour, "linewidth": 1.8}
        axes.plot(middles, [statistics.mean(row) for row in rows], style, label=label, **look)
        if how == "whole":
            least, most = [min(row) for row in rows], [max(row) for row in rows]
            axes.fill_between(middles, least, most, color=colour, alpha=0.2, linewidth=0)
    axes.axvline(length["learned"], color=ORANGE, linestyle="--", linewidth=1.4)
    place = {"xytext": (6, 0), "xycoords": ("data", "axes fraction"), "textcoords": "offset points", "va": "top"}
    axes.annotate("no training saw\npositions from here", (length["learned"], 0.97), color=ORANGE, fontsize=9, **place)
    axes.set(xlabel="position in the window (tokens)", ylabel="loss (nats per token)")
    axes.set_title(f"learned windows of {length['learned']} tokens, read windows of {length['read']}", fontsize=11)
    axes.set_yscale("log")  # what rotary positions do is a matter of tenths, what learned ones do of several nats
    bottom, top = axes.get_ylim()
    axes.set_ylim(bottom, top * 1.9)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.grid(alpha=0.25, which="both")
    axes.legend(frameon=False, fontsize=9, loc="upper left")
    return figure
