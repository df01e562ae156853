"""Do all implementations of attention compute the same? Each is held against float64, forward and backward.

    python -m orchestrator parity                              every implementation that this machine can run
    python -m orchestrator parity --implementation mine.py     one of your own
    python -m orchestrator parity --full                       the whole grid of 38,016 cases: hours on a CPU
    TRITON_INTERPRET=1 python -m orchestrator parity --implementations flash_triton     our GPU kernels on a CPU: only
                                                               when named, and with up to 130 tokens

An implementation passes if, in every case that its own check accepts, its output and gradients are about as near to
float64 as the plain formula in the same dtype is (orchestrator/evaluation/parity.py has the bound). The table gives the
largest error as a part of that bound: 1.00 is the bound itself. A file of your own needs one function:

    def attention(queries, keys, values, mask, *, scale, dropout=0.0):
        # queries (B, H, Tq, D); keys, values (B, kv_heads, Tk, D); mask.dense(): (B or 1, 1, Tq, Tk), True = may attend
        return context, None  # context as the queries; a query that may see nothing gives exactly 0
"""

import argparse
import json
import os
import shlex
import sys
from datetime import datetime
from math import ceil
from pathlib import Path

import torch
from tqdm import tqdm

from CMHA.choosing import canonical_name
from CMHA.implementations import IMPLEMENTATIONS
from GPT2Model.files import replace_text
from orchestrator.evaluation.cases import Case, request_of
from orchestrator.evaluation.contenders import measurable
from orchestrator.evaluation.grading import (
    cases_to_grade,
    common_to_failures,
    failed,
    grade,
    interpreted,
    known,
    load_implementation,
    refused,
    summarise,
    thinning,
)
from orchestrator.evaluation.machine import check_device, describe_machine, machine_facts
from orchestrator.report import make_folder, plain
from orchestrator.views.attention_figures import parity_chart

INTERPRETED_SECONDS = 1.5  # of a short case, forward and backward, on one x86 core at 2 to 3 GHz
HELP = "do all implementations of attention agree? error over bound, against float64"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--full", action="store_true", help="the whole grid of 38,016 cases, not a pairwise choice of it"
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--implementation", metavar="FILE.py", help="grade a file of your own (it is executed)")
    which.add_argument("--implementations", metavar="NAMES", help="only these, with commas: eager,sdpa")
    parser.add_argument("--device", default="auto", help="cpu, cuda, mps or auto: the best here (default)")
    parser.add_argument("--dtype", choices=DTYPES, default=None, help="only this one (default: all three)")
    parser.add_argument(
        "--part", default="1/1", metavar="K/N", help="only every N-th case, from the K-th: to share out --full"
    )
    parser.add_argument(
        "--out", default=None, metavar="DIR", help="for JSON and figure (default: runs/DATE_TIME-parity)"
    )


def run(args: argparse.Namespace) -> int:
    device = check_device(args.device)
    implementations = chosen_implementations(args)
    slow = interpreted(implementations, device)
    short = bool(slow and args.implementations)
    cases = cases_to_grade(full=args.full, device=device, dtype=DTYPES.get(args.dtype), short=short)
    cases = part_of(cases, args.part)
    if not cases:
        raise ValueError(f"--part {args.part} holds no case: there are fewer parts than that.")
    unusable = refused(cases, implementations)
    if not short:
        why = "on a {} in an interpreter, too slow for these cases; for short ones: --implementations {}"
        unusable = {name: [why.format(device, name)] for name in slow if name not in unusable} | unusable
    if len(unusable) == len(implementations):
        why = "; ".join(f"{name}: {', '.join(reasons)}" for name, reasons in unusable.items())
        found = [remedy for name in unusable for remedy in what_to_do(name, cases[0], implementations[name])]
        remedies = "; ".join(dict.fromkeys(found))
        raise ValueError(f"nothing can be measured on {device}, every case is refused. {why}. What to do: {remedies}.")
    folder = make_folder(args.out or Path("runs") / datetime.now().strftime("%Y-%m-%d_%H%M%S-parity"))
    for line in describe_machine(device):
        print(line)
    for name, why in unusable.items():
        print(f"not measured: {name} ({'; '.join(why)})")
    implementations = {name: module for name, module in implementations.items() if name not in unusable}
    named = args.implementations or args.implementation
    thinned = {} if named else thinning(cases, implementations)
    for name, every in thinned.items():
        print(f"{name}: one case in {every}, since each is compiled for seconds. All: --implementations {name}")
    print(f"{len(cases):,} cases, {', '.join(implementations) or 'nothing'} against float64")
    print(interpreted_for(len(cases)) if set(slow) & set(implementations) else "", flush=True)

    measurements = []
    with (
        open(folder / "measurements.jsonl", "w", encoding="utf-8") as lines,
        tqdm(total=len(cases), unit="case", file=sys.stderr, smoothing=0.02) as bar,
    ):
        for _, measured in grade(cases, implementations, thinned):
            measurements += measured
            lines.writelines(json.dumps(plain(run.as_dict())) + "\n" for run in measured)
            lines.flush()
            bar.set_postfix(failed=sum(map(failed, measurements)), refresh=False)
            bar.update()

    rows = summarise(measurements)
    print(table(rows))
    for name in implementations:
        explain(name, [run for run in measurements if run.implementation == name])
    passed = bool(measurements) and not any(map(failed, measurements))
    report = {
        "passed": passed,
        "command": shlex.join(["python", "-m", "orchestrator", *sys.argv[1:]]),
        "machine": machine_facts(device),
        "cases": len(cases),
        "summary": rows,
        "not_measured": unusable,
        "failures": [run.as_dict() for run in measurements if failed(run)][:1000],
    }
    replace_text(folder / "parity.json", json.dumps(plain(report), indent=2) + "\n")
    if rows:
        title = f"Error / bound, {len(cases):,} cases, {machine_facts(device)['device']}"
        parity_chart(rows, title=title).savefig(folder / "parity.png", dpi=130, bbox_inches="tight")
    verdict = f"{sum(map(failed, measurements))} of {len(measurements):,} measurements failed"
    print(f"\n{'PASS' if passed else 'FAIL'}: {verdict}")
    print(f"written: {folder}/parity.json, parity.png, measurements.jsonl")
    return 0 if passed else 1


def what_to_do(name: str, case: Case, module) -> list[str]:
    """How `name` could be measured after all: another device, or the remedies of its own check."""
    reasons = module.check(request_of(case, needs_grad=False))
    if getattr(module, "INTERPRETED_ON", None) == case.device and not interpreter_was_asked_for():
        command = f"TRITON_INTERPRET=1 python -m orchestrator parity --implementations {name}"
        return [f"to try {name} here in short cases, in Triton's interpreter: {command}"]
    if any(reason.code == "cuda_only" for reason in reasons):
        return [f"run {name} on a machine with an NVIDIA GPU"]
    return [f"{name}: {reason.remedy}" for reason in reasons]


def interpreter_was_asked_for() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def interpreted_for(cases: int) -> str:
    """How long the interpreter will take, if that is long, and how to have less; else nothing."""
    minutes = cases * INTERPRETED_SECONDS / 60
    if minutes <= 2:
        return ""
    parts = ceil(minutes)
    return (
        f"In Triton's interpreter a case takes 1 to 3 seconds: about {minutes:.0f} minutes for all. "
        f"For a part of them, in about one minute: --part 1/{parts}\n"
    )


def chosen_implementations(args: argparse.Namespace) -> dict[str, object]:
    """name -> module of what is to be graded."""
    if args.implementation:
        name = Path(args.implementation).stem
        name = f"{name} (your file)" if name in IMPLEMENTATIONS else name  # what torch's own is let off is not for it
        return {name: load_implementation(args.implementation)}
    if args.implementations is None:
        return measurable()
    names = [canonical_name(name.strip()) for name in args.implementations.split(",")]
    missing = [name for name in names if name not in measurable()]
    if missing:
        raise ValueError(f"nothing to measure for {', '.join(missing)}: choose among {', '.join(measurable())}.")
    return {name: IMPLEMENTATIONS[name] for name in names}


def part_of(cases: list, part: str) -> list:
    """Every N-th block of four cases (they share their numbers) from the K-th, for "K/N"."""
    try:
        number, parts = (int(word) for word in part.split("/"))
        if not 1 <= number <= parts:
            raise ValueError
    except ValueError:
        raise ValueError(f"--part must be K/N with 1 <= K <= N, such as 1/2, got {part!r}.") from None
    return [case for i, case in enumerate(cases) if i // 4 % parts == number - 1]


def table(rows: list[dict]) -> str:
    """The summary as text: error over bound."""
    lines = [f"{'implementation':20} {'dtype':9} {'cases':>7} {'forward':>8} {'gradients':>9}  verdict"]
    for row in rows:
        forward, gradients = ("-" if row[key] is None else short(row[key]) for key in ("forward", "gradients"))
        verdict = f"FAIL ({row['failed']})" if row["failed"] else "PASS"
        verdict += f" ({row['known']} known)" * bool(row["known"])
        verdict += ", forward only" * (row["gradients"] is None)
        lines.append(
            f"{row['implementation']:20} {row['dtype']:9} {row['cases']:7,} {forward:>8} {gradients:>9}  {verdict}"
        )
    return "\n".join(lines)


def short(ratio: float) -> str:
    """Two decimals, or a power of ten where it is huge."""
    return f"{ratio:.0e}" if ratio >= 1000 else f"{ratio:.2f}"


def explain(name: str, runs: list) -> None:
    """A few lines about the failures of one implementation, and one about what is known."""
    bad = [run for run in runs if failed(run)]
    let_off = [run for run in runs if not run.passed and not failed(run)]
    if let_off:
        worst = max(run.ratio[key] for run in let_off for key in run.missed)
        print(f"\n{name}: {len(let_off)} known misses, at most {worst:.2f} of the bound: {known(let_off[0])}")
    if not bad:
        return
    print(f"\n{name}: {len(bad)} of {len(runs)} cases failed, the first:")
    for run in bad[:3]:
        worst = ", ".join(f"{key} {run.error[key]:.1e} (bound {run.bound[key]:.1e})" for key in run.missed)
        print(f"  {run.case}: {run.failure or worst}")
    if common := common_to_failures(runs):
        print(f"  all of them, and not all cases, have: {', '.join(common)}")
