"""Token shards: what was written is read, and what is no whole shard of this tokenizer is refused in words."""

import errno
import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.text.shards import open_shard, read_header, verify_shard, write_shard

ROOT = Path(__file__).resolve().parents[3]
ONE, OTHER = "0123456789abcdef", "fedcba9876543210"


@pytest.fixture
def shard(tmp_path):
    path = tmp_path / "train-00000.tokens"
    write_shard(path, np.arange(1000), ONE, vocab_size=50257)
    return path


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=50), st.booleans())
def test_what_was_written_is_read(tmp_path_factory, ids, wide):
    path = tmp_path_factory.mktemp("shard") / "some.tokens"
    vocab_size = 2**32 if wide else 2**16
    ids = [i % vocab_size for i in ids]
    write_shard(path, ids, ONE, vocab_size)
    read = open_shard(path, ONE)
    assert isinstance(read, np.memmap)
    assert read.tolist() == ids
    assert read.dtype == (np.uint32 if wide else np.uint16)


def test_the_file_is_the_header_of_the_documentation_and_then_the_ids(shard):
    raw = shard.read_bytes()
    body = np.arange(1000).astype("<u2").tobytes()
    expected = b"GPT2TOKS" + bytes([1, 0, 0, 0, 2, 0, 0, 0]) + (1000).to_bytes(8, "little") + ONE.encode()
    expected += hashlib.sha256(body).digest()
    assert raw == expected + bytes(256 - len(expected)) + body


def test_two_bytes_an_id_reach_to_the_last_of_65536(tmp_path):
    for vocab_size, bytes_per_id in ((2**16, 2), (2**16 + 1, 4)):
        write_shard(tmp_path / "s", [vocab_size - 1], ONE, vocab_size)
        assert read_header(tmp_path / "s").bytes_per_id == bytes_per_id
        assert open_shard(tmp_path / "s").tolist() == [vocab_size - 1]


@pytest.mark.parametrize(
    ("ids", "error", "words"),
    [
        ([], ValueError, "empty"),
        ([1, 2, 257, 3], ValueError, "id 257 at place 2 is outside the vocabulary, 0..256"),
        ([0, -1], ValueError, "id -1 at place 1"),
        ([0.5], TypeError, "whole numbers, got float64"),
        ([[1, 2]], TypeError, "one row"),
    ],
)
def test_ids_that_make_no_shard_are_refused_and_nothing_is_written(tmp_path, ids, error, words):
    with pytest.raises(error, match=words):
        write_shard(tmp_path / "s", np.array(ids) if ids else [], ONE, 257)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_no_shard(tmp_path):
    text = tmp_path / "book.txt"
    text.write_text("It was a dark and stormy night. " * 20)
    with pytest.raises(ValueError, match=r"is not a token shard: it begins with b'It was a'.*b'GPT2TOKS'.*prepare"):
        open_shard(text)
    (tmp_path / "empty").touch()
    with pytest.raises(ValueError, match="is empty"):
        open_shard(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match="no such token shard"):
        open_shard(tmp_path / "missing")
    with pytest.raises(ValueError, match="cannot be read"):
        open_shard(tmp_path)


def test_a_shard_of_another_version(shard):
    raw = bytearray(shard.read_bytes())
    raw[8] = 2
    shard.write_bytes(raw)
    with pytest.raises(ValueError, match="version 2, and this project reads version 1"):
        open_shard(shard)


@pytest.mark.parametrize("there", [2255, 300, 256])
def test_a_shard_that_was_cut_off(shard, there):
    shard.write_bytes(shard.read_bytes()[:there])
    with pytest.raises(ValueError, match=rf"is cut off: 2,256 bytes expected for 1,000 ids, {there:,} there"):
        open_shard(shard)


def test_a_shard_cut_off_in_its_header_or_longer_than_it_says(shard):
    raw = shard.read_bytes()
    shard.write_bytes(raw[:100])
    with pytest.raises(ValueError, match="inside its header: 256 bytes expected, 100 there"):
        open_shard(shard)
    shard.write_bytes(raw + b"\0\0")
    with pytest.raises(ValueError, match="longer than its header says"):
        open_shard(shard)


def test_a_shard_of_another_tokenizer_names_both_and_what_to_do(shard):
    with pytest.raises(ValueError, match=rf"{ONE}.*{OTHER}.*use the tokenizer that made it, or prepare the text again"):
        open_shard(shard, OTHER)
    assert len(open_shard(shard, ONE)) == len(open_shard(shard)) == 1000


@settings(max_examples=25, deadline=None)
@given(st.integers(256, 2255), st.integers(0, 7))
def test_verifying_sees_every_flipped_bit(tmp_path_factory, place, bit):
    shard = tmp_path_factory.mktemp("flipped") / "s"
    write_shard(shard, np.arange(1000), ONE, vocab_size=50257)
    assert verify_shard(shard).count == 1000
    raw = bytearray(shard.read_bytes())
    raw[place] ^= 1 << bit
    shard.write_bytes(raw)
    with pytest.raises(ValueError, match="is damaged"):
        verify_shard(shard)


def test_a_full_disk_is_said_and_leaves_the_old_shard(shard):
    before = shard.read_bytes()
    code = (  # a real limit of the system's on the size of files stands for the full disk
        "import resource, sys, pathlib, numpy as np\n"
        "from orchestrator.text.shards import write_shard\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "try:\n"
        "    write_shard(pathlib.Path(sys.argv[1]), np.zeros(1_000_000, int), 'f' * 16, 257)\n"
        "except OSError as error:\n"
        "    print(error, error.__cause__.errno)\n"
    )
    told = subprocess.run([sys.executable, "-c", code, str(shard)], cwd=ROOT, capture_output=True, text=True)
    assert "cannot be written: File too large (it takes 2,000,256 bytes). Free some space" in told.stdout, told.stderr
    assert str(errno.EFBIG) in told.stdout
    assert [path.name for path in shard.parent.iterdir()] == [shard.name]
    assert shard.read_bytes() == before
