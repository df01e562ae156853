"""`experiment`: the report has what was measured, what was not and why; a failure is exit code 1. No timing is
asserted."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from CMHA.choosing.choose import reads_pages
from CMHA.implementations import IMPLEMENTATIONS, sdpa
from GPT2Model.gpt2 import GPTModel
from orchestrator.cli import main, make_parser
from orchestrator.commands import experiment as command
from orchestrator.evaluation.workloads import Workload

SMALL = Workload("nano", 2, 24, prompt=8, new_tokens=3, vocab_size=31, changes={"n_layers": 1, "emb_dim": 32})


@pytest.fixture(autouse=True)
def small_workloads(monkeypatch):
    """The real machinery on a model of one layer, and a short look at the machine's peak."""
    monkeypatch.setattr(command.mfu, "SECONDS", 0.01)
    monkeypatch.setattr(command, "quick", lambda: [SMALL])
    monkeypatch.setattr(command, "full", lambda device: [SMALL, replace(SMALL, tokens=16)])


def experiment(*arguments: str) -> int:
    return main(["experiment", "--device", "cpu", "--dtype", "fp32", "--rounds", "2", *arguments])


@pytest.fixture
def ran(tmp_path, capsys):
    """(exit code, report, page, what was printed, the folder)."""
    folder = tmp_path / "run"
    code = experiment("full", "--attn_implementation", "sdpa,flash_attention_2", "--out", str(folder))
    page = (folder / "report.md").read_text(encoding="utf-8")
    return code, json.loads((folder / "report.json").read_text()), page, capsys.readouterr().out, folder


def test_the_report_has_what_was_measured_and_how(ran):
    code, report, page, printed, folder = ran
    assert code == 0
    rows = {(row["workload"], row["task"], row["implementation"]): row for row in report["rows"]}
    assert len(rows) == 2 * 2 * 3
    assert len(report["rounds"]) == 2 * 2 * 2
    row = rows[str(SMALL), "training", "sdpa"]
    assert {"samples", "tokens", "mfu"} == set(row["rates"])
    for line in (page, printed):
        assert f"{100 * row['rates']['mfu']:.1f} %" in line
        assert f"{command.short(row['rates']['tokens'])} " in line
        assert "flash_attention_2 not measured: it runs on CUDA" in line
    assert "MFU = tokens/s x (6 N + 6 L C T) / peak" in page
    assert report["peak"]["name"] in page
    assert report["machine"]["versions"]["torch"] == torch.__version__
    assert report["settings"]["rounds"] == 2
    assert sorted(path.name for path in folder.iterdir()) == ["costs.png", "report.json", "report.md", "rounds.png"]
    for name in ("costs.png", "rounds.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
        assert f"({name})" in page


def test_the_variants_of_gpt2_can_be_asked_for_and_the_report_says_so(tmp_path, capsys):
    variants = ("--norm", "rmsnorm", "--mlp", "swiglu", "--positions", "rope", "--n_kv_heads", "2")
    assert experiment("quick", "--attn_implementation", "sdpa", *variants, "--out", str(tmp_path)) == 0
    named = "norm rmsnorm, mlp swiglu, positions rope, n_kv_heads 2"
    assert f"quick: fp32, {named}, 2 rounds" in capsys.readouterr().out
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["settings"]["variants"] == named
    assert f"# Experiment: quick, fp32, {named}\n" in (tmp_path / "report.md").read_text()
    (workload,) = report["workloads"].values()
    asked = {"norm": "rmsnorm", "mlp": "swiglu", "positions": "rope", "n_kv_heads": 2, "n_layers": 1, "emb_dim": 32}
    assert {key: workload["cfg"][key] for key in asked} == asked
    weights = 4 * GPTModel(SMALL.cfg | asked).num_parameters()
    rows = {row["task"]: row for row in report["rows"] if row["implementation"] == "sdpa"}
    assert rows["generation"]["resting_bytes"] == weights
    # AdamW remembers two numbers for each weight, and how many steps it made for each tensor
    assert 3 * weights <= rows["training"]["resting_bytes"] < 3 * weights + 500
    assert all(row["seconds"] for row in report["rows"] if row["implementation"] in ("eager", "sdpa"))


def test_variants_that_do_not_exist_or_do_not_fit_are_all_named(capsys):
    wrong = ("--norm", "batchnorm", "--mlp", "relu", "--positions", "alibi", "--n_kv_heads", "0")
    assert experiment("quick", *wrong) == 2
    said = capsys.readouterr().err
    for words in ("--norm must be layernorm or rmsnorm", "--mlp must be gelu or gelu_exact or swiglu",
                  "--positions must be learned or rope", "--n_kv_heads must be a whole number, 1 or more"):  # fmt: skip
        assert words in said
    assert experiment("quick", "--n_kv_heads", "3") == 2
    assert "'n_kv_heads' must divide 'n_heads': 4 / 3 is not whole" in capsys.readouterr().err


def test_a_failure_is_reported_with_exit_code_1_and_the_others_go_on(monkeypatch, tmp_path, capsys):
    def breaks(queries, *args, **options):
        if queries.requires_grad:
            raise RuntimeError("no kernel image")
        return sdpa.attention(queries, *args, **options)

    planted = SimpleNamespace(SUMMARY="", ALIASES=(), check=lambda request: [], attention=breaks)
    monkeypatch.setitem(IMPLEMENTATIONS, "broken", planted)
    assert experiment("--attn_implementation", "broken", "sdpa", "--out", str(tmp_path)) == 1
    assert "- broken FAILED: training: RuntimeError: no kernel image" in capsys.readouterr().out
    rows = json.loads((tmp_path / "report.json").read_text())["rows"]
    assert [row["task"] for row in rows if row["implementation"] == "broken" and row["seconds"]] == ["generation"]
    assert all(row["seconds"] for row in rows if row["implementation"] == "sdpa")


def test_without_names_everything_is_tried(monkeypatch, tmp_path):
    args = make_parser().parse_args(["experiment"])
    kind, asked = command.read_arguments(args)
    assert kind == "quick"
    assert asked.implementations == [name for name in IMPLEMENTATIONS if not reads_pages(name)]
    assert asked.rounds == command.KINDS["quick"] >= 12  # as many as paired ratios need on a busy machine


@pytest.mark.parametrize("words", [["full"], ["--full"], ["full", "--full"]])
def test_quick_or_full_may_be_said_either_way(words):
    kind, asked = command.read_arguments(make_parser().parse_args(["experiment", *words]))
    assert kind == "full"
    assert len(asked.workloads) == 2


def test_everything_that_is_wrong_is_said_at_once(capsys):
    code = experiment("half", "--full", "--dtype", "fp64", "--rounds", "0", "--seed", "-1", "--device", "quantum",
                      "--attn_implementation", "paged_attention")  # fmt: skip
    said = capsys.readouterr().err
    assert code == 2
    assert "6 things are wrong" in said
    for words in ("'half'", "'fp64'", "--rounds", "--seed", "'quantum'", "paged_attention cannot be measured"):
        assert words in said


def test_quick_and_full_at_once_is_a_mistake(capsys):
    assert experiment("quick", "--full") == 2
    assert "both are asked for" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["--experiment", "full", "--rounds", "3"], ["experiment", "full", "--rounds", "3"]),
        (["--rounds", "3", "--experiment=quick"], ["experiment", "quick", "--rounds", "3"]),
        (["--rounds", "3", "--experiment", "quick", "--seed", "1"],
         ["experiment", "quick", "--rounds", "3", "--seed", "1"]),
        (["doctor", "--json"], ["doctor", "--json"]),
        ([], []),
    ],
)  # fmt: skip
def test_the_option_of_main_is_the_command(given, expected):
    assert command.experiment_first(given) == expected


@pytest.mark.parametrize("given", [["--experiment"], ["--experiment", "--rounds", "3"]])
def test_the_option_of_main_needs_to_know_how_much(given):
    with pytest.raises(ValueError, match="--experiment quick, or --experiment full"):
        command.experiment_first(given)


def test_reasons_that_are_alike_are_given_once():
    def row(name, task, workload, why, failed=False):
        return {"implementation": name, "task": task, "workload": workload, "not_measured": why, "failed": failed}

    rows = [row("a", task, workload, "why") for task in ("training", "generation") for workload in ("x", "y")]
    rows += [row("b", "training", workload, "no gradients") for workload in ("x", "y")]
    rows += [row("c", "training", "y", "too large"), row("c", "training", "x", None)]
    rows += [row("d", "generation", "x", "RuntimeError: no", failed=True)]
    assert command.left_out(rows) == [
        "- a not measured: why",
        "- b not measured: training: no gradients",
        "- c not measured: training; y: too large",
        "- d FAILED: generation; x: RuntimeError: no",
    ]


def test_ratios_that_swing_are_named_and_steady_ones_are_not():
    def row(name, low, high):
        ratio = {"lower_quartile": low, "median": (low + high) / 2, "upper_quartile": high}
        return {"implementation": name, "task": "training", "workload": "x", "over_eager": {"step": ratio}}

    found = command.noisy([row("steady", 0.8, 1.1), row("wild", 0.5, 1.1), {"over_eager": None}])
    assert found == ["- wild, training, x, step: x eager 0.80 (0.50-1.10)"]
