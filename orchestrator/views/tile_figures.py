"""Figure of flash attention at work: the table of scores filled in tile by tile, with what is kept of each row.

A frame for each tile, in the order of computation (`CMHA/implementations/flash_tiled.py`): the tiles so far, and beside
each row its running maximum m and running sum l. The last frame holds m + ln l against the log-sum-exp of the whole
row of scores: the same numbers, though the whole row was never there.
"""

import math
import re
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from torch import Tensor

from GPT2Model.trace_values import MissingValueError
from orchestrator.views.figures import GREY, ORANGE
from orchestrator.views.trace_figures import HIDDEN, array, place_words, rows_of, token_labels

FRAMES = 11  # at most; of more tiles some are left out, evenly
TOKENS = 40  # at most: the numbers beside the rows must be readable
SKIPPED = {"facecolor": "#f3efe9", "edgecolor": "#8a7f73", "linewidth": 0.8}
BESIDE = 0.5  # room for the numbers beside a table, as a part of its side
RULE = "after each tile: m = the larger of m and its largest score; l = l · exp(old m - m) + sum of exp(score - m)"
TILES_CFG = (
    '{"use_flash": True, "attn_implementation": "flash_tiled", "flash_query_block_size": 4, "flash_kv_block_size": 4}'
)


class Tile(NamedTuple):
    """One step of the computation, for one head: where it lies, and what is known of its rows after it."""

    rows: slice
    columns: slice
    scores: np.ndarray  # (rows, columns), -inf where the mask hides a key
    running_max: np.ndarray  # (rows,)
    running_sum: np.ndarray


def flash_tiles(trace, layer: int, head: int, sequence: int = 0) -> Figure:
    """The table of one head being filled in by flash_tiled, ending in the same numbers as the whole rows give.

    Args:
        trace: of a model under flash_tiled with small tiles (4 by 4, say); 40 tokens at most.
        layer, head, sequence: which one.
    Raises:
        KeyError: no tiles in the trace, with the way to get them. ValueError: there is no such head or sequence, or
            the text is too long to be drawn.
    Source: FlashAttention-2 (Dao, 2023), algorithm 1.
    """
    length = len(trace.tokens[0])
    if length > TOKENS:
        raise ValueError(f"{length} tokens are too many for one figure: trace {TOKENS} at most.")
    tiles = tiles_of(trace, layer, head, sequence)
    words = token_labels(trace, sequence)
    exact = log_sum_exp_of_rows(trace, layer, head, sequence)
    finite = np.concatenate([tile.scores[np.isfinite(tile.scores)] for tile in tiles])
    largest = max(float(np.abs(finite).max()) if len(finite) else 0.0, 1e-6)
    shown = sorted({round(i) for i in np.linspace(0, len(tiles) - 1, min(FRAMES, len(tiles)))})

    panels = len(shown) + 1
    columns = panels if panels < 4 else min((3, 4), key=lambda columns: -panels % columns)  # the fewest empty places
    lines = math.ceil(panels / columns)
    side = max(2.4, 0.115 * length)  # inches of a table
    figure = Figure(
        figsize=(columns * ((1 + BESIDE) * side + 0.75) + 0.9, lines * (side + 1.15) + 0.9), layout="constrained"
    )
    grid = figure.subplots(lines, columns, squeeze=False)
    some = "" if len(shown) == len(tiles) else f" ({len(shown)} of them shown)"
    image = None
    for axes, number in zip(grid.flat, shown, strict=False):
        image = draw_frame(axes, tiles[: number + 1], tiles, words, largest)
        at = tiles[number]
        title = f"tile {number + 1} of {len(tiles)}: queries {span(at.rows)}, keys {span(at.columns)}"
        axes.set_title(title, fontsize=10, loc="left", pad=17)
    last = grid.flat[len(shown)]
    draw_comparison(last, tiles, exact, words)
    for axes in list(grid.flat)[len(shown) + 1 :]:
        axes.set_axis_off()
    figure.colorbar(image, ax=grid, label="score (queries · keys / sqrt(head_dim))", shrink=0.6, aspect=40)
    handles = [
        Patch(facecolor="none", edgecolor="black", linewidth=2, label="this tile"),
        Patch(facecolor="white", edgecolor=GREY, label="still to come"),
        Patch(**HIDDEN, label="hidden by the mask"),
        Patch(**SKIPPED, label="skipped: every key in it is hidden"),
        Patch(facecolor=ORANGE, label="a maximum that this tile raised"),
    ]
    figure.legend(
        handles=handles, loc="outside lower center", ncols=5 if columns >= 3 else 3, frameon=False, fontsize=9
    )
    figure.suptitle(f"Flash attention, layer {layer}, head {head}: {count(len(tiles))}{some}\n{RULE}", fontsize=11)
    return figure


def tiles_of(trace, layer: int, head: int, sequence: int) -> list[Tile]:
    """The tiles of one head, in order of computation.

    Raises:
        KeyError: there are none. ValueError: no such head or sequence.
    """
    pattern = re.compile(rf"blocks\.{layer}\.attention\.tile\[(\d+):(\d+),(\d+):(\d+)\]\.scores")
    found = [match for match in map(pattern.fullmatch, trace.names()) if match]
    if not found:
        raise MissingValueError(
            f"the trace has no tiles of layer {layer}: attention ran by {trace.implementation}, or names left them "
            f"out. Do: model.set_attention({TILES_CFG}), then trace again."
        )
    tiles = []
    for match in found:
        q0, q1, k0, k1 = map(int, match.groups())
        prefix = match.group(0).removesuffix("scores")
        scores, top, total = (
            of_head(rows_of(trace, prefix + what, sequence), head) for what in ("scores", "running_max", "running_sum")
        )
        tiles.append(Tile(slice(q0, q1), slice(k0, k1), array(scores), array(top[:, 0]), array(total[:, 0])))
    return tiles


def of_head(tensor: Tensor, head: int) -> Tensor:
    """(kv_heads, group, rows, n) -> (rows, n): heads that share keys stand side by side.

    Raises:
        ValueError: there is no such head.
    """
    heads = tensor.flatten(0, 1)
    if not 0 <= head < len(heads):
        raise ValueError(f"there are {len(heads)} heads, got head={head}: count from 0.")
    return heads[head]


def log_sum_exp_of_rows(trace, layer: int, head: int, sequence: int) -> np.ndarray:
    """(T,) ln of the sum of exp(score) over each whole row, from the masked scores of the trace, or queries and keys.

    In float64, and without looking at a tile's numbers, so that it can be held against them. Which keys are hidden is
    read from the tiles, where only those know.
    """
    name = f"blocks.{layer}.attention."
    if f"{name}masked_scores" in trace.names():
        masked = rows_of(trace, f"{name}masked_scores", sequence)[head]
        scores = masked.double().masked_fill(masked <= torch.finfo(masked.dtype).min, -math.inf)
        return array(scores.logsumexp(dim=-1))
    queries, keys = rows_of(trace, f"{name}queries", sequence), rows_of(trace, f"{name}keys", sequence)
    q, k = queries[head].double(), keys[head * len(keys) // len(queries)].double()
    allowed = torch.zeros(len(q), len(k), dtype=torch.bool)
    for tile in tiles_of(trace, layer, head, sequence):
        allowed[tile.rows, tile.columns] = torch.from_numpy(tile.scores != -np.inf)
    scores = (q @ k.T * q.shape[-1] ** -0.5).masked_fill(~allowed, -math.inf)
    return array(scores.logsumexp(dim=-1))


def draw_frame(axes: Axes, done: list[Tile], tiles: list[Tile], words: list[str], largest: float):
    """The table after the last tile of `done`: scores, what is hidden or skipped, and m and l beside the rows."""
    length, now = len(words), done[-1]
    table = np.full((length, length), np.nan)
    for tile in done:
        table[tile.rows, tile.columns] = np.where(np.isfinite(tile.scores), tile.scores, np.nan)
        outline(axes, tile.rows, tile.columns, zorder=0, **HIDDEN)  # seen where the table above it has no number
    image = axes.imshow(
        np.ma.masked_invalid(table), cmap="RdBu_r", vmin=-largest, vmax=largest, interpolation="none", zorder=1
    )
    for rows, columns in skipped(tiles, length):
        if rows.start <= now.rows.start:
            outline(axes, rows, columns, **SKIPPED)
            middle = ((columns.start + columns.stop - 1) / 2, (rows.start + rows.stop - 1) / 2)
            write(axes, *middle, "skip", ha="center", color="#57534e")
    for tile in tiles:
        outline(axes, tile.rows, tile.columns, fill=False, edgecolor=GREY, linewidth=0.6)
    outline(axes, slice(0, length), slice(0, length), fill=False, edgecolor=GREY, linewidth=0.8)
    outline(axes, now.rows, now.columns, fill=False, edgecolor="black", linewidth=2.2, zorder=3)

    axes.set_xlim(-0.5, length - 0.5 + BESIDE * length)  # the numbers stand in the plane of the table, each at its row
    axes.set_ylim(length - 0.5, -0.5)
    place_words(axes, words, below=True, left=True, fontsize=7)
    axes.spines[:].set_visible(False)
    at_max, at_sum = length - 0.5 + np.array((0.22, 0.46)) * length
    heading(axes, at_max, "max m")
    heading(axes, at_sum, "sum l")
    known = {tile.rows.start: tile for tile in done}  # a later tile of the same rows replaces the earlier one
    before = [tile for tile in done[:-1] if tile.rows == now.rows]
    raised = now.running_max > (before[-1].running_max if before else np.inf)
    for tile in known.values():
        current = tile is now
        for i, (top, total) in enumerate(zip(tile.running_max, tile.running_sum, strict=True)):
            style = {"color": "black" if current else GREY}
            new = {"weight": "bold", "color": ORANGE} if current and raised[i] else {}
            write(axes, at_max, tile.rows.start + i, f"{top:.2f}", **style | new)
            write(axes, at_sum, tile.rows.start + i, f"{total:.2f}", **style)
    return image


def draw_comparison(axes: Axes, tiles: list[Tile], exact: np.ndarray, words: list[str]) -> None:
    """m + ln l after the last tile of each row, beside the log-sum-exp of the row: as numbers, and how far apart."""
    final = {}
    for tile in tiles:
        with np.errstate(divide="ignore"):
            ends = tile.running_max + np.log(tile.running_sum)
        final.update(zip(range(tile.rows.start, tile.rows.stop), ends, strict=True))
    axes.set_xlim(0, 1)
    axes.set_ylim(len(words) - 0.5, -0.5)
    place_words(axes, words, below=False, left=True, fontsize=7)
    axes.spines[:].set_visible(False)
    places = (0.3, 0.68, 0.93)
    for place, text in zip(places, ("m + ln l", "of the whole row", "apart"), strict=True):
        heading(axes, place, text)
    for row, value in enumerate(exact):
        ours = final[row]
        apart = 0.0 if ours == value else abs(ours - value)
        for place, text in zip(places, (f"{ours:.6f}", f"{value:.6f}", f"{apart:.0e}" if apart else "0"), strict=True):
            write(axes, place, row, text, color="black")
    axes.set_title("the end: log-sum-exp of each row", fontsize=10, loc="left", pad=17)


def heading(axes: Axes, x: float, text: str) -> None:
    axes.annotate(
        text, (x, 1), xycoords=("data", "axes fraction"), xytext=(0, 4), textcoords="offset points", ha="right",
        fontsize=8, in_layout=False,
    )  # fmt: skip


def write(axes: Axes, x: float, y: float, text: str, **style) -> None:
    """A number in the plane of a table. It lies inside, so the layout may leave it out: measuring hundreds is slow."""
    axes.text(x, y, text, **{"ha": "right", "va": "center", "fontsize": 7, "in_layout": False} | style)


def skipped(tiles: list[Tile], length: int) -> list[tuple[slice, slice]]:
    """The tiles that were never computed, since the mask hides all of them."""
    width = max(tile.columns.stop - tile.columns.start for tile in tiles)
    parts = []
    for start, stop in dict.fromkeys((tile.rows.start, tile.rows.stop) for tile in tiles):
        rows = slice(start, stop)
        mine = [tile.columns for tile in tiles if tile.rows == rows]
        first, end = min(columns.start for columns in mine), max(columns.stop for columns in mine)
        parts += [(rows, slice(at, min(at + width, first))) for at in range(0, first, width)]
        parts += [(rows, slice(at, min(at + width, length))) for at in range(end, length, width)]
    return parts


def outline(axes: Axes, rows: slice, columns: slice, **style) -> None:
    place = (columns.start - 0.5, rows.start - 0.5)
    size = (columns.stop - columns.start, rows.stop - rows.start)
    axes.add_patch(Rectangle(place, *size, clip_on=False, in_layout=False, **style))


def span(part: slice) -> str:
    return f"{part.start}-{part.stop - 1}" if part.stop - part.start > 1 else str(part.start)


def count(tiles: int) -> str:
    return f"{tiles} tile" if tiles == 1 else f"{tiles} tiles"
