"""Causal multi-head attention, held against computations that share nothing with it."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from CMHA.cmha import MultiHeadAttention
from CMHA.implementations import IMPLEMENTATIONS
from CMHA.kv_cache import LayerCache
from CMHA.masks import AttentionMask
from CMHA.request import AttentionRequest

NAMES = [name for name, module in IMPLEMENTATIONS.items() if not module.check(AttentionRequest(needs_grad=True))]
every_implementation = pytest.mark.parametrize("name", NAMES)


def layer(name="eager", d_in=10, d_out=21, heads=3, *, tokens=64, dropout=0.0, seed=0, training=False, **settings):
    torch.manual_seed(seed)
    module = MultiHeadAttention(d_in, d_out, tokens, dropout, heads, attn_implementation=name, **settings)
    return module.double().train(training)


def numbers(*shape, seed=1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def one_token_and_one_head_at_a_time(module, x, padding_mask=None):
    """Attention as a person would compute it: for each head, for each token, over the tokens up to it."""
    B, T, _ = x.shape
    H, D, group = module.num_heads, module.head_dim, module.num_heads // module.num_kv_heads
    bias = torch.zeros(sum(module.widths), dtype=x.dtype) if module.W_qkv.bias is None else module.W_qkv.bias
    output = torch.zeros(B, T, H * D, dtype=x.dtype)
    for b in range(B):
        projected = [module.W_qkv.weight @ x[b, t] + bias for t in range(T)]
        for h in range(H):
            q_at, k_at, v_at = h * D, H * D + h // group * D, H * D + module.num_kv_heads * D + h // group * D
            for t in range(T):
                seen = [s for s in range(t + 1) if padding_mask is None or padding_mask[b, s]]
                query = projected[t][q_at : q_at + D]
                weights = [math.exp(query @ projected[s][k_at : k_at + D] / math.sqrt(D)) for s in seen]
                for weight, s in zip(weights, seen, strict=True):
                    output[b, t, h * D : h * D + D] += weight / sum(weights) * projected[s][v_at : v_at + D]
    return output @ module.out_proj.weight.T + module.out_proj.bias


# --- the numbers ---------------------------------------------------------------------------------------


@every_implementation
@pytest.mark.parametrize("qkv_bias", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads"), [(3, 3), (6, 3), (6, 2), (5, 1)])
@torch.no_grad()
def test_it_is_attention_computed_one_token_and_one_head_at_a_time(name, qkv_bias, heads, kv_heads):
    module = layer(name, 11, heads * 7, heads, num_kv_heads=kv_heads, qkv_bias=qkv_bias)
    x = numbers(2, 6, 11)
    torch.testing.assert_close(module(x), one_token_and_one_head_at_a_time(module, x), rtol=1e-10, atol=1e-12)


@every_implementation
@pytest.mark.parametrize("first_real", [0, 2, 5])
@torch.no_grad()
def test_padded_tokens_are_skipped_by_that_computation_too(name, first_real):
    module, x = layer(name), numbers(2, 6, 10)
    padding_mask = torch.ones(2, 6, dtype=torch.bool)
    padding_mask[1, :first_real] = False
    expected = one_token_and_one_head_at_a_time(module, x, padding_mask)
    torch.testing.assert_close(module(x, padding_mask), expected, rtol=1e-10, atol=1e-12)


@every_implementation
def test_output_and_gradients_are_those_of_torchs_own_multi_head_attention(name):
    module = layer(name, 15, 15, 5, qkv_bias=True, training=True)
    oracle = nn.MultiheadAttention(15, 5, batch_first=True, dtype=torch.float64)
    oracle.load_state_dict({
        "in_proj_weight": module.W_qkv.weight, "in_proj_bias": module.W_qkv.bias,
        "out_proj.weight": module.out_proj.weight, "out_proj.bias": module.out_proj.bias,
    })  # fmt: skip
    x, later = numbers(3, 7, 15), torch.ones(7, 7, dtype=torch.bool).triu(1)
    output, expected = module(x), oracle(x, x, x, attn_mask=later, need_weights=False)[0]
    torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-12)
    grad = numbers(3, 7, 15, seed=2)
    output.backward(grad)
    expected.backward(grad)
    torch.testing.assert_close(module.W_qkv.weight.grad, oracle.in_proj_weight.grad, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(module.W_qkv.bias.grad, oracle.in_proj_bias.grad, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(module.out_proj.weight.grad, oracle.out_proj.weight.grad, rtol=1e-10, atol=1e-12)


@every_implementation
@torch.no_grad()
def test_shared_key_and_value_heads_are_full_attention_with_those_heads_repeated(name):
    grouped, full = layer(name, 12, 24, 6, num_kv_heads=2), layer(name, 12, 24, 6)
    queries, keys, values = grouped.W_qkv.weight.split(grouped.widths)
    keys, values = (w.view(2, 1, 4, 12).expand(2, 3, 4, 12).reshape(24, 12) for w in (keys, values))
    full.load_state_dict(grouped.state_dict() | {"W_qkv.weight": torch.cat([queries, keys, values])})
    x = numbers(2, 9, 12)
    torch.testing.assert_close(grouped(x), full(x), rtol=1e-10, atol=1e-12)
    assert grouped.W_qkv.weight.shape == (24 + 8 + 8, 12)


# --- causality -------------------------------------------------------------------------------------------


@every_implementation
@given(B=st.integers(1, 3), H=st.integers(1, 4), D=st.integers(1, 9), T=st.integers(1, 33), data=st.data())
@torch.no_grad()
def test_changing_a_token_never_changes_an_earlier_output_and_does_change_its_own(name, B, H, D, T, data):
    t = data.draw(st.integers(0, T - 1))
    module, x = layer(name, 5, H * D, H), numbers(B, T, 5)
    changed = x.clone()
    changed[:, t] += 1.0
    before, after = module(x), module(changed)
    assert torch.equal(before[:, :t], after[:, :t])
    assert not torch.equal(before[:, t], after[:, t])


@every_implementation
def test_no_gradient_flows_from_an_output_to_a_later_token(name):
    module, x = layer(name, training=True), numbers(1, 12, 10).requires_grad_()
    module(x)[0, 4].sum().backward()
    assert (x.grad[0, 5:] == 0).all()
    assert (x.grad[0, :5] != 0).any(-1).all()


# --- the cache ---------------------------------------------------------------------------------------------


@every_implementation
@given(chunks=st.lists(st.integers(1, 7), min_size=1, max_size=6), padding=st.integers(0, 6))
@torch.no_grad()
def test_reading_in_any_chunks_with_a_cache_is_reading_at_once(name, chunks, padding):
    tokens = sum(chunks)
    module, x = layer(name, num_kv_heads=1), numbers(2, tokens, 10)
    padding_mask = torch.ones(2, tokens, dtype=torch.bool)
    padding_mask[1, : min(padding, tokens)] = False
    padding_mask = padding_mask if padding else None
    cache, outputs = LayerCache(2, 1, tokens, 7, dtype=torch.float64), []
    for chunk in x.split(chunks, dim=1):
        seen = cache.length + chunk.shape[1]
        outputs.append(module(chunk, None if padding_mask is None else padding_mask[:, :seen], cache=cache))
    torch.testing.assert_close(torch.cat(outputs, dim=1), module(x, padding_mask), rtol=1e-10, atol=1e-12)


# --- training and evaluation -------------------------------------------------------------------------------


@every_implementation
@torch.no_grad()
def test_in_evaluation_dropout_is_off_bit_for_bit(name):
    x = numbers(2, 20, 10)
    with_dropout, without = layer(name, dropout=0.5), layer(name, dropout=0.0)
    assert torch.equal(with_dropout(x), with_dropout(x))
    assert torch.equal(with_dropout(x), without(x))


@every_implementation
@torch.no_grad()
def test_in_training_dropout_is_on_and_follows_torchs_seed(name):
    module, x = layer(name, dropout=0.5, training=True), numbers(2, 20, 10)
    outputs = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        outputs.append(module(x))
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])
    assert not torch.allclose(outputs[0], module.eval()(x))


@every_implementation
@torch.no_grad()
def test_dropout_keeps_the_mean_and_drops_at_its_rate_within_four_sigma(name):
    """One token's value is 1, the queries and keys are 0: each output is 1/T of what was kept, scaled."""
    T, dropout = 40, 0.25
    attention = IMPLEMENTATIONS[name].attention
    mask = AttentionMask(T, T)
    torch.manual_seed(0)
    zeros, identity = torch.zeros(8, 4, T, T), torch.eye(T).expand(8, 4, T, T)
    weights = attention(zeros, zeros, identity, mask, scale=1.0, dropout=dropout)[0]
    seen = torch.ones(T, T).tril().bool().expand_as(weights)
    dropped = (weights == 0)[seen]
    assert abs(dropped.double().mean().item() - dropout) < 4 * math.sqrt(dropout * (1 - dropout) / dropped.numel())
    kept = (weights * torch.arange(1, T + 1)[:, None])[seen][~dropped]
    torch.testing.assert_close(kept, torch.full_like(kept, 1 / (1 - dropout)))


# --- weights returned ----------------------------------------------------------------------------------------


@torch.no_grad()
def test_returned_weights_sum_to_one_and_are_zero_above_the_diagonal_and_make_the_output():
    module, x = layer("eager"), numbers(2, 9, 10)
    output, weights = module(x, return_weights=True)
    assert weights.shape == (2, 3, 9, 9)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3, 9, dtype=torch.float64))
    assert (weights.triu(1) == 0).all()
    assert (weights.tril() >= 0).all()
    values = module.W_qkv(x)[..., 42:].view(2, 9, 3, 7)
    context = torch.einsum("bhqk,bkhd->bqhd", weights, values).flatten(2)
    torch.testing.assert_close(output, module.out_proj(context))


@pytest.mark.parametrize("name", [name for name in NAMES if name != "eager"])
@torch.no_grad()
def test_only_eager_has_weights_so_it_serves_the_call_and_says_so_once(name, messages):
    module, x = layer(name), numbers(1, 5, 10)
    output, weights = module(x, return_weights=True)
    module(x, return_weights=True)
    assert weights.shape == (1, 3, 5, 5)
    torch.testing.assert_close(output, module(x))
    warnings = [record.getMessage() for record in messages if record.levelname == "WARNING"]
    if name in ("sdpa", "flash_tiled"):
        assert len(warnings) == 1
        assert f"{name} cannot be used" in warnings[0]
        assert "Using eager instead" in warnings[0]
        assert "ask eager for them" in warnings[0]


def test_under_strict_it_raises_with_the_reason_instead():
    module = layer("sdpa", attn_strict=True)
    assert module(numbers(1, 5, 10)).shape == (1, 5, 21)
    with pytest.raises(ValueError, match=r"(?s)sdpa cannot serve.*attn_strict=True.*never forms the attention weights"):
        module(numbers(1, 5, 10), return_weights=True)


# --- one set of weights ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("qkv_bias", [False, True])
@torch.no_grad()
def test_a_state_dict_with_three_matrices_and_a_stored_mask_loads(qkv_bias):
    module, x = layer("sdpa", qkv_bias=qkv_bias, num_kv_heads=1), numbers(2, 8, 10)
    separate = {"mask": torch.ones(64, 64).triu(1)}
    for kind in ("weight", "bias") if qkv_bias else ("weight",):
        parts = getattr(module.W_qkv, kind).split([21, 7, 7])
        separate |= {f"W_{part}.{kind}": p for part, p in zip(("query", "key", "value"), parts, strict=True)}
        separate[f"out_proj.{kind}"] = getattr(module.out_proj, kind)
    separate["out_proj.bias"] = module.out_proj.bias
    given = dict(separate)
    other = layer("sdpa", qkv_bias=qkv_bias, num_kv_heads=1, seed=99)
    assert not torch.equal(other(x), module(x))
    other.load_state_dict(separate)
    assert torch.equal(other(x), module(x))
    assert separate.keys() == given.keys()

    inside = nn.ModuleDict({"attention": layer("sdpa", qkv_bias=qkv_bias, num_kv_heads=1, seed=99)})
    inside.load_state_dict({f"attention.{key}": value for key, value in separate.items()})
    assert torch.equal(inside["attention"](x), module(x))


def test_one_seed_gives_one_state_dict_whatever_the_toggle_says():
    first = layer("auto").state_dict()
    for settings in ({"use_flash": False}, *({"name": name} for name in NAMES)):
        other = layer(**settings).state_dict()
        assert list(other) == list(first) == ["W_qkv.weight", "out_proj.weight", "out_proj.bias"]
        assert all(torch.equal(other[key], first[key]) for key in first)


@torch.no_grad()
def test_set_attention_changes_the_way_and_not_the_numbers(monkeypatch):
    module, x = layer("auto"), numbers(2, 8, 10)
    expected = module(x)
    calls = []
    for name in NAMES:
        original = IMPLEMENTATIONS[name].attention
        monkeypatch.setattr(
            IMPLEMENTATIONS[name], "attention",
            lambda *args, name=name, original=original, **kwargs: calls.append(name) or original(*args, **kwargs),
        )  # fmt: skip
        module.set_attention(name)
        torch.testing.assert_close(module(x), expected, rtol=1e-10, atol=1e-12)
    assert calls == NAMES
    kept = module.settings
    module.set_attention({"use_flash": False, "attn_implementation": "sdpa", "emb_dim": 10})
    assert module.choice().chosen == "eager"
    module.set_attention(kept)
    assert module.choice().chosen == NAMES[-1]


# --- what is refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, None), (3, 2)])
def test_heads_that_do_not_divide_are_refused(heads, kv_heads):
    with pytest.raises(ValueError, match=r"d_out=21 must be a multiple of num_heads=.*num_kv_heads="):
        MultiHeadAttention(10, 21, 8, 0.0, heads, num_kv_heads=kv_heads)


def test_more_tokens_than_the_context_are_refused_also_through_a_cache():
    module = layer(tokens=6)
    with pytest.raises(ValueError, match=r"7 tokens.*context_length=6"):
        module(numbers(1, 7, 10))
    cache = LayerCache(1, 3, 10, 7, dtype=torch.float64)
    module(numbers(1, 5, 10), cache=cache)
    with pytest.raises(ValueError, match=r"7 tokens.*context_length=6"):
        module(numbers(1, 2, 10), cache=cache)


def test_a_padding_mask_that_does_not_fit_is_refused_before_it_reaches_the_formula():
    module, x = layer(), numbers(2, 5, 10)
    with pytest.raises(ValueError, match=r"shape \(2, 5\).*got \(2, 4\)"):
        module(x, torch.ones(2, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"shape \(2, 5\).*got \(1, 5\)"):  # a batch of 1 would broadcast in silence
        AttentionMask(5, 5, padding_mask=torch.ones(1, 5, dtype=torch.bool), batch_size=2)
    with pytest.raises(TypeError, match=r"torch\.bool.*real token"):
        AttentionMask(5, 5, padding_mask=torch.ones(2, 5))


def test_a_ready_mask_must_be_for_this_call():
    module = layer(tokens=6)
    with pytest.raises(ValueError, match=r"mask is for \(4, 4\).*any sequences, not \(5, 5\), 1\."):
        module(numbers(1, 5, 10), mask=AttentionMask(4, 4))
    two = AttentionMask(5, 5, padding_mask=torch.ones(2, 5, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"\(5, 5\) queries and keys, 2 sequences, not \(5, 5\), 3\."):
        module(numbers(3, 5, 10), mask=two)
    with pytest.raises(ValueError, match=r"7 tokens.*context_length=6"):
        module(numbers(1, 7, 10), mask=AttentionMask(7, 7))


def test_an_unknown_implementation_is_refused_when_the_layer_is_built():
    with pytest.raises(ValueError, match=r"unknown attn_implementation 'flashy'"):
        layer("flashy")
