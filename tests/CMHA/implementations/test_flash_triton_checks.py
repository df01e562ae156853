"""When our GPU kernels serve and when not, what is said and taken then; block sizes, given and found by measuring."""

import subprocess
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from CMHA.choosing import AttentionSettings, choose
from CMHA.cmha import MultiHeadAttention
from CMHA.implementations import flash_triton
from CMHA.masks import AttentionMask
from CMHA.packages import Found
from CMHA.request import AttentionRequest
from GPT2Model.gpt2 import GPTModel
from orchestrator.evaluation.cases import Case
from orchestrator.evaluation.parity import measure
from tests.triton_interpreter import DEVICE

ROOT = Path(__file__).resolve().parent.parent.parent.parent
ON_HOPPER = AttentionRequest(device="cuda", dtype=torch.bfloat16, capability=(9, 0))
IN_THE_INTERPRETER = pytest.mark.skipif(DEVICE != "cpu", reason="about a CPU and its interpreter; here is a GPU")


def triton_as(interpreter: bool) -> Found:
    """A triton that was imported as an interpreter, or as a compiler."""
    module = types.ModuleType("triton")
    module.language = types.SimpleNamespace(max=None if interpreter else 1)
    module.runtime = types.SimpleNamespace(JITFunction=int)
    return Found("3.9", module=module)


COMPILER, INTERPRETER = triton_as(False), triton_as(True)
REQUESTS = {  # what is asked beyond ON_HOPPER, the triton there, TRITON_INTERPRET; code, message, remedy
    "weights": ({"needs_weights": True}, COMPILER, None, "weights_wanted", "never forms", "ask eager"),
    "float64": ({"dtype": torch.float64}, COMPILER, None, "dtype", "not float64", "use flash_tiled"),
    "wide": ({"head_dim": 129}, COMPILER, None, "head_dim", "up to 128, not 129", "more heads"),
    "no_queries": ({"query_len": 0}, COMPILER, None, "empty", "without queries or keys", "use sdpa"),
    "no_keys": ({"key_len": 0}, COMPILER, None, "empty", "without queries or keys", "use sdpa"),
    "turing": ({"capability": (7, 5)}, COMPILER, None, "capability", "(7, 5)", "use sdpa"),
    "mps": ({"device": "mps", "capability": None}, COMPILER, None, "cuda_only", "not on mps", "auto"),
    "cpu": ({"device": "cpu", "capability": None}, INTERPRETER, None, "cuda_only", "interpreter only", "flash_tiled"),
    "cpu_0": ({"device": "cpu", "capability": None}, INTERPRETER, "0", "cuda_only", "interpreter only", "set TRITON"),
    "cpu_too_late": ({"device": "cpu", "capability": None}, COMPILER, "1", "import_failed", "imported before",
                     "before Python starts"),
    "not_installed": ({}, Found(), None, "not_installed", "not installed", "pip install triton"),
    "broken": ({}, Found("3.9", error="ImportError: no libcuda"), None, "import_failed", "ImportError: no libcuda",
               "pip install triton"),
    "cpu_not_installed": ({"device": "cpu", "capability": None}, Found(), "1", "not_installed", "not installed",
                          "pip install triton"),
    "interpreter_on_cuda": ({}, INTERPRETER, "1", "import_failed", "runs its interpreter", "unset TRITON_INTERPRET"),
}  # fmt: skip


@pytest.fixture
def machine(monkeypatch):
    """machine(triton, value): this triton is found, and TRITON_INTERPRET has this value."""

    def build(triton, value):
        monkeypatch.setattr(flash_triton, "find", lambda name: triton)
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        if value is not None:
            monkeypatch.setenv("TRITON_INTERPRET", value)

    return build


@pytest.mark.parametrize("name", REQUESTS)
def test_what_cannot_be_served_is_refused_with_one_reason_and_a_remedy(name, machine, messages):
    asked, triton, value, code, message, remedy = REQUESTS[name]
    machine(triton, value)
    request = replace(ON_HOPPER, **asked)
    (reason,) = flash_triton.check(request)
    assert reason.code == code
    assert message in reason.message
    assert remedy in reason.remedy
    for _ in range(2):
        choice = choose(AttentionSettings(attn_implementation="triton"), request)
    assert choice.chosen == ("eager" if name in ("weights", "mps") else "sdpa")
    (warning,) = [record.getMessage() for record in messages if record.levelname == "WARNING"]
    assert reason.message in warning
    assert reason.remedy in warning
    with pytest.raises(ValueError, match="flash_triton cannot serve this request") as error:
        choose(AttentionSettings(attn_implementation="flash_triton", attn_strict=True), request)
    assert f"{reason.message}; {reason.remedy}" in str(error.value)


@pytest.mark.parametrize(
    "asked",
    [{}, {"dtype": torch.float32}, {"dtype": torch.float16}, {"head_dim": 128}, {"head_dim": 80}, {"head_dim": 1},
     {"num_kv_heads": 1}, {"dropout": 0.9}, {"mask_kind": "full+padding+documents+window"}, {"query_len": 1},
     {"needs_grad": True}, {"capability": (8, 0)}, {"capability": (10, 0)}, {"capability": None}],
    ids=str,
)  # fmt: skip
def test_what_the_kernels_can_do_is_not_refused(asked, machine):
    machine(COMPILER, None)
    assert flash_triton.check(replace(ON_HOPPER, **asked)) == []
    machine(INTERPRETER, "1")
    assert flash_triton.check(replace(ON_HOPPER, **asked, device="cpu")) == []


def test_all_reasons_are_given_at_once(machine):
    machine(Found(), None)
    request = replace(ON_HOPPER, dtype=torch.float64, head_dim=256, needs_weights=True, capability=(7, 0))
    codes = [reason.code for reason in flash_triton.check(request)]
    assert codes == ["weights_wanted", "dtype", "head_dim", "capability", "not_installed"]


@IN_THE_INTERPRETER
@pytest.mark.parametrize(
    ("before", "said"),
    [
        ("", "choice flash_triton"),
        ("import triton", "triton was imported before TRITON_INTERPRET=1 was set"),
    ],
    ids=["in_time", "too_late"],
)
def test_the_interpreter_serves_a_cpu_if_it_is_asked_for_before_triton_is_imported(before, said):
    """In a process of its own, without the tests' own import of triton."""
    code = f"""
{before}
import os
os.environ["TRITON_INTERPRET"] = "1"
import torch
from CMHA.cmha import MultiHeadAttention
layer = MultiHeadAttention(32, 32, 9, 0.0, 2, attn_implementation="flash_triton")
x = torch.randn(1, 9, 32)
with torch.no_grad():
    out = layer(x)
    chosen = layer.choice().chosen
    layer.set_attention("eager")
    assert torch.allclose(layer(x), out, atol=1e-5)
print("choice", chosen)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert said in done.stdout + done.stderr


# --- in the layer and the model ------------------------------------------------------------------------------


def small_model(**changes):
    torch.manual_seed(0)
    cfg = {"vocab_size": 31, "context_length": 24, "emb_dim": 32, "n_heads": 2, "n_layers": 1, "drop_rate": 0.0,
           "qkv_bias": True}  # fmt: skip
    return GPTModel(cfg | changes)


def test_the_toggle_and_set_attention_take_it_in_and_out_and_leave_the_weights_alone(kernels, messages):
    model = small_model(attn_implementation="flash_triton").to(kernels).eval()
    off = small_model(attn_implementation="flash_triton", use_flash=False)
    assert list(model.state_dict()) == list(off.state_dict())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ids = torch.arange(17, device=kernels)[None]
    chosen, logits = [], []
    with torch.no_grad():
        for name in ("flash_triton", "sdpa", "triton", {"use_flash": False}, {"use_flash": True}):
            model.set_attention(name)
            logits.append(model(ids))
            chosen.append(model.blocks[0].attention.choice().chosen)
    assert chosen == ["flash_triton", "sdpa", "flash_triton", "eager", "flash_triton"]
    assert torch.equal(logits[0], logits[2])
    assert torch.equal(logits[0], logits[4])
    for other in (logits[1], logits[3]):
        torch.testing.assert_close(other, logits[0], rtol=1e-5, atol=1e-5)
        assert not torch.equal(other, logits[0])  # it was another implementation
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert [record for record in messages if record.levelname == "WARNING"] == []


def test_a_step_of_training_is_as_near_to_float64_as_eagers(kernels):
    """Three models with the same weights; the plain formula in float64 is right."""
    ids = torch.randint(31, (2, 20), generator=torch.Generator().manual_seed(0)).to(kernels)
    gradients, losses = {}, {}
    for name, dtype in (("flash_triton", torch.float32), ("sdpa", torch.float32), ("eager", torch.float32),
                        ("exact", torch.float64)):  # fmt: skip
        model = small_model(attn_implementation="eager" if name == "exact" else name).to(kernels, dtype)
        loss = torch.nn.functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        losses[name] = loss.item()
        gradients[name] = {key: parameter.grad.double() for key, parameter in model.named_parameters()}
    eps = torch.finfo(torch.float32).eps
    assert abs(losses["flash_triton"] - losses["exact"]) <= 2 * abs(losses["eager"] - losses["exact"]) + 4 * eps * 4
    for key, exact in gradients["exact"].items():
        error = {name: (gradients[name][key] - exact).abs().max() for name in ("flash_triton", "sdpa", "eager")}
        assert error["flash_triton"] <= 3 * error["eager"] + 4 * eps * max(1, exact.abs().max()), key
        assert error["sdpa"] <= 3 * error["eager"] + 4 * eps * max(1, exact.abs().max()), key


# --- block sizes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 8, 15, 17, 24, 48, 100, -16, 0])
@pytest.mark.parametrize("which", ["query_block_size", "kv_block_size"])
def test_a_block_size_that_no_tile_can_have_is_a_clear_error(which, size, kernels):
    queries = torch.randn(1, 1, 4, 16, device=kernels)
    with pytest.raises(ValueError, match=rf"16, 32, 64, 128, .* or None \(chosen\); got {size}\."):
        flash_triton.attention(queries, queries, queries, AttentionMask(4, 4), scale=1.0, **{which: size})


@pytest.mark.parametrize(
    ("query_len", "length"), [(1, 1), (2, 128), (128, 128), (129, 1024), (4096, 8192), (10**6, 65536)]
)
def test_lengths_of_one_order_are_tuned_together(query_len, length):
    assert flash_triton.length_class(query_len) == length


def test_tensors_of_unequal_dtype_are_a_clear_error(kernels):
    queries = torch.randn(1, 1, 4, 16, device=kernels)
    with pytest.raises(ValueError, match="must be of one dtype, got float16, float32, float32"):
        flash_triton.attention(queries.half(), queries, queries, AttentionMask(4, 4), scale=1.0)


def test_the_cfgs_block_sizes_reach_the_kernels(kernels, monkeypatch):
    asked, real = [], flash_triton.launch

    def launch(name, *others):
        asked.append((name, others[-1]))
        real(name, *others)

    monkeypatch.setattr(flash_triton, "launch", launch)
    model = small_model(attn_implementation="flash_triton", flash_query_block_size=16, flash_kv_block_size=32)
    model.to(kernels)(torch.arange(17, device=kernels)[None]).sum().backward()
    assert asked == [(name, (16, 32)) for name in ("forward", "backward_delta", "backward_dkdv", "backward_dq")]


@pytest.fixture
def tuning(kernels, monkeypatch):
    """As on a GPU without sizes given: measured, by a benchmark that calls each once and lets `favourite` win.

    Gives a namespace: favourite, the sizes that win, and tried, what was measured.
    """
    from triton.runtime import autotuner

    told = types.SimpleNamespace(tried=[], favourite=None)
    real = autotuner.Autotuner._bench

    def bench(self, *args, config, **meta):
        told.tried.append((self.base_fn.__name__, config))
        real(self, *args, config=config, **meta)  # it runs
        return [0.0 if config.kwargs == told.favourite else 1.0] * 3

    monkeypatch.setattr(autotuner.Autotuner, "_bench", bench)
    monkeypatch.setattr(autotuner.Autotuner, "do_bench", lambda self, call, quantiles: call(), raising=False)
    monkeypatch.setattr(flash_triton, "interpreted", lambda: False)  # else the sizes are DEFAULT_BLOCK
    flash_triton.tuned.cache_clear()
    yield told
    flash_triton.tuned.cache_clear()


@IN_THE_INTERPRETER
def test_without_block_sizes_each_kernel_is_measured_once_for_each_kind_of_call_and_the_fastest_is_used(tuning):
    tuning.favourite = {"BLOCK_Q": 32, "BLOCK_K": 64}
    base = {"head_dim": 16, "query_len": 20, "key_len": 33, "num_heads": 1, "num_kv_heads": 1, "batch_size": 1}

    def measured_in(**changes):
        tuning.tried.clear()
        run_once(Case(**(base | changes)))
        return {name for name, _ in tuning.tried}

    three = {"forward", "backward_dkdv", "backward_dq"}
    assert measured_in() == three
    assert len({config for _, config in tuning.tried}) <= len(flash_triton.TILES)
    for name in three:
        best = flash_triton.tuned(name, 0, 0, flash_triton.ROOM_FLOAT32 // 16).best_config
        assert best.kwargs == tuning.favourite
    assert measured_in(query_len=31) == set()  # another length is the same kind ...
    assert measured_in(query_len=1) == three  # ... unless it is of another order
    assert measured_in(seed=5) == set()
    assert measured_in(head_dim=32) == three
    assert measured_in(causal=False) == three
    assert measured_in(dtype=torch.float16) == three
    assert measured_in(padding="left") == three
    assert measured_in(window=3) == three
    assert measured_in(num_heads=2) == three  # a group of 2
    assert measured_in() == set()


@IN_THE_INTERPRETER
def test_a_size_that_is_given_is_kept_and_only_the_other_is_measured(tuning):
    tuning.favourite = {"BLOCK_Q": 16, "BLOCK_K": 32}
    run_once(Case(head_dim=16, query_len=9, key_len=9, num_heads=1, num_kv_heads=1, batch_size=1, query_block_size=16))
    assert tuning.tried
    assert {config.kwargs["BLOCK_Q"] for _, config in tuning.tried} == {16}
    assert {config.kwargs["BLOCK_K"] for _, config in tuning.tried} == {k for _, k, _, _ in flash_triton.TILES}
    assert max(q * k for q, k, _, _ in flash_triton.TILES) > flash_triton.ROOM_FLOAT32 // 128  # else nothing is halved
    room = flash_triton.ROOM_FLOAT32 // 16
    assert flash_triton.tuned("forward", 16, 0, room).best_config.kwargs == tuning.favourite


@IN_THE_INTERPRETER
def test_on_a_gpu_given_sizes_are_taken_as_far_as_there_is_room(tuning, monkeypatch):
    launched, real = [], flash_triton.fitting

    def fitting(*given):
        launched.append((given, real(*given)))
        return launched[-1][1]

    monkeypatch.setattr(flash_triton, "fitting", fitting)
    case = Case(head_dim=16, query_len=20, key_len=20, num_heads=1, num_kv_heads=1, batch_size=1)
    run_once(replace(case, query_block_size=64, kv_block_size=32))
    run_once(replace(case, query_block_size=128, kv_block_size=64, head_dim=80))
    run_once(replace(case, query_block_size=128, kv_block_size=128, head_dim=80, dtype=torch.float16))
    assert tuning.tried == []
    three = [((64, 32, 4096), (64, 32))] * 3 + [((128, 64, 512), (32, 16))] * 3 + [((128, 128, 4096), (64, 64))] * 3
    assert launched == three


def test_the_larger_size_is_halved_until_there_is_room():
    assert flash_triton.fitting(128, 128, 0) == (128, 128)
    assert flash_triton.fitting(128, 128, 128 * 128) == (128, 128)
    assert flash_triton.fitting(128, 128, 8192) == (128, 64)
    assert flash_triton.fitting(16, 256, 1024) == (16, 64)
    assert flash_triton.fitting(16, 16, 1) == (16, 16)  # no tile is smaller


def run_once(case: Case) -> None:
    def attention(*tensors, scale, dropout):
        blocks = {"query_block_size": case.query_block_size, "kv_block_size": case.kv_block_size}
        return flash_triton.attention(*tensors, scale=scale, dropout=dropout, **blocks)

    measured = measure(attention, case)
    assert measured.passed, measured.ratio


def test_what_is_tuned_for_is_all_that_the_kernels_are_compiled_for(kernels):
    """A kind of call that is no part of the key would run with another kind's tiles."""
    queries = torch.zeros(1, 2, 4, 16)
    keys = queries[:, :1]
    compiled_for = set(flash_triton.kinds(queries, True, 0, None, 0.0)) - {"WIDTH", "WIDEN"}  # both follow from others
    assert compiled_for | {"group"} == set(flash_triton.tuned("forward", 0, 0, 0).keys)
    assert {"group"} <= set(flash_triton.numbers(queries, keys, 0, 1.0, 0.0))
    assert all(q >= 16 and k >= 16 and not (q & (q - 1) or k & (k - 1)) for q, k, _, _ in flash_triton.TILES)


def test_a_triton_that_does_not_import_is_a_reason_and_no_error():
    code = """
import sys
sys.modules["triton"] = None
from CMHA.implementations import IMPLEMENTATIONS
from CMHA.request import AttentionRequest
print([reason.message for reason in IMPLEMENTATIONS["flash_triton"].check(AttentionRequest(device="cuda"))])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert "triton does not import (ModuleNotFoundError" in done.stdout, done.stderr


def test_a_layer_may_be_converted_to_another_dtype(kernels):
    layer = MultiHeadAttention(32, 32, 16, 0.0, 2, attn_implementation="flash_triton", attn_strict=True).to(kernels)
    x = torch.randn(2, 11, 32, device=kernels)
    with torch.no_grad():
        exact = layer(x)
        for dtype in (torch.bfloat16, torch.float16):
            out = layer.to(dtype)(x.to(dtype))
            assert out.dtype == dtype
            torch.testing.assert_close(out.float(), exact, rtol=0, atol=0.02)
        with pytest.raises(ValueError, match="not float64"):
            layer.double()(x.double())
