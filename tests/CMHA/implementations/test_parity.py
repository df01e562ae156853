"""Every implementation computes the same attention, within a bound that was fixed before any result was seen."""

import json
import math
import random
from dataclasses import replace
from itertools import combinations, product

import pytest
import torch
import torch.nn.functional as F

from CMHA.implementations import IMPLEMENTATIONS, eager
from CMHA.masks import AttentionMask
from orchestrator.evaluation.cases import AXES, MASK_AXES, Case, grid, tensors
from orchestrator.evaluation.grading import failed
from orchestrator.evaluation.parity import (
    FACTORS,
    compare_implementations,
    measure,
    reference,
    toggle_table,
    usable,
)

# --- the implementations ---------------------------------------------------------------------------

# The adapters of flash-attn and flex_attention have files of their own.
TRAINABLE_HERE = ("eager", "sdpa", "flash_tiled")
WITHOUT_COMPILER = [name for name in IMPLEMENTATIONS if name != "flex_attention"]


def misses(runs):
    """What failed; `grading.known` says what is let off, and tests/orchestrator/evaluation/test_grading.py holds it."""
    return [(run.implementation, str(run.case), run.failure, run.ratio) for run in runs if failed(run)]


@pytest.mark.parametrize("case", list(grid()), ids=str)
def test_every_usable_implementation_meets_the_bound_forward_and_gradients(case):
    measured = compare_implementations([case], WITHOUT_COMPILER)
    assert {"eager", "sdpa", "flash_tiled"} <= {run.implementation for run in measured}
    assert not misses(measured)


@pytest.mark.parametrize("head_dim", [16, 64, 80, 96, 128])
@pytest.mark.parametrize("lengths", [(1, 1), (2, 1), (239, 1)], ids=str)
def test_with_a_single_key_the_gradient_of_flash_tiled_cancels_as_it_should(lengths, head_dim):
    """The weights are 1 whatever the scores: dQ and dK are exactly 0, a difference of two equal dot products."""
    for seed in range(8):
        case = Case(head_dim=head_dim, query_len=lengths[0], key_len=lengths[1], seed=seed, causal=False)
        assert measure("flash_tiled", case).passed, measure("flash_tiled", case).ratio


@pytest.mark.slow
@pytest.mark.parametrize("part", range(20))
def test_every_usable_implementation_meets_the_bound_in_a_sample_of_the_whole_grid(part):
    sample = random.Random(0).sample(list(grid(pairwise=False)), 2_000)
    for case in sample[part::20]:
        assert not misses(compare_implementations([case], WITHOUT_COMPILER))


@pytest.mark.slow
@pytest.mark.parametrize("case", [*grid(), *grid(axes=MASK_AXES)], ids=str)
def test_flex_attention_meets_the_bound_in_every_case_of_both_grids(case):
    """Slow: it is compiled for each dtype, width of a head and kind of mask."""
    assert not misses(compare_implementations([case], ["flex_attention"]))


# --- the cases ---------------------------------------------------------------------------------------


def test_in_the_default_grid_every_two_values_of_two_axes_meet():
    cases = [vars(case) for case in grid()]
    for one, other in combinations(AXES, 2):
        met = {(tuple(case[key] for key in one), tuple(case[key] for key in other)) for case in cases}
        assert met == set(product(AXES[one], AXES[other])), (one, other)
    assert len(cases) < 100  # 66 is the least possible: 11 lengths x 6 head dims


def test_the_whole_grid_is_the_product_of_the_axes():
    cases = list(grid(pairwise=False))
    assert len(set(cases)) == len(cases) == math.prod(map(len, AXES.values())) == 38_016


def test_the_cases_are_the_same_in_every_run_and_their_numbers_too():
    assert list(grid()) == list(grid())
    case = Case(strided=True, padding="left", seed=3)
    (queries, *_), grad_context, mask = tensors(case)
    (again, *_), grad_again, mask_again = tensors(case)
    assert torch.equal(queries, again)
    assert torch.equal(grad_context, grad_again)
    assert torch.equal(mask, mask_again)
    assert not queries.is_contiguous()


# --- the yardstick -------------------------------------------------------------------------------------


def test_the_reference_is_the_formula_counted_by_hand():
    """One number at a time, in plain Python, for two query heads that share one key head."""
    case = Case(head_dim=3, query_len=3, key_len=5, num_heads=2, num_kv_heads=1, padding="left", batch_size=1)
    (queries, keys, values), _, padding_mask = tensors(case)
    q, k, v, real = queries[0].tolist(), keys[0, 0].tolist(), values[0, 0].tolist(), padding_mask[0].tolist()
    assert real == [False, False, True, True, True]
    exact = reference(case)["context"][0]
    for head, i in product(range(2), range(3)):
        seen = [j for j in range(5) if j <= i + 2 and real[j]]
        weights = [math.exp(sum(a * b for a, b in zip(q[head][i], k[j], strict=True)) / math.sqrt(3)) for j in seen]
        for d in range(3):
            by_hand = sum(w * v[j][d] for w, j in zip(weights, seen, strict=True)) / sum(weights)
            assert exact[head, i, d].item() == pytest.approx(by_hand, rel=1e-12)


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)])
def test_the_references_gradients_are_those_of_torchs_op_in_float64(heads):
    case = Case(head_dim=5, query_len=7, key_len=11, num_heads=heads[0], num_kv_heads=heads[1], padding="right")
    inputs, grad_context, padding_mask = tensors(case)
    queries, keys, values = (tensor.detach().double().requires_grad_() for tensor in inputs)
    allowed = torch.ones(7, 11, dtype=torch.bool).tril(4) & padding_mask[:, None, None]
    context = F.scaled_dot_product_attention(queries, keys, values, allowed, scale=5**-0.5, enable_gqa=True)
    context.backward(grad_context.double())
    exact = reference(case)
    for key, expected in zip(FACTORS, (context, queries.grad, keys.grad, values.grad), strict=True):
        torch.testing.assert_close(exact[key], expected.detach(), rtol=1e-10, atol=1e-12)


def with_scale_forgotten(q, k, v, mask, *, scale, dropout):
    return eager.attention(q, k, v, mask, scale=1.0, dropout=dropout)


def with_a_mask_that_shows_the_next_token(q, k, v, mask, *, scale, dropout):
    scores = (q @ k.mT * scale).masked_fill(torch.ones(q.shape[2], k.shape[2]).triu(2 + mask.offset) > 0, -1e4)
    return scores.softmax(-1) @ v, None


def with_a_mask_that_hides_the_token_itself(q, k, v, mask, *, scale, dropout):
    scores = (q @ k.mT * scale).masked_fill(torch.ones(q.shape[2], k.shape[2]).triu(mask.offset) > 0, -1e4)
    return scores.softmax(-1) @ v, None


def with_the_values_of_two_heads_swapped(q, k, v, mask, *, scale, dropout):
    return eager.attention(q, k, v[:, [1, 0, 2, 3]], mask, scale=scale, dropout=dropout)


def aligned_to_the_upper_left(q, k, v, mask, *, scale, dropout):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale), None


def with_gradients_through_the_output_forgotten(q, k, v, mask, *, scale, dropout):
    weights = (q @ k.mT * scale).masked_fill(~mask.dense(), -1e4).exp()
    return weights / weights.sum(-1, keepdim=True).detach() @ v, None  # what "delta" stands for in flash attention


WRONG = [
    with_scale_forgotten,
    with_a_mask_that_shows_the_next_token,
    with_a_mask_that_hides_the_token_itself,
    with_the_values_of_two_heads_swapped,
    aligned_to_the_upper_left,
    with_gradients_through_the_output_forgotten,
]


@pytest.mark.parametrize(
    ("wrong", "dtype"),
    [
        (wrong, dtype)
        for wrong in WRONG
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
        # in bf16 eps is 1/128, and the bound for gradients wider than this one error
        if (wrong, dtype) != (with_gradients_through_the_output_forgotten, torch.bfloat16)
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_the_bound_is_narrow_enough_to_catch_an_attention(wrong, dtype):
    assert not measure(wrong, Case(dtype, query_len=97, key_len=113)).passed


def test_a_nan_never_passes():
    def nan(q, k, v, mask, *, scale, dropout):
        context, _ = eager.attention(q, k, v, mask, scale=scale, dropout=dropout)
        return context * math.nan, None

    assert not measure(nan, Case(query_len=5, key_len=5)).passed


def test_the_bound_is_as_written_and_does_not_depend_on_what_is_measured():
    """For one live key the plain formula is exact, and the bound is its second term alone."""
    case = Case(query_len=1, key_len=1, num_heads=1, num_kv_heads=1, batch_size=1, head_dim=16)
    (_, _, values), grad_context, _ = tensors(case)
    eps = 2.0**-23
    gradients_scale = abs((grad_context * values).sum().item()) * 16**-0.5
    bound = measure("eager", case).bound
    assert bound["context"] == pytest.approx(4 * eps * max(1, values.abs().max().item()), rel=1e-5)
    assert bound["dK"] == pytest.approx(4 * eps * max(1, gradients_scale), rel=1e-5)
    assert measure("sdpa", case).bound == bound


# --- no NaN, no trace of what is hidden ----------------------------------------------------------------------


EMPTY_ROWS = [
    Case(query_len=50, key_len=17, head_dim=16),
    Case(query_len=9, key_len=9, padding="row", head_dim=16),
    Case(query_len=33, key_len=33, padding="left", head_dim=16, num_kv_heads=2),
    Case(query_len=9, key_len=12, padding="row", causal=False, head_dim=16),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", EMPTY_ROWS, ids=lambda case: str(case).partition("-")[2])
@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize("name", TRAINABLE_HERE)
def test_a_row_with_nothing_to_attend_to_is_exactly_zero_and_its_gradients_finite(name, case, dtype):
    case = replace(case, dtype=dtype)
    assert name in usable(case)
    inputs, grad_context, padding_mask = tensors(case)
    allowed = torch.ones(case.batch_size, case.query_len, case.key_len, dtype=torch.bool)
    if case.causal:
        allowed = allowed.tril(case.key_len - case.query_len)
    if padding_mask is not None:
        allowed = allowed & padding_mask[:, None]
    empty = ~allowed.any(-1)  # (B, query_len)
    assert empty.any()
    assert not empty.all()

    mask = AttentionMask(case.query_len, case.key_len, causal=case.causal, padding_mask=padding_mask)
    with torch.autograd.detect_anomaly(check_nan=True):
        context, _ = IMPLEMENTATIONS[name].attention(*inputs, mask, scale=case.scale, dropout=0.0)
        context.backward(grad_context)
    assert context.isfinite().all()
    assert all(tensor.grad.isfinite().all() for tensor in inputs)
    assert (context.transpose(1, 2)[empty] == 0).all()
    assert (inputs[0].grad.transpose(1, 2)[empty] == 0).all()
    assert (context.transpose(1, 2)[~empty] != 0).any(-1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("name", TRAINABLE_HERE)
def test_poisoned_padding_changes_nothing_at_real_positions(name, padding, dtype):
    case = Case(dtype, head_dim=32, query_len=37, key_len=37, padding=padding)
    assert name in usable(case)
    outcomes = []
    for poison in (None, 1e4):
        (queries, keys, values), grad_context, padding_mask = tensors(case)
        hidden = ~padding_mask[:, None, :, None]
        if poison:
            keys = keys.detach().masked_fill(hidden, poison).requires_grad_()
            values = values.detach().masked_fill(hidden, poison).requires_grad_()
        mask = AttentionMask(37, 37, padding_mask=padding_mask)
        context, _ = IMPLEMENTATIONS[name].attention(queries, keys, values, mask, scale=case.scale, dropout=0.0)
        context.backward(grad_context)
        outcomes.append((context.detach(), queries.grad, keys.grad, values.grad))
        assert (keys.grad.masked_select(hidden) == 0).all()
        assert (values.grad.masked_select(hidden) == 0).all()
    for clean, poisoned in zip(*outcomes, strict=True):
        assert torch.equal(clean, poisoned)


# --- the table for the smoke test ----------------------------------------------------------------------------


def test_the_toggles_table_says_what_each_implementation_costs_and_how_exact_it_is():
    rows = toggle_table({"emb_dim": 48, "n_heads": 3}, batch=1, tokens=20, repeats=2)
    assert json.loads(json.dumps(rows)) == rows
    by_name = {row["implementation"]: row for row in rows}
    assert {"eager", "sdpa", "flash_tiled"} <= set(by_name)
    assert by_name["eager"]["seconds_over_eager"] == 1.0
    for row in rows:
        assert row["passed"]
        assert row["seconds"] > 0
        assert set(row["error"]) == set(row["bound"]) == set(row["ratio"]) == {"context", "dQ", "dK", "dV"}


def test_an_implementation_that_refuses_a_case_is_not_measured_in_it(monkeypatch):
    monkeypatch.setattr(IMPLEMENTATIONS["sdpa"], "check", lambda request: ["no"] if request.head_dim == 8 else [])
    cases = [Case(head_dim=head_dim, query_len=4, key_len=4) for head_dim in (8, 16)]
    names = [[run.implementation for run in compare_implementations([case], WITHOUT_COMPILER)] for case in cases]
    assert "sdpa" not in names[0]
    assert "sdpa" in names[1]
    assert [run.implementation for run in compare_implementations([Case(query_len=4, key_len=4)], ["eager"])] == [
        "eager"
    ]
