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

from CMHA.choosing.choose import reads_pages
from CMHA.implementations import IMPLEMENTATIONS, eager, flex_attention, sdpa
from CMHA.request import Reason
from orchestrator.cli import main
from orchestrator.evaluation import memory_guard
from orchestrator.evaluation.attention_bench import Bench, Row, growth, run_bench, spread, summarise
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
        __name__="fake", SUMMARY="a fake", ALIASES=(), attention=function,
        check=lambda request: [reason] if refuses_gradients and request.needs_grad else [],
    )  # fmt: skip


def measured(names: str, lengths: list[int], **settings) -> dict[tuple[str, int], Row]:
    rows, _ = run_bench(Bench({name: IMPLEMENTATIONS[name] for name in names.split(",")}, lengths, **settings))
    return {(row.implementation, row.length): row for row in rows}


def test_every_implementation_that_serves_is_measured_at_every_length(small):
    code, results, printed, folder = small
    case = Case(head_dim=16, query_len=64, key_len=64, num_heads=2, num_kv_heads=2)
    serving = {name: serves(module, case) for name, module in IMPLEMENTATIONS.items() if not reads_pages(name)}
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
    assert calls[:6] == ["a", "a", "b", "b", "c", "c"]  # the warm-up, and the look at the errors
    turns = [calls[6 + 3 * i : 9 + 3 * i] for i in range(9)]
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
        assert keys.shape == values.shape == (len(queries), 2, 16, 64)
        assert queries.transpose(1, 2)[0, 0].is_contiguous()  # tokens before heads, as the projection leaves them
        assert not queries.is_contiguous()
        return sdpa.attention(queries, keys, values, mask, scale=scale, dropout=dropout)

    run_bench(Bench({"a": fake(attention)}, [16], batch=2, kv_heads=2, repeats=1))
    forward, backward = ((True, 0.0, 64**-0.5, (2, 4, 16, 64), gradients) for gradients in (False, True))
    looked_at = (True, 0.0, 64**-0.5, (1, 4, 16, 64), True)
    # The warm-up, the look at the errors, a round, the memory, and a forward pass with a new mask.
    assert calls == [forward, backward, looked_at, forward, backward, forward, backward, forward]


def test_tokens_hold_the_size_of_a_call_and_a_full_mask_hides_nothing():
    shapes = []

    def attention(queries, keys, values, mask, *, scale, dropout):
        shapes.append((len(queries), queries.shape[2], mask.hides_nothing))
        return sdpa.attention(queries, keys, values, mask, scale=scale, dropout=dropout)

    plan = Bench({"a": fake(attention)}, [16, 32, 64], tokens=40, causal=False, repeats=1, forward_only=True)
    rows, _ = run_bench(plan)
    assert [row.not_measured for row in rows] == [None] * 3
    assert shapes[0::5] == [(2, 16, True), (1, 32, True), (1, 64, True)]


# ---- what is wrong, what does not fit, and how fast the rest is


@pytest.mark.parametrize("wrong", ["context", "dK"])
def test_an_implementation_that_is_wrong_is_not_timed(wrong):
    def attention(queries, keys, values, mask, *, scale, dropout):
        if wrong == "dK":  # right numbers, and a gradient that is off by a hundredth
            keys = keys + 0.01 * (keys - keys.detach())
        context, _ = sdpa.attention(queries, keys, values, mask, scale=scale, dropout=dropout)
        return (context * 1.01 if wrong == "context" else context), None

    rows, rounds = run_bench(Bench({"off": fake(attention), "sdpa": sdpa}, [32], repeats=2))
    off, right = rows
    assert off.failed
    assert off.not_measured.startswith(f"ValueError: it is wrong, so it is not timed: {wrong} ")
    assert off.seconds is None
    assert all(list(found["seconds"]) == ["sdpa"] for found in rounds)
    assert right.not_measured is None
    assert set(right.errors) == {"context", "dQ", "dK", "dV"}
    assert all(0 <= ratio <= 1 for ratio in right.errors.values())


def test_nan_at_full_size_is_seen_where_the_smaller_call_is_right():
    def attention(queries, keys, values, mask, *, scale, dropout):
        doubled = values * 1.0
        if len(queries) > 1 and doubled.requires_grad:
            doubled.register_hook(lambda gradient: gradient * float("nan"))
        return sdpa.attention(queries, keys, doubled, mask, scale=scale, dropout=dropout)

    ((row,), _) = run_bench(Bench({"spoiled": fake(attention)}, [16], batch=2, repeats=1))
    assert row.not_measured == "ValueError: there is NaN or infinity in dV, so it is not timed."


def test_running_out_of_memory_is_a_row_that_says_so_and_no_failure(tmp_path, monkeypatch, capsys):
    def attention(queries, keys, values, mask, *, scale, dropout):
        if queries.shape[2] > 16:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.\nand more")
        return sdpa.attention(queries, keys, values, mask, scale=scale, dropout=dropout)

    monkeypatch.setitem(IMPLEMENTATIONS, "large", fake(attention))
    names = ["--implementations", "large,sdpa"]
    assert bench("--lengths", "16,32", "--repeats", "1", "--out", str(tmp_path), *names) == 0
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    large = [row for row in rows if row["implementation"] == "large"]
    assert [row["not_measured"] for row in large] == [
        None, "out of memory: CUDA out of memory. Tried to allocate 9 GiB."
    ]  # fmt: skip
    assert not any(row["failed"] for row in rows)
    assert [row["not_measured"] for row in rows if row["implementation"] == "sdpa"] == [None, None]
    assert "not measured: out of memory" in capsys.readouterr().out


def made_up(baseline: list, mine: list) -> tuple[list[dict], Row]:
    """Rounds of two contenders, seconds of the forward pass."""
    seconds = zip(baseline, mine, strict=True)
    rounds = [{"seconds": {"base": base and {"forward": base}, "mine": {"forward": own}}} for base, own in seconds]
    return rounds, Row("mine", 64)


def test_the_speed_is_the_baselines_time_over_ones_own_round_by_round():
    rounds, row = made_up([1.0, 8.0, 3.0], [2.0, 10.0, 2.0])  # 0.5, 0.8, 1.5: the ratio of the medians would be 1.5
    summarise(row, rounds, ["base", "mine"], "base")
    assert row.speed["forward"]["median"] == pytest.approx(0.8)
    assert (row.speed["forward"]["min"], row.speed["forward"]["max"]) == (pytest.approx(0.5), pytest.approx(1.5))
    assert row.speed["forward_backward"] is None
    assert row.over_eager == {"forward": None, "forward_backward": None}
    summarise(row, rounds, ["mine"], "base")  # a baseline that could not be measured
    assert row.speed == {"forward": None, "forward_backward": None}


def test_the_tflops_are_the_formulas_over_the_median_time():
    (row,), _ = run_bench(Bench({"sdpa": sdpa}, [64], batch=2, heads=3, kv_heads=1, head_dim=16, repeats=3))
    # Q K^T: 2 FLOPs for each of 64 x 64 x 16, as many for weights x values; 2 x 3 tables; half of it is hidden.
    forward = (2 + 2) * 64 * 64 * 16 * (2 * 3) / 2
    assert row.tflops["forward"] == pytest.approx(forward / row.seconds["forward"]["median"] / 1e12)
    both = row.seconds["forward_backward"]["median"]
    assert row.tflops["forward_backward"] == pytest.approx((2 + 5) / 2 * forward / both / 1e12)


def test_torchs_op_held_to_one_kernel_is_a_contender_and_the_baseline(tmp_path, capsys):
    names = "sdpa:flash,sdpa:math,eager"
    arguments = ["--lengths", "32", "--repeats", "2", "--forward_only", "--implementations", names]
    assert bench(*arguments, "--out", str(tmp_path)) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["settings"]["baseline"] == "sdpa:flash"
    speeds = {row["implementation"]: row["speed"]["forward"]["median"] for row in results["rows"]}
    assert speeds["sdpa:flash"] == 1.0
    assert speeds["sdpa:math"] > 0
    assert "x sdpa:flash's speed" in capsys.readouterr().out
    assert bench(*arguments[:-1], "sdpa:cudnn", "--out", str(tmp_path / "new")) == 2
    assert "torch's cudnn kernel runs on CUDA" in capsys.readouterr().err


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
    assert ["breaks" in found["seconds"] for found in results["rounds"]] == [True, True, False]
    assert "no luck" in capsys.readouterr().out


def test_all_that_is_wrong_is_said_at_once_and_nothing_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").touch()
    wrong = {
        "--lengths": "16,x", "--batch": "0", "--heads": "many", "--head_dim": "1.5", "--kv_heads": "-1",
        "--dtype": "int8", "--device": "abacus", "--implementations": "eagre,paged_attention", "--repeats": "0",
        "--seed": "-3", "--out": "taken", "--tokens": "0", "--baseline": "sdpa:fast",
    }  # fmt: skip
    assert main(["attention-bench", *(word for pair in wrong.items() for word in pair)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "error: 14 things are wrong:"
    assert len(lines) == 15
    for word in ("--lengths", "--batch", "--heads", "--head_dim", "--kv_heads", "--dtype", "abacus", "'eagre'",
                 "paged_attention", "--repeats", "--seed", "--out", "--tokens", "sdpa:fast"):  # fmt: skip
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


def test_a_baseline_that_is_not_measured_is_an_error(tmp_path, capsys):
    arguments = ["--implementations", "eager,sdpa", "--baseline", "flash_tiled", "--out", str(tmp_path / "new")]
    assert bench(*arguments) == 2
    assert capsys.readouterr().err == (
        "error: --baseline flash_tiled is not among what is measured: eager, sdpa. Name it in --implementations too.\n"
    )


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
