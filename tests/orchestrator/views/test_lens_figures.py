"""Figures of what a model would say: their words and numbers, held against numpy in float64."""

import itertools

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex, to_rgb

from GPT2Model.config import from_preset
from GPT2Model.generation import filtered_probabilities
from GPT2Model.gpt2 import GPTModel
from GPT2Model.tokenizer import get_tokenizer
from GPT2Model.tracing import trace
from orchestrator.text.tales import TalesTokenizer, stories
from orchestrator.views.figures import BLUE, ORANGE
from orchestrator.views.lens_figures import embedding_neighbours, logit_lens, sampling_steps

TOKENIZER = TalesTokenizer()
V = TOKENIZER.vocab_size
STORY = TOKENIZER.encode(stories(1, seed=3)[0])


def word(i: int) -> str:
    """As it stands on an axis: none of the tales' words is long or has a space."""
    text = TOKENIZER.decode([i])
    return text if len(text) <= 10 else text[:9] + "…"


@pytest.fixture(scope="module")
def model() -> GPTModel:
    torch.manual_seed(0)
    model = GPTModel(from_preset("nano", vocab_size=V, init_std=0.15, tie_weights=False)).eval()
    with torch.no_grad():
        model.final_norm.weight.uniform_(0.5, 2.0)  # at its start the norm has nothing that could be forgotten
        model.final_norm.bias.normal_()
    return model


@pytest.fixture(scope="module")
def short(model):
    return trace(model, TOKENIZER.decode(STORY[:8]), tokenizer=TOKENIZER)


def assert_nothing_cut_off(figure) -> None:
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    box, (width, height) = figure.get_tightbbox(canvas.get_renderer()), figure.get_size_inches()
    assert box.x0 >= 0
    assert box.y0 >= 0
    assert box.x1 <= width
    assert box.y1 <= height


def assert_written_inside(figure) -> None:
    """No number of a panel runs out of it or into another one."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    for axes in figure.axes:
        boxes = [text.get_window_extent(canvas.get_renderer()) for text in axes.texts]
        for number, box in enumerate(boxes):
            assert axes.bbox.x0 <= box.x0 < box.x1 <= axes.bbox.x1
            assert not any(box.overlaps(other) for other in boxes[:number])


# ------------------------------------------------------------------ the logit lens


def exact_lens(model, t) -> np.ndarray:
    """(stages, T, V) probabilities: layer norm and head written out in float64, the stream summed from its parts."""
    weight, bias = (getattr(model.final_norm, name).detach().double().numpy() for name in ("weight", "bias"))
    stream = [(t["token_embedding"][0].double() + t["position_embedding"][0].double()).numpy()]
    for i in range(len(model.blocks)):
        parts = [t[f"blocks.{i}.{part}.output"][0].double().numpy() for part in ("attention", "feed_forward")]
        stream.append(stream[-1] + sum(parts))
    x = np.stack(stream)
    centred = x - x.mean(-1, keepdims=True)
    normed = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * weight + bias
    logits = normed @ model.head.weight.detach().double().numpy().T
    exponentials = np.exp(logits - logits.max(-1, keepdims=True))
    return exponentials / exponentials.sum(-1, keepdims=True)


def cells(axes) -> dict:
    return {(round(text.get_position()[1]), round(text.get_position()[0])): text.get_text() for text in axes.texts}


def test_the_lens_shows_the_best_guess_and_its_probability_at_each_depth(model, short):
    figure = logit_lens(model, short, TOKENIZER)
    axes, scale = figure.axes
    expected = exact_lens(model, short)
    np.testing.assert_allclose(axes.images[0].get_array(), expected.max(-1), rtol=0, atol=1e-5)
    best = expected.argmax(-1)
    assert cells(axes) == {place: word(int(best[place])) for place in np.ndindex(best.shape)}
    assert len({*best.ravel()}) > 5  # else any table of one word would pass
    assert axes.images[0].get_clim() == (0, 1)
    assert "probability" in scale.get_ylabel()
    assert_nothing_cut_off(figure)


def test_the_last_row_of_the_lens_is_what_the_model_says(model, short):
    said = model(short.ids)[0].softmax(-1).max(-1)
    axes = logit_lens(model, short, TOKENIZER).axes[0]
    assert [cells(axes)[2, column] for column in range(8)] == [word(int(i)) for i in said.indices]
    np.testing.assert_allclose(axes.images[0].get_array()[2], said.values.detach(), rtol=0, atol=1e-6)


def test_the_lens_frames_the_token_that_really_follows(model):
    """Also of a long text, of which the last positions are shown, and of a second sequence."""
    for tokens in (8, 40):
        t = trace(model, torch.tensor([STORY[20 : 20 + tokens], STORY[:tokens]]), tokenizer=TOKENIZER)
        shown = min(tokens, 16)
        alone = trace(model, t.ids[1:], tokenizer=TOKENIZER)
        best = exact_lens(model, alone)[:, -shown:].argmax(-1)
        t.ids = t.ids.clone()
        t.ids[1, -shown + 1 :] = torch.from_numpy(best[1, :-1])  # a text that goes on as block 0 says
        axes = logit_lens(model, t, TOKENIZER, sequence=1).axes[0]
        frames = {(round(p.get_y() + p.get_height() / 2), round(p.get_x() + p.get_width() / 2)) for p in axes.patches}
        places = np.ndindex(3, shown - 1)
        assert frames == {(row, column) for row, column in places if best[row, column] == best[1, column]}
        assert {(1, column) for column in range(shown - 1)} <= frames
        assert {to_hex(p.get_edgecolor()) for p in axes.patches} == {ORANGE}


def test_the_lens_shows_the_last_16_positions_of_a_long_text(model):
    t = trace(model, TOKENIZER.decode(STORY[:40]), tokenizer=TOKENIZER)
    figure = logit_lens(model, t, TOKENIZER)
    axes = figure.axes[0]
    expected = exact_lens(model, t)[:, 24:]
    np.testing.assert_allclose(axes.images[0].get_array(), expected.max(-1), rtol=0, atol=1e-5)
    assert [text.get_text().split("\n")[0] for text in axes.get_xticklabels()] == [str(i) for i in range(24, 40)]
    assert [text.get_text().split("\n")[1] for text in axes.get_xticklabels()] == [word(i) for i in STORY[24:40]]
    assert "the last 16 of 40" in axes.get_xlabel()
    assert_nothing_cut_off(figure)
    assert_written_inside(figure)


def test_the_lens_of_another_sequence(model):
    ids = torch.tensor([STORY[:5], STORY[5:10]])
    axes = logit_lens(model, trace(model, ids, tokenizer=TOKENIZER), TOKENIZER, sequence=1).axes[0]
    alone = logit_lens(model, trace(model, ids[1:], tokenizer=TOKENIZER), TOKENIZER).axes[0]
    assert cells(axes) == cells(alone)
    assert [t.get_text() for t in axes.get_xticklabels()] == [t.get_text() for t in alone.get_xticklabels()]


def test_the_lens_refuses_what_does_not_belong_together(model, short):
    with pytest.raises(ValueError, match=rf"50257 tokens and the model {V}"):
        logit_lens(model, short, get_tokenizer())
    other = GPTModel(from_preset("nano", vocab_size=V, n_layers=3))
    with pytest.raises(ValueError, match=r"2 layers of width 128, this one has 3 of width 128"):
        logit_lens(other, short, TOKENIZER)
    with pytest.raises(ValueError, match="sequence=3"):
        logit_lens(model, short, TOKENIZER, sequence=3)
    with pytest.raises(KeyError, match=r"embeddings"):
        logit_lens(model, trace(model, short.ids, names="logits"), TOKENIZER)


# ------------------------------------------------------------------ the steps of sampling

SETTINGS = [
    (1.0, None, None),
    (0.7, 5, 0.9),
    (2.0, None, 0.5),
    (0.8, 50, 0.95),
    (1.5, 3, None),
    (1e-4, 4, 0.9),
    (0.0, None, None),
]


@pytest.fixture(scope="module")
def logits() -> torch.Tensor:
    return torch.randn(V, generator=torch.Generator().manual_seed(0)) * 3 - 80  # as far from 0 as GPT-2's are


def exact_steps(logits, temperature, top_k, top_p):
    """(order, after top-k, final) in float64, token after token."""
    scores = logits.double().numpy()
    order = np.argsort(-scores, kind="stable")
    scaled = scores / (temperature or 1e-30)
    p = np.exp(scaled - scaled.max())
    if top_k is not None:
        p[order[top_k:]] = 0
    p = p / p.sum()
    final, so_far = p.copy(), 0.0
    for i in order:
        if top_p is not None and so_far >= top_p:
            final[i] = 0
        so_far += p[i]
    return order, p, final / final.sum()


def bar_widths(axes) -> list[float]:
    bars = sorted(axes.patches, key=lambda bar: bar.get_y())
    return [bar.get_width() for bar in bars]


@pytest.mark.parametrize("settings", SETTINGS)
def test_the_last_step_is_what_generate_draws_from(logits, settings):
    temperature, top_k, top_p = settings
    order, after_k, final = exact_steps(logits, *settings)
    panels = sampling_steps(logits, TOKENIZER, *settings).axes
    drawn = filtered_probabilities(logits[None], temperature, top_k=top_k, top_p=top_p)[0].double().numpy()
    for axes, expected in ((panels[2], after_k), (panels[3], final), (panels[3], drawn)):
        widths = bar_widths(axes)
        np.testing.assert_allclose(widths[:12], expected[order[:12]], rtol=0, atol=2e-6)
        assert widths[12] == pytest.approx(expected[order[12:]].sum(), abs=1e-5)
        assert sum(widths) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("settings", SETTINGS)
def test_every_step_has_its_numbers_and_says_what_it_cut(logits, settings):
    temperature, top_k, top_p = settings
    order, after_k, final = exact_steps(logits, *settings)
    first, second, third, fourth = (
        [text.get_text() for text in axes.texts] for axes in sampling_steps(logits, TOKENIZER, *settings).axes
    )
    for row, i in enumerate(order[:12]):
        assert float(first[row]) == pytest.approx(logits[i].item(), abs=0.00501)
        assert float(second[row].split()[0]) == pytest.approx(
            logits[i].item() / (temperature or 1), rel=1e-6, abs=0.0051
        )
        by_k = row >= 1 if temperature == 0 else top_k is not None and row >= top_k
        by_p = not by_k and after_k[i] > 1e-30 and final[i] == 0
        assert ("cut" in second[row]) == by_k
        if by_k:
            assert (third[row], fourth[row]) == ("cut", "cut")
            continue
        assert float(third[row].split()[0]) == pytest.approx(after_k[i], abs=5.1e-5)
        assert third[row].endswith("cut") == by_p
        assert (fourth[row] == "cut") == by_p
        if not by_p:
            assert float(fourth[row]) == pytest.approx(final[i], abs=5.1e-5)
            if top_p is not None:
                total = after_k[order[: row + 1]].sum()
                assert float(third[row].split("sum ")[1].rstrip(")")) == pytest.approx(total, abs=5.1e-5)


@pytest.mark.parametrize("settings", SETTINGS)
def test_the_steps_are_labelled_and_nothing_is_cut_off(logits, settings):
    figure = sampling_steps(logits, TOKENIZER, *settings)
    panels = figure.axes
    order = logits.argsort(descending=True)
    labels = [text.get_text() for text in panels[0].get_yticklabels()]
    assert labels == [*(TOKENIZER.decode([int(i)]) for i in order[:12]), f"{V - 12} others"]
    assert [axes.get_xlabel() for axes in panels[2:]] == ["probability", "probability"]
    assert panels[0].get_xlabel() == "logit"
    assert f"{settings[0]:g}" in panels[1].get_title()
    assert ("no top-p" if settings[2] is None else f"top-p {settings[2]:g}") in panels[2].get_title()
    assert_nothing_cut_off(figure)
    assert_written_inside(figure)
    canvas = FigureCanvasAgg(figure)
    titles = [axes.title.get_window_extent(canvas.get_renderer()) for axes in panels]
    assert not any(a.x1 > b.x0 for a, b in itertools.pairwise(titles))


def test_points_of_a_low_temperature_lie_further_apart(logits):
    """Both scales are equally wide, so that dividing is seen."""
    raw, divided = sampling_steps(logits, TOKENIZER, 0.5).axes[:2]
    assert np.ptp(raw.get_xlim()) == pytest.approx(np.ptp(divided.get_xlim()))
    spreads = [np.ptp([line.get_xdata()[0] for line in axes.lines]) for axes in (raw, divided)]
    assert spreads[1] == pytest.approx(2 * spreads[0], rel=1e-5)


def test_what_is_cut_differs_by_more_than_colour(logits):
    panels = sampling_steps(logits, TOKENIZER, 1.0, 8, 0.6).axes
    assert [line.get_marker() for line in panels[1].lines] == ["o"] * 8 + ["x"] * 4
    hatched = [bool(bar.get_hatch()) for bar in panels[2].patches[:12]]
    kept = int((exact_steps(logits, 1.0, 8, 0.6)[2] > 0).sum())
    assert 0 < kept < 8
    assert hatched == [False] * kept + [True] * (8 - kept) + [False] * 4
    assert panels[0].figure.legends[0].get_texts()[0].get_text() == "cut by top-p"


def test_a_vocabulary_of_a_few_tokens_has_no_others():
    class Letters:
        vocab_size = 4

        def decode(self, ids):
            return "".join("abcd"[i] for i in ids)

    figure = sampling_steps(torch.tensor([0.0, 3.0, 1.0, 2.0]), Letters())
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == ["b", "d", "c", "a"]
    expected = np.exp([3.0, 2.0, 1.0, 0.0])
    np.testing.assert_allclose(bar_widths(figure.axes[3]), expected / expected.sum(), rtol=1e-6)


def test_every_wrong_argument_of_the_steps_is_named_at_once(logits):
    with pytest.raises(ValueError) as caught:
        sampling_steps(logits[:5], TOKENIZER, -1, 0, 1.5)
    for part in (f"5 logits and a tokenizer of {V}", "temperature", "top_k", "top_p"):
        assert part in str(caught.value)
    with pytest.raises(ValueError, match=r"model\(ids\)\[0, -1\]"):
        sampling_steps(logits[None], TOKENIZER)
    with pytest.raises(ValueError, match="NaN"):
        sampling_steps(torch.full_like(logits, torch.nan), TOKENIZER)


@pytest.mark.parametrize(
    ("tokenizer", "said"),
    [
        (None, r"the one that the model was trained with.*got None.*get_tokenizer\(\)"),
        (TalesTokenizer, r"the class TalesTokenizer: make one, TalesTokenizer\(\)"),
        ("gpt2", "got str"),
    ],
)
def test_what_is_no_tokenizer_is_refused_by_every_figure(tokenizer, said, model, short, logits):
    for draw in (
        lambda: logit_lens(model, short, tokenizer),
        lambda: sampling_steps(logits, tokenizer),
        lambda: sampling_steps(logits[None], tokenizer, -1),
        lambda: embedding_neighbours(model, tokenizer, "boy"),
    ):
        with pytest.raises(TypeError, match=said):
            draw()


# ------------------------------------------------------------------ neighbours


@pytest.mark.parametrize("count", [1, 10])
def test_neighbours_are_the_nearest_by_cosine(model, count):
    figure = embedding_neighbours(model, TOKENIZER, "boy", count)
    (axes,) = figure.axes
    table = model.token_embedding.weight.detach().double().numpy()
    boy = TOKENIZER.encode("boy")[0]
    cosine = table @ table[boy] / np.linalg.norm(table, axis=1) / np.linalg.norm(table[boy])
    order = [i for i in np.argsort(-cosine) if i != boy][:count]
    assert [text.get_text() for text in axes.get_yticklabels()] == [TOKENIZER.decode([i]) for i in order]
    bars = axes.patches
    np.testing.assert_allclose([bar.get_width() for bar in bars], cosine[order], rtol=0, atol=1e-6)
    assert [float(text.get_text()) for text in axes.texts] == pytest.approx(list(cosine[order]), abs=5.1e-4)
    assert "cosine" in axes.get_xlabel()
    assert "boy" in axes.get_title()
    assert {to_rgb(bar.get_facecolor()) for bar in bars} == {to_rgb(BLUE)}
    assert_nothing_cut_off(figure)
    assert_written_inside(figure)


def test_a_word_of_several_tokens_is_refused_with_its_pieces():
    tokenizer = get_tokenizer()
    torch.manual_seed(0)
    model = GPTModel(from_preset("nano", vocab_size=50257, emb_dim=8, n_layers=1))
    with pytest.raises(
        ValueError, match=r"'unbelievable' is 4 tokens \('un', 'bel', 'iev', 'able'\).*try ' unbelievable'"
    ):
        embedding_neighbours(model, tokenizer, "unbelievable")
    with pytest.raises(ValueError, match="commoner"):
        embedding_neighbours(model, tokenizer, "a whole sentence")
    with pytest.raises(ValueError, match=r"0 tokens \(none\)"):
        embedding_neighbours(model, tokenizer, "")
    figure = embedding_neighbours(model, tokenizer, " king", 3)
    assert "␣king" in figure.axes[0].get_title()


def test_neighbours_of_what_is_no_word_or_no_number(model):
    with pytest.raises(ValueError, match="'boy'"):
        embedding_neighbours(model, TOKENIZER, "boyz")
    for count in (0, V, 2.5):
        with pytest.raises(ValueError, match=f"from 1 to {V - 1}"):
            embedding_neighbours(model, TOKENIZER, "boy", count)
    with pytest.raises(ValueError, match="trained with"):
        embedding_neighbours(model, get_tokenizer(), " king")
