"""One block: it normalises what it reads, adds what it finds, and looks only backwards."""

import math

import pytest
import torch
from torch import nn

from CMHA.choosing import AttentionSettings
from GPT2Model.config import KEYS
from TransformerBlock.layers import FeedForward, LayerNorm
from TransformerBlock.transformer_block import TransformerBlock

MINIMAL = {"emb_dim": 30, "n_heads": 5, "context_length": 16}


@pytest.fixture
def block() -> TransformerBlock:
    torch.manual_seed(0)
    block = TransformerBlock(MINIMAL).double().eval()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return block


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(2, 9, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def normalised(x, norm):
    centred = x - x.mean(-1, keepdim=True)
    return centred / ((centred**2).mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight + norm.bias


def attended(x, attention):
    """Causal attention written with one loop over heads."""
    queries, keys, values = (x @ attention.W_qkv.weight.T + attention.W_qkv.bias).chunk(3, dim=-1)
    tokens, heads = x.shape[1], []
    hidden = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
    for head in range(5):
        columns = slice(6 * head, 6 * head + 6)
        scores = queries[..., columns] @ keys[..., columns].transpose(1, 2) / math.sqrt(6)
        heads.append(scores.masked_fill(hidden, -math.inf).softmax(-1) @ values[..., columns])
    return torch.cat(heads, -1) @ attention.out_proj.weight.T + attention.out_proj.bias


def fed_forward(x, layer):
    inner = x @ layer.up_proj.weight.T + layer.up_proj.bias
    inner = 0.5 * inner * (1 + torch.tanh(math.sqrt(2 / math.pi) * (inner + 0.044715 * inner**3)))
    return inner @ layer.down_proj.weight.T + layer.down_proj.bias


def test_the_block_is_pre_norm_attention_then_pre_norm_feed_forward_each_added_to_the_stream(block, x):
    middle = x + attended(normalised(x, block.norm_1), block.attention)
    expected = middle + fed_forward(normalised(middle, block.norm_2), block.feed_forward)
    torch.testing.assert_close(block(x), expected, atol=1e-12, rtol=0)


def test_a_block_that_adds_nothing_is_the_identity(block, x):
    """Both residual paths are straight: no norm, no scale on the stream itself."""
    for linear in (block.attention.out_proj, block.feed_forward.down_proj):
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
    assert torch.equal(block(x), x)


@pytest.mark.parametrize("silent", ["attention.out_proj", "feed_forward.down_proj"])
def test_either_half_alone_is_added_to_the_stream(block, x, silent):
    linear = block.get_submodule(silent)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    if silent.startswith("attention"):
        expected = x + fed_forward(normalised(x, block.norm_2), block.feed_forward)
    else:
        expected = x + attended(normalised(x, block.norm_1), block.attention)
    torch.testing.assert_close(block(x), expected, atol=1e-12, rtol=0)


def test_a_later_token_never_changes_an_earlier_one(block, x):
    for changed in range(9):
        other = x.clone()
        other[:, changed] += 1
        moved = (block(x) != block(other)).any(-1).any(0)
        assert not moved[:changed].any()
        assert moved[changed:].all()


def test_a_block_used_alone_has_the_defaults_of_the_table_of_keys():
    block = TransformerBlock(MINIMAL)
    defaults = {name: key.default for name, key in KEYS.items()}
    for name, value in vars(block.attention.settings).items():
        assert value == defaults[name], name
    assert set(vars(AttentionSettings())) <= set(KEYS)
    assert block.dropout.p == defaults["drop_rate"]
    assert block.attention.dropout == defaults["drop_rate"]
    assert (block.attention.W_qkv.bias is not None) == defaults["qkv_bias"]
    assert defaults["ff_dim"] is None
    assert block.feed_forward.up_proj.out_features == 4 * 30
    assert defaults["n_kv_heads"] is None
    assert block.attention.num_kv_heads == 5
    spelled_out = TransformerBlock({**MINIMAL, **{key: defaults[key] for key in ("norm", "mlp", "positions")}})
    for each in (block, spelled_out):
        assert type(each.norm_1) is type(each.norm_2) is LayerNorm
        assert type(each.feed_forward) is FeedForward
        assert each.attention.rotary is None


def test_what_the_cfg_says_replaces_the_defaults():
    cfg = {
        **MINIMAL, "drop_rate": 0.3, "qkv_bias": False, "ff_dim": 44, "n_kv_heads": 1, "use_flash": False,
        "attn_strict": True, "flash_kv_block_size": 8,
    }  # fmt: skip
    block = TransformerBlock(cfg)
    assert block.dropout.p == block.attention.dropout == 0.3
    assert block.attention.W_qkv.bias is None
    assert block.feed_forward.up_proj.out_features == 44
    assert block.attention.num_kv_heads == 1
    assert block.attention.settings == AttentionSettings(use_flash=False, attn_strict=True, flash_kv_block_size=8)


def test_dropout_acts_in_training_only_and_on_what_is_added():
    torch.manual_seed(0)
    block = TransformerBlock({**MINIMAL, "drop_rate": 0.5}).double()
    x = torch.randn(1, 9, 30, dtype=torch.float64)
    assert not torch.equal(block(x), block(x))
    block.eval()
    assert torch.equal(block(x), block(x))
    block.train()
    for linear in (block.attention.out_proj, block.feed_forward.down_proj):
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
    assert torch.equal(block(x), x)  # the stream itself is never dropped


@pytest.mark.parametrize("half", ["attention", "feed_forward"])
def test_what_each_half_adds_is_dropped_or_made_larger(half):
    torch.manual_seed(0)
    block = TransformerBlock({**MINIMAL, "drop_rate": 0.25}).double()
    block.attention.dropout = 0.0  # its own dropout, on the weights, is another matter
    silent = block.feed_forward.down_proj if half == "attention" else block.attention.out_proj
    nn.init.zeros_(silent.weight)
    nn.init.zeros_(silent.bias)
    x = torch.randn(40, 9, 30, dtype=torch.float64)
    added_in_training = block.train()(x) - x
    added = block.eval()(x) - x
    kept = (added_in_training / added - 1 / 0.75).abs() < 1e-6
    dropped = added_in_training == 0
    assert (kept | dropped).all()
    rate, sigma = dropped.double().mean().item(), (0.25 * 0.75 / dropped.numel()) ** 0.5
    assert abs(rate - 0.25) < 4 * sigma


def test_heads_that_do_not_divide_the_width_are_refused():
    with pytest.raises(ValueError, match="num_heads=4"):
        TransformerBlock({**MINIMAL, "n_heads": 4})
    with pytest.raises(ValueError, match="num_heads=4"):
        TransformerBlock({**MINIMAL, "n_heads": 4, "positions": "rope"})
    with pytest.raises(ValueError, match="unknown attn_implementation 'egaer'"):
        TransformerBlock({**MINIMAL, "attn_implementation": "egaer"})
