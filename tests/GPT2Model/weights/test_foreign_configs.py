"""Each field of another project's config is honoured, fixed or harmless: proven against what its own code computes."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from transformers.activations import ACT2FN

from GPT2Model.config import complete
from GPT2Model.gpt2 import GPTModel
from GPT2Model.weights.foreign_configs import (
    HF_DROPOUTS,
    HF_FIXED,
    HF_HARMLESS,
    HF_SIZES,
    SAME,
    cfg_of,
    hugging_face_config,
    nanogpt_cfg,
)

SIZES = {"vocab_size": 61, "n_positions": 24, "n_embd": 30, "n_head": 5, "n_layer": 3, "bos_token_id": 0,
         "eos_token_id": 0}  # fmt: skip
OTHERWISE = {  # for each fixed field, a value that transformers would compute something else with
    "model_type": "gpt_neo", "activation_function": "relu", "layer_norm_epsilon": 1e-6, "scale_attn_weights": False,
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
    groups = [set(HF_FIXED), set(HF_SIZES), set(HF_DROPOUTS), HF_HARMLESS]
    assert fields - set().union(*groups) == set()
    assert sum(map(len, groups)) == len(set().union(*groups))  # in one group each


@pytest.mark.parametrize("field", HF_FIXED)
def test_each_fixed_field_is_refused_with_its_value_and_the_one_that_is_computed(field):
    config = {**transformers.GPT2Config(**SIZES).to_dict(), field: OTHERWISE[field]}
    message = refused(config)
    assert f"{field} = {OTHERWISE[field]!r}, where only {HF_FIXED[field]!r} is computed here" in message
    assert len(message.splitlines()) == 2


@pytest.mark.parametrize(
    "field", ["activation_function", "layer_norm_epsilon", "scale_attn_weights", "scale_attn_by_inverse_layer_idx"]
)
def test_the_fixed_fields_really_change_the_logits(field, random_ids):
    ids = random_ids(2, 24)
    assert (logits(ids, **{field: OTHERWISE[field]}) - logits(ids)).abs().max() > 1e-4


@pytest.mark.parametrize("name", sorted(ACT2FN))
def test_the_names_of_activations_that_are_accepted_are_those_that_compute_the_same(name):
    x = torch.linspace(-6, 6, 2001, dtype=torch.float64)
    try:
        same = torch.allclose(ACT2FN[name](x), ACT2FN["gelu_new"](x), atol=1e-9, rtol=0)
    except (RuntimeError, TypeError):  # has weights of its own, in float32
        same = False
    accepted = name in ("gelu_new", *SAME["activation_function"])
    assert accepted == same
    config = {**transformers.GPT2Config(**SIZES).to_dict(), "activation_function": name}
    if accepted:
        cfg_of(config, {}, Path("config.json"))
    else:
        assert f"activation_function = {name!r}" in refused(config)


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


def test_what_we_write_we_read(build):
    cfg = build(ff_dim=50, drop_rate=0.2, tie_weights=False).cfg
    written = json.loads(json.dumps(hugging_face_config(cfg)))
    assert cfg_of(written, {}, Path("config.json")) == cfg
    del written["gpt2_from_scratch_cfg"]
    known = complete(cfg_of(written, {}, Path("config.json")))
    assert {key: known[key] for key in HF_SIZES.values()} == {key: cfg[key] for key in HF_SIZES.values()}


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
        "drop_rate": 0.1,
    }  # fmt: skip
    with pytest.raises(ValueError, match="model_args: rotary = True is unknown here"):
        nanogpt_cfg({**args, "rotary": True, "flash": False}, "ckpt.pt")
