"""Two implementations in one whole model: do the logits and every gradient agree?

`parity.py` holds a single attention call to its bound; this asks what a user of the toggle asks.
"""

import time
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from orchestrator.evaluation.machine import wait_for
from orchestrator.training.loop import next_token_loss

# Of the logits, absolute; of each gradient, as a part of that gradient's largest value: a mean over hundreds of tokens
# makes gradients so small that an absolute limit would let anything pass.
LOGITS_LIMIT, GRADIENTS_LIMIT = 2e-5, 2e-5


@dataclass(frozen=True)
class Outcome:
    """One forward and backward pass of a model.

    Attributes:
        logits: (B, T, vocab_size). loss: nats per token. gradients: by parameter name. seconds: of both passes.
    """

    logits: Tensor
    loss: float
    gradients: dict[str, Tensor]
    seconds: float


def forward_backward(model, ids: Int[Tensor, "batch tokens"], targets: Int[Tensor, "batch tokens"]) -> Outcome:
    """Logits, loss and a copy of every gradient; the model's own gradients are cleared."""
    model.zero_grad(set_to_none=True)
    wait_for(ids.device)
    start = time.perf_counter()
    logits = model(ids)
    loss = next_token_loss(logits, targets)
    loss.backward()
    wait_for(ids.device)
    seconds = time.perf_counter() - start
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad(set_to_none=True)
    return Outcome(logits.detach(), loss.item(), gradients, seconds)


def largest_differences(one: Outcome, other: Outcome) -> dict[str, float]:
    """The largest difference of the logits, and of any gradient as a part of that gradient's largest value."""
    parts = [
        ((one.gradients[name] - gradient).abs().max() / gradient.abs().max()).item()
        for name, gradient in other.gradients.items()
    ]
    return {
        "logits": (one.logits - other.logits).abs().max().item(),
        "gradients": torch.tensor(parts).max().item(),
    }  # NaN wins, as it should
