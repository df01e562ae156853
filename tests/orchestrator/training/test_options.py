"""Options: from the command line, from a TOML file, from the run that is resumed; what is wrong, all of it, by name."""

import re
import typing
from dataclasses import asdict, fields, replace

import pytest
import tomli_w
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.training.options import (
    SETTINGS_FILE,
    Options,
    from_toml,
    help_texts,
    markdown_table,
    parse,
    run_folder,
    save_options,
)
from orchestrator.training.settings import TrainSettings

OF_THE_START = ("config", "resume", "out")
NAMES = [field.name for field in fields(Options)]


# --- what becomes of them -------------------------------------------------------------------------------------------


def test_every_knob_of_the_loop_is_an_option_and_reaches_it():
    knobs = {field.name for field in fields(TrainSettings)}
    assert knobs <= set(NAMES)
    other = {
        "max_steps": 77, "batch_size": 3, "learning_rate": 0.011, "warmup_steps": 9, "min_lr_ratio": 0.33,
        "weight_decay": 0.44, "betas": (0.5, 0.6), "clip": 0.7, "eval_steps": 13, "seed": 21,
        "gradient_accumulation_steps": 5, "schedule": "wsd", "decay_part": 0.55, "optimizer": "muon", "dtype": "fp16",
        "compile": True, "activation_checkpointing": True, "loss_chunk_tokens": 99, "eval_tokens": 1234,
        "eval_on_start": True, "max_bad_steps": 8,
    }  # fmt: skip
    assert other.keys() == knobs
    assert all(value != getattr(Options(), name) for name, value in other.items())
    assert asdict(replace(Options(), **other).train_settings(128, 64)) == other


@pytest.mark.parametrize(
    ("emb_dim", "tokens", "device", "rate", "batch"),
    [
        (768, 1024, "cpu", 6e-4, 1),
        (128, 128, "cpu", 36e-4, 8),
        (384, 4096, "cpu", 12e-4, 1),
        (768, 1024, "cuda", 6e-4, 8),
        (128, 128, "cuda", 36e-4, 64),
        (768, 9999, "cuda", 6e-4, 1),
        (768, 1024, "mps", 6e-4, 8),
    ],
)
def test_what_is_left_open_follows_from_the_width_the_length_and_the_device(emb_dim, tokens, device, rate, batch):
    found = Options(max_steps=470).train_settings(emb_dim, tokens, device)
    assert found.learning_rate == pytest.approx(rate, rel=1e-12)
    assert (found.batch_size, found.warmup_steps) == (batch, 23)


def test_without_a_device_the_batch_is_that_of_a_cpu():
    assert Options().train_settings(768, 128) == Options().train_settings(768, 128, "cpu")


@pytest.mark.parametrize("steps", [0, -1, -100])
def test_of_negative_steps_the_warmup_that_follows_from_them_is_not_blamed(steps):
    with pytest.raises(ValueError, match=f"max_steps must be 1 or more, got {steps}") as caught:
        Options(max_steps=steps).train_settings(128, 64)
    assert "warmup_steps" not in str(caught.value)
    with pytest.raises(ValueError, match="warmup_steps must be 0 or more, got -3"):
        Options(max_steps=steps, warmup_steps=-3).train_settings(128, 64)


def test_numbers_that_make_no_sense_are_all_named():
    with pytest.raises(ValueError, match=r"max_steps.*clip|clip.*max_steps") as caught:
        Options(max_steps=0, clip=-1.0, schedule="linear", batch_size=0, keep_last=0).train_settings(128, 64)
    assert all(name in str(caught.value) for name in ("max_steps", "batch_size", "clip", "schedule", "keep_last"))


@pytest.mark.parametrize(("name", "least"), [("sample_steps", 0), ("save_steps", 1), ("keep_last", 1)])
def test_the_numbers_that_the_loop_does_not_know_are_looked_at_too(name, least):
    Options(**{name: least}).train_settings(128, 64)
    with pytest.raises(ValueError, match=f"^{name} must be {least} or more, got {least - 1}.$"):
        Options(**{name: least - 1}).train_settings(128, 64)


# --- there and back -------------------------------------------------------------------------------------------------

TEXTS = st.text(st.characters(codec="utf-8"), max_size=12)
VALUES = {
    str: TEXTS,
    int: st.integers(-(2**63), 2**63 - 1),
    float: st.floats(allow_nan=False),
    bool: st.booleans(),
    tuple[float, float]: st.tuples(*[st.floats(allow_nan=False)] * 2),
}


def values_of(kind) -> st.SearchStrategy:
    if typing.get_origin(kind) is not tuple and (parts := typing.get_args(kind)):
        return st.one_of(st.none(), *(VALUES[part] for part in parts if part is not type(None)))
    return VALUES[kind]


@given(st.fixed_dictionaries({f.name: values_of(f.type) for f in fields(Options) if f.name not in OF_THE_START}))
@settings(max_examples=60, deadline=None)
def test_saved_and_read_again_they_are_the_same(tmp_path_factory, values):
    file = tmp_path_factory.mktemp("options") / SETTINGS_FILE
    options = Options(**values)
    save_options(options, file)
    again = from_toml(file, Options())
    assert again == options
    assert [type(value) for value in asdict(again).values()] == [type(value) for value in asdict(options).values()]


# --- which comes before which ---------------------------------------------------------------------------------------


def test_the_command_line_comes_before_the_config_then_the_resumed_run_then_the_defaults(
    tmp_path,
):
    run, config = tmp_path / "run", tmp_path / "mine.toml"
    run.mkdir()
    save_options(Options(max_steps=11, batch_size=12, eval_steps=13, out="elsewhere"), run / SETTINGS_FILE)
    config.write_text("max_steps = 21\nbatch_size = 22\n")
    found = parse(["--resume", str(run), "--config", str(config), "--max_steps", "31"])
    assert (found.max_steps, found.batch_size, found.eval_steps) == (31, 22, 13)
    assert found.save_steps == Options().save_steps
    assert found.out == str(run)  # where the run is now, not where it was
    assert found == parse([f"--config={config}", f"--resume={run}", "--max_steps=31"])


def test_no_word_is_all_defaults():
    assert parse([]) == Options()


def test_resume_finds_the_run_of_a_checkpoint(tmp_path):
    save_options(Options(max_steps=11), tmp_path / SETTINGS_FILE)
    place = tmp_path / "checkpoints" / "step-5"
    place.mkdir(parents=True)
    assert run_folder(place) == run_folder(tmp_path) == tmp_path
    found = parse(["--resume", str(place)])
    assert (found.max_steps, found.out, found.resume) == (11, str(tmp_path), str(place))


def test_resume_auto_reads_no_other_run(tmp_path):
    assert parse(["--resume", "auto", "--out", str(tmp_path)]) == Options(resume="auto", out=str(tmp_path))


def test_a_new_run_from_the_settings_of_a_resumed_one_resumes_nothing(tmp_path):
    """How a run was started again is no setting of it: its file is used for other runs too."""
    save_options(Options(resume="runs/old", max_steps=11), tmp_path / SETTINGS_FILE)
    found = parse(["--config", str(tmp_path / SETTINGS_FILE), "--out", str(tmp_path / "new")])
    assert (found.resume, found.max_steps) == (None, 11)


# --- the command line -----------------------------------------------------------------------------------------------


def test_the_command_of_the_readme_is_understood():
    line = "--model gpt2 --dataset wikitext --attn_implementation auto --max_steps 100 --eval_on_start --eval_steps 10"
    wanted = {"model": "gpt2", "dataset": "wikitext", "attn_implementation": "auto", "max_steps": 100}
    assert parse(line.split()) == Options(**wanted, eval_on_start=True, eval_steps=10)


def test_underscores_and_hyphens_are_the_same():
    underscores = parse(["--max_steps", "3", "--eval_on_start", "--disable_mps_fix", "--learning_rate=1e-3"])
    hyphens = parse(["--max-steps", "3", "--eval-on-start", "--disable-mps-fix", "--learning-rate=1e-3"])
    assert underscores == hyphens == Options(max_steps=3, eval_on_start=True, disable_mps_fix=True, learning_rate=1e-3)


def test_a_switch_of_a_config_can_be_turned_off_again(tmp_path):
    (tmp_path / "mine.toml").write_text("compile = true\nlearning_rate = 1\n")
    found = parse(["--config", str(tmp_path / "mine.toml"), "--no_compile", "--learning_rate", "None"])
    assert (found.compile, found.learning_rate) == (False, None)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--max_stepz", "3"], ["--max_stepz", "--max_steps"]),
        (["--eval-on-strat"], ["--eval-on-strat", "--eval_on_start"]),
        (["--max_steps", "many"], ["--max_steps", "many"]),
        (["--betas", "0.9"], ["--betas", "2 values"]),
        (["words"], ["words"]),
    ],
)
def test_a_typo_ends_with_two_and_the_right_name(argv, words, capsys):
    with pytest.raises(SystemExit) as caught:
        parse(argv)
    assert caught.value.code == 2
    printed = capsys.readouterr()
    assert all(word in printed.err for word in words)
    assert printed.out == ""


def test_every_option_is_explained_in_the_help(capsys):
    with pytest.raises(SystemExit) as caught:
        parse(["--help"])
    assert caught.value.code == 0
    shown = " ".join(re.sub(r"[│╭╮╰╯─]", " ", capsys.readouterr().out).split())
    texts = help_texts()
    assert texts.keys() == set(NAMES)
    for name in NAMES:
        assert f"--{name}" in shown
        assert len(texts[name]) > 10
        assert " ".join(texts[name].split()) in shown, name


def test_the_table_for_the_readme_has_a_row_for_each_option():
    rows = markdown_table().splitlines()
    assert len(rows) == 2 + len(NAMES)
    for name, row in zip(NAMES, rows[2:], strict=True):
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]]
        default = getattr(Options(), name)
        assert cells[0] == f"`--{name}`"
        assert cells[2] == help_texts()[name]
        if default is None:
            assert cells[1] == ""
        elif default is not False:
            shown = " ".join(map(str, default)) if isinstance(default, tuple) else str(default)
            assert cells[1] == f"`{shown}`"


# --- a config that is wrong -----------------------------------------------------------------------------------------


def wrong(tmp_path, text: str | bytes) -> str:
    file = tmp_path / "wrong.toml"
    file.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(ValueError, match=re.escape(str(file))) as caught:
        parse(["--config", str(file)])
    return str(caught.value)


def test_a_typo_in_a_config_is_named_with_the_option_that_it_may_mean(tmp_path):
    message = wrong(tmp_path, 'max_stepz = 3\nbatchsize = 4\nlr = 0.1\nqqqqqqqq = "x"\n')
    for typo, meant in (("max_stepz", "max_steps"), ("batchsize", "batch_size")):
        assert re.search(rf"{typo!r}.*did you mean {meant!r}", message)
    assert "'qqqqqqqq'" in message
    assert len(message.splitlines()) == 1 + 4


def test_all_wrong_types_of_a_config_are_named_at_once(tmp_path):
    lines = {
        "max_steps": "3.5", "batch_size": '"four"', "eval_on_start": '"yes"', "compile": "1", "model": "3",
        "learning_rate": "true", "betas": "[0.9]", "clip": "[1.0]", "seed": "2026-01-01", "prompt": "false",
    }  # fmt: skip
    message = wrong(tmp_path, "".join(f"{name} = {value}\n" for name, value in lines.items()))
    assert all(re.search(rf"- {name} must be ", message) for name in lines)
    assert len(message.splitlines()) == 1 + len(lines)


def test_a_whole_number_may_stand_for_a_number_and_nothing_else_for_another(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text("learning_rate = 1\nclip = 2\nbetas = [0, 0.5]\n")
    found = parse(["--config", str(file)])
    assert (found.learning_rate, found.clip, found.betas) == (1, 2, (0.0, 0.5))


@pytest.mark.parametrize("text", ["max_steps 3", "max_steps = ", "[[", b"\xff\xfe\x00", "max_steps = 1\nmax_steps = 2"])
def test_what_is_no_toml_is_said_to_be_none(tmp_path, text):
    assert "is not TOML" in wrong(tmp_path, text)


def test_a_table_of_options_is_refused_by_its_name(tmp_path):
    assert "'train'" in wrong(tmp_path, tomli_w.dumps({"train": {"max_steps": 3}}))


def test_a_config_that_is_missing_or_a_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no-such\.toml: no such file"):
        parse(["--config", str(tmp_path / "no-such.toml")])
    with pytest.raises(ValueError, match="cannot be read"):
        parse(["--config", str(tmp_path)])


def test_nothing_to_resume_is_said_before_anything_else(tmp_path):
    with pytest.raises(FileNotFoundError, match="neither the folder of a run"):
        parse(["--resume", str(tmp_path)])
