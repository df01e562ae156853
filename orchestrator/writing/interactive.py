"""converse(): one prompt after the other, each answered as it is written. `generate --interactive` calls it.

Each prompt stands alone: a model of this kind continues a text, and knows nothing of the ones before.
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress

from GPT2Model.text_generation import generate_text
from orchestrator.writing.clock import Clock
from orchestrator.writing.guesses import Guesses
from orchestrator.writing.page import Page
from orchestrator.writing.settings import OPTIONS, WritingSettings, changed
from orchestrator.writing.words import in_words_of_the_command

HELP = """/set NAME VALUE   change a setting, as: /set temperature 0.5   (none: leave it open)
/show             the settings
/help             these lines
/quit             end, as Ctrl-D does; Ctrl-C stops an answer
//TEXT            a prompt that begins with /
The seed counts on: prompt I, from 0, takes seed + I (with n samples each: + I * n + J); /set seed S begins again."""


def converse(model, tokenizer, settings: WritingSettings, draft=None, first: Sequence[str] = ()) -> int:
    """Read prompts from stdin until it ends, and write what the model makes of each to stdout.

    Args:
        model, tokenizer, draft: as `generate_text` takes them.
        settings: to begin with.
        first: prompts to answer before the first is asked for.
    Returns:
        the exit code, 0.
    """
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="replace")
    if sys.stdin.isatty():
        with suppress(ImportError):
            import readline  # noqa: F401  input() then has a history and can be edited
        say("A prompt and Enter; /help says more, /quit or Ctrl-D ends.")
    taken = 0  # samples since the seed was set: each has a seed of its own
    for line in lines(first):
        try:
            if line in ("/quit", "/exit"):
                break
            if line.startswith("/") and not line.startswith("//"):
                with in_words_of_the_command(conversation=True):
                    settings = command(line, settings, draft is not None)
                taken = 0 if line.split()[:2] == ["/set", "seed"] else taken
            elif line.strip():
                prompt = line.removeprefix("/") if line.startswith("//") else line
                with in_words_of_the_command(conversation=True):
                    answer(model, tokenizer, prompt, settings, draft, taken)
                taken += settings.n
        except KeyboardInterrupt:
            print(flush=True)
            say("stopped")
        except (ValueError, TypeError) as error:  # of this prompt; the next may be better
            say(f"error: {error}")
    return 0


def lines(first: Sequence[str]) -> Iterator[str]:
    """The lines of stdin, without their ends. Ctrl-C while one is typed throws it away."""
    yield from first
    while True:
        try:
            yield input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        except KeyboardInterrupt:
            print(flush=True)
            say("/quit or Ctrl-D ends")


def answer(model, tokenizer, prompt: str, settings: WritingSettings, draft, taken: int = 0) -> None:
    """Write, and show it meanwhile. taken: samples that were written before."""
    clock, page = Clock(settings.n, model.cfg["context_length"]), Page([prompt], settings.n, tokenizer)
    read, sampling, guesses = settings.opened([prompt], tokenizer), settings.sampling(taken), Guesses()
    found = generate_text(
        model, tokenizer, read, sampling=sampling, **settings.arguments(model, tokenizer, read), draft=draft,
        on_text=page.show, on_token=clock.token, on_draft=guesses.add,
    )  # fmt: skip
    clock.stop()
    page.finish(found)
    seed = [] if sampling.greedy else [f"seed {sampling.seed}"]
    say("; ".join([clock.line(found), *guesses.lines(), *seed]))


def command(line: str, settings: WritingSettings, draft: bool) -> WritingSettings:
    """What a line that begins with / asks for; the settings, changed or not.

    Raises:
        ValueError: no such command, or a setting that makes no sense.
    """
    name, *words = line.split(maxsplit=2)
    if name == "/set" and len(words) == 2:
        settings, problems = changed(settings, {words[0]: words[1]}, draft)
        if problems:
            raise ValueError("\n".join(problems))
        say(f"{words[0]} = {shown(settings, words[0])}")
    elif name == "/show" and not words:
        say("\n".join(f"{option} = {shown(settings, option)}" for option in OPTIONS))
    elif name == "/help":
        say(f"{HELP}\nSettings: {', '.join(OPTIONS)}.")
    else:
        raise ValueError(f"{line!r} is no command.\n{HELP}")
    return settings


def shown(settings: WritingSettings, option: str) -> object:
    value = getattr(settings, option)
    return "none" if value is None else value


def say(text: str) -> None:
    """To stderr: stdout holds what the model wrote."""
    print(text, file=sys.stderr, flush=True)
