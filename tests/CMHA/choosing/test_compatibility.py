"""The table of the documentation says what the checks say, on any machine."""

import types
from dataclasses import replace

import pytest

from CMHA.choosing import AttentionSettings, choose
from CMHA.choosing.choose import reads_pages
from CMHA.choosing.compatibility import DEVICES, FEATURES, compatibility, markdown_table
from CMHA.implementations import IMPLEMENTATIONS, eager, flash_package
from CMHA.packages import Found
from CMHA.request import Reason


def test_what_the_table_calls_yes_is_taken_and_what_it_refuses_is_not():
    for name, row in compatibility().items():
        if name in ("flash_attention_2", "flash_attention_3"):
            continue  # not installed here: below
        calls = {device: replace(request, paged=reads_pages(name)) for device, request in DEVICES.items()}
        for device in ("CPU", "MPS"):
            choice = choose(AttentionSettings(attn_implementation=name), calls[device])
            assert (choice.chosen == name) == (row[device] == "yes"), (name, device)
        if row["CPU"] == "cuda_only":
            continue  # the rest of its row is about CUDA
        for feature, wish in FEATURES.items():
            says_yes = row[feature].startswith("yes") and "CPU:" not in row[feature]
            settings, request = AttentionSettings(attn_implementation=name), replace(calls["CPU"], **wish)
            if reads_pages(name) and not says_yes:  # nothing else reads pages, so nothing takes its place
                with pytest.raises(ValueError, match=f"{name}: "):
                    choose(settings, request)
                continue
            choice = choose(settings, request)
            assert (choice.chosen == name) == says_yes, (name, feature)


def test_it_is_the_same_table_whether_or_not_the_packages_are_there(monkeypatch):
    before = markdown_table()
    package = types.ModuleType("any")
    package.language = types.SimpleNamespace(max=None)  # as triton has them when it compiles
    package.runtime = types.SimpleNamespace(JITFunction=object)
    for found in (Found("9.9", module=package), Found("9.9", error="ImportError: broken"), Found()):
        for module in (flash_package, *IMPLEMENTATIONS.values()):
            if hasattr(module, "find"):
                monkeypatch.setattr(module, "find", lambda name, found=found: found)
        assert markdown_table() == before


@pytest.mark.parametrize(
    ("name", "column", "cell"),
    [
        ("eager", "weights", "yes"),
        ("sdpa", "MPS", "mps_nan"),
        ("flash_attention_2", "CPU", "cuda_only, dtype"),
        ("flash_attention_2", "dropout", "yes"),
        ("flash_attention_3", "CUDA, Ampere", "capability"),
        ("flash_attention_3", "dropout", "dropout"),
        ("flex_attention", "gradients", "yes; CPU: needs_grad"),
        ("flash_triton", "CPU", "cuda_only"),
        ("flash_triton", "CUDA, Ampere", "yes"),
        ("flash_triton", "MPS", "cuda_only"),
        ("flash_triton", "dropout", "yes"),
        ("flash_triton", "weights", "weights_wanted"),
        ("paged_attention", "CPU", "yes"),
        ("paged_attention", "gradients", "training"),
    ],
)
def test_some_cells_that_everybody_knows(name, column, cell):
    assert compatibility()[name][column] == cell


def test_a_new_implementation_gets_its_row(monkeypatch):
    def check(request):
        return [Reason("odd", "it is odd", "be even")] if request.num_kv_heads % 4 else []

    module = types.SimpleNamespace(SUMMARY="mine", ALIASES=(), check=check, attention=eager.attention)
    monkeypatch.setitem(IMPLEMENTATIONS, "mine", module)
    assert set(compatibility()["mine"].values()) == {"yes"}
    assert "| `mine` | yes |" in markdown_table()
