"""The report is plain data, and what it says is what happens."""

import json

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from CMHA.choosing import AttentionSettings, attention_report, detect_device_type, known_names
from CMHA.implementations import sdpa
from CMHA.masks import AttentionMask
from CMHA.request import AttentionRequest


def test_it_is_json_and_says_who_was_chosen_and_with_what_codes_the_others_were_not():
    report = attention_report(AttentionSettings(attn_implementation="fa3"), AttentionRequest(needs_weights=True))
    assert json.loads(json.dumps(report)) == report
    assert report["requested"] == "flash_attention_3"
    assert report["chosen"] == "eager"
    assert list(report["rejected"]) == ["flash_attention_3", "flash_attention_2", "sdpa"]
    assert report["rejected"]["sdpa"] == ["weights_wanted"]
    assert report["usable"]["eager"] == []
    assert report["usable"]["flash_tiled"] == ["weights_wanted"]
    assert set(report["usable"]) == set(known_names()) - {"auto"}
    assert report["usable"]["flash_triton"] == ["weights_wanted", "cuda_only"]
    assert report["usable"]["paged_attention"] == ["no_pages", "weights_wanted"]
    assert set(report["known_names"]) == set(known_names())
    assert report["torch_sdpa_kernel"] is None
    assert (report["device"], report["dtype"]) == ("cpu", "float32")
    assert report["versions"]["torch"] == torch.__version__


def test_of_a_call_that_brings_pages_it_says_who_reads_them_and_why_not_the_others():
    assert attention_report()["paged_readers"] is None
    report = attention_report(request=AttentionRequest(paged=True))
    assert json.loads(json.dumps(report)) == report
    assert (report["chosen"], report["paged_readers"]["chosen"]) == ("paged_attention", "plain")
    against = {name: [reason["code"] for reason in found] for name, found in report["paged_readers"]["readers"].items()}
    assert against["plain"] == []
    assert "cuda_only" in against["flash_attention_2"]
    assert report["usable"]["sdpa"] == ["paged"]


def test_without_arguments_it_is_about_auto_and_a_causal_pass_in_fp32_on_the_cpu():
    report = attention_report()
    assert (report["requested"], report["chosen"], report["rejected"]) == ("auto", "sdpa", {})


def kernel_that_really_runs(request: AttentionRequest) -> str:
    """Which operator of torch a call of sdpa ends in."""
    queries = torch.randn(1, request.num_heads, request.query_len, request.head_dim, dtype=request.dtype)
    keys = torch.randn(1, request.num_kv_heads, request.key_len, request.head_dim, dtype=request.dtype)
    padding = torch.ones(1, request.key_len, dtype=torch.bool) if "padding" in request.mask_kind else None
    causal = request.mask_kind.startswith("causal")
    mask = AttentionMask(request.query_len, request.key_len, causal=causal, padding_mask=padding)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        sdpa.attention(queries, keys, keys, mask, scale=1.0, dropout=request.dropout)
    ran = {event.key for event in profiler.key_averages()}
    assert ("aten::_scaled_dot_product_attention_math" in ran) != (
        "aten::_scaled_dot_product_flash_attention_for_cpu" in ran
    )
    return "math" if "aten::_scaled_dot_product_attention_math" in ran else "flash"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "call",
    [
        {},
        {"dropout": 0.1},
        {"query_len": 1},
        {"query_len": 5},
        {"mask_kind": "full"},
        {"mask_kind": "causal+padding"},
        {"mask_kind": "causal+padding", "dropout": 0.1},
        {"num_kv_heads": 1},
        {"head_dim": 20},
    ],
    ids=str,
)
def test_the_kernel_it_names_is_the_kernel_that_runs(call, dtype):
    request = AttentionRequest(
        **{"query_len": 32, "key_len": 32, "num_heads": 2, "num_kv_heads": 2, "dtype": dtype} | call
    )
    assert attention_report(AttentionSettings(), request)["torch_sdpa_kernel"] == kernel_that_really_runs(request)


def test_causal_takes_the_flash_kernel_on_a_cpu_and_dropout_the_formula():
    kernels = [attention_report(request=AttentionRequest(dropout=p))["torch_sdpa_kernel"] for p in (0.0, 0.1)]
    assert kernels == ["flash", "math"]


@pytest.mark.parametrize("device", ["xpu", "hpu"])
def test_about_a_machine_that_is_not_here_it_says_unknown_and_does_not_fail(device):
    request = AttentionRequest(device=device)
    report = attention_report(AttentionSettings(attn_implementation="sdpa"), request)
    assert (report["chosen"], report["torch_sdpa_kernel"], report["device"]) == ("sdpa", "unknown", device)


@pytest.mark.parametrize(
    ("cuda", "mps", "xla", "expected"),
    [(1, 1, 1, "gpu"), (0, 1, 1, "mps"), (0, 0, 1, "tpu"), (0, 0, 0, "cpu")],
)
def test_the_device_is_the_best_one_here(monkeypatch, cuda, mps, xla, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(cuda))
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: bool(mps))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object() if xla else None)
    assert detect_device_type() == expected
