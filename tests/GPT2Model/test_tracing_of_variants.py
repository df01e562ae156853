"""trace() of models with RMSNorm, SwiGLU, rotary positions and grouped heads: each value, and what is said of it."""

import pytest
import torch

from GPT2Model.config import from_preset
from GPT2Model.gpt2 import GPTModel
from GPT2Model.tracing import diff, trace, zero_heads
from GPT2Model.weights.weight_formats import VARIANTS, unlike_gpt2

EPS = torch.finfo(torch.float32).eps
SIZES = {"vocab_size": 90, "context_length": 32, "emb_dim": 24, "n_heads": 6, "n_layers": 2, "init_std": 0.2}
CHANGES = {
    "rmsnorm": {"norm": "rmsnorm"},
    "exact gelu": {"mlp": "gelu_exact"},
    "swiglu": {"mlp": "swiglu"},
    "rope": {"positions": "rope"},
    "grouped": {"n_kv_heads": 2},
    "all": {"norm": "rmsnorm", "mlp": "swiglu", "positions": "rope", "n_kv_heads": 2},
}


def make(**changes) -> GPTModel:
    torch.manual_seed(0)
    model = GPTModel(from_preset("nano", **SIZES | changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # else norms would be 1 and biases 0
            parameter += 0.1 * torch.randn_like(parameter)
    return model


@pytest.fixture
def ids():
    return torch.randint(0, 90, (2, 11), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def by_hand(model, ids, padding=(0, 0)) -> dict[str, torch.Tensor]:
    """The forward pass in float64, in no terms of the package's, one row and one head at a time: name -> value.

    Args:
        padding: of each row, how many tokens at its beginning are none.
    """
    weights = {name: tensor.double() for name, tensor in model.state_dict().items()}
    cfg, found = model.cfg, {}
    (B, T), H, C = ids.shape, cfg["n_heads"], cfg["emb_dim"]
    G, D = cfg["n_kv_heads"] or H, C // H
    places = torch.stack([torch.arange(T) - pad for pad in padding]).clamp(min=0)

    def linear(x, name):
        return x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0)

    def norm(x, name):
        if cfg["norm"] == "rmsnorm":
            return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weights[f"{name}.weight"]
        return torch.layer_norm(x, (C,), weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-5)

    def turned(x):  # each pair as a complex number, times e^(i * position * 10000^(-2j / D))
        if cfg["positions"] == "learned":
            return x
        angles = places[:, None, :, None] * 10_000.0 ** (-torch.arange(0, D, 2).double() / D)
        product = torch.complex(x[..., : D // 2], x[..., D // 2 :]) * torch.polar(torch.ones_like(angles), angles)
        return torch.cat([product.real, product.imag], -1)

    x = found["token_embedding"] = weights["token_embedding.weight"][ids]
    if cfg["positions"] == "learned":
        found["position_embedding"] = weights["position_embedding.weight"][places]
        x = x + found["position_embedding"]
    found["embeddings"] = x
    seen = torch.ones(T, T, dtype=torch.bool).tril().expand(B, T, T).clone()
    for row, pad in enumerate(padding):
        seen[row, :, :pad] = False
    for i in range(cfg["n_layers"]):
        of = f"blocks.{i}."
        found[f"{of}norm_1"] = norm(x, f"{of}norm_1")
        qkv = found[f"{of}attention.qkv"] = linear(found[f"{of}norm_1"], f"{of}attention.W_qkv")
        heads = qkv.reshape(B, T, H + 2 * G, D).permute(0, 2, 1, 3)
        q = found[f"{of}attention.queries"] = turned(heads[:, :H])
        k = found[f"{of}attention.keys"] = turned(heads[:, H : H + G])
        v = found[f"{of}attention.values"] = heads[:, H + G :]
        serving = [head * G // H for head in range(H)]
        scores = found[f"{of}attention.scores"] = q @ k[:, serving].mT / D**0.5
        table = scores.masked_fill(~seen[:, None], -torch.inf).softmax(-1).nan_to_num()
        found[f"{of}attention.weights"] = table
        context = found[f"{of}attention.context"] = table @ v[:, serving]
        merged = found[f"{of}attention.merged"] = context.permute(0, 2, 1, 3).reshape(B, T, C)
        found[f"{of}attention.output"] = linear(merged, f"{of}attention.out_proj")
        x = found[f"{of}after_attention"] = x + found[f"{of}attention.output"]
        y = found[f"{of}norm_2"] = norm(x, f"{of}norm_2")
        hidden = found[f"{of}feed_forward.hidden"] = linear(y, f"{of}feed_forward.up_proj")
        if cfg["mlp"] == "swiglu":
            gate = found[f"{of}feed_forward.gate"] = linear(y, f"{of}feed_forward.gate_proj")
            found[f"{of}feed_forward.activated"] = gate / (1 + (-gate).exp()) * hidden
        else:
            approximate = "tanh" if cfg["mlp"] == "gelu" else "none"
            found[f"{of}feed_forward.activated"] = torch.nn.functional.gelu(hidden, approximate=approximate)
        found[f"{of}feed_forward.output"] = linear(found[f"{of}feed_forward.activated"], f"{of}feed_forward.down_proj")
        x = found[f"{of}output"] = x + found[f"{of}feed_forward.output"]
    found["final_norm"] = norm(x, "final_norm")
    found["logits"] = found["final_norm"] @ weights["token_embedding.weight"].T
    return found


@pytest.mark.parametrize("padding", [(0, 0), (0, 4)], ids=["whole", "left-padded"])
@pytest.mark.parametrize("name", ["eager", "sdpa", "flash_tiled"])
@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES)
def test_every_value_is_the_one_that_the_formulas_give(changes, name, padding, ids):
    model = make(attn_implementation=name, **changes)
    mask = torch.arange(11)[None] >= torch.tensor(padding)[:, None]
    found = trace(model, ids, recompute=True, padding_mask=None if not any(padding) else mask)
    expected = by_hand(model, ids, padding)
    for key, value in expected.items():
        limit = 100 * EPS * float(value.abs().max())
        torch.testing.assert_close(found[key].double().expand_as(value), value, rtol=0, atol=limit, msg=key)
    extra = {key for key in found.values if key not in expected and ".tile" not in key and "log_sum_exp" not in key}
    assert extra == {f"blocks.{i}.attention.masked_scores" for i in range(2)}
    with torch.no_grad():
        assert torch.equal(found.logits, model(ids, None if not any(padding) else mask))


def test_the_inside_of_swiglu_is_in_its_order(ids):
    found = trace(make(**CHANGES["swiglu"]), ids)
    inside = [name.removeprefix("blocks.1.feed_forward.") for name in found.names("blocks.1.feed_forward.*")]
    assert inside == ["gate", "hidden", "activated", "output"]


@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES)
def test_axes_have_the_sizes_of_the_cfg_and_every_value_is_explained(changes, ids):
    sizes = {
        "batch": 2, "tokens": 11, "emb_dim": 24, "n_heads": 6, "n_kv_heads": changes.get("n_kv_heads", 6),
        "head_dim": 4, "query_tokens": 11, "key_tokens": 11, "vocab_size": 90,
        "ff_dim": 64 if changes.get("mlp") == "swiglu" else 96, "qkv": 24 + 2 * 4 * changes.get("n_kv_heads", 6),
    }  # fmt: skip
    for value in trace(make(attn_implementation="eager", **changes), ids).values.values():
        assert value.about != "what this module gives"
        for axis, size in zip(value.axes, value.tensor.shape, strict=True):
            assert sizes[axis] == size or (value.name == "position_embedding" and axis == "batch"), value


ABOUT = {  # what is said of a value where the key has this value, and nowhere else
    ("norm", "rmsnorm"): (("blocks.0.norm_1", "blocks.1.norm_2", "final_norm"), "root mean square"),
    ("mlp", "swiglu"): (("blocks.1.feed_forward.activated",), "SiLU(gate) * hidden"),
    ("mlp", "gelu"): (("blocks.1.feed_forward.activated",), "after GELU: what is not negative"),
    ("mlp", "gelu_exact"): (("blocks.1.feed_forward.activated",), "GELU through erf"),
    ("positions", "rope"): (("blocks.0.attention.queries", "blocks.1.attention.keys"), "turned by its position"),
    ("positions", "learned"): (("embeddings",), "their sum"),
}


@pytest.mark.parametrize("changes", [{}, *CHANGES.values()], ids=["gpt2", *CHANGES])
def test_what_is_said_of_a_value_is_what_this_model_computes(changes, ids):
    model = make(**changes)
    found = trace(model, ids)
    for (key, value), (names, words) in ABOUT.items():
        for name in names:
            assert (words in found.values[name].about) == (model.cfg[key] == value), (key, name)
    assert ("before GELU" in str(found)) == (model.cfg["mlp"] != "swiglu")


def test_values_that_a_variant_does_not_have_say_why(ids):
    rope = trace(make(**CHANGES["rope"]), ids)
    assert "position_embedding" not in rope
    with pytest.raises(KeyError, match="queries and keys are turned instead"):
        rope["position_embedding"]
    with pytest.raises(KeyError, match="only SwiGLU has a gate"):
        rope["blocks.0.feed_forward.gate"]
    with pytest.raises(ValueError, match=r"position_embedding.*fits no value"):
        trace(make(**CHANGES["rope"]), ids, patch={"position_embedding": lambda x: 0 * x})


@pytest.mark.parametrize("at", ["blocks.0.feed_forward.gate", "blocks.0.feed_forward.hidden",
                                "blocks.0.feed_forward.activated", "blocks.0.attention.queries",
                                "blocks.0.attention.keys", "blocks.1.norm_1", "embeddings"])  # fmt: skip
def test_a_patch_goes_on_through_the_rest_of_the_pass(at, ids):
    model = make(**CHANGES["all"])
    plain, found = trace(model, ids), trace(model, ids, patch={at: lambda x: -2 * x})
    assert torch.equal(found[at], -2 * plain[at])
    assert found.values[at].patched
    assert (found.logits - plain.logits).abs().max() > 1e-3


def test_a_patched_gate_of_zero_shuts_the_layer(ids):
    found = trace(make(**CHANGES["all"]), ids, patch={"blocks.1.feed_forward.gate": torch.zeros(())})
    assert found["blocks.1.feed_forward.output"].abs().max() == 0  # SiLU(0) is 0, and there are no biases
    assert torch.equal(found["blocks.1.output"], found["blocks.1.after_attention"])


def test_a_head_of_a_group_can_be_taken_out(ids):
    model = make(**CHANGES["all"])
    found = trace(model, ids, patch={"blocks.1.attention.context": zero_heads(4)})
    assert found["blocks.1.attention.merged"].reshape(2, 11, 6, 4)[:, :, 4].abs().max() == 0
    assert (found.logits - trace(model, ids).logits).abs().max() > 1e-3


def test_diff_says_where_two_models_part_and_what_only_one_has(ids):
    one, other = make(**CHANGES["all"]), make(**CHANGES["all"])
    assert diff(one, other, ids).first is None
    with torch.no_grad():
        other.blocks[1].feed_forward.gate_proj.weight[3] += 1
    assert diff(one, other, ids).first == "blocks.1.feed_forward.gate"
    rows = {row.name: row.verdict for row in diff(make(), one, ids).rows}
    assert rows["position_embedding"] == "only in a"
    assert rows["blocks.0.feed_forward.gate"] == "only in b"


def test_diff_of_the_two_forms_of_gelu_names_what_comes_after_it(ids):
    assert diff(make(), make(mlp="gelu_exact"), ids).first == "blocks.0.feed_forward.activated"


def test_what_is_unlike_gpt2_is_what_the_cfg_says():
    assert unlike_gpt2(make().cfg) == unlike_gpt2({}) == unlike_gpt2({"mlp": "gelu_exact"}) == []
    found = unlike_gpt2(make(**CHANGES["all"]).cfg)
    assert [phrase.partition("=")[0] for phrase in found] == list(VARIANTS)
