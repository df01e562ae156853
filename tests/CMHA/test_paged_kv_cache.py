"""The paged cache: each token's keys go to the slot that its sequence's block table says, and nowhere else."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from CMHA.implementations import paged_plain
from CMHA.paged_kv_cache import PagedKVCache, PagedMask, padded_rows


@st.composite
def passes(draw):
    """(tables, lengths, new_tokens, block_size): sequences with blocks of their own, in no order, some to spare."""
    block_size = draw(st.sampled_from([1, 2, 3, 16]))
    lengths = draw(st.lists(st.integers(0, 20), min_size=1, max_size=5))
    new = [draw(st.integers(1, 9)) for _ in lengths]
    held = [
        -(-(length + more) // block_size) + draw(st.integers(0, 2)) for length, more in zip(lengths, new, strict=True)
    ]
    free = draw(st.permutations(range(sum(held) + 2)))
    tables, start = [], 0
    for count in held:
        tables.append(list(free[start : start + count]))
        start += count
    return tables, lengths, new, block_size


@given(passes())
def test_every_token_has_its_slot_and_its_position(given_pass):
    tables, lengths, new, block_size = given_pass
    mask = PagedMask(*given_pass)
    tokens = [(table, at) for table, length, more in zip(tables, lengths, new, strict=True)
              for at in range(length, length + more)]  # fmt: skip
    assert mask.slots.tolist() == [table[at // block_size] * block_size + at % block_size for table, at in tokens]
    assert mask.positions().tolist() == [[at for _, at in tokens]]
    assert mask.query_len == len(tokens)
    ends = [sum(new[: number + 1]) - 1 for number in range(len(new))]
    assert mask.last.tolist() == ends
    for sequence, table, length, more, end in zip(mask.sequences, tables, lengths, new, ends, strict=True):
        assert sequence.rows == slice(end + 1 - more, end + 1)
        assert sequence.table.tolist() == table[: -(-(length + more) // block_size)]  # the blocks to spare are left out
        assert (sequence.mask.query_len, sequence.mask.key_len, sequence.mask.kind) == (more, length + more, "causal")


@given(passes())
def test_what_kernels_are_told_of_some_of_the_sequences(given_pass):
    tables, lengths, new, block_size = given_pass
    mask = PagedMask(*given_pass)
    assert mask.writing() == [number for number, count in enumerate(new) if count == 1]
    assert mask.reading() == [number for number, count in enumerate(new) if count > 1]
    chosen = range(0, len(new), 2)
    part = mask.part(chosen)
    assert part.rows.tolist() == [row for number in chosen for row in range(sum(new[:number]), sum(new[: number + 1]))]
    assert part.new_tokens == [new[number] for number in chosen]
    assert part.lengths == part.lengths_there.tolist() == [lengths[number] + new[number] for number in chosen]
    assert part.tables.dtype == part.lengths_there.dtype == torch.int32  # as flash-attn asks
    for row, number, length in zip(part.tables.tolist(), chosen, part.lengths, strict=True):
        held = -(-length // block_size)
        assert row == tables[number][:held] + [0] * (len(row) - held)
    assert mask.part(chosen) is part  # made once


@given(passes(), st.integers(0, 9))
def test_keys_are_written_to_their_slots_in_their_layer_and_nothing_else_is_touched(given_pass, seed):
    *_, block_size = given_pass
    mask, generator = PagedMask(*given_pass), torch.Generator().manual_seed(seed)
    cache = PagedKVCache(3, mask.highest_block + 2, block_size, 2, 4)
    for pools in cache.pools:
        for pool in pools:
            pool.normal_(generator=generator)
    before = [[pool.clone() for pool in pools] for pools in cache.pools]
    new = [torch.randn(1, 2, mask.query_len, 4, generator=generator) for _ in range(2)]
    keys, values = cache.at(mask)[1].append(*new)
    for pool, old, tensor, returned in zip(cache.pools[1], before[1], new, (keys, values), strict=True):
        for token, slot in enumerate(mask.slots.tolist()):
            old[slot // block_size, slot % block_size] = tensor[0, :, token]
        assert torch.equal(pool, old)
        assert returned.data_ptr() == pool.data_ptr()  # no copy
        assert torch.equal(returned, pool.transpose(1, 2))
    for layer in (0, 2):
        assert all(torch.equal(pool, old) for pool, old in zip(cache.pools[layer], before[layer], strict=True))


def test_what_was_written_in_pieces_is_read_in_one():
    cache, texts = PagedKVCache(1, 9, 4, 2, 3), [torch.randn(1, 2, length, 3) for length in (11, 6)]
    tables, lengths = [[7, 2, 5], [0, 8]], [0, 0]
    for new in ((4, 1), (1, 3), (6, 2)):
        layer = cache.at(PagedMask(tables, lengths, new, 4))[0]
        piece = torch.cat([text[:, :, length : length + more] for text, length, more in zip(texts, lengths, new, strict=True)], 2)  # fmt: skip # noqa: E501
        keys, values = layer.append(piece, -piece)
        lengths = [length + more for length, more in zip(lengths, new, strict=True)]
    for table, text in zip(tables, texts, strict=True):
        assert torch.equal(paged_plain.gather(keys, torch.tensor(table), text.shape[2]), text)
        assert torch.equal(paged_plain.gather(values, torch.tensor(table), text.shape[2]), -text)


def test_under_autocast_narrower_keys_go_into_the_pool_in_its_dtype():
    cache = PagedKVCache(1, 2, 4, 2, 3)
    new = torch.randn(1, 2, 1, 3, dtype=torch.bfloat16)
    keys, _ = cache.at(PagedMask([[1]], [0], [1], 4))[0].append(new, new)
    assert torch.equal(keys[1, :, 0], new[0, :, 0].float())


def test_a_copied_block_is_the_same_in_every_layer_and_the_others_stay():
    cache = PagedKVCache(2, 5, 4, 2, 3)
    for pools in cache.pools:
        for pool in pools:
            pool.normal_()
    before = [[pool.clone() for pool in pools] for pools in cache.pools]
    cache.copy_block(4, 1)
    for pools, olds in zip(cache.pools, before, strict=True):
        for pool, old in zip(pools, olds, strict=True):
            assert torch.equal(pool[1], old[4])
            kept = [0, 2, 3, 4]
            assert torch.equal(pool[kept], old[kept])


def test_memory_is_what_the_pools_take():
    cache = PagedKVCache(3, 5, 16, 2, 8, dtype=torch.bfloat16)
    assert cache.nbytes == 3 * 2 * 5 * 16 * 2 * 8 * 2
    assert cache.pools[0][0].dtype == torch.bfloat16
    assert cache.length == 0


WRONG = {
    "table_too_short": (
        ([[1]], [4], [1], 4),
        r"1 new tokens behind 4 need 2 blocks of 4, and the table has 1: reserve",
    ),
    "no_new_token": (([[1]], [2], [0], 4), "0 new tokens behind 2"),
    "fewer_than_none": (([[1]], [-1], [2], 4), "2 new tokens behind -1"),
    "one_block_twice": (([[3, 3]], [4], [1], 4), r"names different blocks, by numbers from 0 on; got \[3, 3\]"),
    "a_negative_block": (([[-1]], [0], [1], 4), r"by numbers from 0 on; got \[-1\]"),
    "a_write_into_a_shared_block": (([[3, 1], [3, 1]], [4, 5], [2, 1], 4), r"one place of the blocks \[1\]: copy them"),
    "unequal_numbers": (([[1]], [0, 0], [1], 4), "got 1 tables, 2 lengths and 1 numbers of new tokens"),
    "nobody": (([], [], [], 4), "one sequence at least; got 0 tables"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_pass_that_cannot_be_is_refused_with_what_is_wrong(name):
    arguments, said = WRONG[name]
    with pytest.raises(ValueError, match=said):
        PagedMask(*arguments)


def test_reading_a_shared_block_is_no_write_and_no_wrong():
    mask = PagedMask([[3, 1], [3, 2]], [4, 4], [1, 1], 4)
    assert mask.slots.tolist() == [4, 8]


def test_a_mask_that_does_not_fit_the_cache_is_refused():
    cache = PagedKVCache(1, 3, 4, 2, 3)
    with pytest.raises(ValueError, match="for blocks of 8 tokens, the cache has 4"):
        cache.at(PagedMask([[1]], [0], [1], 8))
    with pytest.raises(ValueError, match=r"has blocks 0 to 2, asked for: \[3\]"):
        cache.at(PagedMask([[1], [0, 3]], [0, 4], [1, 1], 4))
    for source, target in ((3, 0), (0, -1)):
        with pytest.raises(ValueError, match="has blocks 0 to 2, asked for"):
            cache.copy_block(source, target)


@pytest.mark.parametrize(("blocks", "size"), [(0, 4), (4, 0)])
def test_a_cache_without_room_is_refused(blocks, size):
    with pytest.raises(ValueError, match=f"num_blocks={blocks}, block_size={size}"):
        PagedKVCache(1, blocks, size, 2, 3)


def test_what_has_no_meaning_for_pages_says_so():
    with pytest.raises(TypeError, match="no length of its own: cut the sequence's block table"):
        PagedKVCache(1, 3, 4, 2, 3).truncate(0)
    mask = PagedMask([[1]], [0], [1], 4)
    with pytest.raises(TypeError, match="take each sequence's own mask"):
        mask.dense()


def test_rows_are_filled_up_with_0():
    assert padded_rows([[3], [1, 2, 5], [4, 4]]) == [[3, 0, 0], [1, 2, 5], [4, 4, 0]]
