"""The one door to a data set: any text becomes samples by number, prepared once, and the tales keep their floor."""

import math
import random
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.text import tales
from orchestrator.text.corpora import IGNORED
from orchestrator.text.documents import Source
from orchestrator.text.prepare import UNFINISHED, prepare
from orchestrator.text.samples import TALES_LENGTH, TalesSamples, open_samples

TEXT = " ".join(f"number {i} follows number {i - 1}." for i in range(800))


@pytest.fixture
def book(tmp_path):
    path = tmp_path / "a book.txt"
    path.write_text(TEXT)
    return path


def opened(dataset, tmp_path, tokenizer="char", **options):
    options = {"context_length": 32, "data_dir": tmp_path / "data", "progress": False, **options}
    return open_samples(dataset, tokenizer, **options)


def test_a_text_file_becomes_samples_with_the_last_tenth_held_out(book, tmp_path):
    samples = opened(book, tmp_path)
    inputs, targets, documents = samples.batch(0, 4)
    assert inputs.shape == targets.shape == (4, 32)
    assert documents is None
    for row, following in zip(inputs, targets, strict=True):
        text = samples.tokenizer.decode(torch.cat([row[:1], following])).removeprefix("<|endoftext|>")
        assert text in TEXT[: int(0.9 * len(TEXT))]
    held_out = torch.cat([b.targets[b.targets != IGNORED] for b in samples.validation(10**6)])
    assert samples.tokenizer.decode(held_out) == TEXT[int(0.9 * len(TEXT)) :]
    assert samples.floor is None
    assert samples.per_epoch == (int(0.9 * len(TEXT)) + 1 - 32) // 32


@pytest.mark.parametrize("tokenizer", [None, "gpt2", "bytes", "char"])
def test_every_tokenizer_and_gpt2_where_none_is_named(book, tmp_path, tokenizer):
    samples = opened(book, tmp_path, tokenizer)
    assert samples.tokenizer.name == (tokenizer or "gpt2")
    assert samples.prompt()[0, 0] == samples.tokenizer.end_of_text  # the held-out part is opened, too
    assert int(samples.batch(0, 8).inputs.max()) < samples.tokenizer.vocab_size
    assert f"tokenizer {samples.tokenizer.name}" in samples.describe()
    assert "1 document, " in samples.describe()


def test_a_text_is_prepared_once_and_found_again(book, tmp_path):
    first = opened(book, tmp_path)
    (folder,) = (tmp_path / "data" / "prepared").iterdir()
    assert folder.name.startswith("a_book-char-")
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    second = opened(book, tmp_path, seed=0)
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    assert torch.equal(first.batch(3, 5).inputs, second.batch(3, 5).inputs)
    opened(book, tmp_path, "bytes")
    book.write_text(TEXT + " And on.")
    opened(book, tmp_path)
    assert len(list((tmp_path / "data" / "prepared").iterdir())) == 3  # another tokenizer, another text


def test_where_data_dir_cannot_be_written_the_temporary_folder_serves(book, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    said = []
    samples = opened(book, tmp_path, data_dir=tmp_path / "file" / "data", say=said.append)
    assert samples.batch(0, 2).inputs.shape == (2, 32)
    (line,) = said
    assert "cannot be written (Not a directory): the tokens are kept in " in line
    assert Path(line.split(" kept in ")[1].rstrip(".")).is_dir()
    assert list((tmp_path / "temporary").rglob("manifest.json"))


def test_a_prepared_folder_is_a_data_set_with_a_tokenizer_of_its_own(book, tmp_path):
    folder = tmp_path / "made"
    prepare(Source("book", (book,)), "char", folder, progress=False)
    for tokenizer in (None, "char"):
        samples = opened(folder, tmp_path, tokenizer)
        assert samples.tokenizer.name == "char"
        assert samples.name == "book"
    with pytest.raises(ValueError, match="was prepared with the tokenizer 'char', and 'gpt2' is asked for"):
        opened(folder, tmp_path, "gpt2")
    (folder / "manifest.json").rename(folder / UNFINISHED)
    with pytest.raises(FileNotFoundError, match="is not finished"):
        opened(folder, tmp_path, None)


def test_documents_are_numbered_where_they_are_to_be_packed(tmp_path):
    path = tmp_path / "many.txt"
    path.write_text("<|endoftext|>".join(f"document {i:02d} of many." for i in range(60)))
    samples = opened(path, tmp_path, "bytes", pack_documents=True)
    inputs, targets, documents = samples.batch(0, samples.per_epoch)
    assert (targets != IGNORED).all()  # no target is dropped: the last token of a document predicts the mark
    assert set(documents.diff(dim=1).unique().tolist()) == {0, 1}
    assert torch.equal(documents.diff(dim=1) == 1, inputs[:, 1:] == 256)
    assert opened(path, tmp_path, "bytes").batch(0, 1).documents is None


def test_what_cannot_be_opened(book, tmp_path):
    with pytest.raises(ValueError, match="context_length must be a whole number, 1 or more, got 0; seed"):
        opened(book, tmp_path, context_length=0, seed=-1)
    with pytest.raises(ValueError, match=r"got 'chars'. Did you mean 'char'"):
        opened(book, tmp_path, "chars")
    with pytest.raises(FileNotFoundError):
        opened(tmp_path / "missing.txt", tmp_path)
    with pytest.raises(ValueError, match=r"a book.txt is too short: .* one window of context_length=1048576 takes"):
        opened(book, tmp_path, context_length=2**20)
    with pytest.raises(ValueError, match="too short for a batch of 100000"):
        opened(book, tmp_path).batch(0, 100_000)


# Tales ---------------------------------------------------------------------------------------------------------------


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 2**32), st.integers(0, 10**9), st.lists(st.integers(1, 4), min_size=1, max_size=4))
def test_a_story_depends_on_seed_and_number_alone(seed, first, counts):
    samples, other = (TalesSamples(seed, held_out=1) for _ in range(2))
    rows, at = [], first
    for count in counts:
        inputs, targets, _ = samples.batch(at, count)
        rows += [(x[y != IGNORED].tolist(), y[y != IGNORED].tolist()) for x, y in zip(inputs, targets, strict=True)]
        at += count
    for i, (x, y) in reversed(list(enumerate(rows))):
        inputs, targets, _ = other.batch(first + i, 1)
        assert inputs[0].tolist() == x
        assert targets[0].tolist() == y
        assert x[1:] == y[:-1]
        assert x[0] == y[-1] == samples.tokenizer.end_of_text
        assert tales.check(samples.tokenizer.decode(y[:-1])) is None


def test_stories_differ_by_seed_and_by_number_and_none_is_held_out():
    one, other = TalesSamples(0), TalesSamples(1)

    def told(samples):
        inputs = samples.batch(0, 500).inputs
        return {samples.tokenizer.decode(row[1:]).split("<|endoftext|>")[0].strip() for row in inputs}

    assert len(told(one)) == len(told(other)) == 500
    assert not told(one) & told(other)
    assert not (told(one) | told(other)) & set(one.held_out)
    assert len(set(one.held_out)) == 500
    assert one.held_out == other.held_out  # so that the losses of two seeds are losses on one text


def test_the_floor_is_the_loss_of_a_model_that_knows_the_grammar():
    """Word for word, from `next_word_probabilities`: another way through the grammar than `log_probability`."""
    samples = TalesSamples(0, held_out=12)
    for tokens in (10**6, 300):
        nats, predicted = [], 0
        for inputs, targets, _ in samples.validation(tokens, batch_size=5):
            for x, y in zip(inputs, targets, strict=True):
                words = [samples.tokenizer.decode([i]) for i in x[y != IGNORED].tolist()]
                for place, target in enumerate(y[y != IGNORED].tolist()):
                    chances = tales.next_word_probabilities(words[1 : place + 1])
                    nats.append(-math.log(chances[samples.tokenizer.decode([target])]))
                    predicted += 1
        assert samples.floor_of(tokens) == pytest.approx(math.fsum(nats) / predicted, abs=1e-12)
        if tokens == 10**6:
            assert samples.floor == samples.floor_of(tokens)
        else:
            assert 150 < predicted <= 330


def test_validation_of_tales_is_as_long_as_asked():
    samples = TalesSamples(0)
    every = sum(int((b.targets != IGNORED).sum()) for b in samples.validation(32_768))
    assert 30_000 < every <= 32_768
    some = samples.validation(3000)
    assert 2700 < sum(int((b.targets != IGNORED).sum()) for b in some) < 3300
    assert all(torch.equal(a.inputs, b.inputs) for a, b in zip(some, samples.validation(3000), strict=True))


def test_a_context_that_holds_every_story_and_no_shorter_one(tmp_path):
    tokenizer, rng = tales.TalesTokenizer(), random.Random(0)
    longest = max(len(tokenizer.encode(tales.write_story(rng))) + 1 for _ in range(1000))
    assert longest == TALES_LENGTH
    assert opened("tales", tmp_path, None, context_length=TALES_LENGTH).per_epoch is None
    with pytest.raises(ValueError, match=f"context_length={TALES_LENGTH - 1} is too short. Use {TALES_LENGTH} or more"):
        opened("tales", tmp_path, None, context_length=TALES_LENGTH - 1)


def test_tales_keep_their_own_tokenizer(tmp_path):
    assert opened("tales", tmp_path, None, context_length=128).tokenizer.name == "tales"
    assert opened("tales", tmp_path, "tales", context_length=128).tokenizer.vocab_size == 177
    with pytest.raises(ValueError, match=r"tokenizer of its own.*'gpt2' is asked for.*Leave --tokenizer out"):
        opened("tales", tmp_path, "gpt2", context_length=128)
    assert not (tmp_path / "data").exists()  # nothing to prepare


def test_the_tales_can_be_prepared_as_a_text_with_another_tokenizer(tmp_path):
    text = "<|endoftext|>".join(tales.stories(100, seed=0))
    prepare(Source("tales", text=text), "char", tmp_path / "made", progress=False)
    assert opened(tmp_path / "made", tmp_path, None).tokenizer.name == "char"
