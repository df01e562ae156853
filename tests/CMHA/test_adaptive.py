"""Attention in one call: the same numbers whichever way, and a clear word for what cannot be."""

import inspect
import math

import pytest
import torch

from CMHA.adaptive import adaptive_flash_attention
from CMHA.implementations import eager, flash_tiled, sdpa
from orchestrator.evaluation.cases import Case, tensors
from orchestrator.evaluation.parity import errors, expectation, results


def numbers(heads=2, query_len=9, key_len=9, head_dim=8, kv_heads=None, batch=2, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = ((heads, query_len), (kv_heads or heads, key_len), (kv_heads or heads, key_len))
    return [torch.randn(batch, h, t, head_dim, generator=generator).to(dtype) for h, t in shapes]


def test_its_arguments_are_the_ones_that_were_promised_in_their_order():
    names = list(inspect.signature(adaptive_flash_attention).parameters)
    assert names[:9] == [
        "query", "key", "value", "scale", "causal", "padding_mask", "use_flash_attention", "query_block_size",
        "kv_block_size",
    ]  # fmt: skip


CASES = [
    Case(query_len=33, key_len=33),
    Case(query_len=33, key_len=33, causal=False),
    Case(query_len=5, key_len=33, num_kv_heads=2),
    Case(query_len=33, key_len=33, padding="left"),
    Case(query_len=33, key_len=33, padding="row", dtype=torch.bfloat16),
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize(
    "ways",
    [
        {},
        {"use_flash_attention": False},
        {"query_block_size": 16, "kv_block_size": 8},
        {"kv_block_size": 5},
        {"attn_implementation": "flash_tiled"},
    ],
    ids=str,
)
def test_every_way_meets_the_bound_forward_and_gradients(case, ways):
    inputs, grad_context, padding_mask = tensors(case)
    context = adaptive_flash_attention(*inputs, causal=case.causal, padding_mask=padding_mask, **ways)
    context.backward(grad_context)
    exact, bound = expectation(case)
    found = errors(results(context, inputs), exact)
    assert all(found[key] <= bound[key] for key in bound), (found, bound)
    assert context.dtype == case.dtype


def test_the_scale_is_one_over_the_root_of_head_dim_unless_it_is_given():
    query, key, value = numbers()
    default = adaptive_flash_attention(query, key, value)
    assert torch.equal(default, adaptive_flash_attention(query, key, value, scale=1 / math.sqrt(8)))
    other = adaptive_flash_attention(query, key, value, scale=0.9)
    weights = (query @ key.mT * 0.9).masked_fill(torch.ones(9, 9).triu(1) == 1, -math.inf).softmax(-1)
    torch.testing.assert_close(other, weights @ value)


def who_runs(monkeypatch, **ways) -> str:
    """Which implementation computes a call."""
    ran = []
    for module in (eager, sdpa, flash_tiled):
        real, name = module.attention, module.__name__.rpartition(".")[2]
        monkeypatch.setattr(module, "attention", lambda *a, _r=real, _n=name, **k: ran.append(_n) or _r(*a, **k))
    adaptive_flash_attention(*numbers(), **ways)
    (name,) = ran
    return name


@pytest.mark.parametrize(
    ("ways", "name"),
    [
        ({}, "sdpa"),
        ({"use_flash_attention": False}, "eager"),
        ({"use_flash_attention": False, "query_block_size": 4}, "eager"),
        ({"query_block_size": 4}, "flash_tiled"),
        ({"kv_block_size": 4}, "flash_tiled"),
        ({"attn_implementation": "flash_attn_1", "kv_block_size": 4}, "sdpa"),
        ({"attn_implementation": "manual"}, "eager"),
        ({"attn_implementation": "fa3"}, "sdpa"),
    ],
    ids=str,
)
def test_the_toggle_the_name_and_the_tiles_choose_the_implementation(monkeypatch, ways, name):
    assert who_runs(monkeypatch, **ways) == name


def test_the_sizes_of_the_tiles_reach_the_tiles(monkeypatch):
    seen = []
    real = flash_tiled.spans
    monkeypatch.setattr(flash_tiled, "spans", lambda start, end, block: seen.append(block) or real(start, end, block))
    adaptive_flash_attention(*numbers(), query_block_size=4, kv_block_size=3)
    assert set(seen) == {4, 3}


def test_a_fallback_is_said_and_under_strict_refused(messages):
    adaptive_flash_attention(*numbers(), attn_implementation="flash_attention_2")
    assert [record.levelname for record in messages] == ["WARNING"]
    assert "flash_attention_2 cannot be used here" in messages[0].getMessage()
    with pytest.raises(ValueError, match="flash_attention_2 cannot serve this request"):
        adaptive_flash_attention(*numbers(), attn_implementation="flash_attention_2", attn_strict=True)


def test_a_key_that_needs_a_gradient_counts_as_training(monkeypatch):
    asked = []
    monkeypatch.setattr("CMHA.adaptive.choose", lambda settings, request: asked.append(request) or _eager_choice())
    query, key, value = numbers()
    adaptive_flash_attention(query, key, value)
    adaptive_flash_attention(query, key, value.requires_grad_())
    with torch.no_grad():
        adaptive_flash_attention(query, key, value)
    assert [request.needs_grad for request in asked] == [False, True, False]


def _eager_choice():
    from CMHA.choosing import AttentionChoice

    return AttentionChoice("auto", "eager", (), eager.attention)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"key": torch.zeros(2, 2, 9, 8, dtype=torch.int64)}, TypeError, "key must be a floating-point.*int64"),
        ({"value": torch.zeros(2, 9, 8)}, TypeError, r"value must be .*\(batch, heads, .*\(2, 9, 8\)"),
        ({"value": torch.zeros(2, 2, 8, 8)}, ValueError, "key and value must have one shape"),
        ({"query": torch.zeros(2, 9, 2, 4)}, ValueError, r"agree in batch and head_dim.*is the order"),
        ({"query": torch.zeros(2, 3, 9, 8)}, ValueError, "3 query heads are not a multiple of 2"),
        ({"query": torch.zeros(2, 2, 9, 8, dtype=torch.float64)}, ValueError, "one dtype.*query torch.float64"),
        ({"query_block_size": 0}, ValueError, "query_block_size must be a whole number"),
        ({"kv_block_size": True}, ValueError, "kv_block_size must be a whole number"),
        ({"dropout": 1.5}, ValueError, "dropout must be a probability"),
        ({"padding_mask": torch.ones(2, 9)}, TypeError, r"padding_mask must be torch\.bool"),
        ({"padding_mask": torch.ones(2, 8, dtype=torch.bool)}, ValueError, r"shape \(2, 9\)"),
        ({"attn_implementation": "sdap"}, ValueError, "Did you mean 'sdpa'"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, str) else None,
)  # fmt: skip
def test_what_does_not_fit_is_refused_before_torch_sees_it(change, error, message):
    query, key, value = numbers()
    with pytest.raises(error, match=message):
        adaptive_flash_attention(**{"query": query, "key": key, "value": value} | change)


def test_all_problems_are_told_at_once():
    query, key, value = numbers()
    with pytest.raises(ValueError) as refused:
        adaptive_flash_attention(query[:, :1].double(), key, value[:, :, 1:], kv_block_size=0)
    for part in ("one shape", "not a multiple", "one dtype", "kv_block_size"):
        assert part in str(refused.value)
