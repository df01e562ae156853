"""Each tokenizer gives back the text it was given, and says what it cannot encode."""

import itertools
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import torch
from hypothesis import given
from hypothesis import strategies as st

from GPT2Model.tokenizer import get_tokenizer
from orchestrator.text import tales
from orchestrator.text.tokenizers import (
    NAMES,
    BytesTokenizer,
    CharTokenizer,
    fingerprint,
    make_tokenizer,
    tokenizer_facts,
    tokenizer_from,
)

ROOT = Path(__file__).resolve().parents[3]
MARK = "<|endoftext|>"
WORDS = ["One Monday", "a brave girl named Ada", "."]  # what all four can encode
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


def four():
    return [make_tokenizer(name, WORDS) for name in NAMES]


@given(texts)
def test_bytes_are_the_utf_8_of_the_text(text):
    tokenizer = BytesTokenizer()
    assert tokenizer.encode(text) == list(text.encode("utf-8"))
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(st.lists(texts, min_size=1))
def test_the_id_of_a_character_is_its_rank_among_the_characters(documents):
    characters = sorted(set("".join(documents)), key=ord)
    if not characters:
        return
    tokenizer = make_tokenizer("char", (document for document in documents))
    assert tokenizer.vocab_size == len(characters) + 1
    for document in documents:
        assert tokenizer.encode(document) == [characters.index(character) for character in document]
        assert tokenizer.decode(tokenizer.encode(document)) == document


def test_gpt2_and_tales_are_the_tokenizers_of_those_names():
    text = "Two words, and 3 more:\n\tça va \U0001f600"
    assert make_tokenizer("gpt2").encode(text) == get_tokenizer().encode(text)
    assert isinstance(get_tokenizer()._encoding, tiktoken.Encoding)  # OpenAI's own code, compared with its own ids
    assert make_tokenizer("gpt2").encode("Hello world") == [15496, 995]  # published with GPT-2
    (story,) = tales.stories(1, seed=5)
    assert make_tokenizer("tales").encode(story) == tales.TalesTokenizer().encode(story)
    assert make_tokenizer("tales").decode(make_tokenizer("tales").encode(story)) == story


@pytest.mark.parametrize("tokenizer", four(), ids=NAMES)
def test_the_mark_in_a_text_is_the_one_id_between_documents(tokenizer):
    first, second = WORDS[:2]
    expected = [*tokenizer.encode(first), tokenizer.end_of_text, *tokenizer.encode(second)]
    assert tokenizer.encode(first + MARK + second) == expected
    assert tokenizer.encode(MARK + MARK) == [tokenizer.end_of_text] * 2
    assert tokenizer.decode([tokenizer.end_of_text]) == MARK
    assert tokenizer.decode(expected) == first + MARK + second
    assert expected.count(tokenizer.end_of_text) == 1  # no other token means it
    assert 0 <= tokenizer.end_of_text < tokenizer.vocab_size
    assert tokenizer.encode("") == []
    assert tokenizer.decode([]) == ""


def test_the_mark_is_no_characters_of_a_character_tokenizer():
    assert make_tokenizer("char", ["ab" + MARK + "c"]).characters == "abc"  # not also "<|endoftx>"


def test_bytes_that_are_no_utf_8_show_as_such_and_hide_nothing():
    rng = random.Random(0)
    for _ in range(300):
        ids = rng.choices(range(256), k=8)
        assert BytesTokenizer().decode(ids) == bytes(ids).decode("utf-8", errors="replace")
    assert BytesTokenizer().decode([0xE2, 0x82, 256, 0xAC, 65]) == f"\ufffd{MARK}\ufffdA"  # a euro sign cut in two


@pytest.mark.parametrize("tokenizer", four(), ids=NAMES)
def test_ids_come_as_lists_arrays_or_tensors(tokenizer):
    ids = tokenizer.encode(WORDS[1])
    for form in (ids, tuple(ids), np.array(ids, dtype=np.uint16), torch.tensor(ids), iter(ids)):
        assert tokenizer.decode(form) == WORDS[1]


@pytest.mark.parametrize("tokenizer", four(), ids=NAMES)
def test_what_is_no_text_and_what_are_no_ids_is_said(tokenizer):
    for wrong in (b"One", None, ["One"], 3):
        with pytest.raises(TypeError, match=f"encode.. takes a str, got {type(wrong).__name__}"):
            tokenizer.encode(wrong)
    last = tokenizer.vocab_size - 1
    tokenizer.decode([last])
    for outside in (-1, last + 1):
        with pytest.raises(ValueError, match=rf"must be in 0..{last}, got {outside}"):
            tokenizer.decode([0, outside])
    for batch in ([[0, 1]], torch.zeros(1, 2, dtype=torch.long), torch.tensor(0), [0.5], ["0"]):
        with pytest.raises(ValueError, match="the ids of one text"):
            tokenizer.decode(batch)


def test_half_a_surrogate_pair_is_said_by_those_that_encode_every_text():
    for name in ("gpt2", "bytes"):
        with pytest.raises(ValueError, match=r"character 2 of the text is '\\ud83d', half of a surrogate pair"):
            make_tokenizer(name).encode("ab\ud83d")
    with pytest.raises(ValueError, match="half of a surrogate pair"):
        make_tokenizer("char", ["ab\udc80"])


def test_a_character_that_was_not_in_the_training_text_is_named_with_its_place():
    tokenizer = make_tokenizer("char", ["abc"])
    with pytest.raises(ValueError) as error:
        tokenizer.encode("abcab\u20ac")
    for part in ("'\u20ac'", "U+20AC", "character 5", "3 characters", "--tokenizer bytes or gpt2"):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("name", "text", "error", "message"),
    [
        ("gtp2", None, ValueError, "Did you mean 'gpt2'"),
        ("CHAR", None, ValueError, "Did you mean 'char'"),
        ("sentencepiece", None, ValueError, "Tokenizers: gpt2, char, bytes, tales"),
        (None, None, ValueError, "not a tokenizer"),
        ("char", None, ValueError, "pass the training documents"),
        ("char", "one text", TypeError, r"pass \[text\]"),
        ("char", [], ValueError, "this text has none"),
        ("char", ["", MARK], ValueError, "this text has none"),
    ],
)
def test_no_tokenizer_without_a_name_and_a_text(name, text, error, message):
    with pytest.raises(error, match=message):
        make_tokenizer(name, text)


def test_fingerprints_are_equal_only_for_equal_mappings():
    different = [*four(), *(CharTokenizer(c) for c in ("a", "b", "ab", "ac", "\u00e9", '"a', "\\a"))]
    for one, other in itertools.combinations(different, 2):
        assert fingerprint(one) != fingerprint(other)
    assert fingerprint(make_tokenizer("char", ["abc"])) == fingerprint(make_tokenizer("char", ["cc", "ba"]))
    for tokenizer in different:
        assert len(fingerprint(tokenizer)) == 16
        int(fingerprint(tokenizer), 16)


def test_another_process_finds_the_same_fingerprints():
    program = (
        "from orchestrator.text.tokenizers import *\n"
        f"print(*[fingerprint(make_tokenizer(name, {WORDS!r})) for name in {NAMES!r}])"
    )
    run = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env={**os.environ, "PYTHONHASHSEED": "7"},  # sets come in another order then
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.split() == [fingerprint(tokenizer) for tokenizer in four()]


@pytest.mark.parametrize("tokenizer", four(), ids=NAMES)
def test_a_tokenizer_is_built_again_from_its_facts(tokenizer):
    facts = json.loads(json.dumps(tokenizer_facts(tokenizer)))
    again = tokenizer_from(facts)
    text = WORDS[1] + MARK
    assert (again.name, again.vocab_size, again.end_of_text) == (
        tokenizer.name,
        tokenizer.vocab_size,
        tokenizer.end_of_text,
    )
    assert again.encode(text) == tokenizer.encode(text)
    assert fingerprint(again) == fingerprint(tokenizer)


def test_facts_that_give_other_ids_are_not_taken():
    facts = tokenizer_facts(make_tokenizer("char", ["abc"]))
    with pytest.raises(ValueError, match="gives other ids than when it was saved"):
        tokenizer_from({**facts, "characters": "abd"})
    with pytest.raises(ValueError, match="once each, sorted"):
        tokenizer_from({**facts, "characters": "acb"})
    with pytest.raises(ValueError, match="once each, sorted"):
        tokenizer_from({**facts, "characters": "aabc"})
    with pytest.raises(ValueError, match="characters missing"):
        tokenizer_from({key: facts[key] for key in facts if key != "characters"})
    with pytest.raises(ValueError, match="name, fingerprint missing"):
        tokenizer_from({})
    with pytest.raises(ValueError, match="not a tokenizer"):
        tokenizer_from({**facts, "name": "bpe"})
