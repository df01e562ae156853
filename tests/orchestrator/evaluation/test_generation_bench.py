"""Requests, static batches and the engine as a benchmark sees them: what is drawn, computed and compared."""

import math
import statistics
from collections import Counter

import pytest
import torch

from GPT2Model.config import from_preset
from GPT2Model.gpt2 import GPTModel
from orchestrator.evaluation.generation_bench import (
    Served,
    Written,
    by_engine,
    check_lengths,
    differences,
    figures_of,
    in_static_batches,
    interleaved,
    left_padded,
    our_writer,
    percentiles,
    speed,
    spreads,
    turns,
)
from orchestrator.evaluation.generation_parts import timeline, useful_rows
from orchestrator.evaluation.generation_requests import (
    LENGTHS,
    Request,
    lengths_of,
    log_uniform,
    perturbed_model,
    queued,
    with_common_prefix,
)
from orchestrator.serving.engine import Engine

CFG = {"vocab_size": 61, "context_length": 48, "emb_dim": 30, "n_heads": 5, "n_layers": 2, "drop_rate": 0.0}


@pytest.fixture(scope="module")
def model() -> GPTModel:
    return perturbed_model(CFG, scale=0.4)


@pytest.fixture(scope="module")
def requests() -> list[Request]:
    return queued(7, 3, 20, CFG["vocab_size"], seed=0)


def plain_loop(model, request: Request) -> list[int]:
    ids = torch.tensor([request.prompt])
    with torch.no_grad():
        for _ in range(request.new_tokens):
            ids = torch.cat([ids, model(ids)[:, -1].argmax(-1, keepdim=True)], 1)
    return ids[0, len(request.prompt) :].tolist()


# ------------------------------------------------------------------ what is asked


def test_lengths_follow_the_formula_that_is_published_with_them():
    count, low, high = 40_000, 16, 256
    uniform = torch.rand(50, generator=torch.Generator().manual_seed(1), dtype=torch.float64).tolist()
    formula = LENGTHS.split(", u")[0]
    by_formula = [eval(formula, {"floor": math.floor, "low": low, "high": high, "u": u}) for u in uniform]
    assert log_uniform(50, low, high, torch.Generator().manual_seed(1)) == by_formula
    drawn = Counter(log_uniform(count, low, high, torch.Generator().manual_seed(1)))
    assert set(drawn) <= set(range(low, high + 1))
    assert {low, high} <= set(drawn)
    expected = {n: count * math.log((n + 1) / n) / math.log((high + 1) / low) for n in range(low, high + 1)}
    assert sum(expected.values()) == pytest.approx(count)
    chi_squared = sum((drawn[n] - expected[n]) ** 2 / expected[n] for n in expected)
    freedom = len(expected) - 1
    assert abs(chi_squared - freedom) < 4 * math.sqrt(2 * freedom)  # its mean and four of its standard deviations


def test_the_queue_of_a_seed_is_one_queue_and_another_seeds_another():
    one, again, other = (queued(32, 16, 256, 50257, seed) for seed in (0, 0, 1))
    assert one == again != other
    lengths = lengths_of(one)
    assert lengths["prompt"]["each"] == [len(request.prompt) for request in one]
    assert lengths["new_tokens"]["total"] == sum(request.new_tokens for request in one)
    assert {id for request in one for id in request.prompt} <= set(range(50257))
    assert lengths["prompt"]["each"] != lengths["new_tokens"]["each"]


def test_a_common_prefix_is_common_and_ends_where_it_is_said_to():
    requests = with_common_prefix(16, 192, (16, 32), 5, 50257)
    prefixes = {tuple(request.prompt[:192]) for request in requests}
    tails = [len(request.prompt) - 192 for request in requests]
    assert len(prefixes) == 1
    assert min(tails) >= 16
    assert max(tails) <= 32
    assert len(set(tails)) > 3
    assert len({request.prompt[192] for request in requests}) > 10  # the next token is everyone's own


def test_noise_makes_the_text_vary_where_a_fresh_model_repeats_one_token():
    cfg = from_preset("nano", vocab_size=257, drop_rate=0.0)
    request = Request(torch.randint(257, (8,), generator=torch.Generator().manual_seed(0)).tolist(), 24)
    torch.manual_seed(0)
    assert len(set(plain_loop(GPTModel(cfg).eval(), request))) <= 4
    assert len(set(plain_loop(perturbed_model(cfg), request))) >= 8


# ------------------------------------------------------------------ who serves


def test_everybody_serves_the_plain_loops_tokens_and_as_many_as_were_asked(model, requests):
    expected = [plain_loop(model, request) for request in requests]
    static = in_static_batches(our_writer(model), requests, 3)
    engine = by_engine(Engine(model, max_running=4, max_batch_tokens=16), requests)
    for served in (static, engine):
        assert served.tokens == expected
        check_lengths(served, requests, "it")
        for times, request in zip(served.times, requests, strict=True):
            assert len(times) == request.new_tokens
            assert times == sorted(times)
            assert 0 < times[0] <= times[-1] <= served.seconds
    assert len({id for ids in expected for id in ids}) > 10


def test_the_rows_that_are_said_to_be_computed_are_those_that_went_through_the_model(model, requests):
    seen = []
    hook = model.blocks[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape[:2].numel()))
    try:
        static = in_static_batches(our_writer(model), requests, 3)
        assert (static.computed, sum(seen)) == (sum(seen), static.computed)
        seen.clear()
        engine = by_engine(Engine(model, max_running=4, prefix_sharing=False), requests)
        assert engine.computed == sum(seen) == useful_rows(requests)
        assert (engine.stats["max_running"], engine.stats["peak_running"]) == (4, 4)
    finally:
        hook.remove()
    assert static.computed > useful_rows(requests)


def test_a_static_batch_holds_every_row_until_its_longest_text_is_done_and_only_then_begins_the_next():
    requests = [Request([1] * 4, new) for new in (2, 5, 3, 1, 4)]
    calls = []

    def write(ids, mask, new_tokens):
        calls.append((tuple(ids.shape), new_tokens))
        return Written([list(range(new_tokens))] * len(ids), [0.1 * (i + 1) for i in range(new_tokens)], 0)

    served = in_static_batches(write, requests, 2)
    assert calls == [((2, 4), 5), ((2, 4), 3), ((1, 4), 4)]
    assert served.tokens == [list(range(request.new_tokens)) for request in requests]
    assert served.held_until[0] == served.held_until[1] < served.held_until[2] == served.held_until[3]
    assert served.times[0] == served.times[1][:2]  # a short text is done with its own last token
    assert served.times[2][0] - 0.1 >= served.held_until[0]
    assert served.computed == 2 * (4 + 4) + 2 * (4 + 2) + (4 + 3)


def test_padding_is_on_the_left_and_the_mask_says_where():
    ids, mask = left_padded([[7, 8], [1, 2, 3]])
    assert ids.tolist() == [[0, 7, 8], [1, 2, 3]]
    assert mask.tolist() == [[False, True, True], [True, True, True]]


def test_other_work_than_was_asked_is_refused_with_the_request(requests):
    tokens = [[1] * request.new_tokens for request in requests]
    times = [[0.1] * request.new_tokens for request in requests]
    check_lengths(Served(1, tokens, times, []), requests, "it")
    tokens[4] = tokens[4][:-1]
    with pytest.raises(RuntimeError, match=f"it did other work than was asked: request 4: {len(tokens[4])} tokens"):
        check_lengths(Served(1, tokens, times, []), requests, "it")


# ------------------------------------------------------------------ what is told


def test_a_difference_is_told_with_its_place_and_the_gap_of_the_logits(model, requests):
    tokens = [plain_loop(model, request) for request in requests]
    assert differences(model, requests, tokens, tokens) == []
    others = [list(ids) for ids in tokens]
    others[5][2] = wrong = (tokens[5][2] + 1) % CFG["vocab_size"]
    others[5][1 + 2] = (tokens[5][3] + 1) % CFG["vocab_size"]  # only the first place counts
    (found,) = differences(model, requests, tokens, others)
    exact = GPTModel(CFG).double().eval()
    exact.load_state_dict(model.state_dict())
    with torch.no_grad():
        logits = exact(torch.tensor([requests[5].prompt + tokens[5][:2]]))[0, -1]
    assert (found["request"], found["position"], found["tokens"]) == (5, 2, [tokens[5][2], wrong])
    assert found["gap"] == pytest.approx((logits[tokens[5][2]] - logits[wrong]).item(), abs=1e-4)
    assert found["gap"] > 0


def test_all_take_turns_each_goes_first_and_the_warm_up_is_not_kept():
    calls, ticks = [], []
    contenders = {name: lambda work, name=name: calls.append((name, work)) or (name, work) for name in "abc"}
    found = interleaved(contenders, "work", "little", rounds=3, tick=ticks.append)
    assert calls[:3] == [("a", "little"), ("b", "little"), ("c", "little")]
    assert {calls[at][0] for at in (3, 6, 9)} == set("abc")
    assert [sorted(here) for here in found] == [["a", "b", "c"]] * 3
    assert all(result == (name, "work") for here in found for name, result in here.items())
    assert len(ticks) == len(calls) == turns(3, 3)


def test_a_speed_is_the_median_of_the_ratios_of_each_round():
    found = speed(theirs=[10.0, 30.0, 8.0], ours=[5.0, 6.0, 8.0])
    assert (found["paired"]["min"], found["paired"]["median"], found["paired"]["max"]) == (1.0, 2.0, 5.0)
    assert found["ratio_of_medians"] == pytest.approx(10 / 6)


def test_figures_of_a_serving_are_about_requests_not_tokens():
    times = [[1.0, 2.0], [2.0, 5.0, 9.0], [3.0, 4.0]]
    found = figures_of(Served(10.0, [[1, 1], [1, 1, 1], [1, 1]], times, []))
    assert found["tokens_per_second"] == pytest.approx(0.7)
    assert found["first_token"] == {"p50": 2.0, "p90": pytest.approx(2.8)}
    assert found["latency"] == {"p50": 4.0, "p90": pytest.approx(8.0)}
    values = [float(value) for value in torch.rand(50).tolist()]
    assert percentiles(values)["p90"] == pytest.approx(statistics.quantiles(values, n=10, method="inclusive")[8])


def test_spreads_are_taken_of_each_number_over_the_rounds():
    found = spreads([{"a": 1.0, "b": {"c": 5.0}}, {"a": 3.0, "b": {"c": 9.0}}])
    assert (found["a"]["median"], found["b"]["c"]["max"]) == (2.0, 9.0)


def test_the_picture_shows_the_round_whose_makespan_is_the_median():
    rounds = [Served(seconds, [], [[seconds / 2, seconds]], [seconds]) for seconds in (9.0, 3.0, 4.0)]
    assert timeline(rounds) == {"first": [2.0], "last": [4.0], "held": [4.0]}
