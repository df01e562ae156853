"""`python train.py` as a user runs it: in a process of its own, in a folder of the user's."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SIZES = {"n_layers": 1, "n_heads": 2, "emb_dim": 16, "max_length": 16}
OPTIONS = SIZES | {"batch_size": 4, "max_steps": 4, "eval_steps": 2, "device": "cpu"}
SMALL = [word for name, value in OPTIONS.items() for word in (f"--{name}", str(value))]


def start(*command, cwd, **environment) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *map(str, command)], cwd=cwd, capture_output=True, text=True, timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )  # fmt: skip


def test_a_text_becomes_a_folder_with_a_model(tmp_path):
    (tmp_path / "book.txt").write_text("The quick brown fox jumps over the lazy dog. " * 60)
    done = start(
        ROOT / "train.py", *SMALL, "--dataset", "book.txt", "--tokenizer", "char", "--eval_on_start",
        "--attn_implementation", "auto", "--sample_steps", "2", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    (run,) = (tmp_path / "runs").iterdir()  # no --out: runs/train-DATE_TIME
    assert run.name.startswith("train-2")
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [event["step"] for event in events if event["event"] == "evaluation"] == [0, 2, 4]
    assert [event["step"] for event in events if event["event"] == "step"] == [1, 2, 3, 4]
    assert (run / "final" / "model.safetensors").is_file()
    assert "INFO: Attention backend: " in done.stderr
    for word in ("data: book.txt", "model: nano", "4 steps of 4 x 16 = 64 tokens", "folder: runs", "validation loss"):
        assert word in done.stdout
    assert {path.name for path in tmp_path.iterdir()} == {"book.txt", "runs", "data"}  # and nothing elsewhere

    again = start(ROOT / "train.py", "--resume", run, "--max_steps", "6", cwd=tmp_path)  # a run is made longer
    assert again.returncode == 0, again.stdout + again.stderr
    assert "resumed from" in again.stdout
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [event["step"] for event in events if event["event"] == "step"] == [1, 2, 3, 4, 5, 6]


def test_help_is_there_in_a_moment_and_without_a_word_of_warning(tmp_path):
    done = start(ROOT / "train.py", "--help", cwd=tmp_path)
    assert done.returncode == 0
    assert done.stderr == ""
    assert "--attn_implementation" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_without_a_network_a_data_set_of_the_hub_is_answered_with_what_to_do(tmp_path):
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub")}
    done = start(ROOT / "train.py", *SMALL, "--dataset", "tinystories", "--out", "run", cwd=tmp_path, **offline)
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.count("error: ") == 1
    assert "Traceback" not in done.stderr
    assert "tinystories" in done.stderr
    assert "--dataset FILE" in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_wrong_text_is_answered_in_a_line(tmp_path):
    (tmp_path / "empty.txt").write_text("")
    done = start(ROOT / "train.py", *SMALL, "--dataset", "empty.txt", "--out", "run", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1
    assert done.stdout == ""
    assert not (tmp_path / "run").exists()
