"""StepThrough(model, text): sliders for layer, head, token and temperature, a toggle for attention, what they show.

What is shown is worked out by plain functions (`run`, `describe`, `attention_picture`), which need no browser; the
class below them only connects sliders to them. It reads the same data as the HTML page: `trace_format.py`.
"""

import html
import io
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.patches import Rectangle
from torch import nn

from GPT2Model.tracing import Trace, trace
from orchestrator.views.checks import check_tokenizer, is_model, kind_of
from orchestrator.views.figures import ORANGE
from orchestrator.views.trace_figures import attention_head
from orchestrator.views.trace_format import TEMPERATURES, looked_at, next_tokens, tensors_of_layer, trace_data

SHOWN = 5  # of what is looked at, and of the next tokens


@dataclass(frozen=True)
class Run:
    """One pass under one choice of attention.

    Attributes:
        trace, data: what it left, as tensors and as plain data.
        requested, why: what was asked for, and why what ran was chosen.
        from_eager: the largest difference of its logits to those of eager attention.
    """

    trace: Trace
    data: dict
    requested: str
    why: str
    from_eager: float


def usable_implementations(model) -> list[str]:
    """`auto`, and every implementation that can serve this model here, without gradients."""
    with torch.no_grad(), in_eval(model):
        usable = model.attention_report()["usable"]
    return ["auto", *(name for name, reasons in usable.items() if not reasons)]


def run(model, text, tokenizer=None, *, implementation: str = "auto", use_flash: bool = True) -> Run:
    """Trace one pass under a choice of attention, and compare it with eager. The model comes back as it was.

    Args:
        model, text, tokenizer: as in `trace`: a text, or the ids of one.
        implementation, use_flash: as `attn_implementation` and `use_flash` in the cfg.
    """
    with torch.no_grad(), in_eval(model):
        with model.using_attention({"use_flash": use_flash, "attn_implementation": implementation}):
            passed = trace(model, text, tokenizer=tokenizer, recompute=True)
            choice = model.blocks[0].attention.choice(passed.ids.shape[1])
        with model.using_attention("eager"):
            eager = model(passed.ids)
        data = trace_data(passed, model, tokenizer)
    from_eager = (passed.logits.float() - eager.float()).abs().max().item()
    return Run(passed, data, choice.requested, choice.explain(), from_eager)


@contextmanager
def in_eval(model):
    """For the time of a `with`, no dropout: two passes that are compared must not roll different dice."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def describe(run: Run, layer: int, head: int, token: int, temperature: float) -> list[tuple[str, str]]:
    """(heading, lines) of all that is shown beside the picture."""
    data = run.data
    return [
        ("Attention", attention_lines(data, layer, head, token)),
        ("Next token", next_token_lines(data, token, temperature)),
        ("Which implementation ran", implementation_lines(run)),
        (f"Tensors of blocks.{layer}", tensor_lines(data, layer)),
    ]


def attention_lines(data: dict, layer: int, head: int, token: int) -> str:
    tokens = data["tokens"]
    lines = [f"layer {layer}, head {head}: token {token}, {tokens[token]!r}, attends to"]
    seen = looked_at(data, layer, head, token, min(SHOWN, token + 1))
    return "\n".join(lines + [f"  {weight:.4f}  {tokens[position]!r} (token {position})" for position, weight in seen])


def next_token_lines(data: dict, token: int, temperature: float) -> str:
    likeliest = next_tokens(data, token, temperature, SHOWN)
    lines = [f"after token {token}, {data['tokens'][token]!r}:"]
    lines += [
        f"probability of {other.text!r}: {other.probability:.4f} at temperature {temperature:.2f}"
        for other in likeliest
    ]
    others = data["next"]["vocab_size"] - len(likeliest)
    if others:
        rest = max(0.0, 1 - sum(other.probability for other in likeliest))
        lines.append(f"all {others:,} others together: {rest:.4f}")
    return "\n".join(lines)


def implementation_lines(run: Run) -> str:
    ran = run.data["implementation"]
    weights = (
        f"{ran} never forms the weights:\nthose shown were computed again from its queries and keys"
        if run.data["recomputed"]
        else f"the weights shown are those that {ran} used"
    )
    return (
        f"asked for {run.requested}, ran {ran} ({run.why})\n{weights}\n"
        f"largest difference of a logit to eager: {run.from_eager:.1e}"
    )


def tensor_lines(data: dict, layer: int) -> str:
    start = f"blocks.{layer}."
    rows = [
        (
            tensor["name"].removeprefix(start),
            ", ".join(f"{axis} {size}" for axis, size in zip(tensor["axes"], tensor["shape"], strict=True)),
        )
        for tensor in tensors_of_layer(data, layer)
    ]
    width = max((len(name) for name, _ in rows), default=0)
    return "\n".join(f"{name:<{width}}  ({shape})" for name, shape in rows)


def attention_picture(run: Run, layer: int, head: int, token: int) -> bytes:
    """PNG of one head's attention map, with a frame around the row of `token`."""
    figure = attention_head(run.trace, layer, head)
    width = len(run.data["tokens"])
    frame = Rectangle((-0.5, token - 0.5), width, 1, fill=False, edgecolor=ORANGE, linewidth=2, clip_on=False, zorder=5)
    figure.axes[0].add_patch(frame)
    FigureCanvasAgg(figure)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=90, bbox_inches="tight")
    return file.getvalue()


class StepThrough:
    """Controls for a notebook: step through one text, layer by layer, head by head, token by token.

    Changing the implementation or `use_flash` runs the model again and says how far the logits moved.

    Args:
        model: a GPTModel; it is left as it is.
        text: a text, or the ids of one.
        tokenizer: None: GPT-2's own.
    Attributes:
        controls: the widgets by name: layer, head, token, temperature, implementation, use_flash.
        run: the `Run` that is shown.
    Raises:
        ImportError: ipywidgets is missing. TypeError: arguments in another order, or of another kind.
        ValueError: what `trace` and `trace_data` raise.
    """

    def __init__(self, model, text, tokenizer=None):
        check_arguments(model, text, tokenizer)
        widgets = import_widgets()
        self.model, self.text, self.tokenizer = model, text, tokenizer
        self.run = run(model, text, tokenizer)
        layers, heads, tokens = (self.run.data["attention"][key] for key in ("layers", "heads", "tokens"))
        wide = {"style": {"description_width": "8em"}, "layout": widgets.Layout(width="26em", max_width="98%")}
        steps = {"min": 0, "continuous_update": False, **wide}  # a picture for each value that is passed would lag
        words = [(f"{i} {word!r}", i) for i, word in enumerate(self.run.data["tokens"])]
        self.controls = {
            "layer": widgets.IntSlider(description="layer", value=0, max=layers - 1, **steps),
            "head": widgets.IntSlider(description="head", value=0, max=heads - 1, **steps),
            "token": widgets.SelectionSlider(
                description="token", options=words, value=tokens - 1, continuous_update=False, **wide
            ),
            "temperature": widgets.FloatSlider(
                description="temperature", value=1.0, min=TEMPERATURES[0], max=TEMPERATURES[-1], step=0.05, **wide
            ),
            "implementation": widgets.Dropdown(
                description="implementation", options=usable_implementations(model), value="auto", **wide
            ),
            "use_flash": widgets.Checkbox(description="use_flash", value=True, indent=True, **wide),
        }
        self.picture = widgets.Image(format="png", layout=widgets.Layout(max_width="100%", object_fit="contain"))
        self.shown = widgets.HTML(layout=widgets.Layout(flex="1 1 26em", min_width="0", max_width="100%"))
        left = widgets.VBox([*self.controls.values(), self.picture], layout=widgets.Layout(flex="0 1 30em"))
        self.box = widgets.HBox(
            [left, self.shown], layout=widgets.Layout(flex_flow="row wrap", align_items="flex-start", width="100%")
        )
        for name, control in self.controls.items():
            again = name in ("implementation", "use_flash")
            control.observe(self.run_again if again else self.show, names="value")
        self.show()

    def values(self) -> dict:
        """What the controls stand at: layer, head, token, temperature."""
        chosen = {name: self.controls[name].value for name in ("layer", "head", "token", "temperature")}
        return chosen | {"temperature": round(20 * chosen["temperature"]) / 20}  # a slider's 0.7 may be 0.7000000001

    def run_again(self, change=None) -> None:
        """Run the model under the implementation that is chosen now."""
        asked = {name: self.controls[name].value for name in ("implementation", "use_flash")}
        self.shown.value = f"<p>running {html.escape(asked['implementation'])} &hellip;</p>"
        try:
            self.run = run(self.model, self.text, self.tokenizer, **asked)
        except Exception as error:  # else it would vanish: a browser shows nothing of what a callback raises
            self.shown.value = f"<pre>{html.escape(f'{type(error).__name__}: {error}')}</pre>"
            return
        self.show()

    def show(self, change=None) -> None:
        """Show what the controls stand at. The picture is drawn anew only if it changes."""
        values = self.values()
        if getattr(change, "owner", None) is not self.controls["temperature"]:
            self.picture.value = attention_picture(self.run, values["layer"], values["head"], values["token"])
        style = "white-space: pre-wrap; word-break: normal; margin: 0 0 .8em; line-height: 1.35; font-size: .92em"
        self.shown.value = "".join(
            f'<b>{html.escape(heading)}</b><pre style="{style}">{html.escape(lines)}</pre>'
            for heading, lines in describe(self.run, **values)
        )

    def __repr__(self) -> str:
        values, data = self.values(), self.run.data
        text = data["text"] if len(data["text"]) <= 40 else data["text"][:39] + "\N{HORIZONTAL ELLIPSIS}"
        return (
            f"StepThrough of {text!r}, {len(data['tokens'])} tokens. It shows layer {values['layer']}, head "
            f"{values['head']}, token {values['token']} ({data['tokens'][values['token']]!r}), temperature "
            f"{values['temperature']:.2f}, attention by {data['implementation']}. Its sliders need a notebook: open it "
            "in JupyterLab (python -m jupyterlab), VS Code or Colab, as the last line of a cell."
        )

    def _repr_mimebundle_(self, **kwargs):
        described = [f"{heading}\n{lines}" for heading, lines in describe(self.run, **self.values())]
        text = "\n\n".join([repr(self), *described])
        return self.box._repr_mimebundle_(**kwargs) | {"text/plain": text}  # the text is for where no widget can be


def check_arguments(model, text, tokenizer) -> None:
    """Raise TypeError for what a first try gets wrong, in words."""
    order = "StepThrough(model, text, tokenizer)"
    if not is_model(model):
        raise TypeError(f"the model comes first, and is a GPTModel; got {kind_of(model)}: {order}.")
    if text is None or isinstance(text, type | nn.Module) or (hasattr(text, "encode") and not isinstance(text, str)):
        raise TypeError(f"the text comes second: a str, or the ids of one; got {kind_of(text)}: {order}.")
    check_tokenizer(tokenizer, encode=isinstance(text, str))


def import_widgets():
    """ipywidgets, or an error that says how to get it."""
    try:
        import ipywidgets
    except ImportError as error:
        raise ImportError("StepThrough needs ipywidgets: pip install ipywidgets, and restart the kernel.") from error
    return ipywidgets
