"""`python -m orchestrator parity` as a user runs it: the table, the files, the exit code."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from CMHA.implementations import IMPLEMENTATIONS, sdpa
from orchestrator.cli import main
from orchestrator.commands import parity
from orchestrator.evaluation.cases import Case
from orchestrator.evaluation.parity import measure
from tests.triton_interpreter import DEVICE

ROOT = Path(__file__).resolve().parent.parent.parent.parent
FEW = [Case(head_dim=8, query_len=5, key_len=key_len, causal=causal) for key_len in (5, 9) for causal in (True, False)]

RIGHT = """
import torch
def attention(queries, keys, values, mask, *, scale, dropout=0.0):
    scores = (queries @ keys.mT * scale).masked_fill(~mask.dense(), -1e4)
    return scores.softmax(-1) @ values, None
"""


@pytest.fixture
def few_cases(monkeypatch):
    """Four small cases instead of the grid; nothing that needs a compiler."""
    monkeypatch.setattr(parity, "cases_to_grade", lambda **given: list(FEW))
    monkeypatch.delitem(IMPLEMENTATIONS, "flex_attention", raising=False)


def test_what_this_machine_can_run_passes_and_leaves_table_figure_and_json(few_cases, tmp_path, capsys):
    assert main(["parity", "--device", "cpu", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    rows = {line.split()[0]: line for line in printed.splitlines() if " float32 " in line}
    assert list(rows) == ["eager", "sdpa", "flash_tiled"]
    assert all(line.rstrip().endswith("PASS") for line in rows.values())
    assert "PASS: 0 of 12 measurements failed" in printed
    report = json.loads((tmp_path / "parity.json").read_text())
    assert report["passed"] is True
    assert [row["implementation"] for row in report["summary"]] == ["eager", "sdpa", "flash_tiled"]
    assert report["machine"]["versions"]["torch"]
    assert report["command"].startswith("python -m orchestrator")
    lines = [json.loads(line) for line in (tmp_path / "measurements.jsonl").read_text().splitlines()]
    assert len(lines) == 12
    assert max(line["ratio"]["context"] for line in lines if line["implementation"] == "sdpa") == pytest.approx(
        report["summary"][1]["forward"]
    )
    assert (tmp_path / "parity.png").read_bytes().startswith(b"\x89PNG")


def test_a_wrong_one_fails_with_exit_code_1_and_a_word_on_where_to_look(few_cases, monkeypatch, tmp_path, capsys):
    real = sdpa.attention

    def wrong(queries, keys, values, mask, *, scale, dropout=0.0):
        return real(queries, keys, values, mask, scale=scale * (1.01 if mask.causal else 1.0), dropout=dropout)

    monkeypatch.setattr(sdpa, "attention", wrong)
    assert main(["parity", "--device", "cpu", "--implementations", "eager,flash_attn_1", "--out", str(tmp_path)]) == 1
    printed = capsys.readouterr().out
    assert "FAIL (2)" in printed
    assert "sdpa: 2 of 4 cases failed" in printed
    assert "all of them, and not all cases, have: a causal mask" in printed
    assert "FAIL: 2 of 8 measurements failed" in printed
    report = json.loads((tmp_path / "parity.json").read_text())
    assert report["passed"] is False
    assert [failure["implementation"] for failure in report["failures"]] == ["sdpa", "sdpa"]


@pytest.mark.parametrize(
    ("text", "code", "said"),
    [
        (RIGHT, 0, "PASS: 0 of 4"),
        (RIGHT.replace("* scale", "* 1.0"), 1, "FAIL: 4 of 4"),
        (RIGHT.replace("return scores", "return scores.no_such_thing"), 1, "raised AttributeError"),
    ],
)
def test_a_file_of_ones_own_is_graded(few_cases, text, code, said, tmp_path, capsys):
    (tmp_path / "my_own.py").write_text(text)
    arguments = ["--device", "cpu", "--implementation", str(tmp_path / "my_own.py"), "--out", str(tmp_path)]
    assert main(["parity", *arguments]) == code
    printed = capsys.readouterr().out
    assert said in printed
    assert "my_own" in printed
    assert "sdpa" not in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--implementation", "gone.py"], "expects a Python file, got 'gone.py'"),
        (["--implementations", "sdap"], "Did you mean 'sdpa'"),
        (["--implementations", ""], "unknown attn_implementation ''"),
        (["--implementations", "paged"], "nothing to measure for paged_attention"),
        (["--implementations", "auto"], "nothing to measure for auto"),
        (["--device", "cuda:77"], "cannot be used here"),
        (["--part", "3/2"], "--part must be K/N"),
        (["--part", "half"], "--part must be K/N"),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_code_2(arguments, message, few_cases, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["parity", *arguments]) == 2
    captured = capsys.readouterr()
    (line,) = [line for line in captured.err.splitlines() if line.startswith("error:")]
    assert message in line
    assert not (tmp_path / "runs").exists()  # nothing is made before the input is looked at


def test_an_implementation_that_no_case_suits_is_not_measured_and_says_why(few_cases, tmp_path, capsys):
    names = "eager,flash_attention_2"
    assert main(["parity", "--device", "cpu", "--implementations", names, "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "not measured: flash_attention_2 (" in printed
    assert list(json.loads((tmp_path / "parity.json").read_text())["not_measured"]) == ["flash_attention_2"]


@pytest.mark.skipif(DEVICE != "cpu", reason="about the interpreter, which a machine with a GPU does not use")
def test_our_gpu_kernels_in_the_interpreter_are_tried_in_short_cases_and_only_when_named(kernels, tmp_path, capsys):
    arguments = ["parity", "--device", "cpu", "--dtype", "float32", "--out", str(tmp_path)]
    assert main([*arguments, "--implementations", "triton,sdpa", "--part", "2/20"]) == 0
    report = json.loads((tmp_path / "parity.json").read_text())
    assert {row["implementation"] for row in report["summary"]} == {"sdpa", "flash_triton"}
    lines = [json.loads(line) for line in (tmp_path / "measurements.jsonl").read_text().splitlines()]
    assert max(max(line["case"]["query_len"], line["case"]["key_len"]) for line in lines) <= 130
    said = capsys.readouterr().out
    assert "PASS: 0 of " in said
    assert "minutes" not in said  # ten cases


def test_unnamed_and_in_the_interpreter_they_are_left_out_and_it_says_how_to_try_them(
    few_cases, kernels, tmp_path, capsys
):
    assert main(["parity", "--device", "cpu", "--out", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "parity.json").read_text())
    assert "flash_triton" not in {row["implementation"] for row in report["summary"]}
    assert "--implementations flash_triton" in report["not_measured"]["flash_triton"][0]
    assert "not measured: flash_triton (" in capsys.readouterr().out


def test_if_nothing_can_be_measured_it_says_why_and_exits_with_2(few_cases, tmp_path, capsys):
    arguments = ["parity", "--device", "cpu", "--implementations", "flash_attention_2", "--out", str(tmp_path / "out")]
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert "nothing can be measured on cpu" in said
    assert "it runs on CUDA" in said
    assert "What to do: run flash_attention_2 on a machine with an NVIDIA GPU." in said
    (tmp_path / "never.py").write_text(
        "from CMHA.request import Reason\n"
        "def check(request):\n    return [Reason('moon', 'the moon is not full', 'wait')]\n" + RIGHT
    )
    assert main(["parity", "--device", "cpu", "--implementation", str(tmp_path / "never.py")]) == 2
    said = capsys.readouterr().err
    assert "never: the moon is not full" in said
    assert "What to do: never: wait." in said
    assert not (tmp_path / "out").exists()


def test_our_gpu_kernels_without_the_interpreter_are_refused_with_the_line_that_starts_it(
    few_cases, monkeypatch, capsys
):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert main(["parity", "--device", "cpu", "--implementations", "flash_triton"]) == 2
    line = "TRITON_INTERPRET=1 python -m orchestrator parity --implementations flash_triton"
    assert line in capsys.readouterr().err


def test_a_long_wait_for_the_interpreter_is_said_beforehand():
    assert parity.interpreted_for(40) == ""
    said = parity.interpreted_for(240)
    assert "about 6 minutes" in said
    assert "--part 1/6" in said


@pytest.mark.parametrize("command", ["parity", "attention-bench"])
def test_a_folder_that_cannot_be_written_is_told_before_the_work(command, few_cases, capsys):
    assert main([command, "--device", "cpu", "--out", "/dev/null/here"]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert "Choose another: --out DIR" in captured.err
    assert "PASS" not in captured.out


def test_the_parts_share_the_cases_out_in_blocks_that_share_their_numbers(few_cases):
    cases = list(range(21))
    parts = [parity.part_of(cases, f"{k}/3") for k in (1, 2, 3)]
    assert sorted([*parts[0], *parts[1], *parts[2]]) == cases
    assert parts[0] == [0, 1, 2, 3, 12, 13, 14, 15]


def test_the_real_grid_through_the_real_command_for_one_implementation(tmp_path):
    """As a process of its own, from another folder, on a file of the user's."""
    (tmp_path / "mine.py").write_text(
        "from CMHA.implementations.eager import attention as real\n"
        "def attention(q, k, v, mask, *, scale, dropout=0.0):\n    return real(q, k, v, mask, scale=scale)\n"
    )
    command = [ROOT / "orchestrator", "parity", "--implementation", "mine.py", "--dtype", "bfloat16", "--out", "here"]
    done = subprocess.run([sys.executable, *command], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "PASS: 0 of " in done.stdout
    assert (tmp_path / "here" / "parity.png").exists()


def test_a_known_miss_is_told_with_its_reason_and_fails_nothing(monkeypatch, tmp_path, capsys):
    """Torch's op in fp32 with one key: the exact gradient is 0, and some seeds miss the bound."""
    known_case = Case(head_dim=128, query_len=1, key_len=1, num_kv_heads=1, padding="left")
    seeds = [replace(known_case, seed=seed) for seed in range(60)]
    misses = [case for case in seeds if not measure("sdpa", case).passed]
    assert misses
    monkeypatch.setattr(parity, "cases_to_grade", lambda **given: misses)
    assert main(["parity", "--device", "cpu", "--implementations", "sdpa,flash_tiled", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert f"sdpa: {len(misses)} known misses" in printed
    assert "adds in another order" in printed
    assert f"PASS ({len(misses)} known)" in printed
    assert "flash_tiled: " not in printed
