"""Our GPU kernels: the bound, dropout, rows that see nothing, layouts, decoding, the same bits every time.

On a GPU where there is one, else in Triton's interpreter, which is slow: there with up to 130 tokens.
test_flash_triton_mutations.py shows that each guard is needed.
"""

import math
from dataclasses import replace

import pytest
import torch

from CMHA.dropout import keep_mask
from CMHA.implementations import eager, flash_triton
from CMHA.kv_cache import KVCache
from CMHA.masks import AttentionMask
from GPT2Model.gpt2 import GPTModel
from orchestrator.evaluation.cases import (
    AXES,
    MASK_AXES,
    SHORT_AXES,
    SHORT_MASK_AXES,
    Case,
    grid,
    mask_of,
    tensors,
)
from orchestrator.evaluation.grading import interpreted
from orchestrator.evaluation.parity import measure, results
from tests.triton_interpreter import DEVICE

GPU = DEVICE == "cuda"
ON_A_GPU = pytest.mark.skipif(not GPU, reason="38,016 cases of up to 1,024 tokens would take weeks in the interpreter")
HERE = AXES if GPU else SHORT_AXES
FEWER = {("dtype",): ((torch.float32,), (torch.bfloat16,)), ("query_len", "key_len"): ((9, 40), (37, 37)),
         ("num_heads", "num_kv_heads"): ((1, 1), (2, 1)),
         ("query_block_size", "kv_block_size"): ((16, 32), (32, 16))}  # fmt: skip
MASKS_HERE = MASK_AXES if GPU else SHORT_MASK_AXES | FEWER


def run(case: Case) -> dict:
    """{"context", "dQ", "dK", "dV"} of one call."""
    inputs, grad_context, padding_mask = tensors(case)
    blocks = {"query_block_size": case.query_block_size, "kv_block_size": case.kv_block_size}
    mask = mask_of(case, padding_mask)
    context, _ = flash_triton.attention(*inputs, mask, scale=case.scale, **blocks)
    context.backward(grad_context)
    return results(context, inputs)


def assert_within_the_bound(case: Case) -> None:
    measured = measure("flash_triton", case)
    assert set(measured.error) == {"context", "dQ", "dK", "dV"}  # no case without its gradients
    assert measured.passed, (measured.failure, measured.ratio)


# --- the bound ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", list(grid(axes=HERE)), ids=str)
def test_output_and_gradients_are_within_the_bound(case, kernels):
    batch_size = 2 if GPU or case.num_heads == 2 else 1  # four heads are work enough
    assert_within_the_bound(replace(case, device=kernels, batch_size=batch_size))


@pytest.mark.parametrize("case", list(grid(axes=MASKS_HERE)), ids=str)
def test_so_they_are_under_every_mask_with_1e4_in_the_padding(case, kernels):
    assert_within_the_bound(replace(case, device=kernels))


@pytest.mark.parametrize("head_dim", [1, 8, 20, 65])
def test_a_head_may_be_of_any_width(head_dim, kernels):
    for case in (Case(), Case(dtype=torch.bfloat16, padding="right")):
        short = {"query_len": 19, "key_len": 35, "num_heads": 2, "num_kv_heads": 1, "batch_size": 1}
        assert_within_the_bound(replace(case, head_dim=head_dim, device=kernels, **short))


@pytest.mark.parametrize("head_dim", [16, 64, 80, 128])
@pytest.mark.parametrize("lengths", [(1, 1), (2, 1), (70, 1)], ids=str)
def test_with_a_single_key_the_gradient_cancels_as_it_should(lengths, head_dim, kernels):
    """The weights are 1 whatever the scores: dQ and dK are exactly 0, a difference of two equal dot products."""
    for seed in range(3):
        case = Case(head_dim=head_dim, query_len=lengths[0], key_len=1, seed=seed, causal=False, num_heads=2,
                    num_kv_heads=1, batch_size=1, device=kernels)  # fmt: skip
        assert_within_the_bound(case)


@pytest.mark.slow
@pytest.mark.parametrize("case", list(grid(axes=SHORT_MASK_AXES)), ids=str)
def test_so_they_are_in_all_pairs_of_masks_dtypes_and_tiles(case, kernels):
    assert_within_the_bound(replace(case, device=kernels))


@pytest.mark.slow
@ON_A_GPU
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("part", range(20))
def test_the_whole_grid_on_a_gpu(part, dtype, kernels):
    cases = [case for case in grid(pairwise=False, device="cuda") if case.dtype == dtype]
    for case in cases[part::20]:
        assert_within_the_bound(case)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(8))
def test_other_pairs_with_more_sequences_and_heads(seed, kernels):
    axes = HERE | {("num_heads", "num_kv_heads"): ((4, 4), (6, 3), (4, 1))}
    for number, case in enumerate(grid(axes=axes, device=kernels)):
        assert_within_the_bound(replace(case, seed=1000 * (seed + 1) + number, batch_size=3))


def test_the_grids_of_the_interpreter_hold_every_value_and_only_short_sequences():
    for short, long in ((SHORT_AXES, AXES), (SHORT_MASK_AXES, MASK_AXES)):
        assert list(short) == list(long)
        assert max(max(lengths) for lengths in short["query_len", "key_len"]) <= 130
        unchanged = set(long) - {("query_len", "key_len"), ("num_heads", "num_kv_heads")}
        assert all(short[axis] == long[axis] for axis in unchanged)
    assert interpreted({"flash_triton": flash_triton}, "cpu") == ["flash_triton"]


# --- rows that see nothing ------------------------------------------------------------------------------------


EMPTY = {
    "whole_row_padded": Case(padding="row", poison=True),
    "more_queries_than_keys": Case(query_len=45, key_len=20),
    "left_padding": Case(padding="left", poison=True),
    "documents_whose_tokens_are_all_padding": Case(documents=True, padding="right", causal=False, poison=True),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", EMPTY)
def test_a_row_that_sees_nothing_gives_exactly_0_and_sends_no_gradient(name, dtype, kernels):
    case = replace(EMPTY[name], dtype=dtype, head_dim=16, num_heads=2, num_kv_heads=1, device=kernels)
    case = case if case.query_len == 45 else replace(case, query_len=37, key_len=37)
    _, _, padding_mask = tensors(case)
    seen = mask_of(case, padding_mask).dense().expand(2, 1, -1, -1)
    empty = ~seen.any(-1).expand(2, 2, -1)
    assert empty.any()
    found = run(case)
    assert not any(tensor.isnan().any() for tensor in found.values())
    assert (found["context"][empty] == 0).all()
    assert (found["dQ"][empty] == 0).all()
    unseen = ~seen.any(-2).expand(2, 1, -1)
    for gradient in (found["dK"], found["dV"]):  # and a key that nobody sees gets none
        assert (gradient[unseen] == 0).all()


def test_what_is_hidden_changes_no_bit(kernels):
    for case in (
        Case(padding="left", documents=True, query_len=37, key_len=37),
        Case(padding="right", window=7, causal=False, query_len=37, key_len=50),
    ):
        case = replace(case, head_dim=16, num_heads=2, num_kv_heads=2, device=kernels)
        clean, poisoned = run(case), run(replace(case, poison=True))
        assert torch.equal(clean["context"], poisoned["context"])
        for key in ("dQ", "dK", "dV"):
            assert torch.equal(clean[key], poisoned[key]), key


# --- layouts --------------------------------------------------------------------------------------------------


def layouts(tensor):
    """The same numbers, laid out otherwise."""
    batch, heads, length, width = tensor.shape
    yield "tokens_before_heads", tensor.transpose(1, 2).contiguous().transpose(1, 2)
    yield "width_first", tensor.transpose(1, 3).contiguous().transpose(1, 3)
    sliced = torch.full((batch, heads, length + 2, width + 3), torch.nan, dtype=tensor.dtype, device=tensor.device)
    sliced[:, :, 1:-1, 1:-2] = tensor
    yield "a_slice_among_nan", sliced[:, :, 1:-1, 1:-2]
    every_second = torch.full((batch, heads, length, 2 * width), torch.nan, dtype=tensor.dtype, device=tensor.device)
    every_second[..., ::2] = tensor
    yield "every_second_number", every_second[..., ::2]


@pytest.mark.parametrize("rule", ["padding", "documents", "both"])
def test_one_row_of_a_mask_may_stand_for_all_sequences(rule, kernels):
    queries, keys, values = (torch.randn(3, 2, 20, 16, device=kernels) for _ in range(3))
    padding = torch.arange(20, device=kernels)[None] >= 4 if rule != "documents" else None
    documents = (torch.arange(20, device=kernels)[None] >= 11).long() if rule != "padding" else None
    mask = AttentionMask(20, 20, padding_mask=padding, documents=documents, device=kernels)
    found, _ = flash_triton.attention(queries, keys, values, mask, scale=0.25)
    exact, _ = eager.attention(queries.double(), keys.double(), values.double(), mask, scale=0.25)
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=2e-6)
    mask = AttentionMask(20, 20, padding_mask=None if padding is None else padding.expand(3, -1),
                         documents=None if documents is None else documents.expand(3, -1))  # fmt: skip
    again, _ = flash_triton.attention(queries, keys, values, mask, scale=0.25)
    assert torch.equal(again, found)


def test_what_a_mask_tells_goes_to_where_the_queries_are(kernels):
    mask = AttentionMask(4, 6, padding_mask=torch.ones(1, 6, dtype=torch.bool))
    told = flash_triton.texts_of(mask, 2, torch.device("meta"))
    assert [(rows.device.type, tuple(rows.shape)) for rows in told] == [("meta", (2, 4)), ("meta", (2, 6))]


def test_the_layout_of_the_tensors_changes_no_bit(kernels):
    case = Case(head_dim=20, query_len=19, key_len=35, num_heads=2, num_kv_heads=1, device=kernels)
    inputs, grad_context, _ = tensors(case)
    mask = AttentionMask(19, 35, device=kernels)

    def call(queries, keys, values, grad):
        context, _ = flash_triton.attention(queries, keys, values, mask, scale=0.3)
        return context, *torch.autograd.grad(context, (queries, keys, values), grad)

    expected = call(*inputs, grad_context)
    for variants in zip(*(layouts(tensor.detach()) for tensor in (*inputs, grad_context)), strict=True):
        (name, *_), grad = variants[0], variants[3][1]
        found = call(*(tensor.requires_grad_() for _, tensor in variants[:3]), grad)
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one, other), name


def test_tensors_that_only_seem_to_be_large_are_read_right(kernels):
    """Strides of 0: one key for all tokens and heads, and the gradient of a sum."""
    torch.manual_seed(0)
    queries = torch.randn(2, 2, 19, 16, device=kernels, requires_grad=True)
    one = torch.randn(2, 1, 1, 16, device=kernels, requires_grad=True)
    mask = AttentionMask(19, 35, device=kernels)
    context, _ = flash_triton.attention(queries, one.expand(2, 2, 35, 16), one.expand(2, 2, 35, 16), mask, scale=1.0)
    torch.testing.assert_close(context, one.expand(2, 2, 19, 16))  # all keys alike: the mean of equal values
    context.sum().backward()
    torch.testing.assert_close(one.grad, torch.full_like(one, 2.0 * 19))
    torch.testing.assert_close(queries.grad, torch.zeros_like(queries), rtol=0, atol=1e-4)


# --- dropout --------------------------------------------------------------------------------------------------


def dropped_weights(tokens, dropout, blocks, device, heads=2):
    """The weights after dropout: with the identity as values they are the context."""
    queries = torch.zeros(2, heads, tokens, tokens, device=device)
    values = torch.eye(tokens, device=device).expand(2, heads, tokens, tokens)
    options = dict(zip(("query_block_size", "kv_block_size"), blocks, strict=True))
    mask = AttentionMask(tokens, tokens, causal=False, device=device)
    return flash_triton.attention(queries, queries, values, mask, scale=1.0, dropout=dropout, **options)[0]


def drawn_seed(device) -> int:
    """The seed that the next call draws; torch's generator is left as it was."""
    state = torch.get_rng_state() if device == "cpu" else torch.cuda.get_rng_state()
    seed = int(torch.randint(2**62, (1,), device=device))
    torch.set_rng_state(state) if device == "cpu" else torch.cuda.set_rng_state(state)
    return seed


@pytest.mark.parametrize("dropout", [0.1, 0.5, 0.8])
def test_weights_are_dropped_at_the_rate_within_four_sigma_and_the_rest_made_larger(dropout, kernels):
    torch.manual_seed(0)
    weights = dropped_weights(96, dropout, (128, 128), kernels) * 96  # all equal 1 before dropout
    dropped = weights == 0
    assert abs(dropped.double().mean().item() - dropout) < 4 * math.sqrt(dropout * (1 - dropout) / dropped.numel())
    torch.testing.assert_close(weights[~dropped], torch.full_like(weights[~dropped], 1 / (1 - dropout)))


@pytest.mark.parametrize("blocks", [(16, 16), (16, 32), (64, 16), (128, 128), (None, None)], ids=str)
def test_for_any_block_size_the_dropped_weights_are_those_of_the_table_in_plain_pytorch(blocks, kernels):
    torch.manual_seed(5)
    kept = keep_mask(drawn_seed(kernels), (2, 2, 33, 33), slice(0, 33), slice(0, 33), 0.5, device=kernels)
    assert torch.equal(dropped_weights(33, 0.5, blocks, kernels) != 0, kept)


def test_each_sequence_and_each_head_drops_other_weights_and_each_call_too(kernels):
    torch.manual_seed(0)
    first, second = (dropped_weights(40, 0.5, (64, 64), kernels) == 0 for _ in range(2))
    dropped = torch.stack([first, second]).flatten(0, 2).flatten(1)
    agreement = (dropped[:, None] == dropped[None]).double().mean(-1)
    assert agreement[~torch.eye(8, dtype=torch.bool, device=kernels)].max() < 0.6


def test_the_seed_of_torch_decides_what_is_dropped(kernels):
    outcomes = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outcomes.append(dropped_weights(20, 0.5, (16, 16), kernels))
    assert torch.equal(outcomes[0], outcomes[1])
    assert not torch.equal(outcomes[0], outcomes[2])


@pytest.mark.parametrize("heads", [(2, 2), (4, 2), (2, 1)], ids=str)
def test_output_and_gradients_with_dropout_are_those_of_the_formula_with_that_table(heads, kernels):
    case = Case(head_dim=16, query_len=19, key_len=35, num_heads=heads[0], num_kv_heads=heads[1], padding="right",
                query_block_size=16, kv_block_size=32, device=kernels)  # fmt: skip
    inputs, grad_context, padding_mask = tensors(case)
    mask = mask_of(case, padding_mask)
    torch.manual_seed(3)
    kept = keep_mask(drawn_seed(kernels), (2, heads[0], 19, 35), slice(0, 19), slice(0, 35), 0.3, device=kernels)
    blocks = {"query_block_size": 16, "kv_block_size": 32}
    context, _ = flash_triton.attention(*inputs, mask, scale=case.scale, dropout=0.3, **blocks)
    context.backward(grad_context)

    q, k, v = leaves = [tensor.detach().double().requires_grad_() for tensor in inputs]
    group = heads[0] // heads[1]
    scores = (q @ k.repeat_interleave(group, 1).mT * case.scale).masked_fill(~mask.dense(), -torch.inf)
    exact = (scores.softmax(-1) * kept / 0.7) @ v.repeat_interleave(group, 1)
    exact.backward(grad_context.double())
    torch.testing.assert_close(context.double(), exact, rtol=1e-5, atol=1e-5)
    for one, other in zip(inputs, leaves, strict=True):
        torch.testing.assert_close(one.grad.double(), other.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dropout", [1 - 1e-7, 1.0])
def test_where_all_or_nearly_all_weights_are_dropped_nothing_overflows(dropout, kernels):
    torch.manual_seed(0)
    queries = torch.randn(1, 2, 20, 16, device=kernels, requires_grad=True)
    mask = AttentionMask(20, 20, device=kernels)
    context, _ = flash_triton.attention(queries, queries, queries, mask, scale=1.0, dropout=dropout)
    context.sum().backward()
    assert (context == 0).all()
    assert (queries.grad == 0).all()


def test_in_eval_a_model_drops_nothing_and_in_training_it_does(kernels):
    model = small_model(drop_rate=0.5).to(kernels)
    ids = torch.arange(20, device=kernels)[None] % 31
    with torch.no_grad():
        assert torch.equal(model.eval()(ids), model(ids))
        assert not torch.equal(model.train()(ids), model(ids))


# --- the same bits, and the same logits with a cache ----------------------------------------------------------


def test_fifty_repeats_give_the_same_bits(kernels):
    lengths = (500, 700) if GPU else (5, 17)
    case = Case(head_dim=16, query_len=lengths[0], key_len=lengths[1], num_heads=1, num_kv_heads=1, batch_size=1,
                padding="right", query_block_size=16, kv_block_size=16, device=kernels)  # fmt: skip
    inputs, grad_context, padding_mask = tensors(case)
    mask = mask_of(case, padding_mask)
    outcomes = []
    for _ in range(50):
        torch.manual_seed(0)
        blocks = {"query_block_size": 16, "kv_block_size": 16}
        context, _ = flash_triton.attention(*inputs, mask, scale=0.25, dropout=0.2, **blocks)
        outcomes.append((context, *torch.autograd.grad(context, inputs, grad_context)))
    for outcome in outcomes[1:]:
        assert all(torch.equal(one, other) for one, other in zip(outcome, outcomes[0], strict=True))


def small_model(**changes):
    torch.manual_seed(0)
    cfg = {"vocab_size": 31, "context_length": 48, "emb_dim": 32, "n_heads": 2, "n_layers": 1, "drop_rate": 0.0,
           "qkv_bias": True, "attn_implementation": "flash_triton", "attn_strict": True}  # fmt: skip
    return GPTModel(cfg | changes)


@torch.no_grad()
@pytest.mark.parametrize("changes", [{}, {"n_kv_heads": 1, "positions": "rope"}], ids=["gpt2", "grouped_and_rotary"])
def test_one_whole_forward_a_prefill_in_chunks_and_cached_decoding_give_the_same_logits(changes, kernels):
    model = small_model(**changes).to(kernels).eval()
    ids = torch.randint(31, (2, 21), device=kernels)
    padding_mask = torch.ones(2, 21, dtype=torch.bool, device=kernels)
    padding_mask[1, :4] = False  # on the left
    whole = model(ids, padding_mask)
    real = padding_mask[..., None].expand_as(whole)
    for chunks in ([21], [16, 5], [9, 8, 1, 1, 1, 1]):
        cache, parts, done = KVCache(1, 2, changes.get("n_kv_heads", 2), 21, 16, device=kernels), [], 0
        for size in chunks:
            done += size
            parts.append(model(ids[:, done - size : done], padding_mask[:, :done], cache=cache))
        torch.testing.assert_close(torch.cat(parts, 1)[real], whole[real], rtol=1e-5, atol=1e-5)
    reference = small_model(**changes, use_flash=False).to(kernels).eval()
    reference.load_state_dict(model.state_dict())
    torch.testing.assert_close(whole[real], reference(ids, padding_mask)[real], rtol=1e-5, atol=1e-5)
