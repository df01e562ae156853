"""Does it matter for training how attention is computed? One seed under several implementations, step by step.

    python -m orchestrator compare-attention                                       a small model, in fp64 and in fp32
    python -m orchestrator compare-attention --dtype fp32 --max_steps 1000
    python -m orchestrator compare-attention --attn_implementation sdpa --dataset my-book.txt --tokenizer char

Same weights, same batches, no dropout: in exact arithmetic every curve would be the same. In fp64 they must agree
within 1e-9 nats at every step. In fp32 rounding grows with the steps, so the bound is 10 times what summing in another
order does to eager itself: a yardstick that trains beside them, on the same batches with their rows in reverse order.
In bf16 and fp16 the yardstick is eager in fp32: a mistake smaller than what the short dtype costs is not seen there.

They train one step each in turn, in changing order, so that what they cost can be compared: time, tokens/s, memory. A
folder gets report.md, report.json with every loss, and a figure. Exit code 1: a curve that does not coincide.
"""

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path

import torch
from tqdm.auto import tqdm

from CMHA.implementations import IMPLEMENTATIONS
from GPT2Model.config import from_preset
from GPT2Model.files import replace_file, replace_text
from orchestrator.commands.attention_bench import check_folder, complaint, short, whole_number, with_spread
from orchestrator.commands.experiment import aligned, bar_style, implementations, words_of
from orchestrator.evaluation.compare_attention import (
    FP64_BOUND,
    MEMORY_STEP,
    MULTIPLE,
    YARDSTICKS,
    Comparison,
    Curve,
    judge,
    names_of_curves,
    refused,
    run_comparison,
    too_large,
)
from orchestrator.evaluation.machine import check_device, describe_machine, machine_facts
from orchestrator.report import make_folder, plain
from orchestrator.text.samples import open_samples
from orchestrator.training.options import Options
from orchestrator.training.precision import resolve_dtype
from orchestrator.views.experiment_figures import curves_chart

HELP = "train one seed under several implementations of attention: the curves coincide, and what each costs"
LEAST_STEPS = MEMORY_STEP + 2  # one sets things up, one is watched for memory, and one is timed at least
METHOD = {
    "fp64": f"bound: {FP64_BOUND:g} nats at every step",
    "fp32": f"bound: {MULTIPLE} times what reversing the rows of each batch did to eager so far",
    "bf16": f"bound: {MULTIPLE} times what bf16 did to eager so far; smaller mistakes are not seen: use fp32 or fp64",
    "fp16": f"bound: {MULTIPLE} times what fp16 did to eager so far; smaller mistakes are not seen: use fp32 or fp64",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Values are read as text, so that everything that is wrong can be said at once."""
    options = {
        "--dataset": ("tales", "NAME", "what is learned: as --dataset of train.py"),
        "--tokenizer": (None, "NAME", "gpt2, char or bytes (default: the data set's own, or gpt2)"),
        "--data_dir": ("data", "DIR", "where data sets are looked for, and prepared tokens are kept"),
        "--model": ("nano", "PRESET", "nano, tiny, gpt2, ...: fresh weights from the seed"),
        "--max_length": (None, "N", "tokens in a sequence (default: the model's context_length)"),
        "--max_steps": ("100", "N", "steps of the optimizer"),
        "--batch_size": ("8", "N", "sequences in a step"),
        "--learning_rate": (None, "X", "the highest (default: as train.py, 6e-4 * 768 / emb_dim)"),
        "--attn_implementation": (None, "NAME", "only these, one or several; eager is always there, to compare with"),
        "--dtype": (["fp64", "fp32"], "NAME", f"one or several of {', '.join(YARDSTICKS)}, one after another"),
        "--device": ("auto", "NAME", "cpu, cuda, mps or auto: the best here"),
        "--seed": ("0", "N", "of weights, batches, and the order of the turns"),
        "--out": (None, "DIR", "folder for the report (default: runs/compare-attention-DATE_TIME)"),
    }
    for option, (default, metavar, text) in options.items():
        several = {"nargs": "+"} if option in ("--attn_implementation", "--dtype") else {}
        shown = "" if default is None else f" (default: {' '.join(default) if several else default})"
        parser.add_argument(option, default=default, metavar=metavar, help=text + shown, **several)


def run(args: argparse.Namespace) -> int:
    comparisons = read_arguments(args)
    for comparison in comparisons:
        if problem := too_large(comparison):
            raise ValueError(f"{problem}. A smaller --model, --batch_size or --max_length, or fewer implementations.")
    folder = make_folder(args.out or Path("runs") / datetime.now().strftime("compare-attention-%Y-%m-%d_%H%M%S"))
    first = comparisons[0]
    for line in [*describe_machine(first.device), f"model: {args.model}; data: {first.samples.describe()}"]:
        print(line)
    settings = first.settings
    print(
        f"{settings.max_steps} steps of {settings.batch_size} sequences, learning rate {settings.learning_rate:.2g}, "
        f"seed {settings.seed}; no dropout",
        flush=True,
    )
    sections = [section(comparison) for comparison in comparisons]
    report = make_report(args, comparisons, sections)
    replace_text(folder / "report.json", json.dumps(report, indent=1) + "\n")
    if any(curve["losses"] for of in sections for curve in of["curves"]):
        figure = curves_chart(sections, title=f"One seed, {args.model} learns {first.samples.name}: loss by step")
        replace_file(folder / "curves.png", lambda beside: figure.savefig(beside, format="png", dpi=120))
    replace_text(folder / "report.md", "\n".join(markdown(report)) + "\n")
    for of in sections:
        print("\n".join(["", *summary(of)]))
    print(f"\nwritten: {folder}/report.md, report.json, curves.png")
    return 0 if all(of["passed"] for of in sections) else 1


def read_arguments(args: argparse.Namespace) -> list[Comparison]:
    """A comparison for each dtype that is asked for.

    Raises:
        ValueError: all that is wrong, one line each; or what is wrong with the model or the data.
    """
    problems = []

    def attempt(function: Callable, *values):
        try:
            return function(*values)
        except ValueError as error:
            problems.append(str(error))
            return None

    device = attempt(check_device, args.device)
    dtypes = [attempt(dtype_of, word, device or "cpu") for word in words_of(args.dtype)]
    if not dtypes:
        problems.append(f"--dtype names none of {', '.join(YARDSTICKS)}.")
    least = {"max_steps": LEAST_STEPS, "batch_size": 1, "seed": 0}
    numbers = {key: attempt(whole_number, key, getattr(args, key), low) for key, low in least.items()}
    length = None if args.max_length is None else attempt(whole_number, "max_length", args.max_length, 1)
    rate = None if args.learning_rate is None else attempt(positive, args.learning_rate)
    names = list(IMPLEMENTATIONS)
    if args.attn_implementation is not None:
        names = attempt(implementations, words_of(args.attn_implementation))
    if args.out:
        attempt(check_folder, Path(args.out))
    cfg = attempt(lambda: from_preset(args.model, drop_rate=0.0, **({"context_length": length} if length else {})))
    if problems:
        raise ValueError(complaint(problems))
    if names == ["eager"]:
        raise ValueError("--attn_implementation names nothing to compare with eager: sdpa, flash_tiled, for example.")
    length = cfg["context_length"]
    samples = open_samples(args.dataset, args.tokenizer, length, numbers["seed"], args.data_dir)
    cfg["vocab_size"] = samples.tokenizer.vocab_size
    options = Options(model=args.model, learning_rate=rate, eval_tokens=8192, **numbers)
    settings = replace(options.train_settings(cfg["emb_dim"], length), eval_steps=numbers["max_steps"], dtype="fp32")
    samples.batch(0, settings.batch_size)  # a batch larger than the data shows here
    return [Comparison(cfg, samples, settings, names, dtype, device) for dtype in dict.fromkeys(dtypes)]


def dtype_of(name: str, device: str) -> str:
    if name not in YARDSTICKS:
        raise ValueError(f"--dtype: one or several of {', '.join(YARDSTICKS)}, got {name!r}.")
    if name == "fp64" and torch.device(device).type == "mps":
        raise ValueError("Apple's MPS has no float64: --dtype fp32, or --device cpu.")
    return name if name == "fp64" else resolve_dtype(name, device)


def positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < float("inf"):
        raise ValueError(f"--learning_rate must be a number above 0, got {text!r}.")
    return value


def section(comparison: Comparison) -> dict:
    """Train in one dtype, and judge. JSON-ready."""
    names = names_of_curves(comparison)
    with tqdm(total=len(names) * comparison.settings.max_steps, **bar_style()) as bar:

        def tick(name: str, count: int) -> None:
            bar.set_postfix_str(f"{comparison.dtype}, {name}", refresh=False)
            bar.update(count)

        curves: list[Curve] = run_comparison(comparison, tick)
    lines = judge(curves, comparison.dtype)
    lines = [{**line, **asdict(curve), **line} for line, curve in zip(lines, curves, strict=True)]
    verdicts = [line["passed"] for line in lines if line["passed"] is not None]
    return plain({
        "dtype": comparison.dtype,
        "bound": METHOD[comparison.dtype],
        "passed": bool(verdicts) and all(verdicts),
        "refused": refused(comparison),
        "curves": lines,
    })  # fmt: skip


def make_report(args: argparse.Namespace, comparisons: Sequence[Comparison], sections: Sequence[dict]) -> dict:
    """Everything, JSON-ready."""
    first = comparisons[0]
    return plain({
        "passed": all(of["passed"] for of in sections),
        "command": shlex.join(["python", "-m", "orchestrator", *sys.argv[1:]]),
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "machine": machine_facts(first.device),
        "arguments": {name: value for name, value in vars(args).items() if name != "command"},
        "cfg": first.cfg,
        "data": first.samples.describe(),
        "settings": asdict(first.settings),
        "sections": list(sections),
    })  # fmt: skip


HEADINGS = (
    "implementation", "verdict", "largest difference", "at step", "part of the bound", "validation loss", "step, ms",
    "x eager", "tokens/s", "seconds", "peak MiB",
)  # fmt: skip


def row(line: dict) -> list[str]:
    """A contender under the headings."""
    verdict = {True: "PASS", False: "FAIL", None: "yardstick" if line["yardstick"] else "reference"}[line["passed"]]
    made = line["largest"] is not None
    far = [shown(line["largest"]), str(line["largest_step"]), shown(line["of_bound"])] if made else ["-"] * 3
    if line["implementation"] == "eager":
        far = ["-"] * 3
    peak = "-" if line["peak_bytes"] is None else short((line["resting_bytes"] + line["peak_bytes"]) / 2**20)
    speed = "-" if line["tokens_per_second"] is None else short(line["tokens_per_second"])
    validation = "-" if line["validation"] is None else f"{number(line['validation']):.10f}"
    return [
        line["implementation"], verdict, *far, validation, with_spread(line["step_seconds"], 1000),
        with_spread(line["over_eager"]), speed, short(line["seconds"]), peak,
    ]  # fmt: skip


def shown(value: float | str) -> str:
    return f"{number(value):.1e}"


def number(value: float | str) -> float:
    """A number of a report again: NaN and infinities are strings there."""
    return float(value)


def summary(of: dict) -> list[str]:
    """One dtype: the verdict, the table, what is not in it."""
    failed = [line["implementation"] for line in of["curves"] if line["passed"] is False]
    judged = sum(line["passed"] is not None for line in of["curves"])
    verdict = f"FAIL: {', '.join(failed)}" if failed else "PASS" if judged else "FAIL: nothing to compare with eager"
    lines = [f"**{of['dtype']}: {verdict}** ({of['bound']})", ""]
    lines += [*aligned(HEADINGS, [row(line) for line in of["curves"]]), ""]
    lines += [f"- {line['implementation']} ended early: {line['failed']}" for line in of["curves"] if line["failed"]]
    return lines + [f"- not compared: {name} ({why})" for name, why in of["refused"].items()]


def markdown(report: dict) -> list[str]:
    """report.md."""
    facts, settings = report["machine"], report["settings"]
    return [
        "# One seed under several implementations of attention", "",
        f"{report['date']}, `{report['command']}`", "",
        f"{facts['device']}; {facts['cpu']}, {facts['cores']} cores, threads: {facts['threads']}; {facts['system']}; "
        + ", ".join(f"{name} {version}" for name, version in facts["versions"].items() if version), "",
        f"Model: {report['arguments']['model']}, dropout 0. Data: {report['data']}. {settings['max_steps']} steps of "
        f"{settings['batch_size']} sequences, learning rate {settings['learning_rate']:.2g}, "
        f"seed {settings['seed']}.", "",
        *(line for of in report["sections"] for line in (*summary(of), "")),
        "![curves](curves.png)", "",
        "Losses in nats per token. All train in turn, one step each, in changing order; x eager: time / eager's time "
        "in the same step, median and quartiles. Seconds: of all steps but the first and the one that was watched for "
        "memory. Memory: live tensor bytes on a CPU, the allocator's peak on CUDA; weights and optimizer included. The "
        "loss of each step stands in report.json.",
    ]  # fmt: skip
