"""A trained model continues your text, and shows it as it is written.

    python -m orchestrator generate --model runs/tales --prompt "One morning"
    python -m orchestrator generate --model gpt2 --prompt "The sea was" --temperature 0.7 --top_p 0.95 --seed 1
    python -m orchestrator generate --model gpt2 --prompt "Once" --prompt "Twice" --n 3 --stop "." --json
    python -m orchestrator generate --model gpt2-large --draft_model gpt2 --prompt "It is" --temperature 0
    cat question.txt | python -m orchestrator generate --model gpt2 --prompt_file -
    python -m orchestrator generate --model tales --interactive

What is written stands on stdout, and nothing else; how long it took stands on stderr. Of several texts the first is
shown as it grows, the others when they are complete. With --interactive you give a prompt at a time: Ctrl-C stops the
answer, Ctrl-D or /quit ends the program, and /set temperature 0.5 changes a setting. There the seed counts on from one
prompt to the next.
"""

import argparse
import contextlib
import json
import re
import sys
from pathlib import Path

from CMHA.choosing import canonical_name
from GPT2Model.text_generation import generate_text
from orchestrator.opened import DTYPE_NAMES, SOURCES, open_model, resolve_dtype
from orchestrator.report import plain
from orchestrator.training.precision import native_bf16
from orchestrator.writing.clock import Clock
from orchestrator.writing.guesses import Guesses
from orchestrator.writing.interactive import converse
from orchestrator.writing.page import Page, as_data
from orchestrator.writing.settings import OPTIONS, WritingSettings, changed
from orchestrator.writing.words import in_words_of_the_command

HELP = "a trained model continues a text, shown as it is written; also at a prompt of its own"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Numbers are read as text, so that everything that is wrong can be said at once."""
    parser.add_argument("--model", default=None, metavar="MODEL", help=SOURCES)
    parser.add_argument(
        "--prompt", action="append", default=[], metavar="TEXT", help="what to continue; may be given several times"
    )
    parser.add_argument(
        "--prompt_file",
        action="append",
        default=[],
        metavar="FILE",
        help="a prompt from a UTF-8 file, without the line end at its end; - is stdin",
    )
    parser.add_argument("--interactive", action="store_true", help="ask for one prompt after the other")
    for name, (_, metavar, text) in OPTIONS.items():
        default = getattr(WritingSettings, name)
        shown = "" if default is None else f" (default: {default})"
        parser.add_argument(f"--{name}", default=None, metavar=metavar, help=text.replace("%", "%%") + shown)
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be given several times"
    )
    parser.add_argument(
        "--no_start_mark",
        action="store_true",
        help="leave out the end-of-text mark that is put before a prompt for a model of the tales, whose stories begin "
        "behind it (for other models none is put there)",
    )
    parser.add_argument("--no_cache", action="store_true", help="read the whole text anew for each token: slow")
    parser.add_argument(
        "--attn_implementation", default=None, metavar="NAME", help="auto, eager, sdpa, paged_attention, ..."
    )
    parser.add_argument(
        "--dtype",
        default="float32",
        metavar="NAME",
        help=f"{', '.join(DTYPE_NAMES)}, or bf16, fp16, fp32 (default: float32)",
    )
    parser.add_argument("--int8", action="store_true", help="the large matrices in 8 bits")
    parser.add_argument("--draft_model", default=None, metavar="MODEL", help="a smaller model that guesses ahead")
    parser.add_argument("--device", default="auto", help="cpu, cuda, mps or auto: the best here (default)")
    parser.add_argument("--json", action="store_true", help="print one JSON object, and nothing else, on stdout")


def run(args: argparse.Namespace) -> int:
    with in_words_of_the_command():
        settings = read_settings(args)
        prompts = read_prompts(args)
        with contextlib.redirect_stdout(sys.stderr):  # a model that is trained first says so
            model, tokenizer = opened(args)
            draft = opened_draft(args, tokenizer)
        if args.interactive:
            return converse(model, tokenizer, settings, draft, first=prompts)
        write(args, model, tokenizer, draft, prompts, settings)
    return 0


def write(args: argparse.Namespace, model, tokenizer, draft, prompts: list[str], settings: WritingSettings) -> None:
    """All completions of all prompts, and a line on stderr about the time."""
    read, guesses = settings.opened(prompts, tokenizer), Guesses()
    sampling, clock = settings.sampling(), Clock(settings.n, model.cfg["context_length"])
    page = None if args.json else Page(prompts, settings.n, tokenizer)
    found = generate_text(
        model, tokenizer, read, sampling=sampling, **settings.arguments(model, tokenizer, read), draft=draft,
        on_text=page and page.show, on_token=clock.token, on_draft=guesses.add,
    )  # fmt: skip
    clock.stop()
    drawn = None if sampling.greedy else sampling.seed
    if page is None:
        completions = [as_data(one, prompts[i // settings.n], tokenizer) for i, one in enumerate(found)]
        facts = {
            "model": args.model,
            "seed": drawn,
            **clock.facts(found),
            **guesses.facts(),
            "completions": completions,
        }
        print(compact(json.dumps(plain(facts), indent=1)))
    else:
        page.finish(found)
    said = [clock.line(found), *guesses.lines(), *([] if drawn is None else [f"seed {drawn}"])]
    print("; ".join(said), file=sys.stderr)


def compact(written: str) -> str:
    """JSON with every list of ids in a line. (No text can look like one: a line end in a text is written as \\n.)"""
    return re.sub(r"\[\n\s*(\d+(?:,\n\s*\d+)*)\n\s*\]", lambda ids: f"[{', '.join(ids[1].split())}]".replace(",,", ","),
                  written)  # fmt: skip


def read_settings(args: argparse.Namespace) -> WritingSettings:
    """How to write.

    Raises:
        ValueError: everything that is wrong with the options, before a model is read.
    """
    given = {name: getattr(args, name) for name in OPTIONS if getattr(args, name) is not None}
    problems = []
    if args.model is None:
        problems.append(f"--model is missing: {SOURCES}.")
    if not args.prompt and not args.prompt_file and not args.interactive:
        problems.append("there is no prompt: --prompt TEXT, --prompt_file FILE (- is stdin), or --interactive.")
    if args.interactive and args.json:
        problems.append("--json prints one object at the end, and --interactive has no end: leave one of them out.")
    if args.interactive and "-" in args.prompt_file:
        problems.append("--interactive reads its prompts from stdin: leave out --prompt_file -.")
    if args.draft_tokens is not None and args.draft_model is None:
        problems.append("--draft_tokens is of a model that guesses ahead: name it with --draft_model, or leave it out.")
    if args.draft_model is not None and asks_for_pages(args.attn_implementation):
        problems.append(
            f"--attn_implementation {args.attn_implementation} has no pages for a model that guesses ahead: leave it "
            "or --draft_model out."
        )
    start = WritingSettings(
        stop=tuple(args.stop), use_cache=not args.no_cache, start_mark=not args.no_start_mark
    )  # fmt: skip
    settings, wrong = changed(start, given, draft=args.draft_model is not None)
    problems += wrong
    if problems:
        listed = "\n".join(["these arguments are wrong:", *(f"  - {problem}" for problem in problems)])
        raise ValueError(listed if problems[1:] else problems[0])
    return settings


def read_prompts(args: argparse.Namespace) -> list[str]:
    """All prompts, those of files behind the others.

    Raises:
        FileNotFoundError, ValueError: a file that is not there, or not UTF-8.
    """
    found = list(args.prompt)
    for name in args.prompt_file:
        try:
            text = sys.stdin.read() if name == "-" else Path(name).read_text(encoding="utf-8")
        except FileNotFoundError:
            raise FileNotFoundError(f"--prompt_file {name}: there is no such file.") from None
        except IsADirectoryError:
            raise ValueError(f"--prompt_file {name} is a folder: name a file in it.") from None
        except UnicodeDecodeError as error:
            raise ValueError(f"--prompt_file {name} is no UTF-8 text (byte {error.start}): save it as UTF-8.") from None
        except OSError as error:
            raise ValueError(f"--prompt_file {name} cannot be read: {error.strerror}.") from None
        found.append(text.removesuffix("\n"))
    return found


def opened(args: argparse.Namespace):
    """The model and its tokenizer, and a word on what will be slow."""
    dtype = resolve_dtype(args.dtype, args.device)
    model, tokenizer = open_model(
        args.model, device=args.device, dtype=dtype, int8=args.int8, attn_implementation=args.attn_implementation
    )
    device = model.token_embedding.weight.device
    if dtype == "bfloat16" and not native_bf16(str(device)):
        print(f"note: this {device.type} emulates bfloat16: --dtype float32 is faster here.", file=sys.stderr)
    return model, tokenizer


def asks_for_pages(attn_implementation: str | None) -> bool:
    try:
        return attn_implementation is not None and canonical_name(attn_implementation) == "paged_attention"
    except ValueError:  # no such name: said when the model is opened
        return False


def opened_draft(args: argparse.Namespace, tokenizer):
    """The model that guesses ahead; None: there is none.

    Raises:
        ValueError: it was trained with another tokenizer.
    """
    if args.draft_model is None:
        return None
    dtype = resolve_dtype(args.dtype, args.device)
    draft, own = open_model(args.draft_model, device=args.device, dtype=dtype, announced=False)
    if words(own) != words(tokenizer):
        raise ValueError(
            f"{args.draft_model} was trained with another tokenizer than {args.model}: its guesses would mean "
            "something else. Take a draft with the same one."
        )
    return draft


def words(tokenizer) -> list[str]:
    """The text of every id."""
    return [tokenizer.decode([i]) for i in range(tokenizer.vocab_size)]
