"""benchmarks/kernels_on_gpu.py: it runs, here in Triton's interpreter; what it wants is what it asks for; a crash loses
nothing. No figure of a GPU is tested, for there is none."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from CMHA.implementations import flash_triton
from orchestrator.evaluation import gpu_kernels
from orchestrator.evaluation.attention_bench import Row, spread, summarise
from orchestrator.evaluation.gpu_kernels import STEPS, WANTED, Plan, find_sanitizer, sanitizer, verdicts

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "benchmarks" / "kernels_on_gpu.py"
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("kernels_on_gpu", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def undisturbed(monkeypatch):
    """What a step sets for its process is taken back after the test."""
    monkeypatch.setenv("TRITON_CACHE_DIR", "somewhere")


# ------------------------------------------------------------------ the whole command


@pytest.fixture(scope="module")
def dry(tmp_path_factory):
    """A dry run as a user starts it: (what was printed, the results, the folder)."""
    folder = tmp_path_factory.mktemp("dry")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--dry-run"], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout, json.loads((folder / "runs" / "gpu-dry-run.json").read_text()), folder / "runs"


def test_a_dry_run_does_every_step_and_says_that_it_measures_nothing(dry):
    printed, results, folder = dry
    assert list(results["steps"]) == list(STEPS)
    assert "NOT A MEASUREMENT" in results["not_a_measurement"]
    assert printed.startswith(results["not_a_measurement"])
    for name, step in results["steps"].items():
        assert step["passed"] is (True if name == "parity" else None), (name, step["figure"])
        assert step["command"] == "python benchmarks/kernels_on_gpu.py --dry-run"
        assert step["machine"]["triton_runs"] == "interpreter"
        assert step["machine"]["versions"]["triton"]
        assert f"dry run  {name}: {step['figure']}" in printed
    assert sorted(path.name for path in folder.iterdir()) == [
        "gpu-dry-run-memory.png", "gpu-dry-run-time.png", "gpu-dry-run.json"
    ]  # fmt: skip


def test_no_line_of_a_dry_run_reads_like_a_result(dry):
    printed, _, _ = dry
    lines = printed.splitlines()
    for word in ("PASS", "FAIL", "wanted", "MFU", "tokens/s"):
        assert not [line for line in lines if word in line], word
    titles = [line for line in lines if line.startswith(("B ", "lengths"))]
    assert len(titles) == 3  # a table each: two shapes, and the lengths
    assert all("the times measure nothing" in title for title in titles)
    for name in ("speed", "lengths", "training"):
        assert any(line.startswith(f"dry run  {name}: no measurement, a dry run: flash_triton ran") for line in lines)
    assert any(line.startswith("dry run  sanitizer: not run: no compute-sanitizer.") for line in lines)
    assert "NOT A MEASUREMENT" in lines[-1]


def test_a_dry_run_measures_what_a_gpu_run_does_only_smaller(dry):
    _, results, _ = dry
    steps = results["steps"]
    assert [row["dtype"] for row in steps["parity"]["summary"]] == ["float32", "float16", "bfloat16"]
    assert all(row["forward"] <= 1 and row["gradients"] <= 1 for row in steps["parity"]["summary"])
    for shape in (*steps["speed"]["shapes"], steps["lengths"]):
        rows = {row["implementation"]: row for row in shape["rows"]}
        assert set(rows) == {"flash_triton", "sdpa:flash", "sdpa:cudnn", "eager"}
        assert rows["sdpa:cudnn"]["not_measured"] == "torch's cudnn kernel runs on CUDA"
        assert shape["settings"]["dtype"] == "bfloat16"
        for name in ("forward", "forward_backward"):
            assert rows["flash_triton"]["speed"][name]["median"] > 0
            assert rows["sdpa:flash"]["speed"][name]["median"] == 1.0
    assert [row["implementation"] for row in steps["training"]["rows"]] == ["flash_triton", "sdpa"]
    assert all(row["rates"]["mfu"] > 0 for row in steps["training"]["rows"])
    assert "PASS  float32-d80-50x97" in "\n".join(steps["sanitizer"]["output"]["stdout"])


@without_gpu
def test_without_a_gpu_it_ends_with_code_2_and_one_line_that_says_what_to_do(script, tmp_path, capsys):
    assert script.main(["--out", str(tmp_path / "new")]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    assert said.err.startswith("error: this needs an NVIDIA GPU of compute capability 8.0 or later")
    assert "--dry-run" in said.err
    assert "attention-bench" in said.err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("out", [[], ["deeper"]])
def test_a_dry_run_is_not_written_among_the_results(script, out, capsys):
    with pytest.raises(SystemExit) as stopped:
        script.main(["--dry-run", "--out", str(ROOT.joinpath("benchmarks", "results", *out))])
    assert stopped.value.code == 2
    assert "writes nothing into benchmarks/results" in capsys.readouterr().err


@pytest.mark.parametrize("wrong", [["--only", "sped"], ["--repeats", "0"], ["--batch", "-1"], ["--name", "/"]])
def test_a_wrong_argument_is_code_2(script, wrong, capsys):
    with pytest.raises(SystemExit) as stopped:
        script.main(wrong)
    assert stopped.value.code == 2
    assert wrong[0] in capsys.readouterr().err


def test_the_plan_for_a_gpu_is_the_one_that_is_wanted(script):
    plan = script.plan_of(script.read_arguments([]))
    assert plan.shapes == ((8, 12, 4096, 64), (4, 16, 8192, 128))
    assert WANTED == {"forward": 0.8, "forward_backward": 0.7}
    assert {"flash_triton", "sdpa:flash", "sdpa:cudnn", "sdpa:efficient", "flex_attention", "eager"} == set(plan.names)
    assert (plan.device, plan.compile, plan.workload.model, plan.workload.tokens) == ("cuda", True, "gpt2", 1024)
    assert (min(plan.lengths), max(plan.lengths)) == (256, 16384)
    cases = plan.cases()
    assert len(cases) >= 38_016
    assert {case.device for case in cases} == {"cuda"}
    assert {case.dtype for case in cases} == {torch.float32, torch.bfloat16, torch.float16}
    assert len(script.plan_of(script.read_arguments(["--grid", "pairwise"])).cases()) < 500


# ------------------------------------------------------------------ what is wanted, on made-up times


def ours(forward: list[float], both: list[float]) -> Row:
    """A row whose times stand beside a baseline that always takes one second for each pass."""
    passes = zip(forward, both, strict=True)
    rounds = [
        {"seconds": {"sdpa:flash": {"forward": 1.0, "forward_backward": 1.0},
                     "flash_triton": {"forward": a, "forward_backward": b}}}
        for a, b in passes
    ]  # fmt: skip
    row = Row("flash_triton", 64, gradients=True)
    summarise(row, rounds, ["sdpa:flash", "flash_triton"], "sdpa:flash")
    return row


def test_80_percent_of_the_baselines_speed_is_enough_forward_and_70_with_the_backward_pass():
    exactly = verdicts(ours([1.25] * 3, [1 / 0.7] * 3))
    assert [(one["pass"], one["passed"]) for one in exactly] == [("forward", True), ("forward_backward", True)]
    assert [one["speed"] for one in exactly] == pytest.approx([0.8, 0.7])
    assert [one["passed"] for one in verdicts(ours([1.26] * 3, [1.43] * 3))] == [False, False]
    assert [one["passed"] for one in verdicts(ours([1.2] * 3, [1.3] * 3))] == [True, True]
    assert [one["passed"] for one in verdicts(ours([1.3] * 3, [1.3] * 3))] == [False, True]


def test_the_median_decides_and_one_slow_round_does_not():
    assert [one["passed"] for one in verdicts(ours([1.0, 1.1, 9.0], [9.0, 9.0, 1.0]))] == [True, False]


def test_what_was_not_measured_is_not_reached():
    for row in (
        Row("flash_triton", 64, not_measured="out of memory"),
        Row("flash_triton", 64, speed={"forward": None}),
    ):
        assert [(one["speed"], one["passed"]) for one in verdicts(row)] == [(None, False)] * 2


def test_the_tiles_that_autotune_took_are_told():
    flash_triton.tuned.cache_clear()
    assert gpu_kernels.tiles() == {}
    flash_triton.tuned("forward", 0, 0, 0).cache["a kind of call"] = "its tiles"
    try:
        told = gpu_kernels.tiles()
    finally:
        flash_triton.tuned.cache_clear()
    assert told == {"forward": {"a kind of call": "its tiles"}, "backward_dkdv": {}, "backward_dq": {}}


@pytest.mark.parametrize(("seconds", "passed"), [(1.2, True), (1.3, False)])
def test_one_shape_that_is_too_slow_fails_the_step(monkeypatch, seconds, passed):
    """The step itself, with made-up measurements: the second shape decides."""
    found = iter([ours([1.0] * 3, [1.0] * 3), ours([seconds] * 3, [1.0] * 3)])
    monkeypatch.setattr(gpu_kernels, "measured", lambda bench, what: ([next(found)], []))
    kept = []
    step = gpu_kernels.speed(Plan(), kept.append)
    assert step["passed"] is passed
    assert [shape["shape"] for shape in step["shapes"]] == [
        {"B": 8, "H": 12, "T": 4096, "D": 64}, {"B": 4, "H": 16, "T": 8192, "D": 128}
    ]  # fmt: skip
    assert f"{1 / seconds:.0%} (wanted 80%)" in step["figure"]
    assert [len(one["shapes"]) for one in kept] == [2, 2]  # one list, which grows
    assert all(one["unfinished"] and not one["passed"] for one in kept)  # nothing that was broken off has passed


# ------------------------------------------------------------------ what a crash leaves, and the tool


@pytest.mark.usefixtures("undisturbed")
def test_a_step_that_raises_is_a_finding_and_what_it_had_is_written(script, tmp_path, capsys):
    written = []

    def breaks(plan, keep):
        keep({"passed": False, "half": True})
        raise RuntimeError("an illegal memory access\nand more")

    found = script.run_step("broken", Plan(), written.append, str(tmp_path), steps={"broken": breaks})
    assert written == [{"passed": False, "half": True}, found]
    assert found == {"passed": False, "figure": "it raised RuntimeError: an illegal memory access"}
    assert "illegal memory access" in capsys.readouterr().err


@pytest.mark.usefixtures("undisturbed")
def test_each_step_has_a_folder_of_its_own_for_what_triton_keeps(script, tmp_path):
    folders = []
    look = {"look": lambda plan, keep: folders.append(os.environ["TRITON_CACHE_DIR"]) or {"passed": True}}
    for _ in range(2):
        script.run_step("look", Plan(), lambda found: None, str(tmp_path), steps=look)
    assert len(set(folders)) == 2
    assert all(Path(folder).is_dir() and Path(folder).parent == tmp_path for folder in folders)


def stand_in(folder: Path, code: int) -> Path:
    """A program called compute-sanitizer, which runs nothing and says what the real one says."""
    folder.mkdir(parents=True)
    program = folder / "compute-sanitizer"
    program.write_text(f'#!/bin/sh\necho "$@"\necho "========= ERROR SUMMARY: {code} errors"\nexit {code}\n')
    program.chmod(0o755)
    return program


def test_compute_sanitizer_is_found_on_path_or_in_the_toolkit(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    monkeypatch.delenv("CUDA_PATH", raising=False)
    in_toolkit = stand_in(tmp_path / "cuda" / "bin", 0)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    assert find_sanitizer() == str(in_toolkit)
    on_path = stand_in(tmp_path / "programs", 0)
    monkeypatch.setenv("PATH", str(on_path.parent))
    assert find_sanitizer() == str(on_path)


@pytest.mark.parametrize(("code", "passed"), [(0, True), (86, False)])
def test_an_error_that_compute_sanitizer_finds_fails_the_step(tmp_path, monkeypatch, code, passed):
    program = stand_in(tmp_path / "programs", code)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    found = sanitizer(Plan(), lambda found: None, script=SCRIPT)
    assert found["passed"] is passed
    assert found["figure"] == f"compute-sanitizer memcheck: exit code {code}, ERROR SUMMARY: {code} errors"
    asked = found["output"]["stdout"][0]
    assert asked.startswith("--tool memcheck ")
    assert asked.endswith(f"{sys.executable} {SCRIPT} --small-cases")


def test_where_there_is_no_compute_sanitizer_the_step_says_so_and_fails_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_kernels, "find_sanitizer", lambda: None)
    found = sanitizer(Plan(), lambda found: None)
    assert found["passed"] is None
    assert found["figure"].startswith("not run: there is no compute-sanitizer on PATH")


def test_the_small_cases_end_with_code_1_where_one_is_wrong(monkeypatch, capsys):
    monkeypatch.setattr(gpu_kernels, "measure", lambda name, case: ours_is_wrong)
    assert gpu_kernels.small_cases("cpu") == 1
    assert capsys.readouterr().out.startswith("FAIL")


ours_is_wrong = type("Wrong", (), {"passed": False})()


def test_the_spread_of_a_ratio_is_in_the_verdict():
    (forward, _) = verdicts(ours([1.0, 2.0, 4.0], [1.0, 1.0, 1.0]))
    assert forward["spread"] == spread([1.0, 0.5, 0.25])
