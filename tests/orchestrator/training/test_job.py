"""A run from its options to its folder; and what is wrong with them, in a line, before anything is done."""

import contextlib
import hashlib
import importlib
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

from CMHA.implementations import IMPLEMENTATIONS
from GPT2Model.config import from_preset
from GPT2Model.gpt2 import GPTModel
from orchestrator.cli import main as command_line
from orchestrator.commands.train import main
from orchestrator.training.final import open_trained
from orchestrator.training.job import alone_in, assemble
from orchestrator.training.options import SETTINGS_FILE, Options, from_toml, parse

SENTENCES = "It was a dark and stormy night; the rain fell in torrents, except at occasional intervals. " * 60
SMALL = {"n_layers": 1, "n_heads": 2, "emb_dim": 16, "max_length": 16, "device": "cpu", "dtype": "fp32"}
SHORT = {"batch_size": 4, "max_steps": 6, "eval_steps": 3, "save_steps": 2}


def words(**options) -> list[str]:
    """Options as a command line."""
    found = []
    for name, value in (SMALL | SHORT | options).items():
        if value is True:
            found.append(f"--{name}")
        elif value is not None:
            found += [f"--{name}", str(value)]
    return found


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """An empty folder to work in, with a text."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "night.txt").write_text(SENTENCES)
    return tmp_path


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """The folder of a run that came to its end."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "night.txt").write_text(SENTENCES)
    with contextlib.chdir(folder):
        code = main(words(dataset="night.txt", tokenizer="char", out="run", eval_on_start=True, eval_tokens=10**6))
    assert code == 0
    return folder / "run"


def events(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def looks(run: Path) -> list[tuple[int, float]]:
    return [(event["step"], event["loss"]) for event in events(run) if event["event"] == "evaluation"]


def hashes(folder: Path) -> dict[str, str]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


# --- what a run leaves ----------------------------------------------------------------------------------------------


def test_what_the_folder_of_a_run_holds(trained):
    there = {str(path.relative_to(trained)) for path in trained.rglob("*") if path.is_file()}
    for file in (
        SETTINGS_FILE, "metrics.jsonl", "report.json", "final/model.safetensors", "final/config.json",
        "final/tokenizer_facts.json", "figures/loss.png", "checkpoints/step-6/model.safetensors",
    ):  # fmt: skip
        assert file in there
    assert not [name for name in there if "partial" in name or name.endswith(".tmp")]
    assert (trained / "figures" / "loss.png").read_bytes().startswith(b"\x89PNG")
    report = json.loads((trained / "report.json").read_text())
    assert (report["counters"]["step"], report["counters"]["skipped"]) == (6, 0)
    assert report["counters"]["tokens"] == 6 * 4 * 16


def test_the_settings_of_the_run_are_all_there_and_make_the_same_run(trained, tmp_path):
    settings = tomllib.loads((trained / SETTINGS_FILE).read_text())
    assert settings["learning_rate"] == pytest.approx(6e-4 * 768 / 16)
    assert (settings["batch_size"], settings["warmup_steps"], settings["max_length"]) == (4, 0, 16)
    with contextlib.chdir(trained.parent):
        assert main(["--config", str(trained / SETTINGS_FILE), "--out", str(tmp_path / "again")]) == 0
    assert looks(tmp_path / "again") == looks(trained)
    for name in ("model.safetensors", "tokenizer_facts.json", "config.json"):
        assert (tmp_path / "again" / "final" / name).read_bytes() == (trained / "final" / name).read_bytes()


def test_it_looked_before_the_first_step_then_every_third_and_at_each_checkpoint(trained):
    assert [step for step, _ in looks(trained)] == [0, 2, 3, 4, 6]  # and at each checkpoint
    first = looks(trained)[0][1]
    assert first == pytest.approx(torch.tensor(len(set(SENTENCES)) + 1.0).log().item(), abs=0.5)
    assert looks(trained)[-1][1] < first


def test_without_the_option_it_does_not_look_before_the_first_step(here):
    assert main(words(dataset="night.txt", tokenizer="char", out="run")) == 0
    assert [step for step, _ in looks(here / "run")] == [2, 3, 4, 6]


def held_out_ids(trained) -> list[int]:
    """The last tenth of the text behind the token that opens it, by a tokenizer written out here."""
    characters = sorted(set(SENTENCES))
    (manifest,) = trained.parent.glob("data/prepared/*/manifest.json")
    count = json.loads(manifest.read_text())["totals"]["validation_tokens"]
    assert abs(count - len(SENTENCES) / 10) < 10
    return [len(characters)] + [characters.index(c) for c in SENTENCES[-(count - 1) :]]


@pytest.mark.parametrize("library", ["ours", "transformers"])
def test_the_final_model_has_the_validation_loss_that_was_logged(trained, library):
    if library == "ours":
        model = GPTModel.from_pretrained(trained / "final")
    else:
        from transformers import GPT2LMHeadModel

        hugging_face = GPT2LMHeadModel.from_pretrained(trained / "final").eval()

        def model(ids):
            return hugging_face(ids).logits

    ids, total = held_out_ids(trained), 0.0
    for start in range(0, len(ids) - 1, 16):
        window = torch.tensor([ids[start : start + 17]])
        with torch.no_grad():
            scores = model(window[:, :-1]).double().log_softmax(-1)
        total -= scores[0].gather(1, window[0, 1:, None]).sum().item()
    assert looks(trained)[-1][1] == pytest.approx(total / (len(ids) - 1), rel=1e-5)


def test_a_run_is_opened_with_its_tokenizer(trained):
    for folder in (trained, trained / "final", trained / "checkpoints" / "step-6"):
        model, tokenizer = open_trained(folder)
        assert tokenizer.decode(tokenizer.encode("the rain fell")) == "the rain fell"
        assert model.cfg["vocab_size"] == tokenizer.vocab_size == len(set(SENTENCES)) + 1
        wanted = GPTModel.from_pretrained(trained / "final").state_dict()
        assert all(torch.equal(tensor, wanted[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(FileNotFoundError, match="a run that came to its end"):
        open_trained(trained / "figures")


@pytest.mark.parametrize(("tokenizer", "vocabulary"), [("bytes", 257), ("gpt2", 50257), (None, 50257)])
def test_the_tokenizers(here, tokenizer, vocabulary):
    (here / "night.txt").write_text(SENTENCES * 3)
    assert main(words(dataset="night.txt", tokenizer=tokenizer, out="run", max_steps=1, batch_size=1)) == 0
    model, opened = open_trained(here / "run")
    assert (opened.name, opened.vocab_size) == (tokenizer or "gpt2", vocabulary)
    assert model.cfg["vocab_size"] == vocabulary
    assert opened.decode(opened.encode("É! 日本")) == "É! 日本"


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_files_of_documents_are_read_and_kept_apart(here, kind):
    documents = [f"Night number {i}. " + SENTENCES[:200] for i in range(40)]
    if kind == "jsonl":
        (here / "nights.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    else:
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.table({"text": documents}), here / "nights.parquet")
    options = parse(words(dataset=f"nights.{kind}", tokenizer="bytes", out="run", pack_documents=True))
    job = assemble(options)
    batch = job.samples.batch(0, 32)
    assert batch.documents is not None
    assert (batch.inputs == 256).any()
    assert main(words(dataset=f"nights.{kind}", tokenizer="bytes", out="run", pack_documents=True, max_steps=1)) == 0


def test_what_a_model_of_a_folder_learned_is_where_the_next_run_begins(here, trained):
    options = {"dataset": "night.txt", "tokenizer": "char", "out": "more", "eval_on_start": True, "eval_tokens": 10**6}
    more = {**options, "model": trained / "final", "n_layers": None, "n_heads": None, "emb_dim": None}
    assert main(words(**more, max_steps=1)) == 0
    assert looks(here / "more")[0][1] == pytest.approx(looks(trained)[-1][1], rel=1e-6)


def test_what_it_writes_is_shown(here, capsys):
    assert main(words(dataset="night.txt", tokenizer="char", out="run", sample_steps=3, prompt="the rain")) == 0
    assert capsys.readouterr().out.count("[the rain]") == 2
    assert [event["step"] for event in events(here / "run") if event["event"] == "sample"] == [3, 6]


def test_without_a_prompt_and_steps_one_sample_is_shown_at_the_end(here):
    """`--sample_steps 0: only at the end`, says its help."""
    assert main(words(dataset="night.txt", tokenizer="char", out="run")) == 0
    assert [event["step"] for event in events(here / "run") if event["event"] == "sample"] == [6]


def test_a_finished_run_that_is_resumed_is_finished(here, capsys):
    options = words(dataset="night.txt", tokenizer="char", out="run", max_steps=2, save_steps=50)
    assert main(options) == 0
    weights = (here / "run" / "final" / "model.safetensors").read_bytes()
    assert main(["--resume", "run"]) == 0
    assert (here / "run" / "final" / "model.safetensors").read_bytes() == weights
    assert [event["step"] for event in events(here / "run") if event["event"] == "step"] == [1, 2]
    assert "Traceback" not in capsys.readouterr().err


def test_resume_auto_begins_where_there_is_nothing_yet(here):
    assert main(words(dataset="night.txt", tokenizer="char", out="run", resume="auto", max_steps=1)) == 0


# --- attention ------------------------------------------------------------------------------------------------------


def computed_by(monkeypatch) -> set[str]:
    """The names of the implementations whose own code runs, as it runs."""
    names = set()
    for name, module in IMPLEMENTATIONS.items():
        real = module.attention

        def watched(*given, real=real, name=name, **more):
            names.add(name)
            return real(*given, **more)

        monkeypatch.setattr(module, "attention", watched)
    return names


@pytest.mark.parametrize("name", ["eager", "sdpa", "flash_tiled"])
def test_the_named_implementation_is_the_one_that_computes(here, monkeypatch, name):
    ran = computed_by(monkeypatch)
    assert main(words(dataset="night.txt", tokenizer="char", out="run", attn_implementation=name, max_steps=1)) == 0
    assert ran == {name}
    state = json.loads((here / "run" / "checkpoints" / "step-1" / "state.json").read_text())
    assert state["facts"]["attention"] == name


def test_the_old_flag_warns_and_means_flash_attention_2(here, capsys):
    job = assemble(parse(words(dataset="night.txt", tokenizer="char", out="run", use_flash_attention=True)))
    assert job.model.cfg["attn_implementation"] == "flash_attention_2"
    err = capsys.readouterr().err
    assert "--use_flash_attention is deprecated" in err
    assert "--attn_implementation flash_attention_2" in err


def test_the_old_flag_beside_another_name_is_an_error(here, capsys):
    options = {"use_flash_attention": True, "attn_implementation": "eager"}
    assert main(words(dataset="night.txt", tokenizer="char", out="run", **options)) == 2
    assert "leave out the first" in capsys.readouterr().err
    same = {"use_flash_attention": True, "attn_implementation": "fa2"}
    job = assemble(parse(words(dataset="night.txt", tokenizer="char", out="run", **same)))
    assert job.model.cfg["attn_implementation"] == "flash_attention_2"


def test_an_implementation_that_cannot_serve_says_why_and_another_does(here, capsys, caplog):
    choosing = importlib.import_module("CMHA.choosing.choose")
    choosing.chosen_once.cache_clear()  # a warning comes once in a process, and another test may have had it
    choosing._warned.clear()
    job = assemble(
        parse(words(dataset="night.txt", tokenizer="char", attn_implementation="paged_attention", out="run"))
    )
    report = job.model.attention_report()
    assert report["chosen"] in ("sdpa", "eager")
    said = capsys.readouterr().err + caplog.text
    assert re.search(r"paged_attention cannot be used here.*Using \w+ instead", said)


def test_with_attn_strict_that_is_an_error(here, capsys):
    strict = {"attn_implementation": "paged_attention", "attn_strict": True}
    assert main(words(dataset="night.txt", tokenizer="char", out="run", **strict)) == 2
    assert "paged_attention" in capsys.readouterr().err
    assert not (here / "run").exists()


@pytest.mark.parametrize("name", ["disable_mps_fix", "attn_strict"])
def test_a_switch_of_attention_reaches_the_model(here, trained, name):
    for model in ({}, {"model": trained / "final", "n_layers": None, "n_heads": None, "emb_dim": None}):
        off = assemble(parse(words(dataset="night.txt", tokenizer="char", out="run", **model)))
        on = assemble(parse(words(dataset="night.txt", tokenizer="char", out="run", **model, **{name: True})))
        assert (off.model.cfg[name], on.model.cfg[name]) == (False, True)


# --- seeds ----------------------------------------------------------------------------------------------------------


def test_the_seed_decides_weights_and_order_and_nothing_else_does(here):
    options = {"dataset": "night.txt", "tokenizer": "char", "max_steps": 2}
    for out, seed in (("a", 0), ("b", 0), ("c", 1)):
        torch.rand(3)  # what happened before must not matter
        assert main(words(**options, out=out, seed=seed)) == 0
    a, b, c = ((here / out / "final" / "model.safetensors").read_bytes() for out in "abc")
    assert a == b
    assert a != c
    jobs = [assemble(parse(words(**options, out="d", seed=seed))) for seed in (0, 1)]
    assert not torch.equal(jobs[0].samples.batch(0, 4).inputs, jobs[1].samples.batch(0, 4).inputs)


# --- what is wrong --------------------------------------------------------------------------------------------------


def cut_short(here) -> dict:
    prepared = prepare_here(here, "char")
    shard = next(prepared.glob("train-*"))
    shard.write_bytes(shard.read_bytes()[:-10])
    return {"dataset": prepared, "tokenizer": None}


def of_another_tokenizer(here) -> dict:
    other, prepared = prepare_here(here, "bytes"), prepare_here(here, "char")
    shard = next(prepared.glob("train-*"))
    shard.write_bytes((other / shard.name).read_bytes())
    return {"dataset": prepared, "tokenizer": None}


def prepare_here(here, tokenizer: str) -> Path:
    from orchestrator.text.documents import find_source
    from orchestrator.text.prepare import prepare

    prepare(find_source(str(here / "night.txt")), tokenizer, here / f"shards-{tokenizer}", workers=1, progress=False)
    return here / f"shards-{tokenizer}"


def written(name: str, content: bytes):
    def write(here) -> dict:
        (here / name).write_bytes(content)
        return {"dataset": name}

    return write


def model_of(**changes):
    def save(here) -> dict:
        GPTModel(
            from_preset("nano", n_layers=1, n_heads=2, emb_dim=16, context_length=16, vocab_size=40)
        ).save_pretrained(here / "model")
        return {"model": "model", "n_layers": None, "n_heads": None, "emb_dim": None, **changes}

    return save


def config(text: str):
    def write(here) -> dict:
        (here / "mine.toml").write_text(text)
        return {"config": "mine.toml"}

    return write


def an_old_run(here) -> dict:
    (here / "run" / "checkpoints" / "step-1").mkdir(parents=True)
    return {}


def options(**given):
    return lambda here: given


# name: (what is prepared, which options come of it), what the message says
WRONG = {
    "missing file": (options(dataset="no-such.txt"), ["no-such.txt"]),
    "missing folder": (options(dataset="no/such/folder"), ["no/such/folder"]),
    "a glob of nothing": (options(dataset="texts/*.txt"), ["texts/*.txt"]),
    "empty file": (written("empty.txt", b""), ["empty.txt", "empty|no text"]),
    "binary file": (written("picture.txt", bytes(range(256)) * 40), ["picture.txt", "UTF-8|text"]),
    "an unknown kind of file": (written("table.xlsx", b"PK\x03\x04\xff\xfe" + b"0" * 99), ["table.xlsx"]),
    "no parquet": (written("table.parquet", b"0" * 999), ["table.parquet"]),
    "no JSONL": (written("table.jsonl", b"{]\n"), ["table.jsonl", "line 1|1:"]),
    "a text shorter than a window": (written("short.txt", b"Hello there."), ["short", "too short|shorter"]),
    "a batch larger than the data": (options(batch_size=100_000), ["100000|100,000", "smaller batch"]),
    "more than the context of a model": (model_of(max_length=17), ["max_length", "17", "16"]),
    "no length": (model_of(max_length=0), ["max_length|context_length", "0"]),
    "sizes for a model that has them": (model_of(n_layers=2, emb_dim=8), ["n_layers", "emb_dim"]),
    "a model of a smaller vocabulary": (model_of(tokenizer="bytes"), ["vocabulary", "40", "257"]),
    "a folder that is no model": (options(model=".", n_layers=None, n_heads=None, emb_dim=None), ["config.json"]),
    "a shard cut short": (cut_short, ["train-00000", "truncated|short|bytes"]),
    "a shard of another tokenizer": (of_another_tokenizer, ["train-00000", "tokenizer"]),
    "another tokenizer than that of the shards": (
        lambda here: {"dataset": prepare_here(here, "char"), "tokenizer": "bytes"}, ["'char'", "'bytes'"],
    ),
    "unknown preset": (options(model="nanno"), ["nanno", "nano"]),
    "unknown data set": (options(dataset="tinystorys"), ["tinystorys", "tinystories"]),
    "unknown tokenizer": (options(tokenizer="byte"), ["byte", "bytes"]),
    "a device that is not there": (options(device="cuda:99"), ["cuda:99", "--device"]),
    "an unknown device": (options(device="gpu7"), ["gpu7", "--device"]),
    "unknown dtype": (options(dtype="bfloat16"), ["dtype", "bfloat16", "bf16"]),
    "unknown schedule": (options(schedule="linear"), ["schedule", "linear", "cosine"]),
    "unknown optimizer": (options(optimizer="sgd"), ["optimizer", "sgd", "adamw"]),
    "several wrong numbers": (options(max_steps=0, clip=-1), ["max_steps", "clip"]),
    "no checkpoints": (options(save_steps=0), ["save_steps"]),
    "no checkpoint kept": (options(keep_last=0), ["keep_last"]),
    "samples in negative steps": (options(sample_steps=-1), ["sample_steps"]),
    "a negative seed": (options(seed=-1), ["seed"]),
    "heads that do not divide": (options(n_heads=3), ["n_heads", "emb_dim"]),
    "dropout of everything": (options(drop_rate=1.0), ["drop_rate"]),
    "dropout of everything, of a folder": (model_of(drop_rate=1.0), ["drop_rate"]),
    "unknown attention": (options(attn_implementation="flashh"), ["flashh", "flash"]),
    "attention that cannot serve": (
        options(attn_implementation="flash_attention_3", attn_strict=True), ["flash_attention_3"],
    ),
    "a typo in the config": (config("max_stepz = 3\n"), ["max_stepz", "max_steps"]),
    "a missing config": (options(config="no-such.toml"), ["no-such.toml"]),
    "a wrong value from the config": (config('schedule = "linear"\n'), ["schedule", "linear"]),
    "a prompt that the tokenizer cannot write": (options(prompt="日本"), ["日", "prompt|character"]),
    "an empty prompt": (options(prompt=""), ["prompt"]),
    "a run that is there already": (an_old_run, ["run", "--resume auto", "--out"]),
    "resume auto of no folder": (options(resume="auto", out=None), ["--resume auto", "--out"]),
    "resume of nothing": (options(resume="no-such-run"), ["no-such-run"]),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_said_in_time_and_leaves_nothing(here, capsys, case):
    make, expected = WRONG[case]
    given = {"dataset": "night.txt", "tokenizer": "char", "out": "run", **make(here)}
    if given["tokenizer"] == "char" and given["dataset"] != "night.txt" and "." in str(given["dataset"]):
        given["tokenizer"] = "bytes"
    before = hashes(here / "run")
    capsys.readouterr()
    code = main(words(**given))
    printed = capsys.readouterr()
    assert code == 2, printed.out + printed.err
    assert len(re.findall(r"^error: ", printed.err, flags=re.M)) == 1
    assert "Traceback" not in printed.err
    message = printed.err[printed.err.index("error: ") :]
    for pattern in expected:
        assert any(word in message for word in pattern.split("|")), message
    assert "training" not in printed.out.partition("attention for")[0]
    assert hashes(here / "run") == before
    assert not (here / "run" / "checkpoints").exists() or case == "a run that is there already"
    assert not (here / "runs").exists()


def test_a_second_run_into_the_same_folder_is_refused_and_changes_nothing(trained, capsys):
    before = hashes(trained)
    with contextlib.chdir(trained.parent):
        assert main(words(dataset="night.txt", tokenizer="char", out="run")) == 2
    assert "holds a run already" in capsys.readouterr().err
    assert hashes(trained) == before


def test_a_resume_with_another_architecture_lists_every_difference_and_changes_nothing(trained, capsys):
    before = hashes(trained)
    changes = ["--n_layers", "2", "--emb_dim", "32", "--n_heads", "4", "--seed", "3", "--batch_size", "5"]
    with contextlib.chdir(trained.parent):
        assert main(["--resume", "run", *changes]) == 2
    err = capsys.readouterr().err
    for name, was, now in (
        ("n_layers", 1, 2), ("emb_dim", 16, 32), ("n_heads", 2, 4), ("seed", 0, 3), ("batch_size", 4, 5),
    ):  # fmt: skip
        assert re.search(rf"{name}: {was} was saved, {now} is asked for", err), err
    assert hashes(trained) == before


def test_the_command_is_the_same_under_python_m_orchestrator(here, capsys):
    wrong = words(dataset="no-such.txt", out="run")
    assert command_line(["train", *wrong]) == main(wrong) == 2
    first, second = capsys.readouterr().err.split("error: ")[1:]
    assert first.strip() == second.strip()
    with pytest.raises(SystemExit) as caught:
        command_line(["train", "--help"])
    assert caught.value.code == 0
    assert "--eval_on_start" in capsys.readouterr().out


def test_every_option_was_looked_at_by_some_test_of_this_folder():
    """A list to be lengthened with the options: which test would notice if one were ignored."""
    text = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    elsewhere = {"profile", "tensorboard", "wandb", "data_dir"}
    assert [name for name in vars(Options()) if name not in text and name not in elsewhere] == []


def test_the_saved_settings_are_those_that_ran(trained):
    saved = from_toml(trained / SETTINGS_FILE, Options())
    record = json.loads((trained / "checkpoints" / "step-6" / "state.json").read_text())["facts"]
    assert record["settings"]["learning_rate"] == saved.learning_rate
    assert record["settings"]["dtype"] == saved.dtype == "fp32"
    assert record["cfg"]["n_layers"] == saved.n_layers == 1


# --- what reviewers of the first version broke ----------------------------------------------------------------------


def test_samples_and_their_seeds_change_no_bit_of_a_run_with_dropout(here):
    """Through the job's own way of writing a sample."""
    for out, every in (("quiet", 0), ("talking", 2)):
        assert main(words(dataset="night.txt", tokenizer="char", out=out, drop_rate=0.3, sample_steps=every)) == 0
    weights = [(here / out / "final" / "model.safetensors").read_bytes() for out in ("quiet", "talking")]
    assert weights[0] == weights[1]


def test_a_second_process_may_not_train_in_the_folder_of_a_run_that_goes_on(here, capsys):
    with alone_in(here / "run"):
        code = main(words(dataset="night.txt", tokenizer="char", out="run"))
    assert code == 2
    assert "another process is training in" in capsys.readouterr().err
    assert not (here / "run").exists()
    assert main(words(dataset="night.txt", tokenizer="char", out="run")) == 0


def test_letters_of_another_text_are_not_taken_for_those_that_a_model_learned(trained, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("other.txt").write_text(SENTENCES.translate({code: code + 1000 for code in range(97, 123)}))
    sizes = {name: None for name in ("n_layers", "n_heads", "emb_dim")}
    for model in (trained, trained / "final", trained / "checkpoints" / "step-6"):
        assert main(words(dataset="other.txt", tokenizer="char", model=model, out="run", **sizes)) == 2
        assert "learned the tokens of char" in capsys.readouterr().err
    assert not Path("run").exists()
    Path("same.txt").write_text(SENTENCES)
    assert main(words(dataset="same.txt", tokenizer="char", model=trained, out="run", **sizes)) == 0
    saved = tomllib.loads((Path("run") / SETTINGS_FILE).read_text())
    assert saved["learning_rate"] == pytest.approx(6e-4 * 768 / 16 / 10)  # gentler with weights that know something


def test_a_run_goes_on_from_another_folder_and_never_takes_steps_back(here, tmp_path_factory, monkeypatch, capsys):
    assert main(words(dataset="night.txt", tokenizer="char", out="run")) == 0
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    assert main(["--resume", str(here / "run"), "--max_steps", "4"]) == 2
    assert "6 steps behind it already" in capsys.readouterr().err
    assert tomllib.loads((here / "run" / SETTINGS_FILE).read_text())["max_steps"] == 6
    assert main(["--resume", str(here / "run"), "--max_steps", "8"]) == 0
    assert looks(here / "run")[-1][0] == 8
    assert main(["--resume", str(here / "run" / "final")]) == 2
    assert "is no checkpoint" in capsys.readouterr().err


def test_steps_that_went_wrong_push_no_good_checkpoint_out(here, capsys):
    """A rate that makes every weight infinite at once, after six good steps."""
    assert main(words(dataset="night.txt", tokenizer="char", out="run", keep_last=1)) == 0
    wrong = ["--resume", "run", "--max_steps", "20", "--learning_rate", "1e38", "--clip", "1e30", "--save_steps", "1"]
    assert main(wrong) == 1
    told = capsys.readouterr().err
    before = re.search(r"--resume (\S+) --learning_rate LOWER", told)[1]
    assert all(weight.isfinite().all() for weight in GPTModel.from_pretrained(before).parameters()), told


def test_where_the_last_save_fails_the_exit_code_says_so(here):
    """A real failing write, in a process of its own: no file may grow beyond 20 kB."""
    root = Path(__file__).resolve().parents[3]
    limited = (
        "import resource, runpy, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000));"
        f"sys.argv[0] = {str(root / 'train.py')!r}; sys.path.insert(0, {str(root)!r});"
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    options = words(dataset="night.txt", tokenizer="char", out="run", emb_dim=32)
    ended = subprocess.run([sys.executable, "-c", limited, *options], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 1, ended.stderr
    assert "could not be written" in ended.stderr
    assert "Traceback" not in ended.stderr
