"""What a benchmark of generation asks for: a model whose text varies, and requests drawn from a seed."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from GPT2Model.gpt2 import GPTModel

LENGTHS = "floor(low * ((high + 1) / low) ** u), u uniform in [0, 1): P(n) = ln((n + 1) / n) / ln((high + 1) / low)"


def perturbed_model(cfg: Mapping, seed: int = 0, scale: float = 0.1) -> GPTModel:
    """A model with fresh weights and noise on every one of them, in evaluation.

    Why the noise: a fresh GPT-2 with a tied head repeats one token for ever, and then every path "writes the same".
    """
    torch.manual_seed(seed)
    model = GPTModel(cfg).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += scale * torch.randn(parameter.shape, generator=generator)
    return model


@dataclass(frozen=True)
class Request:
    """Token ids to read, and how many tokens to write."""

    prompt: list[int]
    new_tokens: int


def log_uniform(count: int, low: int, high: int, generator: torch.Generator) -> list[int]:
    """Whole numbers from low to high, drawn as LENGTHS says: as many from 16 to 32 as from 128 to 256."""
    uniform = torch.rand(count, generator=generator, dtype=torch.float64)
    return [min(high, int(low * ((high + 1) / low) ** u)) for u in uniform.tolist()]


def queued(count: int, low: int, high: int, vocab_size: int, seed: int = 0) -> list[Request]:
    """Requests whose prompts and texts have log-uniform lengths from low to high, with random ids.

    One generator draws the lengths of all prompts, then of all texts, then the ids, prompt by prompt.
    """
    generator = torch.Generator().manual_seed(seed)
    prompts, texts = (log_uniform(count, low, high, generator) for _ in range(2))
    return [
        Request(torch.randint(vocab_size, (length,), generator=generator).tolist(), new_tokens)
        for length, new_tokens in zip(prompts, texts, strict=True)
    ]


def with_common_prefix(
    count: int, prefix: int, tails: tuple[int, int], new_tokens: int, vocab_size: int, seed: int = 0
) -> list[Request]:
    """Requests that begin with the same `prefix` tokens; each has a tail of its own, of tails[0] to tails[1] tokens."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda length: torch.randint(vocab_size, (length,), generator=generator).tolist()  # noqa: E731
    common = draw(prefix)
    lengths = torch.randint(tails[0], tails[1] + 1, (count,), generator=generator).tolist()
    return [Request(common + draw(length), new_tokens) for length in lengths]


def lengths_of(requests: Sequence[Request]) -> dict:
    """Mean, least, most and total of prompts and texts, and the lengths themselves."""
    lengths = {
        "prompt": [len(request.prompt) for request in requests],
        "new_tokens": [request.new_tokens for request in requests],
    }
    return {
        what: {"mean": statistics.mean(of), "min": min(of), "max": max(of), "total": sum(of), "each": of}
        for what, of in lengths.items()
    }
