"""How a text is divided: nothing is lost or said twice, the held-out part is the one that was promised."""

import itertools
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from orchestrator.text.documents import Source
from orchestrator.text.pieces import choose_split, cut_in_pieces, divide, is_held_out, look_over, stretches
from orchestrator.text.tokenizers import make_tokenizer

# What GPT-2's pattern treats differently: letters, marks, digits, contractions, every kind of whitespace. \x1c is
# whitespace for Python, and not for tiktoken.
CHARACTERS = "ab'st1. \n\t\r\x1c\u3000é中"


def source_of(*documents: str) -> Source:
    return Source("test", text="<|endoftext|>".join(documents))


@settings(max_examples=300, deadline=None)
@given(st.text(CHARACTERS, max_size=80), st.integers(1, 20), st.sampled_from(["gpt2", "bytes"]))
@example("ab  cd\n\n ef", 1, "gpt2")
@example("a\x1c b", 1, "gpt2")
def test_the_tokens_of_the_parts_of_a_long_document_are_those_of_the_whole(document, characters, name):
    tokenizer = make_tokenizer(name)
    parts = list(stretches(document, characters))
    assert "".join(parts) == document
    assert all(len(part) >= characters for part in parts[:-1])
    assert [i for part in parts for i in tokenizer.encode(part)] == tokenizer.encode(document)


def test_a_long_document_is_cut_where_it_can_be():
    assert list(stretches("one two  three\nfour", 4)) == ["one two", "  three", "\nfour"]
    assert list(stretches("x" * 100, 4)) == ["x" * 100]  # nowhere


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(["train", "validation"]), st.text("ab ", min_size=1, max_size=30)), max_size=20),
    st.integers(1, 40),
)
def test_pieces_hold_every_document_once_in_order(documents, characters):
    pieces = list(cut_in_pieces(documents, characters))
    for split in ("train", "validation"):
        mine = [piece for piece in pieces if piece.file.startswith(f"{split}-")]
        assert [piece.file for piece in mine] == [f"{split}-{i:05d}.tokens" for i in range(len(mine))]
        texts = [text for piece in mine for text in piece.texts]
        again = []
        for opens, text in texts:
            again = [*again, text] if opens else [*again[:-1], again[-1] + text]
        assert again == [document for which, document in documents if which == split]
        assert all(piece.characters == sum(len(text) for _, text in piece.texts) for piece in mine)
        assert all(piece.characters >= characters for piece in mine[:-1])


@pytest.mark.parametrize("part", [0.1, 0.05, 0.3, 0.5])
def test_whole_documents_are_held_out_evenly(part):
    held_out = [i for i in range(1000) if is_held_out(i, part)]
    assert len(held_out) == round(1000 * part)
    gaps = [b - a for a, b in itertools.pairwise(held_out)]
    assert max(gaps) - min(gaps) <= 1
    if part == 0.1:
        assert held_out[:3] == [9, 19, 29]


def test_of_many_documents_every_tenth_is_held_out_whole():
    documents = [f"document number {i:03d}" for i in range(100)]
    text, _ = look_over(source_of(*documents), "bytes", 0.1, progress=False)
    assert text.split == "documents"
    divided = list(divide(source_of(*documents), text, 0.1))
    assert [document for split, document in divided if split == "validation"] == documents[9::10]
    assert [document for _, document in divided] == documents


@settings(max_examples=60, deadline=None)
@given(st.text("ab \n", min_size=2, max_size=300).filter(str.strip), st.sampled_from([0.1, 0.25, 0.5]))
def test_of_one_document_the_last_part_is_held_out_as_nanogpt_does(document, part):
    cut = int(len(document) * (1 - part))  # nanoGPT, data/shakespeare_char/prepare.py: data[: int(n * 0.9)]
    source = source_of(document)
    text, _ = look_over(source, "bytes", part, progress=False)
    assert text.split == "text"
    assert list(divide(source, text, part)) == [("train", document[:cut]), ("validation", document[cut:])]


def test_of_few_documents_the_last_part_of_the_text_is_held_out():
    source = source_of("a" * 60, "b" * 30, "c" * 50, "d" * 6)
    text, _ = look_over(source, "bytes", 0.5, progress=False)  # 73 of 146 characters
    expected = [("train", "a" * 60), ("train", "b" * 13), ("validation", "b" * 17)]
    assert list(divide(source, text, 0.5)) == [*expected, ("validation", "c" * 50), ("validation", "d" * 6)]


def test_one_very_long_document_among_others_is_not_the_whole_validation_split():
    assert choose_split(characters=1000, held_out=900, part=0.1) == "text"
    assert choose_split(characters=1000, held_out=3, part=0.1) == "text"
    assert choose_split(characters=1000, held_out=95, part=0.1) == "documents"


@pytest.mark.parametrize("shift", range(14))
def test_the_mark_between_documents_is_never_cut_in_two(tmp_path, shift):
    """A JSONL document may hold the literal mark; cut in two it would be thirteen characters of text."""
    before = "x" * (90 - shift)
    document = (before + "<|endoftext|>" + "y" * 100)[:100]
    path = tmp_path / "one.jsonl"
    path.write_text('{"text": "%s"}\n' % document)  # noqa: UP031
    source = Source("one", (path,))
    text, tokenizer = look_over(source, "char", 0.1, progress=False)
    parts = [part for _, part in divide(source, text, 0.1)]
    assert "".join(parts) == document
    ids = [i for part in parts for i in tokenizer.encode(part)]  # raises for a "<", which is no character of the text
    assert ids == tokenizer.encode(document)


def test_a_validation_split_of_its_own_is_used(tmp_path):
    (tmp_path / "a.txt").write_text("to train on<|endoftext|>more")
    (tmp_path / "b.txt").write_text("to validate on: ß")
    source = Source("own", (tmp_path / "a.txt",), (tmp_path / "b.txt",))
    text, tokenizer = look_over(source, "char", None, progress=False)
    assert text == (3, 15 + 17, 15 + 18, "own")
    divided = [("train", "to train on"), ("train", "more"), ("validation", "to validate on: ß")]
    assert list(divide(source, text, None)) == divided
    assert tokenizer.decode(tokenizer.encode("ß")) == "ß"  # the vocabulary is that of both


@pytest.mark.parametrize("name", ["bytes", "char"])
def test_a_text_that_is_empty_or_too_short(name):
    with pytest.raises(ValueError, match="test is empty"):
        look_over(source_of(" "), name, 0.1, progress=False)
    with pytest.raises(ValueError, match="too short: it has 1 characters"):
        look_over(source_of("a"), name, 0.1, progress=False)


def test_the_counts_of_a_text(tmp_path):
    path = Path(tmp_path / "t.txt")
    path.write_text("é中<|endoftext|>abc", encoding="utf-8")
    text, tokenizer = look_over(Source("t", (path,)), "gpt2", 0.5, progress=False)
    assert text[:3] == (2, 5, 2 + 3 + 3)
    assert tokenizer.name == "gpt2"
