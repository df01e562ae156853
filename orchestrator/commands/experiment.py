"""How fast does each implementation of attention train a GPT-2 and write with it on this machine? One report.

    python main.py --experiment quick              small models: a minute or two
    python main.py --experiment full               GPT-2 124M too: a quarter of an hour on two cores
    python -m orchestrator experiment --full --attn_implementation eager sdpa --dtype bf16
    python -m orchestrator experiment --norm rmsnorm --mlp swiglu --positions rope --n_kv_heads 2

Of every implementation that can serve here (those that cannot are listed, with the reason): samples/s, tokens/s, MFU
and peak memory of training, by the steps of the training loop itself; tokens/s and the time to the first token of
greedy generation with the KV cache. In each round every implementation has one turn, in changing order, and its time is
divided by eager's of the same round: only such ratios are worth comparing, times swing with whatever else the machine
does. A folder gets report.md, report.json with every round, and two figures.
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

from CMHA.choosing import canonical_name
from GPT2Model.config import KEYS
from GPT2Model.files import replace_file, replace_text
from orchestrator.commands.attention_bench import check_folder, complaint, short, whole_number, with_spread
from orchestrator.evaluation.contenders import measurable
from orchestrator.evaluation.experiment import Experiment, costs, run_experiment
from orchestrator.evaluation.machine import check_device, describe_machine, machine_facts
from orchestrator.evaluation.workloads import TASKS, full, quick
from orchestrator.report import make_folder, plain
from orchestrator.training import mfu
from orchestrator.training.precision import resolve_dtype
from orchestrator.training.settings import DTYPES
from orchestrator.views.experiment_figures import costs_chart, rounds_chart

HELP = "speed and memory of training and generation, every implementation side by side, in one report"
KINDS = {"quick": 12, "full": 6}  # how many rounds
VARIANTS = {name: KEYS[name].choices for name in ("norm", "mlp", "positions")}
NOISY = 1.5  # upper quartile of a ratio / its lower quartile
METHOD = (
    "Training: one step of the training loop (batch, loss, gradient, clipping, fused AdamW), dropout 0, tokens drawn "
    "at random, since speed does not depend on what they say; one model, of which every implementation makes a step in "
    "its turn. Generation: one text, greedy, with the KV cache, weights in the dtype. In each round every "
    "implementation has one turn, in changing order, after a first one that is not counted. Medians, quartiles in "
    "brackets; x eager: time / eager's time in the same round, then the median. Memory: live tensor bytes on a CPU, "
    "the allocator's peak on CUDA, in a turn of its own; weights, and in training the optimizer's numbers, included."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Values are read as text, so that everything that is wrong can be said at once."""
    parser.add_argument("kind", nargs="?", default=None, metavar="quick|full", help="how much (default: quick)")
    parser.add_argument("--quick", action="store_true", help="the same as quick")
    parser.add_argument("--full", action="store_true", help="the same as full")
    options = {
        "--dtype": (
            "auto",
            "NAME",
            f"{', '.join(DTYPES)}: of the matrix products; auto: what the processor does natively",
        ),
        "--device": ("auto", "NAME", "cpu, cuda, mps or auto: the best here"),
        "--attn_implementation": (None, "NAME", "only these, one or several; eager is always there, to compare with"),
        "--rounds": (None, "N", f"for each task (default: {', '.join(f'{kind} {n}' for kind, n in KINDS.items())})"),
        "--seed": ("0", "N", "of weights, tokens, and the order in each round"),
        **{
            f"--{name}": (None, "NAME", f"of every model: {' or '.join(choices)}") for name, choices in VARIANTS.items()
        },
        "--n_kv_heads": (None, "N", "key-value heads of every model; must divide its heads"),
        "--out": (None, "DIR", "folder for the report (default: runs/experiment-DATE_TIME)"),
    }
    for option, (default, metavar, text) in options.items():
        shown = "" if default is None else f" (default: {default})"
        several = {"nargs": "+"} if option == "--attn_implementation" else {}
        parser.add_argument(option, default=default, metavar=metavar, help=text + shown, **several)
    parser.add_argument("--compile", action="store_true", help="train with torch.compile; first turns take a while")


def experiment_first(argv: Sequence[str]) -> list[str]:
    """The arguments of main.py with `--experiment KIND`, wherever it stands, as the command that it is.

    Raises:
        ValueError: no KIND.
    """
    argv = list(argv)
    for i, word in enumerate(argv):
        if word == "--experiment":
            if i + 1 == len(argv) or argv[i + 1].startswith("-"):
                raise ValueError("--experiment needs to know how much: --experiment quick, or --experiment full.")
            return ["experiment", argv[i + 1], *argv[:i], *argv[i + 2 :]]
        if word.startswith("--experiment="):
            return ["experiment", word.partition("=")[2], *argv[:i], *argv[i + 1 :]]
    return argv


def run(args: argparse.Namespace) -> int:
    kind, experiment = read_arguments(args)
    folder = make_folder(args.out or Path("runs") / datetime.now().strftime("experiment-%Y-%m-%d_%H%M%S"))
    return run_and_report(experiment, kind, folder)


def run_and_report(experiment: Experiment, kind: str, folder: Path) -> int:
    """Measure, and leave report.json, report.md and the figures; 1 if something failed."""
    about = f"{kind}: {experiment.dtype}{variants_of(experiment)}, {experiment.rounds} rounds"
    for line in [*describe_machine(experiment.device), about]:
        print(line, flush=True)
    with tqdm(total=costs(experiment), smoothing=0.05, **bar_style()) as bar:

        def tick(doing: str, cost: int) -> None:
            bar.set_postfix_str(doing, refresh=False)
            bar.update(cost)

        rows, rounds, peak = run_experiment(experiment, tick)
    report = make_report(experiment, kind, [vars(row) for row in rows], rounds, peak)
    replace_text(folder / "report.json", json.dumps(report, indent=1) + "\n")
    facts, device = report["machine"], experiment.device
    hardware = f"{facts['cpu']}, threads: {facts['threads']}" if device == "cpu" else facts["device"]
    title = f"{{}}: {kind}, {experiment.dtype}{variants_of(experiment)}\n{hardware}, torch {torch.__version__}"
    figures = {
        "costs.png": costs_chart(report["rows"], title=title.format("Training and generation")),
        "rounds.png": rounds_chart(report["rows"], report["rounds"], title=title.format("Every round")),
    }
    for name, figure in figures.items():
        replace_file(folder / name, lambda beside, figure=figure: figure.savefig(beside, format="png", dpi=120))
    replace_text(folder / "report.md", "\n".join(markdown(report, figures)) + "\n")
    print("\n".join(["", *tables(report), *left_out(report["rows"])]))
    if swung := noisy(report["rows"]):
        print(
            f"\n{len(swung)} ratios swung too much to say anything (report.md names them): run it on a quiet machine."
        )
    print(f"\nwritten: {folder}/report.md, report.json, {', '.join(figures)}")
    return 1 if any(row.failed for row in rows) else 0


def variants_of(experiment: Experiment) -> str:
    """What all models have that GPT-2 has not, to stand behind a comma; nothing for GPT-2s."""
    asked = experiment.workloads[0].changes
    return "".join(f", {name} {asked[name]}" for name in (*VARIANTS, "n_kv_heads") if name in asked)


def bar_style() -> dict:
    """Of a progress bar with the time left; into a file, a line now and then."""
    style = {"file": sys.stderr, "bar_format": "{percentage:3.0f}%|{bar:24}| {elapsed}<{remaining} {postfix}"}
    return style | ({"dynamic_ncols": True} if sys.stderr.isatty() else {"mininterval": 10.0})


def read_arguments(args: argparse.Namespace) -> tuple[str, Experiment]:
    """What the arguments ask for.

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

    kind = attempt(kind_of, args)
    device = attempt(check_device, args.device)
    dtype = attempt(dtype_of, args.dtype, device or "cpu")
    rounds = KINDS.get(kind, 1) if args.rounds is None else attempt(whole_number, "rounds", args.rounds, 1)
    seed = attempt(whole_number, "seed", args.seed, 0)
    names = list(measurable())
    if args.attn_implementation is not None:
        names = attempt(implementations, words_of(args.attn_implementation))
    if args.out:
        attempt(check_folder, Path(args.out))
    changes = {name: attempt(choice_of, name, getattr(args, name)) for name in VARIANTS}
    if args.n_kv_heads is not None:
        changes["n_kv_heads"] = attempt(whole_number, "n_kv_heads", args.n_kv_heads, 1)
    changes = {name: value for name, value in changes.items() if value is not None}
    workloads = quick() if kind == "quick" else full(torch.device(device or "cpu").type)
    workloads = [replace(workload, changes={**workload.changes, **changes}) for workload in workloads]
    for workload in workloads:
        attempt(lambda workload=workload: workload.cfg)
    if problems:
        raise ValueError(complaint(list(dict.fromkeys(problems))))
    return kind, Experiment(workloads, names, dtype, device, rounds, seed, args.compile)


def kind_of(args: argparse.Namespace) -> str:
    """quick or full, however it was said."""
    said = {*([args.kind] if args.kind else []), *(kind for kind in KINDS if getattr(args, kind))}
    if not said <= KINDS.keys():
        raise ValueError(f"an experiment is quick or full, got {args.kind!r}.")
    if len(said) > 1:
        raise ValueError("an experiment is quick or full, and both are asked for: leave one out.")
    return said.pop() if said else "quick"


def choice_of(name: str, given: str | None) -> str | None:
    """One of the choices of a cfg key."""
    if given is not None and given not in VARIANTS[name]:
        raise ValueError(f"--{name} must be {' or '.join(VARIANTS[name])}, got {given!r}.")
    return given


def dtype_of(name: str, device: str) -> str:
    if name not in DTYPES:
        raise ValueError(f"--dtype must be one of {', '.join(DTYPES)}, got {name!r}.")
    return resolve_dtype(name, device)


def words_of(given: Sequence[str]) -> list[str]:
    """One word each, whether they were given apart or with commas."""
    return " ".join(given).replace(",", " ").split()


def implementations(words: Sequence[str]) -> list[str]:
    """The names in the registry behind names and aliases, each once, eager first.

    Raises:
        ValueError: one that is unknown, or has no file.
    """
    found = ["eager"]
    for word in words:
        name = canonical_name(word)
        if name not in measurable():
            raise ValueError(f"--attn_implementation: {word} cannot be measured: {', '.join(measurable())} can.")
        found += [name] if name not in found else []
    return found


def make_report(
    experiment: Experiment, kind: str, rows: Sequence[dict], rounds: Sequence[dict], peak: mfu.Peak
) -> dict:
    """Everything, JSON-ready."""
    settings = asdict(experiment) | {"workloads": [str(workload) for workload in experiment.workloads], "kind": kind}
    settings["variants"] = variants_of(experiment).removeprefix(", ")
    return plain({
        "command": shlex.join(["python", *sys.argv]),
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "machine": machine_facts(experiment.device),
        "method": METHOD,
        "settings": settings,
        "workloads": {
            str(workload): {**asdict(workload), "cfg": workload.cfg,
                            "mfu": mfu.explain(workload.cfg, workload.tokens, peak)}
            for workload in experiment.workloads
        },
        "peak": asdict(peak),
        "rows": list(rows),
        "rounds": list(rounds),
    })  # fmt: skip


HEADINGS = {
    "training": ("step, ms", "x eager", "samples/s", "tokens/s", "MFU", "peak MiB", "of it at rest"),
    "generation": ("first token, ms", "x eager", "tokens/s after it", "x eager, time", "peak MiB", "of it at rest"),
}


def cells(row: dict) -> list[str]:
    """A measured row under the headings of its task."""
    at_rest = row["resting_bytes"] / 2**20
    memory = ["-" if row["peak_bytes"] is None else short(at_rest + row["peak_bytes"] / 2**20), short(at_rest)]
    seconds, ratio, rates = row["seconds"], row["over_eager"] or {}, row["rates"]
    if row["task"] == "training":
        speed = [short(rates["samples"]), short(rates["tokens"]), f"{100 * rates['mfu']:.1f} %"]
        return [with_spread(seconds["step"], 1000), with_spread(ratio.get("step")), *speed, *memory]
    first, later = ratio.get("first_token"), ratio.get("later_tokens")
    return [
        with_spread(seconds["first_token"], 1000),
        with_spread(first),
        short(rates["tokens"]),
        with_spread(later),
        *memory,
    ]


def tables(report: dict) -> list[str]:
    """A Markdown table for each task, which reads well on a screen too."""
    lines = []
    for task, headings in HEADINGS.items():
        rows = [row for row in report["rows"] if row["task"] == task and row["not_measured"] is None]
        filled = [[row["workload"], row["implementation"], *cells(row)] for row in rows]
        lines += [f"**{task.capitalize()}**", "", *aligned(("workload", "implementation", *headings), filled), ""]
    return lines


def aligned(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table with columns of one width."""
    widths = [max(map(len, column)) for column in zip(headings, *rows, strict=True)]
    lines = [headings, ["-" * width for width in widths], *rows]
    return [f"| {' | '.join(f'{cell:{width}}' for cell, width in zip(line, widths, strict=True))} |" for line in lines]


def left_out(rows: Sequence[dict]) -> list[str]:
    """What was not measured, once for each reason."""
    reasons: dict[tuple, dict[str, list[str]]] = {}
    for row in (row for row in rows if row["not_measured"]):
        why = (row["implementation"], row["failed"], row["not_measured"])
        reasons.setdefault(why, {}).setdefault(row["task"], []).append(row["workload"])
    everywhere = len({row["workload"] for row in rows})
    lines = []
    for (name, failed, why), tasks in reasons.items():
        places = list(dict.fromkeys(place for found in tasks.values() for place in found))
        about = [
            *([" and ".join(tasks)] if len(tasks) < len(TASKS) else []),
            *(places if len(places) < everywhere else []),
        ]
        lines.append(f"- {name} {'FAILED' if failed else 'not measured'}{': ' * bool(about)}{'; '.join(about)}: {why}")
    return lines


def noisy(rows: Sequence[dict]) -> list[str]:
    """Ratios that say little, since they swung from round to round: another program was busy."""
    found = []
    for row in (row for row in rows if row["over_eager"]):
        name = f"{row['implementation']}, {row['task']}, {row['workload']}"
        for what, ratio in row["over_eager"].items():
            if ratio["upper_quartile"] > NOISY * ratio["lower_quartile"]:
                found.append(f"- {name}, {what.replace('_', ' ')}: x eager {with_spread(ratio)}")
    return found


def markdown(report: dict, figures: Sequence[str]) -> list[str]:
    """report.md."""
    facts, settings, swung = report["machine"], report["settings"], noisy(report["rows"])
    slow = [
        f"- {row['implementation']}, {row['task']}, {row['workload']}: first turn {row['first_seconds']:.1f} s"
        for row in report["rows"]
        if row["seconds"] and row["first_seconds"] > max(1.0, 5 * row["seconds"][list(row["seconds"])[-1]]["median"])
    ]
    return [
        f"# Experiment: {', '.join(filter(None, (settings['kind'], settings['dtype'], settings['variants'])))}", "",
        f"{report['date']}, `{report['command']}`", "",
        f"{facts['device']}; {facts['cpu']}, {facts['cores']} cores, threads: {facts['threads']}; {facts['system']}; "
        + ", ".join(f"{name} {version}" for name, version in facts["versions"].items() if version), "",
        *tables(report),
        *(line for name in figures for line in (f"![{name}]({name})", "")),
        "## How it was measured", "", f"{report['method']} Rounds: {settings['rounds']}.", "",
        *[f"- {workload}: {about['mfu']}" for workload, about in report["workloads"].items()], "",
        "## Not measured", "", *(left_out(report["rows"]) or ["Everything was."]), "",
        *(["## Too noisy to say anything: run it again on a quiet machine", "", *swung, ""] if swung else []),
        *(["## Slow first turns, with what is compiled or loaded once", "", *slow, ""] if slow else []),
        "Every round stands in report.json. Only ratios of one run are worth comparing.",
    ]  # fmt: skip
