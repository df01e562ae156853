"""Writing for one reader and for many, measured: who serves the requests, and what is told of it.

A writer continues a batch of prompts greedily and notes when each token was there. The same requests can be served in
static batches by any writer (the batch waits until its longest text is done) or by the engine of
`orchestrator/serving/`, which fills a place as soon as it is free. Whatever is compared takes turns in one run, and
its tokens are compared too. `benchmarks/generation_against_transformers.py` brings the other side. Not run on a GPU.
"""

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from GPT2Model.generation import generate
from GPT2Model.gpt2 import GPTModel
from orchestrator.evaluation.attention_bench import orders, spread
from orchestrator.evaluation.generation_requests import Request
from orchestrator.evaluation.machine import wait_for
from orchestrator.serving.engine import Engine

PERCENTILES = {"p50": 0.5, "p90": 0.9}


# ------------------------------------------------------------------ one batch


@dataclass
class Written:
    """What a batch of prompts became.

    Attributes:
        ids: the new ones, for each row.
        times: seconds after the start at which the first, second, ... new token of every row was there.
        seconds: until the call returned.
    """

    ids: list[list[int]]
    times: list[float]
    seconds: float


# (ids (B, T), padding_mask (B, T) or None, new tokens, and what else to call after each token)
Writer = Callable[..., Written]


class Stopwatch:
    """Notes when the device was done with each token, and then calls `also`."""

    def __init__(self, device: str, also: Callable = lambda: None):
        self.device, self.also, self.times = device, also, []
        wait_for(device)
        self.started = time.perf_counter()

    def note(self, *_: object) -> None:
        self.times.append(self.now())
        self.also()

    def now(self) -> float:
        wait_for(self.device)
        return time.perf_counter() - self.started


def our_writer(model: GPTModel, device: str = "cpu") -> Writer:
    """`generate()` with its cache, greedy, no stop tokens."""

    def write(ids: Tensor, padding_mask: Tensor | None, new_tokens: int, also: Callable = lambda: None) -> Written:
        watch = Stopwatch(device, also)
        written = generate(model, ids, new_tokens, padding_mask=padding_mask, on_token=watch.note)
        return Written(written[:, ids.shape[1] :].tolist(), watch.times, watch.now())

    return write


def left_padded(prompts: Sequence[Sequence[int]], device: str = "cpu") -> tuple[Tensor, Tensor]:
    """(B, T) ids with zeros on the left, and the mask: True = a real token."""
    longest = max(map(len, prompts))
    ids = torch.zeros(len(prompts), longest, dtype=torch.int64)
    mask = torch.zeros(len(prompts), longest, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = True
    return ids.to(device), mask.to(device)


# ------------------------------------------------------------------ many requests


@dataclass
class Served:
    """What became of requests that were all there at second 0.

    Attributes:
        seconds: until the last was done: the makespan.
        tokens: the new ids of each request.
        times: for each request the seconds at which its tokens were there.
        held_until: for each request the second until which a row was computed for it. In a static batch that is when
            the longest text of the batch is done, whoever else has finished.
        computed: rows that went through the model, padding and finished texts included; None: not known.
        stats: the engine's sizes, and what it counted.
    """

    seconds: float
    tokens: list[list[int]]
    times: list[list[float]]
    held_until: list[float]
    computed: int | None = None
    stats: dict | None = None


def in_static_batches(write: Writer, requests: Sequence[Request], size: int, device: str = "cpu") -> Served:
    """Batches of `size` in the order of arrival, each until its longest text is done: then the next one begins."""
    tokens, times, held, computed = [], [], [], 0
    wait_for(device)
    started = time.perf_counter()
    for at in range(0, len(requests), size):
        batch = requests[at : at + size]
        longest = max(request.new_tokens for request in batch)
        ids, mask = left_padded([request.prompt for request in batch], device)
        began = time.perf_counter() - started
        written = write(ids, mask, longest)
        ended = time.perf_counter() - started
        tokens += [row[: request.new_tokens] for row, request in zip(written.ids, batch, strict=True)]
        times += [[began + second for second in written.times[: request.new_tokens]] for request in batch]
        held += [ended] * len(batch)
        computed += len(batch) * (ids.shape[1] + longest - 1)
    return Served(time.perf_counter() - started, tokens, times, held, computed)


def by_engine(engine: Engine, requests: Sequence[Request], device: str = "cpu") -> Served:
    """All requests into a fresh engine at second 0, and then as it likes.

    Args:
        engine: one that has served nothing yet: pages that it kept would be hits.
    """
    times: list[list[float]] = [[] for _ in requests]
    watch = Stopwatch(device)

    def note(row: int) -> Callable:
        return lambda *_: times[row].append(watch.now())

    names = [engine.add(each.prompt, each.new_tokens, on_token=note(row)) for row, each in enumerate(requests)]
    completions = engine.run()
    seconds = watch.now()
    tokens = [list(completions[name][0].ids) for name in names]
    blocks, scheduler = engine.blocks, engine.scheduler
    sizes = {"num_blocks": blocks.num_blocks, "block_size": blocks.block_size, "max_running": scheduler.max_running}
    stats = sizes | {"max_batch_tokens": scheduler.max_batch_tokens} | asdict(engine.stats)
    computed = stats["prefill_tokens"] + stats["decode_tokens"]
    return Served(seconds, tokens, times, [of[-1] for of in times], computed, stats)


def check_lengths(served: Served, requests: Sequence[Request], name: str) -> None:
    """Each request must have got its tokens, and each token its time, or times of different work are compared.

    Raises:
        RuntimeError: which ones, and how many tokens.
    """
    wrong = [
        f"request {row}: {len(ids)} tokens at {len(times)} times, asked were {request.new_tokens}"
        for row, (request, ids, times) in enumerate(zip(requests, served.tokens, served.times, strict=True))
        if not len(ids) == len(times) == request.new_tokens
    ]
    if wrong:
        raise RuntimeError(f"{name} did other work than was asked: {'; '.join(wrong)}.")


# ------------------------------------------------------------------ taking turns, and what came of it


def interleaved(
    contenders: Mapping[str, Callable[[Any], Any]],
    work: Any,
    warm_up: Any,
    rounds: int,
    seed: int = 0,
    tick: Callable[[str], None] = lambda name: None,
) -> list[dict[str, Any]]:
    """Every contender does the work once in each round, in changing order; a small piece before it is not kept.

    Returns:
        for each round {name: what the contender returned}, in the order in which they ran.
    """
    for name, contender in contenders.items():
        tick(f"warming up {name}")
        contender(warm_up)
    found = []
    for order in orders(list(contenders), rounds, random.Random(seed)):
        here = {}
        for name in order:
            tick(name)
            here[name] = contenders[name](work)
        found.append(here)
    return found


def turns(contenders: int, rounds: int) -> int:
    """How often `interleaved` calls `tick`."""
    return contenders * (rounds + 1)


def figures_of(served: Served) -> dict:
    """Makespan, tokens a second, and percentiles over requests of the time to the first and to the last token.

    In a static batch too a text counts as done with its own last token: as if the batch were streamed.
    """
    first, last = ([times[at] for times in served.times] for at in (0, -1))
    return {
        "seconds": served.seconds,
        "tokens_per_second": sum(map(len, served.tokens)) / served.seconds,
        "first_token": percentiles(first),
        "latency": percentiles(last),
    }


def percentiles(values: Sequence[float]) -> dict[str, float]:
    ordered = torch.tensor(values, dtype=torch.float64)
    return {name: ordered.quantile(part).item() for name, part in PERCENTILES.items()}


def spreads(found: Sequence[Mapping]) -> dict:
    """Of equal nested dicts of numbers, one for each round: the same dict with the spread of each number."""
    columns = {key: [each[key] for each in found] for key in found[0]}
    return {key: spreads(of) if isinstance(of[0], Mapping) else spread(of) for key, of in columns.items()}


def speed(theirs: Sequence[float], ours: Sequence[float]) -> dict:
    """How many times as fast ours is: seconds of the same rounds, pair by pair, and the ratio of the medians."""
    pairs = [other / own for other, own in zip(theirs, ours, strict=True)]
    return {"ratio_of_medians": statistics.median(theirs) / statistics.median(ours), "paired": spread(pairs)}


@torch.no_grad()
def differences(
    model: GPTModel, requests: Sequence[Request], tokens: Sequence[Sequence[int]], others: Sequence[Sequence[int]]
) -> list[dict]:
    """For each request whose tokens are not the others': where they part first, and how near the two tokens were.

    Args:
        model: tells the two tokens' logits at that place, after the text that both have in common.
        tokens, others: new ids of each request.
    Returns:
        {"request", "position" (of the new tokens, from 0), "tokens": [one, other], "gap": logit of one - of the other}.
    """
    found = []
    for row, (request, own, other) in enumerate(zip(requests, tokens, others, strict=True)):
        at = next((i for i, pair in enumerate(zip(own, other, strict=True)) if pair[0] != pair[1]), None)
        if at is not None:
            text = torch.tensor([request.prompt + list(own[:at])], device=model.token_embedding.weight.device)
            logits = model(text)[0, -1].float()
            gap = (logits[own[at]] - logits[other[at]]).item()
            found.append({"request": row, "position": at, "tokens": [own[at], other[at]], "gap": gap})
    return found
