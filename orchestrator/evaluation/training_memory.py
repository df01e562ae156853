"""The peak of a training step's live tensor bytes by formula: what is alive, at which moment, and why.

Memory rises through the forward pass, as each layer keeps what its backward pass will need, and falls through the
backward pass, while gradients take its place. So the peak is the worst of a few moments, and `moments` adds each of
them up: the loss, the head, the last and the first block, the embeddings, the optimizer. The tests hold the formula
against torch's allocator.

Letters: B sequences of T tokens, BT their product; C emb_dim, F ff_dim, K width of all keys, H heads, V vocab_size, L
n_layers; s bytes of a number that matrix products read: 4 in fp32, 2 under autocast to bf16 or fp16. Weights, their
gradients, the optimizer's numbers and the stream x have 4 bytes always.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from CMHA.implementations.flash_tiled import BLOCK_SIZE
from orchestrator.evaluation.estimates import block_matrices, count_parameters, feed_forward_matrices, widths
from orchestrator.evaluation.training_step import TrainingStep, block_activations, kept_by

PARTS = {
    "weights": "4 x parameters",
    "gradients": "4 x parameters whose gradient is there already",
    "optimizer": "8 x parameters; Muon 4 x blocks' matrices + 8 x the rest",
    "activations": "what backward still needs of embeddings, blocks, last norm",
    "logits": "tokens at a time x V x 12: log-probabilities, two gradients",
    "temporary": "gradients on their way, and copies for a moment",
}


@dataclass(frozen=True)
class Moment:
    """Bytes alive at one moment of a training step, by part (the keys of PARTS)."""

    name: str
    parts: dict[str, int]

    @property
    def bytes(self) -> int:
        return sum(self.parts.values())


def training_peak(step: TrainingStep) -> Moment:
    """The worst moment of a training step, once the optimizer has its numbers: from the second step on."""
    return max(moments(step), key=lambda moment: moment.bytes)


def moments(step: TrainingStep) -> list[Moment]:
    """Every moment that can be the worst, with what is alive then."""
    last, first = step.cfg["n_layers"] - 1, 0
    return [
        *loss_moments(step),
        *block_moments(step, last, "the last block"),
        *block_moments(step, first, "the first block"),
        embeddings_moment(step),
        optimizer_moment(step),
    ]


def loss_moments(step: TrainingStep) -> list[Moment]:
    """The logits and what becomes of them, while every block's activations wait."""
    s, V, (C, _, _) = step.size, step.cfg["vocab_size"], widths(step.cfg)
    copy = s * V * C if s < 4 else 0  # of the head's weights, by autocast
    all_copies = copy + step.cfg["n_layers"] * s * block_matrices(step.cfg) * (s < 4) * step.activation_checkpointing
    in_chunks = step.chunk < step.rows
    gradient = 4 * V * C * in_chunks  # of the head, from the chunks before
    # Tables (V, C) of the head's gradient: the chunks' are added up, in fp32 not in place: old, new and sum. Under
    # autocast the gradient comes in s bytes, and is then copied into 4.
    head = (4 + s if s < 4 else 12 if in_chunks else 4) * V * C
    waiting = _below(step, step.cfg["n_layers"])
    return [
        # Cross-entropy computes in fp32: of short logits it makes a copy first.
        _moment(step, "the loss, forward", activations=waiting + all_copies,
                logits=step.chunk * V * (8 if s == 4 else s + 8)),
        _moment(step, "the loss, backward", activations=waiting + copy,
                logits=step.chunk * V * 12, temporary=gradient),
        _moment(step, "the head, backward", activations=waiting,
                logits=step.rows * V * s * (not in_chunks), temporary=head + s * step.rows * C),
    ]  # fmt: skip


def block_moments(step: TrainingStep, block: int, name: str) -> list[Moment]:
    """One block's forward pass, where eager's tables stand, and its backward pass."""
    s, BT, (C, F, K) = step.size, step.rows, widths(step.cfg)
    kept = block_activations(step)
    whole = kept_by(kept)
    attention = kept_by({what: term for what, term in kept.items() if not what.startswith("feed-forward")})
    copied = 0 if s == 4 else s
    later = 4 * step.cfg["vocab_size"] * C + (step.cfg["n_layers"] - 1 - block) * 4 * block_parameters(step.cfg)
    below = _below(step, block)
    short_gradient = copied * F * C  # of a matrix, before autocast's copy into 4 bytes
    # GELU's gradient takes the place of what it read; a gate's product hands on two, while its own is still there.
    inner = (2 if step.cfg["mlp"] == "swiglu" else 1) * s * BT * F
    found = [
        _moment(step, f"{name}, feed-forward, backward", gradients=later + 4 * F * C, activations=below + whole,
                temporary=(4 + copied) * BT * C + inner + short_gradient),
        _moment(step, f"{name}, attention, backward", gradients=later + 4 * (feed_forward_matrices(step.cfg) + C * C),
                activations=below + attention, temporary=4 * BT * C + _attention_backward(step)),
    ]  # fmt: skip
    if step.attention == "eager":
        # Scores, softmax, weights, and with dropout what it multiplies with and the product: no line frees the one
        # before it. Queries, keys and values stand there twice, the table of the mask too.
        tables = 5 if step.has_dropout else 3
        again = step.activation_checkpointing
        normed = s * BT * C + 4 * BT * C * step.rms_norm_in_parts
        found.append(
            _moment(step, f"{name}, attention, forward{' again' * again}", gradients=later * again,
                    activations=below + 4 * BT * C + normed + s * BT * (C + 2 * K) + 3 * s * BT * C,
                    temporary=tables * step.pairs * step.softmax_size + 2 * step.tokens**2 + 4 * BT * C * again)
        )  # fmt: skip
    return found


def embeddings_moment(step: TrainingStep) -> Moment:
    """The end of the backward pass: every gradient, and the token embedding's once more.

    A tied head's gradient has waited for it, and the two are added: not in place where the head's is a transposed
    product, as it is in fp32 and in one piece.
    """
    table, BT, (C, _, _) = 4 * step.cfg["vocab_size"] * widths(step.cfg)[0], step.rows, widths(step.cfg)
    tied = step.cfg["tie_weights"]
    out_of_place = tied and step.size == 4 and step.chunk == step.rows
    waiting = table if tied and step.gradient_accumulation_steps > 1 else 0
    more = max(table + 4 * BT * C, 2 * table if out_of_place else 0) + waiting
    return _moment(step, "the embeddings, backward", gradients=4 * count_parameters(step.cfg), temporary=more)


def optimizer_moment(step: TrainingStep) -> Moment:
    """The step itself: AdamW, fused, needs no memory; Muon makes one matrix after the other orthogonal, in bf16."""
    C, F, K = widths(step.cfg)
    # The update (4 bytes), the matrix and its successor (2 and 2), and three products of it with itself (C, C).
    muon = 8 * C * max(F, C + 2 * K) + 3 * 2 * C * C
    temporary = muon if step.optimizer == "muon" else 0
    return _moment(step, "the optimizer's step", gradients=4 * count_parameters(step.cfg), temporary=temporary)


def optimizer_bytes(step: TrainingStep) -> int:
    """What the optimizer remembers from step to step: AdamW two numbers for each weight, Muon one."""
    parameters, matrices = count_parameters(step.cfg), step.cfg["n_layers"] * block_matrices(step.cfg)
    return {"adamw": 8 * parameters, "muon": 8 * parameters - 4 * matrices, "none": 0}[step.optimizer]


def block_parameters(cfg: Mapping) -> int:
    """Numbers that one block trains."""
    return count_parameters({**cfg, "n_layers": 2}) - count_parameters({**cfg, "n_layers": 1})


def _moment(step: TrainingStep, name: str, *, gradients: int = 0, **parts: int) -> Moment:
    always = {"weights": 4 * count_parameters(step.cfg), "optimizer": optimizer_bytes(step)}
    if step.gradient_accumulation_steps > 1:  # all are there from the pass before; a new one stands beside its old one
        C, F, _ = widths(step.cfg)
        if "block" in name and gradients:
            waiting = 4 * step.cfg["vocab_size"] * C * step.cfg["tie_weights"]
            parts["temporary"] = parts.get("temporary", 0) + waiting + 4 * F * C
        gradients = always["weights"]
    return Moment(name, {part: (always | parts | {"gradients": gradients}).get(part, 0) for part in PARTS})


def _below(step: TrainingStep, block: int) -> int:
    """What the embeddings and the blocks before this one keep; before the head: all blocks and the last norm."""
    s, BT, (C, _, _) = step.size, step.rows, widths(step.cfg)
    kept = 4 * BT * C if step.activation_checkpointing else kept_by(block_activations(step))
    masks = BT * C * (1 if step.device == "cuda" else 4) * step.has_dropout  # of the embeddings' dropout
    norm = 4 * BT * C * step.rms_norm_in_parts + (4 if step.cfg["norm"] == "rmsnorm" else 8) * BT
    top = (4 + s) * BT * C + norm if block == step.cfg["n_layers"] else 0
    return masks + step.angles + block * kept + top


def _attention_backward(step: TrainingStep) -> int:
    """The gradients inside attention at their worst moment."""
    s, BT, (C, _, K) = step.size, step.rows, widths(step.cfg)
    if step.has_tables:  # the gradient of a table, of the result, of the values
        return step.pairs * step.softmax_size + 2 * (4 if step.plain_sdpa else s) * BT * C
    if step.attention != "flash_tiled":
        return s * BT * (C + 2 * K) + s * BT * C
    # flash_tiled: gradients in fp32, and a few tiles of scores, weights and their gradients; those of the tile before
    # live until they are replaced. Its dropout hashes positions in int64: three tiles of 8 bytes.
    tile = min(step.tokens, BLOCK_SIZE)
    only_one = tile == step.tokens
    tiles = (9 if only_one else 12) if step.has_dropout else (5 if only_one else 6)
    rows = 4 * 4 * step.batch * tile * C if s < 4 else 0  # a tile of queries, keys, values and gradient in fp32
    return 4 * BT * (C + 2 * K) + s * BT * C + tiles * 4 * step.batch * step.cfg["n_heads"] * tile**2 + rows
