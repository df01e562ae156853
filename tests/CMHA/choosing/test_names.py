"""One canonical name behind every name the field uses."""

import pytest

from CMHA.choosing import canonical_name, known_names


@pytest.mark.parametrize(
    ("name", "canonical"),
    [
        (None, "auto"),
        ("auto", "auto"),
        ("eager", "eager"),
        ("manual", "eager"),
        ("standard", "eager"),
        ("sdpa", "sdpa"),
        ("flash_attention_1", "sdpa"),
        ("flash_attn_1", "sdpa"),
        ("flash_tiled", "flash_tiled"),
        ("flash_triton", "flash_triton"),
        ("triton", "flash_triton"),
        ("flash_attn_2", "flash_attention_2"),
        ("fa2", "flash_attention_2"),
        ("flash_attn_3", "flash_attention_3"),
        ("fa3", "flash_attention_3"),
        ("flex", "flex_attention"),
        ("paged", "paged_attention"),
    ],
)
def test_a_name_or_an_alias_means_its_canonical_name(name, canonical):
    assert canonical_name(name) == canonical


def test_no_name_means_two_things():
    everything = [name for canonical, aliases in known_names().items() for name in (canonical, *aliases)]
    assert len(set(everything)) == len(everything)


@pytest.mark.parametrize(
    ("wrong", "near"), [("sdap", "sdpa"), ("eagr", "eager"), ("flash_atention_2", "flash_attention_2")]
)
def test_an_unknown_name_is_refused_with_the_nearest_and_all_known_ones(wrong, near):
    with pytest.raises(ValueError, match=rf"unknown attn_implementation '{wrong}'.*Did you mean '{near}'") as error:
        canonical_name(wrong)
    assert all(name in str(error.value) for name in known_names())


@pytest.mark.parametrize("wrong", ["zzzzzz", ""])
def test_what_resembles_nothing_is_refused_without_a_guess(wrong):
    with pytest.raises(ValueError, match="unknown attn_implementation") as error:
        canonical_name(wrong)
    assert "Did you mean" not in str(error.value)
