"""compare_attention: right implementations coincide, a wrong one is seen, and the verdict can be recomputed by hand."""

from dataclasses import replace
from itertools import count
from types import SimpleNamespace

import pytest
import torch

from CMHA.implementations import IMPLEMENTATIONS, eager, sdpa
from GPT2Model.gpt2 import GPTModel
from orchestrator.evaluation import compare_attention
from orchestrator.evaluation.compare_attention import (
    FP64_BOUND,
    MULTIPLE,
    STEADY,
    Comparison,
    Curve,
    bounds,
    judge,
    names_of_curves,
    refused,
    run_comparison,
    too_large,
)
from orchestrator.text.samples import Batch
from orchestrator.training.loop import train
from orchestrator.training.settings import TrainSettings

CFG = {"vocab_size": 23, "context_length": 12, "emb_dim": 24, "n_heads": 3, "n_layers": 2, "drop_rate": 0.0,
       "init_std": 0.2}  # fmt: skip
SETTINGS = TrainSettings(max_steps=12, batch_size=4, learning_rate=1e-2, warmup_steps=2, eval_steps=12)
THREE = ("eager", "sdpa", "flash_tiled")
NUMBERS = count()


class Counting:
    """Rows that count up modulo 23 from a start that the sample's number decides."""

    name, floor, per_epoch = "counting", None, None

    def batch(self, first, count):
        rows = ((torch.arange(first, first + count) * 7)[:, None] + torch.arange(13)) % 23
        return Batch(rows[:, :-1], rows[:, 1:])

    def validation(self, tokens, batch_size=8):
        return [self.batch(10_000, 4)]


def comparison(dtype: str, *names: str) -> Comparison:
    return Comparison(CFG, Counting(), SETTINGS, names or THREE, dtype)


def plant(monkeypatch, attention) -> str:
    """Put an implementation into the registry, under a name that no other test used: choices are remembered by name."""
    name = f"planted_{next(NUMBERS)}_to_compare"
    module = SimpleNamespace(SUMMARY="planted", ALIASES=(), check=lambda request: [], attention=attention)
    monkeypatch.setitem(IMPLEMENTATIONS, name, module)
    return name


def wrong_scale(queries, keys, values, mask, *, scale, dropout=0.0):
    return eager.attention(queries, keys, values, mask, scale=1.01 * scale, dropout=dropout)


class HalfGradient(torch.autograd.Function):
    """The identity, whose gradient is half of what it should be."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient / 2


def wrong_gradient(queries, keys, values, mask, *, scale, dropout=0.0):
    return eager.attention(queries, HalfGradient.apply(keys), values, mask, scale=scale, dropout=dropout)


def by_name(found: list[dict]) -> dict[str, dict]:
    return {line["implementation"]: line for line in found}


@pytest.mark.parametrize("dtype", ["fp64", "fp32", "bf16"])
def test_right_implementations_coincide_in_every_dtype(dtype):
    found = by_name(judge(run_comparison(comparison(dtype)), dtype))
    assert [name for name, line in found.items() if line["passed"]] == ["sdpa", "flash_tiled"]
    assert found["eager"]["passed"] is None
    assert found["eager"]["largest"] == 0.0
    for line in found.values():
        assert len(line["differences"]) == 12
        assert line["peak_bytes"] > 0
        assert line["tokens_per_second"] > 0
    if dtype == "fp64":
        everything = found["sdpa"]["differences"] + found["flash_tiled"]["differences"]
        assert 0 < max(everything) < 1e-12  # exactly 0 everywhere would be eager in their place


@pytest.mark.parametrize("dtype", ["fp64", "fp32"])
@pytest.mark.parametrize("attention", [wrong_scale, wrong_gradient])
def test_a_wrong_implementation_fails_and_the_others_pass(monkeypatch, dtype, attention):
    wrong = plant(monkeypatch, attention)
    found = by_name(judge(run_comparison(comparison(dtype, "eager", "sdpa", wrong)), dtype))
    assert found[wrong]["passed"] is False
    assert found[wrong]["of_bound"] > 10
    assert found["sdpa"]["passed"] is True
    if attention is wrong_gradient:  # the first loss is computed before any gradient
        assert found[wrong]["differences"][0] == 0.0


def test_an_implementation_that_breaks_is_reported_and_the_others_go_on(monkeypatch):
    calls = []

    def breaks(*args, **options):
        calls.append(1)
        if len(calls) > 9:
            raise RuntimeError("the kernel\nbroke")
        return sdpa.attention(*args, **options)

    def not_a_number(queries, *args, **options):
        context, weights = eager.attention(queries, *args, **options)
        return context * float("nan"), weights

    broken, nan = plant(monkeypatch, breaks), plant(monkeypatch, not_a_number)
    found = by_name(judge(run_comparison(comparison("fp64", "eager", broken, nan, "sdpa")), "fp64"))
    assert found[broken]["failed"] == "RuntimeError: the kernel"
    assert found[broken]["passed"] is False
    assert 0 < len(found[broken]["differences"]) < 12
    assert found[nan]["passed"] is False
    assert "the loss is nan" in found[nan]["failed"]
    assert found["sdpa"]["passed"] is True
    assert len(found["sdpa"]["differences"]) == 12


def test_the_curve_of_turns_is_the_one_of_the_training_loop_alone():
    curves = {curve.name: curve for curve in run_comparison(comparison("fp32"))}
    for name in THREE:
        torch.manual_seed(SETTINGS.seed)
        model = GPTModel({**CFG, "attn_implementation": name})
        alone = train(model, Counting(), replace(SETTINGS, eval_on_start=False), progress=False)
        assert curves[name].losses == [loss for _, loss in alone.train]
        assert curves[name].validation == alone.validation[-1][1]
        assert curves[name].seconds[0] is None  # the first, and the one that was watched for memory
        assert curves[name].seconds.count(None) == 2


def test_each_batch_is_made_once_and_the_yardstick_gets_its_rows_reversed(monkeypatch):
    asked, seen = [], []

    class Watched(Counting):
        def batch(self, first, count):
            asked.append(first)
            return super().batch(first, count)

    real = compare_attention.train

    def spied(model, samples, settings, **options):
        first = options["state"].counters.sample
        seen.append((type(samples).__name__, samples.batch(first, 4).inputs[0].tolist()))
        return real(model, samples, settings, **options)

    monkeypatch.setattr(compare_attention, "train", spied)
    run_comparison(replace(comparison("fp32", "eager", "sdpa"), samples=Watched()))
    assert asked == [10_000, *range(0, 48, 4)]
    rows = {kind: row for kind, row in seen[:3]}
    assert rows == {
        "SharedSamples": Counting().batch(0, 4).inputs[0].tolist(),
        "Reversed": Counting().batch(0, 4).inputs[3].tolist(),
    }


def test_who_cannot_train_here_is_left_out_with_the_reason():
    of = comparison("fp64", "eager", "sdpa", "flash_attention_2")
    assert "CUDA" in refused(of)["flash_attention_2"]
    assert names_of_curves(of) == ["eager", "sdpa"]
    assert names_of_curves(replace(of, dtype="fp32")) == ["eager", "sdpa", "eager, rows reversed"]
    assert names_of_curves(replace(of, dtype="bf16")) == ["eager", "sdpa", "eager in fp32"]


def test_models_that_would_not_fit_together_are_named_before_the_work(monkeypatch):
    assert too_large(comparison("fp32")) is None
    monkeypatch.setattr(compare_attention, "free_memory", lambda device: 2**20)
    assert "4 models with their optimizers" in too_large(comparison("fp32"))
    assert "3 models" in too_large(comparison("fp64"))


# --- the verdict, by hand


def curve(name: str, losses: list[float], validation: float = 1.0, failed: str | None = None) -> Curve:
    return Curve(
        name, losses, [None] + [0.1] * (len(losses) - 1), [10] * len(losses), validation, 100, 200, failed
    )  # fmt: skip


def test_the_bound_in_fp64_is_fixed():
    assert bounds(curve("eager", [2.0, 1.0]), None) == [FP64_BOUND] * 2


def test_the_bound_in_fp32_is_the_yardsticks_largest_so_far_over_the_first_steps_at_least():
    base = [4.0] * 14
    off = [0.0] * 14
    off[3], off[11], off[12] = 1e-3, 3e-3, 2e-3
    yardstick = curve("eager, rows reversed", [a + b for a, b in zip(base, off, strict=True)])
    expected = [1e-3] * 11 + [3e-3] * 3
    assert STEADY == 10
    assert bounds(curve("eager", base), yardstick) == pytest.approx([MULTIPLE * value for value in expected])


def test_the_bound_is_never_less_than_the_rounding_of_the_loss():
    base = curve("eager", [4.0, 0.25])
    assert bounds(base, curve("y", [4.0, 0.25])) == pytest.approx([MULTIPLE * 4 * 2**-23, MULTIPLE * 2**-23])


@pytest.mark.parametrize(
    ("other", "passed"),
    [
        (curve("sdpa", [2.0, 1.0 + 9e-10, 1.0]), True),
        (curve("sdpa", [2.0, 1.0 + 2e-9, 1.0]), False),
        (curve("sdpa", [2.0, 1.0, 1.0], validation=1.0 + 2e-9), False),
        (curve("sdpa", [2.0, float("nan"), 1.0]), False),
        (curve("sdpa", [2.0, 1.0]), False),
        (curve("sdpa", [2.0, 1.0, 1.0], failed="RuntimeError: no"), False),
    ],
)
def test_a_curve_passes_only_whole_within_the_bound_and_with_its_validation(other, passed):
    found = by_name(judge([curve("eager", [2.0, 1.0, 1.0]), other], "fp64"))["sdpa"]
    assert found["passed"] is passed


def test_what_a_curve_cost_is_its_own_seconds_beside_eagers_of_the_same_step():
    slow, fast = curve("eager", [1.0] * 4), curve("sdpa", [1.0] * 4)
    slow.seconds, fast.seconds = [None, 0.4, None, 0.2], [None, 0.1, None, 0.1]
    found = by_name(judge([slow, fast], "fp64"))["sdpa"]
    assert found["over_eager"]["median"] == pytest.approx((0.25 + 0.5) / 2)
    assert found["tokens_per_second"] == pytest.approx(20 / 0.2)
