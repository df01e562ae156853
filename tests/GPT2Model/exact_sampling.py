"""The distribution that settings of sampling mean, on Python's own floats, and whether draws follow one.

What `GPT2Model/sampling.py` does with tensors is done here with sorted lists; its tests and those of speculative
decoding compare with it.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import config

SIGNIFICANCE = 1e-3  # a right sampler falls below it with one seed in a thousand; the seeds are fixed


@contextmanager
def shapes_unchecked() -> Iterator[None]:
    """For as long as the `with` lasts, calls are not held to their annotations.

    Why: thousands of draws of a tiny model spend three quarters of their time there. Other tests check the same calls.
    """
    before = config.jaxtyping_disable
    config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        config.update("jaxtyping_disable", before)


def exact_probabilities(
    logits: Sequence[float], history: Sequence[int] = (), *, temperature: float = 1.0, top_k: int | None = None,
    top_p: float | None = None, min_p: float | None = None, repetition_penalty: float = 1.0,
) -> list[float]:  # fmt: skip
    """Penalty, temperature, top-k, top-p, min-p; among equals the first stays."""
    logits = [
        (v / repetition_penalty if v > 0 else v * repetition_penalty) if i in set(history) else v
        for i, v in enumerate(logits)
    ]
    weights = [math.exp((v - max(logits)) / temperature) for v in logits]
    kept = sorted(range(len(logits)), key=lambda i: -weights[i])[:top_k]
    total = math.fsum(weights[i] for i in kept)
    if top_p is not None and top_p < 1:  # sums that are rounded may reach 1 before the last token
        nucleus, mass = [], 0.0
        for i in kept:
            if mass < top_p:
                nucleus.append(i)
                mass += weights[i] / total
        kept = nucleus
    if min_p is not None:
        kept = [i for i in kept if weights[i] >= min_p * weights[kept[0]]]
    total = math.fsum(weights[i] for i in kept)
    return [weights[i] / total if i in kept else 0.0 for i in range(len(logits))]


def exact_sequences(
    logits_after: Callable[[tuple[int, ...]], Sequence[float]], prompt: tuple[int, ...], length: int, **settings
) -> dict[tuple[int, ...], float]:
    """Every continuation of `length` tokens and its probability: the product of those of its tokens."""
    found = {(): 1.0}
    for _ in range(length):
        found = {
            (*new, token): before * p
            for new, before in found.items()
            for token, p in enumerate(
                exact_probabilities(logits_after((*prompt, *new)), (*prompt, *new), **settings) if before else ()
            )
        }
    return found


def p_value(drawn: Sequence, expected: Mapping) -> float:
    """Pearson's chi-squared test: how often draws from `expected` would stray at least as far as `drawn`.

    What has no chance may not have been drawn at all. Outcomes expected fewer than 5 times are counted together.
    """
    counts = Counter(drawn)
    impossible = {outcome for outcome in counts if not expected.get(outcome)}
    assert not impossible, f"drawn, though it has no chance: {sorted(impossible)}"
    cells, rest = [], [0, 0.0]
    for outcome, p in expected.items():
        mean = p * len(drawn)
        if mean >= 5:
            cells.append((counts[outcome], mean))
        else:
            rest = [rest[0] + counts[outcome], rest[1] + mean]
    if rest[1] >= 5:
        cells.append(tuple(rest))
    assert len(cells) > 1, "a test of one outcome says nothing"
    statistic = math.fsum((count - mean) ** 2 / mean for count, mean in cells)
    freedom = torch.tensor((len(cells) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom, torch.tensor(statistic / 2, dtype=torch.float64)))
