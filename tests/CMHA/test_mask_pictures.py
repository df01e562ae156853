"""What `AttentionMask.show()` prints and draws is the table, and each hidden key has its reason."""

import pytest
import torch
from matplotlib.colors import to_rgb

from CMHA.mask_pictures import RULES, SEEN_COLOUR, figure, hiding_rule, text
from CMHA.masks import AttentionMask

PACKED = {"documents": torch.tensor([[0, 0, 0, 1, 1, 1]])}
PADDED = {"padding_mask": torch.tensor([[True] * 6, [False] * 2 + [True] * 4])}


def test_the_text_has_a_row_for_each_query_and_a_sign_for_each_key():
    lines = text(AttentionMask(3, 4)).splitlines()
    assert lines[0].startswith("causal: 3 queries, 4 keys")
    assert lines[1:] == ["■ ■ · ·", "■ ■ ■ ·", "■ ■ ■ ■"]


def test_a_long_mask_is_shown_in_tiles_that_say_whether_all_some_or_none_of_them_is_seen():
    lines = text(AttentionMask(8, 8), width=4).splitlines()
    assert "tiles of 2 x 2" in lines[0]
    assert lines[1:] == ["▒ · · ·", "■ ▒ · ·", "■ ■ ▒ ·", "■ ■ ■ ▒"]


def test_a_sequence_of_the_batch_is_shown_by_its_number():
    mask = AttentionMask(6, 6, **PADDED)
    assert text(mask, 0).splitlines()[1] == "■ · · · · ·"
    assert text(mask, 1).splitlines()[1:4] == ["· · · · · ·", "· · · · · ·", "· · ■ · · ·"]
    with pytest.raises(ValueError, match="there are 2 sequences, got sequence=2"):
        text(mask, 2)


@pytest.mark.parametrize("rules", [{}, PACKED, PADDED, {"window": 2}, PACKED | {"window": 2}, {"causal": False}])
def test_a_key_without_a_reason_against_it_is_seen_and_any_other_is_not(rules):
    mask = AttentionMask(6, 6, **rules)
    for sequence in range(len(mask.dense())):
        assert torch.equal(hiding_rule(mask, sequence) == 0, mask.dense()[sequence, 0])


def test_each_hidden_key_has_the_rule_that_hides_it():
    mask = AttentionMask(6, 6, documents=PACKED["documents"], padding_mask=PADDED["padding_mask"][1:], window=2)
    number = {name: place for place, name in enumerate(RULES, start=1)}
    reason = hiding_rule(mask)
    assert reason[0, 0] == number["padding"]
    assert reason[2, 5] == number["causal"]
    assert reason[4, 2] == number["documents"]
    assert reason[5, 3] == number["window"]
    assert reason[5, 5] == 0


def test_show_prints_the_text_and_returns_a_figure_with_the_colour_of_each_cell(capsys):
    mask = AttentionMask(6, 6, window=2)
    drawing = mask.show(words=["a", "b", "c", "d", "e", "f"])
    assert capsys.readouterr().out == text(mask) + "\n"
    (axes,) = drawing.axes
    (image,) = axes.get_images()
    colours = image.cmap(image.norm(image.get_array()))[..., :3]
    assert tuple(colours[3, 2]) == pytest.approx(to_rgb(SEEN_COLOUR))
    assert tuple(colours[0, 5]) == pytest.approx(to_rgb(RULES["causal"][1]))
    assert tuple(colours[5, 0]) == pytest.approx(to_rgb(RULES["window"][1]))
    labels = [entry.get_text() for entry in drawing.legends[0].get_texts()]
    assert labels == ["may be seen", "hidden: later than the query (causal)", "hidden: too far away (window)"]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == list("abcdef")


def test_with_a_cache_the_queries_are_named_after_the_last_keys():
    axes = figure(AttentionMask(2, 4), words=list("abcd")).axes[0]
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["c", "d"]


def test_a_notebook_shows_what_show_returns_also_without_matplotlib_set_up():
    from IPython.core.interactiveshell import InteractiveShell

    data, _ = InteractiveShell.instance().display_formatter.format(AttentionMask(4, 4).show())
    assert data["image/png"].startswith(b"\x89PNG") or data["image/png"].startswith("iVBOR")


def test_words_must_be_as_many_as_the_keys():
    with pytest.raises(ValueError, match="one for each of 4 keys, got 3"):
        AttentionMask(4, 4).show(words=["a", "b", "c"])
