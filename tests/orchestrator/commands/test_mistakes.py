"""`mistakes`: what it prints is what it computed, its files are whole, and the page's table is made from them."""

import contextlib
import io
import json
import re
from pathlib import Path

import pytest

from orchestrator.cli import main
from orchestrator.commands import COMMANDS, mistakes
from orchestrator.learning.planted import MISTAKES, planted
from orchestrator.learning.symptoms import CHECKS, LOSS_AND_TEXT

ROOT = Path(__file__).resolve().parents[3]
RESULTS = ROOT / "benchmarks" / "results" / "cpu-mistakes.json"


@pytest.fixture(autouse=True, scope="module")
def command():
    """The command, whether or not the list of commands has it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(COMMANDS, "mistakes", mistakes)
        yield


@pytest.fixture(scope="module")
def small(command, tmp_path_factory):
    """One real run: (exit code, results, what was printed, the folder)."""
    folder, printed = tmp_path_factory.mktemp("mistakes") / "run", io.StringIO()
    names = ["mask_shifted", "exact_gelu", "dropout_left_on"]
    with contextlib.redirect_stdout(printed):
        code = main(["mistakes", *names, "--steps", "10", "--jobs", "1", "--out", str(folder)])
    return code, json.loads((folder / "results.json").read_text()), printed.getvalue(), folder


def test_a_run_leaves_results_table_and_figure(small):
    code, results, _, folder = small
    assert code == 0
    assert sorted(path.name for path in folder.iterdir()) == ["mistakes.png", "results.json", "table.md"]
    assert (folder / "mistakes.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "table.md").read_text() == mistakes.markdown_table(results) + "\n"
    assert [row["name"] for row in results["rows"]] == ["mask_shifted", "exact_gelu", "dropout_left_on"]
    assert results["settings"]["steps"] == 10
    assert results["machine"]["versions"]["torch"]
    assert results["command"].startswith("python -m orchestrator")
    assert not any(finding["seen"] for finding in results["control"]["findings"].values())


def test_what_is_printed_is_what_is_in_the_results(small):
    _, results, printed, _ = small
    for row in results["rows"]:
        (line,) = [line for line in printed.splitlines() if re.match(rf"{row['name']} +\d", line)]
        cells = line.split()[1:]
        assert len(cells) == len(CHECKS)
        for check, cell in zip(CHECKS, cells, strict=True):
            finding = row["findings"][check]
            assert cell.endswith("*") == finding["seen"], (row["name"], check)
            assert cell.rstrip("*") == mistakes.cell(check, finding)
        assert f"{row['name']}: {row['verdict']}" in printed
    assert "PASS: the right model is silent in everything" in printed
    for seeds in ("start", "gap", "text"):
        assert len(results["right"][seeds]) == 4


def test_the_rows_say_what_they_must(small):
    rows = {row["name"]: row["findings"] for row in small[1]["rows"]}
    assert rows["mask_shifted"]["causality"]["seen"]
    assert rows["exact_gelu"]["reference"]["seen"]
    assert not any(rows["exact_gelu"][check]["seen"] for check in (*LOSS_AND_TEXT, "causality", "cache", "repeat"))
    assert rows["dropout_left_on"]["repeat"]["seen"]
    assert rows["dropout_left_on"]["trained_loss"]["value"] is None


def test_json_alone_on_stdout(tmp_path, capsys):
    arguments = ["exact_gelu", "--steps", "2", "--jobs", "1", "--json", "--out", str(tmp_path)]
    assert main(["mistakes", *arguments]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads((tmp_path / "results.json").read_text())


def test_a_check_that_sees_something_in_the_right_model_is_exit_code_1(tmp_path, capsys):
    with planted("unbiased_variance"):  # the right model is not right
        assert main(["mistakes", "mask_shifted", "--steps", "2", "--jobs", "1", "--out", str(tmp_path)]) == 1
    assert "FAIL: the right model is silent in loss and text; seen by against float64" in capsys.readouterr().out


def test_the_list_has_each_with_its_lines_and_trains_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["mistakes", "--list"]) == 0
    said = capsys.readouterr().out
    for name, mistake in MISTAKES.items():
        for text in (name, mistake.what, mistake.wrong, mistake.right, mistake.why):
            assert text in said
    assert main(["mistakes", "--list", "--json", "exact_gelu"]) == 0
    (only,) = json.loads(capsys.readouterr().out)
    assert only["name"] == "exact_gelu"
    assert only["wrong"] == "nn.GELU()"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["exact_gelou"], "unknown mistake 'exact_gelou'. Did you mean 'exact_gelu'"),
        (["--steps", "0"], "--steps must be a whole number, 1 or more, got '0'"),
        (["--steps", "many"], "--steps must be a whole number"),
        (["--seed", "-1"], "--seed must be a whole number, 0 or more"),
        (["--jobs", "0"], "--jobs must be a whole number, 1 or more"),
        (["--out", "/dev/null/here"], "Choose another: --out DIR"),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_code_2(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["mistakes", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert message in captured.err
    assert captured.out == ""
    assert list(tmp_path.iterdir()) == []


def test_help_says_what_the_columns_are(capsys):
    with pytest.raises(SystemExit) as done:
        main(["mistakes", "--help"])
    assert done.value.code == 0
    said = capsys.readouterr().out
    for word in ("--list", "--json", "--steps", "--out", "right weights", "A star marks what is seen"):
        assert word in said


@pytest.mark.parametrize(
    ("check", "finding", "text"),
    [
        ("start", {"value": 4.9267}, "4.93"),
        ("trained_loss", {"value": -0.48}, "-0.480"),
        ("right_text", {"value": 0.035}, "4%"),
        ("right_text", {"value": None, "seen": True, "note": "RuntimeError"}, "error"),
        ("trained_text", {"value": None}, "-"),
        ("reference", {"value": 0.0034}, "3e-03"),
        ("reference", {"value": 12.34}, "12"),
        ("causality", {"value": 0.0}, "0"),
        ("cache", {"value": 4e-6, "note": "other text"}, "other text"),
        ("cache", {"value": 3.5, "note": "other text"}, "3.5"),
        ("repeat", {"value": "inf"}, "NaN"),
    ],
)
def test_a_cell_is_a_few_characters(check, finding, text):
    assert mistakes.cell(check, {"seen": False, "note": "", **finding}) == text


# ------------------------------------------------------------------ the page


@pytest.fixture(scope="module")
def committed() -> dict:
    return json.loads(RESULTS.read_text(encoding="utf-8"))


def test_the_page_has_the_table_that_the_committed_results_make(committed):
    page = (ROOT / "docs" / "MISTAKES.md").read_text(encoding="utf-8")
    assert mistakes.markdown_table(committed) in page
    assert mistakes.recipe(mistakes.Settings(**committed["settings"])) in page
    for line in mistakes.noise_lines(committed)[2:]:
        assert line in page


def test_the_page_says_of_each_what_it_is(committed):
    page = (ROOT / "docs" / "MISTAKES.md").read_text(encoding="utf-8")
    assert mistakes.markdown_list() in page
    assert [row["name"] for row in committed["rows"]] == list(MISTAKES)
    for row in committed["rows"]:
        assert row["wrong"] == MISTAKES[row["name"]].wrong


def test_in_the_committed_results_every_mistake_is_seen_by_something_and_the_right_model_by_nothing(committed):
    for row in committed["rows"]:
        assert any(finding["seen"] for finding in row["findings"].values()), row["name"]
    assert not any(finding["seen"] for finding in committed["control"]["findings"].values())


def test_the_sentences_of_the_page_are_what_was_computed(committed):
    """What docs/MISTAKES.md says in words, read off the results once more."""
    rows = {row["name"]: row["findings"] for row in committed["rows"]}
    seen = {name: {check for check, found in row.items() if found["seen"]} for name, row in rows.items()}
    silent = {name for name in rows if not seen[name] & set(LOSS_AND_TEXT)}
    assert silent == {"exact_gelu", "unbiased_variance", "epsilon_wrong", "logits_from_first_position"}
    below = {name for name, row in rows.items() if row["trained_loss"]["note"] == "too good to be true"}
    assert below == {
        "mask_forgotten", "mask_shifted", "mask_after_softmax", "softmax_over_queries", "view_without_transpose",
        "merge_without_transpose", "targets_not_shifted",
    }  # fmt: skip
    assert below - {name for name in rows if "causality" in seen[name]} == {"targets_not_shifted"}
    around = {name for name, row in rows.items() if row["trained_loss"]["value"] is not None}
    around = {name for name in around - silent if not seen[name] & {"start", "trained_loss", "trained_text"}}
    assert around == {"scale_by_emb_dim", "mask_too_strict", "projection_not_transposed", "head_untied"}
    assert {name for name in rows if "implementations" in seen[name]} == {
        "mask_after_softmax", "softmax_over_queries", "dropout_left_on",
    }  # fmt: skip
    assert {name for name in rows if not seen[name] & {"reference", "cache"}} == {
        "targets_not_shifted", "gradients_not_cleared", "sampling_without_softmax",
    }  # fmt: skip
    assert {name for name in rows if "start" in seen[name]} == {"targets_not_shifted"}
