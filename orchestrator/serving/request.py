"""Request: what somebody asks the engine for; Sample: one of its n continuations, while it is being written."""

from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral

import torch

from GPT2Model.completion import FinishReason, TokenLogprobs
from GPT2Model.generation import for_row, problems_of
from GPT2Model.sampling import Sampler, Sampling
from GPT2Model.text_generation import GrowingText, problems_of_text
from orchestrator.serving.block_manager import BlockTable


@dataclass(frozen=True)
class TokenEvent:
    """One token, as it was written.

    Attributes:
        request: its number. index: which of the n samples.
        id: of the token.
        text: what may be shown now; "" while a character or a stop string may still be incomplete, or without a
            tokenizer.
        logprobs: if they were asked for.
        finish_reason: None: more will come.
    """

    request: int
    index: int
    id: int
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


class Sample:
    """One continuation of a request's prompt, and where its keys and values are.

    Args:
        request, index: whose, and which of n: it draws from a generator of its own, seeded with seed + index, which
            neither a batch nor a preemption touches.
        tokenizer: None: no text, only ids. device: of the model.
    Attributes:
        tokens: prompt and what was written. The scheduler has them read in chunks, and again after a preemption.
        text: what was written, as it grows.
        table: where the keys and values of those that were read are; None: it waits.
        to_fork: samples 1 to n - 1 become sequences of their own when the prompt has been read, once for all.
        furthest: tokens that were read at least once; after a preemption more than are in the cache.
    """

    def __init__(self, request: Request, index: int, tokenizer, device: torch.device | str):
        self.request, self.index = request, index
        self.tokens = list(request.prompt_ids)
        self.text = GrowingText(request.prompt_ids, tokenizer, request.stop, request.stop_tokens, request.logprobs)
        self.sampler = Sampler(for_row(request.sampling, index), device)
        self.table: BlockTable | None = None
        self.to_fork = self.furthest = 0

    @property
    def arrived(self) -> tuple[int, int]:
        """Who came first: requests in the order in which they came, and the samples of one in theirs."""
        return self.request.number, self.index

    @property
    def unread(self) -> int:
        """Tokens whose keys and values are not in the cache: the whole prompt at first, then the one just written."""
        return len(self.tokens) - (len(self.table.tokens) if self.table else 0)

    @property
    def finish_reason(self) -> FinishReason | None:
        return self.text.finish_reason

    def first_reads_of_written(self, count: int) -> int:
        """Of the last `count` tokens that were read, those that the model had written and nobody had read before."""
        end = len(self.table.tokens)
        start = max(end - count, len(self.request.prompt_ids), self.furthest)
        self.furthest = max(self.furthest, end)
        return max(0, end - start)

    def write(self, id: int, logits: torch.Tensor) -> TokenEvent:
        """Append a token, and see whether it was the last one. logits: (vocab_size,) that it was chosen from."""
        self.tokens.append(id)
        piece = self.text.add(id, logits)
        if len(self.text.ids) == self.request.max_new_tokens:
            piece += self.text.end("length")
        logprobs = self.text.logprobs[-1] if self.text.logprobs else None
        return TokenEvent(self.request.number, self.index, id, piece, logprobs, self.finish_reason)

    def cancel(self) -> None:
        """No more tokens; the text keeps what it has."""
        self.to_fork = 0
        self.text.end("cancelled")


def problems_of_request(request: Request, model, tokenizer, max_running: int) -> list[str]:
    """Everything in a request that makes no sense for this model, a sentence each; not whether there is room."""
    sampling, ids = request.sampling, torch.tensor([request.prompt_ids or [0]])  # an empty one was noted already
    found = problems_of(model, ids, request.max_new_tokens, sampling, request.stop_tokens, past_context="slide")
    found += problems_of_text(
        sampling, request.n, request.stop, request.logprobs, vocab_size=model.cfg["vocab_size"],
        only_ids=tokenizer is None,
    )  # fmt: skip
    if request.max_new_tokens == 0:
        found.append("max_new_tokens=0 asks for nothing: 1 at least.")
    if isinstance(request.n, Integral) and request.n > max_running:
        found.append(f"n={request.n} samples are written side by side, and max_running is {max_running}.")
    return found


def too_long(request: Request, context_length: int) -> list[str]:
    """Whether prompt and new tokens fit into the model's context."""
    prompt, new = len(request.prompt_ids), request.max_new_tokens
    if prompt + new <= context_length:
        return []
    room = context_length - prompt
    advice = f"ask for {room} at most" if room > 0 else f"a prompt may have {context_length - 1} at most"
    return [f"{prompt} tokens of prompt and {new} new ones are more than context_length={context_length}: {advice}."]
