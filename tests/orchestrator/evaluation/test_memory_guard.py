"""What is left out because it would not fit: the formulas are what is really taken, and the limits are read right."""

import math

import pytest

from CMHA.implementations import IMPLEMENTATIONS, flex_attention
from CMHA.masks import AttentionMask
from orchestrator.evaluation import memory_guard
from orchestrator.evaluation.attention_bench import Bench, run_bench
from orchestrator.evaluation.cases import Case
from orchestrator.evaluation.memory import peak_tensor_bytes
from orchestrator.evaluation.memory_guard import growth_exponent, inputs_too_large, too_large


def test_the_formula_for_eagers_memory_is_what_eager_takes():
    bench = Bench({"eager": IMPLEMENTATIONS["eager"]}, [512], repeats=1)
    case = bench.case(512)
    (row,), _ = run_bench(bench)
    needed = memory_guard.EAGER_TABLES * memory_guard.table_bytes(case) + memory_guard.MASK_BYTES["eager"] * 512**2
    assert memory_guard.table_bytes(case) == 1 * 4 * 512 * 512 * 4
    assert row.peak_bytes["forward_backward"] == pytest.approx(needed, rel=0.1)
    assert row.worst_peak <= 1.1 * needed


def test_the_formula_for_flex_attentions_mask_is_what_it_takes():
    mask = AttentionMask(1024, 1024)
    peak = peak_tensor_bytes(lambda: flex_attention.build_block_mask(mask, 1, "cpu")).peak
    assert peak == pytest.approx(memory_guard.MASK_BYTES["flex_attention"] * 1024**2, rel=0.1)


def test_the_mask_of_flex_attention_is_reason_enough(monkeypatch):
    case = Case(query_len=1000, key_len=1000)
    monkeypatch.setattr(memory_guard, "free_memory", lambda device: 20_000_000)
    assert too_large("flex_attention", case) is None
    monkeypatch.setattr(memory_guard, "free_memory", lambda device: 19_999_999)
    assert "10 bytes of mask for each of T x T pairs" in too_large("flex_attention", case)


def test_the_growth_so_far_says_what_another_implementation_will_take(monkeypatch):
    monkeypatch.setattr(memory_guard, "free_memory", lambda device: 900)
    case = Case(query_len=400, key_len=400)
    quadratic, linear = [(100, 30), (200, 120)], [(100, 30), (200, 60)]
    assert "T^2.0" in too_large("mine", case, quadratic)  # 480 at 400, if it goes on so
    assert too_large("mine", case, linear) is None
    assert too_large("mine", case, quadratic[:1]) is None


def test_the_exponent_between_two_points():
    assert growth_exponent([2, 10, 20], [9, 3, 3 * math.sqrt(2)]) == pytest.approx(0.5)


def test_the_inputs_are_counted_with_the_projections_that_they_are_cut_from(monkeypatch):
    case = Case(batch_size=1, num_heads=4, head_dim=64, query_len=256, key_len=256, strided=True)
    needed = 4 * (3 * 4 * 256 * 64 * 4)
    monkeypatch.setattr(memory_guard, "free_memory", lambda device: 2 * needed)
    assert inputs_too_large(case) is None
    monkeypatch.setattr(memory_guard, "free_memory", lambda device: 2 * needed - 1)
    assert "projections" in inputs_too_large(case)
