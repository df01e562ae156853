"""`compare-attention`: exit code 0 where the curves coincide, 1 where one does not, 2 for a wrong command; and what it
leaves."""

import json
from types import SimpleNamespace

import pytest

from CMHA.implementations import IMPLEMENTATIONS, eager
from orchestrator.cli import main

SHORT = ("--max_steps", "4", "--batch_size", "2", "--device", "cpu")


def compare(*arguments: str) -> int:
    return main(["compare-attention", *SHORT, *arguments])


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """One run in two dtypes: (exit code, report, the folder)."""
    folder = tmp_path_factory.mktemp("compare") / "run"
    code = compare("--attn_implementation", "sdpa", "--dtype", "fp64", "fp32", "--out", str(folder))
    return code, json.loads((folder / "report.json").read_text()), folder


def test_the_curves_coincide_and_the_report_has_every_loss(ran):
    code, report, folder = ran
    assert code == 0
    assert report["passed"]
    assert [section["dtype"] for section in report["sections"]] == ["fp64", "fp32"]
    for section in report["sections"]:
        lines = {line["implementation"]: line for line in section["curves"]}
        assert lines["sdpa"]["passed"] is True
        assert lines["eager"]["passed"] is None
        assert ("eager, rows reversed" in lines) == (section["dtype"] == "fp32")
        for line in lines.values():
            assert len(line["losses"]) == len(line["differences"]) == 4
            expected = [abs(a - b) for a, b in zip(line["losses"], lines["eager"]["losses"], strict=True)]
            assert line["differences"] == expected
    assert report["settings"]["max_steps"] == 4
    assert report["cfg"]["drop_rate"] == 0.0
    assert report["machine"]["threads"] >= 1
    assert sorted(path.name for path in folder.iterdir()) == ["curves.png", "report.json", "report.md"]
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_the_page_says_the_verdict_the_bound_and_links_its_figure(ran):
    _, _, folder = ran
    page = (folder / "report.md").read_text(encoding="utf-8")
    assert "**fp64: PASS** (bound: 1e-09 nats at every step)" in page
    assert "**fp32: PASS** (bound: 10 times what reversing the rows" in page
    assert "![curves](curves.png)" in page
    assert page.count("| sdpa ") == 2
    widths = {line.count("|") for line in page.splitlines() if line.startswith("|")}
    assert len(widths) == 1


def test_a_wrong_implementation_is_seen_and_named(monkeypatch, tmp_path, capsys):
    def wrong(queries, keys, values, mask, *, scale, dropout=0.0):
        return eager.attention(queries, keys, values, mask, scale=1.05 * scale, dropout=dropout)

    planted = SimpleNamespace(SUMMARY="wrong", ALIASES=(), check=lambda request: [], attention=wrong)
    monkeypatch.setitem(IMPLEMENTATIONS, "wrong_scale", planted)
    code = compare("--attn_implementation", "wrong_scale,sdpa", "--dtype", "fp32", "--out", str(tmp_path))
    assert code == 1
    assert "fp32: FAIL: wrong_scale" in capsys.readouterr().out
    report = json.loads((tmp_path / "report.json").read_text())
    lines = {line["implementation"]: line for line in report["sections"][0]["curves"]}
    assert (lines["wrong_scale"]["passed"], lines["sdpa"]["passed"]) == (False, True)
    assert lines["wrong_scale"]["of_bound"] > 10
    assert not report["passed"]


def test_one_that_cannot_train_here_is_listed_and_alone_it_proves_nothing(tmp_path, capsys):
    code = compare("--attn_implementation", "flash_attention_2", "--dtype", "fp32", "--out", str(tmp_path))
    printed = capsys.readouterr().out
    assert code == 1
    assert "FAIL: nothing to compare with eager" in printed
    assert "- not compared: flash_attention_2 (it runs on CUDA" in printed


def test_everything_that_is_wrong_is_said_at_once(tmp_path, capsys):
    code = compare(
        "--max_steps", "3", "--dtype", "fp8", "--learning_rate", "-1", "--model", "nanoo", "--attn_implementation",
        "sdpaa", "--seed", "x", "--device", "quantum",
    )  # fmt: skip
    said = capsys.readouterr().err
    assert code == 2
    assert "7 things are wrong" in said
    for words in ("--max_steps must be a whole number, 4 or more", "got 'fp8'", "--learning_rate", "'nanoo'", "'sdpaa'",
                  "--seed", "'quantum'"):  # fmt: skip
        assert words in said


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--attn_implementation", "eager"), "nothing to compare with eager"),
        (("--max_length", "20"), "tales are read whole"),
        (("--dtype", ","), "--dtype names none of"),
        (("--dataset", "no-such-file.txt"), "no-such-file.txt"),
    ],
)
def test_a_wrong_command_ends_in_one_line(arguments, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert compare(*arguments) == 2
    said = capsys.readouterr().err
    assert words in said
    assert "Traceback" not in said
    assert not (tmp_path / "runs").exists()  # nothing is made for a command that is wrong


def test_what_would_not_fit_is_said_before_the_work(monkeypatch, capsys, tmp_path):
    from orchestrator.evaluation import compare_attention

    monkeypatch.setattr(compare_attention, "free_memory", lambda device: 2**20)
    assert compare("--out", str(tmp_path / "out")) == 2
    assert "models with their optimizers" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
