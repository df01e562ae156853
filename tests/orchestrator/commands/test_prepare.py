"""`prepare`: what it prints is what it made, train.py finds it, and all that is wrong is said at once."""

import argparse
import json
import re
from pathlib import Path

import pytest

from orchestrator.commands import prepare
from orchestrator.text.prepare import UNFINISHED, open_prepared
from orchestrator.text.samples import open_samples

TEXT = " ".join(f"number {i} follows number {i - 1}." for i in range(800))


@pytest.fixture
def book(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("book.txt").write_text(TEXT)
    return "book.txt"


def run(*argv: str) -> int:
    parser = argparse.ArgumentParser()
    prepare.add_arguments(parser)
    return prepare.run(parser.parse_args(argv))


def test_what_is_printed_is_what_was_made(book, capsys):
    assert run(book, "--tokenizer", "char", "--out", "made", "--workers", "1") == 0
    told = capsys.readouterr().out
    made = open_prepared("made")
    assert f"book.txt: 1 document, {len(TEXT):,} characters, in made" in told
    assert re.search(rf"training +{made.train_tokens:,} tokens in 1 shard\n", told)
    assert re.search(rf"validation +{made.validation_tokens:,} tokens in 1 shard: the last 10% of the text\n", told)
    assert f"tokenizer char, vocabulary {len(set(TEXT)) + 1}, 1.00 bytes per token" in told
    assert re.search(r"^\d+\.\d s, [\d,]+ tokens/s, at most 1 process$", told, re.M)
    assert told.endswith("train on it: python train.py --dataset made\n")
    samples = open_samples("made", context_length=32)  # as that line says
    assert samples.tokenizer.name == "char"


def test_the_same_command_again_finds_it_there(book, capsys):
    run("--dataset", book, "--tokenizer", "bytes", "--out", "made")
    capsys.readouterr()
    assert run(book, "--tokenizer", "bytes", "--out", "made") == 0
    told = capsys.readouterr().out
    assert "it was there already" in told
    assert "tokens/s" not in told


def test_without_a_folder_it_goes_where_training_looks_for_it(book, capsys):
    assert run(book, "--tokenizer", "bytes") == 0
    (folder,) = Path("data/prepared").iterdir()
    assert capsys.readouterr().out.endswith(f"train on it: python train.py --dataset {folder}\n")
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    open_samples(book, "bytes", context_length=32, progress=False)
    assert list(Path("data/prepared").iterdir()) == [folder]
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_it_says_that_it_goes_on(book, capsys):
    run(book, "--tokenizer", "bytes", "--out", "made")
    manifest = json.loads(Path("made/manifest.json").read_text())
    begun = {key: manifest[key] for key in ("format", "name", "settings", "text", "tokenizer")}
    Path("made", UNFINISHED).write_text(json.dumps(begun))  # as an interruption after the first shard leaves it
    Path("made/manifest.json").unlink()
    Path("made/validation-00000.tokens").unlink()
    capsys.readouterr()
    assert run(book, "--tokenizer", "bytes", "--out", "made") == 0
    told = capsys.readouterr().out
    assert told.startswith("going on from 1 finished shard in made\n")
    assert "tokens/s" not in told  # of what was made before, no speed is known
    assert json.loads(Path("made/manifest.json").read_text()) == manifest


def test_other_validation_splits_are_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("many.txt").write_text("<|endoftext|>".join(f"document {i:02d}" for i in range(60)))
    run("many.txt", "--tokenizer", "bytes", "--out", "many", "--validation_part", "0.2")
    assert "whole documents, evenly spread, about 20%" in capsys.readouterr().out
    Path("splits").mkdir()
    Path("splits/train.txt").write_text("to train on")
    Path("splits/validation.txt").write_text("to validate on")
    run("splits", "--tokenizer", "bytes", "--out", "own")
    assert "the validation split of the data set" in capsys.readouterr().out


def test_all_that_is_wrong_is_said_at_once():
    with pytest.raises(ValueError) as error:
        run("--tokenizer", "byte", "--workers", "0", "--validation_part", "2")
    told = str(error.value)
    assert told.startswith("4 things are wrong:\n  which text?")
    for words in ("got 'byte'. Did you mean 'bytes'?", "--workers must be", "--validation_part must be"):
        assert words in told
    with pytest.raises(ValueError, match=r"^two data sets are named, a and --dataset b: leave one out"):
        run("a", "--dataset", "b")


@pytest.mark.parametrize("value", ["", "x", "nan", "-0.1", "0", "0.51", "inf"])
def test_a_part_that_is_none(value):
    with pytest.raises(ValueError, match=r"--validation_part must be a number above 0 and at most 0.5"):
        run("a", "--validation_part", value)


def test_a_data_set_that_is_not_there_is_an_error_and_nothing_is_made(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"missing.txt"):
        run("missing.txt", "--out", "made")
    assert list(tmp_path.iterdir()) == []
