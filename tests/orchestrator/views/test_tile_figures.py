"""The figure of flash attention: each frame holds what numpy finds after as many tiles, and it ends as eager does."""

import math

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import same_color

from GPT2Model.config import from_preset
from GPT2Model.gpt2 import GPTModel
from GPT2Model.tracing import trace
from orchestrator.text.tales import TalesTokenizer, stories
from orchestrator.views.figures import ORANGE
from orchestrator.views.tile_figures import flash_tiles

TOKENIZER = TalesTokenizer()
STORY = TOKENIZER.encode(stories(1, seed=3)[0])
LAYER, HEAD = 1, 2


def built(queries: int = 4, keys: int = 4, **cfg) -> GPTModel:
    torch.manual_seed(0)
    sizes = {"vocab_size": TOKENIZER.vocab_size, "init_std": 0.15, "attn_implementation": "flash_tiled"}
    blocks = {"flash_query_block_size": queries, "flash_kv_block_size": keys}
    return GPTModel(from_preset("nano", **sizes | blocks | cfg)).eval()


def traced(tokens: int = 12, *, blocks: tuple[int, int] = (4, 4), recompute: bool = False, **cfg):
    return trace(built(*blocks, **cfg), TOKENIZER.decode(STORY[:tokens]), tokenizer=TOKENIZER, recompute=recompute)


@pytest.fixture(scope="module")
def twelve():
    return traced()


def exact_scores(t, *, group: int = 1) -> np.ndarray:
    """(T, T) in float64, -inf in the future."""
    q = t[f"blocks.{LAYER}.attention.queries"][0, HEAD].double().numpy()
    k = t[f"blocks.{LAYER}.attention.keys"][0, HEAD // group].double().numpy()
    scores = q @ k.T / np.sqrt(q.shape[-1])
    scores[np.triu_indices(len(q), 1)] = -np.inf
    return scores


def causal_tiles(length: int, queries: int, keys: int) -> list[tuple[slice, slice]]:
    """The order of computation by the algorithm's own words: for each block of queries, its keys from the left."""
    tiles = []
    for q0 in range(0, length, queries):
        q1 = min(q0 + queries, length)
        tiles += [(slice(q0, q1), slice(k0, min(k0 + keys, q1))) for k0 in range(0, q1, keys)]
    return tiles


def frames_of(figure) -> list:
    return [axes for axes in figure.axes if axes.images]


def table_end(figure):
    (axes,) = (axes for axes in figure.axes if "log-sum-exp" in axes.get_title(loc="left"))
    return axes


def numbers_beside(axes, length: int) -> dict:
    """{row: (max, sum)} as texts, from what stands at the right of the table."""
    rows = {}
    for text in sorted(axes.texts, key=lambda text: text.get_position()[0]):
        x, y = text.get_position()
        if x > length - 0.5 and not text.get_text().startswith(("max", "sum")):
            rows.setdefault(round(y), []).append(text)
    return {row: tuple(text.get_text() for text in texts) for row, texts in rows.items()}


def assert_nothing_cut_off(figure) -> None:
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    box, (width, height) = figure.get_tightbbox(renderer), figure.get_size_inches()
    assert min(box.x0, box.y0) >= 0
    assert box.x1 <= width
    assert box.y1 <= height
    for axes in figure.axes:  # the numbers are no part of the layout: they have to lie in their own axes
        for text in axes.texts:
            extent = text.get_window_extent(renderer)
            assert axes.bbox.x0 <= extent.x0 < extent.x1 <= axes.bbox.x1 + 1
            assert figure.bbox.y0 <= extent.y0 < extent.y1 <= figure.bbox.y1


@pytest.mark.parametrize(
    ("length", "blocks"), [(12, (4, 4)), (10, (4, 4)), (12, (4, 8)), (12, (6, 3)), (9, (128, 128)), (1, (4, 4))]
)
def test_each_frame_is_the_table_after_one_more_tile(length, blocks):
    t = traced(length, blocks=blocks)
    figure = flash_tiles(t, LAYER, HEAD)
    scores, tiles = exact_scores(t), causal_tiles(length, *blocks)
    frames = frames_of(figure)
    assert len(frames) == len(tiles)
    for number, (axes, (rows, columns)) in enumerate(zip(frames, tiles, strict=True), start=1):
        seen = np.full((length, length), -np.inf)
        for done in tiles[:number]:
            seen[done] = scores[done]
        image = axes.images[0].get_array()
        assert np.array_equal(np.ma.getmaskarray(image), np.isneginf(seen))
        np.testing.assert_allclose(image.compressed(), seen[np.isfinite(seen)], rtol=0, atol=1e-4)
        title = axes.get_title(loc="left")
        assert title.startswith(f"tile {number} of {len(tiles)}: queries {rows.start}")
        assert f"keys {columns.start}" in title
        thick = [patch for patch in axes.patches if patch.get_linewidth() > 2]
        assert [patch.get_bbox().bounds for patch in thick] == [
            (columns.start - 0.5, rows.start - 0.5, columns.stop - columns.start, rows.stop - rows.start)
        ]


@pytest.mark.parametrize(("length", "blocks"), [(12, (4, 4)), (12, (4, 8)), (10, (5, 2))])
def test_beside_each_row_stand_its_maximum_and_sum_so_far(length, blocks):
    t = traced(length, blocks=blocks)
    scores, tiles = exact_scores(t), causal_tiles(length, *blocks)
    raised = 0
    figure = flash_tiles(t, LAYER, HEAD)
    assert len(frames_of(figure)) == min(11, len(tiles))
    for axes in frames_of(figure):
        number = int(axes.get_title(loc="left").split()[1])
        written = numbers_beside(axes, length)
        ends = {}  # row -> how many of its keys were seen
        for rows, columns in tiles[:number]:
            ends |= dict.fromkeys(range(rows.start, rows.stop), columns.stop)
        assert set(written) == set(ends)
        for row, end in ends.items():
            top = scores[row, :end].max()
            assert float(written[row][0]) == pytest.approx(top, abs=0.00502)
            assert float(written[row][1]) == pytest.approx(np.exp(scores[row, :end] - top).sum(), abs=0.00502)
        rows, columns = tiles[number - 1]
        expected = {
            row
            for row in range(rows.start, rows.stop)
            if columns.start and scores[row, : columns.stop].max() > scores[row, : columns.start].max()
        }
        marked = {round(text.get_position()[1]) for text in axes.texts if same_color(text.get_color(), ORANGE)}
        assert marked == expected
        raised += len(expected)
    assert raised


@pytest.mark.parametrize("recompute", [False, True])
def test_it_ends_with_the_log_sum_exp_of_whole_rows(recompute):
    t = traced(recompute=recompute)
    eager = trace(built(use_flash=False), t.ids, tokenizer=TOKENIZER)
    scores = eager[f"blocks.{LAYER}.attention.masked_scores"][0, HEAD].double()
    expected = torch.logsumexp(scores, dim=-1)
    axes = table_end(flash_tiles(t, LAYER, HEAD))
    rows = {}
    for text in axes.texts[3:]:
        rows.setdefault(round(text.get_position()[1]), []).append(float(text.get_text()))
    assert sorted(rows) == list(range(12))
    for row, (ours, whole, apart) in rows.items():
        assert ours == pytest.approx(expected[row].item(), abs=5e-5)
        assert whole == pytest.approx(expected[row].item(), abs=5e-5)
        assert abs(apart - abs(ours - whole)) < 2e-6
        assert apart < 1e-4
    assert [text.get_text() for text in axes.texts[:3]] == ["m + ln l", "of the whole row", "apart"]


def test_a_wrong_running_sum_would_be_seen(twelve):
    """The right column does not come from the tiles' sums: a tile that is off leaves the two apart."""
    tiles = [name for name in twelve.names("blocks.1.attention.tile*running_sum")]
    changed = trace(built(), twelve.ids, tokenizer=TOKENIZER, patch={tiles[-1]: lambda running_sum: 2 * running_sum})
    rows = [text.get_text() for text in table_end(flash_tiles(changed, LAYER, HEAD)).texts[3:]]
    apart = [float(text) for text in rows[2::3]]
    assert apart[8:] == pytest.approx([math.log(2)] * 4, rel=0.05)
    assert max(apart[:8]) < 1e-4


def test_tiles_in_the_future_are_marked_as_skipped(twelve):
    frames = frames_of(flash_tiles(twelve, LAYER, HEAD))
    skipped = [sum(text.get_text() == "skip" for text in axes.texts) for axes in frames]
    assert skipped == [2, 3, 3, 3, 3, 3]  # two behind the first four queries, one behind the next
    places = {text.get_position() for text in frames[-1].texts if text.get_text() == "skip"}
    assert places == {(5.5, 1.5), (9.5, 1.5), (9.5, 5.5)}
    entries = [text.get_text() for text in frames[0].figure.legends[0].get_texts()]
    assert any(entry.startswith("skipped") for entry in entries)
    assert any(entry.startswith("hidden") for entry in entries)


def test_of_many_tiles_some_frames_are_shown_and_the_numbers_stay_right():
    t = traced(24)
    figure = flash_tiles(t, LAYER, HEAD)
    shown = [int(axes.get_title(loc="left").split()[1]) for axes in frames_of(figure)]
    assert shown[0] == 1
    assert shown[-1] == 21
    assert len(shown) == 11
    assert shown == sorted(set(shown))
    assert "21 tiles (11 of them shown)" in figure.get_suptitle()
    image = frames_of(figure)[-1].images[0].get_array()
    scores = exact_scores(t)
    np.testing.assert_allclose(image.compressed(), scores[np.isfinite(scores)], rtol=0, atol=1e-4)


@pytest.mark.parametrize(("length", "blocks"), [(12, (4, 4)), (3, (4, 4)), (40, (16, 16))])
def test_nothing_is_cut_off_and_all_is_labelled(length, blocks):
    figure = flash_tiles(traced(length, blocks=blocks), LAYER, HEAD)
    assert_nothing_cut_off(figure)
    words = [TOKENIZER.decode([i]) for i in STORY[:length]]
    for axes in [*frames_of(figure), table_end(figure)]:
        assert [label.get_text() for label in axes.get_yticklabels()] == words
    headings = {text.get_text() for text in frames_of(figure)[0].texts}
    assert {"max m", "sum l"} <= headings
    assert figure.axes[-1].get_ylabel().startswith("score")


def test_heads_that_share_keys_are_told_apart():
    t = traced(8, n_kv_heads=2)
    figure = flash_tiles(t, LAYER, HEAD)
    scores = exact_scores(t, group=2)
    image = frames_of(figure)[-1].images[0].get_array()
    np.testing.assert_allclose(image.compressed(), scores[np.isfinite(scores)], rtol=0, atol=1e-4)
    apart = [float(text.get_text()) for text in table_end(figure).texts[5::3]]
    assert max(apart) < 1e-4


def test_a_row_that_sees_nothing_ends_at_minus_infinity():
    ids = torch.tensor([STORY[:8], [0, 0, 0, *STORY[:5]]])
    padding_mask = torch.tensor([[True] * 8, [False] * 3 + [True] * 5])
    t = trace(built(), ids, tokenizer=TOKENIZER, padding_mask=padding_mask)
    figure = flash_tiles(t, LAYER, HEAD, sequence=1)
    texts = [text.get_text() for text in table_end(figure).texts[3:]]
    assert texts[:9] == ["-inf", "-inf", "0"] * 3
    assert max(float(text) for text in texts[2::3]) < 1e-4
    hidden = np.ma.getmaskarray(frames_of(figure)[-1].images[0].get_array())
    assert np.array_equal(hidden, np.triu(np.ones((8, 8), bool), 1) | ~padding_mask[1].numpy()[None])


def test_a_trace_without_tiles_says_how_to_get_them(twelve):
    other = trace(built(use_flash=False), twelve.ids, tokenizer=TOKENIZER)
    with pytest.raises(KeyError, match=r"ran by eager.*set_attention.*flash_tiled.*block_size"):
        flash_tiles(other, LAYER, HEAD)
    with pytest.raises(KeyError, match="no tiles of layer 2"):
        flash_tiles(twelve, 2, HEAD)
    with pytest.raises(ValueError, match="4 heads, got head=4"):
        flash_tiles(twelve, LAYER, 4)
    with pytest.raises(ValueError, match="1 sequences, got sequence=1"):
        flash_tiles(twelve, LAYER, HEAD, sequence=1)
    with pytest.raises(ValueError, match=r"41 tokens.*40 at most"):
        flash_tiles(traced(41), LAYER, HEAD)
