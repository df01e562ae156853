"""What of our GPU kernels can only be shown on a GPU, in one command: are they right there, and how fast?

    python benchmarks/kernels_on_gpu.py                       all five steps; the full grid takes by far the longest
    python benchmarks/kernels_on_gpu.py --grid pairwise       a choice of the grid instead of its 38,000 cases
    python benchmarks/kernels_on_gpu.py --only speed lengths  some steps; what the file has of the others stays
    python benchmarks/kernels_on_gpu.py --dry-run             without a GPU: tries this script, and measures nothing

parity      flash_triton on the grid of cases in float32, bfloat16 and float16, against float64
speed       forward, and forward + backward, against torch's flash kernel at two shapes: 80 % and 70 % of it are wanted
lengths     time, memory and TFLOP/s by sequence length, beside eager, flex_attention and three kernels of torch's op
training    steps of GPT-2 124M, compiled, on flash_triton and on torch's op: tokens/s and MFU
sanitizer   small cases of every kind under NVIDIA's compute-sanitizer (memcheck), in a process of its own

The results are written after each step, with the device, the versions and the command. In each step the kernels choose
their tiles anew: at the shape that is measured, in `lengths` at the longest. Exit code: 0 what was wanted was reached,
1 something was not, 2 it cannot run here. This was written without a GPU: as long as benchmarks/results/ holds no file
of it, nothing of it has run on one.
"""

import argparse
import json
import os
import shlex
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
# Triton looks at it once, when it is first imported: so before anything else is.
os.environ.update({"TRITON_INTERPRET": "1"} if __name__ == "__main__" and "--dry-run" in sys.argv else {})

import torch

from CMHA.implementations import flash_triton
from CMHA.request import AttentionRequest, capability_of
from GPT2Model.files import replace_file, replace_text
from orchestrator.evaluation.gpu_kernels import STEPS, Plan, small_cases, tiny
from orchestrator.evaluation.grading import cases_to_grade
from orchestrator.evaluation.machine import machine_facts
from orchestrator.report import make_folder, plain
from orchestrator.views.bench_figures import memory_by_length, time_by_length

RESULTS = Path(__file__).resolve().parent / "results"
INTERPRETED = "made in Triton's interpreter on a CPU, at tiny sizes, to try the script: NOT A MEASUREMENT"
NO_GPU = (
    "error: this needs an NVIDIA GPU of compute capability 8.0 or later, and a torch that is built for CUDA: there is "
    "none here. Without one, `python benchmarks/kernels_on_gpu.py --dry-run` tries the script itself, and "
    "`python -m orchestrator attention-bench` measures what this machine has."
)
WORDS = {True: "PASS", False: "FAIL", None: "----"}


def read_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style, allow_abbrev=False)
    parser.add_argument("--only", nargs="+", choices=tuple(STEPS), default=list(STEPS), metavar="STEP",
                        help=f"some of {', '.join(STEPS)} (default: all)")  # fmt: skip
    parser.add_argument("--grid", choices=("full", "pairwise"), default="full", help="of parity (default: full)")
    parser.add_argument("--repeats", type=int, default=30, help="rounds of speed, lengths, training (default: 30)")
    parser.add_argument("--batch", type=int, default=16, help="sequences in a training step (default: 16)")
    parser.add_argument("--name", default=None, help="of the results, gpu-NAME.json (default: the device's)")
    parser.add_argument("--out", type=Path, default=None, metavar="DIR",
                        help="where they go (default: benchmarks/results; of a dry run: runs)")  # fmt: skip
    tried = "on a CPU, in Triton's interpreter, at tiny sizes: tries the script, measures nothing"
    parser.add_argument("--dry-run", action="store_true", help=tried)
    parser.add_argument("--small-cases", action="store_true", help=argparse.SUPPRESS)  # what the sanitizer starts
    args = parser.parse_args(arguments)
    for name in ("repeats", "batch"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be 1 or more, got {getattr(args, name)}.")
    if args.name is not None and not slug(args.name):
        parser.error(f"--name must have a letter or a digit, got {args.name!r}.")
    args.out = args.out or (Path("runs") if args.dry_run else RESULTS)
    if args.dry_run and args.out.resolve().is_relative_to(RESULTS):
        parser.error("--dry-run measures nothing, so it writes nothing into benchmarks/results: choose another --out.")
    return args


def slug(name: str) -> str:
    """A device's name as part of a file's: "nvidia-h100-80gb-hbm3"."""
    return "-".join("".join(c if c.isalnum() else " " for c in name).lower().split())


def what_is_missing(dry_run: bool) -> str | None:
    """Why it cannot run here, in one line; None: it can."""
    if not dry_run and not torch.cuda.is_available():
        return NO_GPU
    device = torch.device("cpu" if dry_run else "cuda")
    request = AttentionRequest(device.type, torch.bfloat16, needs_grad=True, capability=capability_of(device))
    reasons = [f"{reason.message}: {reason.remedy}" for reason in flash_triton.check(request)]
    return f"error: flash_triton cannot run here: {'; '.join(reasons)}." if reasons else None


def plan_of(args: argparse.Namespace) -> Plan:
    if args.dry_run:
        return tiny()
    plan = Plan(repeats=args.repeats, rounds=args.repeats)
    cases = lambda: cases_to_grade(full=args.grid == "full", device="cuda")  # noqa: E731
    return replace(plan, cases=cases, workload=replace(plan.workload, batch=args.batch))


def run_step(name: str, plan: Plan, write: Callable[[dict], None], cache: str, steps: Mapping = STEPS) -> dict:
    """Do one step and write what it found; that it raised an error is a finding too, and the other steps go on.

    Args:
        cache: a folder for what Triton keeps: what an earlier run has chosen there should not be taken.
    """
    flash_triton.tuned.cache_clear()
    os.environ["TRITON_CACHE_DIR"] = tempfile.mkdtemp(prefix=f"{name}-", dir=cache)
    try:
        found = steps[name](plan, write)
    except Exception as error:
        traceback.print_exc()
        line = next(iter(str(error).splitlines()), "")
        found = {"passed": False, "figure": f"it raised {type(error).__name__}: {line}"}
    write(found)
    return found


def draw(found: Mapping, facts: Mapping, out: Path, dry_run: bool) -> list[str]:
    """The figures of the table by length, beside the results."""
    bench = found["settings"]
    size = f"{bench['tokens']:,} tokens a call, {bench['heads']} heads of {bench['head_dim']}, {bench['dtype']}, causal"
    title = f"{size}\n{INTERPRETED if dry_run else facts['machine']['device']}, torch {torch.__version__}"
    names = []
    for what, draw_rows in (("time", time_by_length), ("memory", memory_by_length)):
        figure, place = draw_rows(found["rows"], title=title), out.with_name(f"{out.stem}-{what}.png")
        replace_file(place, lambda beside, figure=figure: figure.savefig(beside, format="png", dpi=130))
        names.append(place.name)
    return names


def main(arguments: Sequence[str] | None = None) -> int:
    args = read_arguments(arguments)
    if missing := what_is_missing(args.dry_run):
        print(missing, file=sys.stderr)
        return 2
    if args.small_cases:
        return small_cases("cpu" if args.dry_run else "cuda")
    plan = plan_of(args)
    facts = {
        "command": shlex.join(["python", "benchmarks/kernels_on_gpu.py", *(arguments or sys.argv[1:])]),
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "machine": machine_facts(plan.device),
    }
    device = "dry-run" if args.dry_run else facts["machine"]["device"]
    out = make_folder(args.out) / f"gpu-{slug(args.name or device)}.json"
    results = {"about": "our GPU kernels, by benchmarks/kernels_on_gpu.py", "steps": {}}
    if args.dry_run:
        results["not_a_measurement"] = INTERPRETED
        print(INTERPRETED)
    elif out.exists():
        results["steps"] = json.loads(out.read_text(encoding="utf-8"))["steps"]

    passed = []
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as cache:
        for name in args.only:

            def write(found: dict, name: str = name) -> None:
                results["steps"][name] = plain(facts | found)
                replace_text(out, json.dumps(results, indent=1) + "\n")

            found = run_step(name, plan, write, cache)
            passed.append(found["passed"])
            word = "dry run" if args.dry_run and found["passed"] is not False else WORDS[found["passed"]]
            print(f"{word}  {name}: {found['figure']}", flush=True)
            if name == "lengths" and "rows" in found:
                print(f"      figures: {', '.join(draw(results['steps'][name], facts, out, args.dry_run))}")
    print(f"written: {out}" + f" ({INTERPRETED})" * args.dry_run)
    return 1 if False in passed else 0


if __name__ == "__main__":
    raise SystemExit(main())
