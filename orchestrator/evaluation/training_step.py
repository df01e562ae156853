"""A training step as far as its memory goes: what it is made of, and what each block keeps for its backward pass.

Letters: B sequences of T tokens, BT their product; C emb_dim, F ff_dim, K width of all keys, H heads; s bytes of a
number that matrix products read: 4 in fp32, 2 under autocast to bf16 or fp16. The stream x has 4 bytes always. When all
of it is alive together with what else there is, `training_memory.py` adds up.

The variants, as torch 2.13 computes them: RMSNorm is one kernel on CUDA, which keeps less than LayerNorm's; on a CPU it
is several operations, which keep more: the vector before it is multiplied with the weights. SwiGLU keeps four vectors
of width F. Rotary positions keep turned queries and keys *beside* the others, where the kernel is fused: the values are
a part of the same matrix product and keep it alive. What is turned lies in memory head by head, the result does as its
queries do, and so merging the heads is a copy.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from GPT2Model.config import complete
from orchestrator.evaluation.estimates import block_matrices, widths

DTYPES = {"fp32": 4, "bf16": 2, "fp16": 2}
OPTIMIZERS = ("adamw", "muon", "none")


@dataclass(frozen=True)
class TrainingStep:
    """What a training step is, as far as its memory goes.

    Attributes:
        cfg: the model's cfg dict; its attention keys are not looked at.
        batch, tokens: of one forward pass.
        dtype: "fp32", or "bf16" or "fp16" under autocast.
        attention: "eager", "sdpa", "flash_tiled", or another name: a fused kernel, which keeps queries, keys, values,
            result and one number for each row.
        device: "cpu" or "cuda". Dropout keeps a number to multiply with on a CPU and a bool on CUDA, and on a CPU it
            makes torch's sdpa take the plain formula, in fp32, with its tables.
        activation_checkpointing: each block keeps its input, and computes the rest again in the backward pass.
        loss_chunk_tokens: tokens whose logits stand in memory at a time; 0: all.
        gradient_accumulation_steps: forward passes in one step; from the second on, gradients are there already.
        optimizer: "adamw", "muon", or "none": one that remembers nothing.
    Raises:
        ValueError: everything that makes no sense, at once.
    """

    cfg: Mapping
    batch: int
    tokens: int
    dtype: str = "fp32"
    attention: str = "sdpa"
    device: str = "cpu"
    activation_checkpointing: bool = False
    loss_chunk_tokens: int = 0
    gradient_accumulation_steps: int = 1
    optimizer: str = "adamw"

    def __post_init__(self):
        object.__setattr__(self, "cfg", complete(self.cfg))
        low = {"batch": 1, "tokens": 1, "loss_chunk_tokens": 0, "gradient_accumulation_steps": 1}
        known = {"dtype": DTYPES, "device": ("cpu", "cuda"), "optimizer": OPTIMIZERS}
        problems = [
            f"{name} must be {least} or more, got {getattr(self, name)}"
            for name, least in low.items()
            if getattr(self, name) < least
        ]
        problems += [
            f"{name} must be one of {', '.join(names)}, got {getattr(self, name)!r}"
            for name, names in known.items()
            if getattr(self, name) not in names
        ]
        if self.tokens > self.cfg["context_length"]:
            problems.append(f"{self.tokens} tokens are more than context_length={self.cfg['context_length']}")
        if problems:
            raise ValueError("this training step cannot be estimated: " + "; ".join(problems) + ".")

    @property
    def size(self) -> int:
        """s: bytes of a number that matrix products read."""
        return DTYPES[self.dtype]

    @property
    def rows(self) -> int:
        """BT: tokens of all sequences together."""
        return self.batch * self.tokens

    @property
    def plain_sdpa(self) -> bool:
        """Whether torch's sdpa takes the plain formula: on a CPU, because of dropout."""
        return self.attention == "sdpa" and self.device == "cpu" and self.has_dropout

    @property
    def has_dropout(self) -> bool:
        return self.cfg["drop_rate"] > 0

    @property
    def rms_norm_in_parts(self) -> bool:
        """Whether RMSNorm is computed in several operations, each of which keeps what it read: on a CPU."""
        return self.cfg["norm"] == "rmsnorm" and self.device == "cpu"

    @property
    def angles(self) -> int:
        """Bytes of the cosines and sines of rotary positions, T x D / 2 of each: one table for all blocks."""
        return 4 * self.tokens * self.cfg["emb_dim"] // self.cfg["n_heads"] * (self.cfg["positions"] == "rope")

    @property
    def has_tables(self) -> bool:
        """Whether the weights of attention stand in memory as (B, H, T, T)."""
        return self.attention == "eager" or self.plain_sdpa

    @property
    def softmax_size(self) -> int:
        """Bytes of a number in a table of softmax: 4 in sdpa's plain formula, and under autocast on CUDA; else s."""
        return 4 if self.plain_sdpa or self.device == "cuda" else self.size

    @property
    def mask_size(self) -> int:
        """Bytes that dropout keeps for a number in a table: on a CPU 0 or 1 / (1 - p), on CUDA a bool."""
        return 1 if self.device == "cuda" else self.softmax_size

    @property
    def pairs(self) -> int:
        """Numbers in a table: B x H x T x T."""
        return self.batch * self.cfg["n_heads"] * self.tokens**2

    @property
    def chunk(self) -> int:
        """Tokens whose logits stand in memory at a time."""
        return min(self.loss_chunk_tokens or self.rows, self.rows)


class Term(NamedTuple):
    """Bytes, and the formula that they follow: letters beside each other are multiplied."""

    bytes: int
    formula: str


def block_activations(step: TrainingStep) -> dict[str, Term]:
    """What one block keeps for its backward pass, by what it is: bytes, and the formula that they follow."""
    cfg, s, BT = step.cfg, step.size, step.rows
    C, F, K = widths(cfg)
    rope, swiglu = cfg["positions"] == "rope", cfg["mlp"] == "swiglu"
    norm = {"the norm's, before its weight": Term(4 * BT * C, "4 B T C")} if step.rms_norm_in_parts else {}
    # Of short numbers autocast makes a copy for each matrix that reads them.
    copies = 2 if swiglu and s < 4 else 1
    attention = {
        "its input x": Term(4 * BT * C, "4 B T C"),
        **norm,
        "the norm's result": Term(s * BT * C, "s B T C"),
        "queries, keys, values": Term(s * BT * (C + 2 * K), "s B T (C + 2 K)"),
        **({"turned queries and keys": Term(s * BT * (C + K), "s B T (C + K)")} if rope else {}),
        "its result": Term(s * BT * C, "s B T C"),
        **({"its result, heads merged": Term(s * BT * C, "s B T C")} if rope else {}),
    }
    feed_forward = {
        "its input x": Term(4 * BT * C, "4 B T C"),
        **norm,
        "the norm's result": Term(copies * s * BT * C, "2 s B T C" if copies == 2 else "s B T C"),
        **({"gate, SiLU, up, product": Term(4 * s * BT * F, "4 s B T F")} if swiglu else
           {"before and after GELU": Term(2 * s * BT * F, "2 s B T F")}),
    }  # fmt: skip
    kept = {f"attention: {what}": term for what, term in attention.items()}
    kept |= {f"feed-forward: {what}": term for what, term in feed_forward.items()}
    if cfg["norm"] == "rmsnorm":
        kept["root mean square of both norms"] = Term(8 * BT, "8 B T")
    else:
        kept["mean and deviation of both norms"] = Term(16 * BT, "16 B T")
    if step.has_tables:
        # Contiguous copies with every head by itself; sdpa's plain formula makes them in fp32.
        copied = 4 if step.plain_sdpa else s
        kept["attention: queries, keys, values"] = Term(3 * copied * BT * C, f"{3 * copied} B T C")
        for already_there in ("attention: turned queries and keys", "attention: its result, heads merged"):
            kept.pop(already_there, None)
        # Softmax keeps its result, the product with the values what it reads: eager hides or drops in between.
        each = step.softmax_size + copied + step.has_dropout * step.mask_size
        kept["attention: tables"] = Term(each * step.pairs, f"{each} B H T T")
        if step.attention == "eager":
            kept["attention: who may not see whom"] = Term(step.tokens**2, "T T")  # bools, in every block
    else:
        kept["attention: log-sum-exp of each row"] = Term(4 * BT * cfg["n_heads"], "4 B T H")
    if step.has_dropout:
        mask = 1 if step.device == "cuda" else s
        kept["dropout on what is added to x"] = Term(2 * mask * BT * C, f"{2 * mask} B T C")
    if s < 4:  # autocast makes them in each pass
        formula = f"s (C (C + 2 K) + C C + {3 if swiglu else 2} C F)"
        kept["the block's weights in the short dtype"] = Term(s * block_matrices(cfg), formula)
    return kept


def kept_by(terms: Mapping[str, Term]) -> int:
    """Bytes of all terms."""
    return sum(term.bytes for term in terms.values())
