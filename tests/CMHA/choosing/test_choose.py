"""The choice follows from the reasons, is said once, and is never remembered by changing anything."""

import logging
import types

import pytest
import torch

from CMHA.choosing import AttentionSettings, announce, attention_report, choose
from CMHA.choosing.choose import chosen_once
from CMHA.cmha import MultiHeadAttention
from CMHA.implementations import IMPLEMENTATIONS, eager
from CMHA.request import AttentionRequest, Reason
from orchestrator.evaluation.cases import Case
from orchestrator.evaluation.parity import compare_implementations


def warnings_in(messages) -> list[str]:
    return [record.getMessage() for record in messages if record.levelname == "WARNING"]


@pytest.fixture
def picky(monkeypatch):
    """An implementation with two reasons against everything."""
    reasons = [
        Reason("no_moon", "the moon is not full", "wait for it"),
        Reason("no_hat", "it has no hat", "buy one"),
    ]
    module = types.SimpleNamespace(
        SUMMARY="picky", ALIASES=("choosy",), check=lambda request: reasons, attention=eager.attention
    )
    monkeypatch.setitem(IMPLEMENTATIONS, "picky", module)
    return module


# --- auto and the toggle --------------------------------------------------------------------------------


def test_auto_is_sdpa_on_a_cpu_and_eager_when_weights_are_wanted(messages):
    assert choose(AttentionSettings(), AttentionRequest()).chosen == "sdpa"
    assert choose(AttentionSettings(attn_implementation=None), AttentionRequest()).requested == "auto"
    choice = choose(AttentionSettings(), AttentionRequest(needs_weights=True))
    assert choice.chosen == "eager"
    assert [(name, [reason.code for reason in reasons]) for name, reasons in choice.rejected] == [
        ("sdpa", ["weights_wanted"])
    ]
    assert warnings_in(messages) == []


@pytest.mark.parametrize("name", ["auto", None, "sdpa", "flash_tiled", "flash_attention_2", "eager"])
@pytest.mark.parametrize("device", ["cpu", "cuda", "mps"])
def test_use_flash_false_is_eager_always_and_on_every_device(name, device, messages):
    settings = AttentionSettings(use_flash=False, attn_implementation=name, attn_strict=True)
    choice = choose(settings, AttentionRequest(device=device))
    assert (choice.requested, choice.chosen, choice.rejected) == ("eager", "eager", ())
    assert choice.attention is eager.attention
    assert warnings_in(messages) == []


@pytest.mark.parametrize("name", ["eager", "manual", "sdpa", "flash_attn_1", "flash_tiled"])
def test_a_name_or_an_alias_that_can_serve_is_taken_in_silence(name, messages):
    choice = choose(AttentionSettings(attn_implementation=name), AttentionRequest())
    assert choice.chosen == choice.requested
    assert getattr(choice.attention, "func", choice.attention) is IMPLEMENTATIONS[choice.chosen].attention
    assert warnings_in(messages) == []


def test_settings_come_from_a_cfg_dict_whose_other_keys_are_left_alone():
    cfg = {"emb_dim": 8, "attn_implementation": "fa2", "flash_kv_block_size": 32}
    before = dict(cfg)
    assert AttentionSettings.from_cfg(cfg) == AttentionSettings(attn_implementation="fa2", flash_kv_block_size=32)
    assert cfg == before
    with pytest.raises(ValueError, match="unknown attn_implementation"):
        AttentionSettings.from_cfg({"attn_implementation": "fa9"})


def test_block_sizes_reach_the_implementation_that_has_them():
    settings = AttentionSettings(attn_implementation="flash_tiled", flash_query_block_size=8, flash_kv_block_size=16)
    assert choose(settings, AttentionRequest()).attention.keywords == {"query_block_size": 8, "kv_block_size": 16}


# --- falling back -----------------------------------------------------------------------------------------


def test_a_named_one_that_cannot_serve_is_replaced_with_one_warning_that_gives_reasons_and_remedies(picky, messages):
    for tokens in (5, 6, 7):  # different requests, the same reasons
        choice = choose(AttentionSettings(attn_implementation="choosy"), AttentionRequest(query_len=tokens))
        assert (choice.requested, choice.chosen) == ("picky", "sdpa")
    (warning,) = warnings_in(messages)
    for part in ("picky cannot be used", "the moon is not full", "it has no hat", "Using sdpa instead", "wait for it",
                 "buy one", "--attn_implementation sdpa"):  # fmt: skip
        assert part in warning


def test_other_reasons_are_said_again(messages):
    settings = AttentionSettings(attn_implementation="sdpa")
    for request in (
        AttentionRequest(needs_weights=True),
        AttentionRequest(device="mps"),
        AttentionRequest(device="mps"),
    ):
        assert choose(settings, request).chosen == "eager"
    assert len(warnings_in(messages)) == 2


@pytest.mark.parametrize("name", ["flash_attention_3", "flash_attention_2", "flash_triton", "paged_attention"])
def test_a_gpu_only_name_becomes_sdpa_on_a_cpu_and_eager_on_mps(name, messages):
    settings = AttentionSettings(attn_implementation=name)
    assert choose(settings, AttentionRequest()).chosen == "sdpa"
    assert choose(settings, AttentionRequest(device="mps")).chosen == "eager"
    assert len(warnings_in(messages)) == 2


def test_flash_attention_3_asks_2_before_sdpa_and_2_does_not_ask_3():
    rejected = {
        name: [other for other, _ in choose(AttentionSettings(attn_implementation=name), AttentionRequest()).rejected]
        for name in ("flash_attention_3", "flash_attention_2")
    }
    assert rejected["flash_attention_3"] == ["flash_attention_3", "flash_attention_2"]
    assert rejected["flash_attention_2"] == ["flash_attention_2"]


def test_strict_raises_with_every_reason_and_remedy(picky, messages):
    settings = AttentionSettings(attn_implementation="picky", attn_strict=True)
    with pytest.raises(ValueError, match="picky cannot serve this request") as error:
        choose(settings, AttentionRequest())
    for part in ("the moon is not full; wait for it", "it has no hat; buy one", "attn_strict=True"):
        assert part in str(error.value)
    assert warnings_in(messages) == []


def test_strict_says_nothing_against_auto_or_against_what_can_serve():
    assert choose(AttentionSettings(attn_strict=True), AttentionRequest(needs_weights=True)).chosen == "eager"
    assert choose(AttentionSettings(attn_implementation="sdpa", attn_strict=True), AttentionRequest()).chosen == "sdpa"


# --- Apple's MPS: requests are data, so this needs no Mac --------------------------------------------------


@pytest.mark.parametrize("name", ["auto", "sdpa"])
def test_on_mps_sdpa_gives_way_to_eager_until_the_guard_is_turned_off(name):
    settings = AttentionSettings(attn_implementation=name)
    guarded = choose(settings, AttentionRequest(device="mps"))
    assert guarded.chosen == "eager"
    assert [reason.code for reason in guarded.rejected[0][1]] == ["mps_nan"]
    assert "disable_mps_fix" in guarded.rejected[0][1][0].remedy
    turned_off = AttentionSettings(attn_implementation=name, disable_mps_fix=True)
    assert choose(turned_off, AttentionRequest(device="mps")).chosen == "sdpa"


@pytest.mark.parametrize("name", ["auto", "sdpa"])
def test_on_mps_a_warning_says_why_and_how_to_be_rid_of_it(name, messages):
    for _ in range(2):
        choose(AttentionSettings(attn_implementation=name), AttentionRequest(device="mps"))
        chosen_once.cache_clear()
    (warning,) = [record.getMessage() for record in messages if record.levelname == "WARNING"]
    assert warning.startswith("sdpa cannot be used here: it gave NaN on MPS")
    assert "--attn_implementation eager" in warning


def test_disable_mps_fix_in_the_settings_is_what_turns_the_guard_off_in_the_report_too():
    for disabled, chosen in ((False, "eager"), (True, "sdpa")):
        settings = AttentionSettings(disable_mps_fix=disabled)
        report = attention_report(settings, AttentionRequest(device="mps"))
        assert report["chosen"] == chosen
        assert report["usable"]["sdpa"] == ([] if disabled else ["mps_nan"])


# --- what is said ------------------------------------------------------------------------------------------


def test_the_backend_is_announced_on_stderr_where_nobody_set_logging_up(capsys, monkeypatch):
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    monkeypatch.setattr(logging.getLogger("CMHA"), "handlers", [])
    monkeypatch.setattr(logging.getLogger("CMHA"), "propagate", True)
    announce(choose(AttentionSettings(), AttentionRequest()))
    choose(AttentionSettings(attn_implementation="sdpa"), AttentionRequest(needs_weights=True))
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("INFO: Attention backend: sdpa (auto: ")
    assert lines[1].startswith(
        "WARNING: sdpa cannot be used here: it never forms the attention weights. Using eager instead"
    )
    assert len(lines) == 2


# --- one file and one line ----------------------------------------------------------------------------------


def test_a_new_implementation_is_one_file_and_one_line(monkeypatch):
    """Selectable by its name and its alias, chosen by the layer, and tried by parity, without any other change."""
    calls = []

    def attention(queries, keys, values, mask, *, scale, dropout=0.0):
        calls.append(scale)
        return eager.attention(queries, keys, values, mask, scale=scale, dropout=dropout)[0], None

    mine = types.SimpleNamespace(SUMMARY="mine", ALIASES=("my_own",), check=lambda request: [], attention=attention)
    monkeypatch.setitem(IMPLEMENTATIONS, "mine", mine)
    for name in ("mine", "my_own"):
        layer = MultiHeadAttention(8, 8, 4, 0.0, 2, attn_implementation=name)
        assert layer.choice().chosen == "mine"
        layer(torch.randn(1, 3, 8))
    assert calls == [0.5, 0.5]
    case = Case(query_len=9, key_len=9)
    runs = {run.implementation: run for run in compare_implementations([case], ["eager", "mine"])}
    assert runs["mine"].passed

    wrong = types.SimpleNamespace(**vars(mine) | {"attention": lambda *a, **k: attention(*a, **k | {"scale": 1.0})})
    monkeypatch.setitem(IMPLEMENTATIONS, "mine", wrong)
    runs = {run.implementation: run for run in compare_implementations([case], ["eager", "mine"])}
    assert not runs["mine"].passed


def test_a_block_size_below_one_is_refused():
    with pytest.raises(ValueError, match="block size of -4"):
        AttentionSettings(flash_kv_block_size=-4)
