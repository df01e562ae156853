"""MFU by formula is what counted FLOPs and measured seconds give; a peak is printed by the maker, or measured."""

import re
import time

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from GPT2Model.config import from_preset
from GPT2Model.gpt2 import GPTModel
from orchestrator.training.loss import next_token_loss
from orchestrator.training.mfu import (
    Peak,
    explain,
    flops_per_token,
    known_peak,
    measured_peak,
    mfu,
    multiplied_parameters,
    peak_flops,
    tokens_per_second_at,
)

A100 = peak_flops("A100", "bf16")
SMALL = {"vocab_size": 2000, "context_length": 128, "emb_dim": 128, "n_heads": 4, "n_layers": 3, "drop_rate": 0.0}


@pytest.mark.parametrize(
    ("chip", "tokens_per_second", "published"),
    [("A100", 218_000, 0.56), ("H100", 468_000, 0.38)],
)
def test_the_formula_gives_the_mfu_that_llm_c_publishes_for_gpt2(chip, tokens_per_second, published):
    figure = mfu(from_preset("gpt2"), 1024, tokens_per_second, peak_flops(chip, "bf16"))
    assert figure == pytest.approx(published, abs=0.005)


def test_with_the_whole_table_it_gives_nanogpts():
    figure = 107_000 * flops_per_token(from_preset("gpt2"), 1024, causal=False) / A100.flops
    assert figure == pytest.approx(0.29, abs=0.005)


def train_counted(cfg: dict, batch: int, tokens: int):
    """FLOPs of one training step as torch counts them under eager, those of attention, and the seconds of another."""
    model = GPTModel({**cfg, "use_flash": False}).train()
    ids = torch.randint(cfg["vocab_size"], (batch, tokens + 1))

    def step():
        next_token_loss(model(ids[:, :-1]), ids[:, 1:]).backward()

    with FlopCounterMode(display=False) as counter:
        step()
    began = time.perf_counter()
    step()
    seconds = time.perf_counter() - began
    return counter.get_total_flops(), counter.get_flop_counts()["Global"][torch.ops.aten.bmm], seconds


@pytest.mark.parametrize("variant", [{}, {"tie_weights": False}, {"ff_dim": 64, "n_layers": 1}, {"n_kv_heads": 2}])
def test_it_is_the_mfu_of_counted_flops_and_measured_seconds(variant):
    cfg, batch, tokens = {**SMALL, **variant}, 3, 100
    flops, of_attention, seconds = train_counted(cfg, batch, tokens)
    speed = batch * tokens / seconds
    peak = peak_flops("cpu", "fp32")
    # Causal: half of attention's table. Biases and norms are in N and multiply nothing that torch counts.
    assert mfu(cfg, tokens, speed, peak) == pytest.approx((flops - of_attention / 2) / seconds / peak.flops, rel=0.03)
    assert flops_per_token(cfg, tokens, causal=False) == pytest.approx(flops / (batch * tokens), rel=0.03)


def test_n_is_what_a_token_is_multiplied_with():
    model = GPTModel(SMALL)
    assert multiplied_parameters(SMALL) == model.num_parameters() - model.position_embedding.weight.numel()
    assert multiplied_parameters({**SMALL, "tie_weights": False}) == multiplied_parameters(SMALL)


def test_the_speed_that_an_mfu_means_has_that_mfu():
    speed = tokens_per_second_at(SMALL, 128, 0.4, A100)
    assert mfu(SMALL, 128, speed, A100) == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("name", "dtype", "tflops"),
    [
        ("NVIDIA A100-SXM4-80GB", "bf16", 312),
        ("NVIDIA A100-PCIE-40GB", "tf32", 156),
        ("NVIDIA H100 80GB HBM3", "bf16", 989),
        ("NVIDIA H100 PCIe", "bf16", 756),
        ("NVIDIA H200", "fp16", 989),
        ("NVIDIA L4", "bf16", 121),
        ("NVIDIA L40S", "bf16", 362),
        ("NVIDIA GeForce RTX 4090", "bf16", 165.2),
        ("NVIDIA GeForce RTX 3090", "fp16", 71),
        ("Tesla V100-SXM2-16GB", "fp16", 125),
        ("Tesla V100-PCIE-16GB", "fp16", 112),
        ("Tesla T4", "fp16", 65),
        ("a100", "fp32", 19.5),
        # Of the same name, and slower, or not known: nothing is guessed.
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "bf16", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bf16", None),
        ("NVIDIA GeForce RTX 4090 D", "bf16", None),
        ("NVIDIA GeForce RTX 3090 Ti", "bf16", None),
        ("NVIDIA GH200 480GB", "bf16", None),
        ("NVIDIA H100 NVL", "bf16", None),
        ("NVIDIA L40", "bf16", None),
        ("NVIDIA A10G", "bf16", None),
        ("Tesla T4", "bf16", None),
        ("Tesla V100-SXM2-16GB", "bf16", None),
    ],
)
def test_the_peak_of_a_chip_is_its_makers_without_sparsity(name, dtype, tflops):
    found = known_peak(name, dtype)
    assert (found and found.flops) == (tflops and pytest.approx(tflops * 1e12))
    assert found is None or (f"dense {dtype}" in found.name and found.source)


def test_the_peak_of_this_processor_is_measured_once_and_says_so():
    measured_peak.cache_clear()
    before = torch.get_rng_state()
    peak = peak_flops("cpu", "bf16")
    assert torch.equal(torch.get_rng_state(), before)  # a run is the same whether its peak is measured or not
    side = int(re.match(r"measured here: (\d+)x\1 matrix product, bf16, \d+ CPU thread", peak.name)[1])
    assert side >= 256
    assert 1e7 < peak.flops < 1e15
    assert peak_flops("cpu", "bf16") is peak
    assert measured_peak("cpu", "bf16") is peak


@pytest.mark.parametrize(("device", "dtype"), [("K80", "bf16"), ("T4", "bf16"), ("toaster", "fp32")])
def test_an_unknown_peak_is_not_invented(device, dtype):
    with pytest.raises(ValueError, match=f"the peak of '{device}' in {dtype} is not known.*A100.*--peak_tflops"):
        peak_flops(device, dtype)


def test_a_wrong_dtype_is_named():
    with pytest.raises(ValueError, match="dtype must be one of fp32, tf32, bf16, fp16, got 'int8'"):
        peak_flops("cpu", "int8")


def test_a_device_that_is_not_here_has_no_measured_peak():
    absent = "mps" if not torch.backends.mps.is_available() else "cuda"
    with pytest.raises(ValueError, match=f"device '{absent}' cannot be used here"):
        peak_flops(absent, "fp32")


def test_the_line_beside_an_mfu_names_formula_numbers_and_peak():
    line = explain(from_preset("gpt2"), 1024, Peak(1e12, "a chip, dense bf16", "its datasheet"))
    assert "(6 N + 6 L C T) / peak" in line
    for part in (
        "N = 123,653,376",
        "without position embeddings",
        "L = 12, C = 768, T = 1024",
        "causal",
        "0.7985 GFLOP",
    ):
        assert part in line
    assert line.endswith("peak 1 TFLOP/s, a chip, dense bf16 (its datasheet)")
