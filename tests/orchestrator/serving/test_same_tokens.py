"""The engine writes the tokens of the plain loop, whoever else is served, comes, goes, waits or is thrown out.

The loop has no cache, no batch and no pages: `ids = cat([ids, model(ids)[:, -1].argmax(-1, keepdim=True)], 1)`.
Samples, texts, stop strings and log-probabilities are held against `generate_text` of each request alone.
"""

from collections import Counter

import pytest
import torch
from hypothesis import HealthCheck, given, settings

from tests.GPT2Model.exact_sampling import shapes_unchecked
from tests.orchestrator.serving.mixes import (
    LETTERS,
    NEAR,
    STEMS,
    VARIANTS,
    Mix,
    alone,
    expected,
    mixes,
    plain_loop,
    play,
)

EVERYTHING = ("preempted", "shared", "chunked", "cancelled", "refused", "evicted")
OF_TEXTS = (
    *(name for name in EVERYTHING if name != "refused"),
    "copied",
    "stop strings",
    "log-probabilities",
    "penalised greedy",
    "cut draws",
)


def hold_against_the_plain_loop(mix: Mix) -> Counter:
    results, met = play(mix)
    for wish in mix.wishes:
        got = results[id(wish)]
        if got is None:
            continue
        met["requests"] += 1
        ids, rounding_decides = expected(mix, wish)
        if rounding_decides:
            met["near ties"] += 1
            continue
        for completion in got:
            assert completion.prompt_ids == list(wish.prompt)
            if completion.finish_reason == "cancelled":
                assert wish.cancelled is not None
                assert completion.ids == ids[: len(completion.ids)], wish
            else:
                assert completion.ids == ids, wish
                assert completion.finish_reason == ("length" if len(ids) == wish.new_tokens else "stop") or (
                    completion.finish_reason == "stop" and wish.stop_after is not None
                )
            met["tokens"] += len(completion.ids)
    return met


def hold_against_each_alone(mix: Mix) -> Counter:
    results, met = play(mix)
    for wish in mix.wishes:
        got = results[id(wish)]
        if got is None:
            continue
        stops, right = alone(mix, wish)
        assert wish.cancelled is not None or len(got) == wish.n
        for completion, whole in zip(got, right, strict=False):  # cancelled early: perhaps before it forked
            written = len(completion.ids)
            if completion.finish_reason == "cancelled":
                assert wish.cancelled is not None
                assert completion.ids == whole.ids[:written], wish
                assert completion.text == LETTERS.decode(completion.ids)
            else:
                found = completion.prompt_ids, completion.ids, completion.text, completion.finish_reason
                assert found == (whole.prompt_ids, whole.ids, whole.text, whole.finish_reason), wish
                met["stop strings"] += bool(stops) and whole.finish_reason == "stop"
            if wish.logprobs is None:
                assert completion.logprobs is None
                continue
            for seen, exact in zip(completion.logprobs, whole.logprobs[:written], strict=True):
                assert seen.logprob == pytest.approx(exact.logprob, abs=1e-8)
                assert seen.top == pytest.approx(exact.top, abs=1e-8)
                met["log-probabilities"] += 1
        settings_of = wish.sampling
        met["penalised greedy"] += settings_of.greedy and settings_of.repetition_penalty != 1
        met["cut draws"] += settings_of.top_p is not None or settings_of.min_p is not None
    return met


def over_many_mixes(count: int, hold, **kind) -> Counter:
    met = Counter()

    @settings(max_examples=count, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(mixes(**kind))
    def run(mix):
        met.update(hold(mix))

    with shapes_unchecked():  # they are checked in other tests, and cost more than the mixes
        run()
    return met


def test_greedy_texts_are_those_of_the_plain_loop():
    met = over_many_mixes(140, hold_against_the_plain_loop)
    assert all(met[name] > 0 for name in EVERYTHING), met
    assert met["tokens"] > 500, met
    assert met["near ties"] < 0.05 * met["requests"], met


def test_seeded_samples_do_not_depend_on_what_else_is_in_the_batch():
    """Nor do texts, stop strings and log-probabilities. In float64, where rounding as good as never decides a draw."""
    met = over_many_mixes(60, hold_against_each_alone, dtype=torch.float64, sampled=True)
    assert all(met[name] > 0 for name in OF_TEXTS), met


@pytest.mark.slow
def test_greedy_texts_are_those_of_the_plain_loop_over_thousands_of_mixes():
    met = over_many_mixes(2000, hold_against_the_plain_loop)
    assert all(met[name] > 100 for name in EVERYTHING), met
    assert met["near ties"] < 0.05 * met["requests"], met


@pytest.mark.slow
def test_seeded_samples_do_not_depend_on_the_batch_over_a_thousand_mixes():
    met = over_many_mixes(1000, hold_against_each_alone, dtype=torch.float64, sampled=True)
    assert all(met[name] > 50 for name in OF_TEXTS), met


@pytest.mark.parametrize("variant", [*VARIANTS])
def test_the_texts_vary(variant):
    """Were they all the same token over and over, every test here would be easy to pass."""
    texts = [plain_loop(variant, torch.float32, tuple(stem[:n]), 12) for stem in STEMS for n in (3, 7, 11)]
    assert len({tuple(ids) for ids, _ in texts}) == len(texts)
    assert len({id for ids, _ in texts for id in ids}) > 20
    assert sum(len(set(ids)) for ids, _ in texts) / len(texts) > 6
    assert sum(margin < NEAR for _, margins in texts for margin in margins) <= 1
