"""Preparing a text: what comes out says the text again, and nothing that happens on the way changes a byte of it."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import filelock
import pytest

from orchestrator.text.documents import Source
from orchestrator.text.prepare import MANIFEST, UNFINISHED, is_prepared, open_prepared, prepare, settings_name
from orchestrator.text.shards import open_shard

ROOT = Path(__file__).resolve().parents[3]
DOCUMENTS = [f"{i}: Grüße an alle, für die {'sehr ' * (i % 9)}lange Geschichte. 中文\n\n" for i in range(120)]
ONE = "".join(DOCUMENTS)


@pytest.fixture
def book(tmp_path):
    """A text in one piece."""
    path = tmp_path / "book.txt"
    path.write_text(ONE, encoding="utf-8")
    return Source("book", (path,))


@pytest.fixture
def library(tmp_path):
    """Many documents, in two files."""
    for name, part in (("a.jsonl", DOCUMENTS[:70]), ("b.jsonl", DOCUMENTS[70:])):
        (tmp_path / name).write_text("".join(json.dumps({"text": text}) + "\n" for text in part))
    return Source("library", (tmp_path / "a.jsonl", tmp_path / "b.jsonl"))


def ids_of(shards):
    return [i for path in shards for i in open_shard(path).tolist()]


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.name != ".lock"}


@pytest.mark.parametrize("name", ["bytes", "char", "gpt2"])
def test_the_shards_say_the_text_again(book, tmp_path, name):
    prepared = prepare(book, name, tmp_path / "out", shard_characters=1000, progress=False)
    train, held_out = ids_of(prepared.train), ids_of(prepared.validation)
    assert len(prepared.train) > 3
    cut = int(len(ONE) * 0.9)
    assert prepared.tokenizer.decode(train) == "<|endoftext|>" + ONE[:cut]
    assert prepared.tokenizer.decode(held_out) == "<|endoftext|>" + ONE[cut:]
    assert train == [prepared.tokenizer.end_of_text, *prepared.tokenizer.encode(ONE[:cut])]  # cut nowhere else
    assert (prepared.train_tokens, prepared.validation_tokens) == (len(train), len(held_out))
    assert (prepared.documents, prepared.name) == (1, "book")
    totals = prepared.manifest["totals"]
    assert totals["bytes_per_token"] == pytest.approx(len(ONE.encode()) / (len(train) + len(held_out)), abs=1e-4)


def test_every_document_is_opened_by_end_of_text_and_every_tenth_held_out(library, tmp_path):
    prepared = prepare(library, "bytes", tmp_path / "out", shard_characters=700, progress=False)
    train, held_out = ids_of(prepared.train), ids_of(prepared.validation)
    assert train[0] == held_out[0] == 256
    texts = [text.rstrip("\n") for text in prepared.tokenizer.decode(train).split("<|endoftext|>")[1:]]
    assert texts == [text.rstrip("\n") for i, text in enumerate(DOCUMENTS) if i % 10 != 9]
    held = [text.rstrip("\n") for text in prepared.tokenizer.decode(held_out).split("<|endoftext|>")[1:]]
    assert held == [text.rstrip("\n") for text in DOCUMENTS[9::10]]
    assert prepared.documents == 120


def test_the_characters_are_those_of_training_and_validation_text(tmp_path):
    path = tmp_path / "t.txt"
    path.write_text("abc" * 100 + "Z")  # the last character is only in the held-out part
    prepared = prepare(Source("t", (path,)), "char", tmp_path / "out", progress=False)
    assert prepared.tokenizer.vocab_size == 5
    assert prepared.tokenizer.decode(ids_of(prepared.validation)).endswith("abcZ")


def test_it_is_opened_again_as_it_was_made_and_made_only_once(book, tmp_path):
    made = prepare(book, "char", tmp_path / "out", shard_characters=1000, progress=False)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    again = prepare(book, "char", tmp_path / "out", shard_characters=1000, workers=2, progress=False)
    opened = open_prepared(tmp_path / "out")
    for other in (again, opened):
        assert (other.train, other.validation, other.manifest) == (made.train, made.validation, made.manifest)
        assert other.tokenizer.encode(ONE) == made.tokenizer.encode(ONE)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before


def test_other_settings_or_another_text_do_not_go_into_the_same_folder(book, library, tmp_path):
    out = tmp_path / "out"
    prepare(book, "bytes", out, progress=False)
    before = contents(out)
    with pytest.raises(ValueError, match=r"(?s)tokenizer: 'bytes' there, 'char' asked.*part: 0.1 there, 0.2"):
        prepare(book, "char", out, validation_part=0.2, progress=False)
    with pytest.raises(ValueError, match="source_fingerprint"):
        prepare(library, "bytes", out, progress=False)
    book.files[0].write_text(ONE + "One more line.", encoding="utf-8")
    with pytest.raises(ValueError, match=r"source_fingerprint.*(?s:.*)Choose another folder"):
        prepare(book, "bytes", out, progress=False)
    assert contents(out) == before


def test_the_name_of_a_cache_changes_with_all_that_decides_the_shards(book, library):
    names = {settings_name(source, tokenizer, part) for source in (book, library)
             for tokenizer in ("char", "bytes") for part in (0.1, 0.2)}  # fmt: skip
    assert len(names) == 8
    before = settings_name(book, "char")
    book.files[0].write_text(ONE + "One more line.", encoding="utf-8")
    assert settings_name(book, "char") != before


SCRIPT = """
import sys
from pathlib import Path
from orchestrator.text.documents import Source
from orchestrator.text.prepare import prepare

class NeverDone(Source):
    def documents(self, part=None):
        for document in super().documents(part):
            if "the last" in document and Path(sys.argv[2], "preparing.json").exists():  # the second reading
                sys.stdin.readline()  # nobody writes there: until it is killed
            yield document

if __name__ == "__main__":
    text, out, workers = sys.argv[1:]
    source = NeverDone("big", (Path(text),))
    prepare(source, "gpt2", out, workers=int(workers), shard_characters=3000, progress=False)
"""


def test_killed_at_any_moment_it_goes_on_to_the_same_bytes(tmp_path):
    """A real SIGKILL of a real process, at the first shards, and again later; two workers, then one."""
    path, out, script = tmp_path / "big.jsonl", tmp_path / "out", tmp_path / "script.py"
    documents = ["".join(f"Line {i}, {k}: {i * k}.\n" for k in range(60)) for i in range(300)] + ["the last"]
    path.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    script.write_text(SCRIPT)
    big = Source("big", (path,))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    there = 0
    for workers in (2, 1):
        command = [sys.executable, str(script), str(path), str(out), str(workers)]
        process = subprocess.Popen(command, env=environment, **pipes)
        while len(list(out.glob("*.tokens"))) < there + 5:  # the event: more shards than before
            assert process.poll() is None, process.communicate()[1].decode()
        process.send_signal(signal.SIGKILL)
        # The pipes end when the last process that holds them does: no worker outlives its parent.
        process.communicate(timeout=30)
        there = len(list(out.glob("*.tokens")))
        assert process.returncode == -signal.SIGKILL
        with pytest.raises(FileNotFoundError, match=r"is not finished: preparing it was interrupted. Run the same"):
            open_prepared(out)
    kept = {shard: (shard.stat().st_ino, shard.stat().st_mtime_ns) for shard in out.glob("*.tokens")}
    assert len(kept) >= 10
    prepare(big, "gpt2", out, workers=2, shard_characters=3000, progress=False)
    assert {shard: (shard.stat().st_ino, shard.stat().st_mtime_ns) for shard in kept} == kept  # not made twice
    whole = prepare(big, "gpt2", tmp_path / "whole", workers=1, shard_characters=3000, progress=False)
    assert len(whole.train + whole.validation) > len(kept)
    assert contents(out) == contents(tmp_path / "whole")  # no half-written file is left, and no byte differs


def test_a_disk_that_is_full_says_so_and_the_same_call_goes_on(tmp_path):
    path = tmp_path / "t.txt"
    path.write_text(ONE * 20, encoding="utf-8")
    code = (  # a real limit of the system's on the size of files stands for the full disk: the larger shards fail
        "import resource, sys\nfrom pathlib import Path\nfrom orchestrator.text.documents import Source\n"
        "from orchestrator.text.prepare import prepare\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))\n"
        "try:\n"
        "    t = Source('t', (Path(sys.argv[1]),))\n"
        "    prepare(t, 'bytes', sys.argv[2], workers=1, shard_characters=20_000, progress=False)\n"
        "except OSError as error:\n"
        "    print(error)\n"
    )
    command = [sys.executable, "-c", code, str(path), str(tmp_path / "out")]
    told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert "train-00000.tokens cannot be written: File too large" in told.stdout, told.stderr
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [".lock", UNFINISHED]
    t = Source("t", (path,))
    prepare(t, "bytes", tmp_path / "out", shard_characters=20_000, progress=False)
    prepare(t, "bytes", tmp_path / "whole", shard_characters=20_000, progress=False)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_folder_that_cannot_be_made_is_said(book, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"file/out cannot be written: Not a directory. Choose another folder"):
        prepare(book, "bytes", tmp_path / "file" / "out", progress=False)


def test_shards_that_were_lost_or_cut_off_are_made_again(book, tmp_path):
    out = tmp_path / "out"
    prepared = prepare(book, "bytes", out, shard_characters=1000, progress=False)
    before = contents(out)
    prepared.train[1].unlink()
    prepared.train[2].write_bytes(prepared.train[2].read_bytes()[:-7])
    (out / ".train-00001.tokens.123.partial").write_bytes(b"half")  # as a kill in the middle of a write leaves it
    with pytest.raises(FileNotFoundError, match="train-00001"):
        open_prepared(out)
    prepare(book, "bytes", out, shard_characters=1000, progress=False)
    assert contents(out) == before


def test_a_shard_of_another_text_that_is_as_long_is_seen_and_made_again(tmp_path):
    """Whole, of the same tokenizer and the same length: only the hash tells it from the right one."""
    for name, text in (("mine", ONE), ("other", ONE.replace("Grüße", "Größe"))):
        (tmp_path / f"{name}.txt").write_text(text, encoding="utf-8")
    mine, other = (Source(name, (tmp_path / f"{name}.txt",)) for name in ("mine", "other"))
    out, foreign = tmp_path / "out", tmp_path / "foreign"
    prepared = prepare(mine, "bytes", out, shard_characters=1000, progress=False)
    before = contents(out)
    prepare(other, "bytes", foreign, shard_characters=1000, progress=False)
    victim = prepared.train[1]
    shutil.copy(foreign / victim.name, victim)
    assert len(open_shard(victim)) == prepared.manifest["train"][1]["tokens"]
    assert victim.read_bytes() != before[victim.name]
    with pytest.raises(ValueError, match=r"train-00001\.tokens is another shard than the one that .*\.json lists"):
        open_prepared(out)
    prepare(mine, "bytes", out, shard_characters=1000, progress=False)
    assert contents(out) == before


def test_shards_of_an_unknown_text_are_not_taken_for_those_of_this_one(book, library, tmp_path):
    out = tmp_path / "out"
    prepare(library, "bytes", out, shard_characters=1000, progress=False)
    (out / MANIFEST).unlink()  # somebody tidied up
    prepare(book, "bytes", out, shard_characters=1000, progress=False)
    prepare(book, "bytes", tmp_path / "fresh", shard_characters=1000, progress=False)
    assert contents(out) == contents(tmp_path / "fresh")


def test_a_text_that_changes_while_it_is_read_is_an_error(book, tmp_path, monkeypatch):
    """Another program writes to the file between the first reading and the second."""
    from orchestrator.text import prepare as module

    def written_to(*args, **kwargs):
        with open(book.files[0], "a") as file:
            file.write("and one more word")
        return encode_pieces(*args, **kwargs)

    encode_pieces = module.encode_pieces
    monkeypatch.setattr(module, "encode_pieces", written_to)
    with pytest.raises(ValueError, match="changed while it was prepared"):
        prepare(book, "bytes", tmp_path / "out", progress=False)
    assert not (tmp_path / "out" / MANIFEST).exists()
    monkeypatch.undo()
    prepared = prepare(book, "bytes", tmp_path / "out", progress=False)
    assert prepared.tokenizer.decode(ids_of(prepared.validation)).endswith("one more word")


def test_of_two_that_prepare_one_folder_the_second_waits(book, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    command = [
        sys.executable, "-c",
        "import sys; from pathlib import Path; from orchestrator.text.documents import Source\n"
        "from orchestrator.text.prepare import prepare\n"
        "prepare(Source('book', (Path(sys.argv[1]),)), 'bytes', sys.argv[2], progress=False)",
        str(book.files[0]), str(out),
    ]  # fmt: skip
    with filelock.FileLock(out / ".lock"):
        process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
        assert "another process prepares" in process.stderr.readline()  # it has come to the lock
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=1)  # and waits there; without the lock it would have ended
        assert not is_prepared(out)
    assert process.wait(timeout=30) == 0
    process.stderr.close()
    assert open_prepared(out).name == "book"


def test_settings_that_make_no_sense_are_all_named(book, tmp_path):
    with pytest.raises(ValueError) as error:
        prepare(book, "gpt", tmp_path / "out", workers=0, shard_characters=0, validation_part=0.6)
    told = str(error.value)
    for words in ("got 'gpt'. Did you mean 'gpt2'?", "workers", "shard_characters", "at most 0.5, got 0.6"):
        assert words in told
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["", "<|endoftext|>", " \n "])
def test_an_empty_text(tmp_path, text):
    (tmp_path / "t.txt").write_text(text)
    with pytest.raises(ValueError, match="t is empty"):
        prepare(Source("t", text=text), "char", tmp_path / "out", progress=False)
    assert not is_prepared(tmp_path / "out")


def test_folders_that_are_not_prepared_or_not_by_this_version(book, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no prepared data set: it has no manifest.json. Make one: python -m"):
        open_prepared(tmp_path)
    out = tmp_path / "out"
    prepare(book, "bytes", out, progress=False)
    manifest = json.loads((out / MANIFEST).read_text())
    for change, words in (
        ({"format": 9}, "was prepared in format 9, and this project reads format 1"),
        ({"train": None}, "is not as prepare wrote it"),
        ({"tokenizer": {**manifest["tokenizer"], "name": "gpt2"}}, "other ids than when it was saved"),
    ):
        (out / MANIFEST).write_text(json.dumps({**manifest, **change}))
        with pytest.raises(ValueError, match=words):
            open_prepared(out)
    (out / MANIFEST).write_text("{")
    with pytest.raises(ValueError, match=r"manifest.json cannot be read"):
        open_prepared(out)
    (out / MANIFEST).write_text(json.dumps({"format": 1}))
    with pytest.raises(ValueError, match="name, settings, text, tokenizer missing"):
        open_prepared(out)


def test_a_prepared_folder_can_be_moved(book, tmp_path):
    made = prepare(book, "char", tmp_path / "out", progress=False)
    ids = ids_of(made.train)
    shutil.move(tmp_path / "out", tmp_path / "elsewhere")
    book.files[0].unlink()  # the text itself is not needed any more
    assert ids_of(open_prepared(tmp_path / "elsewhere").train) == ids
