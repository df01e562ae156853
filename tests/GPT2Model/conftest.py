"""What the tests of the model share: a small cfg, and models in which every weight matters."""

import pytest
import torch

from GPT2Model.gpt2 import GPTModel

# No size is a power of two or equal to another, so that a mix-up of two of them cannot go unseen.
SMALL = {
    "vocab_size": 61, "context_length": 24, "emb_dim": 30, "n_heads": 5, "n_layers": 2, "drop_rate": 0.0,
    "flash_query_block_size": 7, "flash_kv_block_size": 5,
}  # fmt: skip


@pytest.fixture(scope="session")
def small_cfg() -> dict:
    return dict(SMALL)


@pytest.fixture(scope="session")
def perturb():
    def perturb(module: torch.nn.Module, seed: int = 0, scale: float = 0.1) -> torch.nn.Module:
        """Noise on every parameter: a fresh model's biases are 0 and its norms 1, so mixing them up would not show."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter += scale * torch.randn(parameter.shape, generator=generator)
        return module

    return perturb


@pytest.fixture(scope="session")
def build(perturb):
    def build(dtype: torch.dtype = torch.float64, seed: int = 0, **changes) -> GPTModel:
        """A small model in eval mode whose biases and norms are not their defaults."""
        torch.manual_seed(seed)
        return perturb(GPTModel({**SMALL, **changes}), seed).to(dtype).eval()

    return build


@pytest.fixture(scope="session")
def random_ids():
    def random_ids(batch: int, tokens: int, vocab_size: int = SMALL["vocab_size"], seed: int = 0) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(0, vocab_size, (batch, tokens), generator=generator)

    return random_ids
