"""Recorder: hears every module and every tap of one forward pass, for `GPT2Model/tracing.py`."""

import difflib
import re
from collections.abc import Callable, Mapping
from contextlib import ExitStack, contextmanager

from torch import Tensor, nn

from CMHA.choosing.choose import decide
from CMHA.cmha import MultiHeadAttention
from CMHA.implementations import eager
from CMHA.request import AttentionRequest
from CMHA.tap import listening
from GPT2Model.trace_values import WEIGHTS, Trace, Value, fits, meaning_of

Patch = Tensor | Callable[[Tensor], Tensor]

# The end of a module's path -> the name of what it gives; None: what the module around it gives. Others: their path.
OUTPUTS = {
    r"dropout": "embeddings",
    r"head": "logits",
    r"(blocks\.\d+)": r"\1.output",
    r"(blocks\.\d+\.attention)": r"\1.output",
    r"(blocks\.\d+\.attention)\.W_qkv": r"\1.qkv",
    r"(blocks\.\d+\.attention)\.out_proj": None,
    r"(blocks\.\d+\.feed_forward)": r"\1.output",
    r"(blocks\.\d+\.feed_forward)\.gate_proj": r"\1.gate",
    r"(blocks\.\d+\.feed_forward)\.up_proj": r"\1.hidden",
    r"(blocks\.\d+\.feed_forward)\.gelu": r"\1.activated",
    r"(blocks\.\d+\.feed_forward)\.down_proj": None,
}


class Recorder:
    """Hears every module and every tap of one forward pass: patches what is to be patched, keeps what was asked for.

    Args:
        result: the Trace to fill; `result.asked` says what is kept.
        patch, recompute, gradients: as in `trace`.
    """

    def __init__(self, result: Trace, patch: Mapping[str, Patch], recompute: bool, gradients: bool):
        self.result, self.patch, self.recompute, self.gradients = result, patch, recompute, gradients
        self.path: list[str] = []  # the modules that are running, outermost first
        self.inputs: dict[str, object] = {}  # of the attention layer that is running: queries, keys, values, mask
        self.seen: list[str] = []
        self.patched: set[str] = set()
        self.recomputing = False

    @contextmanager
    def watching(self, model: nn.Module):
        """For the time of a `with`, hooks on every module, and the listener of the taps."""
        with ExitStack() as stack:
            for path, module in model.named_modules():
                if path:
                    before = module.register_forward_pre_hook(self.entering(path), with_kwargs=True, prepend=True)
                    stack.callback(before.remove)
                    stack.callback(module.register_forward_hook(self.leaving(path)).remove)
            stack.enter_context(listening(self.tapped))
            yield

    def entering(self, path: str):
        def hook(module, arguments, named):
            self.path.append(path)
            if isinstance(module, MultiHeadAttention):
                self.inputs = {"mask": named.get("mask"), "scale": module.head_dim**-0.5, "layer": module}
            if path.endswith("attention.out_proj"):
                return (self.value(path.replace("out_proj", "merged"), arguments[0]),), named
            # A product of SwiGLU is no module's output, but what the last projection reads.
            if path.endswith("feed_forward.down_proj") and self.result.cfg.get("mlp") == "swiglu":
                return (self.value(path.replace("down_proj", "activated"), arguments[0]),), named
            return None

        return hook

    def leaving(self, path: str):
        def hook(module, arguments, output):
            self.path.pop()
            name = self.name_of_output(path, module)
            return None if name is None or not isinstance(output, Tensor) else self.value(name, output)

        return hook

    def name_of_output(self, path: str, module: nn.Module) -> str | None:
        if re.fullmatch(r"blocks\.\d+\.dropout", path):  # one module, called twice; without dropout it gives its input
            if not module.training or module.p == 0:
                return None
            part = "attention" if f"{self.path[-1]}.attention.dropped" not in self.seen else "feed_forward"
            return f"{self.path[-1]}.{part}.dropped"
        for pattern, name in OUTPUTS.items():
            found = re.fullmatch(pattern, path)
            if found:
                return name and found.expand(name)
        return path

    def tapped(self, name: str, tensor: Tensor, **where: slice) -> Tensor:
        if where:
            spans = ",".join(f"{part.start}:{part.stop}" for part in where.values())
            name = f"tile[{spans}].{name}"
        full = ".".join([*self.path[-1:], name])
        if name == "context" and self.recompute and self.table_is_missing(self.path[-1]):
            self.recompute_weights()
        tensor = self.value(full, tensor)
        if name in ("queries", "keys", "values"):
            self.inputs[name] = tensor
        if name == "values":
            self.result.implementations[self.path[-1]] = self.chosen()
        return tensor

    def chosen(self) -> str:
        """What computes attention in the layer that is running: the answer to its own question, asked once more."""
        layer, queries = self.inputs["layer"], self.inputs["queries"]
        dropout = layer.dropout if layer.training else 0.0
        request = AttentionRequest.describe(queries, self.inputs["keys"], self.inputs["mask"], dropout=dropout)
        return decide(layer.settings, request).chosen

    def table_is_missing(self, layer: str) -> bool:
        """Whether the weights of this layer were asked for, and the pass did not form them."""
        names = [f"{layer}.{name}" for name in WEIGHTS]
        wanted = any(fits(name, pattern) for name in names for pattern in self.result.asked)
        return wanted and names[-1] not in self.seen

    def recompute_weights(self) -> None:
        """Attention once more, by its definition, from what this layer had: eager's own taps show its table."""
        self.recomputing = True
        what = (self.inputs[name] for name in ("queries", "keys", "values", "mask"))
        eager.attention(*what, scale=self.inputs["scale"])
        self.recomputing = False

    def value(self, name: str, tensor: Tensor) -> Tensor:
        """What the pass goes on with: the tensor itself, or its patch."""
        if self.recomputing:  # beside the pass: a patch would change nothing
            self.keep(name, tensor, recomputed=True)
            return tensor
        self.seen.append(name)
        patched = False
        for pattern, patch in self.patch.items():
            if fits(name, pattern):
                tensor, patched = apply(patch, name, tensor), True
                self.patched.add(pattern)
        self.keep(name, tensor, patched=patched)
        return tensor

    def keep(self, name: str, tensor: Tensor, **flags: bool) -> None:
        if not any(fits(name, pattern) for pattern in self.result.asked):
            return
        if self.gradients and tensor.requires_grad:
            tensor.retain_grad()
        kept = tensor if self.gradients else tensor.detach()
        self.result.values[name] = Value(name, kept, *meaning_of(name, tensor, self.result.cfg), **flags)

    def check_all_found(self) -> None:
        """Raise for a pattern that fits nothing: nobody would know that a misspelt name changed nothing."""
        known = {*self.seen, *self.result.values}
        lost = [("patch", pattern) for pattern in self.patch if pattern not in self.patched]
        lost += [("names", name) for name in self.result.asked if not any(fits(one, name) for one in known)]
        if lost:
            lines = [f"  - {of}: {name!r} fits no value of this pass. {self.why(of, name, known)}" for of, name in lost]
            raise ValueError("trace() cannot do what was asked:\n" + "\n".join(lines))

    def why(self, what: str, pattern: str, known: set[str]) -> str:
        fused = self.result.without_weights(pattern)
        if fused and what == "patch":
            return f'Attention ran by {fused}, which never forms it: trace under eager, model.using_attention("eager").'
        if fused:
            return f"Attention ran by {fused}, which never forms it: recompute=True makes it beside the pass."
        return "Near: " + ", ".join(difflib.get_close_matches(pattern, sorted(known), n=3, cutoff=0.0)) + "."


def apply(patch: Patch, name: str, tensor: Tensor) -> Tensor:
    """The tensor that a patch puts in the place of another, checked."""
    new = patch(tensor.clone()) if callable(patch) else patch  # a clone: a function may write into what it gets
    if not isinstance(new, Tensor):
        raise ValueError(f"the patch of {name} gave {type(new).__name__}: it must be a tensor, or return one.")
    try:
        return new.to(tensor).expand_as(tensor)
    except RuntimeError:
        raise ValueError(
            f"the patch of {name} has shape {tuple(new.shape)}, the value it replaces {tuple(tensor.shape)}."
        ) from None
