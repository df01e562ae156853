"""The main job as a user starts it: as a file, as a folder, as a module, from any folder, right and wrong."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

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
        (["--device", "meta"], "cannot be used here"),
        (["--seed", "99999999999999999999999"], "--seed must be"),
        (["--dataset", "shakespeare"], "no such file, folder or dataset"),
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
    assert not (tmp_path / "run").exists()  # seen before the work
    (tmp_path / "middling.txt").write_text("enough for the smoke tests. " * 60)
    assert main([*SMALL, "--train", "--text", str(tmp_path / "middling.txt"), "--out", str(tmp_path / "run")]) == 2
    captured = capsys.readouterr()
    assert "too short" in captured.err
    assert "PASS" not in captured.out


def test_a_failed_step_makes_the_exit_code_1(tmp_path, monkeypatch, capsys):
    from CMHA.implementations import sdpa

    real = sdpa.attention

    def slightly_wrong(queries, keys, values, mask, *, scale, dropout=0.0):
        return real(queries, keys, values, mask, scale=scale * 1.01, dropout=dropout)

    monkeypatch.setattr(sdpa, "attention", slightly_wrong)
    from CMHA.choosing.choose import chosen_once

    chosen_once.cache_clear()
    try:
        assert main([*SMALL, "--out", str(tmp_path)]) == 1
    finally:
        chosen_once.cache_clear()
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


def test_the_seed_and_the_dataset_reach_what_is_built(monkeypatch, tmp_path):
    import orchestrator.cli as cli

    asked = {}
    monkeypatch.setattr(cli, "run_smoke_tests", lambda cfg, **given: asked.update(smoke=given, cfg=cfg))
    monkeypatch.setattr(cli, "train_first_model", lambda run, **given: asked.update(train=given))
    arguments = ["--train", "--dataset", "python-docs", "--seed", "7", "--device", "cpu", "--preset", "tiny"]
    arguments += ["--attn_implementation", "flash_tiled", "--attn_strict", "--disable_mps_fix"]
    main([*arguments, "--out", str(tmp_path)])
    assert (asked["smoke"]["seed"], asked["smoke"]["text"], asked["smoke"]["device"]) == (7, "python-docs", "cpu")
    assert (asked["cfg"]["emb_dim"], asked["cfg"]["attn_implementation"], asked["cfg"]["attn_strict"]) == (
        192, "flash_tiled", True,
    )  # fmt: skip
    assert (asked["train"]["seed"], asked["train"]["corpus_name"], asked["train"]["preset"]) == (
        7,
        "python-docs",
        "tiny",
    )
    assert asked["train"]["attention"] == {
        "attn_implementation": "flash_tiled", "attn_strict": True, "disable_mps_fix": True,
    }  # fmt: skip


def small_run(monkeypatch):
    """The steps of a smoke run on a tiny cfg, by name."""
    from orchestrator.orchestration import run_smoke_tests

    cfg = {"vocab_size": 50257, "context_length": 32, "emb_dim": 16, "n_heads": 2, "n_layers": 1}
    return {step["name"]: step["passed"] for step in run_smoke_tests(cfg).steps}


def test_every_step_of_the_smoke_tests_can_fail(monkeypatch):
    from CMHA.kv_cache import LayerCache
    from GPT2Model.gpt2 import GPTModel
    from orchestrator import orchestration

    assert all(small_run(monkeypatch).values())

    with monkeypatch.context() as broken:
        broken.setattr(orchestration, "count_parameters", lambda cfg: 1)
        assert not small_run(monkeypatch)["parameters"]

    with monkeypatch.context() as broken:
        real = GPTModel.initialise
        broken.setattr(GPTModel, "initialise", lambda self: (real(self), self.token_embedding.weight.data.mul_(300)))
        assert not small_run(monkeypatch)["an untrained model knows nothing"]

    with monkeypatch.context() as broken:
        append = LayerCache.append

        def forgetful(self, keys, values):  # the first token's values are lost
            keys, values = append(self, keys, values)
            return keys, torch.cat([values[:, :, :1] * 50, values[:, :, 1:]], dim=2)

        broken.setattr(LayerCache, "append", forgetful)
        real = GPTModel.initialise
        broken.setattr(
            GPTModel, "initialise", lambda self: (real(self), [p.data.mul_(8) for p in self.blocks.parameters()])
        )
        assert not small_run(monkeypatch)["cached generation equals uncached"]

    with monkeypatch.context() as broken:
        real_differences = orchestration.largest_differences
        for wrong in ({"gradients": 1e-3}, {"logits": 1e-3}, {"gradients": float("nan")}):
            broken.setattr(orchestration, "largest_differences", lambda a, b, w=wrong: real_differences(a, b) | w)
            assert not small_run(monkeypatch)["the whole model, flash_tiled and eager"]


def test_a_nan_in_any_gradient_is_the_largest_difference():
    from orchestrator.evaluation.agreement import Outcome, largest_differences

    one = Outcome(torch.zeros(1, 1, 2), 0.0, {"a": torch.ones(2), "b": torch.ones(2)}, 0.0)
    other = Outcome(torch.zeros(1, 1, 2), 0.0, {"a": torch.ones(2), "b": torch.tensor([1.0, float("nan")])}, 0.0)
    for pair in ((one, other), (other, one)):
        assert math.isnan(largest_differences(*pair)["gradients"])


# --- the flag that was replaced ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "asked"),
    [
        ([], "auto"),
        (["--attn_implementation", "flex"], "flex"),
        (["--use_flash_attention"], "flash_attention_2"),
        (["--use_flash_attention", "--attn_implementation", "fa2"], "flash_attention_2"),
    ],
)
def test_the_old_flag_means_flash_attention_2_and_warns(arguments, asked, monkeypatch, tmp_path, capsys):
    import orchestrator.cli as cli

    seen = {}
    monkeypatch.setattr(cli, "run_smoke_tests", lambda cfg, **given: seen.update(cfg))
    main([*SMALL, *arguments, "--out", str(tmp_path)])
    assert seen["attn_implementation"] == asked
    said = capsys.readouterr().err
    assert ("--use_flash_attention is deprecated" in said) == ("--use_flash_attention" in arguments)
    if "--use_flash_attention" in arguments:
        assert "--attn_implementation flash_attention_2" in said


def test_the_old_flag_beside_another_name_is_refused(tmp_path, capsys):
    arguments = ["--use_flash_attention", "--attn_implementation", "sdpa", "--out", str(tmp_path / "run")]
    assert main([*SMALL, *arguments]) == 2
    assert "leave out the first" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_old_flag_is_not_offered_any_more_and_every_command_is(capsys):
    from orchestrator.commands import COMMANDS

    with pytest.raises(SystemExit) as left:
        main(["--help"])
    assert left.value.code == 0
    printed = capsys.readouterr().out
    assert "--use_flash_attention" not in printed
    for name, command in COMMANDS.items():
        assert name in printed
        with pytest.raises(SystemExit) as left:
            main([name, "--help"])
        assert left.value.code == 0
        assert "Exit codes" in capsys.readouterr().out
        assert command.HELP[:20] in printed


def test_options_of_the_main_job_before_a_command_are_not_swallowed(capsys):
    with pytest.raises(SystemExit) as left:
        main(["parity", "--train"])
    assert left.value.code == 2
    assert "--train" in capsys.readouterr().err


def test_one_that_would_fall_back_is_not_compared_under_its_own_name(capsys):
    from orchestrator.evaluation.machine import trainable_here
    from orchestrator.orchestration import build_model, run_smoke_tests

    cfg = {"vocab_size": 50257, "context_length": 32, "emb_dim": 16, "n_heads": 2, "n_layers": 1}
    assert trainable_here(build_model(cfg)) == ["eager", "sdpa", "flash_tiled"]  # on a CPU
    run_smoke_tests(cfg)
    printed = capsys.readouterr()
    assert "flash_attention_2 and eager" not in printed.out
    assert "flex_attention and eager" not in printed.out
    assert "WARNING" not in printed.err
