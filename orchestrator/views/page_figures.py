"""Figures of the paged cache: which block is whose, and how much memory lies idle beside one region per request.

`pool_figure` draws the books of a `BlockManager`: the pool on the left, each sequence's block table on the right, in
the same colours. `memory_figure` counts slots over time, against the way before: as many slots for each request as it
may ever need, in one piece (Kwon et al., 2023, section 3.1 and figure 2).
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.patheffects import withStroke

from orchestrator.serving.block_manager import BlockManager, BlockTable
from orchestrator.views.figures import BLUE, GREEN, GREY, ORANGE

# Of the sequences: Okabe and Ito's palette, which colour-blind readers tell apart too, and a violet (grey is taken).
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442", "#6a3d9a")
EMPTY, CACHED = "#ffffff", "#d9dde3"
ROW = 1.6  # from one row of blocks to the next; a block is 1 high
HALO = {"path_effects": [withStroke(linewidth=2.5, foreground="white")]}  # letters stay legible on hatching


def pool_figure(
    manager: BlockManager,
    tables: Mapping[str, BlockTable],
    *,
    title: str,
    words: Mapping[int, str] | None = None,
    columns: int = 4,
) -> Figure:
    """The pool, block by block, and the block tables that point into it.

    Args:
        manager: whose pool.
        tables: name -> open table, eight at most; the order gives the colours.
        title: above all.
        words: token id -> text for the slots; None: the ids.
        columns: blocks beside each other.
    Raises:
        ValueError: more than eight tables, or more than 64 blocks: nobody could read it.
    """
    if len(tables) > len(COLOURS) or manager.num_blocks > 64:
        raise ValueError(
            f"{len(tables)} tables and {manager.num_blocks} blocks are too many for one figure: 8 and 64 at most."
        )
    rows = -(-manager.num_blocks // columns)
    longest = max([len(table.blocks) for table in tables.values()], default=1)
    high = max(rows * ROW, len(tables) * ROW)  # of both sides, so that blocks are equally high in them
    figure = Figure(figsize=(12.5, 0.5 * high + 1.5), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(7, 4))
    colour = dict(zip(tables, COLOURS, strict=False))
    draw_pool(left, manager, tables, colour, words, columns)
    draw_tables(right, manager, tables, colour, longest)
    for axes in (left, right):
        axes.set_ylim(high - 0.3, -0.75)
        axes.axis("off")
    figure.suptitle(title)
    kinds = [
        Patch(facecolor="white", edgecolor=GREY, hatch="////", label="shared (its count in the corner)"),
        Patch(facecolor=CACHED, edgecolor=GREY, label="free, but can still be found"),
        Patch(facecolor=EMPTY, edgecolor=GREY, label="free and empty"),
    ]
    figure.legend(handles=kinds, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return figure


def draw_pool(axes: Axes, manager: BlockManager, tables, colour: dict, words, columns: int) -> None:
    """Every block as a row of slots; a slot is filled once its keys and values are written."""
    size, cached = manager.block_size, set(manager.cached_blocks)
    wide = size + 0.9
    for block in range(manager.num_blocks):
        row, column = divmod(block, columns)
        x, y = column * wide, row * ROW
        holders = [name for name, table in tables.items() if block in table.blocks]
        axes.text(x, y - 0.1, f"block {block}", fontsize=8, color=GREY)
        if not holders:
            draw_box(axes, x, y, size, 1.0, CACHED if block in cached else EMPTY)
            continue
        tokens = max((tokens_in(tables[name], block, size) for name in holders), key=len)
        for i, name in enumerate(holders):  # a band for each holder
            axes.add_patch(
                Rectangle((x, y + i / len(holders)), len(tokens), 1 / len(holders), facecolor=colour[name], alpha=0.45)
            )
        count = manager.reference_count(block)
        draw_box(axes, x, y, size, 1.0, "none", hatch=count > 1, filled=len(tokens))
        for slot, token in enumerate(tokens):
            text = str(token) if words is None else words.get(token, str(token))
            axes.text(x + slot + 0.5, y + 0.5, text, ha="center", va="center", fontsize=8, clip_on=True, **HALO)
        if count > 1:
            axes.text(x + size, y - 0.1, f"held {count} times", fontsize=8, ha="right", weight="bold")
    axes.set_xlim(-0.2, columns * wide - 0.6)
    axes.set_title(
        f"the pool: {manager.used_blocks} of {manager.num_blocks} blocks held, {size} slots in each", fontsize=10
    )


def draw_tables(axes: Axes, manager: BlockManager, tables, colour: dict, longest: int) -> None:
    """One row for each sequence: its blocks in the order of its text, each filled as far as it is."""
    size = manager.block_size
    for row, (name, table) in enumerate(tables.items()):
        y = row * ROW
        axes.text(0, y - 0.12, f"{name}: {len(table.tokens)} tokens", fontsize=9)
        for i, block in enumerate(table.blocks):
            share = min(1.0, max(0.0, (len(table.tokens) - i * size) / size))
            axes.add_patch(Rectangle((i, y), share, 1, facecolor=colour[name], alpha=0.45))
            draw_box(axes, i, y, 1, 1.0, "none", hatch=manager.reference_count(block) > 1, filled=share)
            axes.text(i + 0.5, y + 0.5, str(block), ha="center", va="center", fontsize=9, **HALO)
    axes.set_xlim(-0.05, max(longest, 4) + 0.1)
    axes.set_title("block tables: the blocks in the order of each text", fontsize=10)


def draw_box(axes: Axes, x: float, y: float, wide: int, high: float, face: str, *, hatch=False, filled: float = 0):
    if hatch:
        hatched = Rectangle((x, y), filled, high, facecolor="none", edgecolor="white", hatch="////", linewidth=0)
        axes.add_patch(hatched)
    axes.add_patch(Rectangle((x, y), wide, high, facecolor=face, edgecolor=GREY, linewidth=1.2))
    for slot in range(1, wide):
        axes.plot((x + slot, x + slot), (y, y + high), color=GREY, linewidth=0.4)


def tokens_in(table: BlockTable, block: int, size: int) -> list[int]:
    """The tokens of a table that stand in one of its blocks."""
    start = table.blocks.index(block) * size
    return table.tokens[start : start + size]


class MemoryUse(NamedTuple):
    """Slots at one moment. A slot holds one token's keys and values, of all layers.

    Attributes:
        held: slots of all blocks that some table holds. written: those of them with a token in; shared ones count once.
        contiguous: what one region of full length for each sequence would take. tokens: written in those regions,
            where each sequence has its own copy.
    """

    held: int
    written: int
    contiguous: int
    tokens: int


def memory_use(manager: BlockManager, tables: Sequence[BlockTable], max_length: int) -> MemoryUse:
    """Count the slots now.

    Args:
        manager: whose pool.
        tables: all that are open.
        max_length: tokens that a sequence may grow to: what a region in one piece must have.
    """
    size = manager.block_size
    filled: dict[int, int] = {}
    for table in tables:
        for i, block in enumerate(table.blocks):
            filled[block] = max(filled.get(block, 0), min(size, max(0, len(table.tokens) - i * size)))
    tokens = sum(len(table.tokens) for table in tables)
    return MemoryUse(manager.used_blocks * size, sum(filled.values()), len(tables) * max_length, tokens)


def memory_figure(history: Sequence[MemoryUse], *, title: str, pool_slots: int | None = None) -> Figure:
    """Slots set aside and slots written, step by step: in pages, and in one region for each sequence.

    Args:
        history: `memory_use` after each step of an engine.
        pool_slots: slots of the whole pool, drawn as a line; None: no line.
    """
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    steps = range(1, len(history) + 1)
    sides = figure.subplots(1, 2, sharey=True)
    kinds = (("in pages", "held", "written", BLUE), ("in one piece for each text", "contiguous", "tokens", ORANGE))
    for axes, (name, aside, used, colour) in zip(sides, kinds, strict=True):
        set_aside = [getattr(use, aside) for use in history]
        written = [getattr(use, used) for use in history]
        axes.fill_between(steps, written, color=colour, alpha=0.55, step="mid", label="written", linewidth=0)
        axes.fill_between(
            steps, written, set_aside, facecolor="white", edgecolor=colour, hatch="////", step="mid", linewidth=0,
            label="set aside, empty",
        )  # fmt: skip
        axes.step(steps, set_aside, where="mid", color=colour, linewidth=1.5)
        share = sum(written) / max(1, sum(set_aside))
        axes.set_title(f"{name}: {share:.0%} of what is set aside is written", fontsize=10)
        axes.set(xlabel="step of the engine", xlim=(1, max(2, len(history))))
        if pool_slots is not None:
            axes.axhline(pool_slots, color=GREEN, linestyle="--", linewidth=1.2, label="the whole pool")
        axes.grid(alpha=0.25)
        axes.legend(frameon=False, fontsize=9, loc="best")
    sides[0].set_ylabel("slots (tokens)")
    sides[0].set_ylim(bottom=0)
    figure.suptitle(title)
    return figure
