"""The cfg dict: what it means, and that a wrong one is answered with everything that is wrong with it."""

import copy
import math
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from GPT2Model.config import (
    ACCEPTED,
    KEYS,
    PRESET_ALIASES,
    PRESETS,
    REQUIRED,
    SYNONYMS,
    attention_cfg,
    complete,
    from_preset,
    markdown_table,
)  # fmt: skip
from GPT2Model.gpt2 import GPTModel

GOOD = {"vocab_size": 61, "context_length": 24, "emb_dim": 30, "n_heads": 5, "n_layers": 2}


def error_of(cfg, **changes) -> str:
    with pytest.raises(ValueError) as caught:
        complete({**cfg, **changes})
    return str(caught.value)


def parameters_by_formula(cfg: dict) -> int:
    """Counted on paper: a tied GPT-2 with biases everywhere."""
    d, inner = cfg["emb_dim"], 4 * cfg["emb_dim"]
    attention = d * 3 * d + 3 * d + d * d + d
    feed_forward = d * inner + inner + inner * d + d
    block = attention + feed_forward + 4 * d  # two norms
    return cfg["vocab_size"] * d + cfg["context_length"] * d + cfg["n_layers"] * block + 2 * d


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("gpt2", 124_439_808), ("gpt2-medium", 354_823_168), ("gpt2-large", 774_030_080), ("gpt2-xl", 1_557_611_200)],
)
def test_the_presets_have_as_many_parameters_as_openai_s_models(name, parameters):
    assert parameters_by_formula(from_preset(name)) == parameters


def test_the_presets_are_openai_s_shapes():
    shapes = {name: tuple(PRESETS[name][key] for key in ("emb_dim", "n_heads", "n_layers")) for name in PRESETS}
    assert shapes["gpt2"] == (768, 12, 12)
    assert shapes["gpt2-medium"] == (1024, 16, 24)
    assert shapes["gpt2-large"] == (1280, 20, 36)
    assert shapes["gpt2-xl"] == (1600, 25, 48)
    for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"):
        cfg = from_preset(name)
        assert (cfg["vocab_size"], cfg["context_length"], cfg["drop_rate"]) == (50257, 1024, 0.1)
        assert cfg["qkv_bias"] is True
        assert cfg["tie_weights"] is True
        assert cfg["ff_dim"] is None


@pytest.mark.parametrize("name", [*PRESETS, *PRESET_ALIASES])
def test_every_preset_is_a_complete_cfg(name):
    cfg = from_preset(name)
    assert list(cfg) == list(KEYS)
    assert complete(cfg) == cfg
    assert cfg == from_preset(PRESET_ALIASES.get(name, name))


def test_a_preset_takes_overrides_and_stays_as_it_was():
    before = copy.deepcopy(PRESETS)
    cfg = from_preset("tiny", vocab_size=8000, use_flash=False, attention_backend="sdpa")
    assert (cfg["vocab_size"], cfg["use_flash"], cfg["attn_implementation"]) == (8000, False, "sdpa")
    cfg["emb_dim"] = 1
    assert before == PRESETS


def test_a_folder_that_is_not_there_is_said_to_be_missing():
    with pytest.raises(
        ValueError, match=r"unknown preset 'runs/x/final'\. There is no such folder here either\. Presets:"
    ):
        from_preset("runs/x/final")


def test_blocks_that_only_the_kernels_refuse_are_right_elsewhere():
    assert (
        complete({**GOOD, "attn_implementation": "flash_tiled", "flash_kv_block_size": 48})["flash_kv_block_size"] == 48
    )


def test_an_unknown_preset_is_answered_with_the_nearest_and_with_all():
    with pytest.raises(ValueError, match="Did you mean 'gpt2-medium'") as caught:
        from_preset("gpt2_medium")
    assert all(name in str(caught.value) for name in [*PRESETS, *PRESET_ALIASES])
    with pytest.raises(ValueError, match="'emb_dim'"):
        from_preset("tiny", n_embd=3)


def test_missing_keys_get_the_table_s_defaults_in_a_copy():
    given_cfg = dict(GOOD)
    cfg = complete(given_cfg)
    assert given_cfg == GOOD
    assert cfg == {name: GOOD.get(name, key.default) for name, key in KEYS.items()}
    assert REQUIRED not in cfg.values()


def test_all_problems_are_reported_at_once():
    message = error_of(
        {"vocab_size": 0, "emb_dim": 30, "n_heads": 4, "drop_rate": 1.0, "n_layers": 2.0, "qkv_bias": 1, "n_embd": 3,
         "atention_implementation": "eager", "use_flash": "yes", "attn_implementation": "egaer", "zzz": 0}
    )  # fmt: skip
    assert message.startswith("the cfg dict has 11 problems:")
    assert len(message.splitlines()) == 12
    for expected in (
        "unknown key 'n_embd': here it is called 'emb_dim'",
        "unknown key 'atention_implementation': did you mean 'attn_implementation'?",
        "unknown key 'zzz': known keys are vocab_size, ",
        "'context_length' is missing",
        "'vocab_size' must be a whole number, 1 or more, got 0",
        "'n_layers' must be a whole number, 1 or more, got 2.0",
        "'drop_rate' must be a number from 0 to below 1, got 1.0",
        "'qkv_bias' must be True or False, got 1",
        "'use_flash' must be True or False, got 'yes'",
        "unknown attn_implementation 'egaer'. Did you mean 'eager'?",
        "'n_heads' must divide 'emb_dim': 30 / 4 is not whole; 3 would do",
    ):
        assert expected in message


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"drop_rate": math.nan}, "'drop_rate'"),
        ({"drop_rate": -0.1}, "'drop_rate'"),
        ({"drop_rate": None}, "'drop_rate'"),
        ({"drop_rate": True}, "'drop_rate'"),
        ({"n_layers": True}, "'n_layers'"),
        ({"ff_dim": 0}, "'ff_dim' must be a whole number, 1 or more (or None)"),
        ({"n_kv_heads": 2}, "'n_kv_heads' must divide 'n_heads': 5 / 2"),
        ({"n_kv_heads": 10}, "'n_kv_heads' must divide 'n_heads': 5 / 10"),
        ({"attn_implementation": ""}, "unknown attn_implementation ''"),
        ({"attn_strict": None}, "'attn_strict'"),
        ({"flash_query_block_size": -1}, "'flash_query_block_size'"),
        ({"n_kv_heads": 0}, "'n_kv_heads' must be a whole number, 1 or more (or None)"),
        ({"norm": "rmsnrom"}, "'norm' must be 'layernorm' or 'rmsnorm', got 'rmsnrom'. Did you mean 'rmsnorm'?"),
        ({"norm": None}, "'norm' must be 'layernorm' or 'rmsnorm', got None."),
        ({"mlp": "swi-glu"}, "or 'swiglu', got 'swi-glu'. Did you mean 'swiglu'?"),
        ({"mlp": "gelu-exact"}, "got 'gelu-exact'. Did you mean 'gelu_exact'?"),
        ({"mlp": True}, "'mlp' must be 'gelu' or 'gelu_exact' or 'swiglu', got True."),
        ({"mlp": ["gelu"]}, "'mlp' must be 'gelu' or 'gelu_exact' or 'swiglu', got ['gelu']."),
        ({"positions": "learnt"}, "'positions' must be 'learned' or 'rope', got 'learnt'. Did you mean 'learned'?"),
        ({"norm": "RMSNorm"}, "got 'RMSNorm'. Did you mean 'rmsnorm'?"),
        ({"attn_implementation": "flash_triton", "flash_kv_block_size": 48}, "or None (chosen); got 48."),
        ({"attn_implementation": "triton", "flash_query_block_size": 8}, "or None (chosen); got 8."),
        ({"positions": "rope", "n_heads": 6}, "turns pairs of numbers, so emb_dim / n_heads must be even, got 5."),
        ({"positions": "rope", "n_heads": 4}, "'n_heads' must divide 'emb_dim': 30 / 4 is not whole"),  # and only that
        ({"positions": "rope", "n_heads": True}, "'n_heads' must be a whole number, 1 or more, got True"),
        ({"mlp": "swiglu", "ff_dim": 2.5}, "'ff_dim' must be a whole number, 1 or more (or None), got 2.5"),
        ({7: 1}, "unknown key 7"),
    ],
)
def test_a_wrong_value_is_named_and_nothing_else_is(changes, expected):
    message = error_of({**GOOD, **changes})
    assert "one problem" in message
    assert expected in message


@pytest.mark.parametrize("synonym", SYNONYMS)
def test_a_key_of_another_project_is_answered_with_ours(synonym):
    assert f"unknown key {synonym!r}: here it is called {SYNONYMS[synonym]!r}." in error_of(GOOD, **{synonym: 1})
    assert SYNONYMS[synonym] in KEYS


@pytest.mark.parametrize(
    ("alias", "value"),
    [("attention_backend", "eager"), ("use_flash_attention", False), ("flash_attention_query_block_size", 16),
     ("flash_attention_kv_block_size", 16)],
)  # fmt: skip
def test_our_own_other_names_are_accepted(alias, value):
    name = ACCEPTED[alias]
    cfg = complete({**GOOD, alias: value})
    assert cfg[name] == value
    assert alias not in cfg
    assert complete({**GOOD, alias: value, name: value}) == cfg


@pytest.mark.parametrize("turned", [False, True])
def test_two_names_of_one_key_may_not_differ(turned):
    pair = [("attention_backend", "eager"), ("attn_implementation", "sdpa")]
    message = error_of({**GOOD, **dict(pair[::-1] if turned else pair)})
    assert "'attention_backend' is another name of 'attn_implementation', and the two differ" in message
    assert "'eager'" in message
    assert "'sdpa'" in message


@pytest.mark.parametrize("key", ["norm", "mlp", "positions"])
def test_each_choice_may_hold_what_it_lists_and_gpt2_s_is_the_default(key):
    assert KEYS[key].default == KEYS[key].choices[0] == complete(GOOD)[key]
    for value in KEYS[key].choices:
        assert complete({**GOOD, key: value})[key] == value
        GPTModel({**GOOD, key: value})


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("num_key_value_heads", "n_kv_heads"), ("norm_type", "norm"), ("normalization", "norm"),
        ("activation_function", "mlp"), ("hidden_act", "mlp"), ("position_embedding_type", "positions"),
        ("rope", "positions"), ("position", "positions"), ("norms", "norm"),
    ],
)  # fmt: skip
def test_the_variants_are_found_under_their_other_names(key, expected):
    message = error_of(GOOD, **{key: "rope"})
    assert "one problem" in message
    assert f"unknown key {key!r}" in message
    assert repr(expected) in message.split(":", 2)[2]


BAD = {
    "n_embd": 8, "n_head": 2, "dropout": 0.1, "atention_implementation": "eager", "use_flsh": True, "foo": None,
    "vocab_size": -1, "context_length": "24", "n_layers": 0, "drop_rate": 2, "qkv_bias": None, "tie_weights": "no",
    "n_kv_heads": 1.5, "norm": "batchnorm", "mlp": "relu", "positions": "alibi",
    "hidden_act": "silu", "attn_implementation": "flesh", "disable_mps_fix": 0, "flash_kv_block_size": 0,
}  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(st.sets(st.sampled_from(sorted(BAD))))
def test_any_set_of_bad_keys_is_reported_whole_and_the_dict_is_never_changed(names):
    cfg = {**GOOD, **{name: BAD[name] for name in names}}
    before = copy.deepcopy(cfg)
    if not names:
        GPTModel(cfg)
    else:
        with pytest.raises(ValueError) as caught:
            GPTModel(cfg)
        problems = [line for line in str(caught.value).splitlines() if line.startswith("  - ")]
        assert len(problems) == len(names)
        for name in names:
            assert any(re.match(rf"  - (unknown key )?'{name}'", line) for line in problems), name
    assert cfg == before


def test_something_else_than_a_dict_is_refused():
    with pytest.raises(TypeError):
        complete("gpt2")


def test_attention_keys_are_taken_out_of_a_whole_cfg_and_checked():
    assert attention_cfg({**GOOD, "use_flash": False}) == {"use_flash": False}
    assert attention_cfg({"attention_backend": "flash_tiled"}) == {"attn_implementation": "flash_tiled"}
    with pytest.raises(ValueError, match="none of the attention keys"):
        attention_cfg(GOOD)
    with pytest.raises(ValueError) as caught:
        attention_cfg({"use_flush": False, "attn_strict": 1, "attn_implementation": "egaer"})
    assert all(text in str(caught.value) for text in ("did you mean 'use_flash'?", "'attn_strict'", "'egaer'"))


def test_the_readme_s_table_has_a_row_for_every_key():
    rows = markdown_table().splitlines()
    assert rows[:2] == ["| key | default | meaning |", "| --- | --- | --- |"]
    assert len(rows) == 2 + len(KEYS)
    for row, (name, key) in zip(rows[2:], KEYS.items(), strict=True):
        default = "*required*" if key.default is REQUIRED else f"`{key.default!r}`"
        assert row == f"| `{name}` | {default} | {key.meaning} |"
