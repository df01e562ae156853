"""What `get_flash_attention_config()` says is data, is complete, and is so."""

import json
import types

import pytest
import torch

import CMHA.choosing as public
from CMHA import packages
from CMHA.choosing import (
    HAS_FLASH_ATTN_2,
    detect_device_type,
    flash_config,
    get_flash_attention_config,
    is_flash_attention_supported,
)
from CMHA.implementations import flash_tiled
from CMHA.packages import PACKAGES, Found


def test_the_config_is_json_and_has_what_is_promised():
    config = get_flash_attention_config()
    assert json.loads(json.dumps(config)) == config
    assert config["device_type"] == detect_device_type()
    assert config["flash_attention_supported"] == is_flash_attention_supported()
    assert config["device_info"]["name"]
    for passes in ("forward_params", "backward_params"):
        assert config[passes] == {"query_block_size": flash_tiled.BLOCK_SIZE, "kv_block_size": flash_tiled.BLOCK_SIZE}
    assert {key for key in config if key.endswith("_available")} == {f"{name}_available" for name in PACKAGES}


def test_the_tiles_it_names_are_the_tiles_that_run(monkeypatch):
    """A cfg that leaves the sizes to us runs with exactly these."""
    seen = []
    real = flash_tiled.spans
    monkeypatch.setattr(flash_tiled, "spans", lambda start, end, block: seen.append(block) or real(start, end, block))
    queries = torch.randn(1, 1, 300, 4, requires_grad=True)
    from CMHA.masks import AttentionMask

    context, _ = flash_tiled.attention(queries, queries, queries, AttentionMask(300, 300), scale=0.5)
    forward = set(seen)
    seen.clear()
    context.sum().backward()
    config = get_flash_attention_config()
    assert forward == set(config["forward_params"].values())
    assert set(seen) == set(config["backward_params"].values())


def test_an_available_package_is_one_that_was_really_imported(monkeypatch):
    imported = Found("9.9", module=types.ModuleType("flash_attn"))
    broken = Found("1", "ImportError: undefined symbol")
    monkeypatch.setattr(flash_config, "find", lambda name: imported if name == "flash_attn_2" else broken)
    config = get_flash_attention_config()
    assert config["flash_attn_2_available"] is True
    assert config["flash_attn_3_available"] is False


def test_has_flash_attn_2_is_whether_the_package_is_there():
    assert HAS_FLASH_ATTN_2 is public.HAS_FLASH_ATTN_2 is packages.find("flash_attn_2").available


@pytest.mark.parametrize(("device_type", "supported"), [("cpu", True), ("mps", False), ("tpu", False)])
def test_flash_attention_is_supported_where_auto_reaches_a_kernel_without_a_table(device_type, supported):
    assert is_flash_attention_supported(device_type) is supported
    assert get_flash_attention_config(device_type)["flash_attention_supported"] is supported
    assert get_flash_attention_config(device_type)["device_type"] == device_type


def test_where_torchs_op_would_take_the_formula_it_is_not_supported(monkeypatch):
    monkeypatch.setattr(flash_config, "torch_kernel", lambda request: "math")
    assert is_flash_attention_supported("cpu") is False


def test_an_unknown_device_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="unknown device_type 'gpuu': expected one of gpu, mps, tpu, cpu"):
        get_flash_attention_config("gpuu")


def test_asking_says_nothing(messages):
    get_flash_attention_config("mps")
    assert messages == []
