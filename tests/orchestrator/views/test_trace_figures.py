"""Figures of a trace show its numbers: read back from the axes, and computed again in float64 from other tensors."""

import itertools
import re

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg

from GPT2Model.config import from_preset
from GPT2Model.gpt2 import GPTModel
from GPT2Model.tracing import trace
from orchestrator.text.tales import TalesTokenizer, stories
from orchestrator.views.trace_figures import (
    attention_head,
    attention_sheet,
    residual_norms,
    score_steps,
    token_label,
)

TOKENIZER = TalesTokenizer()
STORY = TOKENIZER.encode(stories(1, seed=3)[0])


def built(**keys) -> GPTModel:
    """A nano model whose attention is far from even: fresh weights as small as GPT-2's look all alike."""
    torch.manual_seed(0)
    cfg = {"vocab_size": TOKENIZER.vocab_size, "init_std": 0.15, "use_flash": False} | keys
    return GPTModel(from_preset("nano", **cfg)).eval()


def traced(model: GPTModel, tokens: int, **arguments):
    return trace(model, TOKENIZER.decode(STORY[:tokens]), tokenizer=TOKENIZER, **arguments)


@pytest.fixture(scope="module")
def model() -> GPTModel:
    return built()


@pytest.fixture(scope="module")
def short(model):
    return traced(model, 8)


@pytest.fixture(scope="module")
def fused():
    """Under sdpa, with the weights made afterwards."""
    return traced(built(use_flash=True, attn_implementation="sdpa"), 8, recompute=True)


@pytest.fixture(scope="module")
def large():
    """12 layers of 12 heads, 32 tokens: what a sheet of GPT-2's is like."""
    return traced(built(emb_dim=96, n_heads=12, n_layers=12), 32)


def exact_scores(t, layer: int, head: int) -> np.ndarray:
    q, k = (t[f"blocks.{layer}.attention.{what}"][0, head].double().numpy() for what in ("queries", "keys"))
    return q @ k.T / np.sqrt(q.shape[-1])


def exact_weights(t, layer: int, head: int) -> np.ndarray:
    scores = exact_scores(t, layer, head)
    weights = np.zeros_like(scores)
    for row in range(len(scores)):
        seen = np.exp(scores[row, : row + 1] - scores[row, : row + 1].max())
        weights[row, : row + 1] = seen / seen.sum()
    return weights


def assert_shows(axes, table: np.ndarray, hidden: np.ndarray, atol: float = 2e-6) -> None:
    (image,) = axes.images
    shown = np.ma.getmaskarray(image.get_array())
    assert np.array_equal(shown, hidden)
    np.testing.assert_allclose(image.get_array().data[~hidden], table[~hidden], rtol=0, atol=atol)


def future(length: int) -> np.ndarray:
    return np.triu(np.ones((length, length), dtype=bool), 1)


def assert_nothing_cut_off(figure) -> None:
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    box, (width, height) = figure.get_tightbbox(canvas.get_renderer()), figure.get_size_inches()
    assert box.x0 >= 0, f"{-box.x0:.2f} inches too far left"
    assert box.y0 >= 0, f"{-box.y0:.2f} inches too low"
    assert box.x1 <= width, f"{box.x1 - width:.2f} inches too far right"
    assert box.y1 <= height, f"{box.y1 - height:.2f} inches too high"


def words_of(t) -> list[str]:
    return [token_label(text) for text in t.tokens[0]]


# ------------------------------------------------------------------ the sheet


def test_the_sheet_has_every_head_at_its_place_with_one_colour_scale(large):
    figure = attention_sheet(large)
    panels = figure.axes[:-1]
    assert len(panels) == 144
    for number, axes in enumerate(panels):
        layer, head = divmod(number, 12)
        assert_shows(axes, exact_weights(large, layer, head), future(32))
        assert axes.images[0].get_clim() == (0, 1)
    assert [axes.get_title() for axes in panels[:12]] == [f"head {i}" for i in range(12)]
    assert [axes.get_ylabel() for axes in panels[::12]] == [f"layer {i}" for i in range(12)]
    assert figure.axes[-1].get_ylabel() == "attention weight"
    places = [axes.get_position() for axes in panels]
    assert all(a.x0 < b.x0 and a.y0 == b.y0 for a, b in itertools.pairwise(places[:12]))
    assert all(a.y0 > b.y0 and a.x0 == b.x0 for a, b in itertools.pairwise(places[::12]))


def test_a_sheet_of_many_tokens_names_them_by_their_positions_and_cuts_nothing_off(large):
    figure = attention_sheet(large)
    caption = " ".join(text.get_text() for text in figure.texts)
    for position, word in enumerate(words_of(large)):
        assert f"{position}\N{NO-BREAK SPACE}{word}" in caption
    assert_nothing_cut_off(figure)
    for ticks in (figure.axes[132].get_xticks(), figure.axes[0].get_yticks()):
        inside = [tick for tick in ticks if 0 <= tick < 32]
        assert 3 <= len(inside) <= 6
        assert all(tick == int(tick) for tick in inside)


def test_no_panel_of_the_sheet_is_covered_by_a_label(large):
    figure = attention_sheet(large)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    texts = [*figure.texts, *(axes.title for axes in figure.axes[:12])]
    boxes = [text.get_window_extent(renderer) for text in texts if text.get_text()]
    for number, box in enumerate(boxes):
        assert not any(box.overlaps(axes.bbox) for axes in figure.axes)
        assert not any(box.overlaps(other) for other in boxes[number + 1 :])


def test_a_sheet_of_few_tokens_has_them_on_its_edges(short):
    figure = attention_sheet(short)
    assert len(figure.axes) == 2 * 4 + 1
    for axes in figure.axes[:-1:4]:
        assert [label.get_text() for label in axes.get_yticklabels()] == words_of(short)
    for axes in figure.axes[4:-1]:
        assert [label.get_text() for label in axes.get_xticklabels()] == words_of(short)
    assert len(figure.axes[1].get_yticks()) == 0
    assert_nothing_cut_off(figure)


def test_one_layer_alone_has_its_heads_named(large):
    figure = attention_sheet(large, 7)
    drawn = [axes for axes in figure.axes[:-1] if axes.images]
    assert [axes.get_title() for axes in drawn] == [f"layer 7, head {i}" for i in range(12)]
    for head, axes in enumerate(drawn):
        assert_shows(axes, exact_weights(large, 7, head), future(32))
    assert "layer 7" in figure.get_suptitle()
    assert_nothing_cut_off(figure)


# ------------------------------------------------------------------ one head


def test_one_head_has_its_tokens_and_its_numbers(short):
    figure = attention_head(short, 1, 2)
    axes = figure.axes[0]
    weights = exact_weights(short, 1, 2)
    assert_shows(axes, weights, future(8))
    assert [label.get_text() for label in axes.get_xticklabels()] == words_of(short)
    assert [label.get_text() for label in axes.get_yticklabels()] == words_of(short)
    written = {(round(text.get_position()[1]), round(text.get_position()[0])): text.get_text() for text in axes.texts}
    assert set(written) == {(row, column) for row in range(8) for column in range(row + 1)}
    for place, text in written.items():
        assert float(text) == pytest.approx(weights[place], abs=0.00501)
    assert "layer 1, head 2" in axes.get_title().lower()
    assert "key" in axes.get_xlabel()
    assert "query" in axes.get_ylabel()
    assert_nothing_cut_off(figure)


def test_many_tokens_have_no_numbers(large):
    figure = attention_head(large, 11, 3)
    assert len(figure.axes[0].texts) == 0
    assert_shows(figure.axes[0], exact_weights(large, 11, 3), future(32))
    assert_nothing_cut_off(figure)


def test_numbers_can_be_read_on_their_colour(short):
    def luminance(rgb) -> float:
        linear = np.where(np.array(rgb) <= 0.04045, np.array(rgb) / 12.92, ((np.array(rgb) + 0.055) / 1.055) ** 2.4)
        return float(linear @ (0.2126, 0.7152, 0.0722))

    for figure in (attention_head(short, 1, 2), score_steps(short, 1, 2), residual_norms(short)):
        for axes in figure.axes[:-1]:
            for text in axes.texts:
                (image,) = axes.images
                column, row = map(round, text.get_position())
                below = luminance(image.get_cmap()(image.norm(image.get_array()[row, column]))[:3])
                above = {"black": 0.0, "white": 1.0}[text.get_color()]
                light, dark = max(below, above), min(below, above)
                assert (light + 0.05) / (dark + 0.05) >= 4.5


@pytest.mark.parametrize("names", ["*", "*.weights"])
def test_a_hidden_key_differs_from_one_of_weight_0(model, names):
    """Scores a thousand times as large: most seen keys get exactly 0, and are not hatched for it in the past."""
    t = traced(model, 8, patch={"blocks.0.attention.scores": lambda scores: 1000 * scores}, names=names)
    weights = t["blocks.0.attention.weights"][0, 0].numpy()
    assert (weights[np.tril_indices(8)] == 0).sum() > 10
    axes = attention_head(t, 0, 0).axes[0]
    assert_shows(axes, weights, future(8))
    assert axes.patch.get_hatch()
    transparent = axes.images[0].get_cmap()(np.ma.masked_all(1))[0]
    assert transparent[3] == 0
    assert not np.allclose(axes.patch.get_facecolor()[:3], axes.images[0].get_cmap()(0.0)[:3], atol=0.03)


def test_padding_is_hidden_too(model):
    ids = torch.tensor([STORY[:6], [0, 0, *STORY[:4]]])
    padding_mask = torch.tensor([[True] * 6, [False] * 2 + [True] * 4])
    t = trace(model, ids, padding_mask=padding_mask)
    hidden = future(6) | ~padding_mask[1].numpy()[None]
    axes = attention_head(t, 0, 1, sequence=1).axes[0]
    assert np.array_equal(np.ma.getmaskarray(axes.images[0].get_array()), hidden)
    assert_shows(attention_sheet(t, sequence=1).axes[5], t["blocks.1.attention.weights"][1, 1].numpy(), hidden)
    assert_shows(attention_head(t, 0, 1, sequence=0).axes[0], t["blocks.0.attention.weights"][0, 1].numpy(), future(6))


# ------------------------------------------------------------------ scores, mask, softmax


def test_the_steps_are_the_scores_the_masked_scores_and_the_weights(short):
    figure = score_steps(short, 0, 3)
    scores, masked, weights = figure.axes[:3]
    exact = exact_scores(short, 0, 3)
    size = np.abs(exact).max()
    assert_shows(scores, exact, np.zeros((8, 8), dtype=bool), atol=1e-5 * size)
    assert_shows(masked, exact, future(8), atol=1e-5 * size)
    assert_shows(weights, exact_weights(short, 0, 3), future(8))
    assert scores.images[0].get_clim() == masked.images[0].get_clim() == pytest.approx((-size, size), rel=1e-5)
    assert [len(axes.texts) for axes in figure.axes[:3]] == [64, 36, 36]
    assert [axes.get_ylabel() for axes in figure.axes[3:]] == ["score", "score", "weight"]
    for axes in figure.axes[:3]:
        assert [label.get_text() for label in axes.get_xticklabels()] == words_of(short)
    assert figure.legends[0].get_texts()[0].get_text().startswith("hidden")
    assert_nothing_cut_off(figure)


def test_steps_of_many_tokens_are_not_cut_off(large):
    figure = score_steps(large, 11, 0)
    assert all(not axes.texts for axes in figure.axes)
    assert_nothing_cut_off(figure)


# ------------------------------------------------------------------ where weights do not exist


@pytest.mark.parametrize("draw", [attention_sheet, lambda t: attention_head(t, 1, 0), lambda t: score_steps(t, 1, 0)])
def test_recomputed_weights_are_said_to_be(draw, fused, short):
    def title(figure) -> str:
        return figure.get_suptitle() or figure.axes[0].get_title()

    assert "recomputed: sdpa forms none" in title(draw(fused))
    assert "recomputed" not in title(draw(short))
    assert_nothing_cut_off(draw(fused))


def test_recomputed_weights_are_the_same(fused):
    assert_shows(attention_head(fused, 1, 3).axes[0], exact_weights(fused, 1, 3), future(8))


@pytest.mark.parametrize(
    "draw",
    [
        attention_sheet,
        lambda t: attention_sheet(t, 1),
        lambda t: attention_head(t, 1, 0),
        lambda t: score_steps(t, 1, 0),
    ],
)
def test_a_fused_trace_without_weights_says_how_to_get_them(draw):
    t = traced(built(use_flash=True, attn_implementation="sdpa"), 4)
    with pytest.raises(KeyError, match="recompute=True"):
        draw(t)


def test_what_does_not_exist_is_named(short):
    with pytest.raises(ValueError, match=r"4 heads, got head=4"):
        attention_head(short, 0, 4)
    with pytest.raises(ValueError, match=r"1 sequences, got sequence=1"):
        attention_sheet(short, sequence=1)
    with pytest.raises(ValueError, match=r"1 sequences, got sequence=-1"):
        residual_norms(short, sequence=-1)


@pytest.mark.parametrize("layer", [2, 9, -1, "0"])
@pytest.mark.parametrize(
    "draw",
    [lambda t, layer: attention_sheet(t, layer), lambda t, layer: attention_head(t, layer, 0),
     lambda t, layer: score_steps(t, layer, 0)],
)  # fmt: skip
def test_a_layer_that_does_not_exist_is_told_which_there_are(draw, layer, short, model):
    """Also where the trace has no weights: their absence is not the reason."""
    for t in (short, traced(built(use_flash=True, attn_implementation="sdpa"), 4), traced(model, 4, names="logits")):
        with pytest.raises(ValueError, match=rf"2 layers, 0 to 1, got layer={layer!r}"):
            draw(t, layer)


# ------------------------------------------------------------------ the stream


def test_the_norms_are_those_of_the_stream_and_of_what_was_added(short):
    figure = residual_norms(short)
    left, right, scale = figure.axes
    stream = short["token_embedding"][0].double() + short["position_embedding"][0].double()
    after, added = [stream], [stream]
    for i in range(2):
        for part in ("attention", "feed_forward"):
            added.append(short[f"blocks.{i}.{part}.output"][0].double())
            after.append(after[-1] + added[-1])
    for axes, parts in ((left, after), (right, added)):
        expected = np.array([[np.sqrt((row.numpy() ** 2).mean()) for row in part] for part in parts])
        np.testing.assert_allclose(axes.images[0].get_array(), expected, rtol=1e-5)
        for text in axes.texts:
            column, row = map(round, text.get_position())
            assert float(text.get_text()) == pytest.approx(expected[row, column], rel=5.1e-3)
        assert len(axes.texts) == 5 * 8
        assert [label.get_text() for label in axes.get_xticklabels()] == words_of(short)
    order = ["embeddings", "0 attention", "0 feed-forward", "1 attention", "1 feed-forward"]
    assert [label.get_text() for label in left.get_yticklabels()] == order
    assert "root mean square" in scale.get_ylabel()
    assert re.search(r"emb_dim = 128", figure.get_suptitle())
    assert left.get_ylim() == (4.5, -0.5)  # as many rows as parts
    assert_nothing_cut_off(figure)


def test_the_scale_of_the_norms_has_numbers_at_both_ends(short, large):
    for t in (short, large):
        figure = residual_norms(t)
        assert_nothing_cut_off(figure)
        *panels, scale = figure.axes
        values = np.concatenate([axes.images[0].get_array().ravel() for axes in panels])
        marks = [float(label.get_text()) for label in scale.get_yticklabels()]
        assert marks[0] == pytest.approx(values.min(), rel=0.06)
        assert marks[-1] == pytest.approx(values.max(), rel=0.06)
        assert len(marks) == 6


def test_a_part_that_adds_nothing_has_no_colour(model):
    t = traced(model, 5, patch={"blocks.1.attention.output": torch.zeros_like})
    table = residual_norms(t).axes[1].images[0].get_array()
    assert np.ma.getmaskarray(table)[3].all()
    assert np.ma.getmaskarray(table).sum() == 5


def set_stream(model, change):
    """A trace of 6 tokens whose stream is changed at every place where the figure reads it."""
    places = [f"blocks.{i}.{place}" for i in range(2) for place in ("after_attention", "output")]
    return traced(model, 6, patch=dict.fromkeys(["embeddings", *places], change))


def written(axes) -> dict[tuple[int, int], str]:
    return {(round(text.get_position()[1]), round(text.get_position()[0])): text.get_text() for text in axes.texts}


def test_a_stream_of_zeros_has_no_colour_and_says_0(model):
    figure = residual_norms(set_stream(model, torch.zeros_like))
    for axes in figure.axes[:2]:
        assert np.ma.getmaskarray(axes.images[0].get_array()).all()
        assert written(axes) == {place: "0" for place in np.ndindex(5, 6)}
    assert_nothing_cut_off(figure)


def test_a_model_that_adds_nothing_is_drawn_and_says_0(model):
    nothing = {
        f"blocks.{i}.{part}.output": torch.zeros_like for i in range(2) for part in ("attention", "feed_forward")
    }
    figure = residual_norms(traced(model, 6, patch=nothing))
    table = figure.axes[1].images[0].get_array()
    assert np.array_equal(np.ma.getmaskarray(table), np.arange(5)[:, None].repeat(6, axis=1) > 0)
    assert [text for (row, _), text in written(figure.axes[1]).items() if row > 0] == ["0"] * 24
    assert_nothing_cut_off(figure)


def test_nan_and_infinity_in_the_stream_are_drawn_without_colour_and_named(model):
    def spoil(stream):
        stream = torch.ones_like(stream)  # a spoilt value would go on to the tokens behind it
        stream[:, 2], stream[:, 4] = torch.nan, torch.inf
        return stream

    figure = residual_norms(set_stream(model, spoil))
    table = figure.axes[0].images[0].get_array()
    assert np.array_equal(np.ma.getmaskarray(table), np.isin(np.arange(6), [2, 4])[None].repeat(5, axis=0))
    assert [written(figure.axes[0])[row, 2] for row in range(5)] == ["nan"] * 5
    assert [written(figure.axes[0])[row, 4] for row in range(5)] == ["inf"] * 5
    assert_nothing_cut_off(figure)


# ------------------------------------------------------------------ tokens as text


@pytest.mark.parametrize(
    ("text", "label"),
    [
        (" the", "␣the"),
        ("\n", "↵"),
        ("\t", r"\t"),
        ("a$b$", r"a\$b\$"),
        ("abcdefghijklmnop", "abcdefghijk…"),
        ("abcdefghijkl", "abcdefghijkl"),
    ],
)
def test_tokens_are_made_visible(text, label):
    assert token_label(text) == label


def test_a_token_is_never_read_as_a_formula(model):
    t = traced(model, 4)
    t.tokens[0][:] = [r"$\frac$", "$", "$$", " $x_1$"]  # the first would end the drawing with an error
    for figure in (attention_head(t, 0, 0), attention_sheet(t), residual_norms(t)):
        FigureCanvasAgg(figure).draw()
