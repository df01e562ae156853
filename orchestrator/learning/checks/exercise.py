"""What an exercise is made of: cases, a formula, and the formula's known mistakes as switches.

    formula(**case.arguments)                    what is right, in the dtype of the arguments
    formula(**case.arguments, scale="none")      what somebody gets who forgot the scale

So a wrong answer can be compared with what each mistake would give, and the mistake named. A switch inside a formula
is bad style elsewhere; here the switches are the point. The formulas share no line with the packages or with the
solutions, and `tests/exercises/test_formulas.py` holds them against both, and against Hugging Face's GPT-2.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """One call of the learner's function.

    Attributes:
        label: what is special about it, in a few words.
        arguments: by name, as the adapter has them.
    """

    label: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True)
class Mistake:
    """One mistake that is known, and the hint for it.

    Attributes:
        name: in snake case, one in an exercise.
        says: the hint: what was probably done, and why it is wrong.
        changes: switches of the formula that make the mistake; several, if there are several ways to make it. Empty: it
            is found another way, by a `Symptom` or by what looks at the function afterwards.
    """

    name: str
    says: str
    changes: tuple[Mapping[str, Any], ...] = ()


class Symptom(Exception):  # noqa: N818 - not an error of the program: a finding about the learner's function
    """Raised while a function is observed: it shows the mistake of this name. `detail` is a line for the learner."""

    def __init__(self, mistake: str, detail: str = ""):
        super().__init__(mistake)
        self.mistake, self.detail = mistake, detail


def call(function: Callable, arguments: Mapping[str, Any]) -> Any:
    return function(**arguments)


def depth_one(arguments: Mapping[str, Any]) -> int:
    return 1


@dataclass(frozen=True)
class Exercise:
    """One function of `exercises/adapters.py`.

    Attributes:
        name: of the function. group: a name for several. points: for the table in `exercises/README.md`.
        formula: what is right, with a keyword for every mistake that it can make.
        cases: made anew at each call, so that nobody's changes to them stay.
        returns: what comes back, with axes: one text for each thing.
        mistakes: the known ones.
        look: where to read on.
        depth: how many layers' rounding the bound on error allows for, of a case's arguments.
        observe: calls a function and gives what is compared; the default calls it once.
        expect: what is compared with it, of the formula; the default calls it once. For a function that draws lots.
        bound: a fixed bound on the error, where rounding is not what limits it; None: from the formula's own rounding.
        also_given: arguments that `observe` adds to a case's.
        afterwards: looks at a function whose results are all right; the name of a mistake, or None.
    """

    name: str
    group: str
    points: int
    formula: Callable
    cases: Callable[[], list[Case]]
    returns: tuple[str, ...]
    mistakes: tuple[Mistake, ...]
    look: str
    depth: Callable[[Mapping[str, Any]], int] = depth_one
    observe: Callable[[Callable, Mapping[str, Any]], Any] = call
    expect: Callable[[Callable, Mapping[str, Any]], Any] = call
    bound: float | None = None
    also_given: tuple[str, ...] = ()
    afterwards: Callable[[Callable], str | None] = field(default=lambda function: None)

    def mistake(self, name: str) -> Mistake:
        return next(mistake for mistake in self.mistakes if mistake.name == name)


class Numbers:
    """Normal numbers from a seed of their own: a check neither reads nor moves torch's global state."""

    def __init__(self, seed: int, dtype: torch.dtype = torch.float32):
        self.generator, self.dtype = torch.Generator().manual_seed(seed), dtype

    def __call__(self, *shape: int, scale: float = 1.0, mean: float = 0.0) -> Tensor:
        numbers = torch.randn(shape, generator=self.generator, dtype=torch.float64)
        return (numbers * scale + mean).to(self.dtype)

    def ids(self, vocab_size: int, *shape: int) -> Tensor:
        return torch.randint(vocab_size, shape, generator=self.generator)


def as_dtype(arguments: Any, dtype: torch.dtype) -> Any:
    """A copy of the arguments with every tensor of real numbers in another dtype; dicts, lists and tuples too."""
    if isinstance(arguments, Tensor):
        return arguments.to(dtype) if arguments.is_floating_point() else arguments.clone()
    if isinstance(arguments, Mapping):
        return {name: as_dtype(value, dtype) for name, value in arguments.items()}
    if isinstance(arguments, list | tuple):
        return type(arguments)(as_dtype(value, dtype) for value in arguments)
    return arguments


def real_dtype(arguments: Any) -> torch.dtype | None:
    """The dtype of the first tensor of real numbers in the arguments."""
    return next((tensor.dtype for tensor in tensors_in(arguments) if tensor.is_floating_point()), None)


def tensors_in(arguments: Any) -> list[Tensor]:
    """Every tensor in nested dicts, lists and tuples, in order."""
    if isinstance(arguments, Tensor):
        return [arguments]
    if isinstance(arguments, Mapping):
        arguments = list(arguments.values())
    if isinstance(arguments, list | tuple):
        return [tensor for value in arguments for tensor in tensors_in(value)]
    return []
