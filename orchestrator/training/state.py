"""TrainState: everything that moves while a model is trained, so that a run can stop anywhere and go on."""

import math
from dataclasses import dataclass, field

import torch
from torch import nn

from orchestrator.training.settings import TrainSettings


@dataclass
class Counters:
    """The numbers of a run, JSON-ready.

    Attributes:
        step: steps of the optimizer so far, the skipped ones included.
        sample: the global index of the next sample to be read: the whole state of the data.
        tokens: predicted in training so far.
        skipped: steps whose loss or gradient was no number. bad_in_a_row: those of them just now.
        best_loss, best_step: of the looks at the validation split so far; None before the first.
    """

    step: int = 0
    sample: int = 0
    tokens: int = 0
    skipped: int = 0
    bad_in_a_row: int = 0
    best_loss: float | None = None
    best_step: int | None = None


@dataclass
class TrainState:
    """A run as it stands: what a checkpoint holds, beside the random states of the libraries.

    Attributes:
        model, optimizer: as they are after `counters.step` steps. scaler: see `Precision`.
        validation_loss: of the last look, None if there was none at this step.
    """

    model: nn.Module
    optimizer: object
    scaler: torch.amp.GradScaler
    settings: TrainSettings
    counters: Counters = field(default_factory=Counters)
    validation_loss: float | None = None

    def take_note(self, validation_loss: float) -> None:
        """Remember a look at the validation split, and whether it is the best so far."""
        self.validation_loss = validation_loss
        best = self.counters.best_loss
        if math.isfinite(validation_loss) and (best is None or validation_loss < best):
            self.counters.best_loss, self.counters.best_step = validation_loss, self.counters.step
