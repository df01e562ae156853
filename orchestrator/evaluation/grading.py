"""Whole grids of cases: run them, sum them up, and say what the failures have in common.

`parity.py` has the bound and one measurement; `cases.py` has the cases.
"""

import importlib.util
import inspect
import math
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch

from CMHA.implementations import IMPLEMENTATIONS
from orchestrator.evaluation.cases import AXES, MASK_AXES, SHORT_AXES, SHORT_MASK_AXES, Case, grid, request_of
from orchestrator.evaluation.parity import Measurement, expectation, measure, serves

KERNELS = 100  # cases after which what was compiled is forgotten
GRADIENTS = ("dQ", "dK", "dV")


def cases_to_grade(
    *, full: bool = False, device: str = "cpu", dtype: torch.dtype | None = None, short: bool = False
) -> list[Case]:
    """The grid, pairwise or full, and behind it the pairwise grid of masks; `short`: with up to 130 tokens."""
    axes, mask_axes = (SHORT_AXES, SHORT_MASK_AXES) if short else (AXES, MASK_AXES)
    cases = [*grid(pairwise=not full, axes=axes, device=device), *grid(axes=mask_axes, device=device)]
    return [case for case in cases if dtype in (None, case.dtype)]


def interpreted(implementations: Mapping[str, object], device: str) -> list[str]:
    """The names of those that an interpreter runs on this device: they can be tried in short cases only."""
    return [name for name, module in implementations.items() if getattr(module, "INTERPRETED_ON", None) == device]


def grade(
    cases: Iterable[Case], implementations: Mapping[str, object], thinned: Mapping[str, int] | None = None
) -> Iterator[tuple[Case, list[Measurement]]]:
    """Measure each implementation in each case that its own check accepts.

    Why a generator: a full grid takes hours, and each result should be on the disk before the next is begun.

    Args:
        cases: those that differ in their tiles alone should follow each other. An implementation without block sizes is
            measured in the first of them only.
        implementations: name -> module of the registry's form.
        thinned: {name: n} of those that are measured in every n-th case only.
    Yields:
        a case, and what was measured in it. An implementation that raises an error has failed; the others go on.
    """
    before: dict[str, Case] = {}
    for number, case in enumerate(cases):
        same_numbers = replace(case, query_block_size=None, kv_block_size=None)
        measured = []
        for name, module in implementations.items():
            seen = before.get(name) == same_numbers and not getattr(module, "OPTIONS", ())
            before[name] = same_numbers
            if seen or number % (thinned or {}).get(name, 1) or serves(module, case) is None:
                continue
            if getattr(module, "COMPILES", False) and number % KERNELS == 0:
                torch.compiler.reset()  # torch keeps a limited number of kernels in one process
            try:
                measured.append(replace(measure(module, case), implementation=name))
            except (Exception, SystemExit) as error:  # of any kind: the code may be anybody's
                exact_bound = expectation(case)[1]
                nan = dict.fromkeys(exact_bound, math.nan)
                measured.append(Measurement(name, case, nan, exact_bound, math.nan, failure=what_was_raised(error)))
        yield case, measured


def thinning(cases: list[Case], implementations: Mapping[str, object]) -> dict[str, int]:
    """{name: n}: one that compiles each kind of call, for seconds, is tried in every n-th case, a hundred at most."""
    every = max(7, len(cases) // 100)
    return {name: every for name, module in implementations.items() if getattr(module, "COMPILES", False)}


def what_was_raised(error: BaseException) -> str:
    """The error in one line, with the last line of it that is neither torch's nor this folder's."""
    trace = [(Path(frame.filename), frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    here = Path(__file__).parent
    frames = [(path, line) for path, line in trace if "torch" not in path.parts and path.parent != here]
    if isinstance(error, ValueError) and trace[-1][0].name == "parity.py":  # ours, about what came back
        return str(error)
    place = f" ({frames[-1][0].name}, line {frames[-1][1]})" if frames and frames[-1][0].suffix == ".py" else ""
    return f"raised {type(error).__name__}: {next(iter(str(error).splitlines()), '')}{place}"


def known(measurement: Measurement) -> str | None:
    """Why a miss is no news, or None. There is one kind: gradients of torch's own op in fp32 where there is one key.

    dQ and dK are exactly 0 there, a difference of two equal dot products, and dV is a plain sum: the plain formula
    happens to be almost exact, and torch adds in another order. The bound is not widened for it. Let off are these
    gradients alone, up to twice the bound; docs/decisions.md counts the cases.
    """
    case = measurement.case
    one_key = case.key_len == 1 and case.dtype == torch.float32
    small = all(measurement.ratio[key] <= 2 for key in measurement.missed)  # False for NaN
    if measurement.implementation == "sdpa" and one_key and set(measurement.missed) <= set(GRADIENTS) and small:
        return "one key: the plain formula is almost exact there, and torch's op adds in another order"
    return None


def failed(measurement: Measurement) -> bool:
    """Whether it failed in a way that is not known."""
    return not measurement.passed and (measurement.failure is not None or known(measurement) is None)


def summarise(measurements: Iterable[Measurement]) -> list[dict]:
    """One row for each implementation and dtype.

    Returns:
        dicts: implementation, dtype, cases, failed, known (misses that are no news), forward and gradients: the largest
        error / bound without the known ones (None where there was no backward pass; NaN is the largest of all).
    """
    rows: dict[tuple[str, str], dict] = {}
    place_of = {name: place for place, name in enumerate(IMPLEMENTATIONS)}

    def place(run: Measurement) -> tuple:  # as in the registry, and the finest dtype first
        return place_of.get(run.implementation, -1), torch.finfo(run.case.dtype).eps

    for run in sorted(measurements, key=place):
        dtype = str(run.case.dtype).removeprefix("torch.")
        start = {"cases": 0, "failed": 0, "known": 0, "forward": None, "gradients": None}
        row = rows.setdefault(
            (run.implementation, dtype), {"implementation": run.implementation, "dtype": dtype, **start}
        )
        row["cases"] += 1
        row["failed"] += failed(run)
        row["known"] += not run.passed and not failed(run)
        let_off = set() if failed(run) else set(run.missed)
        for column, keys in (("forward", ("context",)), ("gradients", GRADIENTS)):
            ratios = [run.ratio[key] for key in keys if key in run.ratio and key not in let_off]
            row[column] = largest([*ratios, *([] if row[column] is None else [row[column]])])
    return list(rows.values())


def largest(values: list[float]) -> float | None:
    """The maximum, None of nothing, and NaN if one is."""
    if any(math.isnan(value) for value in values):
        return math.nan
    return max(values, default=None)


# What may be true of a case, for `common_to_failures`.
TRAITS: dict[str, Callable[[Case], object]] = {
    "dtype": lambda case: str(case.dtype).removeprefix("torch."),
    "head_dim": lambda case: case.head_dim,
    "lengths": lambda case: (
        "fewer queries than keys"
        if case.query_len < case.key_len
        else "more queries than keys"
        if case.query_len > case.key_len
        else "as many queries as keys"
    ),
    "causal": lambda case: "a causal mask" if case.causal else "no causal mask",
    "padding": lambda case: f"padding: {case.padding}",
    "documents": lambda case: "packed documents" if case.documents else "one document",
    "window": lambda case: "a window" if case.window else "no window",
    "poison": lambda case: "1e4 in the padding" if case.poison and case.padding != "none" else "nothing in the padding",
    "heads": lambda case: "grouped heads" if case.num_heads != case.num_kv_heads else "as many heads for keys",
    "strided": lambda case: "strided tensors" if case.strided else "contiguous tensors",
}


def common_to_failures(measurements: Iterable[Measurement]) -> list[str]:
    """What all failures of one implementation share, and not all cases do: where to look for the mistake."""
    runs = list(measurements)
    bad = [run for run in runs if failed(run)]
    found = []
    for trait, of in TRAITS.items():
        values, bad_values = {of(run.case) for run in runs}, {of(run.case) for run in bad}
        if len(values) > 1 and len(bad_values) == 1:
            value = next(iter(bad_values))
            found.append(f"{trait} {value}" if trait in ("dtype", "head_dim") else str(value))
    wrong = {key for run in bad for key in run.missed}
    if wrong and not wrong & {"context"}:
        found.append("a right output and wrong gradients")
    return found


def load_implementation(path: str | Path) -> object:
    """A user's file, as a module of the registry's form.

    Raises:
        ValueError: it is not a Python file, cannot be imported, or has no `attention` with the registry's arguments.
    """
    path = Path(path)
    if not path.is_file() or path.suffix != ".py":
        raise ValueError(f"--implementation expects a Python file, got {str(path)!r}.")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise ValueError(f"{path.name} cannot be imported: it {what_was_raised(error)}.") from error
    wanted = "attention(queries, keys, values, mask, *, scale, dropout=0.0) -> (context, weights or None)"
    if not callable(getattr(module, "attention", None)):
        raise ValueError(f"{path.name} has no function `attention`; wanted: {wanted}.")
    try:
        options = dict.fromkeys(getattr(module, "OPTIONS", ()))
        inspect.signature(module.attention).bind(0, 0, 0, 0, scale=1.0, dropout=0.0, **options)
    except TypeError as error:
        raise ValueError(f"`attention` of {path.name} cannot be called: {error}; wanted: {wanted}.") from error
    return module


def refused(cases: list[Case], implementations: Mapping[str, object] = IMPLEMENTATIONS) -> dict[str, list[str]]:
    """The implementations that serve none of the cases here: {name: why}."""
    found = {}
    for name, module in implementations.items():
        if all(serves(module, case) is None for case in cases):
            reasons = module.check(request_of(cases[0], needs_grad=False))
            found[name] = [reason.message for reason in reasons]
    return found
