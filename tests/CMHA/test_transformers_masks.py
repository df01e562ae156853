"""CMHA/transformers_masks.py against transformers' own tables: the same pairs, for every pattern, length and cache."""

import pytest
import torch
from transformers import masking_utils

from CMHA.masks import AttentionMask
from CMHA.transformers_masks import RuleMask, TableMask, makers_of, mask_function_for, received, rules_of

make_mask = mask_function_for(masking_utils)

NUMBERS = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2, 2]]).expand(2, -1)  # three packed sequences in a row of nine
PLACES = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 0, 1]]).expand(2, -1)
causal, everything = masking_utils.causal_mask_function, masking_utils.bidirectional_mask_function
window = masking_utils.sliding_window_causal_mask_function(3)
PATTERNS = {
    "causal": (causal, {"causal": True}),
    "everything": (everything, {"causal": False}),
    "window": (window, {"causal": True, "window": 3}),
    "window around": (masking_utils.sliding_window_bidirectional_mask_function(2), {"causal": False, "window": 3}),
    "two windows": (masking_utils.and_masks(window, masking_utils.sliding_window_overlay(2)),
                    {"causal": True, "window": 2}),
    # what the rules of an AttentionMask cannot say
    "window behind alone": (masking_utils.sliding_window_overlay(2), None),
    "chunks": (masking_utils.chunked_causal_mask_function(4, torch.tensor([0, 1])), None),
    "a pattern of one's own": (lambda batch, head, query, key: (key <= query) & (key != 1), None),
    "causal or more": (masking_utils.or_masks(causal, lambda batch, head, query, key: (query < 2) & (key < 2)), None),
}  # fmt: skip
PACKED = masking_utils.packed_sequence_compatibility_function(causal, PLACES, NUMBERS)
PACKED_WINDOW = masking_utils.packed_sequence_compatibility_function(window, PLACES, NUMBERS)
# queries, keys, position of the first query, of the first key
LENGTHS = {
    "whole": (9, 9, 0, 0),
    "one of a cache": (1, 9, 8, 0),
    "a piece of the prompt": (4, 9, 5, 0),
    "static cache, the prompt": (4, 9, 0, 0),
    "static cache, a later piece": (3, 9, 4, 0),
    "window's cache, full": (1, 3, 8, 6),
    "window's cache, a piece": (4, 6, 5, 3),
    "window's static cache": (2, 6, 1, 0),
    "more queries than keys": (6, 4, 0, 0),
}
PADDING = {
    "none": None,
    "left": torch.arange(12)[None] >= torch.tensor([[0], [4]]),
    "right": torch.arange(12)[None] < torch.tensor([[9], [3]]),
    "hole": ~torch.isin(torch.arange(12), torch.tensor([2, 6])).expand(2, -1),
    "everything real": torch.ones(2, 12, dtype=torch.bool),
}


def theirs(pattern, lengths, padding):
    q_length, kv_length, q_offset, kv_offset = lengths
    return masking_utils.sdpa_mask(
        2, q_length, kv_length, q_offset, kv_offset, mask_function=pattern, attention_mask=padding,
        allow_is_causal_skip=False,
    )  # fmt: skip


def ours(pattern, lengths, padding, as_tensor=False):
    q_length, kv_length, q_offset, kv_offset = lengths
    q_offset = torch.tensor(q_offset) if as_tensor else q_offset
    return make_mask(
        2, q_length, kv_length, q_offset, kv_offset, mask_function=pattern, attention_mask=padding, config="ignored"
    )


def table_of(mask) -> torch.Tensor:
    """(2, 1, queries, keys), whatever our mask function gave."""
    return (mask[:] if isinstance(mask, RuleMask) else mask).expand(2, -1, -1, -1)


def seen(lengths, padding):
    """The padding as transformers has it at this moment: up to the last token that was given, at most."""
    q_length, _, q_offset, _ = lengths
    return None if padding is None else padding[:, : q_offset + q_length]


@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_our_mask_shows_the_pairs_that_transformers_own_table_shows(pattern, lengths, padding):
    function, sizes = PATTERNS[pattern][0], LENGTHS[lengths]
    padding = seen(sizes, PADDING[padding])
    expected = theirs(function, sizes, padding)
    for as_tensor in (False, True):
        mask = ours(function, sizes, padding, as_tensor)
        assert torch.equal(table_of(mask), expected)
        assert not isinstance(mask, RuleMask) or mask.key_len <= sizes[1]  # never more keys than there are


@pytest.mark.parametrize("function", [PACKED, PACKED_WINDOW], ids=["packed", "packed, window"])
def test_packed_sequences_become_documents(function):
    mask = ours(function, LENGTHS["whole"], None)
    assert isinstance(mask, RuleMask)
    assert mask.documents is not None
    assert torch.equal(table_of(mask), theirs(function, LENGTHS["whole"], None))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_rules_are_read_off_the_pattern_and_never_guessed(pattern):
    function, rules = PATTERNS[pattern]
    assert rules_of(function, makers_of(masking_utils)) == rules
    positions_alone = masking_utils.remap_positions_for_packed_sequence(causal, PLACES)
    assert rules_of(positions_alone, makers_of(masking_utils)) is None


def test_a_function_that_only_looks_like_one_of_theirs_is_not_taken_for_it():
    def sliding_window_overlay(sliding_window):
        def inner_mask(batch_idx, head_idx, q_idx, kv_idx):
            return kv_idx >= q_idx - sliding_window

        return inner_mask

    pattern = masking_utils.and_masks(sliding_window_overlay(3), causal)
    assert rules_of(pattern, makers_of(masking_utils)) is None
    assert torch.equal(ours(pattern, LENGTHS["whole"], None), theirs(pattern, LENGTHS["whole"], None))


@pytest.mark.parametrize("lengths", ["whole", "one of a cache", "a piece of the prompt", "static cache, the prompt"])
def test_a_causal_mask_stays_a_rule_and_knows_when_it_hides_nothing(lengths):
    mask = ours(causal, LENGTHS[lengths], seen(LENGTHS[lengths], PADDING["everything real"]))
    assert isinstance(mask, RuleMask)
    assert mask.kind == "causal"
    assert mask.hides_nothing == (lengths == "one of a cache")
    # of a static cache only the filled keys are left
    assert mask.key_len == LENGTHS[lengths][0] + LENGTHS[lengths][2]


@pytest.mark.parametrize("pattern", ["window", "window around"])
@pytest.mark.parametrize("lengths", ["whole", "window's cache, full", "window's cache, a piece"])
def test_a_window_over_a_sliding_cache_stays_a_rule(lengths, pattern):
    assert isinstance(ours(PATTERNS[pattern][0], LENGTHS[lengths], None), RuleMask)


def test_one_query_of_a_static_cache_gets_a_row_whose_shape_never_changes():
    for position in (3, 7):
        row = ours(causal, (1, 9, position, 0), None, as_tensor=True)
        assert type(row) is torch.Tensor
        assert row.shape == (2, 1, 1, 9)
        assert row[0].sum() == position + 1


def test_a_rule_mask_looks_like_the_tensor_that_models_expect_and_cannot_be_added_to_scores():
    mask = ours(causal, LENGTHS["static cache, the prompt"], None)
    assert (mask.ndim, mask.shape, mask.dtype) == (4, (2, 1, 4, 9), torch.bool)
    assert mask.contiguous() is mask
    assert torch.equal(mask[:, :, :, :4], torch.ones(4, 4, dtype=torch.bool).tril().expand(2, 1, 4, 4))
    assert not mask[:, :, :, 4:].any()
    for compute in (lambda: torch.zeros(2, 4, 4, 9) + mask, lambda: torch.where(mask, 0.0, 1.0)):
        with pytest.raises(ValueError, match=r'does not go through.*use attn_implementation="eager"'):
            compute()


def test_a_mask_that_was_made_ahead_comes_back_as_it_is():
    mask = ours(causal, LENGTHS["whole"], None)
    assert make_mask(2, 9, 9, attention_mask=mask) is mask


def test_a_mask_moves_to_the_device_of_its_layer_once():
    padding = PADDING["left"][:, :9]
    mask = ours(window, LENGTHS["whole"], padding)
    moved = mask.on("meta")
    assert (moved.padding_mask.device.type, moved.device.type) == ("meta", "meta")
    assert (moved.kind, moved.window, moved.shape) == (mask.kind, mask.window, mask.shape)
    assert mask.on("meta") is moved
    query, key = torch.zeros(2, 4, 9, 8, device="meta"), torch.zeros(2, 2, 9, 8, device="meta")
    assert received(mask, query, key, is_causal=None, window=None) is moved


query, key = torch.zeros(2, 4, 5, 8), torch.zeros(2, 2, 7, 8)
table = torch.rand(2, 1, 5, 7) < 0.5


def given(mask, is_causal=None, window=None, query=query, key=key):
    return received(mask, query, key, is_causal=is_causal, window=window)


@pytest.mark.parametrize("shape", [(2, 1, 5, 7), (1, 1, 5, 7), (2, 1, 1, 7)])
def test_a_table_of_ones_own_is_kept_whether_it_is_bool_or_added(shape):
    allowed = torch.rand(shape) < 0.5
    for lowest in (-torch.inf, torch.finfo(torch.float32).min, -1e4):
        for mask in (allowed, torch.zeros(shape).masked_fill(~allowed, lowest)):
            taken = given(mask)
            assert isinstance(taken, TableMask)
            assert torch.equal(taken.dense().expand(2, -1, -1, -1), allowed.expand(2, 1, 5, 7))
            assert torch.equal(taken.tile(1, 4, 2, 6).expand(2, -1, -1, -1), allowed.expand(2, 1, 5, 7)[:, :, 1:4, 2:6])
            assert not taken.is_plain_causal
            assert not taken.hides_nothing


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        (torch.zeros(2, 1, 5, 7).masked_fill(table, -1.0), "a bias, a number between, they do not have"),
        (torch.zeros(2, 1, 5, 7).masked_fill(table, -9e3), "pass it as torch.bool"),
        (table.expand(2, 4, 5, 7), "one table for all heads"),
        (torch.ones(2, 1, 5, 6, dtype=torch.bool), r"must have shape \(2, 1, 5, 7\)"),
        (torch.ones(3, 1, 5, 7, dtype=torch.bool), r"must have shape \(2, 1, 5, 7\)"),
        (torch.ones(2, 7, dtype=torch.bool), r"must be a \(B, 1, 5, 7\) table here, got a tensor of shape \(2, 7\)"),
        ({"full_attention": table}, "got a dict"),
        (
            RuleMask(3, 7, 5, 7, padding_mask=torch.ones(3, 7, dtype=torch.bool)),
            r"\(3, 1, 5, 7\), and \(2, 1, 5, 7\) was",
        ),
        (RuleMask(2, 9, 5, 9), r"the mask is for \(5, 9\) queries and keys, not for \(5, 7\)"),
    ],
)
def test_a_mask_that_does_not_fit_is_never_ignored(mask, words):
    with pytest.raises(ValueError, match=words):
        given(mask)


def test_padding_of_a_wrong_shape_is_refused_with_words():
    with pytest.raises(ValueError, match=r"attention_mask must be \(B, tokens\)"):
        make_mask(2, 5, 7, attention_mask=torch.ones(2, 5, 7, dtype=torch.bool))


@pytest.mark.parametrize("pattern", [causal, PATTERNS["chunks"][0]])  # a rule, and a table
def test_padding_of_another_batch_or_length_is_refused_with_everything_at_once(pattern):
    with pytest.raises(ValueError) as refused:
        make_mask(2, 3, 8, 5, mask_function=pattern, attention_mask=torch.ones(1, 3, dtype=torch.bool))
    assert str(refused.value) == (
        "attention_mask has shape (1, 3), and (2, 8) was expected: it has 1 row for 2 sequences: give each its own "
        "row, mask.expand(B, -1) if they are padded alike; it has 3 columns for 8 tokens: give it one for each, the 5 "
        "in the cache included."
    )
    for columns in (7, 9):
        with pytest.raises(ValueError, match=rf"it has {columns} columns for 8 tokens"):
            make_mask(2, 3, 8, 5, mask_function=pattern, attention_mask=torch.ones(2, columns, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"shape \(3, 8\), and \(2, tokens\) was expected"):  # a static cache
        make_mask(2, 3, 8, torch.tensor(5), mask_function=pattern, attention_mask=torch.ones(3, 8, dtype=torch.bool))


def test_one_row_that_transformers_made_serves_every_query():
    padding = torch.arange(7)[None] < 6
    for mask in (
        RuleMask(1, 7, 5, 7, padding_mask=padding, device="cpu"),
        RuleMask(3, 7, 5, 7, device="cpu"),  # about no row
    ):
        assert given(mask) is mask


def test_without_a_mask_the_module_decides_where_it_leaves_no_doubt():
    square = torch.zeros(2, 2, 5, 8)
    assert given(None, is_causal=True, key=square).kind == "causal"
    assert given(None, is_causal=True, window=2, key=square).kind == "causal+window"
    assert given(None, is_causal=False).kind == "full"
    assert type(given(None, is_causal=False)) is AttentionMask
    with pytest.raises(ValueError, match="5 queries and 7 keys: which keys are filled"):
        given(None, is_causal=True)
    with pytest.raises(ValueError, match="whether a token may see later ones is unknown"):
        given(None, key=square)
