"""Figures, the stepper and the exported page of models with RMSNorm, SwiGLU, rotary positions and shared heads."""

import json
import re

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg

from GPT2Model.config import from_preset
from GPT2Model.gpt2 import GPTModel
from GPT2Model.tracing import trace
from orchestrator.text.tales import TalesTokenizer
from orchestrator.views.html_export import export_html
from orchestrator.views.lens_figures import embedding_neighbours, logit_lens
from orchestrator.views.stepper import StepThrough
from orchestrator.views.tile_figures import flash_tiles
from orchestrator.views.trace_figures import attention_head, attention_sheet, residual_norms, score_steps
from orchestrator.views.trace_format import head_weights, trace_data

TOKENIZER = TalesTokenizer()
TEXT = "One morning a kind boy named Hugo"
ALL = {"norm": "rmsnorm", "mlp": "swiglu", "positions": "rope", "n_kv_heads": 2}
CHANGES = {**{name: {name: value} for name, value in ALL.items()}, "all": ALL}


def make(**changes) -> GPTModel:
    torch.manual_seed(0)
    tiles = {"flash_query_block_size": 4, "flash_kv_block_size": 4}
    model = GPTModel(from_preset("nano", vocab_size=TOKENIZER.vocab_size, init_std=0.2, **tiles, **changes)).eval()
    with torch.no_grad():
        model.final_norm.weight.uniform_(0.5, 2.0)
    return model


def texts(figure) -> str:
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    box, (width, height) = figure.get_tightbbox(canvas.get_renderer()), figure.get_size_inches()
    assert min(box.x0, box.y0) >= 0  # nothing is cut off
    assert box.x1 <= width
    assert box.y1 <= height
    every = figure.findobj(lambda artist: hasattr(artist, "get_text"))
    return "\n".join(artist.get_text() for artist in every)


def test_every_figure_of_a_trace_is_drawn():
    model = make(**ALL)
    traced = trace(model, TEXT, tokenizer=TOKENIZER, recompute=True)
    for figure in (
        attention_sheet(traced), attention_head(traced, 1, 3), residual_norms(traced), score_steps(traced, 0, 1),
        logit_lens(model, traced, TOKENIZER), embedding_neighbours(model, TOKENIZER, "Hugo"),
    ):  # fmt: skip
        assert texts(figure)
    with model.using_attention("flash_tiled"):
        tiled = trace(model, TEXT, tokenizer=TOKENIZER, recompute=True)
    assert "tile 3 of 3" in texts(flash_tiles(tiled, 1, 3))


@pytest.mark.parametrize("changes", [{}, ALL], ids=["gpt2", "all"])
def test_the_steps_of_the_scores_say_whether_they_are_of_turned_vectors(changes):
    traced = trace(make(**changes), TEXT, tokenizer=TOKENIZER, recompute=True)
    figure = score_steps(traced, 0, 2)
    assert ("turned queries · turned keys" in texts(figure)) == ("positions" in changes)
    queries, keys = (traced[f"blocks.0.attention.{what}"].double() for what in ("queries", "keys"))
    scores = queries[0, 2] @ keys[0, 2 * keys.shape[1] // 4].T / 32**0.5
    np.testing.assert_allclose(figure.axes[0].images[0].get_array(), scores, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES)
def test_the_lens_reads_the_stream_through_the_models_own_norm(changes):
    model = make(**changes)
    data = trace_data(trace(model, TEXT, tokenizer=TOKENIZER, recompute=True), model, TOKENIZER)
    ids = torch.tensor([data["ids"]])
    stream = {}
    hook = model.blocks[0].register_forward_hook(lambda module, given, output: stream.update(x=output.double()))
    with torch.no_grad():
        model(ids)
    hook.remove()
    x, weight = stream["x"][0], model.final_norm.weight.double()
    if changes.get("norm") == "rmsnorm":
        normed = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight
    else:
        normed = torch.layer_norm(x, (128,), weight, model.final_norm.bias.double(), 1e-5)
    best = (normed @ model.head.weight.double().T).softmax(-1).max(-1)
    row = data["lens"]["top"][data["lens"]["names"].index("blocks.0.output")]
    assert [top[0][0] for top in row] == best.indices.tolist()
    np.testing.assert_allclose([top[0][1] for top in row], best.values.detach(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("changes", [{}, *CHANGES.values()], ids=["gpt2", *CHANGES])
def test_the_page_says_what_is_not_as_in_gpt2(changes, tmp_path):
    model = make(**changes)
    traced = trace(model, TEXT, tokenizer=TOKENIZER, recompute=True)
    page = export_html(traced, tmp_path / "page.html", model, TOKENIZER).read_text(encoding="utf-8")
    data = json.loads(re.search(r'<script[^>]*id="data"[^>]*>(.*?)</script>', page, flags=re.S)[1])
    named = [phrase.partition("=")[0] for phrase in data["unlike_gpt2"]]
    assert named == [name for name in ("norm", "mlp", "positions") if name in changes]
    title = re.search("<title>(.*?)</title>", page)[1]
    assert title.startswith("Inside a variant of GPT-2: " if named else "Inside GPT-2: ")
    weights = traced["blocks.1.attention.weights"][0, 3].double()
    np.testing.assert_allclose(head_weights(data, 1, 3), weights, rtol=0, atol=1e-5)
    inside = {tensor["name"]: tensor["about"] for tensor in data["tensors"]}
    assert ("blocks.0.feed_forward.gate" in inside) == ("mlp" in changes)
    assert ("position_embedding" in inside) == ("positions" not in changes)
    assert ("root mean square" in inside["final_norm"]) == ("norm" in changes)


def test_a_page_is_not_made_with_the_model_of_another_variant():
    traced = trace(make(norm="rmsnorm"), TEXT, tokenizer=TOKENIZER, recompute=True)
    with pytest.raises(ValueError, match=r"norm rmsnorm \(this model: layernorm\)"):
        trace_data(traced, make(), TOKENIZER)


def test_the_stepper_steps_through_it_and_its_toggle_moves_no_logit():
    stepper = StepThrough(make(**ALL), TEXT, TOKENIZER)
    for name in ("eager", "flash_tiled", "sdpa"):
        stepper.controls["implementation"].value = name
        assert stepper.run.data["implementation"] == name
        assert stepper.run.from_eager < 1e-3
    stepper.controls["layer"].value, stepper.controls["head"].value = 1, 3
    assert bytes(stepper.picture.value).startswith(b"\x89PNG")
    assert "feed_forward.gate" in stepper.shown.value
