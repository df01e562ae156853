"""Request: what somebody asks the engine for; Sample: one of its n continuations, while it is being written."""

from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral

import torch

from GPT2Model.completion import FinishReason, TokenLogprobs
from GPT2Model.generation import as_set, for_row, problems_of
from GPT2Model.prompts import read_prompts
from GPT2Model.sampling import GREEDY, Sampler, Sampling
from GPT2Model.text_generation import GrowingText, problems_of_text
from orchestrator.serving.block_manager import BlockManager, BlockTable


@dataclass(frozen=True)
class TokenEvent:
    """One token, as it was written.

    Attributes:
        request: its number. index: which of the n samples.
        id: of the token; None in the last event of a sample that was cancelled or failed.
        text: what may be shown now; "" while a character or a stop string may still be incomplete, or without a
            tokenizer.
        logprobs: if they were asked for.
        finish_reason: None: more will come.
    """

    request: int
    index: int
    id: int | None
    text: str
    logprobs: TokenLogprobs | None
    finish_reason: FinishReason | None


@dataclass(frozen=True)
class Request:
    """One prompt and what to do with it; `Engine.add` has the meaning of each. `number` is the order of arrival."""

    number: int
    prompt_ids: list[int]
    max_new_tokens: int
    sampling: Sampling
    n: int
    stop: tuple[str, ...]
    stop_tokens: set[int]
    logprobs: int | None
    on_token: Callable[[TokenEvent], object] | None
    keep: bool = True


class Sample:
    """One continuation of a request's prompt, and where its keys and values are.

    Args:
        request, index: whose, and which of n: it draws from a generator of its own, seeded with seed + index, which
            neither a batch nor a preemption touches.
        tokenizer: None: no text, only ids. device: of the model.
    Attributes:
        text: what was written, as it grows. is_half_written: only while a token is chosen and added.
        table: where the keys and values of those that were read are; None: it waits.
        to_fork: samples 1 to n - 1 become sequences of their own when the prompt has been read, once for all.
        furthest: tokens that were read at least once; after a preemption more than are in the cache.
    """

    def __init__(self, request: Request, index: int, tokenizer, device: torch.device | str):
        self.request, self.index, self.is_half_written = request, index, False
        self.text = GrowingText(request.prompt_ids, tokenizer, request.stop, request.stop_tokens, request.logprobs)
        self.sampler = Sampler(for_row(request.sampling, index), device)
        self.table: BlockTable | None = None
        self.to_fork, self.furthest = (request.n - 1 if index == 0 else 0), 0

    @property
    def tokens(self) -> list[int]:
        """Prompt and what was written. The scheduler has them read in chunks, and again after a preemption."""
        return [*self.request.prompt_ids, *self.text.ids]

    @property
    def arrived(self) -> tuple[int, int]:
        """Who came first: requests in the order in which they came, and the samples of one in theirs."""
        return self.request.number, self.index

    @property
    def unread(self) -> int:
        """Tokens whose keys and values are not in the cache: the whole prompt at first, then the one just written."""
        total = len(self.request.prompt_ids) + len(self.text.ids)
        return total - (len(self.table.tokens) if self.table else 0)

    @property
    def finish_reason(self) -> FinishReason | None:
        return self.text.finish_reason

    def first_reads_of_written(self, count: int) -> int:
        """Of the last `count` tokens that were read, those that the model had written and nobody had read before."""
        end = len(self.table.tokens)
        start = max(end - count, len(self.request.prompt_ids), self.furthest)
        self.furthest = max(self.furthest, end)
        return max(0, end - start)

    def write(self, logits: torch.Tensor, likeliest: int) -> TokenEvent:
        """Choose the next token, append it, and see whether it was the last one.

        Args:
            logits: (vocab_size,). likeliest: the id of the highest, which is all that a plain greedy choice needs.
        """
        self.is_half_written = True  # from the draw to the last piece of text: one without the other is another text
        sampling = self.sampler.sampling
        plain = sampling.greedy and sampling.repetition_penalty == 1
        id = likeliest if plain else self.sampler.pick(logits, self.tokens)
        piece = self.text.add(id, logits)
        if len(self.text.ids) >= self.request.max_new_tokens:
            piece += self.text.end("length")
        self.is_half_written = False
        return self.event(id, piece, self.text.logprobs[-1] if self.text.logprobs else None)

    def cancel(self) -> TokenEvent:
        """No more tokens; the text keeps what it has."""
        self.to_fork = 0
        return self.event(None, self.text.end("cancelled"))

    def fail(self, error: str) -> TokenEvent:
        """No more tokens, and why."""
        self.to_fork, self.is_half_written = 0, False
        self.text.error, self.text.finish_reason = error, "error"  # its end is not asked for: that may be what failed
        return self.event(None, "")

    def event(self, id: int | None, piece: str, logprobs: TokenLogprobs | None = None) -> TokenEvent:
        return TokenEvent(self.request.number, self.index, id, piece, logprobs, self.finish_reason)


def read_request(
    tokenizer, prompt, max_new_tokens, sampling, *, n, stop, stop_tokens, logprobs, on_token, keep, vocab_size: int
) -> tuple[Request, list[str]]:
    """A request without a number yet, and what was wrong with what can be read of it."""
    rows, problems = read_prompts(prompt, tokenizer)
    if len(rows) > 1:
        problems.append(f"a request has one prompt, got {len(rows)}: add each.")
    if stop_tokens is None:
        end = getattr(tokenizer, "end_of_text", None)
        stop_tokens = () if end is None or end >= vocab_size else end  # a model may know fewer ids than its tokenizer
    if not isinstance(sampling, Sampling):
        problems.append(f"sampling must be a Sampling, as Sampling(temperature=0.8), got {sampling!r}.")
        sampling = GREEDY
    if on_token is not None and not callable(on_token):
        problems.append(f"on_token must be a function of a TokenEvent, or None, got {on_token!r}.")
    try:
        stop = (stop,) if isinstance(stop, str) else tuple(stop)  # a generator is read once
        stop_tokens = as_set(stop_tokens)
    except TypeError as error:
        problems.append(f"stop must be texts and stop_tokens ids, got {stop!r} and {stop_tokens!r} ({error}).")
        stop, stop_tokens = (), set()
    prompt_ids = rows[0] if len(rows) == 1 else []
    return Request(
        0, prompt_ids, max_new_tokens, sampling, n, stop, stop_tokens, logprobs, on_token, bool(keep)
    ), problems  # fmt: skip


def problems_of_request(request: Request, model, tokenizer, max_running: int, blocks: BlockManager) -> list[str]:
    """Everything in a request that makes no sense for this model, or can never fit, a sentence each."""
    sampling, vocab_size = request.sampling, model.cfg["vocab_size"]
    foreign = [id for id in request.prompt_ids if not isinstance(id, int) or not 0 <= id < vocab_size]
    # An empty prompt was noted when it was read.
    ids = torch.tensor([[0] if foreign else request.prompt_ids or [0]])
    found = problems_of(model, ids, request.max_new_tokens, sampling, request.stop_tokens, past_context="slide")
    found += problems_of_text(
        sampling, request.n, request.stop, request.logprobs, vocab_size=vocab_size, only_ids=tokenizer is None
    )
    if foreign:
        found.append(f"token ids must be in 0..{vocab_size - 1}, got {foreign[0]!r}: wrong tokenizer?")
    if request.max_new_tokens == 0:
        found.append("max_new_tokens=0 asks for nothing: 1 at least.")
    if isinstance(request.n, Integral) and request.n > max_running:
        found.append(f"n={request.n} samples are written side by side, and max_running is {max_running}.")
    return found or too_long(request, model.cfg["context_length"]) + too_large(request, blocks)


def too_long(request: Request, context_length: int) -> list[str]:
    """Whether prompt and new tokens fit into the model's context."""
    prompt, new = len(request.prompt_ids), request.max_new_tokens
    if prompt + new <= context_length:
        return []
    room = context_length - prompt
    advice = f"ask for {room} at most" if room > 0 else f"a prompt may have {context_length - 1} at most"
    return [f"{prompt} tokens of prompt and {new} new ones are more than context_length={context_length}: {advice}."]


def too_large(request: Request, blocks: BlockManager) -> list[str]:
    """Whether the whole pool would be too small: refused now, since waiting would not help."""
    prompt, new = len(request.prompt_ids), request.max_new_tokens
    needed = blocks.blocks_needed(None, prompt + new - 1)  # the last one is never read
    if needed <= blocks.num_blocks:
        return []
    return [
        f"{prompt} tokens of prompt and {new} new ones need {needed} blocks of {blocks.block_size} tokens, and the "
        f"whole cache has {blocks.num_blocks}: ask for fewer, or give the engine more blocks (num_blocks)."
    ]
