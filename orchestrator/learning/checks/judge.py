"""judge(): is a learner's function right, and if not, which known mistake does it make?

A mistake is named only if its formula gives what the learner's function gave in *every* case, those that came out right
included. If no single one does, two at once are tried.
"""

import difflib
import inspect
import sysconfig
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import torch

from orchestrator.learning.checks.exercise import Exercise, tensors_in
from orchestrator.learning.checks.form import GENERAL, fault_of_form, shapes, short
from orchestrator.learning.checks.outcome import Outcome, alike, largest, run

SLACK = 8  # how far two ways of making one mistake may differ, in bounds
NEARLY = 1e-4  # an error that is this small beside the largest number may be rounding
PACKAGE = Path(__file__).parent


@dataclass
class Verdict:
    """What is known about one function.

    Attributes:
        status: "right", "wrong", "raised", "not started".
        mistakes: those that were recognised, by name. says: lines for the learner.
        passed, cases: how many came out right, of how many.
        error, bound: of the case that is worst in error / bound; only where numbers were compared.
    """

    exercise: Exercise
    status: str
    mistakes: list[str] = field(default_factory=list)
    says: list[str] = field(default_factory=list)
    passed: int = 0
    cases: int = 0
    error: float = 0.0
    bound: float = 1.0

    @property
    def points(self) -> int:
        return self.exercise.points if self.status == "right" else 0


def judge(exercise: Exercise, function: Callable | None) -> Verdict:
    """Run a function through all cases of its exercise.

    Args:
        exercise: which.
        function: the learner's; None: there is none.
    """
    if function is None:
        return Verdict(exercise, "not started", says=[f"the file has no function {exercise.name}."])
    if not callable(function):
        return verdict_of(exercise, "signature", f"{exercise.name} is no function but {type(function).__name__}.")
    cases = exercise.cases()
    arguments = [*cases[0].arguments, *exercise.also_given]
    try:
        inspect.signature(function).bind(**dict.fromkeys(arguments))
    except TypeError as error:
        return verdict_of(exercise, "signature", f"{error}; wanted: {exercise.name}({', '.join(arguments)})")
    outcomes = []
    for case in cases:
        outcomes.append(run(exercise, function, case))
        if is_stub(outcomes[-1].raised):
            return not_started(exercise, function, outcomes[-1].raised)
    worst = max(outcomes, key=lambda outcome: outcome.error / outcome.bound if outcome.bound else 0.0)
    verdict = Verdict(exercise, "wrong", cases=len(cases), error=worst.error, bound=worst.bound)
    verdict.passed = sum(outcome.right for outcome in outcomes)
    if verdict.passed == verdict.cases:
        after = written_into(outcomes) or exercise.afterwards(function)
        verdict.status = "wrong" if after else "right"
        if after:
            found(verdict, [after], written_details(outcomes) if after == "inputs_overwritten" else [])
        return verdict
    explain(verdict, outcomes, function)
    return verdict


def explain(verdict: Verdict, outcomes: list[Outcome], function: Callable) -> None:
    """The likeliest mistakes, from the most to the least certain way of finding them."""
    exercise = verdict.exercise
    wide = [outcome for outcome in outcomes if is_wide(exercise, outcome)]
    if all(outcome.right or (outcome in wide and outcome.raised) for outcome in outcomes):
        return found(verdict, ["dtype_fixed"], raised_line(wide[0]))
    outcomes = [outcome for outcome in outcomes if outcome not in wide or outcome.raised is None]
    bad = next(outcome for outcome in outcomes if not outcome.right)
    if symptom := next((outcome.symptom for outcome in outcomes if outcome.symptom), None):
        return found(verdict, [symptom.mistake], [symptom.detail] if symptom.detail else [])
    for mistake in exercise.mistakes:
        if any(fits(exercise, change, outcomes) for change in mistake.changes):
            return found(verdict, [mistake.name], raised_line(bad))
    if fault := next((fault for o in outcomes if o.raised is None and (fault := fault_of_form(exercise, o))), None):
        name, detail = fault
        return found(verdict, [name], [detail])
    if raised := next((outcome for outcome in outcomes if outcome.raised is not None), None):
        verdict.status = "raised"
        verdict.says += [*raised_line(raised), f"called with {shapes(raised.case.arguments)}", *key_meant(raised)]
        return None
    if is_random(exercise, function):
        random = "dropout_left_on" if any(m.name == "dropout_left_on" for m in exercise.mistakes) else "random"
        return found(verdict, [random])
    for two in combinations([mistake for mistake in exercise.mistakes if mistake.changes], 2):
        pairs = [one | other for one in two[0].changes for other in two[1].changes if not set(one) & set(other)]
        if any(fits(exercise, change, outcomes) for change in pairs):
            return found(verdict, [mistake.name for mistake in two])
    if name := written_into(outcomes):
        return found(verdict, [name], written_details(outcomes))
    if only_float64(outcomes):
        return found(verdict, ["precision_lost"])
    rounded = ["rounding"] if only_rounding(exercise, outcomes) else []
    if nearly_right(outcomes) and (after := exercise.afterwards(function)):
        return found(verdict, [after, *rounded], where(outcomes))
    if rounded:
        return found(verdict, rounded, where(outcomes))
    if exercise.bound is None and (dtype := narrow_dtype(outcomes)):
        return found(verdict, ["rounding"], [f"all numbers that came back are {dtype}'s", *where(outcomes)])
    if any(not torch.isfinite(t).all() and torch.isfinite(e).all() for o in outcomes for t, e in pairs_of(o)):
        return found(verdict, ["not_finite"], where(outcomes))
    verdict.says += ["No known mistake fits.", *where(outcomes)]
    return None


def fits(exercise: Exercise, change: Mapping[str, Any], outcomes: list[Outcome]) -> bool:
    """Whether the formula with this change gives what the function gave, in every case, and not only what is right.

    In float64 seven digits are enough here, since a learner's layers are often made in float32.
    """
    telling = False
    for outcome in outcomes:
        try:
            wrong = tensors_in(
                exercise.expect(lambda **given: exercise.formula(**given, **change), outcome.case.arguments)
            )
        except Exception as error:  # a mistake may be one that runs in some shapes only
            if outcome.raised is None:
                return False
            telling = telling or str(error) == str(outcome.raised)
            continue
        if outcome.raised is not None or [t.shape for t in wrong] != [t.shape for t in outcome.found]:
            return False
        wide = is_wide(exercise, outcome)
        for found_tensor, wrong_tensor, bound in zip(outcome.found, wrong, outcome.bounds, strict=True):
            slack = bound
            if exercise.bound is None and wrong_tensor.is_floating_point():
                eps = torch.finfo(torch.float32 if wide else wrong_tensor.dtype).eps
                slack = SLACK * bound + 32 * eps * max(float(wide), largest(wrong_tensor))
            if found_tensor.dtype != wrong_tensor.dtype and not wide:
                return False
            if not alike(found_tensor, wrong_tensor, slack):
                return False
        telling = telling or not (outcome.right or wide)
    return telling


def is_wide(exercise: Exercise, outcome: Outcome) -> bool:
    """Whether it is a case in float64."""
    return exercise.bound is None and torch.float64 in outcome.dtypes


def found(verdict: Verdict, names: list[str], details: list[str] | None = None) -> None:
    known = {mistake.name: mistake for mistake in (*GENERAL, *verdict.exercise.mistakes)}
    verdict.mistakes += names
    verdict.says += [known[name].says for name in names] + (details or [])


def verdict_of(exercise: Exercise, name: str, detail: str) -> Verdict:
    verdict = Verdict(exercise, "wrong", bound=1.0)
    found(verdict, [name], [detail])
    return verdict


def not_started(exercise: Exercise, function: Callable, error: NotImplementedError) -> Verdict:
    """A stub; or a function that calls one."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    waits = frame.name != exercise.name
    return Verdict(exercise, "not started", says=[f"it waits for {frame.name}, which it calls."] if waits else [])


def is_stub(error: BaseException | None) -> bool:
    """Whether a line `raise NotImplementedError` was met. torch raises the same error for dtypes that an op lacks."""
    if not isinstance(error, NotImplementedError):
        return False
    return "NotImplementedError" in (traceback.extract_tb(error.__traceback__)[-1].line or "")


def raised_line(outcome: Outcome) -> list[str]:
    """The learner's error in one line, with the last line of theirs that it came through."""
    if outcome.raised is None:
        return []
    frames = [frame for frame in traceback.extract_tb(outcome.raised.__traceback__) if is_theirs(frame.filename)]
    place = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    message = next(iter(str(outcome.raised).splitlines()), "")
    return [f"{type(outcome.raised).__name__}: {message[:200]}{place}, in the case: {outcome.case.label}"]


def key_meant(outcome: Outcome) -> list[str]:
    """After a KeyError: the keys that there are and look like it."""
    if not isinstance(outcome.raised, KeyError):
        return []
    keys = [key for value in outcome.case.arguments.values() if isinstance(value, Mapping) for key in value]
    near = difflib.get_close_matches(str(outcome.raised.args[0]), map(str, keys), n=3, cutoff=0.6)
    return [f"there are: {', '.join(near or map(str, keys[:8]))}" + ("" if near else ", ...")]


def is_theirs(filename: str) -> bool:
    path = Path(filename)
    if path.suffix != ".py" or path.parent == PACKAGE or "site-packages" in path.parts:
        return False
    return not path.is_relative_to(sysconfig.get_path("stdlib"))


def is_random(exercise: Exercise, function: Callable) -> bool:
    """Whether a second call with the same arguments gives something else."""
    case = exercise.cases()[0]
    one, other = (run(exercise, function, case).found for _ in range(2))
    if [t.shape for t in one] != [t.shape for t in other]:
        return False
    return not all(map(torch.equal, map(torch.nan_to_num, one), map(torch.nan_to_num, other)))


def written_into(outcomes: list[Outcome]) -> str | None:
    return "inputs_overwritten" if any(outcome.changed for outcome in outcomes) else None


def written_details(outcomes: list[Outcome]) -> list[str]:
    names = dict.fromkeys(name for outcome in outcomes for name in outcome.changed)
    return [f"changed: {', '.join(names)}"]


def only_float64(outcomes: list[Outcome]) -> bool:
    """Whether all is right but the arguments in float64, and there only the digits beyond float32's are wrong."""
    bad = [outcome for outcome in outcomes if not outcome.right]
    return nearly_right(bad) and all(torch.float64 in outcome.dtypes for outcome in bad)


def nearly_right(outcomes: list[Outcome], nearly: float = NEARLY) -> bool:
    return all(o.error <= nearly * max(1.0, *(largest(right) for right in o.exact)) for o in outcomes)


def only_rounding(exercise: Exercise, outcomes: list[Outcome]) -> bool:
    """Whether the error shrinks with the dtype: nearly right in float32, and far closer in float64."""
    wide = [outcome for outcome in outcomes if is_wide(exercise, outcome)]
    return bool(wide) and nearly_right(wide, NEARLY**2) and nearly_right(outcomes)


def narrow_dtype(outcomes: list[Outcome]) -> str | None:
    """The small dtype whose numbers all results are, to within its rounding of the right ones."""
    numbers = [tensor for outcome in outcomes for tensor in outcome.found if tensor.is_floating_point()]
    for dtype in (torch.bfloat16, torch.float16):
        in_it = all(torch.equal(tensor, tensor.to(dtype).to(tensor.dtype)) for tensor in numbers)
        if numbers and in_it and nearly_right(outcomes, 8 * torch.finfo(dtype).eps):
            return short(dtype)
    return None


def pairs_of(outcome: Outcome) -> list[tuple]:
    return list(zip(outcome.found, outcome.exact, strict=True)) if outcome.fits_in_form else []


def where(outcomes: list[Outcome]) -> list[str]:
    """Which cases are wrong, and the first number that is."""
    bad = [outcome for outcome in outcomes if not outcome.right]
    good = [outcome.case.label for outcome in outcomes if outcome.right]
    lines = [f"wrong: {'; '.join(outcome.case.label for outcome in bad)}"]
    lines += [f"right: {'; '.join(good)}"] if good else []
    for place, (given, exact) in enumerate(pairs_of(bad[0])):
        off = (given.double() - exact).abs().nan_to_num(nan=torch.inf) * (given.double() != exact)
        if off.numel() and float(off.max()) > bad[0].bounds[place]:
            index = tuple((off > bad[0].bounds[place]).nonzero()[0].tolist())
            at = f" at {list(index)}" if index else ""
            lines.append(
                f"first difference, in the case {bad[0].case.label}{at}: "
                + "got {}, right is {}".format(*told_apart(given[index].item(), exact[index].item()))
            )
            break
    return lines


def told_apart(one: float, other: float) -> tuple[str, str]:
    """Two numbers that differ, with as many digits as show it: six at least."""
    for digits in range(6, 18):
        texts = number(one, digits), number(other, digits)
        if texts[0] != texts[1]:
            break
    return texts


def number(value: float, digits: int = 6) -> str:
    """Whole numbers in full, others with so many digits; beyond six, zeros at the end too."""
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:{'#' * (digits > 6)}.{digits}g}"
