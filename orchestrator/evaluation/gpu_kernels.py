"""What of our GPU kernels can only be shown on a GPU: five steps, each of which gives its part of the results.

`benchmarks/kernels_on_gpu.py` is the command. On a CPU the steps run in Triton's interpreter at tiny sizes, which tries
them and measures nothing. They were written without a GPU and have not been run on one.
"""

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from tqdm import tqdm

from CMHA.implementations import IMPLEMENTATIONS, flash_triton
from orchestrator.evaluation.attention_bench import Bench, Row, run_bench, spread, turns
from orchestrator.evaluation.cases import Case, mask_of, tensors
from orchestrator.evaluation.contenders import contenders
from orchestrator.evaluation.experiment import Experiment, rates, refuse, run_task, without_announcements
from orchestrator.evaluation.experiment import Row as TrainingRow
from orchestrator.evaluation.grading import cases_to_grade, common_to_failures, failed, grade, summarise
from orchestrator.evaluation.machine import wait_for
from orchestrator.evaluation.parity import measure
from orchestrator.evaluation.workloads import Workload
from orchestrator.training import mfu
from orchestrator.views.bench_tables import table

OURS, BASELINE = "flash_triton", "sdpa:flash"
WANTED = {"forward": 0.8, "forward_backward": 0.7}  # of the baseline's speed, at each shape
CONTENDERS = (OURS, BASELINE, "sdpa:cudnn", "sdpa:efficient", "flex_attention", "eager")
SANITIZER, MEMORY_ERROR = "compute-sanitizer", 86  # and its exit code, if it finds one
RAGGED = ((50, 97, 80), (97, 97, 64), (33, 17, 16))  # query_len, key_len, head_dim: no tile is filled
TILE = {"query_block_size": 32, "kv_block_size": 32}  # of those: nothing is tuned under compute-sanitizer

TRIED = f"no measurement, a dry run: {OURS} ran"  # what stands in the place of a figure where nothing is measured

Keep = Callable[[dict], None]  # told what a step has found so far


@dataclass(frozen=True)
class Plan:
    """How large everything is.

    Attributes:
        shapes: (B, H, T, D) at which a speed is wanted.
        names: contenders of speed and lengths. repeats: rounds of each.
        lengths, tokens, heads, head_dim: of the table by length; as many tokens in a call at each length.
        workload, rounds, compile: of training.
        cases: gives the cases of the grid.
    """

    device: str = "cuda"
    shapes: Sequence[tuple[int, int, int, int]] = ((8, 12, 4096, 64), (4, 16, 8192, 128))
    names: Sequence[str] = CONTENDERS
    repeats: int = 30
    lengths: Sequence[int] = (256, 512, 1024, 2048, 4096, 8192, 16384)
    tokens: int = 16384
    heads: int = 12
    head_dim: int = 64
    workload: Workload = field(default_factory=lambda: Workload("gpt2", 16, 1024, prompt=64))
    rounds: int = 30
    compile: bool = True
    cases: Callable[[], list[Case]] = lambda: cases_to_grade(full=True, device="cuda")

    @property
    def interpreted(self) -> bool:
        """Nothing is measured, and no speed is wanted."""
        return self.device == "cpu"


def tiny() -> Plan:
    """What the interpreter can do in seconds; without torch.compile and flex_attention, which take half a minute."""

    def cases() -> list[Case]:
        short = [case for case in cases_to_grade() if max(case.query_len, case.key_len) <= 50]
        return [next(case for case in short if case.dtype == dtype) for dtype in flash_triton.DTYPES]

    return Plan(
        device="cpu", shapes=((2, 1, 40, 16), (1, 2, 17, 32)), names=(OURS, BASELINE, "sdpa:cudnn", "eager"),
        repeats=2, lengths=(16, 32), tokens=32, heads=1, head_dim=16, rounds=2, compile=False, cases=cases,
        workload=Workload("nano", 1, 16, prompt=8, new_tokens=1, vocab_size=64, changes={"n_layers": 1}),
    )  # fmt: skip


def parity(plan: Plan, keep: Keep) -> dict:
    """flash_triton on the grid, in three dtypes, against float64."""
    cases, measurements = plan.cases(), []

    def found(**more) -> dict:
        bad = [run for run in measurements if failed(run)]
        return {
            "passed": bool(measurements) and not bad,
            "figure": "dry run, in the interpreter: " * plan.interpreted
            + f"{len(bad)} of {len(measurements):,} cases are outside of the bound",
            "cases": len(cases),
            "summary": summarise(measurements),
            "failures": [run.as_dict() for run in bad[:200]],
            "common_to_failures": common_to_failures(measurements),
            **more,
        }

    with tqdm(total=len(cases), desc="parity", unit="case", smoothing=0.02) as bar:
        for number, (_, runs) in enumerate(grade(cases, {OURS: IMPLEMENTATIONS[OURS]})):
            measurements += runs
            bar.update()
            if number % 1000 == 999:  # it takes long, and something may end it
                keep(found(unfinished=True, passed=False))
    return found()


def speed(plan: Plan, keep: Keep) -> dict:
    """Ours against the baseline at the shapes where a speed is wanted."""
    done = []
    for batch, heads, length, head_dim in plan.shapes:
        bench = bench_of(plan, [length], batch=batch, heads=heads, kv_heads=heads, head_dim=head_dim)
        rows, rounds = measured(bench, f"B {batch}, H {heads}, T {length}, D {head_dim}")
        ours = next(row for row in rows if row.implementation == OURS)
        shape = {"B": batch, "H": heads, "T": length, "D": head_dim}
        done.append({"shape": shape, "verdicts": verdicts(ours), "settings": bench.settings(), "tiles": tiles(),
                     "rows": [vars(row) for row in rows], "rounds": rounds})  # fmt: skip
        keep({"passed": False, "figure": "not all shapes are measured yet", "unfinished": True, "shapes": done})
    every = [verdict for shape in done for verdict in shape["verdicts"]]
    if plan.interpreted:
        return {"passed": None, "figure": f"{TRIED} at {len(done)} shapes, beside {BASELINE}", "shapes": done}
    parts = ", ".join(f"{in_percent(one['speed'])} (wanted {in_percent(one['wanted'])})" for one in every)
    passed = all(verdict["passed"] for verdict in every)
    figure = f"forward, forward + backward, shape by shape, of {BASELINE}'s speed: {parts}"
    return {"passed": passed, "figure": figure, "shapes": done}


def verdicts(row: Row) -> list[dict]:
    """Whether the median speed reaches what is wanted, for each pass; what was not measured does not."""
    found = []
    for name, wanted in WANTED.items():
        ratio = (row.speed or {}).get(name)
        median = ratio and ratio["median"]
        passed = median is not None and median >= wanted
        found.append({"pass": name, "speed": median, "spread": ratio, "wanted": wanted, "passed": passed})
    return found


def lengths(plan: Plan, keep: Keep) -> dict:
    """A table by length. Nothing is wanted of it but that ours can be measured at each."""
    sizes = {"tokens": plan.tokens, "heads": plan.heads, "kv_heads": plan.heads, "head_dim": plan.head_dim}
    bench = bench_of(plan, list(plan.lengths), **sizes)
    rows, rounds = measured(bench, "lengths")
    ours = [row for row in rows if row.implementation == OURS]
    ratios = [f"{in_percent(verdicts(row)[0]['speed'])} at {row.length}" for row in ours]
    figure = f"forward, of {BASELINE}'s speed: {', '.join(ratios)}"
    passed = not any(row.not_measured for row in ours)
    if plan.interpreted and passed:
        passed, figure = None, f"{TRIED} at {len(ours)} lengths, beside {BASELINE}"
    return {"passed": passed, "figure": figure, "settings": bench.settings(),
            "tiles": tiles(), "rows": [vars(row) for row in rows], "rounds": rounds}  # fmt: skip


def training(plan: Plan, keep: Keep) -> dict:
    """Steps of the training loop on ours and on torch's op, in turn, with one model."""
    names, load = (OURS, "sdpa"), plan.workload
    experiment = Experiment([load], names, dtype="bf16", device=plan.device, rounds=plan.rounds, compile=plan.compile)
    rows = [TrainingRow(str(load), "training", name) for name in names]
    peak, rounds = mfu.peak_flops(plan.device, "bf16"), []
    with without_announcements(), tqdm(total=len(names) * (plan.rounds + 2), desc="training", unit="turn") as bar:
        refuse(experiment, load, rows)
        if not any(row.not_measured for row in rows):
            rounds = run_task(experiment, load, "training", rows, lambda doing: bar.update())
    for row in (row for row in rows if row.seconds):
        row.rates = rates(row, load, peak)
    passed, ratio = not any(row.not_measured for row in rows), None
    figure = "; ".join(f"{row.implementation}: {row.not_measured}" for row in rows if row.not_measured)
    if passed:
        steps = {name: [taken["seconds"][name]["step"] for taken in rounds] for name in names}
        ratio = spread([theirs / mine for mine, theirs in zip(steps[OURS], steps["sdpa"], strict=True)])
        speeds = [
            f"{row.implementation} {row.rates['tokens']:,.0f} tokens/s, MFU {row.rates['mfu']:.1%}" for row in rows
        ]
        figure = f"{', '.join(speeds)}; {ratio['median']:.3f} of sdpa's speed"
    if plan.interpreted and passed:
        passed, figure = None, f"{TRIED} in {len(rounds)} steps of a tiny model, in turn with sdpa"
    return {"passed": passed, "figure": figure, "workload": str(load), "compiled": plan.compile, "dtype": "bf16",
            "mfu": mfu.explain(load.cfg, load.tokens, peak), "speed": ratio, "rows": [vars(row) for row in rows],
            "rounds": rounds, "tiles": tiles()}  # fmt: skip


def sanitizer(plan: Plan, keep: Keep, script: Path | None = None) -> dict:
    """Every kind of access that the kernels have, once, under NVIDIA's compute-sanitizer, in a process of its own.

    Args:
        script: what runs `small_cases` when it is given --small-cases; None: the command that is running.
    """
    program = None if plan.interpreted else find_sanitizer()
    if program is None and not plan.interpreted:
        where = "on PATH, in CUDA_HOME, CUDA_PATH or /usr/local/cuda*"
        return {"passed": None, "figure": f"not run: there is no {SANITIZER} {where}. It comes with the CUDA toolkit."}
    wrapped = [program, "--tool", "memcheck", "--report-api-errors", "no", "--error-exitcode", str(MEMORY_ERROR)]
    command = [*(wrapped if program else []), sys.executable, str(script or Path(sys.argv[0]).resolve())]
    command += ["--small-cases", *["--dry-run"] * plan.interpreted]
    # torch keeps memory in large blocks, inside of which no access is out of bounds: here each tensor gets its own.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    ran = subprocess.run(command, capture_output=True, text=True, env=environment)
    said = next((line for line in reversed(ran.stdout.splitlines()) if "ERROR SUMMARY" in line), "").strip("= ")
    output = {name: getattr(ran, name).splitlines()[-20:] for name in ("stdout", "stderr")}
    figure = f"{SANITIZER} memcheck: exit code {ran.returncode}" + f", {said}" * bool(said)
    passed = ran.returncode == 0
    if plan.interpreted:  # what was tried is the small cases: their failure counts, their success is no finding
        figure = f"not run: no {SANITIZER}. Its small cases, without it: exit code {ran.returncode}"
        passed = None if passed else False
    return {"passed": passed, "figure": figure, "tool_command": shlex.join(command), "output": output}


STEPS = {"parity": parity, "speed": speed, "lengths": lengths, "training": training, "sanitizer": sanitizer}


def small_cases(device: str) -> int:
    """Ragged lengths, padding, grouped heads, a window, documents, dropout; 1 if one is wrong, else 0."""
    for dtype in flash_triton.DTYPES[: 1 if device == "cpu" else None]:
        for query_len, key_len, head_dim in RAGGED[: 1 if device == "cpu" else None]:
            case = Case(dtype, head_dim, query_len, key_len, padding="left", num_kv_heads=2, device=device, **TILE)
            cases = [case, replace(case, padding="row", causal=False)]
            if query_len == key_len:
                cases.append(replace(case, padding="none", documents=True, window=7))
            for one in cases:
                found = measure(OURS, one)
                print(f"{'PASS' if found.passed else 'FAIL'}  {one}", flush=True)
                if not found.passed:
                    return 1
            inputs, grad_context, padding = tensors(case)
            mask = mask_of(case, padding)
            context, _ = flash_triton.attention(*inputs, mask, scale=case.scale, dropout=0.2, **TILE)
            context.backward(grad_context)
    wait_for(device)
    return 0


def bench_of(plan: Plan, lengths: Sequence[int], **sizes: int) -> Bench:
    """What `speed` and `lengths` have in common."""
    return Bench(contenders(plan.names), lengths, dtype=torch.bfloat16, device=plan.device, baseline=BASELINE,
                 repeats=plan.repeats, **sizes)  # fmt: skip


def measured(bench: Bench, what: str) -> tuple[list[Row], list[dict]]:
    """Measure with a progress bar, and print the table."""
    with tqdm(total=turns(bench), desc=what, unit="turn", smoothing=0.05) as bar:
        rows, rounds = run_bench(bench, lambda doing, count: bar.update(count))
    title = f"{what} (dry run in an interpreter: the times measure nothing)" if bench.device == "cpu" else what
    print("\n".join(["", title, *table(rows, bench)]), flush=True)
    return rows, rounds


def in_percent(part: float | None) -> str:
    return "not measured" if part is None else f"{part:.0%}"


def tiles() -> dict[str, dict[str, str]]:
    """The tiles that the kernels have chosen since `flash_triton.tuned` was last cleared, by the kind of call."""
    if not flash_triton.tuned.cache_info().currsize:
        return {}
    names = ("forward", "backward_dkdv", "backward_dq")
    kernels = {name: flash_triton.tuned(name, 0, 0, 0) for name in names}  # for bf16: what this file measures
    return {name: {str(key): str(best) for key, best in kernel.cache.items()} for name, kernel in kernels.items()}


def find_sanitizer() -> str | None:
    """compute-sanitizer: on PATH, or in the CUDA toolkit."""
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    homes += sorted(map(str, Path("/usr/local").glob("cuda*")), reverse=True)
    places = [place for home in homes for place in (f"{home}/bin", f"{home}/compute-sanitizer")]
    return shutil.which(SANITIZER) or shutil.which(SANITIZER, path=os.pathsep.join(places))
