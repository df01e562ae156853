"""The main job as a user starts it: as a file, as a folder, as a module, from any folder, right and wrong."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.cli import main

ROOT = Path(__file__).resolve().parent.parent.parent
SMALL = ["--preset", "nano", "--device", "cpu"]


def start(*command, cwd):
    return subprocess.run([sys.executable, *command], cwd=cwd, capture_output=True, text=True, timeout=300)


def test_the_file_runs_from_another_folder_and_leaves_a_report(tmp_path):
    done = start(ROOT / "orchestrator" / "orchestration.py", *SMALL, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "FAIL" not in done.stdout
    assert done.stdout.count("PASS ") >= 9
    assert "INFO: Attention backend: sdpa" in done.stderr
    (report,) = tmp_path.glob("runs/*/report.json")
    steps = {step["name"]: step for step in json.loads(report.read_text())["steps"]}
    assert "cached generation equals uncached" in steps
    assert (report.parent / "attention.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("command", [[ROOT / "orchestrator"], ["-m", "orchestrator"]])
def test_folder_and_module_are_the_same_command(command, tmp_path):
    done = start(*command, "--help", cwd=ROOT if command[0] == "-m" else tmp_path)
    assert done.returncode == 0, done.stderr
    for word in (
        "--dataset",
        "--text",
        "--preset",
        "--device",
        "--seed",
        "--attn_implementation",
        "--train",
        "Exit codes",
    ):
        assert word in done.stdout
    assert "attn_strict" in done.stdout  # the table of cfg keys


def test_training_on_a_file_of_ones_own_shows_before_and_after(tmp_path, capsys):
    text = tmp_path / "mine.txt"
    text.write_text("The cat sat on the mat, and the dog lay on the rug. " * 300)
    code = main([*SMALL, "--train", "--text", str(text), "--max_steps", "12", "--out", str(tmp_path / "run")])
    printed = capsys.readouterr().out
    assert code in (0, 1)  # twelve steps may be too few to beat word frequencies: the report says
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    learned = next(step for step in report["steps"] if step["name"] == "the model learned something of order")
    assert learned["validation"][-1][1] < learned["validation"][0][1] - 2
    assert learned["passed"] == (learned["loss"] < learned["unigram"])
    assert code == (0 if report["passed"] else 1)
    assert "before: " in printed
    assert "after:  " in printed
    for name in ("model/model.safetensors", "model/config.json", "loss.png"):
        assert (tmp_path / "run" / name).stat().st_size > 100


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "nanoo"], "Did you mean 'nano'"),
        (["--attn_implementation", "sdpaa"], "Did you mean 'sdpa'"),
        (["--text", "no-such-file.txt"], "no such file"),
        (["--device", "cuda:77"], "cannot be used here"),
        (["--device", "banana"], "cannot be used here"),
        (["--max_steps", "0"], "1 or more"),
        (["--out", "/dev/null/run"], "cannot write to"),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_code_2(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([*SMALL, *arguments]) == 2
    captured = capsys.readouterr()
    (line,) = [line for line in captured.err.splitlines() if line.startswith("error:")]
    assert message in captured.err
    assert line
    assert "Traceback" not in captured.err
    assert "PASSED" not in captured.out


def test_a_short_text_says_how_much_is_needed(tmp_path, capsys):
    (tmp_path / "short.txt").write_text("Hello there.")
    assert main([*SMALL, "--text", str(tmp_path / "short.txt"), "--out", str(tmp_path / "run")]) == 2
    assert "too short for one batch" in capsys.readouterr().err
    assert json.loads((tmp_path / "run" / "report.json").read_text())["passed"] is False


def test_a_failed_step_makes_the_exit_code_1(tmp_path, monkeypatch, capsys):
    from CMHA.implementations import sdpa

    real = sdpa.attention

    def slightly_wrong(queries, keys, values, mask, *, scale, dropout=0.0):
        return real(queries, keys, values, mask, scale=scale * 1.01, dropout=dropout)

    monkeypatch.setattr(sdpa, "attention", slightly_wrong)
    from CMHA.choosing import choose

    choose.cache_clear()
    try:
        assert main([*SMALL, "--out", str(tmp_path)]) == 1
    finally:
        choose.cache_clear()
    printed = capsys.readouterr().out
    assert "FAIL  attention by sdpa" in printed
    assert "FAIL  the whole model, use_flash=True (sdpa) and False" in printed
    assert "steps FAILED" in printed


def test_where_both_sides_are_eager_it_says_not_compared(tmp_path, capsys):
    assert main([*SMALL, "--attn_implementation", "eager", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "NOT COMPARED" in printed
    assert "PASS  the whole model, flash_tiled and eager" in printed
    assert "use_flash=True (" not in printed


def test_the_seed_makes_the_weights_and_the_preset_the_size():
    import torch

    from GPT2Model.config import from_preset
    from orchestrator.orchestration import build_model, cfg

    nano = from_preset("nano", vocab_size=61)
    one, same, other = (build_model(nano, seed=seed).state_dict() for seed in (5, 5, 6))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["token_embedding.weight"], other["token_embedding.weight"])
    flipped = build_model({**nano, "use_flash": False}, seed=5).state_dict()
    assert list(flipped) == list(one)
    assert all(torch.equal(one[name], flipped[name]) for name in one)
    assert cfg["use_flash"] is True
