"""Random request mixes for the engine, small models whose text varies, and what each request must get.

Greedy ids are those of the plain loop, in float32. With samples, texts, stop strings and log-probabilities it is
`generate_text` of each request alone, in float64, where rounding as good as never decides.
"""

import functools
from collections import Counter
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import strategies as st

from GPT2Model.completion import Completion
from GPT2Model.gpt2 import GPTModel
from GPT2Model.sampling import Sampling
from GPT2Model.text_generation import generate_text
from orchestrator.serving.engine import Engine

SMALL = {
    "vocab_size": 61, "context_length": 48, "emb_dim": 30, "n_heads": 6, "n_layers": 2, "drop_rate": 0.0,
    "flash_query_block_size": 7, "flash_kv_block_size": 5,
}  # fmt: skip
VARIANTS = {
    "gpt2": {},
    "grouped heads": {"n_kv_heads": 2},
    "rope": {"positions": "rope", "emb_dim": 36},
}
NEAR = 1e-4  # a greedy choice by less than this is left out: rounding may decide it


@functools.cache
def model(variant: str, dtype: torch.dtype) -> GPTModel:
    """Noise on every weight, biases and norms too; so much on the matrices that attention decides the text."""
    torch.manual_seed(7)
    small = GPTModel({**SMALL, **VARIANTS[variant]})
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in small.named_parameters():
            scale = 0.3 if "embedding" in name else 0.8 if parameter.dim() == 2 else 0.1
            parameter += scale * torch.randn(parameter.shape, generator=generator)
    return small.to(dtype).eval()


GREEDY: dict[tuple, tuple[list[int], list[float]]] = {}  # the plain loop is the slowest part: each text grows once


@torch.no_grad()
def plain_loop(variant: str, dtype: torch.dtype, prompt: tuple[int, ...], new_tokens: int):
    """`ids = cat([ids, model(ids)[:, -1].argmax(...)])`, and by how much each choice was won."""
    written, margins = GREEDY.setdefault((variant, dtype, prompt), ([], []))
    while len(written) < new_tokens:
        logits = model(variant, dtype)(torch.tensor([[*prompt, *written]]))[0, -1]
        best = logits.topk(2).values
        written.append(int(logits.argmax()))
        margins.append(float(best[0] - best[1]))
    return written[:new_tokens], margins[:new_tokens]


class Letters:
    """A tokenizer for 61 ids: few letters, so that stop strings occur; pairs; and single bytes of longer characters."""

    end_of_text = 0
    PIECES = (
        *(bytes([97 + i % 6]) for i in range(36)),
        *(a + b for a in (b"a", b"b", b"c", b"d") for b in (b"a", b" ", b"f")),
        *(bytes([byte]) for byte in "\u00e9\u20ac\U0001f642".encode()),
        *[b"\xe9"] * 4,
    )

    def encode(self, text: str) -> list[int]:
        raise NotImplementedError("the mixes are of ids")

    def decode(self, ids) -> str:
        return b"".join(self.PIECES[id] for id in ids).decode("utf-8", errors="replace")


LETTERS = Letters()


@dataclass(frozen=True)
class Wish:
    """One request of a mix.

    arrives, cancelled: before which step. stop_after: the greedy token that is to stop it. stop_at: the place in its
    text of the two letters that are to stop it. logprobs: as in `Engine.add`.
    """

    prompt: tuple[int, ...]
    new_tokens: int
    arrives: int = 0
    cancelled: int | None = None
    stop_after: int | None = None
    sampling: Sampling = field(default_factory=Sampling)
    n: int = 1
    stop_at: int | None = None
    logprobs: int | None = None


@dataclass(frozen=True)
class Mix:
    """An engine, and what it is asked for. texts: it has a tokenizer."""

    texts: bool
    variant: str
    dtype: torch.dtype
    num_blocks: int
    block_size: int
    max_running: int
    max_batch_tokens: int
    prefix_sharing: bool
    hashes_collide: bool
    wishes: tuple[Wish, ...]


STEMS = [torch.randint(0, 61, (16,), generator=torch.Generator().manual_seed(seed)).tolist() for seed in range(3)]
PROMPTS = st.builds(
    lambda stem, length, rest: tuple(stem[:length] + rest) or (7,),
    st.sampled_from(STEMS), st.integers(0, 16), st.lists(st.integers(0, 60), max_size=2),
)  # fmt: skip

SAMPLINGS = st.one_of(
    st.builds(Sampling, repetition_penalty=st.sampled_from([1.0, 1.5, 0.7])),  # greedy
    st.builds(
        Sampling,
        temperature=st.sampled_from([0.8, 1.5]),
        top_k=st.sampled_from([None, 5]),
        top_p=st.sampled_from([None, 0.8]),
        min_p=st.sampled_from([None, 0.05]),
        repetition_penalty=st.sampled_from([1.0, 1.3]),
        seed=st.integers(0, 3),
    ),
)


@st.composite
def mixes(draw, *, dtype: torch.dtype = torch.float32, sampled: bool = False) -> Mix:
    """Engines that are too small for what is asked of them, and requests that come and go at any time."""
    max_running = draw(st.integers(1, 6))
    wishes = []
    for _ in range(draw(st.integers(1, 7))):
        sampling, n, about_text = Sampling(), 1, (None, None)
        if sampled:
            sampling = draw(SAMPLINGS)
            n = 1 if sampling.greedy else min(max_running, draw(st.integers(1, 3)))
            about_text = draw(st.sampled_from([None, None, 0, 2, 5])), draw(st.sampled_from([None, 0, 3]))
        wishes.append(
            Wish(
                draw(PROMPTS),
                draw(st.integers(1, 14)),
                draw(st.integers(0, 8)),
                draw(st.one_of(st.none(), st.none(), st.integers(0, 20))),
                draw(st.one_of(st.none(), st.none(), st.integers(0, 4))),
                sampling,
                n,
                *about_text,
            )
        )
    block_size = draw(st.integers(1, 5))
    least = max(blocks_for(wish, block_size) for wish in wishes)
    return Mix(
        sampled,
        draw(st.sampled_from([*VARIANTS])),
        dtype,
        max(1, least + draw(st.sampled_from([0, 0, 1, 2, 5, -1]))),  # one too few: the longest request is refused
        block_size,
        max_running,
        max_running + draw(st.integers(0, 8)),
        draw(st.sampled_from([True, True, True, False])),
        draw(st.booleans()),
        tuple(wishes),
    )


def blocks_for(wish: Wish, block_size: int) -> int:
    """Blocks for all tokens that are ever read: the last one that is written is not."""
    return -(-(len(wish.prompt) + wish.new_tokens - 1) // block_size)


def expected(mix: Mix, wish: Wish) -> tuple[list[int], bool]:
    """What the plain loop writes, and whether rounding could change it."""
    ids, margins = plain_loop(mix.variant, mix.dtype, wish.prompt, wish.new_tokens)
    return cut(ids, stop_tokens(mix, wish)), min(margins) < NEAR


@functools.lru_cache(maxsize=32)
def alone(mix: Mix, wish: Wish) -> tuple[tuple[str, ...], list[Completion]]:
    """The stop strings of a wish, which are letters of its own text, and what it gets when nobody else is there."""

    def write(stop: tuple[str, ...]) -> list[Completion]:
        return generate_text(
            model(mix.variant, mix.dtype), LETTERS, list(wish.prompt), wish.new_tokens, wish.sampling, n=wish.n,
            stop=stop, stop_tokens=stop_tokens(mix, wish), logprobs=wish.logprobs,
        )  # fmt: skip

    written = write(())
    stop = "" if wish.stop_at is None else written[-1].text[wish.stop_at :][:2]
    if not stop or "\ufffd" in stop:
        return (), written
    return (stop,), write((stop,))


def stop_tokens(mix: Mix, wish: Wish) -> tuple[int, ...]:
    """The id at which the plain loop is to stop, if any."""
    if wish.stop_after is None or wish.stop_after >= wish.new_tokens:
        return ()
    return (plain_loop(mix.variant, mix.dtype, wish.prompt, wish.new_tokens)[0][wish.stop_after],)


def cut(ids: list[int], stops: tuple[int, ...]) -> list[int]:
    return next((ids[: i + 1] for i, id in enumerate(ids) if id in stops), ids)


def play(mix: Mix) -> tuple[dict, Counter]:
    """Let an engine serve a mix. Returns what each wish got (None: refused), and how often what happened."""
    engine = Engine(
        model(mix.variant, mix.dtype),
        LETTERS if mix.texts else None,
        num_blocks=mix.num_blocks,
        block_size=mix.block_size,
        max_running=mix.max_running,
        max_batch_tokens=mix.max_batch_tokens,
        prefix_sharing=mix.prefix_sharing,
    )
    if mix.hashes_collide:  # what came before a block is forgotten, and the rest has five values: tokens must decide
        engine.blocks._hash = lambda parent, tokens: sum(tokens) % 5
    met, numbers, plans = Counter(), {}, []
    plan_next = engine.scheduler.plan
    engine.scheduler.plan = lambda: plans.append(plan_next()) or plans[-1]
    events: dict[int, list] = {}
    last = max(max(wish.arrives, wish.cancelled or 0) for wish in mix.wishes)
    for step in range(10_000):
        for wish in mix.wishes:
            if wish.arrives == step:
                numbers[id(wish)] = ask(engine, mix, wish, events)
                met["refused"] += numbers[id(wish)] is None
            if wish.cancelled == step and numbers.get(id(wish)) is not None:
                met["cancelled"] += engine.cancel(numbers[id(wish)])
        more = engine.step()
        engine.blocks.check()
        plan, queued = plans[-1], [*engine.scheduler.running, *engine.scheduler.waiting]
        assert not any(sample.finish_reason for sample in queued), "who has ended or was cancelled still holds blocks"
        met["chunked"] += sum(sample.table is not None and sample.unread > 0 for sample, _ in plan.reads)
        met["preempted"] += len(plan.preempted)
        met["copied"] += len(plan.copies)
        if not more and step >= last and engine.idle:
            break
    else:
        raise RuntimeError("the engine did not come to an end in 10,000 steps")
    done = engine.run()
    met["shared"], met["evicted"] = engine.stats.shared_tokens, engine.blocks.stats.evictions
    assert engine.blocks.free_blocks == mix.num_blocks, "blocks are held after the last request"
    assert (met["preempted"], met["copied"]) == (engine.stats.preemptions, engine.stats.copied_blocks)
    results = {}
    for wish in mix.wishes:
        number = numbers[id(wish)]
        results[id(wish)] = None if number is None else done[number]
        for i, completion in enumerate(results[id(wish)] or ()):
            told = [event for event in events.get(number, ()) if event.index == i]
            ids = [event.id for event in told if event.id is not None]  # None: nothing was written, it was cancelled
            assert ids == completion.ids, "on_token told something else than the completion"
            if mix.texts:
                assert "".join(event.text for event in told) == completion.text
    return results, met


def ask(engine: Engine, mix: Mix, wish: Wish, events: dict[int, list]) -> int | None:
    """Add a wish; None: it was refused, which must be exactly when it can never fit."""
    heard: list = []
    options = {"n": wish.n, "stop_tokens": stop_tokens(mix, wish), "on_token": heard.append}
    if mix.texts:
        options |= {"stop": alone(mix, wish)[0], "logprobs": wish.logprobs}
    if blocks_for(wish, mix.block_size) > mix.num_blocks:
        with pytest.raises(ValueError, match=r"blocks of .* tokens, and the whole cache has"):
            engine.add(wish.prompt, wish.new_tokens, wish.sampling, **options)
        return None
    number = engine.add(wish.prompt, wish.new_tokens, wish.sampling, **options)
    events[number] = heard
    return number
