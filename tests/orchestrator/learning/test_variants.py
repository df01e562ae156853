"""The variants compute what their names say, seen against torch's own layers and formulas written out."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from GPT2Model.config import from_preset
from GPT2Model.generation import generate, make_cache
from GPT2Model.gpt2 import GPTModel
from GPT2Model.tracing import trace
from orchestrator.learning.variants import post_norm, without_norm, without_positions
from orchestrator.training.optimizer import decay_groups
from orchestrator.views.trace_figures import residual_norms


def new(seed: int = 0, **changes) -> GPTModel:
    """A small model in float64 whose biases and norms are not at their start, so that leaving one out is seen."""
    torch.manual_seed(seed)
    cfg = {"vocab_size": 40, "context_length": 16, "emb_dim": 24, "n_heads": 3, "n_layers": 2, **changes}
    model = GPTModel(from_preset("nano", **cfg)).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


IDS = torch.randint(40, (3, 11), generator=torch.Generator().manual_seed(1))
CAUSAL = torch.ones(11, 11, dtype=torch.bool).triu(1)  # True = hidden, as torch's encoder layer has it


def encoder_layer(block) -> nn.TransformerEncoderLayer:
    """torch's own post-norm layer with the weights of one of our blocks."""
    layer = nn.TransformerEncoderLayer(
        24, 3, 96, dropout=0.0, activation=lambda x: F.gelu(x, approximate="tanh"), batch_first=True, norm_first=False
    ).double()
    ours = block.attention
    layer.self_attn.load_state_dict({
        "in_proj_weight": ours.W_qkv.weight, "in_proj_bias": ours.W_qkv.bias,
        "out_proj.weight": ours.out_proj.weight, "out_proj.bias": ours.out_proj.bias,
    })  # fmt: skip
    layer.linear1.load_state_dict(block.feed_forward.up_proj.state_dict())
    layer.linear2.load_state_dict(block.feed_forward.down_proj.state_dict())
    layer.norm1.load_state_dict(block.norm_1.state_dict())
    layer.norm2.load_state_dict(block.norm_2.state_dict())
    return layer


def embeddings(model, ids=IDS):
    return model.token_embedding.weight[ids] + model.position_embedding.weight[: ids.shape[1]]


def test_post_norm_is_torchs_encoder_layer_with_norm_first_false():
    model = post_norm(new())
    x = embeddings(model)
    for block in model.blocks:
        x = encoder_layer(block)(x, src_mask=CAUSAL)
    torch.testing.assert_close(model(IDS), x @ model.token_embedding.weight.T, rtol=0, atol=1e-11)


def test_in_post_norm_the_stream_itself_has_mean_0_and_variance_1_behind_every_block():
    model = new()
    with torch.no_grad():
        for block in model.blocks:
            block.norm_2.weight.fill_(1.0)
            block.norm_2.bias.zero_()
    seen = []
    for block in post_norm(model).blocks:
        block.register_forward_hook(lambda module, args, output: seen.append(output))
    model(IDS)
    assert len(seen) == 2
    for stream in seen:
        torch.testing.assert_close(stream.mean(-1), torch.zeros(3, 11).double(), rtol=0, atol=1e-12)
        torch.testing.assert_close(stream.var(-1, unbiased=False), torch.ones(3, 11).double(), rtol=0, atol=1e-3)


def test_without_norm_is_the_sum_of_what_each_layer_adds():
    """The forward pass with every norm left out, from the weights alone."""
    model = without_norm(new())
    x = embeddings(model)
    for block in model.blocks:
        q, k, v = (part.view(3, 11, 3, 8).transpose(1, 2) for part in block.attention.W_qkv(x).chunk(3, dim=-1))
        weights = (q @ k.mT / 8**0.5).masked_fill(CAUSAL, float("-inf")).softmax(-1)
        x = x + block.attention.out_proj((weights @ v).transpose(1, 2).flatten(2))
        hidden = F.gelu(block.feed_forward.up_proj(x), approximate="tanh")
        x = x + block.feed_forward.down_proj(hidden)
    torch.testing.assert_close(model(IDS), x @ model.token_embedding.weight.T, rtol=0, atol=1e-9)
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in new().parameters()) - 5 * 2 * 24


def moved_by_another_order(model) -> float:
    """How far the last logits move when the tokens before the last change places."""
    order = torch.tensor([4, 2, 9, 0, 7, 1, 8, 3, 6, 5, 10])
    assert order.tolist() != list(range(11))
    with torch.no_grad():
        return (model(IDS)[:, -1] - model(IDS[:, order])[:, -1]).abs().max().item()


def test_one_layer_without_positions_cannot_tell_the_order_of_earlier_tokens():
    assert moved_by_another_order(without_positions(new(n_layers=1))) < 1e-12
    assert moved_by_another_order(new(n_layers=1)) > 1e-2


def test_two_layers_without_positions_can_through_the_causal_mask():
    """Each token of layer 1 has mixed those before it, and which those are depends on the order."""
    assert moved_by_another_order(without_positions(new(n_layers=2))) > 1e-2


def test_without_positions_and_without_the_mask_no_depth_tells_the_order():
    """What gives the order away in two layers is the causal mask, and nothing else."""
    from CMHA.masks import AttentionMask

    def last(ids):
        x = model.token_embedding(ids) + model.position_embedding.weight[0]
        for block in model.blocks:
            x = block(x, mask=AttentionMask(11, 11, causal=False))
        return model.head(model.final_norm(x))[:, -1]

    model = without_positions(new(n_layers=2))
    torch.testing.assert_close(last(IDS), last(torch.cat([IDS[:, :-1].flip(1), IDS[:, -1:]], 1)), rtol=0, atol=1e-12)


def test_a_model_without_a_table_of_positions_is_refused_with_what_to_do():
    with pytest.raises(ValueError, match=r'turns queries and keys: build one with positions="learned"'):
        without_positions(new(positions="rope"))


def test_norms_of_either_kind_are_taken_out_and_moved():
    for norm in ("layernorm", "rmsnorm"):
        model = new(norm=norm)
        for block in model.blocks:  # silent blocks: the stream that reaches the head is the embeddings
            for linear in (block.attention.out_proj, block.feed_forward.down_proj):
                nn.init.zeros_(linear.weight)
                nn.init.zeros_(linear.bias)
        bare = without_norm(copy.deepcopy(model))
        torch.testing.assert_close(bare(IDS), embeddings(bare) @ bare.head.weight.T, rtol=0, atol=1e-12)
        moved, x = post_norm(model), embeddings(model)
        for block in moved.blocks:
            x = block.norm_2(block.norm_1(x))
        torch.testing.assert_close(moved(IDS), x @ moved.head.weight.T, rtol=0, atol=1e-12)


def test_the_table_of_positions_stays_at_zero_in_training():
    model = without_positions(new()).train()
    optimizer = torch.optim.AdamW(decay_groups(model, 0.1), lr=0.1)
    before = model.token_embedding.weight.clone()
    F.cross_entropy(model(IDS).flatten(0, 1), IDS.flatten()).backward()
    optimizer.step()
    assert model.position_embedding.weight.count_nonzero() == 0
    assert not torch.equal(model.token_embedding.weight, before)


@pytest.mark.parametrize("variant", [without_norm, post_norm, without_positions])
def test_every_variant_is_causal_takes_the_toggle_and_the_cache_and_learns(variant):
    model = variant(new())
    changed = IDS.clone()
    changed[:, 6] = (changed[:, 6] + 1) % 40
    with torch.no_grad():
        logits, other = model(IDS), model(changed)
        assert torch.equal(logits[:, :6], other[:, :6])
        assert (logits[:, 6:] - other[:, 6:]).abs().amax(-1).min() > 1e-6
        close = {"rtol": 0, "atol": 1e-9 * logits.abs().max().item()}
        with model.using_attention("eager"):
            torch.testing.assert_close(model(IDS), logits, **close)
        cache = make_cache(model, 3, 11)  # the first 4 tokens, then 5 at once, then one at a time
        pieces = [model(ids, cache=cache) for ids in IDS.split([4, 5, 1, 1], dim=1)]
        torch.testing.assert_close(torch.cat(pieces, dim=1), logits, **close)
    assert torch.equal(generate(model, IDS[:1, :4], 6), generate(model, IDS[:1, :4], 6, use_cache=False))
    model(IDS).square().mean().backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None or p.grad.count_nonzero() == 0]
    assert missing == (["position_embedding.weight"] if variant is without_positions else [])


@pytest.mark.parametrize("variant", [without_norm, post_norm, without_positions])
def test_a_variant_is_another_function_of_the_same_weights(variant):
    model = new()
    before = copy.deepcopy(model)
    changed = variant(model)
    assert changed is model
    assert (changed(IDS) - before(IDS)).abs().max() > 1e-2
    names = set(changed.state_dict())
    assert names <= set(before.state_dict())
    assert set(before.state_dict()) - names <= {name for name in before.state_dict() if "norm" in name}


def test_what_is_no_model_or_was_changed_already_is_refused():
    with pytest.raises(TypeError, match="got dict: try post_norm"):
        post_norm({})
    for first, second in ((post_norm, without_norm), (without_norm, post_norm), (post_norm, post_norm)):
        with pytest.raises(ValueError, match="build a new GPTModel"):
            second(first(new()))


@pytest.mark.parametrize("norms", [without_norm, post_norm])
def test_norms_and_positions_go_together_in_either_order(norms):
    torch.testing.assert_close(
        norms(without_positions(new()))(IDS), without_positions(norms(new()))(IDS), rtol=0, atol=0
    )


def test_a_post_norm_trace_has_the_stream_after_attention_and_its_figure_can_be_drawn():
    model = post_norm(new())
    t = trace(model, IDS)
    stream, exact = t["embeddings"], {"rtol": 0, "atol": 1e-12}
    for i, block in enumerate(model.blocks):
        after = stream + t[f"blocks.{i}.attention.output"]
        torch.testing.assert_close(t[f"blocks.{i}.after_attention"], after, **exact)
        normed = F.layer_norm(after, (24,), block.norm_1.weight, block.norm_1.bias)
        torch.testing.assert_close(t[f"blocks.{i}.norm_1"], normed.detach(), **exact)
        stream = t[f"blocks.{i}.output"]
    assert len(residual_norms(t).axes[0].get_yticks()) == 5
    patched = trace(model, IDS, patch={"blocks.1.after_attention": torch.zeros_like})
    assert (patched.logits - t.logits).abs().max() > 1e-2


@pytest.mark.parametrize("norms", [without_norm, post_norm])
def test_a_model_whose_norms_moved_is_not_saved_as_a_folder_and_the_way_that_is_named_works(norms, tmp_path):
    model = norms(without_positions(new(seed=1)))
    with pytest.raises(ValueError, match=rf"{norms.__name__}\(\) cannot be saved as a folder.*weights_only=True"):
        model.save_pretrained(tmp_path / "folder")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError) as caught:
        copy.deepcopy(model).save_pretrained(tmp_path / "folder")
    assert f"{norms.__name__}(without_positions(GPTModel(cfg))).load_state_dict" in str(caught.value)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    again = norms(without_positions(new(seed=2)))
    again.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    assert torch.equal(again(IDS), model(IDS))


def test_a_model_without_positions_is_saved_and_opened_again(tmp_path):
    model = without_positions(new())
    model.save_pretrained(tmp_path)
    again = GPTModel.from_pretrained(tmp_path)
    assert type(again) is GPTModel
    assert torch.equal(again(IDS), model(IDS))


def test_a_new_start_leaves_positions_away_and_only_where_they_were_taken():
    model = without_positions(new(n_layers=1))
    before = model.token_embedding.weight.clone()
    model.initialise()
    assert not torch.equal(model.token_embedding.weight, before)
    assert model.position_embedding.weight.count_nonzero() == 0
    assert moved_by_another_order(model) < 1e-12
    other = post_norm(new())
    other.initialise()
    assert other.position_embedding.weight.count_nonzero() == other.position_embedding.weight.numel()


def test_a_class_of_ones_own_is_not_turned_into_another():
    class Mine(GPTModel):
        pass

    with pytest.raises(TypeError, match="got Mine"):
        post_norm(Mine(new().cfg))
