"""Who may attend to whom: True means "may", and the last query stands at the last key."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from CMHA.masks import AttentionMask, check_padding_mask

lengths = st.integers(1, 12)


def allowed_by_the_rule(mask: AttentionMask, sequence: int, query: int, key: int) -> bool:
    """The rule itself, one pair at a time."""
    real = mask.padding_mask is None or bool(mask.padding_mask[sequence, key])
    return real and (not mask.causal or key <= query + mask.key_len - mask.query_len)


@st.composite
def masks(draw):
    query_len, key_len = draw(lengths), draw(lengths)
    rows = draw(
        st.none() | st.lists(st.lists(st.booleans(), min_size=key_len, max_size=key_len), min_size=1, max_size=3)
    )
    padding_mask = None if rows is None else torch.tensor(rows)
    return AttentionMask(query_len, key_len, causal=draw(st.booleans()), padding_mask=padding_mask)


@given(masks())
def test_the_table_is_the_rule_for_every_pair_of_query_and_key(mask):
    table = mask.dense()
    sequences = 1 if mask.padding_mask is None else len(mask.padding_mask)
    assert table.shape == (sequences, 1, mask.query_len, mask.key_len)
    assert table.dtype == torch.bool
    for b in range(sequences):
        for i in range(mask.query_len):
            for j in range(mask.key_len):
                assert bool(table[b, 0, i, j]) == allowed_by_the_rule(mask, b, i, j)


@given(masks(), st.data())
def test_a_tile_is_a_piece_of_the_table_and_none_only_where_it_hides_nothing(mask, data):
    query_start = data.draw(st.integers(0, mask.query_len - 1))
    key_start = data.draw(st.integers(0, mask.key_len - 1))
    query_end = data.draw(st.integers(query_start + 1, mask.query_len))
    key_end = data.draw(st.integers(key_start + 1, mask.key_len))
    piece = mask.dense()[:, :, query_start:query_end, key_start:key_end]
    tile = mask.tile(query_start, query_end, key_start, key_end)
    assert piece.all() if tile is None else torch.equal(tile.expand_as(piece), piece)


@given(masks(), st.data())
def test_keys_behind_the_visible_ones_are_seen_by_no_query_so_far(mask, data):
    query_end = data.draw(st.integers(1, mask.query_len))
    visible = mask.visible_keys(query_end)
    causal_part = AttentionMask(mask.query_len, mask.key_len, causal=mask.causal).dense()[0, 0, :query_end]
    assert not causal_part[:, visible:].any()
    assert visible == 0 or causal_part[:, visible - 1].any()


@given(lengths)
def test_a_plain_causal_mask_is_the_lower_triangle(tokens):
    assert torch.equal(AttentionMask(tokens, tokens).dense()[0, 0], torch.ones(tokens, tokens).tril() == 1)


def test_a_new_token_at_the_end_of_a_cache_sees_every_key_and_the_first_of_two_all_but_the_last():
    assert AttentionMask(1, 5).dense().all()
    assert AttentionMask(2, 5).dense()[0, 0].tolist() == [[True, True, True, True, False], [True] * 5]


@given(masks())
def test_what_is_called_plain_or_hides_nothing_has_the_table_that_the_fused_ops_flag_means(mask):
    table = mask.dense()[:, 0]
    if mask.is_plain_causal:
        assert torch.equal(table[0], torch.ones(mask.query_len, mask.key_len).tril() == 1)
    if mask.hides_nothing:
        assert table.all()
    assert ("padding" in mask.kind) == (mask.padding_mask is not None)
    assert mask.kind.startswith("causal" if mask.causal else "full")


def test_the_table_is_made_once_and_shared():
    mask = AttentionMask(4, 4)
    assert mask.dense() is mask.dense()


def test_a_padding_mask_of_numbers_is_refused_with_the_remedy():
    with pytest.raises(TypeError, match=r"torch\.bool.*real token.*got torch\.int64.*padding_mask\.bool\(\)"):
        AttentionMask(3, 3, padding_mask=torch.ones(2, 3, dtype=torch.int64))


@pytest.mark.parametrize("shape", [(2, 4), (3,), (2, 1, 3)])
def test_a_padding_mask_of_the_wrong_shape_is_refused_with_the_right_one(shape):
    with pytest.raises(ValueError, match=r"shape \(B, 3\).*each key position"):
        AttentionMask(3, 3, padding_mask=torch.ones(shape, dtype=torch.bool))


def test_a_padding_mask_for_another_batch_is_refused():
    with pytest.raises(ValueError, match=r"\(2, 3\).*got \(5, 3\)"):
        check_padding_mask(torch.ones(5, 3, dtype=torch.bool), 3, 2)
