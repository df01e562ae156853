"""WritingSettings: how a text is to be written, read from what a user typed; all that is wrong is said at once.

The options of `python -m orchestrator generate` and the `/set` of its `--interactive` are the same table.
"""

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace

from CMHA.choosing import did_you_mean
from GPT2Model.generation import PAST_CONTEXT
from GPT2Model.prompts import read_prompts
from GPT2Model.sampling import Sampling
from GPT2Model.text_generation import problems_of_draft, problems_of_text
from GPT2Model.tokenizer import END_OF_TEXT
from orchestrator.text.tales import TalesTokenizer

NONE = "none"
NEW_TOKENS = 100
OPTIONS = {  # name -> what it holds, its letter in --help, what it means. The defaults are those of the dataclass.
    "max_new_tokens": (
        int,
        "N",
        f"tokens to write, at most (default: {NEW_TOKENS}, or as many as fit into the context)",
    ),
    "temperature": (float, "X", "0: always the likeliest token; 1: the model's own distribution"),
    "top_k": (int, "K", "draw from the K likeliest tokens only"),
    "top_p": (float, "P", "draw from the fewest likeliest tokens whose chances sum to P"),
    "min_p": (float, "P", "draw from tokens at least P times as likely as the likeliest"),
    "repetition_penalty": (float, "X", "above 1, tokens that were read or written become less likely"),
    "n": (int, "N", "samples of each prompt"),
    "seed": (
        int,
        "S",
        "of the draws: sample J of prompt I, counted from 0, takes S + I * n + J; none: a new one. stderr names it",
    ),
    "logprobs": (int, "K", "note each token's log-probability, and the K likeliest"),
    "past_context": (str, "NAME", "error, or slide: what to do with more tokens than the model's context"),
    "draft_tokens": (int, "N", "with --draft_model: tokens that it guesses in a round"),
}


@dataclass(frozen=True)
class WritingSettings:
    """What `generate_text` is asked for, but for the model and the prompt. Each is described in `OPTIONS`."""

    max_new_tokens: int | None = None
    temperature: float = 0.8
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    n: int = 1
    seed: int | None = None
    logprobs: int | None = None
    past_context: str = "error"
    draft_tokens: int = 4
    stop: tuple[str, ...] = ()
    use_cache: bool = True
    start_mark: bool = True

    def sampling(self, taken: int = 0) -> Sampling:
        """How tokens are chosen; where the settings have no seed, with a new one each time.

        Args:
            taken: how many samples came before: their seeds are used up.
        """
        named = {field.name: getattr(self, field.name) for field in fields(Sampling)}
        return Sampling(**named | {"seed": secrets.randbelow(2**31) if self.seed is None else self.seed + taken})

    def opened(self, prompts: Sequence[str], tokenizer) -> list[str]:
        """The prompts as the model reads them: behind the mark that its texts begin with in training, if they do."""
        mark = END_OF_TEXT if self.start_mark and begins_with_mark(tokenizer) else ""
        return [prompt if prompt.startswith(END_OF_TEXT) else mark + prompt for prompt in prompts]

    def arguments(self, model, tokenizer, prompts: str | Sequence[str]) -> dict:
        """The others, as `generate_text` takes them for these prompts."""
        names = ("n", "logprobs", "past_context", "draft_tokens", "stop", "use_cache")
        new = self.max_new_tokens
        if new is None:
            longest = max([len(row) for row in read_prompts(prompts, tokenizer)[0]], default=0)
            room = NEW_TOKENS if self.past_context == "slide" else model.cfg["context_length"] - longest
            new = max(1, min(NEW_TOKENS, room))  # 1 where nothing fits: then generate_text says so
        return {"max_new_tokens": new} | {name: getattr(self, name) for name in names}

    def problems(self, draft: bool = False) -> list[str]:
        """Everything that makes no sense, as far as it can be said without the model."""
        sampling = self.sampling()
        found = [*sampling.problems(), *problems_of_text(sampling, self.n, self.stop, self.logprobs)]
        if self.max_new_tokens is not None and self.max_new_tokens < 0:
            found.append(f"max_new_tokens must be 0 or more, got {self.max_new_tokens}.")
        if self.past_context not in PAST_CONTEXT:
            found.append(f"past_context must be {' or '.join(PAST_CONTEXT)}, got {self.past_context!r}.")
        if self.draft_tokens < 1:
            found.append(f"draft_tokens must be 1 or more, got {self.draft_tokens}.")
        return found + (problems_of_draft(self.logprobs, self.use_cache, self.past_context) if draft else [])


def begins_with_mark(tokenizer) -> bool:
    """Whether a model with this tokenizer has seen the beginning of a text only behind the end-of-text mark.

    So it is with the tales, where every story is read by itself and all begin alike. Elsewhere a text is cut anywhere.
    """
    return isinstance(tokenizer, TalesTokenizer) or getattr(tokenizer, "name", None) == "tales"


def changed(
    settings: WritingSettings, texts: Mapping[str, str], draft: bool = False
) -> tuple[WritingSettings, list[str]]:
    """The settings with what a user typed for some of them, and everything that is wrong with that.

    Args:
        settings: as they are; they stay as they are.
        texts: option -> value, as text; "none" for an option that may be left open.
        draft: whether a draft model guesses ahead.
    """
    values, problems = {}, []
    for name, text in texts.items():
        try:
            values[name] = value_of(name, text)
        except ValueError as error:
            problems.append(str(error))
    found = replace(settings, **values)
    return found, problems + found.problems(draft)


def value_of(name: str, text: str) -> object:
    """The value of one option.

    Raises:
        ValueError: no such option, or a text that is no value of it.
    """
    if name not in OPTIONS:
        raise ValueError(f"there is no setting {name!r}.{did_you_mean(name, OPTIONS)} Settings: {', '.join(OPTIONS)}.")
    kind = OPTIONS[name][0]
    if kind is str:
        return text
    open_ = getattr(WritingSettings, name) is None
    if open_ and text.lower() == NONE:
        return None
    try:
        return kind(text)
    except ValueError:
        what = {int: "a whole number", float: "a number"}[kind] + (f", or {NONE}" if open_ else "")
        raise ValueError(f"{name} must be {what}, got {text!r}.") from None
