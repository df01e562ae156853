"""Sampling means what transformers means by the same settings, and draws follow the distribution that it leaves."""

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from GPT2Model.sampling import Sampler, Sampling, filtered_probabilities, penalised, sample
from tests.GPT2Model.exact_sampling import SIGNIFICANCE, exact_probabilities, exact_sequences, p_value, shapes_unchecked

# Any setting alone or with any other. Rewarding repetition (below 1) is allowed, and so are bounds that cut nothing.
SETTINGS = st.fixed_dictionaries(
    {"temperature": st.sampled_from([0.05, 0.3, 0.7, 1.0, 1.9, 50.0])},
    optional={
        "top_k": st.integers(1, 14),
        "top_p": st.sampled_from([0.013, 0.31, 0.57, 0.83, 0.97, 1.0]),
        "min_p": st.sampled_from([0.0, 0.02, 0.11, 0.43, 0.97, 1.0]),
        "repetition_penalty": st.sampled_from([0.4, 0.9, 1.0, 1.2, 3.0]),
    },
)
VOCABULARY = 12
# Distinct eighths: what is exactly equal is a test of its own.
LOGITS = st.lists(st.integers(-60, 60), min_size=VOCABULARY, max_size=VOCABULARY, unique=True).map(
    lambda eighths: [v / 8 for v in eighths]
)
HISTORY = st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=20)  # with repeats


def by_transformers(logits: list[float], history: list[int], **chosen) -> torch.Tensor:
    """The distribution that transformers' own processors leave, in float64, in the order of its generate()."""
    ids, scores = torch.tensor([history]), torch.tensor([logits], dtype=torch.float64)
    order = {
        "repetition_penalty": RepetitionPenaltyLogitsProcessor,
        "temperature": TemperatureLogitsWarper,
        "top_k": TopKLogitsWarper,
        "top_p": TopPLogitsWarper,
        "min_p": MinPLogitsWarper,
    }
    for name, processor in order.items():
        if name in chosen:
            scores = processor(chosen[name])(ids, scores)
    return scores.softmax(-1)[0]


def no_cut_lies_on_an_edge(logits: list[float], history: list[int], **chosen) -> bool:
    """No two logits are equal after the penalty, and no sum or ratio is within 1e-5 of the bound that it is held to."""
    bounds = {name: chosen.get(name) for name in ("top_p", "min_p")}
    rest = {name: value for name, value in chosen.items() if name not in bounds}
    p = sorted(exact_probabilities(logits, history, **rest), reverse=True)
    moved = penalised(torch.tensor(logits, dtype=torch.float64), history, chosen.get("repetition_penalty", 1.0))
    near = [abs(a - b) < 1e-6 for a, b in zip(moved.sort()[0][1:], moved.sort()[0][:-1], strict=True)]
    if bounds["top_p"] not in (None, 1.0):
        near += [abs(math.fsum(p[:n]) - bounds["top_p"]) < 1e-5 for n in range(1, VOCABULARY)]
    if bounds["min_p"]:
        near += [abs(v / p[0] - bounds["min_p"]) < 1e-5 for v in p[1:]]
    return not any(near)


@settings(max_examples=300, deadline=None)
@given(logits=LOGITS, history=HISTORY, chosen=SETTINGS)
def test_any_settings_together_leave_what_transformers_leaves_and_the_formulas(logits, history, chosen):
    assume(no_cut_lies_on_an_edge(logits, history, **chosen))
    found = Sampler(Sampling(**chosen)).probabilities(torch.tensor(logits), history)
    expected = exact_probabilities(logits, history, **chosen)
    assert found.dtype == torch.float32
    for token, (here, right) in enumerate(zip(found.tolist(), expected, strict=True)):
        assert here == 0 if right == 0 else (here > 0 or right < 1e-36), token  # below 1e-36 float32 may have lost it
    # an error of 8 eps in a logit of up to 60 / 0.05 is a relative error of its probability
    tolerance = 8 * torch.finfo(torch.float32).eps * (1 + 60 / chosen["temperature"])
    assert found.tolist() == pytest.approx(expected, rel=tolerance, abs=1e-36)
    theirs = by_transformers(logits, history, **chosen)
    assert theirs.tolist() == pytest.approx(expected, rel=1e-9, abs=1e-300)


@settings(max_examples=50, deadline=None)
@given(logits=LOGITS, history=HISTORY, penalty=st.sampled_from([0.4, 1.0, 1.3, 5.0]))
def test_greedy_takes_the_likeliest_after_the_penalty(logits, history, penalty):
    found = Sampler(Sampling(repetition_penalty=penalty))
    expected = exact_probabilities(logits, history, repetition_penalty=penalty)
    likeliest = expected.index(max(expected))
    theirs = by_transformers(logits, history, repetition_penalty=penalty)
    assume(sorted(expected)[-1] - sorted(expected)[-2] > 1e-6)
    assert found.pick(torch.tensor(logits), history) == likeliest == int(theirs.argmax())
    assert found.probabilities(torch.tensor(logits), history).tolist() == [float(i == likeliest) for i in range(12)]


# --- each cut by itself ------------------------------------------------------------------------------


def test_among_equals_top_k_keeps_k_top_p_the_fewest_and_min_p_all():
    equal = torch.zeros(10)
    for kept, cuts in ((3, {"top_k": 3}), (4, {"top_p": 0.35}), (10, {"min_p": 1.0}), (3, {"top_k": 5, "top_p": 0.5})):
        found = filtered_probabilities(equal, 1.0, **cuts)
        assert int((found > 0).sum()) == kept
        assert found.sum().item() == pytest.approx(1)
        assert found.max().item() == pytest.approx(1 / kept)
    of_two = filtered_probabilities(torch.tensor([1.0, 3.0, 3.0, 2.0]), 1.0, top_k=1)
    assert sorted(of_two.tolist()) == [0, 0, 0, 1]
    assert of_two.argmax() in (1, 2)
    assert filtered_probabilities(torch.tensor([1.0, 3.0, 3.0, 2.0]), 1.0, min_p=1.0).tolist() == [0, 0.5, 0.5, 0]


def test_the_nucleus_is_the_fewest_tokens_whose_mass_reaches_p():
    probabilities = [0.1, 0.5, 0.05, 0.3, 0.05]
    logits = torch.tensor(probabilities).log()
    for top_p, expected in (
        (0.1, [1]), (0.49, [1]), (0.51, [1, 3]), (0.79, [1, 3]), (0.81, [0, 1, 3]), (0.89, [0, 1, 3]),
        (0.92, [0, 1, 2, 3]), (0.96, [0, 1, 2, 3, 4]), (1.0, [0, 1, 2, 3, 4]),
    ):  # fmt: skip
        found = filtered_probabilities(logits, 1.0, top_p=top_p)
        mass = sum(probabilities[i] for i in expected)
        right = [v / mass if i in expected else 0 for i, v in enumerate(probabilities)]
        assert found.tolist() == pytest.approx(right, abs=1e-6), top_p


def test_a_bound_that_is_met_exactly_keeps_no_token_more_and_no_token_less():
    halves = torch.tensor([0.5, 0.25, 0.125, 0.125]).log()
    for top_p, kept in ((0.5, 1), (0.75, 2), (0.875, 3), (1.0, 4)):
        assert int((filtered_probabilities(halves, 1.0, top_p=top_p) > 0).sum()) == kept, top_p
    for min_p, kept in ((1.0, 1), (0.51, 1), (0.49, 2), (0.26, 2), (0.24, 4), (0.0, 4)):
        assert int((filtered_probabilities(halves, 1.0, min_p=min_p) > 0).sum()) == kept, min_p


def test_top_p_of_one_and_min_p_of_zero_cut_nothing_from_a_large_vocabulary():
    logits = 3 * torch.randn(2, 50257, generator=torch.Generator().manual_seed(0))
    whole = filtered_probabilities(logits, 1.0)
    assert torch.equal(filtered_probabilities(logits, 1.0, top_p=1.0, min_p=0.0, top_k=50257), whole)
    assert (whole > 0).all()


def test_top_p_and_min_p_judge_what_the_temperature_and_top_k_left():
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    # of three: 4/9, 3/9, 2/9, so that 0.75 is reached by the second; of all four by the third
    assert filtered_probabilities(logits, 1.0, top_k=3, top_p=0.75).tolist() == pytest.approx([4 / 7, 3 / 7, 0, 0])
    assert filtered_probabilities(logits, 1.0, top_p=0.75).tolist() == pytest.approx([4 / 9, 3 / 9, 2 / 9, 0])
    # halving the temperature squares the ratios: 0.3 / 0.4 is 0.5625 then
    assert int((filtered_probabilities(logits, 0.5, min_p=0.6) > 0).sum()) == 1
    assert int((filtered_probabilities(logits, 1.0, min_p=0.6) > 0).sum()) == 2


@pytest.mark.parametrize("temperature", [1e-3, 1e-20, 1e-45, 5e-324])
def test_a_tiny_temperature_is_greedy_and_never_overflows(temperature):
    logits = torch.tensor([[1e4, -1e4, 3.0], [0.5, 0.25, 2.0]])
    assert filtered_probabilities(logits, temperature).tolist() == [[1, 0, 0], [0, 0, 1]]
    assert sample(logits, temperature).tolist() == [0, 2]


def test_a_huge_temperature_makes_all_equal():
    assert filtered_probabilities(torch.tensor([5.0, -5.0, 0.0, 1.0]), 1e300).tolist() == [0.25] * 4


def test_the_penalty_moves_each_token_of_the_history_once_away_from_being_chosen():
    logits = torch.tensor([2.0, -2.0, 0.0, 2.0, -2.0], dtype=torch.float64)
    for history in ([0, 1, 2], [0, 0, 1, 2, 2, 1, 0], torch.tensor([2, 1, 0, 0])):
        assert penalised(logits, history, 1.25).tolist() == [1.6, -2.5, 0, 2, -2]
        assert penalised(logits, history, 0.8).tolist() == [2.5, -1.6, 0, 2, -2]  # below 1: towards it
    assert penalised(logits, [], 1.25).tolist() == logits.tolist()
    assert logits.tolist() == [2, -2, 0, 2, -2]  # the logits that were passed stay as they were


@pytest.mark.parametrize("penalty", [1e-320, 1e-40, 1e40, 1e300])
def test_an_extreme_penalty_never_overflows(penalty):
    for logits in ([3.0, 1.0], [-3.0, -1.0], [-3.0, 1.0]):
        probabilities = Sampler(Sampling(1.0, repetition_penalty=penalty)).probabilities(torch.tensor(logits), [0, 1])
        assert probabilities.sum().item() == pytest.approx(1)


@settings(max_examples=100, deadline=None)
@given(logits=LOGITS, history=HISTORY, chosen=SETTINGS)
def test_rows_of_a_batch_are_filtered_as_each_alone(logits, history, chosen):
    chosen.pop("repetition_penalty", None)
    rows = torch.tensor([logits, logits[::-1], [v / 2 for v in logits]])
    together = filtered_probabilities(rows, **chosen)
    for row, found in zip(rows, together, strict=True):
        assert torch.equal(found, filtered_probabilities(row, **chosen))


# --- draws -------------------------------------------------------------------------------------------

DRAWN = [
    {"temperature": 1.0},
    {"temperature": 1.3, "top_k": 4, "repetition_penalty": 1.7},
    {"temperature": 0.8, "top_p": 0.85},
    {"temperature": 2.0, "top_k": 5, "top_p": 0.95, "min_p": 0.1, "repetition_penalty": 0.6},
]


@pytest.mark.parametrize("chosen", DRAWN, ids=str)
def test_picks_follow_the_probabilities(chosen):
    """Chi-squared, significance 1e-3."""
    logits, history = torch.tensor([1.0, 0.2, -0.5, 2.0, 0.0, -3.0]), [3, 0, 3]
    expected = dict(enumerate(exact_probabilities(logits.tolist(), history, **chosen)))
    sampler = Sampler(Sampling(**chosen, seed=0))
    assert sampler.probabilities(logits, history).tolist() == pytest.approx(list(expected.values()), rel=1e-5)
    with shapes_unchecked():
        drawn = [sampler.pick(logits, history) for _ in range(3000)]
    assert p_value(drawn, expected) > SIGNIFICANCE
    rows = logits.expand(3000, -1)
    if "repetition_penalty" not in chosen:
        drawn = sample(rows, **chosen, generator=torch.Generator().manual_seed(0)).tolist()
        assert p_value(drawn, expected) > SIGNIFICANCE


@pytest.fixture(scope="module")
def five_words(build):
    """A model of five words, and its logits after any text, read once."""
    model = build(
        seed=3, vocab_size=5, context_length=8, emb_dim=8, n_heads=2, n_layers=1, init_std=0.5, tie_weights=False
    )
    known = {}

    def logits_after(text: tuple[int, ...]) -> list[float]:
        if text not in known:
            with torch.no_grad():
                known[text] = model(torch.tensor([text]))[0, -1].tolist()
        return known[text]

    return logits_after


@pytest.mark.parametrize("chosen", DRAWN, ids=str)
def test_whole_sequences_follow_the_model_s_distribution(chosen, five_words):
    """All 125 continuations by three tokens, each with its exact probability. Chi-squared, significance 1e-3."""
    expected = exact_sequences(five_words, (2, 4), 3, **chosen)
    assert len(expected) <= 125
    assert math.fsum(expected.values()) == pytest.approx(1)
    assert sorted(expected.values())[-1] < 0.5  # no foregone conclusion
    drawn, sampler = [], Sampler(Sampling(**chosen, seed=1))
    with shapes_unchecked():
        for _ in range(2000):
            text = (2, 4)
            for _ in range(3):
                text += (sampler.pick(torch.tensor(five_words(text)), text),)
            drawn.append(text[2:])
    assert p_value(drawn, expected) > SIGNIFICANCE


def test_what_one_sampler_draws_does_not_depend_on_others_drawing_in_between():
    logits = torch.randn(50, generator=torch.Generator().manual_seed(0))
    settings_of = [Sampling(1.0, seed=5), Sampling(1.0, seed=6), Sampling(0.5, top_k=3, seed=5)]
    alone = [[sampler.pick(logits) for _ in range(30)] for sampler in map(Sampler, settings_of)]
    torch.manual_seed(99)
    state = torch.get_rng_state()
    together, turns = [[] for _ in alone], [*range(3)] * 30
    samplers = [Sampler(chosen) for chosen in settings_of]
    for turn in turns[::-1]:
        together[turn].append(samplers[turn].pick(logits))
    assert together == alone
    assert torch.equal(torch.get_rng_state(), state)
    assert alone[0] != alone[1]


def test_without_a_seed_torch_s_own_state_decides():
    logits, drawn = torch.zeros(100), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append([Sampler(Sampling(1.0)).pick(logits) for _ in range(10)])
    assert drawn[0] == drawn[1] != drawn[2]


# --- settings that make no sense ---------------------------------------------------------------------


def wrong_settings(**values) -> Sampling:
    """Settings of any type, as a caller without type checks passes them: in the tests `Sampling(...)` itself checks."""
    made = Sampling()
    for name, value in values.items():
        object.__setattr__(made, name, value)
    return made


def named(sampling: Sampling) -> list[str]:
    return [problem.split()[0] for problem in sampling.problems()]


def test_every_problem_is_listed_at_once_each_by_name():
    wrong = wrong_settings(temperature=-1, top_k=0, top_p=1.5, min_p=-0.1, repetition_penalty=0, seed=-1)
    assert named(wrong) == ["temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed"]
    of_wrong_types = wrong_settings(
        temperature="hot", top_k=2.5, top_p="all", min_p=True, repetition_penalty=None, seed=float("nan")
    )
    assert named(of_wrong_types) == named(wrong)
    assert named(wrong_settings(temperature="hot", top_k=0, seed=1.5)) == ["temperature", "top_k", "seed"]
    for problem in (*wrong.problems(), *of_wrong_types.problems()):
        assert ", got " in problem


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("temperature", [-0.1, math.inf, math.nan, None, True, "1"]),
        ("top_k", [0, -3, 1.0, math.nan, False, "5"]),
        ("top_p", [0.0, -0.1, 1.0001, math.nan, True, "0.9"]),
        ("min_p", [-0.1, 1.0001, math.nan, True, "0.1"]),
        ("repetition_penalty", [0, -1.0, math.inf, math.nan, None, True]),
        ("seed", [-1, 2**63, 0.5, math.nan, True, "0"]),
    ],
)
def test_one_wrong_setting_is_the_one_that_is_named(name, values):
    for value in values:
        (problem,) = wrong_settings(**{"temperature": 1.0, name: value}).problems()
        assert problem.startswith(f"{name} must be ")
        assert f"got {value!r}" in problem


def test_cuts_of_a_greedy_choice_contradict_it():
    (problem,) = Sampling(top_k=5, min_p=0.1).problems()
    assert problem.startswith("temperature 0 always takes the likeliest token, and top_k, min_p would change nothing")
    assert Sampling(temperature=0.7, top_k=5, min_p=0.1).problems() == []


def test_settings_at_the_ends_of_their_ranges_are_fine():
    assert Sampling().problems() == []
    assert Sampling(5e-324, top_k=1, top_p=5e-324, min_p=0.0, repetition_penalty=0.1, seed=0).problems() == []
    whole = wrong_settings(temperature=1, top_k=10**9, top_p=1, min_p=1, repetition_penalty=1, seed=2**63 - 1)
    assert whole.problems() == []
