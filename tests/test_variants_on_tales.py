"""benchmarks/variants_on_tales.py and the pages of docs/variants: what is measured, and what the pages say of it."""

import contextlib
import importlib.util
import io
import json
import math
import re
import shlex
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from GPT2Model.config import KEYS, from_preset
from GPT2Model.gpt2 import GPTModel
from orchestrator.text import tales
from orchestrator.views.variant_tables import LABELS, PAGES, block, markdown_table

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "docs" / "variants"


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("variants_on_tales", ROOT / "benchmarks" / "variants_on_tales.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def published() -> dict:
    return json.loads((ROOT / "benchmarks" / "results" / "cpu-variants-on-tales.json").read_text(encoding="utf-8"))


def run(bench, *arguments: object) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.redirect_stderr(io.StringIO()):
        assert bench.main([*map(str, arguments)]) == 0
    return printed.getvalue()


# ------------------------------------------------------------------ what is measured


def test_each_variant_changes_what_its_name_says_and_all_four_change_all(bench):
    changed = {name: bench.changes(name, 4) for name in LABELS}
    assert changed.pop("gpt2") == {}
    assert changed["all_four"] == changed["grouped"] | changed["rope"] | changed["rmsnorm"] | changed["swiglu"]
    four = {"n_kv_heads", "positions", "norm", "mlp"}
    assert {key for keys in changed.values() for key in keys} == four | {"init_std"} <= set(KEYS)
    for name, keys in changed.items():
        model = bench.fresh(name, 0)
        assert {key: model.cfg[key] for key in keys} == keys
        assert all(model.cfg[key] != from_preset("nano")[key] for key in keys)
    assert bench.changes("grouped", 12) == {"n_kv_heads": 6}


@pytest.mark.parametrize("name", LABELS)
def test_the_costs_are_what_torch_counts(bench, name):
    from GPT2Model.generation import make_cache

    model, found = bench.fresh(name, 0), bench.costs(name)
    tokens = model.cfg["context_length"]
    assert found["parameters"] == sum({id(p): p.numel() for p in model.parameters()}.values())
    with FlopCounterMode(display=False) as counter, torch.no_grad(), model.using_attention("eager"):
        model(torch.zeros(1, tokens, dtype=torch.long))
    assert found["flops_per_token"] * tokens == counter.get_total_flops()
    assert found["cache_bytes_per_token"] * 10 == make_cache(model, 1, 10).nbytes


def test_every_model_reads_the_same_stories_and_starts_from_its_seed(bench, monkeypatch):
    seen = []

    def note(model, samples, settings, **_):
        seen.append((samples.batch(3, 2)[0], settings, model.head.weight.detach().clone()))
        raise InterruptedError

    monkeypatch.setattr(bench, "train", note)
    for name, seed in (("gpt2", 1), ("rope", 1), ("gpt2", 1), ("gpt2", 2)):
        with pytest.raises(InterruptedError):
            bench.learn_tales(name, seed, 7)
    stories, settings, weights = zip(*seen, strict=True)
    assert torch.equal(stories[0], stories[1])
    assert not torch.equal(stories[0], stories[3])
    assert settings[0] == settings[1]
    assert (settings[0].max_steps, settings[0].seed) == (7, 1)
    assert torch.equal(weights[0], weights[2])
    assert not torch.equal(weights[0], weights[3])


def test_the_loss_by_position_is_the_models_own(bench):
    model = bench.fresh("rope", 0)
    inputs = torch.randint(177, (3, 64), generator=torch.Generator().manual_seed(0))
    targets = inputs.roll(1, dims=1)
    with torch.no_grad():
        expected = -model(inputs).double().log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    found = bench.losses_of(model, inputs, targets)
    assert torch.allclose(found.double(), expected, atol=1e-5)
    means = [expected[:, at : at + 16].mean().item() for at in range(0, 64, 16)]
    assert bench.in_bins(found) == pytest.approx(means, abs=1e-5)


def test_a_row_of_stories_is_stories_between_end_marks(bench):
    ids = bench.row_of_stories(5, 3)
    words = tales.TalesTokenizer().decode(ids).split(tales.END_OF_TEXT)
    assert words[0] == ""
    assert [tales.check(story) for story in words[1:]] == [None] * 5


def test_the_middle_of_the_ratios(bench):
    assert bench.middle([2.0, 4.0, 9.0, 4.0, 5.0], [1.0, 1.0, 1.0, 1.0, 1.0]) == [4.0, 4.0, 5.0]
    assert bench.middle([3.0, 1.0, 8.0], [1.0, 2.0, 4.0]) == [2.0, 1.25, 2.5]


# ------------------------------------------------------------------ the command


@pytest.fixture(scope="module")
def small(bench, tmp_path_factory):
    """A run of losses alone: two models, two steps."""
    out = tmp_path_factory.mktemp("variants") / "made" / "results.json"
    arguments = ("--only", "losses", "--variants", "rope", "--steps", 2, "--seeds", 0, 5, "--jobs", 1, "--out", out)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "HELD_OUT", 30)
        patch.setattr(bench, "STORIES", 4)
        return run(bench, *arguments), out, arguments


def test_a_run_of_losses_leaves_what_was_learned_and_where_it_ran(bench, small):
    printed, out, _ = small
    results = json.loads(out.read_text())
    losses = results["losses"]
    assert [(r["model"], r["seed"]) for r in losses["runs"]] == [("gpt2", 0), ("gpt2", 5), ("rope", 0), ("rope", 5)]
    for one in losses["runs"]:
        assert one["above_floor"] == one["loss"] - one["floor"] == one["curve"][-1][1]
        assert 0 <= one["grammatical"] <= 4
        assert [tokens for tokens, _ in one["curve"]] == sorted({tokens for tokens, _ in one["curve"]})
        assert one["curve"][0][0] == 0
        assert one["curve"][0][1] == pytest.approx(math.log(177) - one["floor"], abs=0.5)  # nothing is known yet
    assert [len(one["whole"]) for one in losses["windows"]["runs"]] == [8] * 4
    assert "unfinished" not in losses
    assert losses["machine"]["versions"]["torch"] == torch.__version__
    assert "--steps 2" in losses["command"]
    assert "speed" not in results
    assert markdown_table(results, ("gpt2", "rope")) in printed


def test_what_was_broken_off_goes_on_and_what_ended_begins_anew(bench, small, monkeypatch):
    _, out, arguments = small
    whole = json.loads(out.read_text())
    asked = []

    def work_off(tasks, *_):
        asked.append([(function.__name__, *rest[:2]) for function, *rest in tasks])
        return []

    monkeypatch.setattr(bench, "work_off", work_off)
    cut = json.loads(out.read_text())
    del cut["losses"]["runs"][2]
    cut["losses"]["unfinished"] = True
    for stored in (whole, cut, cut | {"losses": cut["losses"] | {"steps": 3}}):
        out.write_text(json.dumps(stored))
        run(bench, *arguments)
    out.write_text(json.dumps(whole))
    assert [len(tasks) for tasks in asked] == [8, 1, 8]
    assert asked[1] == [("learn_tales", "rope", 0)]


def test_each_part_leaves_the_others_as_they_are(bench, small, monkeypatch):
    _, out, _ = small
    before = json.loads(out.read_text())
    monkeypatch.setattr(bench, "measure_speed", lambda names, rounds: {"rounds": rounds, "nano": {"training": names}})
    monkeypatch.setattr(bench, "markdown_table", lambda *_: "")
    run(bench, "--only", "speed", "--rounds", 2, "--out", out)
    after = json.loads(out.read_text())
    assert after.pop("speed")["rounds"] == 2
    assert after == before
    out.write_text(json.dumps(before))


def test_times_are_ratios_to_gpt2_of_the_same_round(bench, monkeypatch):
    class Clock:
        """GPT-2 takes 2 s, rope 3 s; a round later twice as much, as on a machine that got busy."""

        def __init__(self, load, *_):
            self.seconds = 3.0 if load.cfg["positions"] == "rope" else 2.0

        def turn(self):
            self.seconds *= 2
            return {"step": self.seconds}

    monkeypatch.setitem(bench.TASKS, "training", (Clock, "step", 1))
    with contextlib.redirect_stderr(io.StringIO()):
        found = bench.race("nano", "training", ["gpt2", "rope"], 3, 0)
    assert found["rope"]["ratio"] == [1.5, 1.5, 1.5]
    assert found["gpt2"] == {"milliseconds": 16_000.0, "ratio": [1.0, 1.0, 1.0]}  # the first of the rounds warmed up


def test_the_real_race_runs(bench):
    with contextlib.redirect_stderr(io.StringIO()):
        found = bench.race("nano", "generation", ["gpt2", "all_four"], 1, 0)
    assert all(cell["milliseconds"] > 0 for cell in found.values())


def test_wrong_arguments_are_named(bench, capsys):
    for wrong, said in (
        (["--steps", "0"], "--steps must be 1 or more, got 0"),
        (["--seeds", "-1"], "--seeds must be 0 or more, got -1"),
        (["--variants", "alibi"], "invalid choice: 'alibi'"),
        (["--quick"], "would overwrite the published results"),
        (["--only", "losses", "--variants", "rope"], "would overwrite the published results"),
    ):
        with pytest.raises(SystemExit):
            bench.read_arguments(wrong)
        assert said in capsys.readouterr().err


# ------------------------------------------------------------------ the pages


@pytest.mark.parametrize("page", PAGES)
def test_the_numbers_on_a_page_are_those_of_the_results(bench, published, page):
    text = (FOLDER / page).read_text(encoding="utf-8")
    assert len(bench.BLOCK.findall(text)) == 1
    assert bench.BLOCK.search(text)[0].split("-->\n", 1)[1].startswith(block(published, page))
    assert len(text.splitlines()) <= 90


def test_the_readmes_table_has_every_model(published):
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert markdown_table(published) in text
    assert all(f"| {label} |" in text for label in LABELS.values())


def test_the_published_run_is_whole(bench, published):
    losses = published["losses"]
    assert "unfinished" not in losses
    assert losses["settings"] == json.loads(json.dumps(bench.asdict(bench.recipe(losses["steps"], 0))))
    assert {(run["model"], run["seed"]) for run in losses["runs"]} == {(m, s) for m in LABELS for s in losses["seeds"]}
    assert published["costs"] == {name: bench.costs(name) for name in LABELS}
    assert len(losses["seeds"]) >= 3


def quotes(text: str) -> list[tuple[str, str]]:
    return re.findall(r"^From `([^`\n]+)`:\n```py\n(.*?)```", text, flags=re.M | re.S)


@pytest.mark.parametrize("page", [page for page in PAGES if page != "README.md"])
def test_quoted_code_stands_where_the_page_says(page):
    import ast

    text = (FOLDER / page).read_text(encoding="utf-8")
    assert len(quotes(text)) == text.count("```py\n") >= 2
    for reference, code in quotes(text):
        path, _, symbol = reference.partition("::")
        source = (ROOT / path).read_text(encoding="utf-8")
        node = ast.parse(source)
        for name in symbol.split("."):
            node = next(child for child in node.body if getattr(child, "name", None) == name)
        lines = source.splitlines()[node.lineno - 1 : node.end_lineno]
        length = len(code.splitlines())
        pieces = [textwrap.dedent("\n".join(lines[at : at + length])) for at in range(len(lines))]
        assert code.rstrip("\n") in pieces, f"{reference} has no such lines"


@pytest.mark.parametrize("page", PAGES)
def test_the_python_of_a_page_prints_what_the_page_says(page):
    text = (FOLDER / page).read_text(encoding="utf-8")
    examples = re.findall(r"```python\n(.*?)```\n```text\n(.*?)```", text, flags=re.S)
    assert len(examples) == text.count("```python\n") == 1
    for code, expected in examples:
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(compile(code, page, "exec"), {})
        assert printed.getvalue() == expected


@pytest.mark.parametrize("page", PAGES)
def test_every_command_file_and_picture_of_a_page_is_there(bench, page):
    text = (FOLDER / page).read_text(encoding="utf-8")
    commands = re.findall(r"python benchmarks/variants_on_tales\.py([^`#\n]*)", text)
    assert commands
    for command in commands:
        bench.read_arguments(shlex.split(command))
    prose = re.sub(r"```.*?```", "", text, flags=re.S)
    for target in re.findall(r"\]\(([^)]+)\)", prose):
        assert (FOLDER / target).is_file(), target
        assert (FOLDER / target).stat().st_size < 150_000
    for path in re.findall(r"`([\w./-]+\.(?:py|md|json))`", text):
        assert (ROOT / path).is_file(), path


def refusal(**changes) -> str:
    """What is said when GPT-2's weights are loaded into a variant."""
    weights = GPTModel(from_preset("nano", n_layers=1, vocab_size=10)).state_dict()
    with pytest.raises(ValueError) as error:
        GPTModel.from_pretrained(weights, from_preset("nano", n_layers=1, vocab_size=10, **changes))
    return str(error.value)


def test_gpt2s_weights_are_refused_by_each_variant_as_the_pages_say():
    assert "4 different key-value heads" in refusal(n_kv_heads=2)
    assert "position_embedding.weight is not part of this model" in refusal(positions="rope")
    assert "norm_1.bias is not part of this model" in refusal(norm="rmsnorm")
    assert "gate_proj.weight is missing" in refusal(mlp="swiglu")


def test_the_parameters_that_the_pages_name():
    def count(preset: str, **changes) -> int:
        with torch.device("meta"):
            return GPTModel(from_preset(preset, **changes)).num_parameters()

    for preset, change, fewer in (
        ("nano", {"positions": "rope"}, 16_384),
        ("gpt2", {"positions": "rope"}, 786_432),
        ("nano", {"norm": "rmsnorm"}, 640),
        ("gpt2", {"norm": "rmsnorm"}, 19_200),
    ):
        assert count(preset) - count(preset, **change) == fewer
        page = "rotary_positions.md" if "positions" in change else "rmsnorm.md"
        assert f"{fewer:,}" in (FOLDER / page).read_text(encoding="utf-8")
