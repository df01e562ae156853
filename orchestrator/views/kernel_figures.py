"""Figure of our GPU kernels at work: which program owns which tiles, in which order it meets them, and which it masks.

Computed from the mask, not from the kernels (`CMHA/implementations/flash_triton_kernels.py`), so that a test can hold
the two against each other. For docs/from_tile_to_kernel.md.
"""

from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from CMHA.masks import AttentionMask
from orchestrator.views.figures import BLUE, GREY

KERNELS = {  # name -> (what a program owns a tile of, what it writes, what it meets)
    "forward": ("queries", "their context and log-sum-exp", "keys"),
    "backward_dkdv": ("keys", "dK and dV of these keys", "queries"),
    "backward_dq": ("queries", "dQ of these queries", "keys"),
}
WHOLE, EDGE, NEVER = "#bcd3ea", "#f6c79b", "#f4f4f4"  # light blue, light orange, near white: told apart in grey too


class Step(NamedTuple):
    """One step of a program's loop: the tile that it owns, the one that it meets, and whether the scores are masked."""

    owned: int
    met: int
    edge: bool


def steps_of(kernel: str, length: int, block: int) -> list[Step]:
    """What each program of a kernel does under a causal mask, program by program, in the order of its loop.

    Args:
        kernel: "forward", "backward_dkdv" or "backward_dq".
        length: queries, and as many keys.
        block: of both in a tile.
    """
    allowed = AttentionMask(length, length).dense()[0, 0]
    tiles = range(-(-length // block))
    steps = []
    for owned in tiles:
        kinds = {}
        for met in tiles:
            q, k = (met, owned) if KERNELS[kernel][0] == "keys" else (owned, met)
            tile = allowed[q * block : (q + 1) * block, k * block : (k + 1) * block]
            ragged = tile.shape[1] < block  # keys that are not there are masked like hidden ones
            kinds[met] = "never" if not tile.any() else "edge" if ragged or not tile.all() else "whole"
        in_order = [met for kind in ("whole", "edge") for met in tiles if kinds[met] == kind]
        steps += [Step(owned, met, kinds[met] == "edge") for met in in_order]
    return steps


def tiles_of_programs(length: int = 360, block: int = 64) -> Figure:
    """The table of queries and keys for each kernel: its programs as bands, their steps numbered, whole and edge tiles.

    Args:
        length: queries, and as many keys; where `block` does not divide it, the last tile reaches over the end.
        block: queries and keys in a tile.
    """
    figure = Figure(figsize=(13, 5.6), layout="constrained")
    for axes, kernel in zip(figure.subplots(1, len(KERNELS)), KERNELS, strict=True):
        draw_kernel(axes, kernel, length, block)
    handles = [
        Patch(facecolor=WHOLE, edgecolor=GREY, label="whole: every query sees every key, nothing is masked"),
        Patch(facecolor=EDGE, edgecolor=GREY, label="edge: the mask, or the end of the keys, cuts it"),
        Patch(facecolor=NEVER, edgecolor=GREY, label="never touched"),
        Patch(facecolor="none", edgecolor=BLUE, linewidth=2.5, label="the band of one program"),
        Patch(facecolor="none", edgecolor=GREY, hatch="////", label="behind the end: no such row or column"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=10)
    figure.suptitle(
        f"{length} queries, {length} keys, causal, tiles of {block}; "
        "1, 2, 3, ...: the steps of each program, all programs at once",
        fontsize=12,
    )
    return figure


def draw_kernel(axes: Axes, kernel: str, length: int, block: int) -> None:
    owned_is, writes, met_is = KERNELS[kernel]
    tiles = -(-length // block)
    turn = (lambda owned, met: (owned, met)) if owned_is == "keys" else (lambda owned, met: (met, owned))  # (x, y)
    for x in range(tiles):
        for y in range(tiles):
            axes.add_patch(Rectangle((x, y), 1, 1, facecolor=NEVER, edgecolor=GREY, linewidth=0.6))
    count, end = dict.fromkeys(range(tiles), 0), length / block
    for step in steps_of(kernel, length, block):
        count[step.owned] += 1
        x, y = turn(step.owned, step.met)
        colour = EDGE if step.edge else WHOLE
        axes.add_patch(Rectangle((x, y), 1, 1, facecolor=colour, edgecolor=GREY, linewidth=0.6))
        middle = ((x + min(x + 1, end)) / 2, (y + min(y + 1, end)) / 2)
        axes.text(*middle, str(count[step.owned]), ha="center", va="center", fontsize=12)
    if end < tiles:
        behind = {"fill": False, "hatch": "////", "edgecolor": GREY, "linewidth": 0}
        axes.add_patch(Rectangle((end, 0), tiles - end, tiles, **behind))
        axes.add_patch(Rectangle((0, end), end, tiles - end, **behind))
    for owned in range(tiles):
        x, y = turn(owned, 0)
        width, height = turn(1, tiles)
        band = {"fill": False, "edgecolor": BLUE, "linewidth": 2.5, "zorder": 3, "clip_on": False}
        axes.add_patch(Rectangle((x, y), width, height, **band))
    names = [f"{at * block}-{min((at + 1) * block, length) - 1}" for at in range(tiles)]
    middles = [at + 0.5 for at in range(tiles)]
    axes.set(xlim=(0, tiles), ylim=(tiles, 0), aspect="equal", xlabel="keys", ylabel="queries")
    axes.set_xticks(middles, names, fontsize=8)
    axes.set_yticks(middles, names, fontsize=8)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_title(
        f"{kernel}: a program owns\na tile of {owned_is}, meets the {met_is},\nwrites {writes}", fontsize=11, loc="left"
    )
