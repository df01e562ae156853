"""trace(): every intermediate tensor of a forward pass, by name; diff(): the first tensor where two models part ways.

    t = trace(model, "The cat sat")
    t["blocks.3.attention.queries"]                 (batch, n_heads, tokens, head_dim)
    print(t.table("blocks.0.*"))

    trace(model, ids, patch={"blocks.3.attention.context": zero_heads(2)}).logits       a head taken out
    trace(model, ids, patch={"blocks.2.output": other["blocks.2.output"]}).logits       a value from another pass

Values that go in or out of a module are seen by torch's hooks; those inside a function by its tap (`CMHA/tap.py`).
Both are there only during the trace: a model that is not traced runs as if this file did not exist.
"""

from collections.abc import Callable, Collection, Mapping
from contextlib import nullcontext
from numbers import Real

import torch
from torch import Tensor, nn

from GPT2Model.tokenizer import get_tokenizer
from GPT2Model.trace_diff import Difference, compare
from GPT2Model.trace_recorder import Patch, Recorder
from GPT2Model.trace_values import Trace, Value

__all__ = ["Difference", "Trace", "Value", "copy_tokens", "diff", "trace", "zero_heads"]


def trace(
    model: nn.Module,
    text_or_ids: str | Tensor | list[int],
    *,
    tokenizer=None,
    names: str | Collection[str] = "*",
    patch: Mapping[str, Patch] | None = None,
    recompute: bool = False,
    padding_mask: Tensor | None = None,
    gradients: bool = False,
) -> Trace:
    """Run the model once, as it stands, and keep every tensor on the way.

    Args:
        model: a GPTModel. In training mode its dropout is on, in the trace too.
        text_or_ids: a text, or ids: (B, T), (T,) or a list.
        tokenizer: for a text, and to show tokens as text; None: GPT-2's own, for a text and its vocabulary.
        names: what to keep, as a pattern or several: "blocks.0.*", ["*.weights", "logits"]. It bounds the memory.
        patch: {name or pattern: a function of the tensor that returns another, or the other itself}: the pass goes
            on with that.
        recompute: make scores and weights from the queries and keys, where the implementation never forms them.
        padding_mask: (B, T) bool, True = a real token.
        gradients: keep the graph: after `trace.logits.sum().backward()` each value has its `.grad`.
    Returns:
        a Trace. Its logits are bit for bit those of `model(ids)`, unless something was patched. (Of a compiled model:
        those of the model as it is written. A compiled one may differ in the last digits.)
    Raises:
        TypeError: arguments in another order, or of another kind.
        ValueError: a name or patch that fits no value of this pass, a patch of another shape, or what the model says.
    """
    model = getattr(model, "_orig_mod", model)  # of a compiled model the one inside
    asked = [names] if isinstance(names, str) else names
    check_arguments(model, tokenizer, asked, patch)
    ids, tokens = as_ids(model, text_or_ids, tokenizer)
    result = Trace(ids, tokens, dict(model.cfg), asked, model.training)
    recorder = Recorder(result, patch or {}, recompute, gradients)
    with as_written(model), torch.set_grad_enabled(gradients), recorder.watching(model):
        logits = model(ids, padding_mask)
    recorder.check_all_found()
    result.logits = logits if gradients else logits.detach()
    return result


def diff(
    model_a: nn.Module,
    model_b: nn.Module,
    ids: str | Tensor | list[int],
    *,
    tokenizer=None,
    names: str | Collection[str] = "*",
    tolerance: float | None = None,
    recompute: bool = False,
    padding_mask: Tensor | None = None,
) -> Difference:
    """Where two models first part ways on one input, and by how much.

    Args:
        model_a, model_b: two GPTModels. ids, tokenizer, recompute, padding_mask: as in `trace`.
        names: what to compare; a pattern or several.
        tolerance: the largest difference, relative to the largest value of the tensor, that passes as rounding; None:
            1e-5 in float32, 5e-2 in bfloat16 and float16, 1e-9 in float64.
    Returns:
        a Difference: `.first`, the name of the first tensor that differs by more than rounding, or None; `.amount`, the
        largest difference there; `.rows`, every tensor. `print` shows it.
    Raises:
        ValueError: what `trace` raises.
    """
    if tolerance is not None and (not isinstance(tolerance, Real) or not tolerance >= 0):
        raise ValueError(f"tolerance is a number, 0 or more, relative to the largest value; got {tolerance!r}.")
    how = {"tokenizer": tokenizer, "names": names, "recompute": recompute, "padding_mask": padding_mask}
    one, other = trace(model_a, ids, **how), trace(model_b, ids, **how)
    return compare(one, other, tolerance)


def zero_heads(*heads: int) -> Callable[[Tensor], Tensor]:
    """A patch that takes heads out: for `blocks.i.attention.context` and other values (B, n_heads, T, ...)."""

    if not all(isinstance(head, int) for head in heads):
        raise TypeError(f"zero_heads takes numbers of heads, zero_heads(0, 2), got {heads}.")

    def patch(tensor: Tensor) -> Tensor:
        if tensor.ndim != 4 or not all(0 <= head < tensor.shape[1] for head in heads):
            raise ValueError(
                f"zero_heads{heads} needs a value (batch, n_heads, tokens, head_dim) with these heads, got "
                f"{tuple(tensor.shape)}: patch blocks.i.attention.context."
            )
        return tensor.index_fill(1, torch.tensor(heads, dtype=torch.long, device=tensor.device), 0.0)

    return patch


def copy_tokens(source: Tensor, *positions: int) -> Callable[[Tensor], Tensor]:
    """A patch that takes some positions from another pass: for values (B, T, width) such as the stream."""

    if not isinstance(source, Tensor) or source.ndim != 3 or not all(isinstance(at, int) for at in positions):
        raise TypeError("copy_tokens takes a value (batch, tokens, width) of another pass and whole positions.")

    def patch(tensor: Tensor) -> Tensor:
        if tensor.ndim != 3 or source.shape[2] != tensor.shape[2] or source.shape[0] not in (1, tensor.shape[0]):
            raise ValueError(
                f"copy_tokens cannot put {tuple(source.shape)} into {tuple(tensor.shape)}: both are (batch, tokens, "
                "width), and only the tokens may differ."
            )
        length = min(tensor.shape[1], source.shape[1])
        if not all(-length <= position < length for position in positions):
            raise ValueError(f"copy_tokens got positions {positions}; both passes have those from 0 to {length - 1}.")
        tensor = tensor.clone()
        tensor[:, list(positions)] = source[:, list(positions)].to(tensor.dtype)
        return tensor

    return patch


def as_written(model: nn.Module):
    """For the time of a `with`, modules that were compiled run uncompiled: compiled code would not call the hooks."""
    if all(module._compiled_call_impl is None for module in model.modules()):
        return nullcontext()
    return torch.compiler.set_stance("force_eager")


def check_arguments(model, tokenizer, names, patch) -> None:
    """Raise for what a first try gets wrong, before torch stumbles over it."""
    if not isinstance(model, nn.Module) or not hasattr(model, "cfg") or not hasattr(model, "blocks"):
        raise TypeError(f"the model comes first, and is a GPTModel; got {type(model).__name__}: trace(model, text).")
    if isinstance(tokenizer, type):
        raise TypeError(f"tokenizer is the class {tokenizer.__name__}: make one, {tokenizer.__name__}().")
    if patch is not None and not isinstance(patch, Mapping):
        got = type(patch).__name__
        raise TypeError(f'patch is a dict, {{"blocks.0.attention.context": zero_heads(2)}}, got {got}.')
    names = list(names) if isinstance(names, Collection) else [names]
    wrong = [name for name in [*names, *(patch or {})] if not isinstance(name, str)]
    if wrong or not names:
        raise TypeError(f'names are texts, one at least: names="*.weights"; got {wrong[0] if wrong else names!r}.')


def as_ids(model: nn.Module, text_or_ids, tokenizer) -> tuple[Tensor, list[list[str]]]:
    """ids (B, T) on the model's device, and each token's text."""
    if isinstance(text_or_ids, str):
        vocab_size = model.cfg["vocab_size"]
        if tokenizer is None and vocab_size != 50257:
            raise ValueError(
                f"the model's vocabulary has {vocab_size} tokens, not GPT-2's 50257: pass its tokenizer=, or ids."
            )
        tokenizer = tokenizer or get_tokenizer()
        text_or_ids = tokenizer.encode(text_or_ids)
        if not text_or_ids:
            raise ValueError("the text has no tokens: give it one at least.")
    try:
        ids = torch.as_tensor(text_or_ids, device=next(model.parameters()).device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"trace() takes a text or token ids (B, T), got {type(text_or_ids).__name__}.") from error
    ids = ids[None] if ids.ndim == 1 else ids
    if ids.ndim != 2 or ids.numel() == 0:
        raise ValueError(f"trace() takes ids (B, T) with one token at least, got {tuple(ids.shape)}.")
    name = (lambda i: tokenizer.decode([i])) if tokenizer is not None else str
    return ids, [[name(i) for i in row] for row in ids.tolist()]
