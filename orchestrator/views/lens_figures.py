"""Figures of what a model would say: the logit lens, the steps from logits to a drawn token, words that lie close.

All three read the model's numbers through its own vocabulary, so they need its tokenizer.
"""

from numbers import Integral, Real

import numpy as np
import torch
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from GPT2Model.generation import filtered_probabilities
from orchestrator.views.figures import BLUE, GREY, ORANGE
from orchestrator.views.trace_figures import array, readable_on, rows_of, token_label

POSITIONS = 16  # columns of the logit lens: more, and the words in the cells are too small to read
BEST = 12  # tokens in the steps of sampling
DARK_GREY = "#57534e"
CUT = {"facecolor": "#e2e0dc", "edgecolor": "#78716c", "hatch": "////", "linewidth": 0.6}


@torch.no_grad()
def logit_lens(model, trace, tokenizer, sequence: int = 0) -> Figure:
    """What the model would say next if it stopped after each block: its best guess, coloured by its probability.

    Why: every block adds to one stream, and the final norm and the head can read that stream at any depth. One sees
    at which block a guess is made.

    Args:
        model: the GPTModel that was traced; its final norm and head are applied.
        trace: with `embeddings` and `blocks.*.output`. Of a long text the last 16 positions are shown.
        tokenizer: the model's, to write ids as text.
        sequence: which one of the batch.
    Raises:
        TypeError: a tokenizer that is none.
        KeyError: one of the values is not in the trace.
        ValueError: there is no such sequence, or trace and tokenizer are not this model's.
    Source: nostalgebraist, "interpreting GPT: the logit lens" (2020).
    """
    check_vocabulary(tokenizer, model.cfg["vocab_size"])
    names = ["embeddings", *(f"blocks.{i}.output" for i in range(trace.cfg["n_layers"]))]
    stream = torch.stack([rows_of(trace, name, sequence) for name in names])  # (stages, T, C)
    weight = model.head.weight
    if stream.shape[-1] != weight.shape[1] or trace.cfg["n_layers"] != len(model.blocks):
        raise ValueError(
            f"the trace is of a model with {trace.cfg['n_layers']} layers of width {stream.shape[-1]}, this one has "
            f"{len(model.blocks)} of width {weight.shape[1]}: pass the model that was traced."
        )
    length = stream.shape[1]
    first = max(0, length - POSITIONS)
    logits = model.head(model.final_norm(stream[:, first:].to(weight)))
    best = torch.softmax(logits.float(), dim=-1).max(dim=-1)  # (stages, positions)
    follow = trace.ids[sequence, first + 1 :].tolist()  # what the text really goes on with; not known after the last
    words = [token_label(text, 10) for text in trace.tokens[sequence][first:]]

    stages, shown = best.values.shape
    figure = Figure(figsize=(1.9 + max(5.0, 0.86 * shown), 2.5 + 0.34 * stages), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(array(best.values), cmap="Blues", vmin=0, vmax=1, aspect="auto", interpolation="none")
    for row in range(stages):
        for column in range(shown):
            token = int(best.indices[row, column])
            colour = readable_on(image.get_cmap()(image.norm(float(best.values[row, column]))))
            label = token_label(tokenizer.decode([token]), 10)
            axes.text(column, row, label, ha="center", va="center", fontsize=8, color=colour)
            if column < len(follow) and token == follow[column]:
                frame = {"fill": False, "edgecolor": ORANGE, "linewidth": 2}
                axes.add_patch(Rectangle((column - 0.46, row - 0.44), 0.92, 0.88, **frame))
    axes.set_yticks(range(stages), ["embeddings", *(f"after block {i}" for i in range(stages - 1))], fontsize=9)
    axes.set_xticks(range(shown), [f"{first + i}\n{word}" for i, word in enumerate(words)], fontsize=8)
    which = "" if first == 0 else f" (the last {shown} of {length} positions)"
    axes.set(xlabel=f"position, and the token that was read there{which}", ylabel="where the stream is read")
    axes.set_title("Logit lens: the best guess for the next token at each depth", fontsize=12)
    figure.colorbar(image, ax=axes, label="probability of the guess", shrink=0.9)
    right = Patch(facecolor="none", edgecolor=ORANGE, linewidth=2, label="the token that really follows")
    figure.legend(handles=[right], loc="outside lower center", frameon=False, fontsize=9)
    return figure


def sampling_steps(
    logits: Float[Tensor, " vocab_size"],
    tokenizer,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Figure:
    """From logits to what is drawn from, step by step, for the likeliest tokens: divided, cut, cut again, rescaled.

    The probabilities are those of `GPT2Model.generation.filtered_probabilities`, which `generate` draws from.

    Args:
        logits: (vocab_size,), of one position: `model(ids)[0, -1]`.
        tokenizer: the model's.
        temperature, top_k, top_p: as in `generate`; temperature 0 takes the largest logit.
    Raises:
        TypeError: a tokenizer that is none.
        ValueError: logits of another shape, another vocabulary, or an argument that makes no sense.
    Source: top-p is "The Curious Case of Neural Text Degeneration" (Holtzman et al., 2019).
    """
    check_sampling(logits, tokenizer, temperature, top_k, top_p)
    logits = logits.detach().float().cpu()
    after_k = filtered_probabilities(logits[None], temperature, top_k=top_k)[0]
    final = filtered_probabilities(logits[None], temperature, top_k=top_k, top_p=top_p)[0]
    best = logits.argsort(descending=True, stable=True)[:BEST]
    others = len(logits) - len(best)
    words = [token_label(tokenizer.decode([int(i)])) for i in best]
    # The rank decides, not a probability of 0: at a low temperature that is also what rounding leaves.
    kept = torch.zeros_like(logits, dtype=torch.bool)
    kept[logits.topk(len(logits) if top_k is None else min(top_k, len(logits))).indices] = True
    if temperature == 0:
        kept = kept & (after_k > 0)
    cut_k, cut_p = ~kept[best].numpy(), (kept & (after_k > 0) & (final == 0))[best].numpy()

    figure = Figure(figsize=(14, 2.3 + 0.31 * (len(best) + 1)), layout="constrained")
    panels = figure.subplots(1, 4, sharey=True, width_ratios=(1, 1, 1.15, 1))
    raw = array(logits[best])
    divided = raw / temperature if temperature > 0 else raw
    span = max(np.ptp(raw), np.ptp(divided), 1e-3)  # one width for both, so that one sees the division
    draw_points(panels[0], raw, span, np.zeros_like(cut_k))
    draw_points(panels[1], divided, span, cut_k)
    for axes, probabilities, gone, running in (
        (panels[2], array(after_k), cut_p, top_p is not None),
        (panels[3], array(final), np.zeros_like(cut_p), False),
    ):
        shown = probabilities[best.numpy()]
        absent = cut_k if axes is panels[2] else cut_k | cut_p
        draw_bars(axes, shown, gone, absent, running=running)
        if others:
            rest = np.delete(probabilities, best.numpy()).sum()
            axes.barh(len(shown), rest, height=0.65, color=GREY)
            write_beside(axes, rest, len(shown), f"{rest:.4f}", "black")
        largest = max(axes.containers, key=lambda bars: bars[0].get_width())[0].get_width()
        axes.set_xlim(0, largest * (2.1 if running else 1.5))
        axes.set_xticks([tick for tick in MaxNLocator(4).tick_values(0, largest) if tick <= 1])

    k = "no top-k" if top_k is None else f"top-k {top_k}"
    titles = (
        "1. logit",
        f"2. temperature {temperature:g}, {k}" if temperature > 0 else "2. temperature 0: the largest is taken",
        f"3. softmax, {'no top-p' if top_p is None else f'top-p {top_p:g}'}",
        "4. rescaled to sum to 1: drawn from",
    )
    units = ("logit", "logit / temperature" if temperature > 0 else "logit", "probability", "probability")
    for axes, title, unit in zip(panels, titles, units, strict=True):
        axes.set_title(title, fontsize=10)
        axes.set_xlabel(unit)
        axes.grid(axis="x", alpha=0.25)
        axes.set_axisbelow(True)
    labels = [*words, f"{others:,} others"] if others else words
    panels[0].set_yticks(range(len(labels)), labels, fontsize=9)
    panels[0].set_ylim(len(labels) - 0.4, -0.6)
    panels[0].set_ylabel("next token, the likeliest first")
    if cut_p.any():
        figure.legend(handles=[Patch(**CUT, label="cut by top-p")], loc="outside lower center", frameon=False)
    figure.suptitle("From logits to the probabilities that the next token is drawn from", fontsize=12)
    return figure


@torch.no_grad()
def embedding_neighbours(model, tokenizer, word: str, count: int = 10) -> Figure:
    """The tokens whose rows of the embedding table point the same way as a word's: a bar for each, by cosine.

    Args:
        model: a GPTModel. tokenizer: its own.
        word: one token; with GPT-2's tokenizer a word inside a sentence begins with a space: " king".
        count: how many neighbours.
    Raises:
        TypeError: a tokenizer that is none.
        ValueError: the word is not one token, a count below 1, or another vocabulary.
    """
    table = model.token_embedding.weight.detach().float().cpu()
    check_vocabulary(tokenizer, len(table))
    if not isinstance(count, Integral) or not 1 <= count < len(table):
        raise ValueError(
            f"count must be from 1 to {len(table) - 1}, the other tokens of the vocabulary: got {count!r}."
        )
    token = one_token(tokenizer, word)
    cosine = torch.nn.functional.cosine_similarity(table, table[token][None], dim=-1)
    cosine[token] = -torch.inf  # a word is no neighbour of its own
    nearest = cosine.topk(count)
    labels = [token_label(tokenizer.decode([int(i)])) for i in nearest.indices]
    values = array(nearest.values)

    figure = Figure(figsize=(7, 1.5 + 0.3 * count), layout="constrained")
    axes = figure.add_subplot()
    axes.barh(range(count), values, color=[BLUE if value >= 0 else ORANGE for value in values], height=0.65)
    for row, value in enumerate(values):
        write_beside(axes, max(value, 0), row, f"{value:.3f}", "black")
    axes.axvline(0, color=GREY, linewidth=0.8)
    axes.set_xlim(min(0.0, values.min() * 1.1), max(0.05, values.max()) * 1.16)
    axes.set_ylim(count - 0.4, -0.6)
    axes.set_yticks(range(count), labels)
    axes.set(xlabel="cosine of the angle between the embeddings (1 = the same direction)", ylabel="token")
    axes.set_title(f"Nearest to '{token_label(word)}' in the token embedding, of {len(table):,} tokens", fontsize=11)
    axes.grid(axis="x", alpha=0.25)
    return figure


# ---------------------------------------------------------------- drawing


def draw_points(axes: Axes, values: np.ndarray, span: float, cut: np.ndarray) -> None:
    """A point with its number for each token. Points, not bars: only distances between logits mean something."""
    right = float(values.max())
    axes.set_xlim(right - 1.1 * span, right + 0.55 * span)
    for row, (value, gone) in enumerate(zip(values, cut, strict=True)):
        axes.plot(value, row, "x" if gone else "o", color=GREY if gone else BLUE, markersize=6)
        write_beside(axes, value, row, f"{value:.2f}{'  cut' if gone else ''}", DARK_GREY if gone else "black")


def draw_bars(axes: Axes, values: np.ndarray, cut: np.ndarray, absent: np.ndarray, *, running: bool) -> None:
    """A bar with its number for each token: hatched where it is cut in this step, no bar where it was cut before."""
    so_far = np.cumsum(values)
    for row, (value, gone, before) in enumerate(zip(values, cut, absent, strict=True)):
        axes.barh(row, value, height=0.65, **(CUT if gone else {"color": BLUE}))
        total = f"  (sum {so_far[row]:.4f})" if running else ""
        text = "cut" if before else f"{value:.4f}  cut" if gone else f"{value:.4f}{total}"
        write_beside(axes, value, row, text, DARK_GREY if gone or before else "black")


def write_beside(axes: Axes, value: float, row: int, text: str, colour: str) -> None:
    axes.annotate(
        text, (value, row), xytext=(7, 0), textcoords="offset points", va="center", fontsize=8.5, color=colour
    )


# ---------------------------------------------------------------- what a user may get wrong


def check_tokenizer(tokenizer) -> None:
    """Raises TypeError for None, for the class instead of one of it, and for what cannot write ids as text."""
    if isinstance(tokenizer, type):
        raise TypeError(f"tokenizer is the class {tokenizer.__name__}: make one, {tokenizer.__name__}().")
    if not hasattr(tokenizer, "vocab_size") or not callable(getattr(tokenizer, "decode", None)):
        got = "None" if tokenizer is None else type(tokenizer).__name__
        raise TypeError(
            f"tokenizer must be the one that the model was trained with, to write ids as text; got {got}. "
            "GPT-2's own is GPT2Model.tokenizer.get_tokenizer()."
        )


def check_vocabulary(tokenizer, vocab_size: int) -> None:
    check_tokenizer(tokenizer)
    if tokenizer.vocab_size != vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} tokens and the model {vocab_size}: pass the tokenizer that the "
            "model was trained with."
        )


def one_token(tokenizer, word: str) -> int:
    """The id of a word that is one token.

    Raises:
        ValueError: it is several, with what they are and, where that helps, the word behind a space.
    """
    ids = tokenizer.encode(word)
    if len(ids) != 1:
        pieces = ", ".join(repr(tokenizer.decode([i])) for i in ids) or "none"
        try:
            spaced = len(tokenizer.encode(f" {word}")) == 1
        except ValueError:
            spaced = False
        remedy = f"try {' ' + word!r}, with a space before it" if spaced else "choose a shorter or commoner word"
        raise ValueError(
            f"{word!r} is {len(ids)} tokens ({pieces}), and each row of the embedding belongs to one: {remedy}."
        )
    return ids[0]


def check_sampling(logits: Tensor, tokenizer, temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Raise one ValueError that lists everything wrong with a call of sampling_steps(); TypeError: no tokenizer."""
    check_tokenizer(tokenizer)
    problems = []
    if not isinstance(logits, Tensor) or logits.ndim != 1:
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        problems.append(f"logits must be a tensor (vocab_size,), of one position, got {got}: model(ids)[0, -1]?")
    elif len(logits) != tokenizer.vocab_size:
        problems.append(f"{len(logits)} logits and a tokenizer of {tokenizer.vocab_size} tokens: another model's?")
    elif not bool(torch.isfinite(logits).all()):
        problems.append("logits hold NaN or infinity: trace the pass that gave them and print(trace).")
    if not isinstance(temperature, Real) or not 0 <= temperature < float("inf"):
        problems.append(f"temperature must be 0 (greedy) or a positive number, got {temperature!r}.")
    if top_k is not None and (not isinstance(top_k, Integral) or top_k < 1):
        problems.append(f"top_k must be a whole number, 1 or more, or None, got {top_k!r}.")
    if top_p is not None and (not isinstance(top_p, Real) or not 0 < top_p <= 1):
        problems.append(f"top_p must be above 0 and at most 1, or None, got {top_p!r}.")
    if problems:
        raise ValueError("sampling_steps() cannot draw this:\n" + "\n".join(f"  - {problem}" for problem in problems))
