"""What an experiment does again and again: a step of training, a text; and which implementations can.

A workload is a model with a batch. Its two tasks are one step of the training loop (batch, loss, gradient, clipping,
update: the functions that `training/loop.py` itself calls) and one greedy text with the KV cache. The lines for CUDA
and MPS were written without a GPU and have not been run on one.
"""

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from CMHA.implementations import IMPLEMENTATIONS
from GPT2Model.config import from_preset
from GPT2Model.generation import generate
from GPT2Model.gpt2 import GPTModel
from orchestrator.evaluation.device_timing import timed
from orchestrator.evaluation.estimates import forward_flops
from orchestrator.evaluation.machine import wait_for
from orchestrator.text.samples import Batch
from orchestrator.training.loop import accumulate_gradients, next_batches, start, update
from orchestrator.training.precision import TORCH_DTYPES, Precision
from orchestrator.training.settings import TrainSettings
from orchestrator.training.state import TrainState

TASKS = ("training", "generation")
BYTES = 257  # a small vocabulary: with 50,257 words the head would be most of what a small model does
READ_AGAIN = 8  # a new token reads all weights for little work: about so many times slower per operation


@dataclass(frozen=True)
class Workload:
    """A model, and how much of it at a time. Dropout is 0, as it is when a model is trained from nothing.

    Attributes:
        model: a preset. vocab_size: another than the preset's.
        batch, tokens: of a training step.
        prompt, new_tokens: of a generation, one text at a time.
        changes: further keys of the cfg, such as {"norm": "rmsnorm"}.
    """

    model: str
    batch: int
    tokens: int
    prompt: int
    new_tokens: int = 32
    vocab_size: int | None = None
    changes: Mapping = field(default_factory=dict)

    @property
    def cfg(self) -> dict:
        sizes = {"drop_rate": 0.0} | ({} if self.vocab_size is None else {"vocab_size": self.vocab_size})
        longest = max(self.tokens, self.prompt + self.new_tokens, from_preset(self.model)["context_length"])
        return from_preset(self.model, **sizes, **{"context_length": longest, **self.changes})

    def cost(self, task: str) -> int:
        """About how long a turn takes, in millions of operations: for the time that is left."""
        cfg = self.cfg
        if task == "training":
            return 1 + 3 * forward_flops(cfg, self.batch, self.tokens) // 10**6
        one_by_one = READ_AGAIN * forward_flops(cfg, 1, 1) * self.new_tokens
        return 1 + (forward_flops(cfg, 1, self.prompt) + one_by_one) // 10**6

    def __str__(self) -> str:
        return f"{self.model}, {self.batch} x {self.tokens}"


def quick() -> list[Workload]:
    """Small models: a minute or two."""
    return [
        Workload("nano", 8, 128, prompt=96, vocab_size=BYTES),
        Workload("tiny", 4, 256, prompt=224, vocab_size=BYTES),
    ]


def full(device: str) -> list[Workload]:
    """GPT-2 124M at two shapes, and a small model at several lengths with as many tokens in a step."""
    small = [Workload("tiny", 2048 // t, t, prompt=t - 32, vocab_size=BYTES) for t in (256, 512, 1024, 2048)]
    large = [Workload("gpt2", 4, 256, prompt=64), Workload("gpt2", 1, 1024, prompt=960)]
    return small + large + ([Workload("gpt2", 16, 1024, prompt=64)] if device == "cuda" else [])


class RandomTokens:
    """Samples of random numbers: speed does not depend on what the tokens say."""

    per_epoch = None

    def __init__(self, workload: Workload, seed: int):
        self.vocab_size, self.tokens, self.seed = workload.cfg["vocab_size"], workload.tokens, seed

    def batch(self, first: int, count: int) -> Batch:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + first)
        ids = torch.randint(self.vocab_size, (count, self.tokens + 1), generator=generator)
        return Batch(ids[:, :-1], ids[:, 1:])


class Training:
    """One model and optimizer, of which every implementation makes a step in its turn.

    Args:
        dtype: of the matrix products: "fp32", "bf16" or "fp16". seed: of weights and tokens.
        compile: by torch.compile.
    """

    def __init__(self, workload: Workload, dtype: str, device: str, seed: int, compile: bool = False):
        torch.manual_seed(seed)
        if compile:
            torch.compiler.reset()  # torch gives up after a few versions of one function, of all models together
        self.device, self.samples = device, RandomTokens(workload, seed)
        self.settings = TrainSettings(
            max_steps=10**6, batch_size=workload.batch, learning_rate=1e-4, warmup_steps=0, seed=seed,
            dtype=dtype, compile=compile,
        )  # fmt: skip
        self.model = GPTModel(workload.cfg).to(device).train()
        self.state: TrainState = start(self.model, self.settings)
        self.precision = Precision(dtype, self.device, self.state.scaler)

    def turn(self) -> dict[str, float]:
        """Seconds of one step.

        Raises:
            FloatingPointError: the loss or the gradient is no number.
        """
        return {"step": timed(self.step, self.device)}

    def step(self) -> None:
        counters = self.state.counters
        batches = next_batches(self.samples, counters.sample, self.settings, self.device)
        loss = accumulate_gradients(self.model, batches, self.settings, self.precision)
        _, skipped = update(self.model, self.state.optimizer, loss, self.settings, self.precision)
        counters.sample += self.settings.samples_per_step
        if skipped:
            raise FloatingPointError(skipped)

    def clean(self) -> None:
        """After an error: what a half step left."""
        self.state.optimizer.zero_grad(set_to_none=True)

    def resting_bytes(self) -> int:
        return resting_bytes(self.state)


class Generation:
    """One model that writes a text, greedily, in each turn. Its weights are in the dtype."""

    def __init__(self, workload: Workload, dtype: str, device: str, seed: int):
        torch.manual_seed(seed)
        self.device, self.new_tokens = device, workload.new_tokens
        self.model = GPTModel(workload.cfg).to(device, TORCH_DTYPES[dtype]).eval()
        self.prompt = torch.randint(workload.cfg["vocab_size"], (1, workload.prompt), device=device)

    def turn(self) -> dict[str, float]:
        """Seconds to the first new token, and of the others."""
        times: list[float] = []

        def note(_):
            if not times:
                wait_for(self.device)
                times.append(time.perf_counter())

        wait_for(self.device)
        started = time.perf_counter()
        generate(self.model, self.prompt, self.new_tokens, on_token=note)
        wait_for(self.device)
        ended = time.perf_counter()
        return {"first_token": times[0] - started, "later_tokens": ended - times[0], "text": ended - started}

    def clean(self) -> None:
        """Nothing is left behind."""

    def resting_bytes(self) -> int:
        return size_of(self.model.parameters())


def resting_bytes(state: TrainState) -> int:
    """Bytes of weights and the optimizer's numbers, which live between two steps."""
    numbers = [value for of in state.optimizer.state.values() for value in of.values() if torch.is_tensor(value)]
    return size_of([*state.model.parameters(), *numbers])


def size_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of all of them together."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def reason_against(
    model: GPTModel, name: str, device: str, dtype: torch.dtype, training: bool, tokens: int
) -> str | None:
    """Why an implementation's own check says no to a pass of this model; None: it serves.

    Why: one that would fall back to another must not be measured in its own name.

    Args:
        dtype: of queries, keys and values: under autocast not that of the weights.
        training: with a backward pass; else a prompt, and then one token at a time.
        tokens: in a sequence.
    """
    attention = model.blocks[0].attention
    request = replace(
        attention.typical_request(tokens), device=torch.device(device).type, dtype=dtype, dropout=0.0,
        needs_grad=training, capability=capability(device),
    )  # fmt: skip
    asked = [request] if training else [request, replace(request, query_len=1, key_len=tokens + 1)]
    found = dict.fromkeys(reason.message for each in asked for reason in IMPLEMENTATIONS[name].check(each))
    return "; ".join(found) or None


def capability(device: str) -> tuple[int, int] | None:
    return torch.cuda.get_device_capability(device) if torch.device(device).type == "cuda" else None


def strictly(name: str) -> dict:
    """What to set attention to so that this implementation runs, or none."""
    return {"use_flash": True, "attn_implementation": name, "attn_strict": True}
