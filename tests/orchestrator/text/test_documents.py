"""A name, a file, a folder or a glob becomes a source; what cannot become one is said, with what to do."""

import os
import pickle
import re

import datasets
import huggingface_hub
import pytest

from orchestrator.text import tales
from orchestrator.text.corpora import TalesCorpus, python_docs
from orchestrator.text.documents import NAMES, Source, find_source

MARK = "<|endoftext|>"


def written(path, content="some text"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def all_documents(source):
    return [document for part in source.parts for document in source.documents(part)]


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """No network and an empty cache, whatever this machine has."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))


def test_a_file_is_a_source(tmp_path):
    path = written(tmp_path / "a.txt", f"one{MARK} {MARK}two")
    source = find_source(str(path))
    assert (source.name, source.parts, source.validation_parts) == (str(path), (path,), ())
    assert all_documents(source) == ["one", "two"]
    assert find_source(path) == source
    assert find_source(written(tmp_path / "program.py", "x = 1")).files  # named by the user: text, whatever its suffix
    assert all_documents(pickle.loads(pickle.dumps(source))) == ["one", "two"]


def test_a_folder_gives_all_its_text_in_order_and_nothing_hidden(tmp_path):
    names = ["b.md", "a/z.txt", "a/deep/y.jsonl", "c.rst.gz", "B.TEXT", "x.parquet"]
    for name in [*names, ".hidden.txt", ".git/config.txt", "a/.b/c.md", "picture.png", "data.csv"]:
        written(tmp_path / "corpus" / name, '{"text": "some text"}')
    source = find_source(tmp_path / "corpus")
    assert source.files == tuple(tmp_path / "corpus" / name for name in sorted(names))
    assert source.validation_files == ()


def test_a_folder_whose_every_file_names_a_split_is_read_by_splits(tmp_path):
    for name in ("train-0.txt", "train-1.txt", "valid.txt", "test.txt"):
        written(tmp_path / name)
    source = find_source(tmp_path)
    assert source.files == (tmp_path / "train-0.txt", tmp_path / "train-1.txt")
    assert source.validation_files == (tmp_path / "valid.txt",)
    written(tmp_path / "another.txt")  # then these names mean nothing
    assert len(find_source(tmp_path).files) == 5
    for name in ("train-0.txt", "train-1.txt", "another.txt"):
        (tmp_path / name).unlink()
    assert len(find_source(tmp_path).files) == 2


def test_a_glob_gives_what_it_matches(tmp_path, monkeypatch):
    for name in ("b.txt", "a.txt", "c.py", "deep/er/d.txt", ".e.txt"):
        written(tmp_path / "corpus" / name)
    monkeypatch.chdir(tmp_path)
    names = {
        pattern: [file.as_posix() for file in find_source(pattern).files]
        for pattern in ("corpus/*.txt", "corpus/**/*.txt", "corpus/[bc].*")
    }
    assert names == {
        "corpus/*.txt": ["corpus/a.txt", "corpus/b.txt"],
        "corpus/**/*.txt": ["corpus/a.txt", "corpus/b.txt", "corpus/deep/er/d.txt"],
        "corpus/[bc].*": ["corpus/b.txt", "corpus/c.py"],
    }
    written(tmp_path / "odd[1].txt")
    assert len(find_source("odd[1].txt").files) == 1  # a file that is there is no pattern
    with pytest.raises(FileNotFoundError, match="no file matches this pattern"):
        find_source("corpus/*.jsonl")


def test_the_house_has_texts_of_its_own():
    source = find_source("python-docs")
    assert source.parts == (None,)
    assert MARK.join(all_documents(source)) == python_docs()
    told = find_source("tales")
    stories = all_documents(told)
    assert len(stories) == 10_000
    assert all(tales.check(story) is None for story in stories[::100])
    assert not set(stories) & set(TalesCorpus(0).held_out)
    assert find_source("tales") == told
    assert told.fingerprint != source.fingerprint
    assert list(Source("a", text=f"one{MARK} {MARK}two").documents()) == ["one", "two"]
    with pytest.raises(ValueError, match="pass one of its parts"):
        Source("a", (os.devnull,)).documents()


def test_a_hub_data_set_is_read_from_the_copy_in_the_data_folder(tmp_path, offline):
    folder = tmp_path / "data/wikitext/wikitext-103-raw-v1"
    folder.mkdir(parents=True)
    rows = {"train": ["", " = One = \n", "", " Text . \n", "", " = Two = \n", "", " More . \n"]}
    rows |= {"validation": ["", " = Three = \n", "", " Held out . \n"], "test": ["", " = Four = \n", ""]}
    for split, texts in rows.items():
        datasets.Dataset.from_dict({"text": texts}).to_parquet(folder / f"{split}-00000-of-00001.parquet")
    source = find_source("wikitext", tmp_path / "data")
    assert [" ".join(text.split()) for text in all_documents(source)] == ["= One = Text .", "= Two = More ."]
    (part,) = source.validation_parts
    assert [" ".join(text.split()) for text in source.documents(part)] == ["= Three = Held out ."]
    assert find_source("Salesforce/wikitext:wikitext-103-raw-v1", tmp_path / "data").files == source.files

    stories = ["One day.", "Another day."]
    folder = tmp_path / "data/tinystories/data"
    folder.mkdir(parents=True)
    datasets.Dataset.from_dict({"text": stories}).to_parquet(folder / "train-00000-of-00001-0a1b.parquet")
    assert all_documents(find_source("tinystories", tmp_path / "data")) == stories  # rows are documents there


def test_a_name_goes_before_a_folder_that_is_called_so(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("tales/a.txt", "tinystories/a.txt", "data/tinystories/train.txt"):
        written(tmp_path / name)
    assert find_source("tales").text
    assert [file.as_posix() for file in find_source("tinystories").files] == ["data/tinystories/train.txt"]
    assert [file.as_posix() for file in find_source("./tinystories").files] == ["tinystories/a.txt"]


def test_a_hub_data_set_that_is_nowhere_says_what_to_do(tmp_path, offline):
    for name in ("wikitext", "TinyStories", "openwebtext", "fineweb-edu", "someone/things", "someone/things:part"):
        with pytest.raises(ConnectionError, match=r"the hub cannot be reached \(OfflineModeIsEnabled") as error:
            find_source(name, tmp_path / "data")
        assert f"put the files into {tmp_path}/data/" in str(error.value)


def test_the_fingerprint_changes_when_a_file_does(tmp_path):
    one, two = written(tmp_path / "c/a.txt", "one"), written(tmp_path / "c/b.txt", "two")
    os.utime(one, ns=(1, 1))
    os.utime(two, ns=(1, 1))
    seen = [find_source(tmp_path / "c").fingerprint]
    assert find_source(tmp_path / "c/*.txt").fingerprint == seen[0]  # the same files, found another way
    os.utime(two, ns=(1, 2))  # touched, and that is all
    seen.append(find_source(tmp_path / "c").fingerprint)
    written(two, "three")
    os.utime(two, ns=(1, 2))  # another size at the same time
    seen.append(find_source(tmp_path / "c").fingerprint)
    two.rename(tmp_path / "c/d.txt")
    seen.append(find_source(tmp_path / "c").fingerprint)
    written(tmp_path / "c/e.txt", "")
    seen.append(find_source(tmp_path / "c").fingerprint)
    seen.append(find_source(one).fingerprint)
    files = (one, tmp_path / "c/d.txt", tmp_path / "c/e.txt")
    seen.append(Source("c", files, articles=True).fingerprint)
    seen.append(Source("c", files[:2], files[2:]).fingerprint)  # one of them held out
    seen.append(Source("c", files, field="body").fingerprint)
    assert len(set(seen)) == len(seen) == 9
    assert Source("c", files).fingerprint == seen[4]


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ("wikitex", "Did you mean 'wikitext'"),
        ("Tales", "Did you mean 'tales'"),
        ("pythondocs", "Did you mean 'python-docs'"),
        ("fineweb_edu", "Did you mean 'fineweb-edu'"),
        ("openwebtxt:a-long-configuration-2024", "Did you mean 'openwebtext'"),
        ("qqqq", re.escape(f"no such file, folder or data set. Data sets: {', '.join(NAMES)}, or owner/name")),
        ("", "no such file, folder or data set"),
        ("books/missing.txt", "no such file"),  # a file by its suffix, not owner/name
        ("here/missing", "no such file"),  # the folder is there
        ("/nowhere/at/all", "no such file"),
        ("~/no-such-folder-here", "no such file"),
    ],
)
def test_a_name_that_means_nothing_is_said_with_the_nearest(tmp_path, monkeypatch, dataset, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    with pytest.raises(FileNotFoundError, match=message):
        find_source(dataset)


def test_nothing_to_read_is_said(tmp_path):
    written(tmp_path / "none/picture.png")
    with pytest.raises(FileNotFoundError, match=r"none holds no text, JSONL or parquet files \(\.txt, "):
        find_source(tmp_path / "none")
    datasets.Dataset.from_dict({"text": ["", " "]}).to_parquet(tmp_path / "e.parquet")
    for name, content in (("a.txt", ""), ("b.txt", " \n"), ("c.jsonl", '{"text": ""}\n')):
        written(tmp_path / "empty" / name, content)
        with pytest.raises(ValueError, match=f"{name} is empty"):
            find_source(tmp_path / "empty" / name)
    for empty in (tmp_path / "empty", tmp_path / "e.parquet", tmp_path / "empty" / "*"):
        with pytest.raises(ValueError, match="is empty: there is no text in it"):
            find_source(empty)
    written(tmp_path / "empty/z.txt", " x")
    assert all_documents(find_source(tmp_path / "empty")) == [" x"]  # empty files among others are passed over


def test_a_file_that_cannot_be_read_is_said_before_hours_of_preparing(tmp_path):
    with pytest.raises(ValueError, match="binary file"):
        find_source(written(tmp_path / "a.bin", b"\x7fELF\0\0"))
    with pytest.raises(ValueError, match=r"has no field 'text'\. Its fields: 'content'"):
        find_source(written(tmp_path / "a.jsonl", '{"content": "x"}'))
