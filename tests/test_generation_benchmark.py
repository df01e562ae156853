"""benchmarks/generation_against_transformers.py: it runs at tiny sizes; both sides have the same weights; what differs
is told; no figure of a tiny run can be taken for a measurement. No time is tested."""

import importlib.util
import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from orchestrator.evaluation.generation_parts import MEASURES, measure_one, measure_queue
from orchestrator.evaluation.generation_plan import Plan, Sides, tiny
from orchestrator.evaluation.generation_profile import PARTS

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def script():
    place = ROOT / "benchmarks" / "generation_against_transformers.py"
    spec = importlib.util.spec_from_file_location("generation_against_transformers", place)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def dry(script, tmp_path_factory):
    """A whole tiny run: (what was printed, the results, the folder)."""
    import contextlib
    import io

    folder = tmp_path_factory.mktemp("tiny")
    with contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.redirect_stderr(io.StringIO()):
        assert script.main(["--tiny", "--rounds", "2", "--out", str(folder)]) == 0
    return printed.getvalue(), json.loads((folder / "tiny-generation.json").read_text(encoding="utf-8")), folder


@pytest.fixture(scope="module")
def sides(script, tmp_path_factory):
    plan = tiny(rounds=dict.fromkeys(MEASURES, 1), dtypes=("float32",))
    return Sides(plan, tmp_path_factory.mktemp("weights"), script.Transformers)


# ------------------------------------------------------------------ the whole command


def test_a_tiny_run_does_every_part_and_says_that_it_measures_nothing(dry):
    printed, results, folder = dry
    assert set(MEASURES) <= set(results)
    assert printed.startswith(results["not_a_measurement"])
    assert "NOT A MEASUREMENT" in results["not_a_measurement"]
    names = ["tiny-generation-profile.png", "tiny-generation-queue.png", "tiny-generation.json"]
    assert sorted(path.name for path in folder.iterdir()) == names
    for part in MEASURES:
        assert results[part]["machine"]["versions"]["transformers"]
        assert results[part]["settings"]["seed"] == 0
        assert results[part]["command"].startswith("python benchmarks/generation_against_transformers.py --tiny")


def test_every_side_wrote_the_same_tokens_in_float32_in_every_round(dry):
    _, results, _ = dry
    assert results["one"]["tokens"]["ours float32"]["differences"] == []
    assert results["one"]["distinct_tokens"] > 4
    found = results["queue"]["float32"]["tokens"]
    assert set(found) == {"engine", "transformers, static", "ours, static"}
    assert all(of["differences"] == [] and of["equal"] == of["requests"] == 9 for of in found.values())
    assert results["prefix"]["tokens"]["differences"] == []


def test_one_text_is_measured_in_each_dtype_and_int8_beside_transformers_in_the_dtype_of_the_rest(dry):
    _, results, _ = dry
    against = {name: of["against"] for name, of in results["one"]["speed"].items()}
    assert against == {
        "ours float32": "transformers float32", "ours bfloat16": "transformers bfloat16",
        "ours int8": "transformers float32", "ours int8_bfloat16": "transformers bfloat16",
    }  # fmt: skip
    assert results["one"]["transformers_attention"] == "sdpa"
    for of_round in results["one"]["rounds"]:
        assert set(of_round) == set(against) | set(against.values())
        for name, peer in against.items():
            assert of_round[name]["first_token"] + of_round[name]["later_tokens"] <= of_round[name]["text"] * 1.001
            assert of_round[peer]["first_token"] > 0


def test_the_ratios_are_those_of_the_rounds_that_stand_beside_them(dry):
    _, results, _ = dry
    here = results["queue"]["float32"]
    pairs = [of["transformers, static"]["seconds"] / of["engine"]["seconds"] for of in here["rounds"]]
    found = here["speed"]["engine against transformers, static"]["paired"]
    assert (found["min"], found["max"]) == (pytest.approx(min(pairs)), pytest.approx(max(pairs)))
    assert len(here["rounds"]) == results["queue"]["settings"]["rounds"] == 2


def test_a_common_prefix_is_read_once_where_pages_are_shared(dry):
    _, results, _ = dry
    prompts = results["prefix"]["settings"]["lengths"]["prompt"]
    prefill = results["prefix"]["prefill"]
    assert prefill["no sharing"] == prompts["total"]
    assert prefill["sharing"] == prompts["total"] - 3 * 32  # 32 tokens are two whole blocks, of three requests
    shared = results["prefix"]["engine_stats"]["sharing"]["shared_tokens"]
    assert shared == prompts["total"] - prefill["sharing"]


def test_a_step_is_profiled_on_both_sides_and_in_the_engine(dry):
    _, results, _ = dry
    found = results["profile"]["contenders"]
    assert list(found) == ["ours, one text", "transformers, one text", "engine, 2 running", "engine, 4 running"]
    assert [of["tokens"] for of in found.values()] == [1, 1, 2, 4]
    assert all(set(of["parts"]) == set(PARTS) for of in found.values())


def test_parts_that_were_not_asked_for_stay_as_they_were(script, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(script, "RESULTS", tmp_path / "elsewhere")
    monkeypatch.setattr(script, "Plan", tiny)  # the command without --tiny, at its sizes
    place = tmp_path / "cpu-generation.json"
    place.write_text(json.dumps({"prefix": {"known": 1}, "one": {"old": 2}}), encoding="utf-8")
    assert script.main(["--only", "one", "--rounds", "1", "--dtypes", "float32", "--out", str(tmp_path)]) == 0
    results = json.loads(place.read_text(encoding="utf-8"))
    assert results["prefix"] == {"known": 1}
    assert "old" not in results["one"]
    assert "not_a_measurement" not in results
    assert "**One text**" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--rounds", "0"], "--rounds must be 1 or more, got 0"),
        (["--threads", "-1"], "--threads must be 1 or more, got -1"),
        (["--seed", "-1"], "--seed must be from 0"),
        (["--only", "speed"], "invalid choice: 'speed'"),
        (["--device", "abacus"], "device 'abacus' cannot be used here"),
        (["--tiny", "--out", str(ROOT / "benchmarks" / "results")], "--tiny measures nothing"),
    ],
)
def test_what_makes_no_sense_is_said_before_anything_is_computed(script, capsys, arguments, said):
    with pytest.raises(SystemExit) as stopped:
        script.main(arguments)
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err


def test_help_names_every_part_and_option(script, capsys):
    with pytest.raises(SystemExit):
        script.main(["--help"])
    said = capsys.readouterr().out
    for word in (*MEASURES, "--tiny", "--dry_run", "--only", "--rounds", "--out", "--dtypes", "--queue_dtypes"):
        assert word in said


def test_the_published_sizes_are_those_of_the_task():
    plan = Plan()
    assert (plan.cfg["emb_dim"], plan.cfg["n_layers"], plan.cfg["vocab_size"]) == (768, 12, 50257)
    assert (plan.prompt, plan.new_tokens) == (64, 128)
    assert (plan.requests, plan.shortest, plan.longest, plan.batch, plan.seed) == (32, 16, 256, 8, 0)
    assert (plan.prefix_requests, plan.prefix, plan.tails) == (16, 192, (16, 32))
    assert plan.running == (8, 32)
    assert min(plan.rounds.values()) >= 5


# ------------------------------------------------------------------ both sides


def test_both_sides_have_the_very_same_weights_and_none_of_them_is_fresh(sides):
    ids = torch.randint(257, (2, 9), generator=torch.Generator().manual_seed(3))
    peer = sides.theirs("float32").model
    with torch.no_grad():
        ours, theirs = sides.ours("float32")(ids), peer(ids).logits
    assert (ours - theirs).abs().max() < 1e-5 * ours.abs().max()
    assert all(parameter.std() > 0 for parameter in peer.parameters())  # a fresh bias is all zeros, a norm all ones
    assert peer.dtype == torch.float32
    assert sides.theirs("bfloat16").model.dtype == torch.bfloat16
    assert sides.ours("int8_bfloat16").final_norm.weight.dtype == torch.bfloat16


def test_transformers_never_stops_early_and_its_first_time_is_that_of_the_first_new_token(sides):
    peer = sides.theirs("float32")
    peer.model.config.eos_token_id = 7
    heard = []
    forced = peer.model.lm_head.register_forward_hook(
        lambda module, inputs, logits: logits.index_fill(-1, torch.tensor([7]), 1e4)
    )
    try:
        written = peer.write(torch.tensor([[1, 2, 3]]), None, 6, lambda: heard.append(1))
    finally:
        forced.remove()
        peer.model.config.eos_token_id = None
    assert written.ids == [[7] * 6]
    assert len(written.times) == len(heard) == 6


def test_other_weights_on_one_side_are_seen_and_told_with_their_gap(script, sides, tmp_path):
    class Other(script.Transformers):
        def __init__(self, *args):
            super().__init__(*args)
            with torch.no_grad():
                self.model.transformer.ln_f.bias += 2 * torch.randn(32, generator=torch.Generator().manual_seed(0))

    plan = replace(sides.plan, new_tokens=8)
    broken = Sides(plan, tmp_path, Other)
    (difference,) = measure_one(broken, plan)["tokens"]["ours float32"]["differences"]
    assert difference["tokens"][0] != difference["tokens"][1]
    assert difference["gap"] > 0  # ours took what the model itself finds likelier
    found = measure_queue(broken, plan)["float32"]
    assert found["tokens"]["engine"]["equal"] < 9
    assert found["tokens"]["engine"]["differences"] == found["tokens"]["ours, static"]["differences"]


def test_the_table_has_no_ratio_that_the_results_do_not_have(dry):
    printed, results, _ = dry
    ratios = [float(ratio) for ratio in re.findall(r"ratio of medians ([\d.]+)x", printed)]
    speeds = results["queue"]["float32"]["speed"]
    assert ratios == [pytest.approx(of["ratio_of_medians"], abs=0.006) for of in speeds.values()]
