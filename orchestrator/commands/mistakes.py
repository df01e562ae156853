"""Which symptom shows for which classic mistake? Each is planted, and every check is computed.

    python -m orchestrator mistakes                            all of them: a few minutes
    python -m orchestrator mistakes exact_gelu mask_shifted    only these
    python -m orchestrator mistakes --list                     what there is, with the wrong line and the right one

A mistake has two lives. "trained": a small model learns the tales with it, from the first step. "right weights": a
model that was trained without it is run with it, as when OpenAI's weights are loaded into faulty code. Losses are in
nats per token above the floor, which is known exactly; text is the part of the stories that obey the grammar; the other
columns are the largest difference of a logit. A star marks what is seen: further from the right model than its seeds
are from each other (loss, text), or than its rounding is from float64.

A folder gets results.json, table.md and a figure. Exit code 1: a check sees something in the right model.
"""

import argparse
import json
import math
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path

from GPT2Model.files import replace_file, replace_text
from orchestrator.evaluation.machine import describe_machine, machine_facts
from orchestrator.learning.looks import OTHER_TEXT, Settings
from orchestrator.learning.planted import MISTAKES, Mistake, the_mistake
from orchestrator.learning.symptoms import CHECKS, DEVIATIONS, LEAST_LOSS, LOSS_AND_TEXT, NOTHING, ROUNDINGS, table
from orchestrator.report import make_folder, plain
from orchestrator.views.mistake_figures import mistakes_chart

HELP = "plants each classic mistake and computes by which check it is seen, and where it stays silent"
# Of the table on the screen: two lines of heading for each check.
SCREEN = {
    "start": ("fresh", "loss"), "trained_loss": ("trained", "loss"), "trained_text": ("trained", "text"),
    "right_loss": ("right w.", "loss"), "right_text": ("right w.", "text"), "reference": ("against", "float64"),
    "implementations": ("eager =", "sdpa"), "causality": ("caus-", "ality"), "cache": ("cached", "= whole"),
    "repeat": ("twice", "same"),
}  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("names", nargs="*", metavar="NAME", help="mistakes to plant (default: all)")
    parser.add_argument("--list", action="store_true", help="say what there is, and stop")
    parser.add_argument("--json", action="store_true", help="print the results as JSON, and nothing else, on stdout")
    parser.add_argument("--steps", default="500", metavar="N", help="steps of each training (default: 500)")
    parser.add_argument("--seed", default="0", metavar="N", help="of the weights (default: 0)")
    parser.add_argument(
        "--jobs", default=None, metavar="N", help="processes; the numbers stay the same (default: one for each core)"
    )
    parser.add_argument(
        "--out",
        default=None,
        metavar="DIR",
        help="folder for results.json, table.md and the figure (default: runs/DATE_TIME-mistakes)",
    )


def run(args: argparse.Namespace) -> int:
    mistakes = [the_mistake(name) for name in dict.fromkeys(args.names or MISTAKES)]
    settings = Settings(steps=whole_number("steps", args.steps, 1), seed=whole_number("seed", args.seed, 0))
    cores = os.cpu_count() or 1
    jobs = min(cores, len(mistakes)) if args.jobs is None else whole_number("jobs", args.jobs, 1)
    if args.list:
        print(json.dumps([described(mistake) for mistake in mistakes], indent=2) if args.json else listed(mistakes))
        return 0
    folder = make_folder(args.out or Path("runs") / datetime.now().strftime("%Y-%m-%d_%H%M%S-mistakes"))
    say = (lambda text: None) if args.json else (lambda text: print(text, flush=True))
    say("\n".join(describe_machine()))
    say(f"{len(mistakes)} mistakes; each training: {recipe(settings)}\n")

    right, (control, *rows) = table([mistake.name for mistake in mistakes], settings, jobs=jobs)

    noise = {check: dict(zip(("expected", "limit"), right.normal(check), strict=True)) for check in CHECKS}
    results = {
        "command": shlex.join(["python", "-m", "orchestrator", *sys.argv[1:]]),
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "machine": {**machine_facts(), "jobs": jobs},
        "settings": asdict(settings),
        "right": {name: getattr(right, name) for name in ("start", "gap", "text", "rounding")},
        "noise": noise,
        "control": control.as_dict(),
        "rows": [described(mistake) | row.as_dict() for mistake, row in zip(mistakes, rows, strict=True)],
    }
    results = plain(results)
    text = json.dumps(results, indent=2) + "\n"
    replace_text(folder / "results.json", text)
    replace_text(folder / "table.md", markdown_table(results) + "\n")
    figure = chart(results)
    replace_file(folder / "mistakes.png", lambda beside: figure.savefig(beside, format="png", dpi=130))
    if args.json:
        print(text, end="")
    say("\n".join([*screen_table(results), "", *noise_lines(results), ""]))
    say("\n".join(f"{row['name']}: {row['verdict']}" for row in results["rows"]))
    passed = not control.seen
    say(f"\n{'PASS' if passed else 'FAIL'}: the right model is {control.verdict}")
    say(f"written: {folder}/results.json, table.md, mistakes.png")
    return 0 if passed else 1


def whole_number(option: str, text: str, least: int) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < least:
        raise ValueError(f"--{option} must be a whole number, {least} or more, got {text!r}.")
    return int(text)


def recipe(settings: Settings) -> str:
    """The training in a line."""
    return (
        f"{settings.n_layers} layers, {settings.n_heads} heads, {settings.emb_dim} wide, {settings.steps} steps of "
        f"{settings.batch_size} stories"
    )


def described(mistake: Mistake) -> dict:
    """What MISTAKES says of it, JSON-ready."""
    words = {key: getattr(mistake, key) for key in ("name", "what", "wrong", "right", "why", "where")}
    return words | {"implementations": list(mistake.implementations or ()), "needs": dict(mistake.needs)}


def listed(mistakes: Sequence[Mistake]) -> str:
    lines = []
    for mistake in mistakes:
        acts = f", under {', '.join(mistake.implementations)} only" if mistake.implementations else ""
        needs = "".join(f", needs {key}={value}" for key, value in mistake.needs)
        lines += [f"{mistake.name} ({mistake.where}{acts}{needs})", f"    {mistake.what}"]
        lines += [f"    wrong:  {mistake.wrong}", f"    right:  {mistake.right}", f"    easily made: {mistake.why}", ""]
    return "\n".join(lines[:-1])


def cell(check: str, finding: dict) -> str:
    """A finding in a few characters. JSON has no NaN and infinity: they come as text."""
    value = finding["value"]
    if value is None:
        return "error" if finding["seen"] else "-"
    value = float(value)
    if not math.isfinite(value):
        return "NaN"
    if check.endswith("text"):
        return f"{value:.0%}"
    if check in LOSS_AND_TEXT:
        return f"{value:.3f}" if abs(value) < 1 else f"{value:.2f}"
    if finding["note"] == OTHER_TEXT and value < 1e-3:
        return OTHER_TEXT
    return "0" if value == 0 else f"{value:.0e}" if value < 0.01 else f"{value:.2g}"


def all_rows(results: dict) -> list[dict]:
    """The right model first."""
    return [results["control"] | {"name": NOTHING.what}, *results["rows"]]


def screen_table(results: dict) -> list[str]:
    form = "{:29}" + "{:>10} " * len(CHECKS)
    lines = [form.format("", *(SCREEN[check][i] for check in CHECKS)).rstrip() for i in (0, 1)]
    for row in all_rows(results):
        findings = row["findings"]
        words = [cell(check, findings[check]) + ("*" if findings[check]["seen"] else " ") for check in CHECKS]
        lines.append(form.format(row["name"], *words).rstrip())
    return lines


def noise_lines(results: dict) -> list[str]:
    """What counts as seen, with the figures it comes from."""
    right, noise = results["right"], results["noise"]
    seeds = len(right["gap"])
    return [
        "seen (*): further from what is expected than the limit. Of loss and text it is "
        f"{DEVIATIONS} standard deviations of the right",
        f"model's {seeds} seeds, in a loss {LEAST_LOSS} at least; of logits {ROUNDINGS} times its rounding",
        f"  fresh loss above the floor: {spread(right['start'], '.3f')}, limit {noise['start']['limit']:.3f}",
        f"  loss above the floor:       {spread(right['gap'], '.4f')}, limit {noise['trained_loss']['limit']:.4f}",
        f"  text:                       {spread(right['text'], '.0%')}, limit {noise['trained_text']['limit']:.0%}",
        f"  a logit's rounding:         {right['rounding']:.1e}, limit {noise['reference']['limit']:.1e}",
    ]


def spread(values: Sequence[float], form: str) -> str:
    return ", ".join(format(value, form) for value in values)


def markdown_table(results: dict) -> str:
    """The table of docs/MISTAKES.md: bold is seen."""
    headings = [CHECKS[check][0] for check in CHECKS]
    lines = [f"| mistake | {' | '.join(headings)} | verdict |", f"| --- |{' ---: |' * len(CHECKS)} --- |"]
    for i, row in enumerate(all_rows(results)):
        cells = []
        for check in CHECKS:
            text = cell(check, row["findings"][check])
            cells.append(f"**{text}**" if row["findings"][check]["seen"] else text)
        name = f"`{row['name']}`" if i else row["name"]
        lines.append(f"| {name} | {' | '.join(cells)} | {row['verdict']} |")
    return "\n".join(lines)


def markdown_list() -> str:
    """The list of docs/MISTAKES.md: each mistake with its wrong line and the right one."""
    lines = ["| mistake | where | what it is | wrong | right | easily made, because |"]
    lines.append("| --- | --- | --- | --- | --- | --- |")
    for mistake in MISTAKES.values():
        where = mistake.where + "".join(f", only {name}" for name in mistake.implementations or ())
        words = (f"`{mistake.name}`", where, mistake.what, f"`{mistake.wrong}`", f"`{mistake.right}`", mistake.why)
        lines.append(f"| {' | '.join(words)} |")
    return "\n".join(lines)


def chart(results: dict):
    rows = [
        {
            "name": row["name"],
            "cells": [
                (cell(check, found := row["findings"][check]), found["seen"], found["value"] is not None)
                for check in CHECKS
            ],
        }
        for row in all_rows(results)
    ]
    settings = Settings(**results["settings"])
    title = f"Which check sees which mistake\n{recipe(settings)}; losses in nats per token above the floor"
    return mistakes_chart(rows, [heading for heading, _ in CHECKS.values()], title=title, groups=(1, 3, 5))
