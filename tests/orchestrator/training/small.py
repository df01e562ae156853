"""What the tests of training share: a model of a few thousand weights, rows of unequal length, a recipe."""

from dataclasses import replace

import torch

from GPT2Model.gpt2 import GPTModel
from orchestrator.text.corpora import IGNORED
from orchestrator.text.samples import Batch
from orchestrator.training.settings import TrainSettings
from orchestrator.training.watch import Watch

SIZES = {"vocab_size": 23, "context_length": 12, "emb_dim": 24, "n_heads": 3, "n_layers": 2, "drop_rate": 0.0}
RECIPE = TrainSettings(
    max_steps=6, batch_size=4, learning_rate=5e-3, warmup_steps=2, eval_steps=100, eval_on_start=False
)


def small_model(seed: int = 0, **changes) -> GPTModel:
    """A fresh model in which biases and norms matter too."""
    torch.manual_seed(seed)
    model = GPTModel({**SIZES, **changes})
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


def recipe(**changes) -> TrainSettings:
    return replace(RECIPE, **changes)


class UnequalRows:
    """Samples that count up modulo 23; sample i predicts 1 + i * 5 % 12 tokens, the rest of its row is padding."""

    name, floor, per_epoch, tokenizer = "unequal rows", None, None, None

    def __init__(self):
        self.read = []  # which samples, in the order of the asking

    def row(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        ids = (index * 7 + torch.arange(13)) % 23
        targets = ids[1:].clone()
        targets[1 + index * 5 % 12 :] = IGNORED
        return ids[:-1], targets

    def batch(self, first: int, count: int) -> Batch:
        self.read += range(first, first + count)
        inputs, targets = zip(*(self.row(i) for i in range(first, first + count)), strict=True)
        return Batch(torch.stack(inputs), torch.stack(targets))

    def validation(self, tokens: int, batch_size: int = 8) -> list[Batch]:
        read, self.read = self.read, []
        batches = [self.batch(100, 3), self.batch(103, 2)]
        self.read = read
        return batches


class Notes(Watch):
    """Keeps what the loop tells, and the model and the optimizer as they stood after each step."""

    def __init__(self, state=None):
        self.state, self.steps, self.looks, self.texts, self.weights, self.memories = state, [], [], [], [], []

    def step(self, record):
        self.steps.append(record)
        if self.state is not None:
            self.weights.append(weights_of(self.state.model))
            self.memories.append(memories_of(self.state.optimizer))

    def evaluation(self, step, loss, tokens, seconds):
        self.looks.append((step, loss, tokens))

    def sample(self, step, text):
        self.texts.append((step, text))


def weights_of(model) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def memories_of(optimizer) -> list[torch.Tensor]:
    """Every tensor of the optimizer's state, in the order of its parameters."""
    listed = [p for group in optimizer.param_groups for p in group["params"]]
    return [value.clone() for p in listed if p in optimizer.state for _, value in sorted(optimizer.state[p].items())]


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    """Bitwise."""
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
