"""Flash attention in plain PyTorch: its gradients, its tiles, its dropout, and what it saves."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from CMHA.implementations import flash_tiled
from CMHA.implementations.flash_tiled import TiledAttention
from CMHA.masks import AttentionMask
from CMHA.request import AttentionRequest
from orchestrator.evaluation.cases import Case
from orchestrator.evaluation.parity import measure


def grouped_tensors(query_len, key_len, kv_heads=1, group=1, batch=2, head_dim=3):
    """As TiledAttention takes them: keys and values broadcast over the group of query heads."""
    torch.manual_seed(0)
    queries = torch.randn(batch, kv_heads, group, query_len, head_dim, dtype=torch.float64, requires_grad=True)
    keys, values = torch.randn(2, batch, kv_heads, 1, key_len, head_dim, dtype=torch.float64)
    return queries, keys.requires_grad_(), values.requires_grad_()


PADDING = torch.tensor([[True] * 5, [False, False, True, True, False]])


@pytest.mark.parametrize("blocks", [(2, 3), (128, 128)], ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize(
    ("query_len", "causal", "padding", "kv_heads", "group"),
    [
        (5, True, None, 1, 1),
        (5, False, PADDING, 1, 1),
        (5, True, PADDING, 2, 2),
        (3, True, None, 1, 3),
        (7, True, None, 1, 1),
    ],
    ids=["causal", "padded", "causal_padded_grouped", "cached_one_kv_head", "empty_rows"],
)
def test_the_backward_written_by_hand_is_the_derivative_of_the_forward(
    query_len, causal, padding, kv_heads, group, dropout, blocks
):
    inputs = grouped_tensors(query_len, 5, kv_heads, group, head_dim=2)
    mask = AttentionMask(query_len, 5, causal=causal, padding_mask=padding)
    assert torch.autograd.gradcheck(
        lambda q, k, v: TiledAttention.apply(q, k, v, mask, 0.7, dropout, 1234, blocks), inputs, fast_mode=False
    )


@given(
    st.integers(1, 70), st.integers(1, 70), st.integers(1, 80), st.integers(1, 80),
    st.sampled_from(["none", "right", "left", "row"]), st.booleans(),
)  # fmt: skip
def test_any_block_size_gives_the_same_within_the_bound(query_len, key_len, query_block, kv_block, padding, causal):
    case = Case(
        head_dim=5, query_len=query_len, key_len=key_len, padding=padding, causal=causal, num_heads=2, num_kv_heads=1,
        query_block_size=query_block, kv_block_size=kv_block,
    )  # fmt: skip
    run = measure("flash_tiled", case)
    assert run.passed, run.ratio


@pytest.mark.parametrize("growing", [True, False])
def test_a_maximum_that_rises_or_falls_from_tile_to_tile_changes_nothing(growing):
    """Scores up to 200 apart: without the correction by exp(old max - new max), the early tiles would be far off."""
    torch.manual_seed(0)
    height = torch.linspace(0, 1, 64, dtype=torch.float64)
    keys = (height if growing else height.flip(0))[None, None, :, None] * 20
    queries = torch.linspace(-10, 10, 64, dtype=torch.float64)[None, None, :, None]
    values = torch.randn(1, 1, 64, 1, dtype=torch.float64)
    mask = AttentionMask(64, 64, causal=False)
    context, _ = flash_tiled.attention(queries, keys, values, mask, scale=1.0, query_block_size=8, kv_block_size=8)
    torch.testing.assert_close(context, (queries @ keys.mT).softmax(-1) @ values, rtol=1e-12, atol=1e-12)


def test_scores_too_large_for_exp_do_not_overflow():
    queries = torch.full((1, 1, 4, 2), 1e4)
    context, _ = flash_tiled.attention(queries, queries, queries, AttentionMask(4, 4), scale=1.0)
    assert torch.equal(context, queries)


# --- what is saved -----------------------------------------------------------------------------------------


def test_beside_its_inputs_and_output_exactly_one_number_for_each_row_is_saved_its_log_sum_exp():
    queries, keys, values = grouped_tensors(9, 7, kv_heads=2, group=3)
    mask = AttentionMask(9, 7)
    context = TiledAttention.apply(queries, keys, values, mask, 0.5, 0.0, 0, (4, 4))
    inputs_and_output = {tensor.data_ptr() for tensor in (queries, keys, values, context)}
    saved = [tensor for tensor in context.grad_fn.saved_tensors if tensor.data_ptr() not in inputs_and_output]
    assert [tuple(tensor.shape) for tensor in saved] == [(2, 2, 3, 9)]
    scores = (queries @ keys.mT * 0.5).masked_fill(~mask.dense().unsqueeze(2), -math.inf)
    expected = torch.logsumexp(scores, -1)
    expected[expected == -math.inf] = math.inf  # the first two rows see nothing
    torch.testing.assert_close(saved[0], expected.detach())


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_nothing_else_is_kept_for_backward_by_the_whole_call(dropout):
    queries, keys, values = (torch.randn(2, 4, 300, 8, requires_grad=True) for _ in range(3))
    kept = {}

    def pack(tensor):
        kept[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        flash_tiled.attention(queries, keys, values, AttentionMask(300, 300), scale=1.0, dropout=dropout)
    assert sum(kept.values()) == 4 * queries.numel() + 2 * 4 * 300


# --- dropout -------------------------------------------------------------------------------------------------


def dropped_weights(tokens, dropout, blocks, heads=4, requires_grad=False):
    """The weights after dropout: with the identity as values they are the context."""
    queries = torch.zeros(2, heads, tokens, tokens, requires_grad=requires_grad)
    values = torch.eye(tokens).expand(2, heads, tokens, tokens)
    mask = AttentionMask(tokens, tokens, causal=False)
    options = dict(zip(("query_block_size", "kv_block_size"), blocks, strict=True))
    return flash_tiled.attention(queries, queries, values, mask, scale=1.0, dropout=dropout, **options)[0]


@pytest.mark.parametrize("dropout", [0.1, 0.5, 0.8])
def test_weights_are_dropped_at_the_rate_within_four_sigma_and_the_rest_made_larger(dropout):
    torch.manual_seed(0)
    weights = dropped_weights(96, dropout, (32, 64)) * 96  # all equal 1 before dropout
    dropped = weights == 0
    assert abs(dropped.double().mean().item() - dropout) < 4 * math.sqrt(dropout * (1 - dropout) / dropped.numel())
    torch.testing.assert_close(weights[~dropped], torch.full_like(weights[~dropped], 1 / (1 - dropout)))


@given(st.integers(1, 40), st.integers(1, 40))
def test_the_same_weights_are_dropped_for_any_block_size(query_block, kv_block):
    outcomes = []
    for blocks in ((query_block, kv_block), (128, 128)):
        torch.manual_seed(5)
        outcomes.append(dropped_weights(33, 0.5, blocks))
    assert torch.equal(outcomes[0] == 0, outcomes[1] == 0)
    torch.testing.assert_close(*outcomes)


def test_each_sequence_and_each_head_drops_other_weights():
    torch.manual_seed(0)
    dropped = (dropped_weights(48, 0.5, (16, 16)) == 0).flatten(0, 1).flatten(1)
    agreement = (dropped[:, None] == dropped[None]).double().mean(-1)
    assert agreement[~torch.eye(8, dtype=torch.bool)].max() < 0.6


def test_backward_drops_the_weights_that_forward_dropped():
    """dV is the transpose of the dropped weights times the gradient: with a gradient of ones, their column sums."""
    torch.manual_seed(0)
    queries, keys = torch.randn(2, 2, 3, 40, 40)
    values = torch.eye(40).expand(2, 3, 40, 40).clone().requires_grad_()
    mask = AttentionMask(40, 40)
    weights, _ = flash_tiled.attention(
        queries, keys, values, mask, scale=0.2, dropout=0.5, query_block_size=16, kv_block_size=8
    )
    weights.backward(torch.ones_like(weights))
    column_sums = weights.detach().sum(-2)[..., None].expand_as(values)
    torch.testing.assert_close(values.grad, column_sums)


def test_everything_is_dropped_at_a_rate_of_one():
    queries = torch.randn(1, 1, 5, 4, requires_grad=True)
    context, _ = flash_tiled.attention(queries, queries, queries, AttentionMask(5, 5), scale=1.0, dropout=1.0)
    context.sum().backward()
    assert (context == 0).all()
    assert (queries.grad == 0).all()


def test_it_says_that_it_has_no_weights_to_give():
    assert [reason.code for reason in flash_tiled.check(AttentionRequest(needs_weights=True))] == ["weights_wanted"]
    assert flash_tiled.check(AttentionRequest(dropout=0.5, mask_kind="full+padding", needs_grad=True)) == []


def test_a_batch_of_nothing_gives_nothing():
    for batch, query_len in ((0, 5), (2, 0)):
        queries, keys = torch.randn(batch, 4, query_len, 8), torch.randn(batch, 2, 5, 8)
        context, _ = flash_tiled.attention(queries, keys, keys, AttentionMask(query_len, 5), scale=1.0)
        assert context.shape == queries.shape
