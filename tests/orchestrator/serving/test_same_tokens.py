"""The engine writes the tokens of the plain loop, whoever else is served, comes, goes, waits or is thrown out.

The loop has no cache, no batch and no pages: `ids = cat([ids, model(ids)[:, -1].argmax(-1, keepdim=True)], 1)`.
"""

from collections import Counter

import pytest
import torch
from hypothesis import HealthCheck, given, settings

from tests.orchestrator.serving.mixes import NEAR, STEMS, VARIANTS, Mix, expected, mixes, plain_loop, play

EVERYTHING = ("preempted", "shared", "chunked", "cancelled", "refused", "evicted")


def hold_against_the_plain_loop(mix: Mix) -> Counter:
    results, met = play(mix)
    for wish in mix.wishes:
        got = results[id(wish)]
        if got is None:
            continue
        right, rounding_decides = expected(mix, wish)
        if rounding_decides:
            met["near ties"] += 1
            continue
        if wish.cancelled is None:
            assert [completion.ids for completion in got] == right, wish
        for completion, ids in zip(got, right, strict=False):  # cancelled early: perhaps before it forked
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


def over_many_mixes(count: int, **kind) -> Counter:
    met = Counter()

    @settings(max_examples=count, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(mixes(**kind))
    def run(mix):
        met.update(hold_against_the_plain_loop(mix))

    run()
    return met


def test_greedy_texts_are_those_of_the_plain_loop():
    met = over_many_mixes(140)
    assert all(met[name] > 0 for name in EVERYTHING), met
    assert met["tokens"] > 500, met


def test_seeded_samples_do_not_depend_on_what_else_is_in_the_batch():
    """Each is held against a loop of its own. In float64, where rounding as good as never decides a draw."""
    met = over_many_mixes(60, dtype=torch.float64, sampled=True)
    assert all(met[name] > 0 for name in (*EVERYTHING, "copied")), met


@pytest.mark.slow
def test_greedy_texts_are_those_of_the_plain_loop_over_thousands_of_mixes():
    met = over_many_mixes(2000)
    assert all(met[name] > 100 for name in EVERYTHING), met


@pytest.mark.slow
def test_seeded_samples_do_not_depend_on_the_batch_over_a_thousand_mixes():
    met = over_many_mixes(1000, dtype=torch.float64, sampled=True)
    assert all(met[name] > 50 for name in (*EVERYTHING, "copied")), met


@pytest.mark.parametrize("variant", [*VARIANTS])
def test_the_texts_vary(variant):
    """Were they all the same token over and over, every test here would be easy to pass."""
    texts = [plain_loop(variant, torch.float32, tuple(stem[:n]), 12) for stem in STEMS for n in (3, 7, 11)]
    assert len({tuple(ids) for ids, _ in texts}) == len(texts)
    assert len({id for ids, _ in texts for id in ids}) > 20
    assert sum(len(set(ids)) for ids, _ in texts) / len(texts) > 6
    assert sum(margin < NEAR for _, margins in texts for margin in margins) <= 1
