"""What is looked at in a model that may have a mistake: small trainings, stories, and differences between logits.

`orchestrator/learning/symptoms.py` says what each of these figures means. Each function works on whatever code
runs at the moment: the mistake is planted by who calls it.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from GPT2Model.config import from_preset
from GPT2Model.generation import generate, make_cache
from GPT2Model.gpt2 import GPTModel
from orchestrator.learning.planted import Mistake
from orchestrator.text import tales
from orchestrator.text.corpora import TalesCorpus
from orchestrator.training import loop
from orchestrator.training.first_model import write_stories

IMPLEMENTATIONS = ("eager", "sdpa", "flash_tiled")
OTHER_TEXT = "other text"


@dataclass(frozen=True)
class Settings:
    """How large and how long. The defaults learn to copy from each of the seeds that were tried.

    Attributes:
        steps, batch_size, learning_rate: of each training.
        emb_dim, n_heads, n_layers, init_std: of the model.
        seed: of weights; right_seeds: how many seeds, from `seed` on, the right model is trained from.
        stories: how many each model writes. held_out: how many the loss is taken on.
    Raises:
        ValueError: fewer than 1 step or 2 seeds.
    """

    steps: int = 500
    batch_size: int = 16
    learning_rate: float = 6e-3
    emb_dim: int = 64
    n_heads: int = 4
    n_layers: int = 2
    init_std: float = 0.07
    seed: int = 0
    right_seeds: int = 4
    stories: int = 200
    held_out: int = 200

    def __post_init__(self):
        if self.steps < 1 or self.right_seeds < 2:
            raise ValueError(
                f"symptoms need 1 step or more and 2 seeds or more (noise is what seeds differ by), got "
                f"steps={self.steps}, right_seeds={self.right_seeds}."
            )


def train_one(settings: Settings, mistake: Mistake | None):
    """A fresh model of the settings' seed, trained; the same batches for all."""
    torch.manual_seed(settings.seed)
    model = model_of(settings, mistake)
    recipe = loop.TrainSettings(
        max_steps=settings.steps, batch_size=settings.batch_size, learning_rate=settings.learning_rate,
        seed=settings.seed, warmup_steps=min(30, settings.steps // 4), min_lr_ratio=0.02, weight_decay=0.0,
        eval_steps=settings.steps,
    )  # fmt: skip
    return model, loop.train(model, corpus_of(settings), recipe, progress=False)


def model_of(settings: Settings, mistake: Mistake | None) -> GPTModel:
    """A fresh model in eval mode, under the implementation in which the mistake acts."""
    implementations = (mistake and mistake.implementations) or ("sdpa",)
    cfg = from_preset(
        "nano", vocab_size=corpus_of(settings).tokenizer.vocab_size, context_length=80, emb_dim=settings.emb_dim,
        n_heads=settings.n_heads, n_layers=settings.n_layers, init_std=settings.init_std,
        attn_implementation=implementations[0], **dict(mistake.needs if mistake else ()),
    )  # fmt: skip
    return GPTModel(cfg).eval()


def corpus_of(settings: Settings) -> TalesCorpus:
    """The tales, the same for every training."""
    return remembered(settings.held_out)


@cache
def remembered(held_out: int) -> TalesCorpus:
    """The corpus with its batches kept: drawing them anew for each training would take a sixth of the time."""
    corpus = TalesCorpus(seed=0, held_out=held_out)
    corpus.batch = cache(corpus.batch)
    return corpus


def grammatical(model: GPTModel, corpus: TalesCorpus, settings: Settings) -> float:
    """Which part of its stories obeys the grammar."""
    written = write_stories(model, corpus, settings.stories, seed=0)
    return sum(tales.check(story) is None for story in written) / len(written)


def apart(one: Tensor, other: Tensor) -> float:
    """The largest difference; NaN counts as infinite."""
    return (one.double() - other.double()).abs().nan_to_num(nan=torch.inf).max().item()


def between_implementations(model: GPTModel, ids: Tensor) -> float:
    results = []
    for name in IMPLEMENTATIONS:
        with model.using_attention(name):
            results.append(model(ids))
    return max(apart(results[0], result) for result in results[1:])


def moved_before(model: GPTModel, ids: Tensor) -> float:
    """Change one token, a few times, and look at all positions before it."""
    original, moves = model(ids), []
    for t in range(1, ids.shape[1], 6):
        changed = ids.clone()
        changed[:, t] = (changed[:, t] + 1) % model.cfg["vocab_size"]
        moves.append(apart(model(changed)[:, :t], original[:, :t]))
    return max(moves)


def between_cached_and_whole(model: GPTModel, ids: Tensor) -> tuple[float, str]:
    """Logits of ids read as 8 tokens, 1 token, and the rest; and whether generate() writes the same with a cache."""
    whole, cached, pieces = model(ids), make_cache(model, *ids.shape), []
    for start, end in ((0, 8), (8, 9), (9, ids.shape[1])):
        pieces.append(model(ids[:, start:end], cache=cached))
    greedy = [generate(model, ids[:, :8], 24, use_cache=used) for used in (True, False)]
    return apart(torch.cat(pieces, dim=1), whole), "" if torch.equal(*greedy) else OTHER_TEXT


@contextmanager
def quiet() -> Iterator[None]:
    """One thread, since models this small only wait with two, and no line for each model that is built."""
    logger, threads = logging.getLogger("CMHA"), torch.get_num_threads()
    level = logger.level
    logger.setLevel("WARNING")
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        torch.set_num_threads(threads)
        logger.setLevel(level)
