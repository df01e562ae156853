"""What is wrong with the form of a result, whatever its numbers: no tensor, wrong shape, wrong dtype."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from orchestrator.learning.checks.exercise import Exercise, Mistake
from orchestrator.learning.checks.outcome import Outcome

# Mistakes that any function may have. None has a formula: each is found by looking.
GENERAL = (
    Mistake("signature", "it cannot be called as the exercise wants it. Keep the arguments and their names."),
    Mistake("nothing_returned", "it returns None: is `return` missing?"),
    Mistake("not_a_tensor", "it returns something else than wanted."),
    Mistake("number_of_results", "it returns another number of things than wanted."),
    Mistake("axes_exchanged", "the numbers of the shape are right, their order is not: two axes are exchanged."),
    Mistake("wrong_shape", "the shape is wrong."),
    Mistake("wrong_dtype",
            "the dtype is wrong. Real numbers have that of the arguments: torch.zeros and torch.tensor make float32 "
            "unless told otherwise."),
    Mistake("not_bool",
            "a mask is torch.bool here, True = may attend. torch.ones(...).tril(...) is 1.0 and 0.0: .bool() makes "
            "True and False of them. (0 and -inf, to be added to scores, is another kind of mask: mask == 0.)"),
    Mistake("random", "two calls with the same arguments give different results: something is drawn by chance."),
    Mistake("inputs_overwritten",
            "it writes into its arguments: whoever called it still needs them. Avoid `x += ...` and functions that "
            "end in _, or work on a copy."),
    Mistake("precision_lost",
            "right in float32, but arguments in float64 give only float32's seven digits: somewhere the numbers pass "
            "through float32, or a constant has no more digits. Layers of your own are made in float32: "
            "layer.to(x.dtype), before the weights are loaded."),
    Mistake("rounding",
            "the formula is right, and the last digits are lost to rounding. Subtract before you square or take exp "
            "(x - mean, score - maximum), and go through no smaller dtype than the arguments'."),
    Mistake("dtype_fixed",
            "right in float32; with arguments in float64 it raises an error. Layers of your own are made in float32: "
            "give them the dtype of the arguments, layer.to(x.dtype), before the weights are loaded."),
    Mistake("not_finite", "there are NaN or infinities where there should be numbers."),
)  # fmt: skip


def fault_of_form(exercise: Exercise, outcome: Outcome) -> tuple[str, str] | None:
    """(name of the mistake, a line of detail), or None if the form is as it should be."""
    returned, case = outcome.returned, outcome.case
    wanted = f"wanted: {' and '.join(exercise.returns)}; in the case {case.label}"
    if outcome.symptom:
        return None
    if returned is None:
        return "nothing_returned", wanted
    several = len(outcome.exact) > 1
    if several and not isinstance(returned, tuple | list):
        return "number_of_results", f"got one {kind(returned)}; {wanted}"
    if several and len(returned) != len(exercise.returns):
        return "number_of_results", f"got {len(returned)}; {wanted}"
    if not several and not isinstance(returned, Tensor):
        return "not_a_tensor", f"got {kind(returned)}; {wanted}"
    if len(outcome.found) != len(outcome.exact):
        return "number_of_results", f"got {len(outcome.found)} tensors, wanted {len(outcome.exact)}; {wanted}"
    for found, exact, dtype in zip(outcome.found, outcome.exact, outcome.dtypes, strict=True):
        if found.shape != exact.shape:
            name = "axes_exchanged" if sorted(found.shape) == sorted(exact.shape) else "wrong_shape"
            return name, f"got {tuple(found.shape)} where {tuple(exact.shape)} is right; {wanted}"
        if found.dtype != dtype:
            if dtype == torch.bool:
                return "not_bool", f"got {short(found.dtype)}; {wanted}"
            return "wrong_dtype", f"got {short(found.dtype)} where {short(dtype)} is right; {wanted}"
    return None


def kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"tensor {tuple(value.shape)}"
    size = f" of {len(value)}" if isinstance(value, list | tuple) else ""
    return f"{type(value).__name__}{size}"


def shapes(arguments: Mapping[str, Any]) -> str:
    """The arguments in short: x (2, 5, 16), num_heads 4."""
    return ", ".join(f"{name} {shape_of(value)}" for name, value in arguments.items())


def shape_of(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{tuple(value.shape)}" + ("" if value.dtype == torch.float32 else f" {short(value.dtype)}")
    if isinstance(value, Mapping):
        return f"(a dict of {len(value)})"
    if isinstance(value, list):
        return f"(a list of {len(value)})"
    return str(value)


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
