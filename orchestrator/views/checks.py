"""What the views ask of their arguments, before torch or matplotlib stumbles over them: errors that say what to do."""

import torch
from torch import Tensor, nn

from GPT2Model.trace_diff import ROUNDING
from GPT2Model.trace_values import Trace

SIZES = ("vocab_size", "emb_dim", "n_layers", "n_heads", "norm", "mlp", "positions")


def kind_of(thing) -> str:
    """What somebody passed, in words."""
    return f"the class {thing.__name__}" if isinstance(thing, type) else type(thing).__name__


def is_model(thing) -> bool:
    """Whether it can be used as a GPTModel: a compiled one can too."""
    return isinstance(thing, nn.Module) and all(
        hasattr(thing, name) for name in ("cfg", "blocks", "final_norm", "head")
    )


def check_trace(trace) -> None:
    """Raise TypeError for what is no Trace."""
    if not isinstance(trace, Trace):
        raise TypeError(
            f"the trace comes first: what trace(model, text, recompute=True) returns; got {kind_of(trace)}."
        )


def check_tokenizer(tokenizer, *, encode: bool = False) -> None:
    """Raise TypeError for what cannot turn ids into text, and text into ids where that is needed."""
    if isinstance(tokenizer, type):
        raise TypeError(f"tokenizer is the class {tokenizer.__name__}: make one, {tokenizer.__name__}().")
    needed = ["decode", *["encode"] * encode]
    lacking = [name for name in needed if tokenizer is not None and not callable(getattr(tokenizer, name, None))]
    if lacking or isinstance(tokenizer, bytes):
        raise TypeError(f"tokenizer has decode(ids) and encode(text), as the model's own; got {kind_of(tokenizer)}.")


def check_model(model, trace: Trace) -> None:
    """Raise unless it is the model of the trace: its logits must come out of the trace's own stream.

    Why: another model's norm and head can read the stream too, where the sizes fit, and what they say is nonsense.

    Raises:
        TypeError: no GPTModel. ValueError: one of other sizes, or with other weights.
    """
    if not is_model(model):
        raise TypeError(f"model is the GPTModel that was traced; got {kind_of(model)}.")
    sizes = ((name, trace.cfg.get(name), model.cfg.get(name)) for name in SIZES)
    theirs = {name: (traced, here) for name, traced, here in sizes if traced != here}
    if theirs:
        sizes = ", ".join(f"{name} {traced} (this model: {here})" for name, (traced, here) in theirs.items())
        raise ValueError(f"the trace is of another model, with {sizes}: pass the model that was traced, or none.")
    logits = logits_again(model, trace)
    if logits is None:
        return
    limit = max(ROUNDING[logits.dtype], ROUNDING[trace.logits.dtype])
    traced = trace.logits.detach().cpu().double()
    apart, largest = (logits.cpu().double() - traced).abs().max().item(), traced.abs().max().item()
    if not apart <= limit * largest:  # NaN too
        raise ValueError(
            f"this model does not give the trace's logits: its final norm and head, on the trace's own stream, are off "
            f"by up to {apart:.2g}, where the largest logit is {largest:.2g}. It has other weights: another model, one "
            "that was trained since, or a mistake was planted then and is not now. Pass the model that was traced, as "
            "it was, or none: then the page has no logit lens."
        )


@torch.no_grad()
def logits_again(model, trace: Trace) -> Tensor | None:
    """Norm and head on the last of the stream that the trace has; None where it has none, or where logits were patched.

    A patch of the norm replaces it: then the head alone is asked.
    """
    model = getattr(model, "_orig_mod", model)  # of a compiled model the one inside
    stream, normed = (trace.values.get(name) for name in (f"blocks.{trace.cfg['n_layers'] - 1}.output", "final_norm"))
    if "logits" in trace.values and trace.values["logits"].patched:
        return None
    if normed is not None and (normed.patched or stream is None):
        return model.head(normed.tensor.to(model.head.weight))
    return None if stream is None else model.head(model.final_norm(stream.tensor.to(model.head.weight)))
