"""generate_text(): from prompts to texts. Tokenizer, batch, stop strings, samples, log-probabilities, streaming.

The loop is generate()'s own (`GPT2Model/generation.py`); here stands what makes ids of text before it and text of ids
behind it. All prompts are read in one batch, the shorter ones padded on the left. For many requests that come and go at
their own times there is the engine in `orchestrator/serving/`.
"""

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import asdict
from numbers import Integral
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from GPT2Model.completion import Completion, FinishReason, TokenLogprobs, token_logprobs
from GPT2Model.generation import as_set, check_model, for_row, generate, problems_of, too_long
from GPT2Model.prompts import left_padded, read_each
from GPT2Model.sampling import GREEDY, Sampling
from GPT2Model.text_stream import TextStream, check_stop_strings

if TYPE_CHECKING:
    from GPT2Model.speculative import SpeculativeResult

Prompts = str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]] | Tensor


def generate_text(
    model,
    tokenizer,
    prompts: Prompts,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    *,
    n: int = 1,
    stop: str | Iterable[str] = (),
    stop_tokens: int | Collection[int] | None = None,
    logprobs: int | None = None,
    on_text: Callable[[int, str], None] | None = None,
    on_token: Callable[[int, int], None] | None = None,
    past_context: str = "error",
    use_cache: bool = True,
    draft=None,
    draft_tokens: int = 4,
    on_draft: Callable[[int, "SpeculativeResult"], None] | None = None,
) -> list[Completion]:
    """Continue each prompt by up to `max_new_tokens` tokens, `n` times.

    Args:
        model: a GPTModel.
        tokenizer: the one that it was trained with: `encode`, `decode`, `end_of_text`. None: ids in, and ids out.
        prompts: a text, or several; or the token ids of one or several. Their lengths may differ.
        max_new_tokens: for each completion.
        sampling: how tokens are chosen; the default is greedy. Sample j of prompt i is drawn with seed
            `sampling.seed + i * n + j` by a generator of its own: on one machine it is the same again, whatever else is
            in the batch.
        n: samples of each prompt.
        stop: a text, or several. A completion ends where one of them would begin. (Which, if several: `TextStream`.)
        stop_tokens: ids that end a completion; None: the tokenizer's end of text, where the model has that id.
        logprobs: how many of the likeliest tokens to note at each place, beside the chosen one; None: note nothing.
        on_text: called with the number of the completion and the next piece of its text, as soon as it may be shown.
        on_token: called with the number of the completion and each of its token ids, before on_text. A completion that
            has ended is not heard of again by either.
        past_context, use_cache: as in `generate`.
        draft: a smaller model with the same vocabulary, which guesses ahead (`GPT2Model/speculative.py`): the same
            distribution, and greedily the same text, in fewer passes of the model. One sequence at a time.
        draft_tokens: how many tokens it guesses in a round.
        on_draft: called with the number of each completion that a draft helped to write, and what its guesses were
            worth.
    Returns:
        the completions: n of the first prompt, n of the second, and so on.
    Raises:
        TypeError: what is no model. ValueError: every other argument that makes no sense, at once.
    """
    check_model(model)
    vocab_size, stop = model.cfg["vocab_size"], as_texts(stop)
    if tokenizer is not None and not (hasattr(tokenizer, "encode") and hasattr(tokenizer, "decode")):
        raise TypeError(
            f"the tokenizer comes second and must have encode and decode, got {type(tokenizer).__name__}: the one that "
            "the model was trained with, or None for token ids alone."
        )
    found, problems = read_each(prompts, tokenizer)
    rows = [row for row in found if row is not None]
    if stop_tokens is None:
        end = getattr(tokenizer, "end_of_text", None)
        stop_tokens = () if end is None or end >= vocab_size else end
    stops = as_set(stop_tokens)
    batch = left_padded([row for row in rows if row] or [[0]])[0]
    # Which prompt is too long is said below, and with a draft for both models.
    allowed = "slide" if past_context == "error" else past_context
    problems += problems_of(model, batch, max_new_tokens, sampling, stops, past_context=allowed)
    if past_context == "error" and draft is None and isinstance(max_new_tokens, Integral):
        problems += problems_of_lengths(model, found, max(0, max_new_tokens))
    about_text = {"vocab_size": vocab_size, "on_text": on_text, "only_ids": tokenizer is None}
    problems += problems_of_text(sampling, n, stop, logprobs, **about_text)
    if draft is not None:
        problems += problems_of_draft(logprobs, use_cache, past_context)
        check_model(draft)
        problems += problems_of_pairs(model, draft, found, max_new_tokens, draft_tokens)
    if problems:
        raise ValueError("this text cannot be written:\n" + "\n".join(f"  - {problem}" for problem in problems))

    rows = [row for row in rows for _ in range(n)]
    texts = [GrowingText(row, tokenizer, stop, stops, logprobs) for row in rows]

    def show(index: int, piece: str) -> None:
        if piece and on_text is not None:
            on_text(index, piece)

    def take(index: int, token: int, logits: Tensor | None = None) -> None:
        if on_token is not None:
            on_token(index, token)
        show(index, texts[index].add(token, logits))

    def after_step(logits: Tensor, chosen: Tensor) -> Tensor:
        for index, (text, token) in enumerate(zip(texts, chosen.tolist(), strict=True)):
            if text.finish_reason is None:
                take(index, token, logits[index])
        return torch.tensor([text.finish_reason is not None for text in texts], device=chosen.device)

    if draft is None:
        ids, padding_mask = left_padded(rows, model.token_embedding.weight.device)
        generate(
            model, ids, max_new_tokens, **asdict(sampling), padding_mask=padding_mask, use_cache=use_cache,
            past_context=past_context, on_step=after_step,
        )  # fmt: skip
    else:
        for index, result in speculate(model, draft, draft_tokens, texts, max_new_tokens, sampling, take):
            if on_draft is not None:
                on_draft(index, result)
    for index, text in enumerate(texts):
        show(index, text.end("length"))
    return [text.completion() for text in texts]


class GrowingText:
    """One completion while it is written.

    Args:
        prompt_ids: what was read.
        tokenizer: None: no text, only ids.
        stop, stop_tokens: what ends it.
        logprobs: how many of the likeliest tokens to note; None: note nothing.
    Attributes:
        finish_reason: None while it grows.
        error: what went wrong with it; None: nothing.
    """

    def __init__(
        self, prompt_ids: list[int], tokenizer, stop: str | Sequence[str], stop_tokens: set, logprobs: int | None
    ):
        self.prompt_ids, self.ids, self.stop_tokens = prompt_ids, [], stop_tokens
        self.stream = None if tokenizer is None else TextStream(tokenizer, stop)
        self.top, self.logprobs = logprobs, None if logprobs is None else []
        self.finish_reason: FinishReason | None = None
        self.error: str | None = None

    def add(self, token: int, logits: Tensor | None = None) -> str:
        """The next token, and what may be shown of the text now."""
        self.ids.append(token)
        if self.logprobs is not None:
            self.logprobs.append(token_logprobs(logits, token, self.top))
        if token in self.stop_tokens:
            return self.end("stop")
        piece = "" if self.stream is None else self.stream.push(token)
        if self.stream is not None and self.stream.stopped:
            self.finish_reason = "stop"
        return piece

    def end(self, reason: FinishReason) -> str:
        """No token follows: the rest of the text. One that has ended already stays as it is."""
        if self.finish_reason is not None:
            return ""
        rest = "" if self.stream is None else self.stream.finish()
        self.finish_reason = "stop" if self.stream is not None and self.stream.stopped else reason
        return rest

    def completion(self) -> Completion:
        text = None if self.stream is None else self.stream.text
        noted: list[TokenLogprobs] | None = self.logprobs
        return Completion(self.prompt_ids, self.ids, text, self.finish_reason, noted, self.error)


def speculate(
    model, draft, draft_tokens: int, texts: list[GrowingText], max_new_tokens: int, sampling: Sampling, take: Callable
) -> Iterable[tuple[int, "SpeculativeResult"]]:
    """One text after the other, with a draft that guesses ahead; what its guesses were worth for each."""
    from GPT2Model.speculative import generate_speculative

    for index, text in enumerate(texts):
        ids = torch.tensor([text.prompt_ids], device=model.token_embedding.weight.device)

        def add(token: Tensor, index: int = index, text: GrowingText = text) -> bool:
            take(index, int(token))
            return text.finish_reason is not None  # a stop string is complete: nothing may follow

        settings = {"draft_tokens": draft_tokens, "stop_tokens": text.stop_tokens, "on_token": add}
        yield index, generate_speculative(model, draft, ids, max_new_tokens, for_row(sampling, index), **settings)


def as_texts(stop: object) -> tuple:
    """Stop strings as a tuple, so that a generator of them is read once; what is no text is refused in words later."""
    return (stop,) if isinstance(stop, str | bytes) or not isinstance(stop, Iterable) else tuple(stop)


def problems_of_text(
    sampling: Sampling, n, stop, logprobs, *, vocab_size: int | None = None, on_text=None, only_ids: bool = False
) -> list[str]:
    """What is wrong with the arguments that generate() does not have. only_ids: there is no tokenizer."""
    problems = []
    if not isinstance(n, Integral) or isinstance(n, bool) or n < 1:
        problems.append(f"n must be a whole number, 1 or more, got {n!r}.")
    elif n > 1 and isinstance(sampling, Sampling) and sampling.greedy:
        problems.append(f"temperature 0 gives one text, and n={n} asks for {n}: set a temperature above 0.")
    whole = isinstance(logprobs, Integral) and not isinstance(logprobs, bool)
    if logprobs is not None and not (whole and 0 <= logprobs <= (vocab_size or logprobs)):
        most = "" if vocab_size is None else f", at most {vocab_size}"
        problems.append(f"logprobs must be None or 0 (the chosen token's alone) or more{most}, got {logprobs!r}.")
    try:
        stop = check_stop_strings(as_texts(stop))
    except (TypeError, ValueError) as error:
        problems.append(str(error))
    if only_ids and (stop or on_text is not None):
        problems.append("stop strings and on_text are about text, and there is no tokenizer: use ids, or pass one.")
    return problems


def problems_of_draft(logprobs, use_cache: bool, past_context: str) -> list[str]:
    """What a draft cannot be combined with."""
    problems = []
    if logprobs is not None:
        problems.append("logprobs are not noted while a draft guesses ahead: leave one of the two out.")
    if not use_cache:
        problems.append("a draft saves passes over a cache: with use_cache=False leave it out.")
    if past_context == "slide":
        problems.append("a draft cannot guess in a window that slides: leave it out, or keep within the context.")
    return problems


def problems_of_pairs(model, draft, rows: Sequence[list[int] | None], max_new_tokens, draft_tokens) -> list[str]:
    """What is wrong with the two models and any of the prompts, each said once."""
    from GPT2Model.speculative import problems_of_a_pair

    concerned: dict[str, list[int]] = {}
    for number, row in enumerate(rows, 1):
        ids = torch.tensor([row or [0]])  # one that is empty or cannot be read was noted already
        for problem in problems_of_a_pair(model, draft, ids, max_new_tokens, draft_tokens):
            concerned.setdefault(problem, []).append(number)
    return [
        ("" if len(numbers) == len(rows) else name_of(numbers[0], len(rows))) + problem
        for problem, numbers in concerned.items()
    ]


def problems_of_lengths(model, rows: Sequence[list[int] | None], new: int) -> list[str]:
    """The prompts that outgrow the context, each by its number where there are several."""
    context = model.cfg["context_length"]
    lengths = [(number, len(row)) for number, row in enumerate(rows, 1) if row]
    return [problem for number, length in lengths
            for problem in too_long(length, new, context, name_of(number, len(rows)))]  # fmt: skip


def name_of(number: int, count: int) -> str:
    """Before a sentence about one prompt; empty where there is no other."""
    return f"prompt {number} of {count}: " if count > 1 else ""
