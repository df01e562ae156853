"""Small runs for the tests of checkpoints: a model with dropout, a text, and the hash of everything a run is."""

import hashlib
import json
import random
from dataclasses import asdict

import numpy as np
import torch

from GPT2Model.config import from_preset
from GPT2Model.gpt2 import GPTModel
from orchestrator.text.samples import TokenWindows
from orchestrator.text.tokenizers import BytesTokenizer
from orchestrator.training.loop import start, train
from orchestrator.training.settings import TrainSettings
from orchestrator.training.state import TrainState
from orchestrator.training.watch import Watch

CFG = {"vocab_size": 257, "context_length": 16, "emb_dim": 16, "n_heads": 2, "n_layers": 2, "drop_rate": 0.1}


def settings(**changes) -> TrainSettings:
    given = {
        "max_steps": 12, "batch_size": 4, "learning_rate": 3e-3, "warmup_steps": 2, "eval_steps": 4, "eval_tokens": 64,
        "eval_on_start": False,
    }  # fmt: skip
    return TrainSettings(**(given | changes))


def samples(context_length: int = 16, pack_documents: bool = False) -> TokenWindows:
    """Windows of a text of numbers, some of them end-of-text."""
    ids = np.random.Generator(np.random.PCG64(5)).integers(0, 257, 4000)
    ids[::11] = 256
    return TokenWindows((ids[:3600], ids[3600:], BytesTokenizer()), context_length, 1, pack_documents)


def fresh(given: TrainSettings, seed: int = 0, **cfg) -> TrainState:
    """A run that has not begun, made as every process makes it: the model from the seed, then `start`."""
    torch.manual_seed(seed)
    return start(GPTModel(from_preset("nano", **(CFG | cfg))), given)


def set_seeds(seed: int) -> None:
    """Of the libraries that `start` does not seed, so that runs which draw from them can be compared."""
    random.seed(seed)
    np.random.seed(seed)


class Digests(Watch):
    """After each step, the hash of everything; and Python's and numpy's generators are used, as a user's watcher might.

    Attributes:
        of: step -> hash. losses: step -> loss.
    """

    def __init__(self, state: TrainState, python: bool = False):
        self.state, self.python, self.of, self.losses = state, python, {}, {}

    def step(self, record):
        random.gauss(0, 1)
        np.random.randn(3)
        self.losses[record.step] = record.loss
        self.of[record.step] = digest(self.state, self.python)


def go_on(state: TrainState, checkpoints=None, data=None, until: int | None = None) -> Digests:
    """Train to the end, or stop before step `until`."""
    watch = Digests(state)
    stop = lambda: "enough" if state.counters.step == until else None  # noqa: E731
    data = data or samples()
    train(state.model, data, state.settings, state=state, watch=watch, checkpoints=checkpoints, stop=stop)
    return watch


def digest(state: TrainState, python: bool = False) -> str:
    """SHA-256 of weights, optimizer, scaler, counters and the random states of all libraries.

    Args:
        python: with Python's generator. Not where the type checks of the tests run: beartype draws from it, in the
            thread that writes a checkpoint too.
    """
    whole = hashlib.sha256()
    for name, tensor in sorted(state.model.state_dict().items()):
        whole.update(name.encode())
        whole.update(tensor.numpy().tobytes())
    for part in getattr(state.optimizer, "parts", [state.optimizer]):
        for number, values in sorted(part.state_dict()["state"].items()):
            for what, tensor in sorted(values.items()):
                whole.update(f"{number} {what}".encode())
                whole.update(tensor.numpy().tobytes())
    whole.update(json.dumps([state.scaler.state_dict(), asdict(state.counters)]).encode())
    whole.update(torch.get_rng_state().numpy().tobytes())
    if python:
        whole.update(repr(random.getstate()).encode())
    numpy_state = np.random.get_state()
    whole.update(numpy_state[1].tobytes() + repr(numpy_state[2:]).encode())
    return whole.hexdigest()
