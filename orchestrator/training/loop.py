"""The training loop: batches, the loss, the gradient, a step; now and then a look at text it has not seen.

`train` is the one loop of this project: the notebooks, the main job and `train.py` all run it. Who wants more than a
trained model hands it a watcher (`watch.py`), a place for checkpoints (`checkpoint.py`), or a state to go on from.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from orchestrator.text.corpora import IGNORED
from orchestrator.text.corpus_samples import as_samples
from orchestrator.text.samples import Batch
from orchestrator.training.loss import chunked_next_token_loss, next_token_loss, without_head
from orchestrator.training.memory_savers import checkpoint_activations
from orchestrator.training.optimizer import make_optimizer
from orchestrator.training.precision import Precision, resolve_dtype
from orchestrator.training.schedule import learning_rate
from orchestrator.training.settings import TrainSettings
from orchestrator.training.state import TrainState
from orchestrator.training.watch import ProgressBar, StepRecord, Watch

OVERFLOW = "the gradient overflowed at this fp16 scale"


@dataclass
class History:
    """What happened, for the report and the curve.

    Attributes:
        train: (step, loss in nats per token) of every step's own batch, before that step's update.
        validation: (step, loss in nats per token) after that many updates.
        seconds: of the whole run. tokens: predicted in training.
        stopped: why the run ended before its last step; None: it did not.
    """

    train: list[tuple[int, float]] = field(default_factory=list)
    validation: list[tuple[int, float]] = field(default_factory=list)
    seconds: float = 0.0
    tokens: int = 0
    stopped: str | None = None


def train(
    model: nn.Module,
    samples,
    settings: TrainSettings,
    *,
    progress: bool = True,
    state: TrainState | None = None,
    watch: Watch | None = None,
    checkpoints=None,
    write: Callable[[nn.Module], str] | None = None,
    sample_steps: int = 0,
    stop: Callable[[], str | None] = lambda: None,
) -> History:
    """Teach `model` what `samples` hold, in place.

    Args:
        model: a GPTModel; left in eval mode.
        samples: see `orchestrator/text/samples.py`; or a corpus of `orchestrator/text/corpora.py`.
        settings: how long, how fast, in which numbers.
        progress: show a bar, if no watcher is given.
        state: go on from here (see `start`); None: from the beginning.
        watch: who is told of every step.
        checkpoints: `due(step)` and `save(state)`, see `checkpoint.py`; None: nothing is kept.
        write: model -> a text, shown at the end, and every `sample_steps` steps.
        stop: asked before every step; a reason ends the run there, with everything saved.
    Returns:
        the losses on the way.
    Raises:
        ValueError: a corpus too small for one batch.
        FloatingPointError: the loss is no longer a number, several steps in a row; the state is saved before.
    """
    state = state or start(model, settings)
    samples, watch = as_samples(samples), watch or (ProgressBar() if progress else Watch())
    device, counters = next(model.parameters()).device, state.counters
    precision = Precision(resolve_dtype(settings.dtype, str(device)), str(device), state.scaler)
    held_out = samples.validation(settings.eval_tokens, settings.batch_size)
    history, started = History(), time.perf_counter()

    def look() -> None:
        began = time.perf_counter()
        loss = evaluate(model, held_out, precision, settings.loss_chunk_tokens)
        state.take_note(loss)
        history.validation.append((counters.step, loss))
        watch.evaluation(counters.step, loss, count_targets(held_out), time.perf_counter() - began)

    def save() -> None:
        if checkpoints is not None:
            checkpoints.save(state)

    watch.start(counters.step, settings.max_steps)
    try:
        if counters.step == 0 and settings.eval_on_start:
            look()
        model.train()
        while counters.step < settings.max_steps:
            history.stopped = stop()
            if history.stopped is not None:
                save()
                break
            began = time.perf_counter()
            rate = set_learning_rate(state.optimizer, counters.step, settings)
            batches = next_batches(samples, counters.sample, settings, device)
            loss = accumulate_gradients(model, batches, settings, precision)
            norm, skipped = update(model, state.optimizer, loss, settings, precision)

            history.train.append((counters.step, loss))
            tokens = count_targets(batches)
            counters.step += 1
            counters.sample += settings.samples_per_step
            counters.tokens += tokens
            counters.skipped += skipped is not None
            counters.bad_in_a_row = counters.bad_in_a_row + 1 if skipped not in (None, OVERFLOW) else 0
            state.validation_loss = None
            seconds = time.perf_counter() - began
            watch.step(StepRecord(counters.step, loss, rate, norm, tokens, seconds, skipped))
            if counters.bad_in_a_row >= settings.max_bad_steps:
                save()
                raise FloatingPointError(advice(skipped, state))

            last = counters.step == settings.max_steps
            due = checkpoints is not None and checkpoints.due(counters.step)
            if last or due or counters.step % settings.eval_steps == 0:
                look()  # at each checkpoint too: which of them is the best must be known
            if last or due:
                save()  # before a sample: if that fails, nothing is lost
            if write is not None and (last or (sample_steps and counters.step % sample_steps == 0)):
                watch.sample(counters.step, write(model))
    finally:
        watch.close()
        model.eval()
    history.seconds, history.tokens = time.perf_counter() - started, counters.tokens
    return history


def start(model: nn.Module, settings: TrainSettings) -> TrainState:
    """The state before the first step; the model is made ready as the settings say, and the seed is set."""
    torch.manual_seed(settings.seed)
    if settings.activation_checkpointing:
        checkpoint_activations(model)
    if settings.compile:
        model.compile()  # in place: the names in its state dict stay
    optimizer = make_optimizer(model, settings.learning_rate, settings.weight_decay, settings.betas, settings.optimizer)
    device = str(next(model.parameters()).device)
    return TrainState(model, optimizer, Precision(resolve_dtype(settings.dtype, device), device).scaler, settings)


def set_learning_rate(optimizer, step: int, settings: TrainSettings) -> float:
    """Give every group its rate for this step, and return the first one's."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(
            step,
            peak=group["peak"],
            warmup_steps=settings.warmup_steps,
            max_steps=settings.max_steps,
            min_ratio=settings.min_lr_ratio,
            schedule=settings.schedule,
            decay_part=settings.decay_part,
        )
    return optimizer.param_groups[0]["lr"]


def next_batches(samples, first: int, settings: TrainSettings, device) -> list[Batch]:
    """The batches of one step: samples `first` .. `first + samples_per_step - 1`."""
    starts = range(first, first + settings.samples_per_step, settings.batch_size)
    return [to_device(samples.batch(at, settings.batch_size), device) for at in starts]


def accumulate_gradients(
    model: nn.Module, batches: list[Batch], settings: TrainSettings, precision: Precision
) -> float:
    """Add the gradients of all batches of a step up; returns the loss, the mean over all *tokens* of the step.

    Why by tokens: batches with padding hold unequal numbers of them, and a mean of means would weigh the tokens of a
    short text more. So each batch's mean counts by its part of the tokens.
    """
    total, loss = count_targets(batches), 0.0
    for batch in batches:
        tokens = count_targets([batch])
        if tokens == 0:  # padding alone: its mean would be 0 / 0
            continue
        part = tokens / total
        with precision.autocast():
            mean = batch_loss(model, batch, settings.loss_chunk_tokens)
        precision.scaler.scale(mean * part).backward()
        loss += mean.item() * part
    return loss


def batch_loss(model: nn.Module, batch: Batch, chunk_tokens: int = 0, reduction: str = "mean") -> Tensor:
    """The loss of one batch, whole or in chunks; packed documents do not see each other."""
    documents = {} if batch.documents is None else {"documents": batch.documents}
    if not chunk_tokens:
        return next_token_loss(model(batch.inputs, **documents), batch.targets, reduction=reduction)
    with without_head(model) as head:
        hidden = model(batch.inputs, **documents)
    return chunked_next_token_loss(hidden, head, batch.targets, chunk_tokens, reduction)


def update(
    model: nn.Module, optimizer, loss: float, settings: TrainSettings, precision: Precision
) -> tuple[float, str | None]:
    """Clip the gradient and step; returns its norm before clipping, and why there was no step, if there was none.

    A loss or a gradient that is no number would make every weight one that is none: such a step is left out. Under
    fp16 a gradient may overflow because the scale is too high; then the scaler lowers it, and that is no fault, until
    there is no scale left to lower.
    """
    precision.scaler.unscale_(optimizer)
    norm = nn.utils.clip_grad_norm_(model.parameters(), settings.clip).item()
    skipped = None
    if not math.isfinite(loss):
        skipped = f"the loss is {loss}"
    elif not math.isfinite(norm) and precision.scaler.get_scale() <= 1:  # 1 where there is no scaling
        skipped = f"the gradient's norm is {norm}"
    elif not math.isfinite(norm):
        skipped = OVERFLOW
    if skipped in (None, OVERFLOW):  # the scaler sees the overflow itself, leaves the step out, and lowers its scale
        precision.scaler.step(optimizer)
    if precision.scaler.is_enabled():
        precision.scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return norm, skipped


def advice(skipped: str, state: TrainState) -> str:
    return (
        f"{skipped} at step {state.counters.step - 1}, the last of {state.counters.bad_in_a_row} such steps in a row: "
        f"lower the learning rate (now {state.settings.learning_rate}), lengthen the warmup, or use fp32 or bf16."
    )


@torch.no_grad()
def evaluate(model: nn.Module, batches: list, precision: Precision | None = None, chunk_tokens: int = 0) -> float:
    """The mean loss per predicted token, in nats, over all tokens of all batches; in eval mode, and back."""
    device, was_training = next(model.parameters()).device, model.training
    precision = precision or Precision("fp32", str(device))
    model.eval()
    total = 0.0
    try:
        for batch in batches:
            with precision.autocast():
                total += batch_loss(model, to_device(Batch(*batch), device), chunk_tokens, reduction="sum").item()
    finally:
        model.train(was_training)
    return total / count_targets(batches)


def to_device(batch: Batch, device) -> Batch:
    return Batch(*(part if part is None else part.to(device, non_blocking=True) for part in batch))


def count_targets(batches: list) -> int:
    """How many tokens are predicted in these batches."""
    return sum(int((targets != IGNORED).sum()) for _, targets, *_ in batches)
