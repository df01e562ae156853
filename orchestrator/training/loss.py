"""The loss: how surprised the model is by the token that really follows, in nats; whole, or in chunks."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from orchestrator.text.corpora import IGNORED


def next_token_loss(
    logits: Float[Tensor, "batch tokens vocab_size"], targets: Int[Tensor, "batch tokens"], reduction: str = "mean"
) -> Float[Tensor, ""]:
    """Cross-entropy in nats between each position's logits and the token that follows it.

    Targets of `IGNORED` (padding) do not count, neither in the sum nor in the mean.
    """
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction=reduction)


def chunked_next_token_loss(
    hidden: Float[Tensor, "batch tokens emb_dim"],
    head: nn.Module,
    targets: Int[Tensor, "batch tokens"],
    chunk_tokens: int,
    reduction: str = "mean",
) -> Float[Tensor, ""]:
    """The same number, with the logits of `chunk_tokens` tokens in memory at a time.

    Why: the logits (B, T, 50257) and their gradient are most of a training step's memory. Here a chunk's logits are
    forgotten after the forward pass, and computed again when the backward pass comes to them: one more product with
    the head, which costs time on a CPU.

    Args:
        hidden: what the head reads. head: hidden -> logits. chunk_tokens: 1 or more.
    """

    def loss_of(rows: Tensor, following: Tensor) -> Tensor:
        # Under autocast one bf16 copy of the head would serve all chunks, and their gradients add up in bf16.
        torch.clear_autocast_cache()
        return F.cross_entropy(head(rows), following, ignore_index=IGNORED, reduction="sum")

    chunks = zip(hidden.flatten(0, 1).split(chunk_tokens), targets.flatten().split(chunk_tokens), strict=True)
    total = sum(checkpoint(loss_of, rows, following, use_reentrant=False) for rows, following in chunks)
    return total if reduction == "sum" else total / (targets != IGNORED).sum()


@contextmanager
def without_head(model: nn.Module) -> Iterator[nn.Module]:
    """For the time of a `with`, `model(ids)` gives what its head would read, (B, T, emb_dim); the head comes along."""
    head, model.head = model.head, nn.Identity()
    try:
        yield head
    finally:
        model.head = head
