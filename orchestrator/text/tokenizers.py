"""The tokenizers a model can be trained with: GPT-2's, one for characters, one for bytes, and that of the tales.

All have the same four parts: `vocab_size`, `end_of_text`, `encode` and `decode`. In every one of them the literal
"<|endoftext|>" in a text becomes the one id that separates documents. A tokenizer is saved as a few JSON facts
(`tokenizer_facts`) and built again from them; `fingerprint` tells whether two of them give the same ids.
"""

import difflib
import hashlib
import json
import operator
from collections.abc import Iterable, Sequence
from typing import Protocol

from GPT2Model.tokenizer import ENCODER_JSON_SHA256, END_OF_TEXT, VOCAB_BPE_SHA256, get_tokenizer
from orchestrator.text import tales

NAMES = ("gpt2", "char", "bytes", "tales")


class Tokenizer(Protocol):
    """What the rest asks of a tokenizer.

    Attributes:
        name: one of `NAMES`.
        vocab_size: number of ids, 0..vocab_size - 1.
        end_of_text: the id of "<|endoftext|>", which separates documents.
    """

    name: str
    vocab_size: int
    end_of_text: int

    def encode(self, text: str) -> list[int]:
        """Token ids of a text. Raises TypeError for what is no str, ValueError for text that cannot be encoded."""

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids (a list, or a 1-D tensor). Raises ValueError for an id outside the vocabulary."""


class NamedTokenizer:
    """Another package's tokenizer under its name in `NAMES`: GPT-2's, or that of the tales.

    Args:
        name: "gpt2" or "tales".
        tokenizer: what does the work.
        vocabulary: the texts of the ids in order, or the hashes of the files that hold them: for the fingerprint.
    """

    def __init__(self, name: str, tokenizer, vocabulary: Sequence[str]):
        self.name, self._tokenizer, self.vocabulary = name, tokenizer, vocabulary
        self.vocab_size, self.end_of_text = tokenizer.vocab_size, tokenizer.end_of_text

    def encode(self, text: str) -> list[int]:
        """Token ids of a text."""
        _utf_8(text)
        return self._tokenizer.encode(text)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids."""
        return self._tokenizer.decode(_checked(ids, self.vocab_size))


class BytesTokenizer:
    """One token for each byte of the UTF-8 text: it can write every text, and there is nothing to learn or to keep.

    Attributes:
        vocab_size: 257.
        end_of_text: the id 256, behind the bytes.
    """

    name, vocab_size, end_of_text = "bytes", 257, 256
    vocabulary = ("UTF-8", END_OF_TEXT)

    def encode(self, text: str) -> list[int]:
        """The bytes of a text.

        Raises:
            TypeError: not a string.
            ValueError: a lone surrogate, which has no UTF-8.
        """
        return _join_with([list(document) for document in _utf_8(text).split(END_OF_TEXT.encode())], self.end_of_text)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids. Bytes that are no valid UTF-8 show as U+FFFD.

        Raises:
            ValueError: an id outside 0..256.
        """
        ids, documents, start = _checked(ids, self.vocab_size), [], 0
        for end in [i for i, index in enumerate(ids) if index == self.end_of_text] + [len(ids)]:
            documents.append(bytes(ids[start:end]))
            start = end + 1
        return END_OF_TEXT.encode().join(documents).decode(errors="replace")


class CharTokenizer:
    """One token for each character of the training text: a vocabulary so small that a tiny model can use it.

    Args:
        characters: each character once, sorted by code point. Its place is its id.
    Attributes:
        vocab_size: the characters and `end_of_text`.
        end_of_text: the last id.
    Raises:
        ValueError: no characters, or not sorted, or one that stands twice.
    """

    name = "char"

    def __init__(self, characters: str):
        if not characters:
            raise ValueError("a character tokenizer takes its characters from a text, and this text has none.")
        if list(characters) != sorted(set(characters)):
            raise ValueError("the characters of a character tokenizer must stand once each, sorted by code point.")
        _utf_8(characters)
        self.characters, self._ids = characters, {character: i for i, character in enumerate(characters)}
        self.vocab_size, self.end_of_text = len(characters) + 1, len(characters)
        self.vocabulary = (*characters, END_OF_TEXT)

    @classmethod
    def of(cls, documents: Iterable[str]) -> "CharTokenizer":
        """The tokenizer of the characters in these documents (the mark between documents is no characters)."""
        seen = set()
        for document in documents:
            for part in document.split(END_OF_TEXT):
                seen.update(part)
        return cls("".join(sorted(seen)))

    def encode(self, text: str) -> list[int]:
        """The ids of the characters.

        Raises:
            TypeError: not a string.
            ValueError: a character that the training text did not have.
        """
        if not isinstance(text, str):
            raise TypeError(f"encode() takes a str, got {type(text).__name__}.")
        try:
            documents = [list(map(self._ids.__getitem__, document)) for document in text.split(END_OF_TEXT)]
        except KeyError as error:
            (character,) = error.args
            raise ValueError(
                f"{character!r} (U+{ord(character):04X}, character {text.index(character)} of the text) is not one of "
                f"the {len(self.characters)} characters that this tokenizer took from its training text. Train on a "
                "text that has it, leave it out, or use --tokenizer bytes or gpt2, which can write every text."
            ) from None
        return _join_with(documents, self.end_of_text)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids.

        Raises:
            ValueError: an id outside the vocabulary.
        """
        return "".join([self.vocabulary[i] for i in _checked(ids, self.vocab_size)])


def make_tokenizer(name: str, text: Iterable[str] | None = None) -> Tokenizer:
    """A tokenizer by name.

    Args:
        name: "gpt2", "char", "bytes" or "tales".
        text: for "char" only: the training documents, from which it takes its characters. They are read once.

    Raises:
        TypeError: a text where documents belong.
        ValueError: no such name (the nearest is suggested), or "char" without documents.
        RuntimeError: GPT-2's vocabulary is neither here nor to be downloaded.
    """
    if name == "gpt2":
        # GPT2Model/tokenizer.py holds its two files to these hashes, so that they stand for the 50,257 tokens.
        return NamedTokenizer("gpt2", get_tokenizer(), (VOCAB_BPE_SHA256, ENCODER_JSON_SHA256, END_OF_TEXT))
    if name == "bytes":
        return BytesTokenizer()
    if name == "tales":
        tokenizer = tales.TalesTokenizer()
        return NamedTokenizer("tales", tokenizer, [tokenizer.decode([i]) for i in range(tokenizer.vocab_size)])
    if name == "char":
        if text is None:
            raise ValueError('the tokenizer "char" takes its characters from a text: pass the training documents.')
        if isinstance(text, str):
            raise TypeError("make_tokenizer() takes documents, a list of texts, not one text: pass [text].")
        return CharTokenizer.of(text)
    raise ValueError(f"{name!r} is not a tokenizer.{_nearest(name)} Tokenizers: {', '.join(NAMES)}.")


def fingerprint(tokenizer: Tokenizer) -> str:
    """16 hex digits that are equal only for equal mappings: the SHA-256 of the name and the vocabulary in order.

    Token ids mean nothing without their tokenizer, so shards and checkpoints carry this.
    """
    mapping = json.dumps([tokenizer.name, tokenizer.vocab_size, tokenizer.end_of_text, list(tokenizer.vocabulary)])
    return hashlib.sha256(mapping.encode()).hexdigest()[:16]


def tokenizer_facts(tokenizer: Tokenizer) -> dict:
    """What must be saved, as JSON, to build this tokenizer again."""
    facts = {"name": tokenizer.name, "vocab_size": tokenizer.vocab_size, "fingerprint": fingerprint(tokenizer)}
    return {**facts, "characters": tokenizer.characters} if isinstance(tokenizer, CharTokenizer) else facts


def tokenizer_from(facts: dict) -> Tokenizer:
    """The tokenizer of saved facts.

    Raises:
        ValueError: facts that name no tokenizer, or one that gives other ids today than when they were saved.
    """
    missing = [key for key in ("name", "fingerprint") if key not in facts]
    if facts.get("name") == "char" and "characters" not in facts:
        missing.append("characters")
    if missing:
        raise ValueError(f"these are not the facts of a tokenizer: {', '.join(missing)} missing in {sorted(facts)}.")
    tokenizer = CharTokenizer(facts["characters"]) if facts["name"] == "char" else make_tokenizer(facts["name"])
    if fingerprint(tokenizer) != facts["fingerprint"]:
        raise ValueError(
            f"the tokenizer {tokenizer.name!r} gives other ids than when it was saved (fingerprint "
            f"{fingerprint(tokenizer)}, saved {facts['fingerprint']}): the facts were edited, or they come from "
            "another version of this project. Prepare the text again with the tokenizer of today."
        )
    return tokenizer


def _utf_8(text: str) -> bytes:
    """The UTF-8 of a text; what has none is half a character, left by a broken decoder."""
    if not isinstance(text, str):
        raise TypeError(f"encode() takes a str, got {type(text).__name__}.")
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"character {error.start} of the text is {text[error.start]!r}, half of a surrogate pair, which no UTF-8 "
            'can hold. Read the file with the right encoding, or drop it: text.encode(errors="ignore").decode().'
        ) from None


def _checked(ids: Iterable[int], vocab_size: int) -> list[int]:
    """The ids of one text as a list of ints within the vocabulary."""
    ids = ids.tolist() if hasattr(ids, "tolist") else ids
    try:
        ids = [operator.index(i) for i in ids]
    except TypeError:
        raise ValueError("decode() takes the ids of one text, as ids[0] of a batch (B, T).") from None
    outside = [i for i in ids if not 0 <= i < vocab_size]
    if outside:
        raise ValueError(f"token ids must be in 0..{vocab_size - 1}, got {outside[0]}: another vocabulary?")
    return ids


def _join_with(documents: list[list[int]], end_of_text: int) -> list[int]:
    """One list of ids, with end_of_text between the documents."""
    ids = documents[0]
    for document in documents[1:]:
        ids.append(end_of_text)
        ids.extend(document)
    return ids


def _nearest(name: str) -> str:
    near = difflib.get_close_matches(str(name).lower(), NAMES, n=1)
    return f" Did you mean {near[0]!r}?" if near else ""
