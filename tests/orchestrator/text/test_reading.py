"""Files read as documents: nothing lost at any boundary, and every broken file said for what it is."""

import gzip
import json
import re
import sys

import datasets
import pyarrow
import pytest
from pyarrow import parquet

from orchestrator.text import reading
from orchestrator.text.reading import has_text, read_documents

MARK = "<|endoftext|>"


def written(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize("block", [1, 2, 3, 5, 7, 13, 64, 1000])
def test_a_text_file_is_split_at_the_mark_wherever_a_block_ends(tmp_path, monkeypatch, block):
    monkeypatch.setattr(reading, "BLOCK", block)
    text = f"Eins \u20ac\r\nzwei{MARK}{MARK} \n{MARK}\U0001f600 <|endof drei\r{MARK}<|endoftext|<|endoftext{MARK}vier|>"
    path = written(tmp_path / "a.txt", (b"\xef\xbb\xbf" if block > 2 else b"") + text.encode())
    whole = path.read_text(encoding="utf-8-sig")  # Python's own decoder and line ends
    assert list(read_documents(path)) == [part for part in whole.split(MARK) if part.strip()]
    assert len(list(read_documents(path))) == 4


@pytest.mark.parametrize("block", [1, 2, 3, 17, 1000])
def test_json_lines_come_back_as_they_were_written(tmp_path, monkeypatch, block):
    monkeypatch.setattr(reading, "BLOCK", block)
    documents = ["one\n two", "\u2028 is no end of a line", '\U0001f600 "quoted" \\n', "last"]
    lines = [json.dumps({"id": i, "text": text}, ensure_ascii=False) for i, text in enumerate(documents)]
    path = written(tmp_path / "a.jsonl", "\n".join([*lines[:2], "", '{"text": ""}', '{"text": null}', *lines[2:]]))
    assert list(read_documents(path)) == documents


def test_files_that_datasets_writes_are_read(tmp_path):
    documents = [f"document {i} \u20ac\n" * (i % 7) for i in range(2500)]
    data = datasets.Dataset.from_dict({"id": list(range(2500)), "text": documents, "url": ["x"] * 2500})
    data.to_parquet(tmp_path / "a.parquet", batch_size=700)  # several row groups
    data.to_json(tmp_path / "a.jsonl")
    expected = [document for document in documents if document]
    assert list(read_documents(tmp_path / "a.parquet")) == expected
    assert list(read_documents(tmp_path / "a.jsonl")) == expected
    assert list(read_documents(tmp_path / "a.parquet", field="url")) == ["x"] * 2500


@pytest.mark.parametrize("kind", [pyarrow.string(), pyarrow.large_string(), pyarrow.string_view()])
def test_every_kind_of_string_column_is_read(tmp_path, kind):
    table = pyarrow.table({"text": pyarrow.array(["one", None, "", "two"], type=kind)})
    parquet.write_table(table, tmp_path / "a.parquet")
    assert list(read_documents(tmp_path / "a.parquet")) == ["one", "two"]


def test_compressed_files_are_read(tmp_path):
    written(tmp_path / "a.txt.gz", gzip.compress(f"one{MARK}two".encode()))
    written(tmp_path / "a.jsonl.gz", gzip.compress(b'{"text": "one"}\n{"text": "two"}\n', mtime=0))
    for name in ("a.txt.gz", "a.jsonl.gz"):
        assert list(read_documents(tmp_path / name)) == ["one", "two"]


def test_files_are_read_as_a_stream(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "BLOCK", 100)
    path = written(tmp_path / "a.jsonl", '{"text": "good"}\n' * 50 + "bad")
    rows = read_documents(path)
    assert [next(rows) for _ in range(50)] == ["good"] * 50  # the bad line is only met at the end
    with pytest.raises(ValueError, match="line 51"):
        next(rows)
    path = written(tmp_path / "b.txt", f"good{MARK}".encode() * 50 + b"\xff")
    assert next(read_documents(path)) == "good"
    assert has_text(path)

    documents = [str(i) * 10_000 for i in range(1000, 3000)]  # 80 MB of text in row groups of 100
    table = pyarrow.table({"text": documents, "other": [document[::-1] for document in documents]})
    parquet.write_table(table, tmp_path / "c.parquet", row_group_size=100, use_dictionary=False, compression="none")
    del table
    before, most = pyarrow.total_allocated_bytes(), 0
    for document in read_documents(tmp_path / "c.parquet"):
        assert document == documents.pop(0)
        most = max(most, pyarrow.total_allocated_bytes() - before)
    assert not documents
    assert most < 20e6  # the column is 80 MB, the file 160


def article(title, *paragraphs):
    rows = ["", f" = {title} = \n", ""]
    for number, paragraph in enumerate(paragraphs):
        rows += ["", f" = = Section {number} = = \n", "", f" {paragraph} \n", " = = = Deeper = = = \n"]
    return rows


def test_the_rows_of_wikitext_are_joined_into_articles(tmp_path):
    articles = [
        article("Valkyria Chronicles III", "A game .", "Its sequel ."),
        article("2 = 2", "An equation .", " = 5 = \n a row of a table that looks like a title"),
        article("\u014cita", "A city ."),
    ]
    table = [" = 5 = \n", "", " = 6 = \n", " = 7 = \n", ""]  # no two empty lines around any of these
    rows = [*articles[0], *articles[1], *table, *articles[2]]
    expected = [  # a row may lack its end of a line: empty ones do
        "".join(row if row.endswith("\n") else row + "\n" for row in part)
        for part in ([*articles[0][1:], ""], [*articles[1][1:], *table, ""], articles[2][1:])
    ]
    datasets.Dataset.from_dict({"text": rows}).to_parquet(tmp_path / "train-00000-of-00001.parquet")
    assert list(read_documents(tmp_path / "train-00000-of-00001.parquet", articles=True)) == expected
    written(tmp_path / "wiki.train.txt", "".join(row if row.endswith("\n") else " \n" for row in rows))
    from_text = [re.sub("(?m)^ $", "", text) for text in read_documents(tmp_path / "wiki.train.txt", articles=True)]
    assert [text.strip() for text in from_text] == [text.strip() for text in expected]
    without = list(read_documents(tmp_path / "train-00000-of-00001.parquet"))
    assert without == [row for row in rows if row]


def parquet_of(tmp_path, **columns):
    parquet.write_table(pyarrow.table(columns), tmp_path / "whole.parquet")
    return (tmp_path / "whole.parquet").read_bytes()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"abc\xe9t", "a.txt is not UTF-8 text .byte 3 is 0xe9"),
        ("a.txt", b"\xef\xbb\xbfabc\xe9t", "byte 6 is 0xe9"),
        ("a.txt", b"abc\xe2\x82", "byte 3 is 0xe2"),
        ("a.md", b"abc\x00def", "a.md is a binary file .byte 3 is 0"),
        ("a.txt", "text".encode("utf-16"), "UTF-16.*save it as UTF-8"),
        ("a.txt.gz", gzip.compress(b"text" * 99, mtime=0)[:-9], "not a whole gzip file"),
        ("a.txt.gz", b"no gzip at all", "not a whole gzip file"),
        ("a.jsonl", b'{"text": "a"}\nno', "a.jsonl, line 2 is not JSON .*'no'"),
        ("a.jsonl", b'{"text": "a"}\n\n{"body": "b", "id": 1}', "line 3 has no field 'text'. Its fields: 'body', 'id'"),
        ("a.jsonl", b"{}", "Its fields: none"),
        ("a.jsonl", b"[1, 2]", "line 1 is a JSON list, not an object"),
        ("a.json", b'[\n{"text": "a"}\n]', "One JSON object a line"),
        ("a.jsonl", b'{"text": 3}', "'text' is a int, and must be a string"),
        ("a.jsonl", b'{"text": "caf\xe9"}', "byte 13 is 0xe9"),
        ("a.jsonl", b"[" * 100_000, "line 1 is not JSON"),
        ("a.parquet", b"", "a.parquet is not a whole parquet file"),
        ("a.parquet", b"text" * 99, "not a whole parquet file"),
        ("a.parquet", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git lfs pull"),
    ],
)
@pytest.mark.parametrize("block", [1, 1 << 22])
def test_a_broken_file_is_said_for_what_it_is(tmp_path, monkeypatch, name, content, message, block):
    monkeypatch.setattr(reading, "BLOCK", block)
    if content[:2] == b"\xff\xfe" or content[:3] == b"\xef\xbb\xbf" or len(content) > 10_000:
        monkeypatch.setattr(reading, "BLOCK", 1 << 22)  # a byte-order mark is looked for in the first block
    with pytest.raises(ValueError, match=message):
        list(read_documents(written(tmp_path / name, content)))


def test_a_broken_parquet_file_is_said_for_what_it_is(tmp_path):
    text = [f"row {i} " * 20 for i in range(5000)]
    whole = parquet_of(tmp_path, text=text, number=list(range(5000)))
    assert list(read_documents(tmp_path / "whole.parquet")) == text
    with pytest.raises(ValueError, match=r"no column 'body'. Its columns: 'text', 'number'"):
        list(read_documents(tmp_path / "whole.parquet", field="body"))
    with pytest.raises(ValueError, match="'number' holds int64, and must hold strings"):
        list(read_documents(tmp_path / "whole.parquet", field="number"))
    with pytest.raises(ValueError, match="not a whole parquet file"):
        list(read_documents(written(tmp_path / "cut.parquet", whole[: len(whole) // 2])))
    damaged = whole[:1000] + b"\xff" * 1000 + whole[2000:]  # its footer is whole, a page is not
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / "damaged.parquet"))):
        list(read_documents(written(tmp_path / "damaged.parquet", damaged)))


def test_a_parquet_file_without_pyarrow_names_the_extra(tmp_path, monkeypatch):
    parquet_of(tmp_path, text=["a"])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=re.escape("pip install -r requirements-hub.txt")):
        list(read_documents(tmp_path / "whole.parquet"))


def test_a_file_that_is_not_there_is_said(tmp_path):
    for name in ("a.txt", "a.jsonl", "a.parquet"):
        with pytest.raises(ValueError, match=f"{name} cannot be read"):
            list(read_documents(tmp_path / name))
