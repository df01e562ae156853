"""An old token never sees a new one, so its keys and values can be kept."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from CMHA.kv_cache import KVCache, LayerCache


@given(st.lists(st.integers(1, 5), min_size=1, max_size=6))
def test_what_comes_back_is_everything_put_in_so_far_in_order(chunks):
    cache, total = LayerCache(2, 3, 30, 4), sum(chunks)
    keys, values = torch.randn(2, 2, 3, total, 4)
    end = 0
    for chunk in chunks:
        new = slice(end, end + chunk)
        end += chunk
        got_keys, got_values = cache.append(keys[:, :, new], values[:, :, new])
        assert torch.equal(got_keys, keys[:, :, :end])
        assert torch.equal(got_values, values[:, :, :end])
        assert cache.length == end


def test_what_comes_back_is_a_view_and_not_a_copy():
    cache = LayerCache(1, 1, 8, 2)
    keys, values = cache.append(torch.ones(1, 1, 3, 2), torch.ones(1, 1, 3, 2))
    assert keys.data_ptr() == cache.keys.data_ptr()
    assert values.data_ptr() == cache.values.data_ptr()


def test_more_tokens_than_were_set_aside_are_refused_and_the_cache_stays_as_it_was():
    cache = LayerCache(1, 1, 4, 2)
    cache.append(torch.ones(1, 1, 3, 2), torch.ones(1, 1, 3, 2))
    with pytest.raises(ValueError, match=r"holds 4 tokens, 5 are needed.*larger max_length"):
        cache.append(torch.ones(1, 1, 2, 2), torch.ones(1, 1, 2, 2))
    assert cache.length == 3


def test_a_cache_of_all_layers_sets_aside_two_tensors_for_each():
    cache = KVCache(n_layers=3, batch_size=2, num_kv_heads=5, max_length=7, head_dim=11, dtype=torch.bfloat16)
    assert cache.nbytes == 3 * 2 * (2 * 5 * 7 * 11) * 2
    assert cache.length == 0
    for layer in cache.layers:
        layer.append(*torch.ones(2, 2, 5, 4, 11, dtype=torch.bfloat16))
    assert cache.length == 4


@given(st.data())
def test_what_was_cut_is_forgotten_and_its_place_is_filled_by_what_comes_next(data):
    cache, stands, room = LayerCache(1, 2, 12, 3), torch.zeros(2, 1, 2, 0, 3), 12
    for _ in range(data.draw(st.integers(1, 6))):
        new = torch.randn(2, 1, 2, data.draw(st.integers(0, room - stands.shape[3])), 3)
        stands = torch.cat([stands, new], dim=3)
        keys, values = cache.append(new[0], new[1])
        assert torch.equal(torch.stack([keys, values]), stands)
        length = data.draw(st.integers(0, cache.length))
        cache.truncate(length)
        stands = stands[:, :, :, :length]
        assert cache.length == length


@pytest.mark.parametrize("length", [-1, 4, 8])
def test_a_length_that_is_negative_or_longer_than_what_is_there_is_refused_and_nothing_is_forgotten(length):
    cache = KVCache(n_layers=2, batch_size=1, num_kv_heads=1, max_length=8, head_dim=2)
    for layer in cache.layers:
        layer.append(*torch.ones(2, 1, 1, 3, 2))
    with pytest.raises(ValueError, match=rf"has 3 tokens and cannot be cut to {length}: pass a length from 0 to 3"):
        cache.truncate(length)
    assert [layer.length for layer in cache.layers] == [3, 3]


def test_all_layers_are_cut_also_when_a_pass_ended_half_way():
    cache = KVCache(n_layers=3, batch_size=1, num_kv_heads=1, max_length=8, head_dim=2)
    for layer in (*cache.layers, *cache.layers[:2]):  # the last layer was not reached a second time
        layer.append(*torch.ones(2, 1, 1, 3, 2))
    with pytest.raises(ValueError, match="has 3 tokens"):
        cache.truncate(4)
    assert [layer.length for layer in cache.layers] == [6, 6, 3]
    cache.truncate(cache.length)
    assert [layer.length for layer in cache.layers] == [3, 3, 3]
    cache.truncate(0)
    assert cache.length == 0
