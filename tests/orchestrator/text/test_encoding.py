"""Encoding side by side: the shards do not depend on how many do it, and no process is left behind."""

import json

import pytest

from orchestrator.text.documents import Source
from orchestrator.text.encoding import encode_pieces, make_shard
from orchestrator.text.pieces import Piece, cut_in_pieces
from orchestrator.text.shards import open_shard
from orchestrator.text.tokenizers import make_tokenizer, tokenizer_facts

DOCUMENTS = [f"Document {i} says: {'la ' * (i % 7)}and ends." for i in range(200)]
GPT2 = make_tokenizer("gpt2")


def encode(folder, workers, tokenizer=GPT2, documents=DOCUMENTS):
    folder.mkdir()
    pieces = list(cut_in_pieces([("train", document) for document in documents], 500))
    return encode_pieces(
        pieces, folder, tokenizer_facts(tokenizer), characters=sum(map(len, documents)), at_most=len(pieces),
        workers=workers, progress=False,
    )  # fmt: skip


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_one_process_and_three_make_the_same_shards(tmp_path):
    one, three = (encode(tmp_path / str(workers), workers) for workers in (1, 3))
    assert len(one) > 10
    assert one == three
    assert contents(tmp_path / "1") == contents(tmp_path / "3")
    ids = [i for record in one for i in open_shard(tmp_path / "1" / record["file"]).tolist()]
    assert ids == [i for document in DOCUMENTS for i in [50256, *GPT2.encode(document)]]
    assert sum(record["documents"] for record in one) == 200
    assert sum(record["tokens"] for record in one) == len(ids)


def test_shards_that_are_there_are_kept_and_damaged_ones_made_again(tmp_path):
    encode(tmp_path / "whole", 1)
    before = contents(tmp_path / "whole")
    names = sorted(before)
    (tmp_path / "whole" / names[3]).unlink()
    (tmp_path / "whole" / names[5]).write_bytes(before[names[5]][:-1])  # cut off
    (tmp_path / "whole" / names[7]).write_bytes(before[names[7]][:-1] + b"\xff")  # flipped bits
    kept = (tmp_path / "whole" / names[0]).stat()
    (tmp_path / "whole").rename(tmp_path / "again")
    facts, pieces = tokenizer_facts(GPT2), cut_in_pieces([("train", document) for document in DOCUMENTS], 500)
    encode_pieces(pieces, tmp_path / "again", facts, characters=1, at_most=1, workers=1, progress=False)
    assert contents(tmp_path / "again") == before
    now = (tmp_path / "again" / names[0]).stat()
    assert (now.st_ino, now.st_mtime_ns) == (kept.st_ino, kept.st_mtime_ns)


def test_an_error_in_a_worker_comes_back_in_its_own_words(tmp_path):
    tokenizer = make_tokenizer("char", ["only these"])
    with pytest.raises(ValueError, match=r"'q' \(U\+0071, .* is not one of") as caught:
        encode(tmp_path / "char", 2, tokenizer, ["only these" * 100, "queer" * 100])
    frame = caught.tb
    while frame.tb_next is not None:
        frame = frame.tb_next
    assert frame.tb_frame.f_code.co_filename.endswith("encoding.py")  # raised by a line of ours: an error for a user


def test_a_document_that_goes_on_in_the_next_shard_is_opened_once(tmp_path):
    piece = Piece("train-00000.tokens", [(False, " more"), (True, "new")], 8)
    record = make_shard(tmp_path / piece.file, piece.texts, json.dumps(tokenizer_facts(make_tokenizer("bytes"))))
    assert open_shard(tmp_path / piece.file).tolist() == [*b" more", 256, *b"new"]
    assert record["documents"] == 1


def test_a_source_can_be_read_while_it_is_encoded(tmp_path):
    """Pieces come from a generator: only what is in work is held in memory."""
    (tmp_path / "t.txt").write_text("word " * 2000)
    taken = []

    def pieces():
        for i, document in enumerate(Source("t", (tmp_path / "t.txt",)).documents(tmp_path / "t.txt")):
            for piece in cut_in_pieces([("train", document)], 1000):
                taken.append((i, len(list(tmp_path.glob("*.tokens")))))
                yield piece

    facts = tokenizer_facts(make_tokenizer("bytes"))
    encode_pieces(pieces(), tmp_path, facts, characters=10_000, at_most=10, workers=1, progress=False)
    assert [made for _, made in taken] == list(range(10))  # each was made before the next was read
