"""How a text is divided: what is held out of it, and which part of it becomes which token shard.

Everything here depends on the text and the settings alone, so that a text is divided in the same way by any number of
processes and after any interruption (see prepare.py).
"""

import math
import re
import sys
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, NamedTuple

from tqdm.auto import tqdm

from GPT2Model.tokenizer import END_OF_TEXT
from orchestrator.text.tokenizers import Tokenizer, make_tokenizer

if TYPE_CHECKING:
    from orchestrator.text.documents import Source

SPLITS = ("train", "validation")
# A text may be cut before a space or a line end that follows something else: neither GPT-2's pattern nor the words of
# the tales reach over it, so that the parts have the tokens of the whole. (\s of Python and of tiktoken differ in rare
# characters; these two are whitespace for both.)
SEAM = re.compile(r"(?<=\S)[ \n]")


class Text(NamedTuple):
    """What the first reading of a text finds.

    Attributes:
        documents, characters, utf_8_bytes: of all of it.
        split: how a part of it is held out: "own" (a split of its own), or see `choose_split`.
    """

    documents: int
    characters: int
    utf_8_bytes: int
    split: str


class Piece(NamedTuple):
    """The text of one shard.

    Attributes:
        file: the shard's name.
        texts: (whether a document opens there, text), one after another.
        characters: in all of them.
    """

    file: str
    texts: list[tuple[bool, str]]
    characters: int


def look_over(source: "Source", tokenizer_name: str, part: float | None, progress: bool) -> tuple[Text, Tokenizer]:
    """The first reading: what there is, the characters for `char`, and how a part of it is held out.

    Args:
        source: the text.
        tokenizer_name: of the tokenizer. The vocabulary of `char` is that of the whole text, as in nanoGPT.
        part: how much to hold out; None: the source has a validation split of its own.
        progress: show a bar.
    Raises:
        ValueError: an empty text, or one too short to hold a part of it out.
    """
    documents = characters = utf_8_bytes = held_out = 0
    with progress_bar(progress, desc="reading", unit="character") as bar:

        def seen() -> Iterator[str]:
            nonlocal documents, characters, utf_8_bytes, held_out
            for path in (*source.parts, *source.validation_parts):
                for document in source.documents(path):
                    held_out += len(document) * (part is not None and is_held_out(documents, part))
                    documents, characters = documents + 1, characters + len(document)
                    utf_8_bytes += len(document.encode(errors="surrogatepass"))
                    bar.update(len(document))
                    yield document

        rest = seen()
        tokenizer = make_tokenizer(tokenizer_name, _not_none(source.name, rest) if tokenizer_name == "char" else None)
        for _ in rest:  # what the tokenizer has not read
            pass
    if characters == 0:
        raise _empty(source.name)
    split = "own" if part is None else choose_split(characters, held_out, part)
    if split == "text" and not 0 < int(characters * (1 - part)) < characters:
        raise ValueError(
            f"{source.name} is too short: it has {characters} characters, and to hold out {part:.0%} of them leaves "
            "none to train on or none to validate on. Give it more text."
        )
    return Text(documents, characters, utf_8_bytes, split), tokenizer


def is_held_out(document: int, part: float) -> bool:
    """Whether the document of this number is held out, where whole documents are: of part=0.1 each tenth."""
    return math.floor((document + 1) * part) > math.floor(document * part)


def choose_split(characters: int, held_out: int, part: float) -> str:
    """ "documents" where whole documents, evenly spread, come to about the part asked for, else "text": the last part.

    Args:
        characters: of the text.
        held_out: those in documents that `is_held_out` takes; of a single document, or of few with one very long
            among them, that is far from `part`.
    """
    return "documents" if part / 2 <= held_out / characters <= 1.5 * part else "text"


def divide(source: "Source", text: Text, part: float | None) -> Iterator[tuple[str, str]]:
    """(split, document) one after another. Each document is opened by end-of-text, a cut one on both sides."""
    if text.split == "own":
        for split, paths in zip(SPLITS, (source.parts, source.validation_parts), strict=True):
            yield from ((split, document) for path in paths for document in source.documents(path))
        return
    documents = (document for path in source.parts for document in source.documents(path))
    if text.split == "documents":
        yield from ((SPLITS[is_held_out(i, part)], document) for i, document in enumerate(documents))
        return
    left = int(text.characters * (1 - part))  # characters to train on
    for document in documents:
        cut = _outside_marks(document, min(left, len(document)))
        left = left - len(document) if cut == len(document) else 0
        yield from ((split, t) for split, t in zip(SPLITS, (document[:cut], document[cut:]), strict=True) if t)


def _outside_marks(document: str, cut: int) -> int:
    """The cut, or the start of a literal end-of-text that it would go through."""
    start = document.rfind(END_OF_TEXT, max(0, cut - len(END_OF_TEXT) + 1), cut + len(END_OF_TEXT) - 1)
    return start if 0 <= start < cut else cut


def stretches(document: str, characters: int) -> Iterator[str]:
    """A long document in parts of at least this many characters, whose tokens are together those of the whole."""
    start = 0
    while len(document) - start > characters and (seam := SEAM.search(document, start + characters)):
        yield document[start : seam.start()]
        start = seam.start()
    yield document[start:]


def cut_in_pieces(documents: Iterable[tuple[str, str]], characters: int) -> Iterator[Piece]:
    """The text of one shard after another: about this many characters each, the last of a split may be shorter."""
    texts, sizes, numbers = ({split: value() for split in SPLITS} for value in (list, int, int))

    def piece(split: str) -> Piece:
        made = Piece(f"{split}-{numbers[split]:05d}.tokens", texts[split], sizes[split])
        texts[split], sizes[split], numbers[split] = [], 0, numbers[split] + 1
        return made

    for split, document in documents:
        for i, text in enumerate(stretches(document, characters)):
            texts[split].append((i == 0, text))
            sizes[split] += len(text)
            if sizes[split] >= characters:
                yield piece(split)
    yield from (piece(split) for split in SPLITS if texts[split])


def progress_bar(progress: bool, **options) -> tqdm:
    """A bar that shows after a second; into a file, it writes a line now and then, not ten a second."""
    live = sys.stderr.isatty() or "ipykernel" in sys.modules
    pace = {"mininterval": 0.1 if live else 10.0, "dynamic_ncols": live, "delay": 1, "unit_scale": True}
    return tqdm(disable=not progress, **pace, **options)


def _not_none(name: str, documents: Iterator[str]) -> Iterator[str]:
    """The same documents; ValueError where there are none, before a tokenizer complains of it in its own words."""
    first = next(documents, None)
    if first is None:
        raise _empty(name)
    yield first
    yield from documents


def _empty(name: str) -> ValueError:
    return ValueError(f"{name} is empty: give it some text to learn from.")
