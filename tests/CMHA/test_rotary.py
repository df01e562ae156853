"""Rotary positions: pairs of numbers turned as complex numbers are, so that scores know distances and nothing else."""

import cmath
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from CMHA.cmha import MultiHeadAttention
from CMHA.kv_cache import LayerCache
from CMHA.masks import AttentionMask
from CMHA.rotary import RotaryPositions

PADDING = torch.tensor([[1] * 9, [0, 0, 0, 0, 1, 1, 1, 1, 1], [1, 0, 1, 1, 0, 0, 1, 1, 1]]).bool()
COUNTED = [[*range(9)], [0, 0, 0, 0, 0, 1, 2, 3, 4], [0, 1, 1, 2, 3, 3, 3, 4, 5]]  # real tokens before each
DOCUMENTS = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2, 2], [0] * 9, [2, 3, 3, 3, 3, 3, 3, 3, 9]])
IN_DOCUMENTS = [[0, 1, 2, 0, 1, 2, 3, 0, 1], [*range(9)], [0, 0, 1, 2, 3, 4, 5, 6, 0]]
MASKS = {
    "one text": ({}, [[*range(9)]] * 3),
    "padding": ({"padding_mask": PADDING}, COUNTED),
    "documents": ({"documents": DOCUMENTS}, IN_DOCUMENTS),
}


def numbers(*shape, seed=1, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def as_complex_numbers(x: torch.Tensor, positions: list[list[int]], base: float = 10_000.0) -> torch.Tensor:
    """x (B, H, T, D) in float64, its pair j at position p multiplied by e^(i p base^(-2j / D))."""
    D = x.shape[-1]
    pairs = torch.complex(x[..., : D // 2].double(), x[..., D // 2 :].double())
    turns = [[[cmath.exp(1j * p * base ** (-2 * j / D)) for j in range(D // 2)] for p in row] for row in positions]
    turned = pairs * torch.tensor(turns, dtype=torch.complex128)[:, None]
    return torch.cat([turned.real, turned.imag], dim=-1)


# --- the numbers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize(("head_dim", "base"), [(2, 10_000.0), (6, 10_000.0), (16, 10_000.0), (6, 500.0)])
def test_queries_and_keys_are_multiplied_by_complex_numbers_of_length_one(kind, head_dim, base):
    rules, positions = MASKS[kind]
    queries, keys = numbers(3, 4, 9, head_dim), numbers(3, 2, 9, head_dim, seed=2)
    found = RotaryPositions(head_dim, base)(queries, keys, AttentionMask(9, 9, **rules))
    for turned, x in zip(found, (queries, keys), strict=True):
        torch.testing.assert_close(turned, as_complex_numbers(x, positions, base), rtol=0, atol=1e-14)


def test_the_angles_go_on_behind_a_cache():
    queries, keys = numbers(3, 4, 3, 6), numbers(3, 2, 3, 6, seed=2)
    found = RotaryPositions(6)(queries, keys, AttentionMask(3, 9, padding_mask=PADDING))
    last = [row[6:] for row in COUNTED]
    for turned, x in zip(found, (queries, keys), strict=True):
        torch.testing.assert_close(turned, as_complex_numbers(x, last), rtol=0, atol=1e-14)


@pytest.mark.parametrize("kind", ["one text", "padding"])
def test_they_are_turned_as_transformers_turns_them_in_llama(kind):
    rules, positions = MASKS[kind]
    queries, keys = numbers(3, 4, 9, 6, dtype=torch.float32), numbers(3, 2, 9, 6, seed=2, dtype=torch.float32)
    config = LlamaConfig(hidden_size=24, num_attention_heads=4, max_position_embeddings=9)
    cos, sin = LlamaRotaryEmbedding(config)(queries, torch.tensor(positions))
    expected = apply_rotary_pos_emb(queries, keys, cos, sin)
    found = RotaryPositions(6)(queries, keys, AttentionMask(9, 9, **rules))
    for turned, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(turned, theirs, rtol=0, atol=2e-6)  # their angles are float32: 8 of them, eps / 2


@given(shift=st.integers(0, 3000), base=st.sampled_from([10.0, 10_000.0, 500_000.0]), seed=st.integers(0, 99))
def test_scores_depend_on_how_far_apart_two_tokens_stand_and_not_on_where(shift, base, seed):
    queries, keys = numbers(1, 2, 5, 8, seed=seed), numbers(1, 2, 5, 8, seed=seed + 100)
    rotary = RotaryPositions(8, base)
    here, there = (rotary(queries, keys, AttentionMask(5, 5 + start)) for start in (0, shift))
    torch.testing.assert_close(here[0] @ here[1].mT, there[0] @ there[1].mT, rtol=0, atol=1e-11)
    apart = queries @ keys.mT - here[0] @ here[1].mT
    assert (apart.diagonal(dim1=2, dim2=3).abs() < 1e-12).all()  # at no distance nothing is turned against anything
    assert (apart.abs() > 1e-9).any(dim=(0, 1)).sum() == 20  # at any other distance something is


def test_the_slowest_pair_turns_as_slowly_as_the_docstring_says():
    for head_dim, base in ((64, 10_000.0), (6, 100.0)):
        _, sin = RotaryPositions(head_dim, base).table(AttentionMask(2, 2), torch.float64)
        angles = sin[0, 0, 1].asin().tolist()
        assert angles[0] == pytest.approx(math.asin(math.sin(1.0)), abs=1e-12)
        assert angles[-1] == pytest.approx(base ** (2 / head_dim - 1), abs=1e-12)
        assert angles == sorted(angles, reverse=True)


def test_a_pair_keeps_its_length_and_the_first_token_its_numbers():
    x = numbers(2, 3, 40, 10, dtype=torch.float32)
    turned, _ = RotaryPositions(10)(x, x, AttentionMask(40, 40))
    first, second = x.chunk(2, dim=-1)
    one, other = turned.chunk(2, dim=-1)
    torch.testing.assert_close(torch.hypot(one, other), torch.hypot(first, second), rtol=1e-6, atol=0)
    assert torch.equal(turned[:, :, 0], x[:, :, 0])
    assert ((turned - x)[:, :, 1:].abs().amax(-1) > 1e-3).all()


def test_the_gradient_is_turned_back():
    x, grad = numbers(3, 2, 9, 6).requires_grad_(), numbers(3, 2, 9, 6, seed=3)
    turned, _ = RotaryPositions(6)(x, x.detach(), AttentionMask(9, 9, padding_mask=PADDING))
    turned.backward(grad)
    back = as_complex_numbers(grad, [[-place for place in row] for row in COUNTED])
    torch.testing.assert_close(x.grad, back, rtol=0, atol=1e-14)


# --- precision -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("past", [0, 100_000])
def test_the_dtype_stays_and_only_its_own_rounding_is_lost_even_at_position_100_000(dtype, past):
    x = numbers(1, 2, 40, 16, dtype=dtype)
    queries, keys = RotaryPositions(16)(x, x, AttentionMask(40, past + 40))
    assert queries.dtype == keys.dtype == dtype
    exact = as_complex_numbers(x, [[past + t for t in range(40)]])
    lengths = torch.hypot(*x.double().chunk(2, dim=-1)).repeat(1, 1, 1, 2)
    angle = torch.finfo(torch.float64).eps * (past + 40)  # what an angle of that size is known to, in float64
    inside = 3 * torch.finfo(torch.promote_types(dtype, torch.float32)).eps  # it is turned in float32 at least
    bound = torch.finfo(dtype).eps / 2 + inside + 4 * angle  # half an eps: the result, rounded once
    assert ((queries.double() - exact).abs() <= bound * lengths).all()


def test_under_autocast_a_layer_turns_its_bfloat16_queries_in_float32():
    layer = MultiHeadAttention(12, 12, 16, 0.0, 2, rotary=RotaryPositions(6), attn_implementation="eager")
    x = numbers(1, 9, 12, dtype=torch.float32)
    with torch.no_grad():
        exact = layer(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = layer(x)
    assert found.dtype == torch.bfloat16
    tolerance = 8 * torch.finfo(torch.bfloat16).eps * exact.abs().max().item()
    torch.testing.assert_close(found.float(), exact, rtol=0, atol=tolerance)


# --- one table for all layers ------------------------------------------------------------------------------------


def test_one_table_serves_all_layers_and_each_kind_of_layer_has_its_own(monkeypatch):
    made, table = [], RotaryPositions.table
    monkeypatch.setattr(RotaryPositions, "table", lambda self, *given: made.append(self.base) or table(self, *given))
    mask, x = AttentionMask(9, 9), numbers(3, 2, 9, 6)
    for _ in range(3):
        RotaryPositions(6)(x, x, mask)
    assert made == [10_000.0]
    everything = [[*range(9)]] * 3
    for rotary, given_x in (
        (RotaryPositions(6, 50.0), x), (RotaryPositions(4), x[..., :4]), (RotaryPositions(6), x.float()),
    ):  # fmt: skip
        turned, _ = rotary(given_x, given_x, mask)
        exact = as_complex_numbers(given_x, everything, rotary.base)
        atol = 1e-14 if given_x.dtype == torch.float64 else 1e-6
        torch.testing.assert_close(turned.double(), exact, rtol=0, atol=atol)
    assert len(made) == 4


def test_the_table_follows_the_queries_to_their_device():
    """A mask that was made without a device may meet queries on another one."""
    x = torch.empty(1, 2, 9, 6, device="meta")
    queries, keys = RotaryPositions(6)(x, x, AttentionMask(9, 9))
    assert queries.device == keys.device == x.device


# --- in the layer ------------------------------------------------------------------------------------------------


def layer_and_reference(kind: str, kv_heads: int):
    """A layer with rotary positions, and what it should give: its formula in float64, by complex numbers."""
    rules, positions = MASKS[kind]
    torch.manual_seed(0)
    layer = MultiHeadAttention(10, 24, 16, 0.0, 4, qkv_bias=True, num_kv_heads=kv_heads, rotary=RotaryPositions(6))
    layer, x = layer.double().eval(), numbers(3, 9, 10)
    widths = [24, 6 * kv_heads, 6 * kv_heads]
    parts = (x @ layer.W_qkv.weight.T + layer.W_qkv.bias).split(widths, dim=-1)
    queries, keys, values = (part.reshape(3, 9, -1, 6).transpose(1, 2) for part in parts)
    queries, keys = as_complex_numbers(queries, positions), as_complex_numbers(keys, positions)
    of_head = [head * kv_heads // 4 for head in range(4)]
    scores = queries @ keys[:, of_head].mT / math.sqrt(6)
    allowed = AttentionMask(9, 9, **rules).dense().expand(3, 1, 9, 9)
    weights = scores.masked_fill(~allowed, -1e300).softmax(-1) * allowed
    context = (weights @ values[:, of_head]).transpose(1, 2).reshape(3, 9, 24)
    return layer, x, rules, context @ layer.out_proj.weight.T + layer.out_proj.bias


@pytest.mark.parametrize("name", ["eager", "sdpa", "flash_tiled"])
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@torch.no_grad()
def test_a_layer_turns_its_queries_and_keys_and_not_its_values(kind, kv_heads, name):
    layer, x, rules, expected = layer_and_reference(kind, kv_heads)
    layer.set_attention(name)
    torch.testing.assert_close(layer(x, mask=AttentionMask(9, 9, **rules)), expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("chunks", [[1] * 9, [4, 5], [1, 6, 2]], ids=str)
@torch.no_grad()
def test_a_cache_holds_keys_that_are_turned_already(kind, chunks):
    layer, x, rules, expected = layer_and_reference(kind, 2)
    cache, pieces = LayerCache(3, 2, 9, 6, dtype=torch.float64), []
    for piece in x.split(chunks, dim=1):
        seen = cache.length + piece.shape[1]
        mask = AttentionMask(piece.shape[1], seen, **{name: rule[:, :seen] for name, rule in rules.items()})
        pieces.append(layer(piece, mask=mask, cache=cache))
    torch.testing.assert_close(torch.cat(pieces, dim=1), expected, rtol=0, atol=1e-13)


def test_a_layer_has_the_same_weights_with_and_without():
    with_rotary = MultiHeadAttention(12, 12, 16, 0.0, 2, rotary=RotaryPositions(6)).state_dict()
    without = MultiHeadAttention(12, 12, 16, 0.0, 2).state_dict()
    assert {name: w.shape for name, w in with_rotary.items()} == {name: w.shape for name, w in without.items()}


# --- what is refused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head_dim", [7, 1, 0, -2])
def test_a_head_that_is_no_row_of_pairs_is_refused(head_dim):
    with pytest.raises(ValueError, match=rf"turn pairs of numbers: head_dim must be even, got {head_dim}"):
        RotaryPositions(head_dim)


@pytest.mark.parametrize("base", [0.0, -1.0, math.inf, math.nan])
def test_a_base_that_gives_no_angles_is_refused(base):
    with pytest.raises(ValueError, match=r"base of rotary positions must be a number above 0, usually 10,000, got"):
        RotaryPositions(6, base)


@pytest.mark.parametrize("shape", [(1, 2, 9, 4), (1, 2, 8, 6), (1, 2, 1, 6), (1, 2, 9, 2)])
def test_queries_that_the_angles_do_not_fit_are_refused_also_where_they_would_broadcast(shape):
    x = torch.zeros(shape)
    with pytest.raises(ValueError, match=r"for 9 tokens and heads 6 wide, got queries"):
        RotaryPositions(6)(x, x, AttentionMask(9, 9))
    with pytest.raises(ValueError, match=r"heads 2 wide"):
        RotaryPositions(2)(torch.zeros(1, 2, 9, 6), torch.zeros(1, 2, 9, 6), AttentionMask(9, 9))
