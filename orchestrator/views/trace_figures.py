"""Figures of what a trace holds: attention weights, how they come about, and how large the stream grows.

A trace is what `GPT2Model.tracing.trace(model, text)` returns. Layers, heads and sequences are counted from 0, as in
its names. A key that the mask hides is hatched: its weight is 0 because nobody asked it, not because it did not fit.
"""

import math
import textwrap
from collections.abc import Sequence
from numbers import Integral

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator, NullLocator
from torch import Tensor

from orchestrator.views.figures import attention_map

HIDDEN = {"facecolor": "#eae7e2", "edgecolor": "#b5aea4", "hatch": "////", "linewidth": 0}
NUMBERS_UP_TO = 10  # tokens: more, and numbers in the cells are too small to read
WIDEST = 12  # characters of a token on an axis


def attention_sheet(trace, layer: int | None = None, sequence: int = 0) -> Figure:
    """All heads of all layers, or of one, as small tables with one colour scale.

    Why: heads are compared by their shape (a diagonal, a stripe, a first column), and that is seen at a glance.

    Args:
        trace: with `blocks.*.attention.weights` of every layer that is wanted.
        layer: this one alone, in larger tables.
        sequence: which one of the batch.
    Raises:
        KeyError: no weights in the trace (a fused implementation makes none: `recompute=True`).
        ValueError: there is no such layer or sequence.
    """
    if layer is not None:
        check_layer(trace, layer)
    wanted = "*" if layer is None else str(layer)
    layers = [int(name.split(".")[1]) for name in trace.names(f"blocks.{wanted}.attention.weights")]
    if not layers:
        trace[f"blocks.{layer or 0}.attention.weights"]  # says why it is not there
    tables = {i: rows_of(trace, f"blocks.{i}.attention.weights", sequence) for i in layers}  # each (H, T, T)
    words = token_labels(trace, sequence)
    heads = len(tables[layers[0]])
    panels = [(i, head) for i in layers for head in range(heads)]
    columns = heads if layer is None else math.ceil(math.sqrt(heads))
    lines = math.ceil(len(panels) / columns)

    side = min(2.6, max(0.55, 13.2 / columns))  # inches of a table
    legible = side / len(words) >= 0.14
    note = made_afterwards(trace, f"blocks.{layers[0]}.attention.weights")
    widest = 0.065 * max(map(len, words)) if legible else 0.1
    left, right, apart, between = 0.5 + widest, 1.1, 0.08, 0.08 if layer is None else 0.3
    above = 0.75 + 0.2 * bool(note)
    caption = [] if legible else textwrap.wrap(numbered(words), int(13 * (left + columns * side)))
    below = 0.35 + widest + 0.16 * len(caption)
    width = left + columns * side + (columns - 1) * apart + right
    height = above + lines * side + (lines - 1) * between + below
    figure = Figure(figsize=(width, height))
    grid = figure.subplots(
        lines, columns, squeeze=False,
        gridspec_kw={
            "left": left / width, "right": 1 - right / width, "wspace": apart / side, "hspace": between / side,
            "top": 1 - above / height, "bottom": below / height,
        },
    )  # fmt: skip
    image = None
    for number, axes in enumerate(grid.flat):
        if number >= len(panels):
            axes.set_axis_off()
            continue
        i, head = panels[number]
        image = axes.imshow(array(tables[i][head]), cmap="Blues", vmin=0, vmax=1, aspect="auto", interpolation="none")
        hide(axes, image, hidden_keys(trace, i, head, sequence))
        place_words(axes, words if legible else None, below=number + columns >= len(panels), left=number % columns == 0)
        if layer is not None:
            axes.set_title(f"layer {i}, head {head}", fontsize=9, pad=3)
        elif number < columns:
            axes.set_title(f"head {head}", fontsize=9, pad=4)
        if layer is None and head == 0:
            axes.set_ylabel(f"layer {i}", fontsize=9)
    scale = figure.add_axes((1 - 0.85 / width, 0.5 - 0.8 / height, 0.15 / width, 1.6 / height))
    figure.colorbar(image, cax=scale, label="attention weight")
    which = "every head" if layer is None else f"layer {layer}"
    title = f"Attention weights, {which}: row = query, column = key, hatched = hidden{note}"
    figure.suptitle(title, y=1 - 0.12 / height, va="top", fontsize=11)
    if caption:
        figure.text(0.5, 0.08 / height, "\n".join(caption), ha="center", va="bottom", fontsize=8)
    return figure


def attention_head(trace, layer: int, head: int, sequence: int = 0) -> Figure:
    """One head: how much each token (row) takes from each token (column), with the numbers where there is room.

    Args:
        trace: with `blocks.LAYER.attention.weights`.
        layer, head, sequence: which one.
    Raises:
        KeyError: no weights in the trace. ValueError: there is no such layer, head or sequence.
    """
    check_layer(trace, layer)
    name = f"blocks.{layer}.attention.weights"
    weights = one_head(trace, name, head, sequence)
    words = token_labels(trace, sequence)
    figure = attention_map(weights, words, title=f"Layer {layer}, head {head}{made_afterwards(trace, name)}")
    axes = figure.axes[0]
    hidden = hidden_keys(trace, layer, head, sequence)
    hide(axes, axes.images[0], hidden)
    if len(words) <= NUMBERS_UP_TO:
        axes.tick_params(labelsize=9)
        write_numbers(axes, axes.images[0])
    axes.title.set_fontsize(10)
    if hidden.any():
        axes.set_xlabel("looked at (key); hatched: hidden by the mask")
    figure.set_layout_engine("tight")
    return figure


def score_steps(trace, layer: int, head: int, sequence: int = 0) -> Figure:
    """Scores, masked scores, weights of one head side by side: what the mask and the softmax each do.

    Args:
        trace: with `scores`, `masked_scores` and `weights` of the layer.
        layer, head, sequence: which one.
    Raises:
        KeyError: they are not in the trace. ValueError: there is no such layer, head or sequence.
    Source: "Attention Is All You Need" (Vaswani et al., 2017), equation 1.
    """
    check_layer(trace, layer)
    names = [f"blocks.{layer}.attention.{what}" for what in ("scores", "masked_scores", "weights")]
    scores, masked, weights = (one_head(trace, name, head, sequence) for name in names)
    hidden = hidden_keys(trace, layer, head, sequence)
    words = token_labels(trace, sequence)
    largest = max(float(scores.float().abs().max()), 1e-6)
    by_score = {"cmap": "RdBu_r", "vmin": -largest, "vmax": largest}
    steps = (
        (scores, by_score, "1. scores\nqueries · keys / sqrt(head_dim)", "score"),
        (masked, by_score, "2. masked scores\nhidden keys: the lowest number there is", "score"),
        (weights, {"cmap": "Blues", "vmin": 0, "vmax": 1}, "3. weights\nsoftmax: each row sums to 1", "weight"),
    )
    if trace.cfg.get("positions") == "rope":
        steps = ((*steps[0][:2], "1. scores\nturned queries · turned keys / sqrt(head_dim)", "score"), *steps[1:])
    side = max(3.4, 0.17 * len(words))
    figure = Figure(figsize=(3 * (side + 1.0) + 0.4, side + 1.7), layout="constrained")
    note = made_afterwards(trace, names[-1])
    figure.suptitle(f"From scores to weights: layer {layer}, head {head}{note}", fontsize=12)
    for number, (axes, (table, colours, title, unit)) in enumerate(zip(figure.subplots(1, 3), steps, strict=True)):
        image = axes.imshow(array(table), interpolation="none", **colours)
        if number > 0:
            hide(axes, image, hidden)
        if len(words) <= NUMBERS_UP_TO:
            write_numbers(axes, image)
        place_words(axes, words, below=True, left=True, fontsize=8 if len(words) <= 16 else 7)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("looked at (key)")
        axes.set_ylabel("looking (query)" if number == 0 else "")
        figure.colorbar(image, ax=axes, label=unit, shrink=0.7)
    if hidden.any():
        patch = Patch(**HIDDEN, label="hidden by the mask: no weight at all")
        figure.legend(handles=[patch], loc="outside lower center", frameon=False, fontsize=9)
    figure.get_layout_engine().set(wspace=0.06)
    return figure


def residual_norms(trace, sequence: int = 0) -> Figure:
    """How large the stream is after each part of the model, token by token, and how much each part added to it.

    Why: every block adds to one stream, so it grows; what a later block adds must be large to count. A token whose
    stream is many times larger than the others' (GPT-2's first) is seen here.

    Args:
        trace: with `embeddings`, `blocks.*.after_attention` and `blocks.*.output`.
        sequence: which one of the batch.
    Raises:
        KeyError: one of them is not in the trace. ValueError: there is no such sequence.
    """
    stages, names = ["embeddings"], ["embeddings"]
    for i in range(trace.cfg["n_layers"]):
        stages += [f"{i} attention", f"{i} feed-forward"]
        names += [f"blocks.{i}.after_attention", f"blocks.{i}.output"]
    stream = torch.stack([rows_of(trace, name, sequence).double() for name in names])  # (stages, T, C)
    added = torch.cat([stream[:1], stream.diff(dim=0)])  # the difference: right under dropout and patches too
    words = token_labels(trace, sequence)
    tables = [array(part.square().mean(dim=-1).sqrt()) for part in (stream, added)]
    coloured = np.concatenate([table[(table > 0) & np.isfinite(table)] for table in tables])
    low, high = (coloured.min(), coloured.max()) if coloured.size else (0.1, 1.0)  # a stream of zeros has no scale
    norm = LogNorm(low, max(high, 1.01 * low))

    wide = max(3.6, (0.42 if len(words) <= NUMBERS_UP_TO else 0.2) * len(words))
    figure = Figure(figsize=(2 * wide + 2.4, 2.0 + 0.26 * len(stages)), layout="constrained")
    titles = ("the stream after each part", "what each part added to it")
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, table, title in zip((left, right), tables, titles, strict=True):
        image = axes.imshow(
            np.ma.masked_equal(table, 0), cmap="viridis", norm=norm, aspect="auto", interpolation="none"
        )
        axes.set_facecolor("white")  # exactly 0 has no logarithm, and neither have NaN and infinity: no colour
        if len(words) <= NUMBERS_UP_TO:
            write_numbers(axes, image, digits=3)
            for (row, column), value in np.ndenumerate(table):
                if value == 0 or not np.isfinite(value):  # "0", "nan" or "inf" where there is no colour
                    axes.text(column, row, f"{value:g}", ha="center", va="center", fontsize=7.5)
        place_words(axes, words, below=True, left=False)
        axes.set(title=title, xlabel="token")
    left.set_yticks(range(len(stages)), stages, fontsize=8)
    left.tick_params(left=True, labelleft=True)
    left.set_ylabel("part of the model, in order")
    marks = np.geomspace(norm.vmin, norm.vmax, 6)  # powers of ten alone may leave the scale without a number
    scale = figure.colorbar(image, ax=[left, right], aspect=30, ticks=marks, format="%.2g")
    scale.ax.minorticks_off()
    scale.set_label("root mean square over emb_dim")
    figure.suptitle(f"The residual stream: emb_dim = {stream.shape[-1]} numbers for each token", fontsize=12)
    return figure


# ---------------------------------------------------------------- what the figures of a trace share


def rows_of(trace, name: str, sequence: int) -> Tensor:
    """One sequence of a value of the trace.

    Raises:
        KeyError: the trace's own, which says why the value is not there. ValueError: there is no such sequence.
    """
    value = trace[name]
    if not 0 <= sequence < len(trace.tokens):
        raise ValueError(f"the trace has {len(trace.tokens)} sequences, got sequence={sequence}: count from 0.")
    return value[sequence if len(value) > 1 else 0].detach().cpu()


def check_layer(trace, layer: int) -> None:
    """Raises ValueError for a layer that the model does not have."""
    layers = trace.cfg["n_layers"]
    if not isinstance(layer, Integral) or not 0 <= layer < layers:
        raise ValueError(f"the model has {layers} layers, 0 to {layers - 1}, got layer={layer!r}: count from 0.")


def one_head(trace, name: str, head: int, sequence: int) -> Tensor:
    """(T, T): one head of a value (B, H, T, T).

    Raises:
        KeyError: not in the trace. ValueError: there is no such head or sequence.
    """
    tables = rows_of(trace, name, sequence)
    if not 0 <= head < len(tables):
        raise ValueError(f"{name} has {len(tables)} heads, got head={head}: count from 0.")
    return tables[head]


def hidden_keys(trace, layer: int, head: int, sequence: int) -> np.ndarray:
    """(T, T) bool: what the mask hides. From the masked scores; where they are not traced, the future of weight 0."""
    name = f"blocks.{layer}.attention.masked_scores"
    if name in trace.names():
        masked = one_head(trace, name, head, sequence)
        return (masked <= torch.finfo(masked.dtype).min).numpy()
    weights = one_head(trace, f"blocks.{layer}.attention.weights", head, sequence)
    return (torch.ones_like(weights).triu(1) * (weights == 0)).bool().numpy()


def made_afterwards(trace, name: str) -> str:
    """For a title: that the value was computed for the trace alone, where it was."""
    return f"\n(weights recomputed: {trace.implementation} forms none)" if (
        trace.values[name].recomputed
    ) else ""  # fmt: skip


def array(table: Tensor) -> np.ndarray:
    return table.detach().double().cpu().numpy()


def token_label(text: str, widest: int = WIDEST) -> str:
    """A token as it can stand on an axis: spaces and line ends visible, not too long, and no formula.

    Args:
        text: the token. widest: characters; a longer one ends in "…".
    """
    shown = text.replace(" ", "␣").replace("\n", "↵")
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in shown)
    shown = shown if len(shown) <= widest else shown[: widest - 1] + "…"
    return shown.replace("$", r"\$")  # two dollar signs would begin and end a formula


def token_labels(trace, sequence: int) -> list[str]:
    return [token_label(text) for text in trace.tokens[sequence]]


def numbered(words: Sequence[str]) -> str:
    return "   ".join(f"{position}\N{NO-BREAK SPACE}{word}" for position, word in enumerate(words))


def hide(axes: Axes, image: AxesImage, hidden: np.ndarray) -> None:
    """Let the hatched background of the axes show where a key is hidden."""
    image.set_data(np.ma.masked_array(image.get_array(), hidden))
    image.set_cmap(image.get_cmap().with_extremes(bad=(0, 0, 0, 0)))
    axes.patch.set(**HIDDEN)


def write_numbers(axes: Axes, image: AxesImage, digits: int = 2) -> None:
    """The number of each cell that is not hidden, in black or white: whichever is read better on its colour."""
    table = image.get_array()
    for (row, column), value in np.ndenumerate(table.filled(np.nan) if np.ma.isMaskedArray(table) else table):
        if not np.isnan(value):
            text = f"{value:.{digits}f}" if digits == 2 else f"{value:.{digits}g}"
            colour = readable_on(image.get_cmap()(image.norm(value)))
            axes.text(column, row, text, ha="center", va="center", fontsize=7.5, color=colour)


def readable_on(colour: Sequence[float]) -> str:
    """Black or white text, by the luminance of what lies below (WCAG 2)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour[:3]]
    return "black" if sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True)) > 0.179 else "white"


def place_words(axes: Axes, words: Sequence[str] | None, *, below: bool, left: bool, fontsize: float = 7.5) -> None:
    """Tokens as ticks on the sides that are wanted; None: their positions, a few of them."""
    for axis, wanted, rotation in ((axes.xaxis, below, 90), (axes.yaxis, left, 0)):
        if not wanted:
            axis.set_major_locator(NullLocator())
        elif words is None:
            axis.set_major_locator(MaxNLocator(4, integer=True))
        else:
            axis.set_ticks(range(len(words)), words, rotation=rotation)
        axis.set_tick_params(labelsize=fontsize, length=2)
