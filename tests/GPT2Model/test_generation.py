"""generate() writes what the model's distribution says: greedily, by chance, with a cache and without."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from GPT2Model.generation import generate, make_cache, problems_of
from GPT2Model.sampling import Sampling


@pytest.fixture(scope="module")
def model(build):
    """Large weights and a head of its own, so that the greedy text varies; context_length 24."""
    return build(seed=1, init_std=0.6, tie_weights=False)


def by_argmax(model, ids: torch.Tensor, new_tokens: int) -> torch.Tensor:
    """Greedy decoding with nothing in it: read the last 24 tokens, take the likeliest, append."""
    for _ in range(new_tokens):
        ids = torch.cat([ids, model(ids[:, -24:])[:, -1].argmax(-1, keepdim=True)], 1)
    return ids


# --- greedy ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_cache", [True, False], ids=["cached", "uncached"])
@pytest.mark.parametrize(("prompt", "new"), [(1, 5), (9, 15), (9, 40), (24, 3), (30, 5), (5, 0)])
def test_greedy_is_a_plain_argmax_loop_also_past_the_context(prompt, new, use_cache, model, random_ids):
    ids = random_ids(3, prompt, seed=prompt)
    found = generate(model, ids, new, use_cache=use_cache, past_context="slide")
    assert found.shape == (3, prompt + new)
    assert torch.equal(found, by_argmax(model, ids, new))


@settings(max_examples=12, deadline=None)
@given(lengths=st.lists(st.integers(1, 12), min_size=1, max_size=4), new=st.integers(1, 30), use_cache=st.booleans())
def test_each_row_of_a_left_padded_batch_is_written_as_if_alone(lengths, new, use_cache, model, random_ids):
    longest = max(lengths)
    ids, mask = random_ids(len(lengths), longest, seed=new), torch.zeros(len(lengths), longest, dtype=torch.bool)
    for row, length in zip(mask, lengths, strict=True):
        row[-length:] = True
    found = generate(model, ids, new, padding_mask=mask, use_cache=use_cache, past_context="slide")
    for row, real, text in zip(ids, mask, found, strict=True):
        assert torch.equal(text[longest:], by_argmax(model, row[real][None], new)[0, -new:])


@settings(max_examples=12, deadline=None)
@given(lengths=st.lists(st.integers(1, 12), min_size=1, max_size=4), new=st.integers(1, 12))
def test_pages_give_the_same_text_row_by_row(lengths, new, model, random_ids):
    longest = max(lengths)
    ids, mask = random_ids(len(lengths), longest, seed=new), torch.ones(len(lengths), longest, dtype=torch.bool)
    for row, length in zip(mask, lengths, strict=True):
        row[: longest - length] = False
    read = []
    with model.using_attention("paged_attention"):
        hook = model.register_forward_hook(lambda *_: read.append(1))
        found = generate(model, ids, new, padding_mask=mask)
        hook.remove()
    assert read == []  # all went through the pages, and nothing through the model's own forward pass
    for row, real, text in zip(ids, mask, found, strict=True):
        assert torch.equal(text[longest:], by_argmax(model, row[real][None], new)[0, -new:])


VARIANTS = {
    "rmsnorm": {"norm": "rmsnorm"},
    "swiglu": {"mlp": "swiglu"},
    "rope": {"positions": "rope"},
    "shared heads": {"n_kv_heads": 1},
    "all": {"norm": "rmsnorm", "mlp": "swiglu", "positions": "rope", "n_kv_heads": 1},
}


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_a_variant_writes_the_same_with_a_cache_without_and_by_hand_also_past_the_context(changes, build, random_ids):
    """Past 24 tokens the window slides: with rope too every position changes, and a cache holds keys turned before."""
    # Large weights and a head of its own: a tied one would say the last token again and again.
    model = build(seed=1, init_std=0.6, tie_weights=False, **changes)
    ids = random_ids(3, 9, seed=9)
    expected = by_argmax(model, ids, 22)
    assert min(len(set(row)) for row in expected[:, 9:].tolist()) > 4
    for use_cache in (True, False):
        assert torch.equal(generate(model, ids, 22, use_cache=use_cache, past_context="slide"), expected)
    mask = torch.ones(3, 9, dtype=torch.bool)
    mask[0, :5], mask[1, :1] = False, False
    padded = generate(model, ids, 22, padding_mask=mask, past_context="slide")
    for row in (0, 2):
        assert torch.equal(padded[row, 9:], by_argmax(model, ids[row, mask[row]][None], 22)[0, -22:])


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_a_cache_has_the_key_value_heads_of_the_model_and_no_more(changes, build, random_ids):
    model = build(torch.float32, **changes)
    cache = make_cache(model, 2, 20)
    assert cache.nbytes == 2 * 4 * 2 * (2 * 20 * changes.get("n_kv_heads", 5) * 6)  # keys, values; bytes; layers
    ids = random_ids(2, 20)
    with torch.no_grad():
        parts = [model(part, cache=cache) for part in ids.split([7, 1, 12], dim=1)]
        whole = model(ids)
    eps = torch.finfo(torch.float32).eps
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=100 * eps * float(whole.abs().max()))


def test_a_cached_step_reads_one_token_and_an_uncached_one_reads_all(model, random_ids):
    for use_cache, expected in ((True, [9, 1, 1, 1]), (False, [9, 10, 11, 12])):
        read = []
        hook = model.token_embedding.register_forward_pre_hook(lambda _m, args, to=read: to.append(args[0].shape[1]))
        generate(model, random_ids(2, 9), 4, use_cache=use_cache)
        hook.remove()
        assert read == expected


# --- distributions -----------------------------------------------------------------------------------


def test_sampled_texts_follow_the_model_s_own_distribution(model, random_ids):
    n, ids = 4000, random_ids(1, 7)
    with torch.no_grad():
        expected = (model(ids)[0, -1] / 0.7).softmax(-1)
    counts = generate(model, ids.expand(n, -1), 1, 0.7, seed=0)[:, -1].bincount(minlength=61)
    bound = 4.5 * (n * expected * (1 - expected)).sqrt() + 1
    assert ((counts - n * expected).abs() <= bound).all()


@pytest.mark.parametrize("use_cache", [True, False], ids=["cached", "uncached"])
def test_the_repetition_penalty_is_a_plain_loop_that_divides_what_was_seen(use_cache, model, random_ids):
    """The padding of a shorter row was not seen, though its ids are those of tokens."""
    ids, mask = random_ids(2, 9, seed=3), torch.ones(2, 9, dtype=torch.bool)
    mask[0, :4], ids[0, :4] = False, torch.arange(4)
    found = generate(model, ids, 15, repetition_penalty=1.7, padding_mask=mask, use_cache=use_cache)
    for row, real, text in zip(ids, mask, found.tolist(), strict=True):
        expected = row[real].tolist()
        for _ in range(15):
            scores = model(torch.tensor([expected]))[0, -1].tolist()
            for seen in set(expected):
                scores[seen] = scores[seen] / 1.7 if scores[seen] > 0 else scores[seen] * 1.7
            expected.append(max(range(61), key=scores.__getitem__))
        assert text[9:] == expected[-15:]
    assert not torch.equal(found, generate(model, ids, 15, padding_mask=mask))


def test_each_of_the_settings_reaches_the_draw(model, random_ids):
    """Of one distribution: what each setting leaves is drawn, all of it, and nothing else."""
    ids = random_ids(1, 7)
    with torch.no_grad():
        chances = (model(ids)[0, -1] / 1.5).softmax(-1)
    ordered = chances.sort(descending=True)
    for setting, kept in (
        ({"top_k": 5}, ordered.indices[:5]),
        ({"top_p": 0.5}, ordered.indices[: int((ordered.values.cumsum(0) < 0.5).sum()) + 1]),
        ({"min_p": 0.5}, (chances >= 0.5 * chances.max()).nonzero()[:, 0]),
    ):
        drawn = generate(model, ids.expand(600, -1), 1, 1.5, seed=0, **setting)[:, -1]
        assert 1 < len(kept) < 61
        assert set(drawn.tolist()) == set(kept.tolist()), setting


@settings(max_examples=8, deadline=None)
@given(lengths=st.lists(st.integers(1, 10), min_size=2, max_size=5), seed=st.integers(0, 2**62))
def test_a_row_is_drawn_as_if_alone_with_its_own_seed(lengths, seed, model, random_ids):
    longest = max(lengths)
    ids, mask = (
        random_ids(len(lengths), longest, seed=len(lengths)),
        torch.ones(len(lengths), longest, dtype=torch.bool),
    )
    for row, length in zip(mask, lengths, strict=True):
        row[: longest - length] = False
    chosen = {"temperature": 1.3, "top_k": 40, "top_p": 0.95, "repetition_penalty": 1.1}
    found = generate(model, ids, 12, **chosen, padding_mask=mask, seed=seed)
    for i, (row, real) in enumerate(zip(ids, mask, strict=True)):
        alone = generate(model, row[real][None], 12, **chosen, seed=seed + i)
        assert torch.equal(found[i, longest:], alone[0, -12:])


def test_rows_of_the_same_prompt_get_different_texts(model, random_ids):
    found = generate(model, random_ids(1, 5).expand(8, -1), 15, 1.0, seed=0)
    assert len({tuple(row) for row in found.tolist()}) == 8


def test_a_seed_gives_the_same_text_again_with_and_without_a_cache(model, random_ids):
    ids = random_ids(2, 5)
    first = generate(model, ids, 19, 1.0, seed=7)
    torch.manual_seed(99)
    state = torch.get_rng_state()
    assert torch.equal(generate(model, ids, 19, 1.0, seed=7), first)
    assert torch.equal(generate(model, ids, 19, 1.0, seed=7, use_cache=False), first)
    assert torch.equal(torch.get_rng_state(), state)  # the seed is this call's alone
    assert not torch.equal(generate(model, ids, 19, 1.0, seed=8), first)


def test_without_a_seed_torch_s_own_state_decides(model, random_ids):
    texts = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        texts.append(generate(model, random_ids(1, 5), 19, 1.0))
    assert torch.equal(texts[0], texts[1])
    assert not torch.equal(texts[0], texts[2])


# --- stops -------------------------------------------------------------------------------------------


def cut(row: list[int], prompt: int, stops: set[int], length: int, pad: int | None) -> list[int]:
    """A row as it should look when it ends at its first stop."""
    new = row[prompt:]
    end = next((i + 1 for i, token in enumerate(new) if token in stops), len(new))
    return (row[: prompt + end] + [new[end - 1] if pad is None else pad] * length)[:length]


@pytest.mark.parametrize("pad", [None, 0], ids=["pad=stop", "pad=0"])
def test_a_row_ends_at_its_stop_and_the_rest_is_padding(pad, model, random_ids):
    ids = random_ids(4, 6, seed=2)
    free = generate(model, ids, 18, 1.0, seed=5).tolist()
    stops = {free[0][9], free[1][17]}
    for given_stops in (stops, [*stops], free[0][9]):
        wanted = {given_stops} if isinstance(given_stops, int) else set(given_stops)
        ends = [next((i + 1 for i in range(6, 24) if row[i] in wanted), 24) for row in free]
        found = generate(model, ids, 18, 1.0, seed=5, stop_tokens=given_stops, pad_token=pad).tolist()
        assert found == [cut(row, 6, wanted, max(ends), pad) for row in free]
        assert len(found[0]) == max(ends)


def test_generation_ends_early_when_every_row_has_stopped(model, random_ids):
    ids, shown = random_ids(1, 6, seed=2), []
    free = generate(model, ids, 18, 1.0, seed=5)[0].tolist()
    found = generate(model, ids, 18, 1.0, seed=5, stop_tokens=free[10], on_token=lambda new: shown.append(new.tolist()))
    end = free.index(free[10], 6) + 1
    assert found[0].tolist() == free[:end]
    assert shown == [[token] for token in free[6:end]]


def test_a_stop_in_the_prompt_ends_nothing(model, random_ids):
    ids = random_ids(1, 6, seed=2)
    free = by_argmax(model, ids, 3)
    stop = next(token for token in ids[0].tolist() if token not in free[0, 6:].tolist())
    assert torch.equal(generate(model, ids, 3, stop_tokens=stop), free)


def test_a_step_shows_the_model_s_own_logits_and_may_end_rows(model, random_ids):
    ids, seen = random_ids(3, 6, seed=2), []

    def after(logits, chosen):
        seen.append((logits, chosen))
        return torch.tensor([len(seen) >= 2, False, len(seen) >= 4])

    free = generate(model, ids, 7, 0.9, repetition_penalty=1.5, seed=5)
    found = generate(model, ids, 7, 0.9, repetition_penalty=1.5, seed=5, on_step=after)
    assert torch.equal(found[1], free[1])
    for row, length in ((0, 2), (2, 4)):
        assert found[row, 6:].tolist() == [
            *free[row, 6 : 6 + length].tolist(),
            *[free[row, 5 + length].item()] * (7 - length),
        ]
    assert torch.equal(torch.stack([chosen for _, chosen in seen], 1), found[:, 6:])
    with torch.no_grad():
        for step, (logits, _) in enumerate(seen):
            torch.testing.assert_close(logits, model(found[:, : 6 + step])[:, -1], rtol=0, atol=1e-12)
    assert len(seen) == 7


# --- manners -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_the_model_s_mode_is_put_back_also_after_an_error(training, build, random_ids):
    model = build(drop_rate=0.5).train(training)
    calls = []
    expected = generate(build(drop_rate=0.0), random_ids(1, 4), 3)
    assert torch.equal(generate(model, random_ids(1, 4), 3, on_token=lambda _: calls.append(model.training)), expected)
    assert calls == [False] * 3
    assert model.training is training

    def fail(_):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        generate(model, random_ids(1, 4), 3, on_token=fail)
    assert model.training is training
    assert all(module.training is training for module in model.modules())


def test_prompts_and_masks_are_left_as_they_were(model, random_ids):
    ids, mask = random_ids(2, 5), torch.arange(5) >= torch.tensor([0, 2])[:, None]
    kept = ids.clone(), mask.clone()
    found = generate(model, ids, 4, padding_mask=mask)
    assert torch.equal(ids, kept[0])
    assert torch.equal(mask, kept[1])
    assert torch.equal(found[:, :5], ids)
    assert not found.requires_grad


def test_all_problems_of_a_call_are_reported_at_once(model):
    with pytest.raises(ValueError) as caught:
        generate(
            model, torch.zeros(1, 0, dtype=torch.long), -1, -0.5, top_k=0, top_p=1.5, stop_tokens=[99], pad_token=-7
        )
    message = str(caught.value)
    assert len(message.splitlines()) == 8
    for expected in ("one token at least", "max_new_tokens", "temperature", "top_k", "top_p", "got 99", "got -7"):
        assert expected in message


@pytest.mark.parametrize(
    "wrong",
    [{"temperature": math.nan}, {"temperature": math.inf}, {"top_p": 0.0}, {"top_p": math.nan}, {"top_k": -1},
     {"stop_tokens": 61}, {"stop_tokens": [1, -1]}, {"pad_token": 61}],
    ids=str,
)  # fmt: skip
def test_one_wrong_argument_is_refused_by_name(wrong, model, random_ids):
    (name,) = wrong
    with pytest.raises(ValueError, match=name.split("_")[0] if "token" in name else name):
        generate(model, random_ids(1, 4), 2, **wrong)


def test_right_padding_and_masks_that_do_not_fit_are_refused(model, random_ids):
    ids = random_ids(2, 5)
    with pytest.raises(ValueError, match="pad prompts on the left"):
        generate(model, ids, 2, padding_mask=torch.arange(5) < torch.tensor([5, 3])[:, None])
    with pytest.raises((ValueError, TypeError), match="padding_mask"):
        generate(model, ids, 2, padding_mask=torch.ones(2, 4, dtype=torch.bool))
    with pytest.raises((ValueError, TypeError), match="padding_mask"):
        generate(model, ids, 2, padding_mask=torch.ones(2, 5))
    with pytest.raises(ValueError, match=r"(?s)top_k.*pad prompts on the left"):  # together with what else is wrong
        generate(model, ids, 2, top_k=0, padding_mask=torch.arange(5) < torch.tensor([5, 3])[:, None])


def refused(model, ids, *args, **settings) -> str:
    """The message, and that nothing was computed before it."""
    read = []
    hooks = [module.register_forward_pre_hook(lambda *_: read.append(1)) for module in model.modules()]
    try:
        with pytest.raises(ValueError) as caught:
            generate(model, ids, *args, **settings)
    finally:
        for hook in hooks:
            hook.remove()
    assert read == []
    return str(caught.value)


@pytest.mark.parametrize("id", [61, -1])
def test_ids_outside_the_vocabulary_are_refused_also_as_padding(id, model, random_ids):
    ids, mask = random_ids(2, 5), torch.arange(5) >= torch.tensor([0, 2])[:, None]
    assert "tokenizer" in refused(model, torch.tensor([[id]]), 2)
    ids[1, 0] = id  # padding
    assert "0..60" in refused(model, ids, 2, padding_mask=mask)


@pytest.mark.parametrize("use_cache", [True, False])
def test_more_tokens_than_the_context_are_refused_with_how_many_fit(use_cache, model, random_ids):
    """context_length is 24."""
    ids = random_ids(2, 20)
    assert generate(model, ids, 4, use_cache=use_cache).shape == (2, 24)
    message = refused(model, ids, 5, use_cache=use_cache)
    assert "at most 4 new tokens fit" in message
    assert 'past_context="slide"' in message
    assert "leave out 7 of its tokens" in refused(model, random_ids(1, 30), 1, use_cache=use_cache)
    generate(model, random_ids(1, 23), 1)
    assert "leave out 1 of its tokens" in refused(model, random_ids(1, 24), 1)
    assert "'wrap'" in refused(model, ids, 1, past_context="wrap")


@pytest.mark.parametrize("setting", [{"top_k": 3}, {"top_p": 0.9}, {"min_p": 0.1}], ids=str)
def test_a_setting_that_greedy_would_not_heed_is_refused(setting, model, random_ids):
    assert "would change nothing" in refused(model, random_ids(1, 3), 2, **setting)


def test_things_of_a_wrong_type_are_told_apart_and_listed(model):
    """Of `problems_of` itself, which looks at types: in these tests the signature of generate() is checked before."""
    found = problems_of(model, [1, 2], 2.0, Sampling(0.7), {"the end", 3}, None)
    assert len(found) == 3
    for problem, expected in zip(found, ("whole number, 0 or more, got 2.0", "'the end'", "torch.tensor"), strict=True):
        assert expected in problem
    assert problems_of(model, torch.zeros(1, 2), 2, Sampling(), set()) == [
        "ids must be whole numbers (int64), got torch.float32: ids.long()?"
    ]
    (found,) = problems_of(model, torch.zeros(2, dtype=torch.long), 2, Sampling(), set())
    assert "ids[None]" in found
    assert problems_of(model, torch.zeros(1, 2, dtype=torch.int32), 2, Sampling(), {3}) == []


def test_ids_of_32_bits_stay_so(model, random_ids):
    ids = random_ids(2, 5).int()
    for temperature in (0.0, 1.0):
        found = generate(model, ids, 3, temperature, seed=0)
        assert found.dtype == torch.int32
        assert torch.equal(found.long(), generate(model, ids.long(), 3, temperature, seed=0))
