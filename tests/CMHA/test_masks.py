"""Who may attend to whom: True means "may", and the last query stands at the last key."""

import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from CMHA.masks import AttentionMask, check_padding_mask

lengths = st.integers(1, 12)


def allowed_by_the_rule(mask: AttentionMask, sequence: int, query: int, key: int) -> bool:
    """The rules themselves, one pair at a time."""
    position = query + mask.key_len - mask.query_len
    real = mask.padding_mask is None or bool(mask.padding_mask[sequence, key])
    near = mask.window is None or abs(position - key) < mask.window
    same = mask.documents is None or bool(mask.documents[sequence, key] == mask.documents[sequence, position])
    return real and near and same and (not mask.causal or key <= position)


@st.composite
def masks(draw):
    query_len, key_len = draw(lengths), draw(lengths)
    rows = draw(
        st.none() | st.lists(st.lists(st.booleans(), min_size=key_len, max_size=key_len), min_size=1, max_size=3)
    )
    padding_mask = None if rows is None else torch.tensor(rows)
    documents = None
    if query_len <= key_len and draw(st.booleans()):
        sequences = draw(st.integers(1, 3)) if rows is None else len(rows)
        steps = st.lists(st.integers(0, 1), min_size=key_len, max_size=key_len)
        documents = torch.tensor([draw(steps) for _ in range(sequences)]).cumsum(1)
    window = draw(st.none() | st.integers(1, 13))
    rules = {"padding_mask": padding_mask, "documents": documents, "window": window}
    return AttentionMask(query_len, key_len, causal=draw(st.booleans()), **rules)


@given(masks())
def test_the_table_is_the_rule_for_every_pair_of_query_and_key(mask):
    table = mask.dense()
    sequences = max([1, *(len(given) for given in (mask.padding_mask, mask.documents) if given is not None)])
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
def test_keys_outside_the_visible_ones_are_seen_by_none_of_the_queries_and_those_at_its_ends_by_some(mask, data):
    """As far as position alone decides: padding and documents are left to the tile."""
    query_start = data.draw(st.integers(0, mask.query_len - 1))
    query_end = data.draw(st.integers(query_start + 1, mask.query_len))
    start, end = mask.visible_keys(query_start, query_end)
    by_position = AttentionMask(mask.query_len, mask.key_len, causal=mask.causal, window=mask.window).dense()
    seen = by_position[0, 0, query_start:query_end].any(0)
    assert 0 <= start <= end <= mask.key_len
    assert not seen[:start].any()
    assert not seen[end:].any()
    assert start == end or (seen[start] and seen[end - 1])


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
    for rule, given_rule in (("padding", mask.padding_mask), ("documents", mask.documents), ("window", mask.window)):
        assert (rule in mask.kind) == (given_rule is not None)
    assert mask.kind.startswith("causal" if mask.causal else "full")


@given(masks())
def test_a_key_is_seen_where_each_rule_by_itself_shows_it(mask):
    together = torch.ones(1, 1, mask.query_len, mask.key_len, dtype=torch.bool)
    for rule in mask.rules().values():
        together = together & rule.dense()
    assert torch.equal(together.expand_as(mask.dense()), mask.dense())


def test_the_rules_are_named_in_the_kind_in_one_order():
    padding, documents = torch.ones(1, 5, dtype=torch.bool), torch.zeros(1, 5, dtype=torch.int64)
    mask = AttentionMask(5, 5, window=2, documents=documents, padding_mask=padding)
    assert mask.kind == "causal+padding+documents+window"
    assert list(mask.rules()) == ["padding", "causal", "documents", "window"]
    assert AttentionMask(5, 5, causal=False).rules() == {}


@given(masks())
def test_a_position_is_the_number_of_real_tokens_of_the_same_text_before(mask):
    if mask.query_len > mask.key_len:
        with pytest.raises(ValueError, match=f"{mask.query_len} queries have no positions among {mask.key_len} keys"):
            mask.positions()
        return
    found = mask.positions()
    rows = max([1, *(len(given) for given in (mask.padding_mask, mask.documents) if given is not None)])
    assert found.shape == (rows, mask.query_len)
    assert found.dtype == torch.int64
    for b in range(rows):
        for i in range(mask.query_len):
            at = i + mask.key_len - mask.query_len
            before = [
                key for key in range(at)
                if (mask.padding_mask is None or mask.padding_mask[b, key])
                and (mask.documents is None or mask.documents[b, key] == mask.documents[b, at])
            ]  # fmt: skip
            assert found[b, i] == len(before)


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.int64])
def test_positions_come_from_documents_of_any_integer_and_from_a_slice_without_a_warning(dtype):
    longer = torch.tensor([[0, 0, 1, 1, 1, 7, 7], [3, 3, 3, 3, 4, 4, 4]], dtype=dtype)
    torch.set_warn_always(True)  # else torch gives a warning once in a process, and the first may have been elsewhere
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = AttentionMask(5, 5, documents=longer[:, :5]).positions()
    finally:
        torch.set_warn_always(False)
    assert found.tolist() == [[0, 1, 0, 1, 2], [0, 1, 2, 3, 0]]


def test_a_text_packed_with_padding_inside_counts_only_what_is_real():
    documents = torch.tensor([[0, 0, 0, 1, 1, 1, 1]])
    real = torch.tensor([[False, True, True, False, False, True, True]])
    assert AttentionMask(7, 7, documents=documents, padding_mask=real).positions().tolist() == [[0, 0, 1, 0, 0, 0, 1]]
    assert AttentionMask(2, 7, documents=documents, padding_mask=real).positions().tolist() == [[0, 1]]


def test_packed_documents_see_themselves_only_as_if_each_stood_alone():
    mask = AttentionMask(5, 5, documents=torch.tensor([[0, 0, 1, 1, 1]]))
    expected = torch.block_diag(torch.ones(2, 2).tril(), torch.ones(3, 3).tril())
    assert torch.equal(mask.dense()[0, 0], expected == 1)


def test_a_causal_window_is_a_band_below_the_diagonal_and_a_full_one_on_both_sides():
    ones = torch.ones(6, 6)
    assert torch.equal(AttentionMask(6, 6, window=3).dense()[0, 0], (ones.tril() * ones.triu(-2)) == 1)
    assert torch.equal(AttentionMask(6, 6, causal=False, window=3).dense()[0, 0], (ones.tril(2) * ones.triu(-2)) == 1)
    assert AttentionMask(1, 6, window=3).dense()[0, 0].tolist() == [[False, False, False, True, True, True]]


@pytest.mark.parametrize("window", [6, 7, 100])
def test_a_window_as_wide_as_the_sequence_is_none_at_all(window):
    assert AttentionMask(6, 6, window=window).is_plain_causal


def test_the_table_is_made_once_and_shared_and_so_is_what_is_made_from_it():
    mask, made = AttentionMask(4, 4), []
    assert mask.dense() is mask.dense()
    for _ in range(3):
        assert mask.once("squares", lambda: made.append(1) or 16) == 16
    assert made == [1]
    assert AttentionMask(4, 4).once("squares", lambda: 17) == 17  # another mask has its own


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"documents": torch.zeros(1, 4)}, r"documents must be integers.*got torch\.float32"),
        ({"documents": torch.zeros(1, 4, dtype=torch.bool)}, r"documents must be integers"),
        ({"documents": torch.zeros(1, 3, dtype=torch.int64)}, r"shape \(B, 4\).*got \(1, 3\)"),
        ({"documents": torch.zeros(4, dtype=torch.int64)}, r"shape \(B, 4\)"),
        ({"documents": torch.zeros(2, 4, dtype=torch.int64), "batch_size": 3}, r"shape \(3, 4\)"),
        ({"documents": torch.tensor([[0, 1, 0, 1]])}, r"must not fall along a row.*0, 0, 1, 1"),
        ({"documents": torch.zeros(1, 4, dtype=torch.int64), "query_len": 5}, r"5 queries and 4 keys"),
        ({"window": 0}, r"window must be 1.*got 0"),
        ({"query_len": -1}, r"numbers of tokens, got -1 and 4"),
        (
            {
                "documents": torch.zeros(2, 4, dtype=torch.int64),
                "padding_mask": torch.ones(3, 4, dtype=torch.bool),
            },
            r"shape \(3, 4\)",
        ),
    ],
)
def test_documents_and_windows_that_make_no_sense_are_refused_with_what_was_expected(arguments, message):
    with pytest.raises((TypeError, ValueError), match=message):
        AttentionMask(**{"query_len": 4, "key_len": 4} | arguments)


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
