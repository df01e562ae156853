"""A run's steps, its report and its folder."""

import json

import pytest

from orchestrator.report import Run


def test_a_run_passes_only_if_every_step_did(capsys):
    run = Run()
    assert not run.passed  # nothing was shown
    run.step("one", True, "1 of 1")
    assert run.passed
    run.step("two", False, "0 of 1")
    run.step("three", True, "1 of 1")
    assert not run.passed
    run.close()
    printed = capsys.readouterr().out
    assert "PASS  one: 1 of 1" in printed
    assert "FAIL  two: 0 of 1" in printed
    assert "1 of 3 steps FAILED: two" in printed


def test_the_report_holds_what_was_measured_as_valid_json(tmp_path):
    run = Run(tmp_path / "deep" / "run")
    run.step("a step", True, "fine", error=float("nan"), pairs=[(1, 2.5)])
    run.close(device="cpu")
    text = (tmp_path / "deep" / "run" / "report.json").read_text()
    report = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert report["passed"] is True
    assert report["device"] == "cpu"
    assert report["steps"][0]["error"] == "nan"
    assert report["steps"][0]["pairs"] == [[1, 2.5]]
    assert [path.name for path in (tmp_path / "deep" / "run").iterdir()] == ["report.json"]


def test_a_run_that_was_ended_early_never_reads_as_passed(tmp_path, capsys):
    run = Run(tmp_path)
    run.step("the only step so far", True, "fine")
    run.close(ValueError("the text is empty"))
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["passed"] is False
    assert report["error"] == "ValueError: the text is empty"
    assert "PASSED" not in capsys.readouterr().out


def test_a_folder_that_cannot_be_written_is_known_before_the_work(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match=r"cannot write to .*--out DIR"):
        Run(tmp_path / "file" / "run")
