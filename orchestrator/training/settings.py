"""TrainSettings: the knobs of the training loop, each with its meaning, and what is wrong with them, all at once."""

import math
from dataclasses import dataclass

DTYPES = ("auto", "fp32", "bf16", "fp16")
OPTIMIZERS = ("adamw", "muon")
SCHEDULES = ("cosine", "wsd", "constant")


@dataclass(frozen=True)
class TrainSettings:
    """How long, how fast and in which numbers to learn.

    Attributes:
        max_steps: optimizer steps.
        batch_size: sequences in one forward pass.
        learning_rate: the peak.
        warmup_steps, min_lr_ratio, schedule, decay_part: see `schedule.learning_rate`.
        weight_decay: on 2-D weights.
        betas: AdamW's two memories; 0.95, shorter than torch's 0.999, is what GPT training uses.
        clip: gradients longer than this are scaled down to it.
        eval_steps: steps between two looks at the validation split.
        seed: of dropout. (The data have their own: which sample comes when.)
        gradient_accumulation_steps: forward and backward passes in one step, for a batch that memory cannot hold.
        optimizer: "adamw", or "muon" for the matrices of the blocks (AdamW for the rest).
        dtype: of the matrix products: "fp32", "bf16", "fp16", or "auto": see `precision.resolve_dtype`.
        compile: let torch.compile fuse the model; the first step then takes a while.
        activation_checkpointing: keep only each block's input for the backward pass, and compute the rest again.
        loss_chunk_tokens: compute the loss over this many tokens at a time, so that the logits never stand whole in
            memory; 0: all at once, which is faster on a CPU.
        eval_tokens: predicted tokens in one look at the validation split.
        eval_on_start: look before the first step too.
        max_bad_steps: so many steps in a row whose loss or gradient is no number end the run; each is skipped.
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
    gradient_accumulation_steps: int = 1
    schedule: str = "cosine"
    decay_part: float = 0.2
    optimizer: str = "adamw"
    dtype: str = "fp32"
    compile: bool = False
    activation_checkpointing: bool = False
    loss_chunk_tokens: int = 0
    eval_tokens: int = 32_768
    eval_on_start: bool = True
    max_bad_steps: int = 5

    def __post_init__(self):
        if problems := self.problems():
            raise ValueError("the training settings are wrong: " + "; ".join(problems) + ".")

    @property
    def samples_per_step(self) -> int:
        """Sequences behind one step of the optimizer."""
        return self.batch_size * self.gradient_accumulation_steps

    def problems(self) -> list[str]:
        """A phrase for each number that makes no sense."""
        low = {
            "max_steps": 1, "batch_size": 1, "learning_rate": 0, "warmup_steps": 0, "weight_decay": 0, "eval_steps": 1,
            "gradient_accumulation_steps": 1, "loss_chunk_tokens": 0, "eval_tokens": 1, "max_bad_steps": 1,
        }  # fmt: skip
        found = [
            f"{name} must be {least} or more, got {getattr(self, name)}"
            for name, least in low.items()
            if not getattr(self, name) >= least  # not `<`: NaN is below nothing
        ]
        for name in ("min_lr_ratio", "decay_part"):
            if not 0 <= getattr(self, name) <= 1:
                found.append(f"{name} must be from 0 to 1, got {getattr(self, name)}")
        if not self.clip > 0:
            found.append(f"clip must be above 0, got {self.clip}")
        if not 0 <= self.seed < 2**63:
            found.append(f"seed must be from 0 to 2**63 - 1, got {self.seed}")
        if not all(0 <= beta < 1 for beta in self.betas):
            found.append(f"betas must be from 0 to below 1, got {self.betas}")
        for name in ("learning_rate", "weight_decay", "clip"):
            if math.isinf(getattr(self, name)) and getattr(self, name) > 0:  # NaN and -inf are named above
                found.append(f"{name} must be finite, got {getattr(self, name)}")
        for name, known in (("dtype", DTYPES), ("optimizer", OPTIMIZERS), ("schedule", SCHEDULES)):
            if getattr(self, name) not in known:
                found.append(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        return found
