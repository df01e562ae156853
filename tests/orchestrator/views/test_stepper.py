"""The stepper: its numbers are the model's, its toggle changes what runs and nothing else, its controls are wired."""

import io
import re
import sys

import matplotlib.image
import numpy as np
import pytest
import torch

from GPT2Model.config import from_preset
from GPT2Model.gpt2 import GPTModel
from orchestrator.text.tales import TalesTokenizer
from orchestrator.views.stepper import (
    StepThrough,
    attention_picture,
    describe,
    implementation_lines,
    run,
    usable_implementations,
)

TEXT = "One morning a kind boy named Hugo"


@pytest.fixture
def model():
    torch.manual_seed(0)
    return GPTModel(from_preset("nano", vocab_size=TalesTokenizer().vocab_size, init_std=0.2)).eval()


@pytest.fixture
def stepper(model):
    return StepThrough(model, TEXT, TalesTokenizer())


def plain(stepper) -> str:
    """The shown text without its markup."""
    shown = re.sub(r"<[^>]*>", "\n", stepper.shown.value)
    return shown.replace("&#x27;", "'").replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")


def exact_probabilities(model, token: int, temperature: float) -> torch.Tensor:
    ids = torch.tensor([TalesTokenizer().encode(TEXT)])
    double = GPTModel(model.cfg).double().eval()
    double.load_state_dict(model.state_dict())
    double.set_attention("eager")
    with torch.no_grad():
        return torch.softmax(double(ids)[0, token] / temperature, dim=-1)


@pytest.mark.parametrize(("token", "temperature"), [(0, 1.0), (3, 0.7), (6, 0.05), (6, 2.0)])
def test_moved_sliders_show_the_probabilities_that_float64_gives(stepper, model, token, temperature):
    stepper.controls["token"].value = token
    stepper.controls["temperature"].value = temperature
    found = re.findall(r"probability of '(.+)': (\d\.\d{4}) at temperature (\d\.\d\d)", plain(stepper))
    exact = exact_probabilities(model, token, temperature)
    best = exact.topk(5)
    assert [word for word, _, _ in found] == [TalesTokenizer().decode([i]) for i in best.indices]
    # shown to 4 digits; the logits, of size 10, are float32: 1e-5 / temperature relative
    np.testing.assert_allclose([float(p) for _, p, _ in found], best.values, rtol=2e-5 / temperature, atol=5.1e-5)
    assert {shown for _, _, shown in found} == {f"{temperature:.2f}"}


def test_what_the_token_attends_to_is_the_head_s_row(stepper, model):
    stepper.controls["layer"].value, stepper.controls["head"].value = 1, 3
    stepper.controls["token"].value = 5
    with model.using_attention("eager"):
        weights = run(model, TEXT, TalesTokenizer()).trace["blocks.1.attention.weights"][0, 3, 5]
    lines = re.findall(r"(\d\.\d{4})  '(.+)' \(token (\d+)\)", plain(stepper))
    best = weights.topk(5)
    assert [int(position) for _, _, position in lines] == best.indices.tolist()
    np.testing.assert_allclose([float(weight) for weight, _, _ in lines], best.values, rtol=0, atol=6e-5)


def test_the_shape_table_is_the_chosen_layer_s(stepper):
    stepper.controls["layer"].value = 1
    assert "Tensors of blocks.1" in plain(stepper)
    assert re.search(r"attention\.queries +\(batch 1, n_heads 4, tokens 7, head_dim 32\)", plain(stepper))


def test_each_implementation_really_runs_says_why_and_leaves_the_model_as_it_was(model):
    names = usable_implementations(model)
    assert names[0] == "auto"
    assert {"eager", "sdpa", "flash_tiled"} <= set(names)
    before = model.attention_report()
    for name, ran in [("auto", "sdpa"), ("eager", "eager"), ("sdpa", "sdpa"), ("flash_tiled", "flash_tiled")]:
        one = run(model, TEXT, TalesTokenizer(), implementation=name)
        assert one.data["implementation"] == ran
        assert one.data["recomputed"] is (ran != "eager")
        lines = implementation_lines(one)
        assert f"asked for {name}, ran {ran}" in lines
        assert ("computed again from its queries and keys" in lines) is (ran != "eager")
        assert one.from_eager == 0 if ran == "eager" else 0 < one.from_eager < 1e-4
    assert run(model, TEXT, TalesTokenizer(), use_flash=False).data["implementation"] == "eager"
    assert model.attention_report() == before


def test_the_toggle_of_the_widget_runs_the_model_again(stepper):
    assert "asked for auto, ran sdpa" in plain(stepper)
    stepper.controls["use_flash"].value = False
    assert "asked for eager, ran eager" in plain(stepper)
    stepper.controls["use_flash"].value = True
    stepper.controls["implementation"].value = "flash_tiled"
    assert "asked for flash_tiled, ran flash_tiled" in plain(stepper)


def test_dropout_is_off_while_it_compares_and_training_goes_on_afterwards():
    torch.manual_seed(0)
    model = GPTModel(from_preset("nano", vocab_size=TalesTokenizer().vocab_size, drop_rate=0.5)).train()
    assert run(model, TEXT, TalesTokenizer(), implementation="flash_tiled").from_eager < 1e-4
    assert all(module.training for module in model.modules())


def test_the_picture_is_a_png_that_changes_with_head_and_token_and_not_with_temperature(stepper):
    pictures = [stepper.picture.value]
    for name, value in (("head", 2), ("token", 1), ("layer", 1)):
        stepper.controls[name].value = value
        pictures.append(stepper.picture.value)
    assert len(set(pictures)) == 4
    stepper.controls["temperature"].value = 0.5
    assert stepper.picture.value == pictures[-1]
    image = matplotlib.image.imread(io.BytesIO(pictures[0]))
    assert min(image.shape[:2]) > 300
    assert pictures[-1] == attention_picture(stepper.run, 1, 2, 1)


def test_every_control_has_a_label(stepper):
    assert [control.description for control in stepper.controls.values()] == list(stepper.controls)


def test_markup_in_a_token_is_shown_as_text():
    class Wicked:
        def decode(self, ids):
            return "".join(["<b>bold</b>", "</pre>", "&lt;"][int(i)] for i in ids)

    torch.manual_seed(0)
    model = GPTModel(from_preset("nano", vocab_size=3)).eval()
    stepper = StepThrough(model, [0, 1, 2], Wicked())
    assert "<b>bold" not in stepper.shown.value
    assert stepper.shown.value.count("</pre>") == len(describe(stepper.run, 0, 0, 0, 1.0))
    assert "probability of &#x27;&amp;lt;&#x27;" in stepper.shown.value


def test_an_implementation_that_fails_is_reported_and_the_last_run_is_kept(stepper, model):
    kept = stepper.run
    model.blocks[1].attention.out_proj.weight.data = torch.zeros(3, 3)  # now no pass can succeed
    stepper.controls["implementation"].value = "eager"
    assert "RuntimeError" in stepper.shown.value
    assert stepper.run is kept


def test_where_no_widget_can_be_shown_there_is_the_text(stepper):
    bundle = stepper._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in bundle
    assert "probability of" in bundle["text/plain"]


def test_printed_it_says_what_it_is_what_it_shows_now_and_where_to_open_it(stepper):
    assert repr(stepper) == str(stepper)
    for part in (
        f"StepThrough of '{TEXT}', 7 tokens",
        "layer 0, head 0, token 6 ('Hugo')",
        "temperature 1.00",
        "sdpa",
    ):
        assert part in repr(stepper)
    for name, value in {"layer": 1, "head": 3, "token": 2, "temperature": 0.7, "implementation": "flash_tiled"}.items():
        stepper.controls[name].value = value
    kind = TalesTokenizer().decode([stepper.run.trace.ids[0, 2].item()])
    for part in ("layer 1, head 3", f"token 2 ({kind!r})", "temperature 0.70", "attention by flash_tiled"):
        assert part in repr(stepper)
    assert "open it in JupyterLab" in repr(stepper)
    assert stepper._repr_mimebundle_()["text/plain"].startswith(repr(stepper))


def test_a_long_text_is_cut(model):
    long = repr(StepThrough(model, TalesTokenizer().encode(TEXT) * 9, TalesTokenizer()))
    assert long.startswith(f"StepThrough of '{TEXT} ")
    assert "\N{HORIZONTAL ELLIPSIS}', 63 tokens. It shows" in long
    assert long.count("Hugo") == 2  # in the text, and the token


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            lambda model: (TEXT, model, TalesTokenizer()),
            "the model comes first, and is a GPTModel; got str: StepThrough",
        ),
        (lambda model: (TalesTokenizer(), TEXT, model), "the model comes first, .* got TalesTokenizer"),
        (lambda model: (GPTModel, TEXT, TalesTokenizer()), "got the class GPTModel"),
        (lambda model: (torch.nn.Linear(2, 2), TEXT), "the model comes first, .* got Linear"),
        (lambda model: (model, TalesTokenizer(), TEXT), "the text comes second: .* got TalesTokenizer: StepThrough"),
        (lambda model: (model, None, TalesTokenizer()), "the text comes second: .* got NoneType"),
        (lambda model: (model, model, TalesTokenizer()), "the text comes second: .* got GPTModel"),
        (lambda model: (model, TEXT, TalesTokenizer), r"make one, TalesTokenizer\(\)"),
        (lambda model: (model, TEXT, "gpt2"), "tokenizer has decode.* got str"),
    ],
)
def test_arguments_in_another_order_or_of_another_kind_are_told_in_words(arguments, message, model):
    with pytest.raises(TypeError, match=message):
        StepThrough(*arguments(model))


def test_a_vocabulary_that_is_not_the_models_is_told_in_words(model):
    with pytest.raises(ValueError, match="pass its tokenizer="):
        StepThrough(model, TEXT)


def test_without_ipywidgets_it_says_how_to_get_it(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    with pytest.raises(ImportError, match="pip install ipywidgets"):
        StepThrough(model, TEXT, TalesTokenizer())
