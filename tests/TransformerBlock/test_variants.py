"""RMSNorm, SwiGLU and the exact GELU are the papers' formulas, and a cfg gets the parts that it names."""

import math

import pytest
import torch
import transformers
from torch import nn
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from CMHA.rotary import RotaryPositions
from TransformerBlock import variants
from TransformerBlock.layers import GELU, FeedForward, LayerNorm
from TransformerBlock.transformer_block import TransformerBlock
from TransformerBlock.variants import NoPositionEmbedding, RMSNorm, SwiGLU, exact_feed_forward, swiglu_width

MINIMAL = {"emb_dim": 30, "n_heads": 5, "context_length": 16}


def numbers(*shape, seed=0, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def rms_norm(dtype=torch.float64, width=30) -> RMSNorm:
    norm = RMSNorm(width)
    with torch.no_grad():
        norm.weight.copy_(numbers(width, seed=5))
    return norm.to(dtype)


# --- RMSNorm -------------------------------------------------------------------------------------------------


def test_rms_norm_divides_by_the_root_of_the_mean_of_squares():
    x, norm = 0.02 * numbers(4, 7, 30) + 0.01, rms_norm()  # small and with a mean, so that neither goes unseen

    def formula(x, divisor=30, eps=1e-5):
        return x / ((x**2).sum(-1, keepdim=True) / divisor + eps).sqrt() * norm.weight

    torch.testing.assert_close(norm(x), formula(x), atol=1e-14, rtol=1e-14)
    centred = x - x.mean(-1, keepdim=True)
    for unlike in (formula(centred), formula(x, divisor=29), formula(x, eps=1e-6), formula(x, eps=0.0)):
        assert (norm(x) - unlike).abs().max() > 1e-4


def test_rms_norm_s_output_and_gradients_are_those_of_llama_s():
    ours, theirs = rms_norm(torch.float32), LlamaRMSNorm(30, eps=1e-5)
    theirs.load_state_dict(ours.state_dict())
    x, grad = numbers(4, 7, 30, seed=1, dtype=torch.float32), numbers(4, 7, 30, seed=2, dtype=torch.float32)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    for layer, given in zip((ours, theirs), inputs, strict=True):
        layer(given).backward(grad)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.weight.grad, theirs.weight.grad, rtol=1e-5, atol=1e-5)


def test_rms_norm_starts_as_plain_normalisation_and_has_no_bias():
    norm = RMSNorm(30)
    assert {name: w.tolist() for name, w in norm.named_parameters()} == {"weight": [1.0] * 30}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1.0, 3000.0])
def test_in_half_precision_squares_are_summed_in_float32(dtype, scale):
    """3000 squared is more than float16 holds, and 512 bfloat16 squares summed in bfloat16 lose a tenth."""
    x, norm = (scale * numbers(6, 512)).to(dtype), rms_norm(dtype, 512)
    assert norm(x).dtype == dtype
    wide, weight = x.double(), norm.weight.double()
    exact = wide / ((wide**2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight
    assert ((norm(x).double() - exact).abs() <= torch.finfo(dtype).eps * exact.abs() + 1e-6).all()


def test_a_token_of_zeros_stays_zero_with_a_finite_gradient():
    x = torch.zeros(1, 2, 30, dtype=torch.float64, requires_grad=True)
    y = rms_norm()(x)
    y.sum().backward()
    assert (y == 0).all()
    assert torch.isfinite(x.grad).all()


# --- the exact GELU ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ff_dim", "width"), [(None, 120), (50, 50)])
def test_the_exact_layer_is_gpt2_s_with_erf_and_takes_the_same_weights(ff_dim, width):
    torch.manual_seed(0)
    cfg = {"emb_dim": 30, "ff_dim": ff_dim}
    exact, usual = exact_feed_forward(cfg).double(), FeedForward(cfg).double()
    assert exact.up_proj.weight.shape == exact.down_proj.weight.T.shape == (width, 30)
    assert list(exact.state_dict()) == list(usual.state_dict())
    usual.load_state_dict(exact.state_dict())
    x = 3 * numbers(2, 5, 30)
    hidden = x @ exact.up_proj.weight.T + exact.up_proj.bias
    bent = [0.5 * v * (1 + math.erf(v / math.sqrt(2))) for v in hidden.flatten().tolist()]
    bent = torch.tensor(bent, dtype=torch.float64).view_as(hidden)
    formula = bent @ exact.down_proj.weight.T + exact.down_proj.bias
    torch.testing.assert_close(exact(x), formula, atol=1e-12, rtol=0)
    assert 1e-5 < (exact(x) - usual(x)).abs().max() < 1e-2


def test_the_two_forms_are_nowhere_more_than_5e_4_apart():
    x = torch.linspace(-12, 12, 100_001, dtype=torch.float64)
    gap = (exact_feed_forward(MINIMAL).gelu(x) - GELU()(x)).abs()
    assert 4e-4 < gap.max() < 5e-4
    assert gap[x.abs() > 6].max() < 1e-8  # far from zero both let all through, or nothing


# --- SwiGLU --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ff_dim", "width"), [(None, 80), (50, 50), (7, 7)])
def test_swiglu_is_its_formula_and_llama_s_layer(ff_dim, width):
    torch.manual_seed(0)
    ours = SwiGLU({"emb_dim": 30, "ff_dim": ff_dim}).double()
    config = transformers.LlamaConfig(hidden_size=30, num_attention_heads=5, intermediate_size=width)
    theirs = LlamaMLP(config).double()
    theirs.load_state_dict(ours.state_dict())
    x, grad = numbers(2, 5, 30), numbers(2, 5, 30, seed=1)
    gate, up, down = ours.gate_proj.weight, ours.up_proj.weight, ours.down_proj.weight
    assert gate.shape == up.shape == down.T.shape == (width, 30)
    opened = x @ gate.T
    formula = (opened / (1 + torch.exp(-opened)) * (x @ up.T)) @ down.T
    torch.testing.assert_close(ours(x), formula, atol=1e-14, rtol=0)
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-14, rtol=0)
    ours(x).backward(grad)
    theirs(x).backward(grad)
    for (name, one), (other_name, other) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert name == other_name
        torch.testing.assert_close(one.grad, other.grad, atol=1e-13, rtol=0)


def test_swiglu_has_three_matrices_and_no_biases_and_treats_each_token_by_itself():
    torch.manual_seed(0)
    layer, x = SwiGLU({"emb_dim": 30}).double(), numbers(1, 5, 30)
    assert [name for name, _ in layer.named_parameters()] == ["gate_proj.weight", "up_proj.weight", "down_proj.weight"]
    changed = x.clone()
    changed[:, 2] += 1
    assert (layer(x) != layer(changed)).any(-1).tolist() == [[False, False, True, False, False]]


def test_its_width_gives_as_many_weights_as_gpt2_s_layer_and_is_a_multiple_of_8():
    assert swiglu_width(768) == 2048
    assert 3 * 768 * 2048 == 2 * 768 * 4 * 768
    for emb_dim in range(1, 2000):
        width = swiglu_width(emb_dim)
        assert width % 8 == 0
        assert 8 * emb_dim <= 3 * width < 8 * emb_dim + 3 * 8  # 8/3 of it at least, and less than 8 more


# --- who gets what -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("missing", [True, False])
def test_gpt2_s_parts_are_handed_out_where_the_cfg_says_so_or_nothing(missing):
    cfg = MINIMAL if missing else {**MINIMAL, "norm": "layernorm", "mlp": "gelu", "positions": "learned"}
    assert type(variants.norm(cfg)) is LayerNorm
    assert type(variants.feed_forward(cfg)) is FeedForward
    assert type(variants.feed_forward(cfg).gelu) is GELU
    assert variants.rotary(cfg) is None
    table = variants.position_embedding(cfg)
    assert type(table) is nn.Embedding
    assert table.weight.shape == (16, 30)


def test_the_other_parts_are_handed_out_where_it_names_them():
    cfg = {**MINIMAL, "norm": "rmsnorm", "mlp": "swiglu", "positions": "rope", "ff_dim": 44}
    norm, feed_forward, rotary = variants.norm(cfg), variants.feed_forward(cfg), variants.rotary(cfg)
    assert type(norm) is RMSNorm
    assert norm.weight.shape == (30,)
    assert type(feed_forward) is SwiGLU
    assert feed_forward.gate_proj.out_features == 44
    assert type(rotary) is RotaryPositions
    assert (rotary.head_dim, rotary.base) == (6, 10_000.0)
    block = TransformerBlock(cfg)
    assert [type(block.norm_1), type(block.norm_2), type(block.feed_forward)] == [RMSNorm, RMSNorm, SwiGLU]
    assert block.norm_1.weight is not block.norm_2.weight
    assert block.attention.rotary.head_dim == 6


def test_a_block_with_the_exact_gelu_has_all_else_of_gpt2_s():
    block, usual = TransformerBlock({**MINIMAL, "mlp": "gelu_exact"}), TransformerBlock(MINIMAL)
    assert type(block.feed_forward) is FeedForward
    assert type(block.feed_forward.gelu) is nn.GELU
    assert block.feed_forward.gelu.approximate == "none"
    ours, theirs = ({name: tensor.shape for name, tensor in one.state_dict().items()} for one in (block, usual))
    assert ours == theirs


def test_with_rotary_positions_nothing_is_added_to_the_embeddings():
    nothing = variants.position_embedding({**MINIMAL, "positions": "rope"})
    assert type(nothing) is NoPositionEmbedding
    assert list(nothing.parameters()) == list(nothing.buffers()) == []
    x = numbers(2, 5, 30, dtype=torch.bfloat16)
    added = x + nothing(torch.arange(5)[None])
    assert added.dtype == x.dtype
    assert torch.equal(added, x)


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("norm", "rms", r"'norm' must be 'layernorm' or 'rmsnorm', got 'rms'\. Did you mean 'rmsnorm'"),
        ("mlp", "SwiGLU", r"'mlp' must be 'gelu' or 'gelu_exact' or 'swiglu', got 'SwiGLU'"),
        ("positions", "rotary", r"'positions' must be 'learned' or 'rope', got 'rotary'"),
        ("norm", None, r"'norm' must be .*, got None"),
        ("mlp", "gelu_exakt", r"Did you mean 'gelu_exact'"),
        ("mlp", ["gelu"], r"'mlp' must be .*, got \['gelu'\]"),
    ],
)
def test_a_block_used_alone_refuses_a_part_that_nobody_has(key, value, expected):
    with pytest.raises(ValueError, match=expected):
        TransformerBlock({**MINIMAL, key: value})


def test_a_head_that_is_no_row_of_pairs_is_refused():
    with pytest.raises(ValueError, match=r"head_dim must be even, got 5"):
        TransformerBlock({**MINIMAL, "n_heads": 6, "positions": "rope"})
