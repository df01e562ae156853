"""In which numbers the matrix products are computed, and what fp16 needs besides."""

import platform
from pathlib import Path

import pytest
import torch

from orchestrator.training.loop import OVERFLOW, evaluate, start, train
from orchestrator.training.precision import Precision, native_bf16, resolve_dtype
from tests.orchestrator.training.small import Notes, UnequalRows, recipe, same, small_model, weights_of

CPUINFO = Path("/proc/cpuinfo")


def output_dtypes(model) -> dict[str, set]:
    """A set that fills with the dtypes of what each matrix product gives."""
    found = {name: set() for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    for name in found:
        model.get_submodule(name).register_forward_hook(lambda _, __, out, name=name: found[name].add(out.dtype))
    return found


def test_auto_is_bf16_just_where_the_processor_says_that_it_multiplies_it():
    if CPUINFO.is_file() and platform.machine() == "x86_64":
        flags = next(line for line in CPUINFO.read_text().splitlines() if line.startswith("flags")).split()
        native = "avx512_bf16" in flags or "amx_bf16" in flags
        assert native_bf16("cpu") == native
        assert resolve_dtype("auto", "cpu") == ("bf16" if native else "fp32")
    assert resolve_dtype("auto", "cpu") in ("bf16", "fp32")  # fp16 on a CPU is for those who ask for it


@pytest.mark.parametrize(
    ("capabilities", "wanted"),
    [({"avx512_bf16": True}, "bf16"), ({"amx_bf16": True}, "bf16"), ({"bf16": True}, "bf16"), ({"avx2": True}, "fp32")],
)
def test_auto_on_other_processors(monkeypatch, capabilities, wanted):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert resolve_dtype("auto", "cpu") == wanted


@pytest.mark.parametrize(("capability", "wanted"), [((7, 5), "fp16"), ((8, 0), "bf16"), ((9, 0), "bf16")])
def test_auto_on_graphics_cards(monkeypatch, capability, wanted):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert resolve_dtype("auto", "cuda") == wanted


def test_a_card_that_does_not_compute_in_bf16_is_named_with_what_to_use(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Old Card")
    with pytest.raises(ValueError, match=r"Old Card.*--dtype fp16"):
        resolve_dtype("bf16", "cuda:0")
    assert resolve_dtype("fp32", "cuda:0") == "fp32"


def test_what_is_named_stays():
    assert [resolve_dtype(name, "cpu") for name in ("fp32", "bf16", "fp16")] == ["fp32", "bf16", "fp16"]
    assert resolve_dtype("auto", "mps") == "fp32"


@pytest.mark.parametrize(
    ("name", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_every_matrix_product_of_training_and_evaluation_is_computed_in_the_dtype(name, dtype):
    model = small_model()
    found = output_dtypes(model)
    settings = recipe(dtype=name, max_steps=2)
    train(model, UnequalRows(), settings, progress=False)
    assert len(found) == 4 * 2 + 1
    assert all(dtypes == {dtype} for dtypes in found.values()), found
    for dtypes in found.values():
        dtypes.clear()
    evaluate(model, UnequalRows().validation(100), Precision(name, "cpu"))
    assert all(dtypes == {dtype} for dtypes in found.values()), found
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_the_looks_of_a_run_are_taken_in_the_runs_own_dtype():
    model = small_model()
    found = output_dtypes(model)
    in_evaluation = set()
    model.head.register_forward_hook(lambda head, _, out: None if head.training else in_evaluation.add(out.dtype))
    train(model, UnequalRows(), recipe(dtype="bf16", max_steps=1, eval_on_start=True), progress=False)
    assert in_evaluation == found["head"] == {torch.bfloat16}


@pytest.mark.parametrize(("name", "off"), [("bf16", 0.05), ("fp16", 0.01)])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_short_numbers_learn_as_long_ones_do(name, off, optimizer):
    losses = {}
    for dtype in ("fp32", name):
        settings = recipe(dtype=dtype, max_steps=30, learning_rate=1e-2, optimizer=optimizer)
        losses[dtype] = [loss for _, loss in train(small_model(), UnequalRows(), settings, progress=False).train]
    assert losses[name] != losses["fp32"]
    assert losses[name][0] == pytest.approx(losses["fp32"][0], rel=1e-2)
    assert sum(losses[name][-5:]) / 5 == pytest.approx(sum(losses["fp32"][-5:]) / 5, abs=10 * off)
    assert losses[name][-1] < losses[name][0] - 1


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_an_overflow_under_fp16_lowers_the_scale_and_is_no_fault(optimizer):
    model, settings = (
        small_model(),
        recipe(dtype="fp16", optimizer=optimizer, max_steps=80, learning_rate=1e-2, max_bad_steps=1),
    )
    state = start(model, settings)
    state.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)  # fp16 ends at 2^16
    notes, before = Notes(state), weights_of(model)
    train(model, UnequalRows(), settings, state=state, watch=notes)
    assert same(notes.weights[0], before)  # no step was made
    assert all(memory.count_nonzero() == 0 for memory in notes.memories[0])
    told = [record.skipped for record in notes.steps]
    assert told[0] == OVERFLOW
    assert set(told) == {OVERFLOW, None}
    assert state.counters.skipped == told.count(OVERFLOW)  # counted, and never held against the run: max_bad_steps is 1
    assert state.scaler.get_scale() == 2.0 ** (40 - state.counters.skipped)  # each halves it
    assert 2.0**8 < state.scaler.get_scale() < 2.0**25
    assert not same(notes.weights[-1], before)
    assert sum(record.loss for record in notes.steps[-4:]) / 4 < notes.steps[0].loss - 1  # it went on, and learned


def test_scaling_changes_neither_the_reported_norm_nor_the_step():
    runs = {}
    for scale in (2.0**4, 2.0**10):  # powers of two: exact in every float
        model, settings = small_model(), recipe(dtype="fp16", max_steps=3)
        state = start(model, settings)
        state.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        notes = Notes(state)
        train(model, UnequalRows(), settings, state=state, watch=notes)
        runs[scale] = ([record.gradient_norm for record in notes.steps], notes.weights[-1])
    (norms, weights), (others, other_weights) = runs.values()
    assert norms == pytest.approx(others, rel=1e-2)
    assert norms[0] < 100
    start_ = torch.cat([p.flatten() for p in weights_of(small_model())])
    moves = [torch.cat([p.flatten() for p in run]) - start_ for run in (weights, other_weights)]
    assert (moves[0] - moves[1]).norm() < 0.1 * moves[0].norm()


def test_fp32_and_bf16_have_a_scaler_that_does_nothing():
    for name in ("fp32", "bf16"):
        precision = Precision(name, "cpu")
        assert not precision.scaler.is_enabled()
        assert precision.scaler.scale(torch.tensor(3.0)).item() == 3.0
    assert Precision("fp16", "cpu").scaler.get_scale() == 2.0**16
