"""Turn a text into token shards once, in parallel, so that training starts at once and reads them from the disk.

    python -m orchestrator prepare wikitext                                  where train.py will look for it
    python -m orchestrator prepare book.txt --tokenizer char --out data/book
    python -m orchestrator prepare "corpus/*.jsonl" --tokenizer gpt2 --out data/corpus --workers 8

train.py does this by itself for a text that it has not seen yet; for a large one it is better done before, on a machine
that costs less. It can be interrupted at any moment, also killed: the same command keeps the finished shards and makes
the missing ones, with the same result as without the interruption, whatever the number of processes.

A data set without a validation split of its own has a part held out: whole documents, evenly spread; of a text in one
piece the last part, as nanoGPT does. The folder has a manifest.json that says what is in it.
"""

import argparse
import shlex
import time
from collections.abc import Callable
from pathlib import Path

from orchestrator.text.documents import NAMES, find_source
from orchestrator.text.encoding import cores
from orchestrator.text.prepare import MANIFEST, UNFINISHED, VALIDATION_PART, Prepared, check_tokenizer, prepare
from orchestrator.text.samples import cache_folder

HELP = "turn a text into token shards: once, in parallel, restartable"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Numbers are read as text, so that everything that is wrong can be said at once."""
    parser.add_argument(
        "name", nargs="?", default=None, metavar="DATASET", help=f"{', '.join(NAMES)}; a file, a folder or a glob"
    )
    parser.add_argument("--dataset", default=None, metavar="DATASET", help="the same, written as train.py has it")
    parser.add_argument("--tokenizer", default="gpt2", metavar="NAME", help="gpt2 (default), char or bytes")
    parser.add_argument(
        "--out",
        default=None,
        metavar="DIR",
        help="folder for the shards (default: under --data_dir, where train.py looks)",
    )
    parser.add_argument(
        "--workers", default=None, metavar="N", help="processes; the shards stay the same (default: one for each core)"
    )
    parser.add_argument(
        "--validation_part",
        default=str(VALIDATION_PART),
        metavar="X",
        help=f"how much is held out, if the data set has no validation split (default: {VALIDATION_PART})",
    )
    parser.add_argument("--data_dir", default="data", metavar="DIR", help="where data sets lie (default: data)")


def run(args: argparse.Namespace) -> int:
    dataset, part, workers = read_arguments(args)
    say = lambda line: print(line, flush=True)  # noqa: E731
    source = find_source(dataset, Path(args.data_dir))
    folder = Path(args.out) if args.out else cache_folder(source, args.tokenizer, part, args.data_dir, say)
    finished = (folder / MANIFEST).is_file()
    kept = len(list(folder.glob("*.tokens"))) if (folder / UNFINISHED).is_file() and not finished else 0
    if kept:
        say(f"going on from {kept} finished shard{'s' * (kept != 1)} in {folder}")
    start = time.perf_counter()
    prepared = prepare(source, args.tokenizer, folder, workers=workers, validation_part=part)
    seconds = time.perf_counter() - start
    say("\n".join(described(prepared)))
    if finished:
        say("it was there already")
    else:
        tokens = prepared.train_tokens + prepared.validation_tokens
        rate = "" if kept else f", {tokens / seconds:,.0f} tokens/s"
        processes = workers or cores()
        say(f"{seconds:.1f} s{rate}, at most {processes} process{'es' * (processes != 1)}")
    say(f"train on it: python train.py --dataset {shlex.quote(str(folder))}")
    return 0


def read_arguments(args: argparse.Namespace) -> tuple[str, float, int | None]:
    """(data set, validation part, workers).

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

    if args.name is None and args.dataset is None:
        problems.append(f"which text? Name a data set ({', '.join(NAMES)}), a file, a folder or a glob.")
    if args.name is not None and args.dataset not in (None, args.name):
        problems.append(f"two data sets are named, {args.name} and --dataset {args.dataset}: leave one out.")
    attempt(check_tokenizer, args.tokenizer)
    workers = None if args.workers is None else attempt(whole_number, "workers", args.workers)
    part = attempt(fraction, "validation_part", args.validation_part)
    if problems:
        heading = "" if len(problems) == 1 else f"{len(problems)} things are wrong:\n  "
        raise ValueError(heading + "\n  ".join(problems))
    return args.name or args.dataset, part, workers


def whole_number(option: str, text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise ValueError(f"--{option} must be a whole number, 1 or more, got {text!r}.")
    return int(text)


def fraction(option: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value <= 0.5:
        raise ValueError(f"--{option} must be a number above 0 and at most 0.5, such as 0.1, got {text!r}.")
    return value


def described(prepared: Prepared) -> list[str]:
    """What was made, in a few lines."""
    text, part = prepared.manifest["text"], prepared.manifest["settings"]["validation_part"]
    held_out = {
        "own": "the validation split of the data set",
        "documents": f"whole documents, evenly spread, about {part:.0%}" if part else "",
        "text": f"the last {part:.0%} of the text" if part else "",
    }[text["split"]]
    documents = f"{text['documents']:,} document{'s' * (text['documents'] != 1)}"
    rows = [("training", prepared.train_tokens, prepared.train, ""),
            ("validation", prepared.validation_tokens, prepared.validation, f": {held_out}")]  # fmt: skip
    width = len(f"{prepared.train_tokens:,}")
    return [
        f"{prepared.name}: {documents}, {text['characters']:,} characters, in {prepared.folder}",
        *(
            f"  {name:10} {tokens:{width},} tokens in {len(shards)} shard{'s' * (len(shards) != 1)}{note}"
            for name, tokens, shards, note in rows
        ),
        f"  tokenizer {prepared.tokenizer.name}, vocabulary {prepared.tokenizer.vocab_size:,}, "
        f"{prepared.manifest['totals']['bytes_per_token']:.2f} bytes per token",
    ]
