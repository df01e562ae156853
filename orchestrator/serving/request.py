"""Request: what somebody asks the engine for; Sample: one of its n continuations, while it is being written."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from numbers import Integral

from GPT2Model.completion import Completion, FinishReason, TokenLogprobs
from GPT2Model.sampling import Sampler, Sampling
from GPT2Model.text_stream import TextStream, check_stop_strings
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
    prompt_ids: tuple[int, ...]
    max_new_tokens: int
    sampling: Sampling
    n: int
    stop: tuple[str, ...]
    stop_tokens: frozenset[int]
    logprobs: int | None
    on_token: Callable[[TokenEvent], object] | None


@dataclass(eq=False)
class Sample:
    """One continuation of a request's prompt.

    Attributes:
        request, index: whose, and which of n.
        tokens: prompt and what was written. The scheduler has them read in chunks, and again after a preemption.
        table: where the keys and values of those that were read are; None: it waits.
        sampler: its own draws: neither a batch nor a preemption changes them.
        stream: its text; None: the engine has no tokenizer.
        to_fork: samples 1 to n - 1 become sequences of their own when the prompt has been read, once for all.
        furthest: tokens that were read at least once; after a preemption more than are in the cache.
    """

    request: Request
    index: int
    tokens: list[int]
    sampler: Sampler
    stream: TextStream | None
    to_fork: int = 0
    furthest: int = 0
    table: BlockTable | None = None
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: FinishReason | None = None

    @classmethod
    def of(cls, request: Request, index: int, tokenizer, device) -> "Sample":
        """A sample that has written nothing; sample i draws with seed + i."""
        sampling = request.sampling
        if sampling.seed is not None:
            sampling = replace(sampling, seed=sampling.seed + index)
        stream = None if tokenizer is None else TextStream(tokenizer, request.stop)
        return cls(request, index, list(request.prompt_ids), Sampler(sampling, device), stream)

    @property
    def arrived(self) -> tuple[int, int]:
        """Who came first: requests in the order in which they came, and the samples of one in theirs."""
        return self.request.number, self.index

    @property
    def unread(self) -> int:
        """Tokens whose keys and values are not in the cache: the whole prompt at first, then the one just written."""
        return len(self.tokens) - (len(self.table.tokens) if self.table else 0)

    @property
    def written(self) -> list[int]:
        return self.tokens[len(self.request.prompt_ids) :]

    def first_reads_of_written(self, count: int) -> int:
        """Of the last `count` tokens that were read, those that the model had written and nobody had read before."""
        end = len(self.table.tokens)
        start = max(end - count, len(self.request.prompt_ids), self.furthest)
        self.furthest = max(self.furthest, end)
        return max(0, end - start)

    def cancel(self) -> None:
        """No more tokens; the text keeps what it has."""
        self.finish_reason, self.to_fork = "cancelled", 0
        if self.stream is not None:
            self.stream.finish()

    def write(self, id: int, logprobs: TokenLogprobs | None) -> TokenEvent:
        """Append a token, and see whether it was the last one."""
        request = self.request
        self.tokens.append(id)
        if logprobs is not None:
            self.logprobs.append(logprobs)
        text = ""
        if id in request.stop_tokens:
            self.finish_reason = "stop"  # the stop token itself is no text
        elif self.stream is not None:
            text = self.stream.push(id)
            if self.stream.stopped:
                self.finish_reason = "stop"
        if self.finish_reason is None and len(self.written) == request.max_new_tokens:
            self.finish_reason = "length"
        if self.finish_reason is not None and self.stream is not None:
            text += self.stream.finish()
        return TokenEvent(request.number, self.index, id, text, logprobs, self.finish_reason)

    def completion(self) -> Completion:
        return Completion(
            prompt_ids=list(self.request.prompt_ids),
            ids=self.written,
            text=None if self.stream is None else self.stream.text,
            finish_reason=self.finish_reason,
            logprobs=self.logprobs if self.request.logprobs is not None else None,
        )


def problems_of(request: Request, model, tokenizer, max_running: int) -> list[str]:
    """Everything in a request that makes no sense for this model, a sentence each; not whether there is room."""
    found, vocab_size = request.sampling.problems(), model.cfg["vocab_size"]
    whole = {"max_new_tokens": request.max_new_tokens, "n": request.n, "logprobs": request.logprobs}
    for name, value in whole.items():
        least = 0 if name == "logprobs" else 1
        if value is None and name == "logprobs":
            continue
        if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
            found.append(f"{name} must be a whole number, {least} or more, got {value!r}.")
    if not request.prompt_ids:
        found.append("the prompt is empty: give a token at least; the end-of-text token begins a text from nothing.")
    for name, ids in (("the prompt", request.prompt_ids), ("stop_tokens", request.stop_tokens)):
        wrong = [i for i in ids if not isinstance(i, Integral) or isinstance(i, bool) or not 0 <= i < vocab_size]
        if wrong:
            more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
            found.append(f"{name} must hold ids in 0..{vocab_size - 1}, got {wrong[0]!r}{more}: another tokenizer?")
    if isinstance(request.n, Integral) and request.n > 1:
        if request.sampling.greedy:
            found.append(f"n={request.n} samples at temperature 0 would all be the same: set a temperature above 0.")
        if request.n > max_running:
            found.append(f"n={request.n} samples run side by side, and max_running is {max_running}.")
    try:
        check_stop_strings(request.stop)
    except (TypeError, ValueError) as error:
        found.append(str(error))
    if request.stop and tokenizer is None:
        found.append("stop strings need a tokenizer: Engine(model, tokenizer); or pass stop_tokens, which are ids.")
    return found


def too_long(request: Request, context_length: int) -> list[str]:
    """Whether prompt and new tokens fit into the model's context."""
    prompt, new = len(request.prompt_ids), request.max_new_tokens
    if prompt + new <= context_length:
        return []
    room = context_length - prompt
    advice = f"ask for {room} at most" if room > 0 else f"a prompt may have {context_length - 1} at most"
    return [f"{prompt} tokens of prompt and {new} new ones are more than context_length={context_length}: {advice}."]


def as_ids(ids: Sequence[int]) -> tuple:
    """A list or a 1-D tensor of ids as a tuple."""
    return tuple(ids.tolist() if hasattr(ids, "tolist") else ids)


def as_strings(stop: str | Sequence[str]) -> tuple[str, ...]:
    """One stop string or several as a tuple."""
    return (stop,) if isinstance(stop, str) else tuple(stop)
