"""FlexAttention over pages: the rule, the tiles, and, in the slow tests, the compiled kernel.

A kernel takes seconds to compile, so the usual tests call torch's function uncompiled, which asks the rule about every
pair and never looks at the tiles: those are held against the rule by themselves.
"""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from torch._dynamo.utils import counters
from torch.nn.attention.flex_attention import flex_attention as uncompiled

from CMHA.implementations import flex_attention, paged_flex
from tests.CMHA.implementations.paged_cases import TURNS, Batch, batches

MIXED = Batch((40, 0, 129, 64), (1, 150, 3, 1), 16, heads=2, kv_heads=1)


@pytest.fixture
def as_it_is(monkeypatch):
    monkeypatch.setattr(flex_attention, "compiled", lambda: uncompiled)


pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


@pytest.mark.parametrize("batch", TURNS[::2], ids=str)
def test_every_block_size_and_width_is_within_the_bound(batch, as_it_is):
    batch = replace(batch, garbage=1e4)
    assert batch.error_over_bound(batch.read("flex")) <= 1


def test_so_is_any_mix_of_reading_and_writing(as_it_is):
    @settings(max_examples=8)
    @given(batch=batches(garbage=(1e4,), most=60))
    def any_mix(batch):
        assert batch.error_over_bound(batch.read("flex")) <= 1

    any_mix()


def test_a_block_that_two_sequences_share_is_seen_by_both(as_it_is):
    batch = Batch((40, 50, 33), (1, 4, 1), 16, shared=2)
    assert batch.tables[0][:2] == batch.tables[1][:2] == batch.tables[2][:2]
    assert batch.error_over_bound(batch.read("flex")) <= 1


def allowed(batch: Batch) -> torch.Tensor:
    """(tokens, places of the pool): may this query see what lies there? Written out place by place."""
    rows = []
    for table, past, new in zip(batch.tables, batch.past, batch.new, strict=True):
        for position in range(past, past + new):
            row = torch.zeros(batch.num_blocks * batch.block_size, dtype=torch.bool)
            for at in range(position + 1):
                row[table[at // batch.block_size] * batch.block_size + at % batch.block_size] = True
            rows.append(row)
    return torch.stack(rows)


@pytest.mark.parametrize("block_size", [1, 3, 16, 128, 200])
def test_the_tiles_are_those_in_which_a_sequence_has_keys(block_size):
    batch = replace(MIXED, block_size=block_size, spare=600 // block_size + 1)
    block_mask = paged_flex.build_block_mask(batch.mask(), batch.num_blocks, "cpu")
    seen = allowed(batch)
    padded = torch.nn.functional.pad(seen, (0, -seen.shape[1] % 128, 0, -seen.shape[0] % 128))
    needed = padded.unflatten(1, (-1, 128)).unflatten(0, (-1, 128)).any(3).any(1)
    listed = block_mask.to_dense()[0, 0].bool()
    assert listed.shape == needed.shape == (math.ceil(155 / 128), math.ceil(batch.num_blocks * block_size / 128))
    assert (listed | ~needed).all()  # none is missing
    if block_size >= 16:  # smaller ones lie in every tile
        assert (~listed).any()  # the pool is not looked at as a whole
    held = torch.zeros(2, listed.shape[1], dtype=torch.bool)
    for tile, numbers in enumerate(((0, 1), (1, 2, 3))):  # sequence 1 goes on in the second tile of queries
        for block in {block for number in numbers for block in batch.mask().blocks[number]}:
            held[tile, block * block_size // 128 : (block * block_size + block_size - 1) // 128 + 1] = True
    assert torch.equal(listed, held)


def test_the_block_mask_is_built_once_for_all_layers(as_it_is, monkeypatch):
    made, real = [], paged_flex.build_block_mask
    monkeypatch.setattr(paged_flex, "build_block_mask", lambda *given: made.append(given) or real(*given))
    mask, pools = MIXED.mask(), MIXED.pools()
    for _ in range(3):
        paged_flex.read(MIXED.queries, *pools, mask, scale=1.0)
    assert len(made) == 1


def test_the_pool_is_a_view_and_not_copied(as_it_is, monkeypatch):
    given = []
    monkeypatch.setattr(
        flex_attention, "compiled", lambda: lambda *tensors, **options: given.extend(tensors) or tensors[0]
    )
    pools = MIXED.pools()
    paged_flex.read(MIXED.queries, *pools, MIXED.mask(), scale=1.0)
    assert [tensor.data_ptr() for tensor in given[1:]] == [pool.data_ptr() for pool in pools]


@pytest.mark.slow
def test_compiled_it_is_within_the_bound_and_compiles_for_kinds_of_call_and_not_for_lengths():
    """A minute or two. Few sequences, none of one token alone: such a pass is a kind of its own."""
    kinds = [((40, 0, 129, 64), (1, 20, 3, 1)), ((10, 60), (1, 30)), ((300, 200), (100, 160)), ((5, 9, 70), (1, 1, 2))]
    compiled = []
    for past, new in kinds:
        batch = Batch(past, new, 16)
        assert batch.error_over_bound(batch.read("flex")) <= 1
        compiled.append(counters["stats"]["unique_graphs"])
    assert compiled[-1] - compiled[0] <= 2
