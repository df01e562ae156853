"""Check your answers to the exercises: right, or the likely mistake.

    python -m orchestrator check                    all of exercises/adapters.py
    python -m orchestrator check attention          a group
    python -m orchestrator check gelu layer_norm    single functions
    python -m orchestrator check --list             which there are

The file is executed, as `python FILE` would. Each function is called in several shapes and held against its formula in
float64; a mistake is named if the formula with this very mistake gives what your function gave, in every case.
"""

import argparse
import textwrap
from collections import Counter

from orchestrator.learning.checks.exercise import Exercise
from orchestrator.learning.checks.judge import Verdict, judge
from orchestrator.learning.checks.loading import find, loaded
from orchestrator.learning.checks.registry import GROUPS, chosen

HELP = "check your answers to the exercises: right, or the likely mistake"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("names", nargs="*", metavar="NAME", help="functions and groups of them (default: all)")
    parser.add_argument(
        "--file", default=None, metavar="FILE.py", help="your answers; executed (default: exercises/adapters.py)"
    )
    parser.add_argument("--list", action="store_true", help="print groups, functions and points, and check nothing")


def run(args: argparse.Namespace) -> int:
    exercises = chosen(args.names)
    if args.list:
        print(table(exercises))
        return 0
    path = find(args.file)
    print(f"{path} (executed)", flush=True)
    verdicts, group = [], None
    with loaded(path) as module:
        for exercise in exercises:
            if exercise.group != group:
                group = exercise.group
                print(f"\n{group}")
            verdicts.append(judge(exercise, getattr(module, exercise.name, None)))
            print(text(verdicts[-1]), flush=True)
    print(f"\n{summary(verdicts)}")
    return 0 if all(verdict.status == "right" for verdict in verdicts) else 1


def text(verdict: Verdict) -> str:
    """One function's verdict, in a line, and what is to be said below it."""
    exercise, says = verdict.exercise, verdict.says
    points = f"{exercise.points} point{'s' * (exercise.points != 1)}"
    if verdict.status == "right":
        said = f"right: {verdict.cases} cases{accuracy(verdict)}; {points}"
    elif verdict.status == "not started":
        return f"  {exercise.name:24}{': '.join(['not started', *says])}"
    elif verdict.status == "raised":
        said = f"raised an error; right in {verdict.passed} of {verdict.cases} cases"
    else:
        said = f"wrong: right in {verdict.passed} of {verdict.cases} cases" if verdict.cases else "wrong"
    lines = [f"  {exercise.name:24}{said}"]
    if verdict.status in ("wrong", "raised"):
        named = len(verdict.mistakes)
        for number, line in enumerate(says):
            label = "likely mistake: " if number < named == 1 else f"mistake {number + 1} of {named}: "
            lines.append(indented(label * (number < named) + line))
        lines.append(indented(f"look at: {exercise.look}"))
    return "\n".join(lines)


def accuracy(verdict: Verdict) -> str:
    """The worst error and its bound, where numbers were compared."""
    if verdict.exercise.bound is None and verdict.error > 0:
        return f", worst error {verdict.error:.1e} (bound {verdict.bound:.1e})"
    return ""


def indented(line: str) -> str:
    return textwrap.fill(line, 110, initial_indent=" " * 6, subsequent_indent=" " * 8, break_long_words=False)


def summary(verdicts: list[Verdict]) -> str:
    count = Counter(verdict.status for verdict in verdicts)
    parts = [f"{count[status]} {word}" for status, word in WORDS.items() if count[status]]
    points, most = sum(v.points for v in verdicts), sum(v.exercise.points for v in verdicts)
    return f"{', '.join(parts)}: {points} of {most} points"


WORDS = {"right": "right", "wrong": "wrong", "raised": "raised an error", "not started": "not started"}


def table(exercises: list[Exercise]) -> str:
    """Groups, functions, points and where to read on: the list that --list prints."""
    lines = []
    for group in GROUPS:
        members = [exercise for exercise in exercises if exercise.group == group]
        if members:
            lines.append(f"{group} ({sum(exercise.points for exercise in members)} points)")
        lines += [f"  {exercise.name:24}{exercise.points:>3}  {exercise.look}" for exercise in members]
    return "\n".join([*lines, f"{sum(exercise.points for exercise in exercises)} points"])
