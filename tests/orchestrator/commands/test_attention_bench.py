"""`attention-bench`: everything that can run is measured side by side, and what it says can be recomputed. No timing is
asserted."""

import contextlib
import io
import json
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from CMHA.implementations import IMPLEMENTATIONS, eager, flex_attention, sdpa
from CMHA.request import Reason
from orchestrator.cli import main
from orchestrator.evaluation import memory_guard
from orchestrator.evaluation.attention_bench import Bench, Row, growth, run_bench, spread
from orchestrator.evaluation.cases import Case
from orchestrator.evaluation.parity import serves

THREE = "eager,sdpa,flash_tiled"  # flex_attention takes seconds to compile


def bench(*arguments: str) -> int:
    return main(["attention-bench", "--device", "cpu", *arguments])


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """One real run of everything: (exit code, results, what was printed, the folder)."""
    folder, printed = tmp_path_factory.mktemp("bench") / "run", io.StringIO()
    with contextlib.redirect_stdout(printed):
        code = bench(
            "--lengths", "64,16,32", "--repeats", "3", "--heads", "2", "--head_dim", "16", "--out", str(folder)
        )
    return code, json.loads((folder / "results.json").read_text()), printed.getvalue(), folder


def fake(function: Callable, refuses_gradients: bool = False):
    """An implementation in the registry's form."""
    reason = Reason("needs_grad", "it has no backward pass", "use sdpa")
    return SimpleNamespace(
        SUMMARY="a fake", ALIASES=(), attention=function,
        check=lambda request: [reason] if refuses_gradients and request.needs_grad else [],
    )  # fmt: skip


def measured(names: str, lengths: list[int], **settings) -> dict[tuple[str, int], Row]:
    rows, _ = run_bench(Bench({name: IMPLEMENTATIONS[name] for name in names.split(",")}, lengths, **settings))
    return {(row.implementation, row.length): row for row in rows}


def test_every_implementation_that_serves_is_measured_at_every_length(small):
    code, results, printed, folder = small
    case = Case(head_dim=16, query_len=64, key_len=64, num_heads=2, num_kv_heads=2)
    serving = {name: serves(module, case) for name, module in IMPLEMENTATIONS.items()}
    expected = {
        (name, length) for name, gradients in serving.items() if gradients is not None for length in (16, 32, 64)
    }
    assert code == 0
    assert len(expected) >= 9
    assert {(row["implementation"], row["length"]) for row in results["rows"]} == expected
    for row in results["rows"]:
        passes = ["forward", "forward_backward"] if serving[row["implementation"]] else ["forward"]
        assert row["not_measured"] is None
        assert [key for key in row["seconds"] if row["seconds"][key]] == passes
        assert [key for key in row["peak_bytes"] if row["peak_bytes"][key]] == passes
        assert row["first_call_seconds"] > 0
        assert f"{row['implementation']:18} {row['length']:6}" in printed
    assert set(results["refused"]) == {name for name, gradients in serving.items() if gradients is None}
    for name in ("time.png", "memory.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in folder.iterdir()) == ["memory.png", "results.json", "time.png"]


def test_the_results_say_on_what_and_how_they_were_taken(small):
    _, results, _, _ = small
    assert results["machine"]["cpu"]
    assert results["machine"]["threads"] == torch.get_num_threads()
    assert results["machine"]["versions"]["torch"] == torch.__version__
    assert results["command"].startswith("python -m orchestrator")
    assert results["date"][:2] == "20"
    assert "causal" in results["method"]
    settings = results["settings"]
    assert settings["lengths"] == [16, 32, 64]  # rising, whatever the order given
    assert (settings["heads"], settings["kv_heads"], settings["head_dim"], settings["dtype"]) == (2, 2, 16, "float32")


def test_the_figures_of_the_table_can_be_recomputed_from_the_rounds(small):
    _, results, _, _ = small
    for row in results["rows"]:
        rounds = [found["seconds"] for found in results["rounds"] if found["length"] == row["length"]]
        assert len(rounds) == 3
        for name in ("forward", "forward_backward") if row["gradients"] else ("forward",):
            mine = np.array([found[row["implementation"]][name] for found in rounds])
            eagers = np.array([found["eager"][name] for found in rounds])
            for values, shown in ((mine, row["seconds"][name]), (mine / eagers, row["over_eager"][name])):
                expected = np.percentile(values, [0, 25, 50, 75, 100])
                assert list(shown) == ["min", "lower_quartile", "median", "upper_quartile", "max"]
                assert list(shown.values()) == pytest.approx(expected)


def test_eager_holds_its_tables_and_flash_tiled_none():
    rows = measured("eager,sdpa,flash_tiled", [512, 1024], batch=2, heads=2, kv_heads=1, head_dim=32, repeats=1)
    for length in (512, 1024):
        table = 2 * 2 * length * length * 4
        for name in ("forward", "forward_backward"):
            assert table <= rows["eager", length].peak_bytes[name] <= 4 * table
            assert rows["flash_tiled", length].peak_bytes[name] < table
            assert rows["sdpa", length].peak_bytes[name] < table
    memory = {found["implementation"]: found["memory"]["forward"] for found in growth(list(rows.values()))}
    assert memory["eager"] == pytest.approx(2, abs=0.05)
    assert memory["sdpa"] < 1.5
    assert memory["flash_tiled"] < 1.2


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_the_growth_of_a_power_of_the_length_is_its_exponent(power):
    def row(length: int, gradients: bool) -> Row:
        value = 3.0 * length**power if length > 100 else 1.0  # only the last two lengths count
        seconds = {"forward": spread([value]), "forward_backward": spread([2 * value]) if gradients else None}
        peaks = {"forward": value, "forward_backward": value if gradients else None}
        return Row("mine", length, gradients=gradients, seconds=seconds, peak_bytes=peaks)

    (found,) = growth([row(length, gradients=True) for length in (10, 200, 700)])
    assert (found["from"], found["to"]) == (200, 700)
    assert list(found["time"].values()) + list(found["memory"].values()) == pytest.approx([power] * 4)
    (forward,) = growth([row(length, gradients=False) for length in (200, 700)])
    assert forward["time"] == {"forward": pytest.approx(power), "forward_backward": None}
    assert growth([row(200, gradients=True)]) == []
    assert growth([row(200, gradients=True), Row("mine", 400, not_measured="too large")]) == []


def test_what_would_not_fit_is_left_out_with_its_formula(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(memory_guard, "free_memory", lambda device: 20 * 2**20)
    code = bench("--lengths", "64,512", "--repeats", "1", "--implementations", THREE, "--out", str(tmp_path))
    assert code == 0
    printed = capsys.readouterr().out
    assert "not measured: it would take about 12 MiB (3 T x T tables of 1 x 4 x 512 x 512 x 4 bytes" in printed
    assert "more than half of the 20 MiB that are free" in printed
    rows = {
        (row["implementation"], row["length"]): row
        for row in json.loads((tmp_path / "results.json").read_text())["rows"]
    }
    assert [key for key, row in rows.items() if row["not_measured"]] == [("eager", 512)]
    assert rows["sdpa", 512]["seconds"]["forward_backward"]["median"] > 0
    assert rows["sdpa", 512]["over_eager"] == {"forward": None, "forward_backward": None}


def test_a_length_whose_inputs_would_not_fit_is_left_out_whole(tmp_path, capsys):
    code = bench("--lengths", "16,9999999999", "--repeats", "1", "--implementations", THREE, "--out", str(tmp_path))
    assert code == 0
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert [row["length"] for row in rows if row["not_measured"]] == [9999999999] * 3
    assert capsys.readouterr().out.count("queries, keys, values and a gradient") == 3


def test_in_each_round_every_implementation_runs_once_in_changing_order():
    calls = []

    def recorded(name: str):
        def attention(queries, keys, values, mask, *, scale, dropout):
            calls.append(name)
            return sdpa.attention(queries, keys, values, mask, scale=scale, dropout=dropout)

        return fake(attention)

    names = ["a", "b", "c"]
    plan = Bench({name: recorded(name) for name in names}, [16], repeats=9, forward_only=True)
    ticks = []
    _, rounds = run_bench(plan, lambda doing, count: ticks.append(count))
    assert calls[:3] == names  # the warm-up
    turns = [calls[3 + 3 * i : 6 + 3 * i] for i in range(9)]
    assert all(sorted(turn) == names for turn in turns)
    assert turns == [list(found["seconds"]) for found in rounds]
    assert len({tuple(turn) for turn in turns}) >= 3
    assert all(sorted(turns[i + j][0] for j in range(3)) == names for i in (0, 3, 6))  # each goes first equally often
    assert sum(ticks) == 3 * (9 + 2)
    again = run_bench(plan)[1]
    assert [list(found["seconds"]) for found in again] == turns  # the seed decides


def test_the_call_is_the_layers_own_causal_and_without_dropout():
    calls = []

    def attention(queries, keys, values, mask, *, scale, dropout):
        calls.append((mask.is_plain_causal, dropout, scale, tuple(queries.shape), torch.is_grad_enabled()))
        assert keys.shape == values.shape == (2, 2, 16, 64)
        assert queries.transpose(1, 2)[0, 0].is_contiguous()  # tokens before heads, as the projection leaves them
        assert not queries.is_contiguous()
        return sdpa.attention(queries, keys, values, mask, scale=scale, dropout=dropout)

    run_bench(Bench({"a": fake(attention)}, [16], batch=2, kv_heads=2, repeats=1))
    forward, backward = ((True, 0.0, 64**-0.5, (2, 4, 16, 64), gradients) for gradients in (False, True))
    assert calls == [
        forward,
        backward,
        forward,
        backward,
        forward,
        backward,
        forward,
    ]  # warm-up, round, memory, new mask


def test_an_implementation_that_is_added_to_the_registry_appears(tmp_path, monkeypatch, capsys):
    no = Reason("no_compiler", "there is no compiler", "install one")
    monkeypatch.setattr(flex_attention, "check", lambda request: [no])  # it takes seconds to compile
    monkeypatch.setitem(IMPLEMENTATIONS, "mine", fake(sdpa.attention, refuses_gradients=True))
    assert bench("--lengths", "16,32", "--repeats", "1", "--out", str(tmp_path)) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    rows = [row for row in results["rows"] if row["implementation"] == "mine"]
    assert [row["length"] for row in rows] == [16, 32]
    for row in rows:  # its own check refuses gradients
        assert row["seconds"]["forward"]["median"] > 0
        assert row["seconds"]["forward_backward"] is row["over_eager"]["forward_backward"] is None
        assert row["peak_bytes"]["forward_backward"] is None
    printed = capsys.readouterr().out
    assert "(forward, T = 16 to 32)" in printed
    assert "not measured: flex_attention (there is no compiler)" in printed


def test_an_implementation_that_raises_fails_the_run_and_the_others_are_measured(tmp_path, monkeypatch, capsys):
    count = iter(range(100))

    def breaks_later(*inputs, scale, dropout):
        if next(count) == 3:  # in its second round
            raise RuntimeError("no luck\nand more")
        return eager.attention(*inputs, scale=scale, dropout=dropout)

    monkeypatch.setitem(IMPLEMENTATIONS, "breaks", fake(breaks_later))
    monkeypatch.setitem(IMPLEMENTATIONS, "narrow", fake(lambda q, k, v, mask, scale, dropout: (q[..., :1], None)))
    names = ["--implementations", "breaks,eager,narrow"]
    assert bench("--lengths", "16", "--repeats", "3", "--forward_only", "--out", str(tmp_path), *names) == 1
    results = json.loads((tmp_path / "results.json").read_text())
    rows = {row["implementation"]: row for row in results["rows"]}
    assert rows["breaks"]["not_measured"] == "RuntimeError: no luck"
    assert "the context must be" in rows["narrow"]["not_measured"]
    assert rows["eager"]["not_measured"] is None
    assert ["breaks" in found["seconds"] for found in results["rounds"]] == [True, True, True]
    assert "no luck" in capsys.readouterr().out


def test_all_that_is_wrong_is_said_at_once_and_nothing_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").touch()
    wrong = {
        "--lengths": "16,x", "--batch": "0", "--heads": "many", "--head_dim": "1.5", "--kv_heads": "-1",
        "--dtype": "int8", "--device": "abacus", "--implementations": "eagre,paged_attention", "--repeats": "0",
        "--seed": "-3", "--out": "taken",
    }  # fmt: skip
    assert main(["attention-bench", *(word for pair in wrong.items() for word in pair)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "error: 12 things are wrong:"
    assert len(lines) == 13
    for word in ("--lengths", "--batch", "--heads", "--head_dim", "--kv_heads", "--dtype", "abacus", "'eagre'",
                 "paged_attention", "--repeats", "--seed", "--out"):  # fmt: skip
        assert any(word in line for line in lines[1:]), word
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_one_wrong_value_is_one_line(tmp_path, capsys):
    assert bench("--heads", "4", "--kv_heads", "3", "--out", str(tmp_path / "new")) == 2
    line = "error: --heads 4 must be a multiple of --kv_heads 3: each serves a group.\n"
    assert capsys.readouterr().err == line
    assert not (tmp_path / "new").exists()


def test_a_named_implementation_that_cannot_serve_is_an_error_with_its_reasons(tmp_path, capsys):
    assert bench("--implementations", "eager,fa2", "--out", str(tmp_path / "new")) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: flash_attention_2 cannot be measured here: ")
    assert "cpu" in said
    assert not (tmp_path / "new").exists()


def test_json_prints_the_results_and_nothing_else(tmp_path, capsys):
    names = ["--implementations", "manual"]  # an alias
    assert (
        bench("--lengths", "16", "--repeats", "1", "--dtype", "bfloat16", "--json", "--out", str(tmp_path), *names) == 0
    )
    printed = capsys.readouterr().out
    results = json.loads(printed)
    assert printed == (tmp_path / "results.json").read_text()
    assert results["settings"]["implementations"] == ["eager"]
    assert results["settings"]["dtype"] == "bfloat16"
    assert results["rows"][0]["over_eager"]["forward"]["median"] == 1.0
