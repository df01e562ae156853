"""Speculative decoding writes what the model alone would: greedily the same tokens, by chance the same distribution."""

import math
from functools import cache as remembered
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor

from GPT2Model.generation import make_cache
from GPT2Model.gpt2 import GPTModel
from GPT2Model.quantization import quantize_int8
from GPT2Model.sampling import Sampler, Sampling
from GPT2Model.speculative import SpeculativeResult, count_accepted, generate_speculative, residual
from tests.GPT2Model.exact_sampling import SIGNIFICANCE, exact_probabilities, exact_sequences, p_value, shapes_unchecked

# --- greedy: the plain loop's tokens -----------------------------------------------------------------

LIVELY = {"n_layers": 1, "init_std": 0.6, "tie_weights": False}  # a tied head would say the last token again and again


@pytest.fixture(scope="module")
def pairs(build, perturb):
    """Models, each with drafts: nearly the same, in 8 bits, another, of another shape, of a short context, itself."""

    def drafts(model, **changes):
        near = perturb(build(seed=1, **changes), seed=7, scale=0.01)
        other = build(seed=2, **changes)
        narrow = build(seed=3, **{**LIVELY, "emb_dim": 12, "n_heads": 2})
        short = perturb(build(seed=1, **{**changes, "context_length": 24}), seed=7, scale=0.01)
        if changes.get("positions") != "rope":  # the first positions are the model's
            short = GPTModel({**model.cfg, "context_length": 11}).double().eval()
            weights = near.state_dict()
            weights["position_embedding.weight"] = weights["position_embedding.weight"][:11]
            short.load_state_dict(weights)
        return {
            "near": near,
            "int8": quantize_int8(model),
            "other": other,
            "narrow": narrow,
            "short": short,
            "itself": model,
        }

    kinds = {"gpt2": LIVELY, "rope": {**LIVELY, "positions": "rope", "n_kv_heads": 1, "norm": "rmsnorm"}}
    models = {name: build(seed=1, **changes) for name, changes in kinds.items()}
    return {name: (model, drafts(model, **kinds[name])) for name, model in models.items()}


@torch.no_grad()
def plain_loop(model, ids: torch.Tensor, new_tokens: int, stops=(), penalty: float = 1.0) -> torch.Tensor:
    """One token at a time, the whole text read again for each; the penalty is transformers' own."""
    for _ in range(new_tokens):
        logits = RepetitionPenaltyLogitsProcessor(penalty)(ids, model(ids)[:, -1])
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
        if int(ids[0, -1]) in stops:
            break
    return ids


CALLS = st.fixed_dictionaries(
    {
        "kind": st.sampled_from(["gpt2", "rope"]),
        "draft": st.sampled_from(["near", "other", "narrow", "short", "int8", "itself"]),
        "prompt": st.integers(1, 11),
        "new": st.integers(0, 13),
        "draft_tokens": st.integers(1, 6),
        "penalty": st.sampled_from([1.0, 1.0, 1.4, 0.7]),
        "stop": st.none() | st.integers(0, 12),
        "seed": st.integers(0, 5),
    }
)


@settings(max_examples=250, deadline=None)
@given(call=CALLS)
@shapes_unchecked()
def test_greedy_text_is_the_plain_loop_s_with_any_draft(call, pairs, random_ids):
    model, drafts = pairs[call["kind"]]
    ids, new, penalty = random_ids(1, call["prompt"], seed=call["seed"]), call["new"], call["penalty"]
    expected = plain_loop(model, ids, new, penalty=penalty)
    stops = ()
    if call["stop"] is not None and new:
        stops = {int(expected[0, -1 - call["stop"] % new])}
        expected = plain_loop(model, ids, new, stops, penalty)
    shown = []
    found = generate_speculative(
        model, drafts[call["draft"]], ids, new, Sampling(repetition_penalty=penalty), stop_tokens=stops,
        draft_tokens=call["draft_tokens"], on_token=shown.append,
    )  # fmt: skip
    assert torch.equal(found.ids, expected)
    assert found.ids.dtype == ids.dtype
    assert [token.tolist() for token in shown] == [[token] for token in expected[0, ids.shape[1] :].tolist()]
    assert 0 <= found.accepted <= found.proposed
    if call["draft"] == "itself":
        assert found.accepted == found.proposed


@shapes_unchecked()
def test_the_texts_vary_and_a_near_draft_is_accepted_more_often_than_another(pairs, random_ids):
    for model, drafts in pairs.values():
        rates, said = {name: [0, 0] for name in drafts}, set()
        for seed in range(3):
            ids = random_ids(1, 6, seed=seed)
            for name, draft in drafts.items():
                found = generate_speculative(model, draft, ids, 18)
                rates[name] = [rates[name][0] + found.accepted, rates[name][1] + found.proposed]
            said |= set(found.ids[0, 6:].tolist())
        assert len(said) > 10
        rates = {name: accepted / proposed for name, (accepted, proposed) in rates.items()}
        assert rates["itself"] == 1
        assert 0.5 < rates["near"] < 1
        assert rates["int8"] > 0.5
        assert 0 <= rates["other"] < 0.2


# --- sampled: the exact distribution -----------------------------------------------------------------


class TableModel(GPTModel):
    """A language model with any distribution one likes: its logits are a function of the whole text before them.

    It reads that text back out of its cache, so a cache that holds other tokens gives other logits.
    """

    def __init__(self, logits_after, vocab_size: int = 3, context_length: int = 16):
        sizes = {"emb_dim": 1, "n_heads": 1, "n_layers": 1, "drop_rate": 0.0}
        super().__init__({"vocab_size": vocab_size, "context_length": context_length, **sizes})
        self.double().eval()
        self.logits_after, self.passes = remembered(logits_after), []

    def forward(self, ids, padding_mask=None, cache=None):
        self.passes.append(ids[0].tolist())
        tokens = ids.double()[:, None, :, None]
        text = tuple(cache.layers[0].append(tokens, tokens)[0].flatten().long().tolist())
        ends = range(len(text) - ids.shape[1] + 1, len(text) + 1)
        return torch.tensor([self.logits_after(text[:end]) for end in ends], dtype=torch.float64)[None]


def table(seed: int, text: tuple[int, ...], vocab_size: int = 3) -> list[float]:
    """Random logits, others after every text."""
    number = sum((token + 1) * (vocab_size + 1) ** i for i, token in enumerate(text))
    generator = torch.Generator().manual_seed(1000 * number + seed)
    return (1.5 * torch.randn(vocab_size, generator=generator, dtype=torch.float64)).tolist()


def near(text: tuple[int, ...]) -> list[float]:
    return [a + 0.4 * b for a, b in zip(table(0, text), table(1, text), strict=True)]


def adverse(text: tuple[int, ...]) -> list[float]:
    """No chance at all for what the model likes best, and much for what it likes least."""
    logits = table(0, text)
    return [-math.inf if v == max(logits) else -2 * v for v in logits]


MODEL, PROMPT = partial(table, 0), (1, 1)
DRAFTS = {"near": near, "other": partial(table, 1), "adverse": adverse}
SETTINGS = [
    ("near", 3, {"temperature": 1.0}),
    ("other", 1, {"temperature": 1.0}),
    ("other", 2, {"temperature": 1.3, "top_k": 2}),
    ("other", 3, {"temperature": 1.0, "repetition_penalty": 2.5}),
    ("adverse", 1, {"temperature": 0.7, "top_p": 0.9}),
    ("adverse", 2, {"temperature": 1.6, "min_p": 0.1, "repetition_penalty": 0.6}),
]


@pytest.mark.parametrize(("draft", "draft_tokens", "chosen"), SETTINGS, ids=str)
@shapes_unchecked()
def test_three_tokens_together_follow_the_model_s_own_distribution(draft, draft_tokens, chosen):
    """All 27 continuations, each with its exact probability. Chi-squared, significance 1e-3."""
    expected = exact_sequences(MODEL, PROMPT, 3, **chosen)
    model, other = TableModel(MODEL), TableModel(DRAFTS[draft])
    write = partial(
        generate_speculative, model, other, torch.tensor([PROMPT]), 3, Sampling(**chosen), draft_tokens=draft_tokens
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        drawn = [tuple(write().ids[0, 2:].tolist()) for _ in range(600)]
    assert p_value(drawn, expected) > SIGNIFICANCE


VOCABULARY = 6
P = [0.30, 0.25, 0.20, 0.15, 0.10, 0.0]
PROPOSED_FROM = {
    "near": [0.28, 0.27, 0.18, 0.14, 0.12, 0.01],
    "other": [0.05, 0.05, 0.10, 0.20, 0.25, 0.35],
    "apart": [0.0, 0.0, 0.0, 0.0, 0.0, 1.0],
    "part": [0.0, 0.0, 1.0, 0.0, 0.0, 0.0],
    "same": P,
}


@pytest.mark.parametrize("name", PROPOSED_FROM)
@shapes_unchecked()
def test_one_guess_judged_and_replaced_has_the_distribution_p(name):
    """Chi-squared, significance 1e-3; and accepted as often as sum min(p, q) says, within 4 standard errors."""
    p, q = (torch.tensor(values, dtype=torch.float64) for values in (P, PROPOSED_FROM[name]))
    sampler, drawn, accepted = Sampler(Sampling(1.0, seed=0)), [], 0
    for _ in range(4000):
        guess = sampler.draw(q)
        n = count_accepted([p], [q], [guess], sampler)
        accepted += n
        drawn.append(guess if n else sampler.draw(residual(p, q)))
    assert p_value(drawn, dict(enumerate(P))) > SIGNIFICANCE
    beta = math.fsum(map(min, P, PROPOSED_FROM[name]))
    assert abs(accepted - 4000 * beta) <= 4 * math.sqrt(4000 * beta * (1 - beta)) + 1e-9


def test_the_rest_is_what_q_leaves_of_p_also_where_rounding_leaves_nothing():
    p, q = (torch.tensor(values, dtype=torch.float64) for values in ([0.5, 0.3, 0.2], [0.2, 0.4, 0.4]))
    assert residual(p, q).tolist() == pytest.approx([1, 0, 0])
    assert residual(q, p).tolist() == pytest.approx([0, 1 / 3, 2 / 3])
    assert residual(p, p).tolist() == p.tolist()
    nowhere_less = p * (1 + 1e-15)
    assert residual(p, nowhere_less).tolist() == p.tolist()


def expected_counts(beta: float, draft_tokens: int, new_tokens: int) -> float:
    """How many guesses are accepted until `new_tokens` are written, if each is with chance beta.

    A round of gamma guesses accepts n < gamma of them with chance beta^n (1 - beta), and all with beta^gamma. It writes
    n + 1 tokens.
    """
    if new_tokens <= 1:
        return 0.0
    gamma = min(draft_tokens, new_tokens - 1)
    chances = [beta**n * (1 - beta) for n in range(gamma)] + [beta**gamma]
    return math.fsum(p * (n + expected_counts(beta, draft_tokens, new_tokens - n - 1)) for n, p in enumerate(chances))


@pytest.mark.parametrize("draft_tokens", [1, 4])
@shapes_unchecked()
def test_as_many_guesses_are_accepted_as_the_overlap_of_p_and_q_says(draft_tokens):
    """Two models whose p and q are the same after every text: E[accepted] in closed form, within 4 standard errors."""
    p, q = [0.5, 0.3, 0.2], [0.2, 0.3, 0.5]
    model, draft = (TableModel(lambda _, row=row: [math.log(v) for v in row], context_length=40) for row in (p, q))
    chosen = {"temperature": 1.5, "top_k": 2}
    beta = math.fsum(map(min, *(exact_probabilities([math.log(v) for v in row], **chosen) for row in (p, q))))
    assert 0.2 < beta < 0.8
    found = [
        generate_speculative(
            model, draft, torch.tensor([[0]]), 12, Sampling(**chosen, seed=seed), draft_tokens=draft_tokens
        )
        for seed in range(150)
    ]
    judged = sum(result.accepted + result.rejected for result in found)
    rate = sum(result.accepted for result in found) / judged
    assert abs(rate - beta) <= 4 * math.sqrt(beta * (1 - beta) / judged)
    counts = torch.tensor([result.accepted for result in found], dtype=torch.float64)
    error = float(counts.std()) / math.sqrt(len(counts))
    assert abs(float(counts.mean()) - expected_counts(beta, draft_tokens, 12)) <= 4 * error


# --- passes and caches -------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    draft=st.sampled_from(sorted(DRAFTS)),
    draft_tokens=st.integers(1, 5),
    new=st.integers(0, 12),
    stops=st.sets(st.integers(0, 2), max_size=1),
    seed=st.integers(0, 99),
    draft_context=st.integers(2, 16),
)
def test_passes_are_as_many_as_the_counts_say_and_read_only_what_is_new(
    draft, draft_tokens, new, stops, seed, draft_context
):
    model, guesser = TableModel(MODEL), TableModel(DRAFTS[draft], context_length=draft_context)
    chosen = Sampling(1.0, seed=seed)
    found = generate_speculative(
        model, guesser, torch.tensor([PROMPT]), new, chosen, draft_tokens=draft_tokens, stop_tokens=stops
    )
    text = found.ids[0].tolist()
    written = len(text) - len(PROMPT)
    guessed_stop = found.accepted + found.rounds == written + 1
    assert written <= new
    assert written == new or text[-1] in stops
    assert not set(text[2:-1]) & stops
    assert guessed_stop <= (text[-1] in stops)
    assert found.accepted + found.rounds == written + guessed_stop
    assert found.rejected <= found.rounds
    assert found.accepted + found.rejected <= found.proposed
    if draft_tokens == 1:
        assert found.accepted + found.rejected == found.proposed
    assert len(model.passes) == found.rounds
    assert len(guesser.passes) == found.proposed
    assert found.proposed <= draft_tokens * found.rounds
    # The prompt once, then in each pass the token that the model wrote last, and the guesses.
    guesses_read = sum(len(tokens) - 1 for tokens in model.passes) - (len(PROMPT) - 1 if model.passes else 0)
    assert guesses_read == found.proposed
    assert all(len(tokens) <= 2 for tokens in guesser.passes[1:])  # two where all was accepted: it read neither
    if draft_context == 2 and new > 1:
        assert found.proposed == 1  # behind the prompt its context is full, and the model goes on alone


@pytest.mark.parametrize("chosen", [Sampling(), Sampling(1.0, seed=3)], ids=["greedy", "sampled"])
@pytest.mark.parametrize("draft", ["near", "other", "narrow"])
def test_the_caches_hold_exactly_the_text_so_far(chosen, draft, pairs, random_ids):
    """Before every pass, what is cached is what a fresh cache holds that has read the same tokens."""
    model, drafts = pairs["gpt2"]
    ids, text, caches = random_ids(1, 5), [], {}
    text += ids[0].tolist()

    def look(module, args, kwargs):
        cache, unread = kwargs["cache"], args[0][0].tolist()
        caches[module] = cache
        same_as_fresh(module, cache)
        if module is model and cache.length:
            assert cache.length == len(text) - 1
            assert unread[0] == text[-1]

    def same_as_fresh(module, cache):
        length = min(cache.length, len(text))  # behind the text there may be guesses, in the draft's cache
        fresh = make_cache(module, 1, 24)
        if length:
            type(module).forward(module, torch.tensor([text[:length]]), cache=fresh)
        for layer, right in zip(cache.layers, fresh.layers, strict=True):
            torch.testing.assert_close(layer.keys[:, :, :length], right.keys[:, :, :length], rtol=0, atol=1e-12)
            torch.testing.assert_close(layer.values[:, :, :length], right.values[:, :, :length], rtol=0, atol=1e-12)

    hooks = [module.register_forward_pre_hook(look, with_kwargs=True) for module in (model, drafts[draft])]
    try:
        found = generate_speculative(model, drafts[draft], ids, 15, chosen, on_token=lambda new: text.append(int(new)))
    finally:
        for hook in hooks:
            hook.remove()
    assert found.ids[0].tolist() == text
    assert caches[model].length == len(text) - 1
    assert caches[drafts[draft]].length <= len(text) - 1
    for module, cached in caches.items():
        same_as_fresh(module, cached)


@shapes_unchecked()
def test_a_run_that_is_accepted_ends_at_its_stop(pairs, random_ids):
    """The draft is the model, so all is accepted: a stop in the middle of a run is the last token all the same."""
    model, ids = pairs["gpt2"][0], random_ids(1, 6, seed=1)
    free = plain_loop(model, ids, 18)[0].tolist()
    for place in range(6, 24):
        first = free.index(free[place], 6)
        for stops in (free[place], {free[place]}, [free[place]]):
            found = generate_speculative(model, model, ids, 18, draft_tokens=7, stop_tokens=stops)
            assert found.ids[0].tolist() == free[: first + 1]
    in_the_prompt = next(token for token in ids[0].tolist() if token not in free[6:])
    assert generate_speculative(model, model, ids, 18, stop_tokens=in_the_prompt).ids[0].tolist() == free


# --- seeds and manners -------------------------------------------------------------------------------


def test_a_seed_gives_the_same_text_again_and_torch_s_state_stays_as_it_was(pairs, random_ids):
    model, drafts = pairs["gpt2"]
    write = partial(generate_speculative, model, drafts["near"], random_ids(1, 5), 15)
    first = write(Sampling(1.0, seed=7))
    torch.manual_seed(99)
    state = torch.get_rng_state()
    assert torch.equal(write(Sampling(1.0, seed=7)).ids, first.ids)
    assert not torch.equal(write(Sampling(1.0, seed=8)).ids, first.ids)
    write()
    assert torch.equal(torch.get_rng_state(), state)
    texts = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        texts.append(write(Sampling(1.0)).ids.tolist())
    assert texts[0] == texts[1] != texts[2]


def test_modes_and_prompts_are_left_as_they_were_also_after_an_error(build, random_ids):
    model, draft = build(drop_rate=0.5, **LIVELY).train(), build(seed=2, drop_rate=0.5, **LIVELY).train()
    draft.blocks[0].eval()
    ids, modes = random_ids(1, 4), []
    kept = ids.clone()
    expected = plain_loop(build(**LIVELY), ids, 6)
    found = generate_speculative(
        model, draft, ids, 6, on_token=lambda _: modes.append((model.training, draft.training))
    )
    assert torch.equal(found.ids, expected)
    assert not found.ids.requires_grad
    assert torch.equal(ids, kept)
    assert set(modes) == {(False, False)}

    def fail(_):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        generate_speculative(model, draft, ids, 6, on_token=fail)
    assert all(module.training for module in model.modules())
    assert draft.training
    assert not any(module.training for module in draft.blocks[0].modules())


def test_the_rate_is_accepted_of_judged():
    nine, two = torch.zeros(1, 9, dtype=torch.long), torch.zeros(1, 2, dtype=torch.long)
    assert SpeculativeResult(nine, proposed=9, accepted=6, rejected=2, rounds=2).acceptance_rate == 0.75
    assert math.isnan(SpeculativeResult(two, proposed=0, accepted=0, rejected=0, rounds=1).acceptance_rate)


# --- what is refused ---------------------------------------------------------------------------------


def test_every_problem_is_listed_at_once(build):
    model, draft = build(**LIVELY), build(**{**LIVELY, "vocab_size": 17, "context_length": 3}).to("meta")
    ids = torch.tensor([[1, 2, 3, 99]] * 2)
    with pytest.raises(ValueError) as caught:
        generate_speculative(model, draft, ids, -1, Sampling(-1.0, top_k=0), draft_tokens=0, stop_tokens=[61, 0])
    problems = str(caught.value).splitlines()
    assert problems[0] == "generate_speculative() cannot run:"
    for problem, expected in zip(
        problems[1:],
        (
            "temperature must be", "top_k must be", "max_new_tokens must be", "got 61", "must be in 0..60, got 1..99",
            "vocabulary has 17 tokens, the model's 61", "the model is on cpu, the draft on meta",
            "draft_tokens must be a whole number, 1 or more, got 0", "got 2 rows", "the draft reads 3",
        ),
        strict=True,
    ):  # fmt: skip
        assert expected in problem


def test_texts_longer_than_a_context_are_refused(build, random_ids):
    model, draft = build(**LIVELY), build(**{**LIVELY, "context_length": 5})
    with pytest.raises(ValueError, match=r"6 tokens and 19 new ones are more than the model's context_length=24.*\n.*"
                       r"the prompt has 6 tokens and the draft reads 5"):  # fmt: skip
        generate_speculative(model, draft, random_ids(1, 6), 19)
    assert generate_speculative(model, draft, random_ids(1, 5), 19).ids.shape == (1, 24)
    assert generate_speculative(model, model, random_ids(1, 24), 0).ids.shape == (1, 24)


@pytest.mark.parametrize(
    ("wrong", "expected"),
    [
        ({"ids": torch.zeros(1, 0, dtype=torch.long)}, r"one token at least.*got \(1, 0\)"),
        ({"ids": torch.tensor([[-1]])}, r"got -1\.\.-1: wrong tokenizer"),
        ({"max_new_tokens": -1}, "max_new_tokens must be a whole number, 0 or more, got -1"),
        ({"draft_tokens": 0}, "draft_tokens must be a whole number, 1 or more, got 0"),
        ({"stop_tokens": -1}, r"ids in 0\.\.60, got -1"),
        ({"ids": torch.zeros(2, 3, dtype=torch.long)}, "one prompt.*got 2 rows"),
        ({"max_new_tokens": 21}, "4 tokens and 21 new ones are more than the model's context_length=24"),
        ({"sampling": Sampling(top_k=3)}, "temperature 0 always takes the likeliest"),
    ],
    ids=lambda value: str(value) if isinstance(value, str) else next(iter(value)),
)
def test_one_wrong_argument_is_refused_by_name(wrong, expected, build, random_ids):
    model = build(**LIVELY)
    call = {"ids": random_ids(1, 4), "max_new_tokens": 2, **wrong}
    with pytest.raises(ValueError, match=expected) as caught:
        generate_speculative(model, model, **call)
    assert len(str(caught.value).splitlines()) == 2


def test_logits_of_nan_are_an_error_of_ours(build):
    model = build(seed=1)
    with torch.no_grad():
        model.final_norm.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="logits are NaN"):
        generate_speculative(model, build(seed=2), torch.tensor([[1, 2, 3]]), 4)
