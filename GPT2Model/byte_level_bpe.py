"""GPT-2's way of cutting text into tokens, for any vocabulary of its kind: those of fine-tunes and of other languages.

Text is split into words, a word is UTF-8 bytes, each byte is written as one visible character (a space as "Ġ"), and
then the pair of neighbours that comes first in the list of merges becomes one token, until none is in it. tiktoken
(`GPT2Model/tokenizer.py`) is faster, but knows the merges only by their results, which is the same for GPT-2's own
vocabulary and not for every other.
Source: Radford et al., 2019, section 2.2; Sennrich et al., 2016, algorithm 1.
"""

import heapq
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import regex

from GPT2Model.tokenizer import END_OF_TEXT

# Words as GPT-2 splits them: English endings, letters, numbers, other signs, with the space before each; then spaces.
WORDS = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")


def visible_bytes() -> dict[int, str]:
    """A visible character for each byte: itself where it has one in Latin-1, the others from U+0100 upwards."""
    seen = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in seen]
    return {byte: chr(byte) for byte in seen} | {byte: chr(256 + i) for i, byte in enumerate(hidden)}


CHARACTER_OF = visible_bytes()
BYTE_OF = {character: byte for byte, character in CHARACTER_OF.items()}


@dataclass(frozen=True)
class AddedToken:
    """A token that is found in the text as it stands, before anything is split: "<|endoftext|>", or a new word.

    Attributes:
        normalized: looked for after those that are not, in what they left: the order that Hugging Face keeps.
    """

    content: str
    id: int
    special: bool = True
    normalized: bool = False


class ByteLevelBPE:
    """Text to token ids and back, by a vocabulary and its merges.

    Args:
        vocab: the id of each token, written in visible characters; every single byte must be there.
        merges: pairs of tokens, in the order in which they are merged.
        added: tokens that are found whole.
        end_of_text: the content of the added token that ends a text, if there is one.
    Attributes:
        vocab_size: the largest id and 1.
        end_of_text: its id, or None.
    Raises:
        ValueError: everything that is wrong with the vocabulary.
    """

    name = "bpe"

    def __init__(
        self, vocab: Mapping[str, int], merges: Sequence[tuple[str, str]], added: Iterable[AddedToken] = (),
        end_of_text: str | None = END_OF_TEXT,
    ):  # fmt: skip
        self.vocab, self.merges, self.added = dict(vocab), list(merges), tuple(added)
        contents = {token.content: token.id for token in self.added}
        if problems := self.problems():
            raise ValueError("this is no byte-level BPE:\n" + "\n".join(f"  - {problem}" for problem in problems))
        self._rank = {pair: rank for rank, pair in enumerate(self.merges)}
        self._token = {i: token for token, i in self.vocab.items()} | {i: None for i in contents.values()}
        self._content = {i: content for content, i in contents.items()}
        self._id = contents
        self._passes = [found_whole(token.content for token in self.added if token.normalized is late)
                        for late in (False, True)]  # fmt: skip
        self.vocab_size = max(self._token, default=-1) + 1
        self.end_of_text = contents.get(end_of_text, self.vocab.get(end_of_text))
        self._ids_of_word = lru_cache(maxsize=2**16)(self._merge)

    def problems(self) -> list[str]:
        """What is wrong with the vocabulary, a sentence each."""
        problems = []
        lacking = [character for character in BYTE_OF if character not in self.vocab]
        if lacking:
            problems.append(f"the vocabulary lacks {len(lacking)} of the 256 single bytes: {' '.join(lacking[:20])}")
        foreign = [pair for pair in self.merges if not {*pair, "".join(pair)} <= self.vocab.keys()]
        if foreign:
            problems.append(f"{len(foreign)} merges are of tokens that are not in the vocabulary, first {foreign[0]}")
        ids = [*self.vocab.values(), *(token.id for token in self.added if token.content not in self.vocab)]
        if not all(isinstance(i, int) and i >= 0 for i in ids):
            problems.append("ids must be whole numbers from 0")
        elif len(set(ids)) < len(ids):
            problems.append(f"{len(ids) - len(set(ids))} ids stand for two tokens")
        moved = [t.content for t in self.added if self.vocab.get(t.content, t.id) != t.id]
        if moved:
            problems.append(f"added tokens have another id in the vocabulary: {', '.join(moved)}")
        return problems

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`; added tokens that stand in it become their one id.

        Raises:
            TypeError: not a string.
        """
        if not isinstance(text, str):
            raise TypeError(f"encode() takes a str, got {type(text).__name__}.")
        parts: list[str | int] = [text]
        for whole in self._passes:
            if whole is not None:
                split = [whole.split(part) if isinstance(part, str) else [part] for part in parts]
                parts = [self._id.get(p, p) if i % 2 else p for ps in split for i, p in enumerate(ps) if p != ""]
        ids = []
        for part in parts:
            if isinstance(part, int):
                ids.append(part)
            else:
                for word in WORDS.findall(part):
                    ids.extend(self._ids_of_word(word))
        return ids

    def _merge(self, word: str) -> tuple[int, ...]:
        """The ids of one word. A heap of pairs keeps a word of 100,000 letters from taking 100,000 squared steps."""
        parts = [CHARACTER_OF[byte] for byte in word.encode(errors="replace")]
        before, behind = list(range(-1, len(parts) - 1)), list(range(1, len(parts) + 1))  # the neighbours that are left
        pairs: list[tuple[int, int, str, str]] = []

        def consider(i: int) -> None:
            if i >= 0 and behind[i] < len(parts):
                pair = parts[i], parts[behind[i]]
                if pair in self._rank:
                    heapq.heappush(pairs, (self._rank[pair], i, *pair))

        for i in range(len(parts)):
            consider(i)
        while pairs:
            _, i, left, right = heapq.heappop(pairs)
            j = behind[i]
            if parts[i] != left or j == len(parts) or parts[j] != right:
                continue  # one of the two was merged with another meanwhile
            parts[i], parts[j], behind[i] = left + right, "", behind[j]
            if behind[j] < len(parts):
                before[behind[j]] = i
            consider(before[i])
            consider(i)
        return tuple(self.vocab[part] for part in parts if part)

    def decode(self, ids) -> str:
        """The text of token ids (a list, or a 1-D tensor). Bytes that are no valid UTF-8 show as U+FFFD.

        Raises:
            ValueError: an id that no token has.
        """
        ids = ids.tolist() if hasattr(ids, "tolist") else list(ids)
        if not all(isinstance(i, int) for i in ids):
            raise ValueError("decode() takes the ids of one text, as ids[0] of a batch (B, T).")
        unknown = [i for i in ids if i not in self._token]
        if unknown:
            raise ValueError(
                f"no token has the id {unknown[0]}; they are in 0..{self.vocab_size - 1}: another vocabulary?"
            )
        return b"".join(self._bytes(i) for i in ids).decode(errors="replace")

    def _bytes(self, i: int) -> bytes:
        if i in self._content:
            return self._content[i].encode()
        return b"".join(
            bytes([BYTE_OF[character]]) if character in BYTE_OF else character.encode() for character in self._token[i]
        )


def found_whole(contents: Iterable[str]) -> regex.Pattern | None:
    """A pattern that splits a text at these, the longest first where several begin at one place; None: none given."""
    longest_first = sorted(contents, key=len, reverse=True)
    return regex.compile(f"({'|'.join(map(regex.escape, longest_first))})") if longest_first else None
