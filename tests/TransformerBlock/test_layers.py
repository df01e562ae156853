"""LayerNorm, GELU and FeedForward are GPT-2's formulas, and no neighbour of them."""

import math

import pytest
import torch

from TransformerBlock.layers import GELU, FeedForward, LayerNorm


def test_layer_norm_divides_by_the_biased_variance():
    generator = torch.Generator().manual_seed(0)
    x = 3 * torch.randn(4, 7, 30, generator=generator, dtype=torch.float64) + 2
    norm = LayerNorm(30).double()
    with torch.no_grad():
        norm.weight.copy_(torch.randn(30, generator=generator))
        norm.bias.copy_(torch.randn(30, generator=generator))
    centred = x - x.sum(-1, keepdim=True) / 30

    def formula(divisor: int, eps: float = 1e-5):
        return centred / ((centred**2).sum(-1, keepdim=True) / divisor + eps).sqrt() * norm.weight + norm.bias

    torch.testing.assert_close(norm(x), formula(30), atol=1e-12, rtol=0)
    for unlike in (formula(29), formula(30, eps=1e-6)):  # unbiased; another epsilon
        assert (norm(x) - unlike).abs().max() > 1e-9


def test_layer_norm_starts_as_plain_normalisation():
    norm = LayerNorm(30)
    assert torch.equal(norm.weight, torch.ones(30))
    assert torch.equal(norm.bias, torch.zeros(30))


def test_gelu_is_the_tanh_form_and_not_the_exact_one():
    x = torch.linspace(-6, 6, 241, dtype=torch.float64)
    by_hand = [0.5 * v * (1 + math.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3))) for v in x.tolist()]
    exact = [0.5 * v * (1 + math.erf(v / math.sqrt(2))) for v in x.tolist()]
    torch.testing.assert_close(GELU()(x), torch.tensor(by_hand, dtype=torch.float64), atol=1e-14, rtol=0)
    assert (GELU()(x) - torch.tensor(exact, dtype=torch.float64)).abs().max() > 1e-4


@pytest.mark.parametrize(("ff_dim", "width"), [(None, 120), (50, 50)])
def test_the_feed_forward_layer_widens_applies_gelu_and_narrows(ff_dim, width):
    torch.manual_seed(0)
    layer = FeedForward({"emb_dim": 30, "ff_dim": ff_dim}).double()
    x = torch.randn(2, 5, 30, dtype=torch.float64)
    up, down = layer.up_proj, layer.down_proj
    assert up.weight.shape == (width, 30)
    assert down.weight.shape == (30, width)
    inner = x @ up.weight.T + up.bias
    inner = 0.5 * inner * (1 + torch.tanh(math.sqrt(2 / math.pi) * (inner + 0.044715 * inner**3)))
    torch.testing.assert_close(layer(x), inner @ down.weight.T + down.bias, atol=1e-12, rtol=0)


def test_the_feed_forward_layer_treats_each_token_by_itself():
    torch.manual_seed(0)
    layer = FeedForward({"emb_dim": 30}).double()
    x = torch.randn(1, 5, 30, dtype=torch.float64)
    changed = x.clone()
    changed[:, 2] += 1
    moved = (layer(x) != layer(changed)).any(-1)
    assert moved.tolist() == [[False, False, True, False, False]]
