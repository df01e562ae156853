"""The sizes of `benchmarks/generation_against_transformers.py`, and both sides with the very same weights.

Who the other side is stands in the benchmark: here it is somebody who opens our folder of weights and writes.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from GPT2Model.config import from_preset
from GPT2Model.gpt2 import GPTModel
from GPT2Model.quantization import quantize_int8
from orchestrator.evaluation.generation_bench import Written
from orchestrator.evaluation.generation_requests import perturbed_model
from orchestrator.serving.engine import Engine

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
OURS_TOO = {"int8": "float32", "int8_bfloat16": "bfloat16"}  # weights of int8, everything else in the dtype


@dataclass(frozen=True)
class Plan:
    """What is measured. The defaults are the published sizes."""

    cfg: Mapping = field(default_factory=lambda: from_preset("gpt2", drop_rate=0.0))
    prompt: int = 64
    new_tokens: int = 128
    requests: int = 32
    shortest: int = 16
    longest: int = 256
    batch: int = 8
    prefix_requests: int = 16
    prefix: int = 192
    tails: tuple[int, int] = (16, 32)
    prefix_new_tokens: int = 32
    running: tuple[int, ...] = (8, 32)
    steps: int = 20
    rounds: Mapping[str, int] = field(default_factory=lambda: {"one": 10, "queue": 5, "prefix": 7})
    dtypes: tuple[str, ...] = ("float32", "bfloat16", "int8", "int8_bfloat16")
    queue_dtypes: tuple[str, ...] = ("float32",)
    device: str = "cpu"
    seed: int = 0
    noise: float = 0.1  # added to each weight, times N(0, 1)


def tiny(**options) -> Plan:
    cfg = from_preset("nano", vocab_size=257, n_layers=2, emb_dim=32, n_heads=2, context_length=96, drop_rate=0.0)
    return Plan(
        cfg=cfg, prompt=8, new_tokens=16, requests=9, shortest=3, longest=24, batch=4, prefix_requests=4, prefix=32,
        tails=(3, 6), prefix_new_tokens=5, running=(2, 4), steps=2, noise=0.4, **options,
    )  # fmt: skip


class Peer(Protocol):
    """The other side, in one dtype: its module, its writer (a Writer), and the name of its attention."""

    model: nn.Module
    attention: str

    def write(self, ids: Tensor, padding_mask: Tensor | None, new_tokens: int, also: Callable = ...) -> Written: ...


class Sides:
    """The models of a plan, made when they are first asked for: one set of weights for all of them.

    Args:
        folder: where the weights are written. open_peer: (folder, dtype, device) -> a Peer with these weights.
    """

    def __init__(self, plan: Plan, folder: Path, open_peer: Callable[[Path, torch.dtype, str], Peer]):
        self.plan, self.folder, self.open_peer = plan, folder, open_peer
        self.base = perturbed_model(plan.cfg, plan.seed, plan.noise)
        self.base.save_pretrained(folder)
        self.models: dict[str, GPTModel] = {}
        self.peers: dict[str, Peer] = {}

    def ours(self, dtype: str) -> GPTModel:
        if dtype not in self.models:
            model = GPTModel.from_pretrained(self.folder, {"drop_rate": 0.0}).to(DTYPES[OURS_TOO.get(dtype, dtype)])
            model = (quantize_int8(model) if dtype in OURS_TOO else model).to(self.plan.device)
            self.models[dtype] = model.eval()
        return self.models[dtype]

    def theirs(self, dtype: str) -> Peer:
        if dtype not in self.peers:
            self.peers[dtype] = self.open_peer(self.folder, DTYPES[dtype], self.plan.device)
        return self.peers[dtype]

    def engine(self, dtype: str, **options) -> Engine:
        return Engine(self.ours(dtype), **options)
