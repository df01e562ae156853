"""Each field of another project's config is honoured, fixed or harmless: proven against what its own code computes."""

import json
import math
from pathlib import Path

import pytest
import torch
import transformers
from transformers.activations import ACT2FN

from GPT2Model.config import complete
from GPT2Model.gpt2 import GPTModel
from GPT2Model.weights.foreign_configs import (
    ACTIVATIONS,
    HF_DROPOUTS,
    HF_FIXED,
    HF_HARMLESS,
    HF_SIZES,
    cfg_of,
    hugging_face_config,
    nanogpt_cfg,
)

SIZES = {"vocab_size": 61, "n_positions": 24, "n_embd": 30, "n_head": 5, "n_layer": 3, "bos_token_id": 0,
         "eos_token_id": 0}  # fmt: skip
OTHERWISE = {  # for each fixed field, a value that transformers would compute something else with
    "model_type": "gpt_neo", "layer_norm_epsilon": 1e-6, "scale_attn_weights": False,
    "scale_attn_by_inverse_layer_idx": True, "add_cross_attention": True, "is_encoder_decoder": True,
    "quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True},
}  # fmt: skip


def logits(ids, **changes) -> torch.Tensor:
    """What transformers computes with this config, always with the same weights."""
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**{**SIZES, **changes}, attn_implementation="eager"))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
        return model.eval()(ids).logits


def refused(config: dict) -> str:
    with pytest.raises(ValueError, match=r"config\.json cannot be honoured") as caught:
        cfg_of(config, {}, Path("config.json"))
    return str(caught.value)


def test_every_field_of_a_config_of_transformers_is_honoured_fixed_or_harmless():
    fields = set(transformers.GPT2Config().to_dict())
    groups = [set(HF_FIXED), set(HF_SIZES), set(HF_DROPOUTS), HF_HARMLESS, {"activation_function"}]
    assert fields - set().union(*groups) == set()
    assert sum(map(len, groups)) == len(set().union(*groups))  # in one group each


@pytest.mark.parametrize("field", HF_FIXED)
def test_each_fixed_field_is_refused_with_its_value_and_the_one_that_is_computed(field):
    config = {**transformers.GPT2Config(**SIZES).to_dict(), field: OTHERWISE[field]}
    message = refused(config)
    assert f"{field} = {OTHERWISE[field]!r}, where only {HF_FIXED[field]!r} is computed here" in message
    assert len(message.splitlines()) == 2


@pytest.mark.parametrize("field", ["layer_norm_epsilon", "scale_attn_weights", "scale_attn_by_inverse_layer_idx"])
def test_the_fixed_fields_really_change_the_logits(field, random_ids):
    ids = random_ids(2, 24)
    assert (logits(ids, **{field: OTHERWISE[field]}) - logits(ids)).abs().max() > 1e-4


@pytest.mark.parametrize("name", sorted(ACT2FN))
def test_an_activation_is_opened_as_the_form_of_gelu_that_it_computes_and_every_other_is_refused(name):
    x = torch.linspace(-12, 12, 4001, dtype=torch.float64)  # gelu_10 ends at 10
    tanh = 0.5 * x * (1 + torch.tanh((2 / math.pi) ** 0.5 * (x + 0.044715 * x**3)))
    forms = {"gelu": tanh, "gelu_exact": 0.5 * x * (1 + torch.erf(x / 2**0.5))}
    try:
        computed = ACT2FN[name](x)
        same = [mlp for mlp, form in forms.items() if torch.allclose(computed, form, atol=1e-9, rtol=0)]
    except (RuntimeError, TypeError):  # has weights of its own, in float32
        same = []
    assert [mlp for accepted, mlp in ACTIVATIONS.items() if accepted == name] == same
    config = {**transformers.GPT2Config(**SIZES).to_dict(), "activation_function": name}
    if same:
        assert cfg_of(config, {}, Path("config.json"))["mlp"] == same[0]
    else:
        message = refused(config)
        assert f"activation_function = {name!r}, where only gelu_new, gelu_pytorch_tanh, " in message
        assert "gelu, gelu_python are computed here" in message
        assert len(message.splitlines()) == 2


@pytest.mark.parametrize("value", [None, ["gelu"], 7, "GELU"], ids=str)
def test_an_activation_that_nobody_has_is_refused_and_a_missing_one_is_gpt2_s(value):
    config = transformers.GPT2Config(**SIZES).to_dict()
    assert f"activation_function = {value!r}, where only" in refused({**config, "activation_function": value})
    del config["activation_function"]
    assert cfg_of(config, {}, Path("config.json"))["mlp"] == "gelu"


@pytest.mark.parametrize(("mlp", "stored"), [("gelu", "gelu"), ("gelu_exact", "gelu_new"), ("gelu_exact", None)])
def test_a_folder_of_ours_whose_two_configs_name_different_gelus_is_refused(mlp, stored, build):
    """Whoever changed one of the two knows which is meant; the weights do not."""
    config = hugging_face_config(build(mlp=mlp).cfg) | {"activation_function": stored}
    if stored is None:
        del config["activation_function"]
    assert f"activation_function = {stored or 'gelu_new'!r}, and gpt2_from_scratch_cfg says mlp={mlp!r}" in refused(
        config
    )


def test_scores_in_float32_in_another_order_are_the_same_mathematics(random_ids):
    """reorder_and_upcast_attn: only rounding, and so it is harmless."""
    ids = random_ids(2, 24)
    difference = (logits(ids, reorder_and_upcast_attn=True) - logits(ids)).abs().max()
    assert 0 <= difference < 2e-5


@pytest.mark.parametrize("field", sorted(HF_HARMLESS & set(transformers.GPT2Config().to_dict())))
def test_a_harmless_field_changes_no_logit_of_transformers(field, random_ids):
    other = {
        "architectures": ["X"], "transformers_version": "1.0", "dtype": "float32", "use_cache": False,
        "bos_token_id": 7, "eos_token_id": 8, "pad_token_id": 9, "summary_activation": "tanh",
        "summary_first_dropout": 0.5, "summary_proj_to_labels": False, "summary_type": "mean",
        "summary_use_proj": False, "output_attentions": True, "output_hidden_states": True, "return_dict": True,
        "problem_type": "regression", "reorder_and_upcast_attn": True, "chunk_size_feed_forward": 4,
        "_name_or_path": "gpt2", "id2label": {0: "A", 1: "B", 2: "C"}, "label2id": {"A": 0, "B": 1, "C": 2},
    }[field]  # fmt: skip
    ids = random_ids(1, 24)
    changed = {} if field in ("transformers_version", "_name_or_path") else {field: other}
    torch.testing.assert_close(logits(ids, **changed), logits(ids), atol=2e-5, rtol=0)
    cfg_of({**transformers.GPT2Config(**SIZES).to_dict(), field: other}, {}, Path("config.json"))


@pytest.mark.parametrize(
    "field", ["rope_scaling", "rope_theta", "sliding_window", "n_kv_heads", "multi_query", "embedding_scale"]
)
def test_an_unknown_field_that_is_on_is_refused_by_name(field):
    assert f"{field} = 2 is unknown here" in refused({**transformers.GPT2Config(**SIZES).to_dict(), field: 2})


@pytest.mark.parametrize("mlp", ["gelu", "gelu_exact"])
def test_what_we_write_we_read(mlp, build):
    cfg = build(ff_dim=50, drop_rate=0.2, tie_weights=False, mlp=mlp).cfg
    written = json.loads(json.dumps(hugging_face_config(cfg)))
    assert cfg_of(written, {}, Path("config.json")) == cfg
    del written["gpt2_from_scratch_cfg"]
    known = complete(cfg_of(written, {}, Path("config.json")))
    sizes = ["mlp", *HF_SIZES.values()]
    assert {key: known[key] for key in sizes} == {key: cfg[key] for key in sizes}


def test_sizes_of_the_wrong_type_are_refused_by_our_own_names(build, tmp_path):
    build().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["gpt2_from_scratch_cfg"]
    (tmp_path / "config.json").write_text(json.dumps({**config, "n_embd": "30", "attn_pdrop": [1], "n_layer": -2}))
    with pytest.raises(ValueError, match=r"embd_pdrop, attn_pdrop, resid_pdrop differ"):
        GPTModel.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, "n_embd": "30", "n_layer": -2}))
    with pytest.raises(ValueError, match=r"(?s)'emb_dim' must be.*'n_layers' must be"):
        GPTModel.from_pretrained(tmp_path)


def test_what_a_descendant_of_nanogpt_added_is_refused_by_name():
    args = {"n_layer": 2, "n_head": 5, "n_embd": 30, "block_size": 24, "bias": False, "vocab_size": 61, "dropout": 0.1}
    assert nanogpt_cfg(args, "ckpt.pt") == {
        "n_layers": 2, "n_heads": 5, "emb_dim": 30, "context_length": 24, "qkv_bias": False, "vocab_size": 61,
        "drop_rate": 0.1, "mlp": "gelu_exact",
    }  # fmt: skip
    with pytest.raises(ValueError, match="model_args: rotary = True is unknown here"):
        nanogpt_cfg({**args, "rotary": True, "flash": False}, "ckpt.pt")
