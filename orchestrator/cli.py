"""The command line: `python orchestrator/orchestration.py`, `python -m orchestrator [COMMAND]`, and `--help`.

Without a command it is the main job; the commands are files in `orchestrator/commands/`.
"""

import argparse
import sys
from datetime import datetime
from pathlib import Path

from GPT2Model.config import PRESET_ALIASES, PRESETS, complete, from_preset, markdown_table
from orchestrator.answered import answered
from orchestrator.attention_option import requested_attention
from orchestrator.commands import COMMANDS
from orchestrator.evaluation.machine import check_device
from orchestrator.orchestration import cfg, run_smoke_tests
from orchestrator.report import Run
from orchestrator.text.corpora import NAMES, first_tokens, load_corpus, read_text
from orchestrator.training.first_model import TEXT, train_first_model

EXIT_CODES = (
    "Exit codes: 0 every step passed, 1 a step failed, 2 the command or its input was wrong, 130 interrupted,\n"
    "141 nobody read what it printed."
)


def make_parser() -> argparse.ArgumentParser:
    """The arguments of the main job; the cfg keys in its help come from the one table in GPT2Model/config.py."""
    rows = [line.strip("| ").split(" | ") for line in markdown_table().splitlines()[2:]]
    keys = "\n".join(f"  {key.strip('`'):24} {default.strip('`*'):10} {meaning}" for key, default, meaning in rows)
    parser = argparse.ArgumentParser(
        prog="python -m orchestrator",
        description="Assemble GPT-2 from one dict, run it, prove that every way of computing attention gives the same\n"
        "numbers, and (with --train) let a small model learn to write. Each step prints PASS or FAIL.",
        epilog=f"{EXIT_CODES}\n\nThe cfg dict (orchestrator/orchestration.py holds the one that is assembled):\n{keys}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--train", action="store_true", help="after the smoke tests, train a small model and judge it")
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--dataset", default=None, metavar="NAME", help=f"what --train learns: {', '.join(NAMES)} (default: tales)"
    )
    source.add_argument(
        "--text",
        default=None,
        metavar="FILE",
        help="a text file, or a folder of them: read in the smoke tests, and learned",
    )
    presets = ", ".join([*PRESETS, *PRESET_ALIASES])
    parser.add_argument(
        "--preset", default=None, help=f"the model: {presets} (default: gpt2 is assembled, nano is trained)"
    )
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps or auto: the best here (default)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, batches and sampling (default: 0)")
    parser.add_argument(
        "--attn_implementation",
        default=None,
        metavar="NAME",
        help="how attention is computed: auto (default), eager, sdpa, flash_tiled, flash_triton, "
        "flash_attention_2, flash_attention_3, flex_attention, or an alias; `doctor` says which can be used here",
    )
    parser.add_argument("--use_flash_attention", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument(
        "--attn_strict", action="store_true", help="fail, instead of falling back, when NAME cannot serve"
    )
    parser.add_argument(
        "--disable_mps_fix", action="store_true", help="allow sdpa on Apple's MPS, where it gave NaN with left padding"
    )
    parser.add_argument("--max_steps", type=int, default=None, help="training steps, instead of the recipe's")
    parser.add_argument(
        "--out", default=None, metavar="DIR", help="folder for report.json, figures and model (default: runs/DATE_TIME)"
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands, instead of the main job")
    for name, command in COMMANDS.items():
        subparser = commands.add_parser(
            name,
            help=command.HELP,
            description=command.__doc__,
            epilog=EXIT_CODES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_arguments(subparser)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the main job, or a command; the exit code (see EXIT_CODES) is returned."""
    return answered(lambda: run_arguments(argv))


def run_arguments(argv: list[str] | None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["train"]:  # its options are a dataclass, and tyro reads them
        return COMMANDS["train"].run_command(argv[1:])
    args = make_parser().parse_args(argv)
    return COMMANDS[args.command].run(args) if args.command else run_main_job(args)


def run_main_job(args: argparse.Namespace) -> int:
    if args.max_steps is not None and args.max_steps < 1:
        raise ValueError(f"--max_steps must be 1 or more, got {args.max_steps}.")
    if not 0 <= args.seed < 2**32:
        raise ValueError(f"--seed must be from 0 to {2**32 - 1}, got {args.seed}.")
    device = check_device(args.device)
    attention = {
        "attn_implementation": requested_attention(args),
        "attn_strict": args.attn_strict,
        "disable_mps_fix": args.disable_mps_fix,
    }
    assembled = {**cfg, **attention} if args.preset is None else from_preset(args.preset, **attention)
    text = args.text or (args.dataset if args.dataset not in (None, "tales") else "python-docs")
    corpus = args.text or args.dataset or "tales"
    preset = args.preset or "nano"
    look_first(complete(assembled), text, corpus if args.train else None, preset)
    run = Run(args.out or Path("runs") / datetime.now().strftime("%Y-%m-%d_%H%M%S"))
    try:
        run_smoke_tests(assembled, text=text, device=device, seed=args.seed, run=run)
        if args.train:
            run.heading(f"A {preset} model learns {corpus}")
            train_first_model(
                run,
                corpus_name=corpus,
                preset=preset,
                device=device,
                seed=args.seed,
                attention=attention,
                max_steps=args.max_steps,
            )
    except BaseException as error:
        run.close(error, arguments=vars(args), device=device)
        raise
    run.close(arguments=vars(args), device=device)
    return 0 if run.passed else 1


def look_first(cfg: dict, text: str, corpus: str | None, preset: str) -> None:
    """Raise for what is wrong with a text or a corpus before the work, which takes minutes, and not after it."""
    first_tokens(read_text(text), batch=2, tokens=min(256, cfg["context_length"]), name=text)
    if corpus is not None:
        load_corpus(corpus, from_preset(preset)["context_length"]).batch(0, TEXT.batch_size)


def markdown_reference() -> str:
    """The command reference that stands in the README: every command, every option."""
    parser = make_parser()
    commands = next(action.choices for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    lines = []
    for name, of in {"": parser, **commands}.items():
        if name == "train":
            from orchestrator.training import options

            lines += ["", f"**`python train.py`**, or `python -m orchestrator train`: {COMMANDS[name].HELP}", ""]
            lines.append(options.markdown_table())
            continue
        help_line = COMMANDS[name].HELP if name else "the main job: the smoke tests, and with --train a small model"
        lines += ["", f"**`python -m orchestrator{' ' * bool(name)}{name}`**: {help_line}", "", "| option | meaning |"]
        lines.append("| --- | --- |")
        for action in of._actions:
            if name and not action.option_strings:
                many = " ..." if action.nargs in ("*", "+") else ""
                lines.append(f"| `{action.metavar or action.dest.upper()}{many}` | {action.help} |")
            if action.option_strings and action.help != argparse.SUPPRESS and "--help" not in action.option_strings:
                values = action.metavar or ("\\|".join(action.choices) if action.choices else "")
                values = values or ("" if action.nargs == 0 else action.dest.upper())
                lines.append(f"| `{' '.join([action.option_strings[-1], values]).strip()}` | {action.help} |")
    return "\n".join(lines[1:])
