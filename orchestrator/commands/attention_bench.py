"""How much time and memory does attention take as sequences grow? Every implementation, side by side in one run.

    python -m orchestrator attention-bench                                all that this machine can run: minutes
    python -m orchestrator attention-bench --implementations eager,sdpa   only these
    python -m orchestrator attention-bench --lengths 512,1024 --heads 12 --forward_only
    python -m orchestrator attention-bench --implementations sdpa:flash,sdpa,flash_tiled      one kernel of torch's op

Each is called as the layer calls it: plain causal mask, no dropout. What is not within the bound of `parity` is not
timed. In each round every implementation runs once, in changing order, and its time is divided by eager's of the same
round; the table gives medians, with quartiles in brackets. With a baseline it gives each one's speed too: the
baseline's time divided by its own. "forward" is a pass without gradients. TFLOP/s, on a GPU: 4 B H T T D operations of
a forward pass, half of that under a causal mask, 3.5 times as many with the backward pass. "peak MiB" is what lives at
the worst moment above inputs and mask, measured in a pass of its own. The last lines fit how both grow with the length
T. Only ratios of one run are worth comparing: times swing with whatever else the machine does.

What would take more than half of the free memory is left out, and the reason is given. A folder gets results.json, with
every round, and two figures. On a GPU, benchmarks/kernels_on_gpu.py measures this and more in one command.
"""

import argparse
import json
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import torch
from tqdm import tqdm

from GPT2Model.files import replace_file, replace_text
from orchestrator.evaluation.attention_bench import Bench, growth, refusal, run_bench, turns
from orchestrator.evaluation.contenders import contender, contenders, measurable
from orchestrator.evaluation.machine import check_device, describe_machine, machine_facts
from orchestrator.evaluation.parity import serves
from orchestrator.report import make_folder, plain
from orchestrator.views.bench_figures import memory_by_length, time_by_length
from orchestrator.views.bench_tables import growth_lines, notes, short, table, with_spread  # noqa: F401 (for others too)

HELP = "time and peak memory of attention by sequence length, every implementation side by side"
METHOD = (
    "Plain causal mask, no dropout, tensors laid out as in the layer. In each round every implementation runs once, in "
    "changing order, after one warm-up each (on a GPU, until times settle); over_eager is its time / eager's of the "
    "same round, speed the baseline's time / its own. forward: without gradients; forward_backward: with the gradients "
    "of queries, keys and values. One mask serves all rounds, as it serves all layers of a model. On a GPU a time is "
    "that between two CUDA events, with the L2 cache overwritten before each call. errors: error / bound (parity.py) "
    "of one sequence of at most 1,024 tokens; what is above 1 is not timed. tflops: 4 B H T T D forward, half of it if "
    "causal, 3.5 times that with the backward pass, by the median time. peak_bytes: alive at the worst moment above "
    "inputs and mask, in a pass of its own; first_peak_bytes: a forward pass with a new mask."
)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """All values are read as text, so that everything that is wrong can be said at once."""
    options = {
        "--lengths": ("128,256,512,1024,2048,4096", "sequence lengths in tokens, with commas"),
        "--batch": ("1", "sequences"),
        "--tokens": (None, "tokens of all sequences together, as many at each length, instead of --batch"),
        "--heads": ("4", "query heads"),
        "--kv_heads": (None, "key and value heads, if fewer (default: as many as --heads)"),
        "--head_dim": ("64", "width of a head"),
        "--dtype": (None, f"{', '.join(DTYPES)} (default: bfloat16 on CUDA, float32 elsewhere)"),
        "--device": ("auto", "cpu, cuda, mps or auto: the best here"),
        "--implementations": (
            None,
            "with commas; sdpa:flash, sdpa:cudnn, sdpa:efficient and sdpa:math are torch's op held to one kernel "
            "(default: every one that can serve here)",
        ),
        "--baseline": (None, "the one that speeds are given in (default: sdpa:flash if it is measured)"),
        "--repeats": ("5", "rounds for each length"),
        "--seed": ("0", "of the numbers and of the order in each round"),
        "--out": (None, "folder for results.json and figures (default: runs/DATE_TIME-attention-bench)"),
    }
    metavars = {"--lengths": "N,N,...", "--implementations": "NAMES", "--out": "DIR"}
    metavars |= dict.fromkeys(("--dtype", "--device", "--baseline"), "NAME")
    for option, (default, text) in options.items():
        shown = "" if default is None else f" (default: {default})"
        parser.add_argument(option, default=default, metavar=metavars.get(option, "N"), help=text + shown)
    parser.add_argument("--full_mask", action="store_true", help="every query sees every key: no causal mask")
    parser.add_argument("--forward_only", action="store_true", help="leave the backward pass out")
    parser.add_argument("--json", action="store_true", help="print the results as JSON, and nothing else, on stdout")


def run(args: argparse.Namespace) -> int:
    bench = read_arguments(args)
    bench, refused = without_refused(bench, named=args.implementations is not None)
    folder = Path(args.out or Path("runs") / datetime.now().strftime("%Y-%m-%d_%H%M%S-attention-bench"))
    make_folder(folder)
    say = (lambda text: None) if args.json else (lambda text: print(text, flush=True))
    for line in [*describe_machine(bench.device), described(bench)]:
        say(line)
    mask, count = "plain causal mask" if bench.causal else "no mask", bench.repeats
    say(f"{mask}, no dropout; {count} rounds in changing order after a warm-up: median (quartiles)")
    for name, why in refused.items():
        say(f"not measured: {name} ({why})")
    say("")

    with tqdm(total=turns(bench), unit="turn", file=sys.stderr, smoothing=0.05) as bar:

        def tick(doing: str, count: int) -> None:
            bar.set_postfix_str(doing, refresh=False)
            bar.update(count)

        rows, rounds = run_bench(bench, tick)

    exponents = growth(rows)
    facts = machine_facts(bench.device)
    results = {
        "command": shlex.join(["python", "-m", "orchestrator", *sys.argv[1:]]),
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "machine": facts,
        "method": METHOD,
        "settings": bench.settings(),
        "refused": refused,
        "rows": [vars(row) for row in rows],
        "growth": exponents,
        "rounds": rounds,
    }
    text = json.dumps(plain(results), indent=2) + "\n"
    replace_text(folder / "results.json", text)
    hardware = f"{facts['cpu']}, threads: {facts['threads']}" if bench.device == "cpu" else facts["device"]
    title = f"{described(bench)}\n{hardware}, torch {torch.__version__}"
    for name, draw in (("time.png", time_by_length), ("memory.png", memory_by_length)):
        figure = draw(results["rows"], title=title)
        replace_file(folder / name, lambda beside, figure=figure: figure.savefig(beside, format="png", dpi=130))
    if args.json:
        print(text, end="")
    say("\n".join([*table(rows, bench), "", *growth_lines(exponents), *notes(rows, bench.device)]))
    say(f"written: {folder}/results.json, time.png, memory.png")
    return 1 if any(row.failed for row in rows) else 0


def read_arguments(args: argparse.Namespace) -> Bench:
    """What the arguments ask for, with the implementations that are named, or all.

    Raises:
        ValueError: all that is wrong, one line each.
    """
    problems = []

    def attempt(function: Callable, *values):
        try:
            return function(*values)
        except ValueError as error:
            problems.append(str(error))
            return None

    lengths = attempt(read_lengths, args.lengths)
    sizes = {
        key: attempt(whole_number, key, getattr(args, key), 1) for key in ("batch", "heads", "head_dim", "repeats")
    }
    kv_heads = sizes["heads"] if args.kv_heads is None else attempt(whole_number, "kv_heads", args.kv_heads, 1)
    if sizes["heads"] and kv_heads and sizes["heads"] % kv_heads:
        problems.append(f"--heads {sizes['heads']} must be a multiple of --kv_heads {kv_heads}: each serves a group.")
    seed = attempt(whole_number, "seed", args.seed, 0)
    device = attempt(select_device, args.device)
    default = "bfloat16" if device == "cuda" else "float32"
    if (args.dtype or default) not in DTYPES:
        problems.append(f"--dtype must be one of {', '.join(DTYPES)}, got {args.dtype!r}.")
    words = list(measurable()) if args.implementations is None else args.implementations.split(",")
    names = [attempt(contender, word) for word in words]
    baseline = "sdpa:flash" if "sdpa:flash" in names else None
    if args.baseline is not None:
        baseline = attempt(contender, args.baseline)
        if baseline not in (None, *names):
            measured = f"{', '.join(filter(None, names))}. Name it in --implementations too"
            problems.append(f"--baseline {baseline} is not among what is measured: {measured}.")
    tokens = None if args.tokens is None else attempt(whole_number, "tokens", args.tokens, 1)
    if args.out:
        attempt(check_folder, Path(args.out))
    if problems:
        raise ValueError(complaint(problems))
    return Bench(
        contenders(names), lengths, kv_heads=kv_heads, **sizes, seed=seed, device=device, tokens=tokens,
        causal=not args.full_mask, baseline=baseline, dtype=DTYPES[args.dtype or default],
        forward_only=args.forward_only,
    )  # fmt: skip


def complaint(problems: Sequence[str]) -> str:
    if len(problems) == 1:
        return problems[0]
    return f"{len(problems)} things are wrong:\n" + "\n".join(f"  {problem}" for problem in problems)


def whole_number(option: str, text: str, least: int) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < least:
        raise ValueError(f"--{option} must be a whole number, {least} or more, got {text!r}.")
    return int(text)


def read_lengths(text: str) -> list[int]:
    """Rising, each once."""
    words = [word.strip() for word in text.split(",")]
    if not all(word.isascii() and word.isdigit() and int(word) > 0 for word in words):
        raise ValueError(f"--lengths must be whole numbers, 1 or more, with commas, such as 128,256,512; got {text!r}.")
    return sorted({int(word) for word in words})


def select_device(name: str) -> str:
    """The type of the device, which of several becomes the current one."""
    device = torch.device(check_device(name))
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    return device.type


def check_folder(folder: Path) -> None:
    """Raise if it could not be made or written; nothing is made before everything else is known to be right."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not (there.is_dir() and os.access(there, os.W_OK)):
        raise ValueError(f"--out {folder}: {there} is not a folder that can be written. Choose another: --out DIR.")


def without_refused(bench: Bench, named: bool) -> tuple[Bench, dict[str, str]]:
    """The bench without the implementations that serve none of its lengths, and why they do not.

    Raises:
        ValueError: they were asked for by name.
    """
    refused = {}
    for name, module in bench.implementations.items():
        cases = [bench.case(length) for length in bench.lengths]
        if all(serves(module, case) is None for case in cases):
            refused[name] = refusal(module, cases[0], remedies=named)
    if refused and named:
        raise ValueError(complaint([f"{name} cannot be measured here: {why}." for name, why in refused.items()]))
    kept = {name: module for name, module in bench.implementations.items() if name not in refused}
    baseline = None if bench.baseline in refused else bench.baseline
    return replace(bench, implementations=kept, baseline=baseline), refused


def described(bench: Bench) -> str:
    heads = f"{bench.heads} heads of {bench.head_dim}" + f" ({bench.kv_heads} of keys)" * (
        bench.kv_heads != bench.heads
    )
    dtype = str(bench.dtype).removeprefix("torch.")
    size = f"batch {bench.batch}" if bench.tokens is None else f"{bench.tokens:,} tokens a call"
    return f"{'causal' if bench.causal else 'full'} attention, {size}, {heads}, {dtype} on {bench.device}"
