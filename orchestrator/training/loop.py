"""The training loop: a batch, the loss, the gradient, a step; now and then a look at text it has not seen.

Small and honest: AdamW with decay groups, warmup and cosine, clipping, a validation split, a progress bar.
"""

import math
import sys
import time
from dataclasses import asdict, dataclass, field

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from tqdm.auto import tqdm

from orchestrator.text.corpora import IGNORED
from orchestrator.training.optimizer import make_optimizer
from orchestrator.training.schedule import learning_rate


@dataclass(frozen=True)
class TrainSettings:
    """How long and how fast to learn.

    Attributes:
        max_steps: optimizer steps.
        batch_size: sequences in a step.
        learning_rate: the peak.
        warmup_steps, min_lr_ratio: see `schedule.learning_rate`.
        weight_decay: on 2-D weights.
        betas: AdamW's two memories; 0.95, shorter than torch's 0.999, is what GPT training uses.
        clip: gradients longer than this are scaled down to it.
        eval_steps: steps between two looks at the validation split.
        seed: of dropout. (The corpus has its own: which batch comes when.)
    Raises:
        ValueError: every number that makes no sense, at once.
    """

    max_steps: int
    batch_size: int
    learning_rate: float
    warmup_steps: int
    min_lr_ratio: float = 0.05
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0
    eval_steps: int = 50
    seed: int = 0

    def __post_init__(self):
        low = {
            "max_steps": 1,
            "batch_size": 1,
            "learning_rate": 0,
            "warmup_steps": 0,
            "weight_decay": 0,
            "eval_steps": 1,
        }
        values = asdict(self)
        problems = [
            f"{name} must be {least} or more, got {values[name]}" for name, least in low.items() if values[name] < least
        ]
        if not 0 <= self.min_lr_ratio <= 1:
            problems.append(f"min_lr_ratio must be from 0 to 1, got {self.min_lr_ratio}")
        if self.clip <= 0:
            problems.append(f"clip must be above 0, got {self.clip}")
        if problems:
            raise ValueError("the training settings are wrong: " + "; ".join(problems) + ".")


@dataclass
class History:
    """What happened, for the report and the curve.

    Attributes:
        train: (step, loss in nats per token) of every step's own batch, before that step's update.
        validation: (step, loss in nats per token) after that many updates.
        seconds: of the whole run. tokens: predicted in training.
    """

    train: list[tuple[int, float]] = field(default_factory=list)
    validation: list[tuple[int, float]] = field(default_factory=list)
    seconds: float = 0.0
    tokens: int = 0


def next_token_loss(
    logits: Float[Tensor, "batch tokens vocab_size"], targets: Int[Tensor, "batch tokens"], reduction: str = "mean"
) -> Float[Tensor, ""]:
    """Cross-entropy in nats between each position's logits and the token that follows it.

    Targets of `IGNORED` (padding) do not count, neither in the sum nor in the mean.
    """
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction=reduction)


@torch.no_grad()
def evaluate(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> float:
    """The mean loss per predicted token, in nats, over all tokens of all batches; in eval mode, and back."""
    device, was_training = next(model.parameters()).device, model.training
    model.eval()
    total, tokens = 0.0, 0
    try:
        for inputs, targets in batches:
            inputs, targets = inputs.to(device), targets.to(device)
            total += next_token_loss(model(inputs), targets, reduction="sum").item()
            tokens += int((targets != IGNORED).sum())
    finally:
        model.train(was_training)
    return total / tokens


def train(model: nn.Module, corpus, settings: TrainSettings, *, progress: bool = True) -> History:
    """Teach `model` the corpus, in place.

    Args:
        model: a GPTModel; left in eval mode.
        corpus: `batch(index, batch_size)` and `validation`: see `orchestrator/text/corpora.py`.
        settings: how long and how fast.
        progress: show a bar.
    Returns:
        the losses on the way; validation is looked at before the first step and after the last.
    Raises:
        ValueError: a corpus too small for one batch.
        FloatingPointError: the loss is no longer a number.
    """
    device = next(model.parameters()).device
    torch.manual_seed(settings.seed)
    optimizer = make_optimizer(model, settings.learning_rate, settings.weight_decay, settings.betas)
    history, start = History(), time.perf_counter()
    live = sys.stderr.isatty() or "ipykernel" in sys.modules  # into a file: a line now and then, not ten a second
    pace = {"mininterval": 0.1 if live else 10.0, "dynamic_ncols": live}
    bar = tqdm(range(settings.max_steps), desc="training", unit="step", disable=not progress, **pace)
    model.train()
    for step in bar:
        if step % settings.eval_steps == 0:
            history.validation.append((step, evaluate(model, corpus.validation)))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(
                step,
                peak=settings.learning_rate,
                warmup_steps=settings.warmup_steps,
                max_steps=settings.max_steps,
                min_ratio=settings.min_lr_ratio,
            )
        inputs, targets = corpus.batch(step, settings.batch_size)
        loss = next_token_loss(model(inputs.to(device)), targets.to(device))
        if not math.isfinite(loss.item()):
            raise FloatingPointError(
                f"the loss is {loss.item()} at step {step}: lower the learning rate (now {settings.learning_rate})."
            )
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        history.train.append((step, loss.item()))
        history.tokens += int((targets != IGNORED).sum())
        bar.set_postfix(loss=f"{loss.item():.3f}", validation=f"{history.validation[-1][1]:.3f}", refresh=False)
    history.validation.append((settings.max_steps, evaluate(model, corpus.validation)))
    history.seconds = time.perf_counter() - start
    model.eval()
    return history
