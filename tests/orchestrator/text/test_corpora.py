"""Where text comes from, and how it is cut into batches."""

import math

import pytest
import torch

from GPT2Model.tokenizer import get_tokenizer
from orchestrator.text import tales
from orchestrator.text.corpora import (
    IGNORED,
    TalesCorpus,
    TextCorpus,
    first_tokens,
    load_corpus,
    python_docs,
    read_text,
)

TEXT = " ".join(f"number {i} follows number {i - 1}." for i in range(800))


def test_the_targets_are_the_inputs_one_token_ahead():
    corpus = TextCorpus(TEXT, "numbers", context_length=16)
    inputs, targets = corpus.batch(3, 4)
    assert inputs.shape == targets.shape == (4, 16)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    ids = get_tokenizer().encode(TEXT)
    first = next(i for i in range(len(ids)) if ids[i : i + 16] == inputs[0].tolist())
    assert targets[0, -1] == ids[first + 16]


def test_an_epoch_visits_every_window_of_the_training_part_once():
    corpus = TextCorpus(TEXT, "numbers", context_length=16)
    whole = corpus.train_ids[: corpus.windows * 16].view(-1, 16).tolist()
    batches = corpus.windows // 4
    rows = [row for i in range(batches) for row in corpus.batch(i, 4)[0].tolist()]
    assert len({tuple(row) for row in rows}) == batches * 4  # none twice
    assert {tuple(row) for row in rows} <= {tuple(row) for row in whole}
    assert rows != whole[: len(rows)]  # and not in the order of the text
    second = [row for i in range(batches, 2 * batches) for row in corpus.batch(i, 4)[0].tolist()]
    assert second != rows


def test_a_batch_is_a_pure_function_of_seed_and_index():
    one, other = (TextCorpus(TEXT, "numbers", context_length=16, seed=3) for _ in range(2))
    for index in range(5):
        one.batch(index, 4)  # what came before leaves no trace
    assert torch.equal(one.batch(2, 4)[0], other.batch(2, 4)[0])
    assert not torch.equal(one.batch(2, 4)[0], TextCorpus(TEXT, "numbers", context_length=16, seed=4).batch(2, 4)[0])
    stories = [TalesCorpus(seed=3, held_out=50) for _ in range(2)]
    stories[0].batch(0, 3)
    assert torch.equal(stories[0].batch(7, 3)[0], stories[1].batch(7, 3)[0])


def test_the_held_out_text_is_never_trained_on():
    corpus = TextCorpus(TEXT, "numbers", context_length=16)
    assert torch.equal(torch.cat([corpus.train_ids, corpus.validation_ids]), torch.tensor(get_tokenizer().encode(TEXT)))
    trained = {tuple(row) for i in range(corpus.windows // 2) for row in corpus.batch(i, 2)[0].tolist()}
    held_out = {tuple(row) for inputs, _ in corpus.validation for row in inputs.tolist()}
    assert held_out
    assert not trained & held_out
    stories = TalesCorpus(seed=0)
    assert not set(stories.held_out) & {story for i in range(50) for story in tales.stories(16, stories._seed_of(i))}


def test_a_story_is_read_from_its_first_token_to_its_end():
    corpus = TalesCorpus(seed=1, held_out=60)
    end = corpus.tokenizer.end_of_text
    rows = [(x, y) for inputs, targets in corpus.validation for x, y in zip(inputs, targets, strict=True)]
    assert len(rows) == 60
    for story, (x, y) in zip(corpus.held_out, rows, strict=True):
        ids = corpus.tokenizer.encode(story)
        assert x[: len(ids) + 1].tolist() == [end, *ids]
        assert y[: len(ids) + 1].tolist() == [*ids, end]
        assert (y[len(ids) + 1 :] == IGNORED).all()


def test_the_floor_is_the_loss_of_a_model_that_knows_the_grammar():
    corpus = TalesCorpus(seed=2, held_out=20)
    total, tokens = 0.0, 0
    for story in corpus.held_out:
        words = [corpus.tokenizer.decode([i]) for i in corpus.tokenizer.encode(story)]
        for i, word in enumerate([*words, tales.END_OF_TEXT]):
            total -= math.log(tales.next_word_probabilities(words[:i])[word])
            tokens += 1
    assert corpus.floor == pytest.approx(total / tokens, rel=1e-12)


def test_word_frequencies_give_the_loss_they_should():
    corpus = TextCorpus("a b " * 3000, "letters", context_length=8)
    counts = torch.bincount(corpus.train_ids, minlength=50257) + 1
    expected = []
    for _, targets in corpus.validation:
        expected += [-math.log(counts[t].item() / counts.sum().item()) for t in targets.flatten()]
    assert corpus.unigram_loss() == pytest.approx(sum(expected) / len(expected), rel=1e-9)


def test_python_docs_are_a_real_corpus_without_a_network():
    text = python_docs()
    assert len(text) > 300_000
    assert "assert" in text
    assert text == read_text("python-docs")


def test_a_folder_is_read_in_order_with_its_documents_kept_apart(tmp_path):
    (tmp_path / "b.txt").write_text("second", encoding="utf-8")
    (tmp_path / "a.md").write_text("first", encoding="utf-8")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "c.txt").write_bytes(b"\xef\xbb\xbfthird")  # a byte-order mark is not text
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    (tmp_path / "empty.txt").write_text("")
    assert read_text(tmp_path) == "first<|endoftext|>second<|endoftext|>third"
    assert get_tokenizer().encode(read_text(tmp_path)).count(50256) == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "is empty"), (b"  \n ", "is empty"), (b"caf\xe9", r"not UTF-8 text \(byte 3 is 0xe9\)")],
)
def test_a_file_that_is_no_text_is_refused_with_the_reason(tmp_path, content, message):
    (tmp_path / "it.txt").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_text(tmp_path / "it.txt")


def test_what_is_not_there_is_named_with_what_there_is(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no-such: no such file.*tales, python-docs"):
        load_corpus("no-such", 16)
    with pytest.raises(FileNotFoundError, match="no text files"):
        load_corpus(str(tmp_path), 16)


def test_a_text_too_short_says_how_much_is_needed():
    with pytest.raises(ValueError, match=r"too short: \d+ tokens.*at least 170 tokens"):
        TextCorpus("too little " * 10, "it", context_length=16)
    with pytest.raises(ValueError, match=r"too short for one batch: it has \d+ windows of 16 tokens"):
        TextCorpus("just enough " * 100, "it", context_length=16).batch(0, 64)
    with pytest.raises(ValueError, match=r"it has 3 tokens, and 513 are needed"):
        first_tokens("one two three", batch=2, tokens=256)


def test_the_first_tokens_are_those_of_the_whole_text_encoded():
    ids = get_tokenizer().encode(TEXT)
    inputs, targets = first_tokens(TEXT, batch=2, tokens=9)
    assert inputs.flatten().tolist() == ids[:18]
    assert targets.flatten().tolist() == ids[1:19]
    spaced = "word" + " " * 5000 + "end"  # few tokens for many characters: the look ahead must not cut too early
    assert first_tokens(spaced, batch=1, tokens=2)[0].flatten().tolist() == get_tokenizer().encode(spaced)[:2]
