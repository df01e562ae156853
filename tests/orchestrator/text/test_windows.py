"""Windows of tokens: every one of an epoch once, whoever reads them, however many at a time."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.text.corpora import IGNORED
from orchestrator.text.documents import Source
from orchestrator.text.prepare import prepare
from orchestrator.text.tokenizers import make_tokenizer
from orchestrator.text.windows import TokenStream, TokenWindows

BYTES = make_tokenizer("bytes")


def counting(tokens: int, context_length: int, held_out: int = 100, **options) -> TokenWindows:
    """Windows of 0, 1, 2, ...: each token says where it stands."""
    ids = np.arange(tokens) + 1000  # no end-of-text among them
    return TokenWindows((ids, np.arange(held_out) + 10**6, BYTES), context_length, **options)


sizes = st.tuples(st.integers(1, 9), st.integers(0, 200), st.integers(0, 2**32 - 1))


@settings(max_examples=80, deadline=None)
@given(sizes, st.integers(0, 5))
def test_an_epoch_visits_every_window_once(size, epoch):
    length, more, seed = size
    tokens = length + 1 + more
    samples = counting(tokens, length, seed=seed)
    inputs, targets, documents = samples.batch(epoch * samples.per_epoch, samples.per_epoch)
    assert inputs.shape == targets.shape == (samples.per_epoch, length)
    assert inputs.dtype == targets.dtype == torch.int64
    assert documents is None
    assert torch.equal(targets, inputs + 1)
    assert torch.equal(inputs, inputs[:, :1] + torch.arange(length))
    starts = sorted((inputs[:, 0] - 1000).tolist())
    offset = starts[0]
    assert 0 <= offset < length
    assert starts == [offset + i * length for i in range(samples.per_epoch)]  # once each, side by side
    assert starts[-1] + length < tokens
    left_out = tokens - 1 - samples.per_epoch * length
    assert left_out < 2 * length  # at most a window less than fits at all


@settings(max_examples=60, deadline=None)
@given(sizes, st.integers(0, 100), st.lists(st.integers(1, 12), min_size=1, max_size=12))
def test_readers_that_take_different_counts_read_the_same_samples(size, first, counts):
    length, more, seed = size
    one, other = (counting(20 * length + more, length, seed=seed) for _ in range(2))
    rows, at = [], first
    for count in (min(count, one.per_epoch) for count in counts):
        rows.append(one.batch(at, count).inputs)
        at += count
    alone = [other.batch(i, 1).inputs for i in reversed(range(first, at))][::-1]  # and not in this order
    assert torch.equal(torch.cat(rows), torch.cat(alone))


def test_twelve_at_a_time_and_five_at_a_time_are_one_sequence():
    one, other = (counting(5000, 32, seed=7) for _ in range(2))
    twelve = torch.cat([one.batch(i, 12).inputs for i in range(0, 480, 12)])  # three epochs
    five = torch.cat([other.batch(i, 5).inputs for i in range(0, 480, 5)])
    assert one.per_epoch < 200
    assert torch.equal(twelve, five)


def test_another_epoch_has_another_order_and_another_offset_and_so_has_another_seed():
    samples = counting(5000, 32)
    epochs = [samples.batch(e * samples.per_epoch, samples.per_epoch).inputs[:, 0] - 1000 for e in range(8)]
    offsets = {int(epoch.min()) for epoch in epochs}
    assert len(offsets) > 4
    orders = {tuple(((epoch - epoch.min()) // 32).tolist()) for epoch in epochs}
    assert len(orders) == 8
    for order in orders:
        assert list(order) != sorted(order)
    other = counting(5000, 32, seed=1)
    assert not torch.equal(other.batch(0, 50).inputs, samples.batch(0, 50).inputs)


def test_all_offsets_come_and_no_token_is_never_seen():
    samples = counting(400, 8, seed=3)
    starts, seen = set(), set()
    for epoch in range(60):
        batch = samples.batch(epoch * samples.per_epoch, samples.per_epoch)
        starts.add(int(batch.inputs.min()) - 1000)
        seen |= set(batch.targets.flatten().tolist())
    assert starts == set(range(8))
    assert len(seen) == 399  # every token but the first is predicted at some time


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=8), st.data())
def test_shards_are_read_as_one_row(lengths, data):
    whole = np.arange(sum(lengths))
    shards = np.split(whole.astype(np.uint16), np.cumsum(lengths)[:-1])
    stream = TokenStream(shards)
    assert len(stream) == len(whole)
    start = data.draw(st.integers(0, len(whole) - 1))
    out = np.empty(data.draw(st.integers(1, len(whole) - start)), dtype=np.int64)
    stream.read(start, out)
    assert out.tolist() == whole[start : start + len(out)].tolist()


def test_windows_over_shards_on_the_disk_are_those_of_the_ids_in_memory(tmp_path):
    text = " ".join(f"number {i} follows {i - 1}." for i in range(600))
    prepared = prepare(Source("n", text=text), "bytes", tmp_path, shard_characters=500, progress=False)
    assert len(prepared.train) > 10
    assert len(prepared.validation) > 1
    cut = int(len(text) * 0.9)
    train, held_out = ([256, *BYTES.encode(part)] for part in (text[:cut], text[cut:]))
    ours, plain = TokenWindows(prepared, 64, seed=5), TokenWindows((train, held_out, BYTES), 64, seed=5)
    assert ours.per_epoch == plain.per_epoch
    for first in range(0, 400, 50):
        assert torch.equal(ours.batch(first, 50).inputs, plain.batch(first, 50).inputs)
        assert torch.equal(ours.batch(first, 50).targets, plain.batch(first, 50).targets)
    for a, b in zip(ours.validation(10**6), plain.validation(10**6), strict=True):
        assert torch.equal(a.inputs, b.inputs)
    assert (ours.name, ours.documents) == ("n", 1)
    assert "n: 1 document, " in ours.describe()
    assert f"{len(train):,} tokens to train on" in ours.describe()


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 9), st.integers(2, 100), st.integers(0, 30), st.integers(1, 10))
def test_with_enough_tokens_every_held_out_token_is_predicted_once(length, held_out, more, batch_size):
    samples = counting(200, length, held_out)
    batches = samples.validation(held_out - 1 + more, batch_size)
    predicted = [int(t) for batch in batches for t in batch.targets.flatten() if t != IGNORED]
    assert predicted == [10**6 + i for i in range(1, held_out)]
    for inputs, targets, _ in batches:
        assert inputs.shape == targets.shape
        assert inputs.shape[1] == length
        assert len(inputs) <= batch_size
        kept = targets != IGNORED
        assert torch.equal(inputs[kept] + 1, targets[kept])


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 9), st.integers(20, 300), st.integers(1, 400))
def test_validation_is_about_as_long_as_asked_and_spread_over_the_held_out_part(length, held_out, tokens):
    samples = counting(200, length, held_out)
    batches = samples.validation(tokens)
    targets = torch.cat([batch.targets for batch in batches])
    predicted = int((targets != IGNORED).sum())
    assert predicted <= max(tokens, length)
    assert predicted > min(tokens, held_out - 1) - length
    starts = torch.cat([batch.inputs[:, 0] for batch in batches]).tolist()
    assert len(set(starts)) == len(starts)  # no window twice
    gaps = {b - a for a, b in itertools.pairwise(starts)}
    assert not gaps or max(gaps) - min(gaps) <= length
    if len(starts) > 1:  # the last one stands as near to the end as the gaps let it
        assert 10**6 + held_out - starts[-1] <= max(gaps) + 2 * length
    assert all(torch.equal(a.targets, b.targets) for a, b in zip(batches, samples.validation(tokens), strict=True))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from([5, 6, 256]), min_size=30, max_size=200), st.integers(1, 12))
def test_documents_are_numbered_from_the_token_that_opens_them(ids, length):
    samples = TokenWindows((ids, ids, BYTES), length, pack_documents=True)
    for inputs, _, documents in [samples.batch(0, samples.per_epoch), *samples.validation(50)]:
        assert documents.shape == inputs.shape
        for row, numbers in zip(inputs.tolist(), documents.tolist(), strict=True):
            number, expected = 0, []
            for token in row:
                number += token == 256
                expected.append(number)
            assert numbers == expected
    assert (samples.batch(0, samples.per_epoch).targets != IGNORED).all()


def test_a_batch_larger_than_the_data_and_data_shorter_than_a_window():
    samples = counting(100, 16)
    with pytest.raises(ValueError, match=r"short for a batch of 6: .* 100 tokens has 5 windows of context_length=16"):
        samples.batch(0, 6)
    with pytest.raises(ValueError, match=r"it has 16 tokens to train on, and one window of context_length=16 takes 17"):
        counting(16, 16)
    assert counting(17, 16).batch(0, 1).inputs.tolist() == [list(range(1000, 1016))]
    with pytest.raises(ValueError, match="its held-out part has 1 tokens"):
        counting(100, 16, held_out=1)


def test_every_number_that_makes_no_sense_is_named():
    with pytest.raises(ValueError, match=r"context_length must be .* 1 or more, got 0; seed must be .* got -1"):
        counting(100, 0, seed=-1)
    samples = counting(100, 16)
    with pytest.raises(ValueError, match=r"first must be .* 0 or more, got -1; count must be .* got 0"):
        samples.batch(-1, 0)
    with pytest.raises(ValueError, match="tokens must be a whole number, 1 or more, got 0"):
        samples.validation(0)


def test_the_prompt_is_the_start_of_the_held_out_text():
    assert counting(100, 40).prompt().tolist() == [[10**6 + i for i in range(16)]]
    assert counting(100, 8).prompt().shape == (1, 4)
    assert counting(100, 1).prompt().shape == (1, 1)
