"""A small model of bytes, and engines over it."""

import pytest
import torch

from GPT2Model.gpt2 import GPTModel
from orchestrator.serving.engine import Engine
from tests.orchestrator.serving.bytes_model import CONTEXT


@pytest.fixture(scope="module")
def model() -> GPTModel:
    """Bytes in, bytes out: half characters and nonsense are in every text. float64, so that no batch decides a tie."""
    torch.manual_seed(0)
    model = GPTModel({"vocab_size": 257, "context_length": CONTEXT, "emb_dim": 24, "n_heads": 4, "n_layers": 2})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return model.double().eval()


@pytest.fixture
def make(model):
    def make(tokenizer=None, **sizes) -> Engine:
        return Engine(model, tokenizer, **{"num_blocks": 64, "block_size": 4} | sizes)

    return make
