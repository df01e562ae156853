"""One call of a learner's function: what came back, how far it is from float64, and how far it may be.

    max|out - exact| <= 2 * max|plain - exact| + 4 * eps * depth * max(1, max|exact|)

`exact` is the formula in float64, `plain` the same formula in the dtype of the arguments, and `depth` allows for the
rounding of layers that follow each other. It is the bound of `python -m orchestrator parity`, taken layer by layer.
(For arguments in float64 the formula's own rounding is estimated from its float32 one.)
"""

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from orchestrator.learning.checks.exercise import Case, Exercise, Symptom, as_dtype, real_dtype, tensors_in


@dataclass
class Outcome:
    """What one case gave.

    Attributes:
        case: the case.
        exact: what is right, in float64; a list, also of one. dtypes: what they should be.
        returned: what the function gave, as it is; None also if it raised an error.
        found: its tensors.
        raised: the error.
        symptom: of a mistake, seen while it was observed.
        changed: the arguments that it has written into.
        error, bound: the largest error, and the bound it belongs to (largest in error / bound).
    """

    case: Case
    exact: list[Tensor]
    dtypes: list[torch.dtype]
    bounds: list[float]
    returned: Any = None
    found: list[Tensor] = field(default_factory=list)
    raised: BaseException | None = None
    symptom: Symptom | None = None
    changed: list[str] = field(default_factory=list)
    error: float = math.inf
    bound: float = 0.0

    @property
    def fits_in_form(self) -> bool:
        """As many tensors as expected, of the shapes that are expected."""
        return [tuple(t.shape) for t in self.found] == [tuple(t.shape) for t in self.exact]

    @property
    def right(self) -> bool:
        form = self.fits_in_form and [t.dtype for t in self.found] == self.dtypes
        return self.raised is None and self.symptom is None and form and self.error <= self.bound


def run(exercise: Exercise, function: Callable, case: Case) -> Outcome:
    """Call the function with a copy of the case's arguments, and hold what it returns against the formula."""
    exact, dtypes, bounds = expectation(exercise, case)
    outcome = Outcome(case, exact, dtypes, bounds)
    given = copy.deepcopy(case.arguments)
    try:
        outcome.returned = exercise.observe(function, given)
    except Symptom as symptom:
        outcome.symptom = symptom
    except (Exception, SystemExit) as error:  # of any kind: the code may be anybody's
        outcome.raised = error
    outcome.changed = [name for name, value in case.arguments.items() if not same(value, given[name])]
    outcome.found = [tensor.detach().cpu() for tensor in tensors_in(outcome.returned)]
    if outcome.fits_in_form:
        pairs = zip(outcome.found, exact, bounds, strict=True)
        errors = [(distance(found, right), bound) for found, right, bound in pairs]
        outcome.error, outcome.bound = max(errors, key=lambda pair: pair[0] / pair[1])
    return outcome


def expectation(exercise: Exercise, case: Case) -> tuple[list[Tensor], list[torch.dtype], list[float]]:
    """What is right in float64, the dtypes that should come back, and the bound on the error of each tensor."""
    dtype = real_dtype(list(case.arguments.values()))
    plain = tensors_in(exercise.expect(exercise.formula, case.arguments))
    dtypes = [tensor.dtype for tensor in plain]
    if dtype is None or exercise.bound is not None:
        bound = exercise.bound or 0.5  # without real numbers: True and False, which are 1 apart
        return [tensor.double() for tensor in plain], dtypes, [bound] * len(plain)
    exact = [tensor.double() for tensor in tensors_in(exercise.formula(**as_dtype(case.arguments, torch.float64)))]
    single = tensors_in(exercise.formula(**as_dtype(case.arguments, torch.float32)))
    eps, eps_32 = torch.finfo(dtype).eps, torch.finfo(torch.float32).eps
    if dtype == torch.float64:  # the arguments themselves are rounded to float32 here, hence not 2 but 1
        errors = [distance(a, b) * eps / eps_32 / 2 for a, b in zip(single, exact, strict=True)]
    else:
        errors = [distance(a, b) for a, b in zip(plain, exact, strict=True)]
    room = 4 * eps * exercise.depth(case.arguments)
    bounds = [2 * error + room * max(1.0, largest(right)) for error, right in zip(errors, exact, strict=True)]
    return exact, dtypes, bounds


def distance(found: Tensor, right: Tensor) -> float:
    """The largest difference; equal infinities are equal, anything else that is not a number is infinitely far."""
    found, right = found.double(), right.double()
    if found.numel() == 0:
        return 0.0
    difference = torch.where(found == right, 0.0, (found - right).abs())
    return float(difference.nan_to_num(nan=math.inf).max())


def alike(found: Tensor, other: Tensor, bound: float) -> bool:
    """Whether a result is that of another formula: to within the bound, and not a number at the same places."""
    if found.shape != other.shape:
        return False
    found, other = found.double(), other.detach().double()
    finite = torch.isfinite(found)
    if not torch.equal(finite, torch.isfinite(other)):
        return False
    return distance(found[finite], other[finite]) <= bound


def largest(tensor: Tensor) -> float:
    finite = tensor[torch.isfinite(tensor)].double()
    return float(finite.abs().max()) if finite.numel() else 0.0


def same(before: Any, after: Any) -> bool:
    """Whether an argument is as it was before the call."""
    if isinstance(before, Tensor):
        return isinstance(after, Tensor) and before.shape == after.shape and torch.equal(before, after)
    if isinstance(before, Mapping):
        return list(before) == list(after) and all(same(before[name], after[name]) for name in before)
    if isinstance(before, list | tuple):
        return len(before) == len(after) and all(map(same, before, after))
    return before == after
