"""main.py: one door to the main job, the commands and the experiments, from any folder."""

import subprocess
import sys
from pathlib import Path

import main

ROOT = Path(__file__).resolve().parent.parent


def run(*arguments: str, folder: Path) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, ROOT / "main.py", *arguments], cwd=folder, capture_output=True, text=True)


def test_help_from_another_folder_shows_the_experiments_and_the_commands(tmp_path):
    found = run("--help", folder=tmp_path)
    assert found.returncode == 0
    assert found.stderr == ""
    for words in ("--experiment quick", "--experiment full", "attention-bench", "experiment", "compare-attention",
                  "vocab_size"):  # fmt: skip
        assert words in found.stdout


def test_a_wrong_experiment_is_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main.main(["--experiment", "enormous"]) == 2
    assert capsys.readouterr().err.splitlines() == ["error: an experiment is quick or full, got 'enormous'."]
    assert list(tmp_path.iterdir()) == []


def test_an_experiment_that_does_not_say_how_much_is_told_how(capsys):
    assert main.main(["--experiment"]) == 2
    assert "--experiment quick, or --experiment full" in capsys.readouterr().err


def test_everything_else_is_what_the_orchestrator_does(capsys):
    assert main.main(["--max_steps", "0"]) == 2
    assert "--max_steps must be 1 or more" in capsys.readouterr().err
