"""Reading one file as documents: UTF-8 text, JSON lines or parquet, as a stream, with errors that say what to mend.

A block of text or a batch of rows is in memory at a time, so that a file may be larger than the memory.
"""

import codecs
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path

from GPT2Model.tokenizer import END_OF_TEXT

PARQUET = (".parquet",)
JSON_LINES = (".jsonl", ".jsonl.gz", ".json", ".json.gz")
TEXT = (".txt", ".text", ".md", ".rst", ".txt.gz", ".text.gz", ".md.gz", ".rst.gz")
FILES = (*TEXT, *JSON_LINES, *PARQUET)
EXTRA = "pip install -r requirements-hub.txt"
BLOCK = 1 << 22  # bytes of a text file that are decoded at a time
ROWS = 100  # of a parquet file
# " = Title = " but not " = = Section = = ": how WikiText marks where an article begins.
TITLE = re.compile(r" ?= (?![=\s]).*(?<![=\s]) = ?\n?")


def read_documents(path: Path, field: str = "text", articles: bool = False) -> Iterator[str]:
    """One document of a file after another; empty ones are left out.

    Args:
        path: *.parquet; *.jsonl or *.json with one object a line; anything else is UTF-8 text, split at each literal
            "<|endoftext|>". Text and JSON may be compressed (*.gz).
        field: of the JSON objects, the column of the parquet file.
        articles: join rows (or lines of text) into articles: a new one begins at " = Title = ".

    Raises:
        ValueError: not UTF-8, or binary (which byte); a line that is no JSON object with this field (which line, what
            fields it has); no such column (what columns there are); a file that is broken or cannot be read.
        ImportError: a parquet file, and no pyarrow.
    """
    path = Path(path)
    name = path.name.lower()
    if name.endswith(PARQUET):
        rows = _parquet_rows(path, field)
    elif name.endswith(JSON_LINES):
        rows = _json_rows(path, field)
    else:
        rows = _lines(path) if articles else _split_at_the_mark(_text_blocks(path))
    return filter(str.strip, _joined_into_articles(rows) if articles else rows)


def has_text(path: Path, field: str = "text") -> bool:
    """Whether a file has anything but white space in it; reads no further than needed to know.

    Raises:
        ValueError, ImportError: as `read_documents`.
    """
    rows = path.name.lower().endswith((*JSON_LINES, *PARQUET))
    return any(map(str.strip, read_documents(path, field) if rows else _text_blocks(path)))


def _text_blocks(path: Path) -> Iterator[str]:
    """The text of a file, a block at a time: UTF-8, a byte-order mark dropped, line ends as "\\n"."""
    decoder, line_ends = codecs.getincrementaldecoder("utf-8")(), io.IncrementalNewlineDecoder(None, translate=True)
    position, end = 0, False
    try:
        with gzip.open(path) if path.suffix.lower() == ".gz" else open(path, "rb") as file:
            while not end:
                block = file.read(BLOCK)
                end = not block
                if position == 0 and block.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                    raise ValueError(f"{path} is UTF-16 text, and UTF-8 is read here: save it as UTF-8.")
                waiting = len(decoder.getstate()[0])  # bytes of a character that the block before cut through
                if position == 0 and block.startswith(codecs.BOM_UTF8):
                    block, position = block[len(codecs.BOM_UTF8) :], len(codecs.BOM_UTF8)
                if b"\0" in block:
                    raise ValueError(
                        f"{path} is a binary file (byte {position + block.index(0)} is 0), not text. Text, JSONL and "
                        "parquet files can be read; text must be UTF-8."
                    )
                try:
                    text = decoder.decode(block, final=end)
                except UnicodeDecodeError as error:
                    raise ValueError(
                        f"{path} is not UTF-8 text (byte {position - waiting + error.start} is "
                        f"{error.object[error.start]:#04x}): save it as UTF-8, or pass a text file."
                    ) from None
                position += len(block)
                yield line_ends.decode(text, final=end)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is not a whole gzip file ({error}): copy or download it again.") from error
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}.") from error


def _split_at_the_mark(blocks: Iterator[str]) -> Iterator[str]:
    """The texts between the marks, of which one may span many blocks, and a mark two."""
    whole, tail = [], ""  # the document so far, and its last characters: a mark may begin in them
    for block in blocks:
        first, *others = (tail + block).split(END_OF_TEXT)
        if others:
            yield "".join([*whole, first])
            yield from others[:-1]
            whole, first = [], others[-1]
        cut = max(0, len(first) - len(END_OF_TEXT) + 1)
        whole.append(first[:cut])
        tail = first[cut:]
    yield "".join([*whole, tail])


def _lines(path: Path) -> Iterator[str]:
    """The lines of a file without their ends. Only "\\n" ends one: other separators may stand inside a JSON string."""
    begun = []
    for block in _text_blocks(path):
        first, *others = block.split("\n")
        begun.append(first)
        if others:
            yield "".join(begun)
            yield from others[:-1]
            begun = [others[-1]]
    yield "".join(begun)


def _json_rows(path: Path, field: str) -> Iterator[str]:
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            hint = " One JSON object a line is read here, no array over many lines." if line.lstrip()[0] == "[" else ""
            raise ValueError(f"{path}, line {number} is not JSON ({error}): {line[:60]!r}.{hint}") from None
        if not isinstance(row, dict):
            raise ValueError(
                f"{path}, line {number} is a JSON {type(row).__name__}, not an object: each line must be like "
                f'{{"{field}": "..."}}.'
            )
        if field not in row:
            there = ", ".join(map(repr, row)) or "none"
            raise ValueError(
                f"{path}, line {number} has no field {field!r}. Its fields: {there}. Rename the right one."
            )
        if not isinstance(row[field] or "", str):
            raise ValueError(
                f"{path}, line {number}: {field!r} is a {type(row[field]).__name__}, and must be a string."
            )
        yield row[field] or ""


def _parquet_rows(path: Path, field: str) -> Iterator[str]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise ImportError(f"{path} is a parquet file, and reading one needs pyarrow: {EXTRA}.") from error
    try:
        with open(path, "rb") as file:
            if file.read(12) == b"version http":
                raise ValueError(
                    f"{path} is the pointer that git keeps for a large file, not the file: run `git lfs pull` there."
                )
        with parquet.ParquetFile(path) as file:
            if field not in file.schema_arrow.names:
                columns = ", ".join(map(repr, file.schema_arrow.names))
                raise ValueError(f"{path} has no column {field!r}. Its columns: {columns}. Rename the right one.")
            for group in range(file.num_row_groups):  # one at a time: asked for all, it would hold many of them at once
                for batch in file.iter_batches(ROWS, row_groups=[group], columns=[field], use_threads=False):
                    for text in batch.column(0).to_pylist():
                        if not isinstance(text or "", str):
                            kind = file.schema_arrow.field(field).type
                            raise ValueError(f"{path}: the column {field!r} holds {kind}, and must hold strings.")
                        yield text or ""
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path} is not a whole parquet file ({error}): copy or download it again.") from error
    except OSError as error:  # pyarrow's ArrowIOError is one: a page that is cut off or damaged
        raise ValueError(f"{path} cannot be read ({error}): copy or download it again.") from error


def _joined_into_articles(rows: Iterator[str]) -> Iterator[str]:
    """Rows joined, one a line. An article begins at a title between two empty lines: some tables have rows like one."""
    article, before, row = [], "", next(rows, None)
    while row is not None:
        after = next(rows, None)
        if TITLE.fullmatch(row) and not before.strip() and not (after or "").strip() and article:
            yield "".join(article)
            article = []
        article.append(row if row.endswith("\n") else row + "\n")
        before, row = row, after
    yield "".join(article)
