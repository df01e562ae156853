"""What a trace holds: each value with its name, its axes named after the cfg, and a line that says what it is.

`GPT2Model/tracing.py` fills it; notebooks, figures and the HTML page read it.
"""

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import torch
from torch import Tensor

STREAM = ("batch", "tokens", "emb_dim")
HEADS = ("batch", "n_heads", "tokens", "head_dim")
KV_HEADS = ("batch", "n_kv_heads", "tokens", "head_dim")
TABLE = ("batch", "n_heads", "query_tokens", "key_tokens")
HIDDEN = ("batch", "tokens", "ff_dim")
TILE_ROWS = ("batch", "n_kv_heads", "group", "queries")

# Name within its block or model -> (axes, what it is). "batch" may be 1 where a value is shared by all sequences.
MEANING = {
    "token_embedding": (STREAM, "each token's row of the embedding table"),
    "position_embedding": (STREAM, "each position's row of the position table; one for all sequences"),
    "embeddings": (STREAM, "their sum: where the stream begins"),
    "norm_1": (STREAM, "the stream normalised, as attention reads it"),
    "attention.qkv": (("batch", "tokens", "qkv"), "queries, keys and values side by side: one matrix product"),
    "attention.queries": (HEADS, "what each token looks for"),
    "attention.keys": (KV_HEADS, "what each token offers to be found by"),
    "attention.values": (KV_HEADS, "what each token gives when it is found"),
    "attention.scores": (TABLE, "query . key / sqrt(head_dim): how well they fit"),
    "attention.masked_scores": (TABLE, "the scores, with the lowest number where a key may not be seen"),
    "attention.weights": (TABLE, "softmax of the scores: each row sums to 1; hidden keys have exactly 0"),
    "attention.context": (HEADS, "each head's average of the values, by its weights"),
    "attention.log_sum_exp": (TILE_ROWS, "log of the sum of exp(score) over each row: what backward needs"),
    "attention.merged": (STREAM, "the heads' contexts side by side"),
    "attention.output": (STREAM, "what attention adds to the stream"),
    "attention.dropped": (STREAM, "the same after dropout"),
    "after_attention": (STREAM, "the stream after attention was added"),
    "norm_2": (STREAM, "the stream normalised, as the feed-forward layer reads it"),
    "feed_forward.gate": (HIDDEN, "SwiGLU's gate"),
    "feed_forward.hidden": (HIDDEN, "widened, before GELU"),
    "feed_forward.activated": (HIDDEN, "after GELU: what is not negative goes on, bent a little"),
    "feed_forward.output": (STREAM, "what the feed-forward layer adds to the stream"),
    "feed_forward.dropped": (STREAM, "the same after dropout"),
    "output": (STREAM, "the stream as it leaves the block"),
    "final_norm": (STREAM, "the stream normalised, as the head reads it"),
    "logits": (("batch", "tokens", "vocab_size"), "at each position, a score for every token that may follow"),
    "tile.scores": ((*TILE_ROWS, "keys"), "one tile of the scores, -inf where a key may not be seen"),
    "tile.running_max": ((*TILE_ROWS, "one"), "the largest score of each row so far"),
    "tile.running_sum": ((*TILE_ROWS, "one"), "the sum of exp(score - running_max) so far"),
    "tile.accumulated": ((*TILE_ROWS, "head_dim"), "the sum of exp(score - running_max) * value so far"),
}
WEIGHTS = ("scores", "masked_scores", "weights")  # what only eager forms

# Where the cfg has another part than GPT-2's: (key, its value) -> name -> what it is then. The axes stay.
MEANING_OF_VARIANTS = {
    ("norm", "rmsnorm"): {
        "norm_1": "the stream divided by its root mean square, weighted, as attention reads it",
        "norm_2": "the stream divided by its root mean square, weighted, as the feed-forward layer reads it",
        "final_norm": "the stream divided by its root mean square, weighted, as the head reads it",
    },
    ("mlp", "gelu_exact"): {
        "feed_forward.activated": "after GELU through erf: what is not negative goes on, bent a little",
    },
    ("mlp", "swiglu"): {
        "feed_forward.gate": "how far each unit is opened, before SiLU",
        "feed_forward.hidden": "widened: what each unit has to say, before its gate",
        "feed_forward.activated": "SiLU(gate) * hidden: what the gates let through",
    },
    ("positions", "rope"): {
        "embeddings": "the token embeddings: where the stream begins; positions are not added",
        "attention.qkv": "queries, keys and values side by side, before two of them are turned: one matrix product",
        "attention.queries": "what each token looks for, turned by its position",
        "attention.keys": "what each token offers to be found by, turned by its position",
        "attention.scores": "turned query . turned key / sqrt(head_dim): how well they fit, at their distance",
    },
}


def meaning_of(name: str, tensor: Tensor, cfg: Mapping) -> tuple[tuple[str, ...], str]:
    """(axes, what it is) of a value by its full name; by its shape alone, where the name is not one of GPT-2's.

    Args:
        cfg: the model's: with RMSNorm, SwiGLU or rotary positions some names mean something else.
    """
    inside = re.sub(r"^blocks\.\d+\.", "", name)
    inside = re.sub(r"^attention\.tile\[.*\]", "tile", inside)
    axes, about = MEANING.get(inside, ((), "what this module gives"))
    for (key, value), meanings in MEANING_OF_VARIANTS.items():
        if cfg.get(key) == value:
            about = meanings.get(inside, about)
    if len(axes) != tensor.ndim:
        axes = ("batch", "tokens", "width")[: tensor.ndim] if tensor.ndim <= 3 else ("axis",) * tensor.ndim
    return axes, about


@dataclass(frozen=True)
class Value:
    """One tensor of a forward pass.

    Attributes:
        name: "blocks.3.attention.queries". axes: a name for each axis, those of the cfg where it has one.
        about: what it is, in a line. patched: somebody's value, not the model's own.
        recomputed: made from queries and keys beside the pass, since the implementation that ran never forms it.
    """

    name: str
    tensor: Tensor
    axes: tuple[str, ...]
    about: str
    recomputed: bool = False
    patched: bool = False

    def statistics(self) -> dict[str, float]:
        """mean, std, min, max and rms, how many zeros and NaN; hidden scores are counted, and left out of the rest."""
        numbers = self.tensor.detach().double().flatten()
        lowest = torch.finfo(self.tensor.dtype).min if self.tensor.is_floating_point() else None
        hidden = (numbers == lowest) | (numbers == -torch.inf)
        seen = numbers[~hidden]
        counts = {"zeros": int((seen == 0).sum()), "nans": int(seen.isnan().sum()), "hidden": int(hidden.sum())}
        if not len(seen):
            return dict.fromkeys(("mean", "std", "min", "max", "rms"), float("nan")) | counts
        figures = {"mean": seen.mean(), "std": seen.std(correction=0), "min": seen.min(), "max": seen.max()}
        figures["rms"] = seen.square().mean().sqrt()
        return {name: figure.item() for name, figure in figures.items()} | counts

    def __repr__(self) -> str:
        shape = ", ".join(f"{axis} {size}" for axis, size in zip(self.axes, self.tensor.shape, strict=True))
        return f"{self.name} ({shape}): {self.about}{' (recomputed)' * self.recomputed}{' (patched)' * self.patched}"


class MissingValueError(KeyError):
    """A name that a trace does not have, with the reason; a KeyError would print it in quotes."""

    def __str__(self) -> str:
        return self.args[0]


@dataclass
class Trace:
    """Every recorded tensor of one forward pass, in the order in which they were computed. `print(trace)` lists them.

    Attributes:
        values: name -> Value. ids: (B, T), what went in. tokens: their text, row by row.
        logits: (B, T, vocab_size), bit for bit what the model gives without a trace.
        cfg: the model's. implementations: attention layer -> what computed it. asked: the names that were asked for.
        training: whether dropout was on.
    """

    ids: Tensor
    tokens: list[list[str]]
    cfg: Mapping
    asked: Sequence[str] = ("*",)
    training: bool = False
    implementations: dict[str, str] = field(default_factory=dict)
    values: dict[str, Value] = field(default_factory=dict)
    logits: Tensor | None = None

    @property
    def implementation(self) -> str:
        """What computed attention; several names where layers differ."""
        return ", ".join(dict.fromkeys(self.implementations.values()))

    def __getitem__(self, name: str) -> Tensor:
        if not isinstance(name, str):
            raise TypeError(f'values are asked for by name, trace["logits"], got {name!r}; trace.names() lists them.')
        if name not in self.values:
            raise MissingValueError(self.why_missing(name))
        return self.values[name].tensor

    def __contains__(self, name: str) -> bool:
        return name in self.values

    def names(self, pattern: str = "*") -> list[str]:
        """The recorded names in order, or those that fit a pattern such as "blocks.*.attention.weights"."""
        return [name for name in self.values if fits(name, pattern)]

    def nbytes(self) -> int:
        """Memory that the recorded tensors keep alive, in bytes; what several names share is counted once."""
        storages = [value.tensor.untyped_storage() for value in self.values.values()]
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())

    def why_missing(self, name: str) -> str:
        """What to tell somebody who asks for a value that is not there."""
        if not any(fits(name, pattern) for pattern in self.asked):
            return f"{name} was not recorded: names={list(self.asked)} leaves it out."
        fused = self.without_weights(name)
        if fused:
            return (
                f"{name} does not exist: attention ran by {fused}, which never forms the table of weights. trace(..., "
                "recompute=True) makes it from the queries and keys; or trace under eager: "
                'with model.using_attention("eager"): ...'
            )
        if name == "position_embedding" and self.cfg.get("positions") == "rope":
            return "position_embedding does not exist: with rotary positions queries and keys are turned instead."
        if name.endswith("feed_forward.gate") and self.cfg.get("mlp") != "swiglu":
            return f"{name} does not exist: only SwiGLU has a gate, and this model has mlp={self.cfg.get('mlp')!r}."
        layers = f"; the blocks are 0 to {len(self.implementations) - 1}" if name.startswith("blocks.") else ""
        near = difflib.get_close_matches(name, self.values, n=3, cutoff=0.5)
        rest = f"near: {', '.join(near)}." if near else "trace.names() lists all."
        return f"no value is called {name!r}{layers}; {rest}"

    def without_weights(self, name: str) -> str:
        """What ran in the layer of this value, if the value is one of the weights and what ran forms none."""
        layer, _, what = name.rpartition(".")
        ran = {one for path, one in self.implementations.items() if fits(path, layer) and one != "eager"}
        its_own = name in self.values and not self.values[name].recomputed
        return ", ".join(sorted(ran)) if what in WEIGHTS and not its_own else ""

    def table(self, pattern: str = "*") -> str:
        """The values that fit a pattern, a line each: name, axes, statistics, what it is."""
        chosen = [self.values[name] for name in self.names(pattern)]
        if not chosen:
            raise MissingValueError(self.why_missing(pattern))
        rows = [("name", "axes and sizes", "mean", "std", "min", "max", "what it is")]
        for value in chosen:
            shape = ", ".join(f"{axis} {size}" for axis, size in zip(value.axes, value.tensor.shape, strict=True))
            numbers = value.statistics()
            figures = [f"{numbers[key]:.3g}" for key in ("mean", "std", "min", "max")]
            note = " (recomputed)" * value.recomputed + " (patched)" * value.patched
            rows.append((value.name, shape, *figures, value.about + note))
        widths = [max(len(row[column]) for row in rows) for column in range(6)]
        lines = []
        for row in rows:
            left = [f"{cell:{width}}" for cell, width in zip(row[:2], widths[:2], strict=True)]
            right = [f"{cell:>{width}}" for cell, width in zip(row[2:6], widths[2:], strict=True)]
            lines.append("  ".join([*left, *right, row[6]]))
        return "\n".join(lines)

    def __str__(self) -> str:
        batch, tokens = self.ids.shape
        dropout = "; DROPOUT IS ON: model.eval() turns it off" if self.training and self.cfg["drop_rate"] > 0 else ""
        head = f"{len(self.values)} tensors of one forward pass over ids ({batch}, {tokens}), attention by "
        return f"{head}{self.implementation}, {self.nbytes() / 2**20:.1f} MiB{dropout}\n{self.table()}"

    __repr__ = __str__


def fits(name: str, pattern: str) -> bool:
    """Whether a name fits a pattern with * and ?; the brackets of tiles are taken as they stand."""
    return name == pattern or fnmatchcase(name, pattern.replace("[", "[[]"))
