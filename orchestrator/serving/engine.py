"""Engine: many requests at once over one model and one paged cache. Requests may come, and be cancelled, at any time.

    engine = Engine(model, tokenizer)
    number = engine.add("Once upon a time", max_new_tokens=50)
    engine.run()[number][0].text

One `step` is one forward pass: the scheduler says who reads what, the model reads it all in one row, and every sequence
that has nothing left unread gets its next token. The tokens are those that `generate` would write for each alone.
"""

import itertools
import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from CMHA.paged_kv_cache import PagedMask
from GPT2Model.completion import Completion
from GPT2Model.generation import evaluating
from GPT2Model.paged_forward import make_paged_cache, paged_forward
from GPT2Model.sampling import GREEDY, NO_NUMBERS, Sampling
from orchestrator.serving.block_manager import BlockManager
from orchestrator.serving.capacity import affordable_blocks, check_sizes
from orchestrator.serving.request import Request, Sample, TokenEvent, problems_of_request, read_request
from orchestrator.serving.scheduler import Plan, Scheduler

logger = logging.getLogger("orchestrator")


@dataclass
class EngineStats:
    """What an engine has done so far, in tokens unless it says otherwise.

    Attributes:
        steps: forward passes that came to their end.
        prefill_tokens: read from prompts, and read again after a preemption. decode_tokens: written, then read.
        shared_tokens: not read at all, since blocks held them: another sequence's, or its own of before a preemption.
        preemptions, copied_blocks: how often. finished, cancelled, failed: samples.
        peak_running: sequences. peak_blocks: blocks held at a time.
    """

    steps: int = 0
    prefill_tokens: int = 0
    decode_tokens: int = 0
    shared_tokens: int = 0
    preemptions: int = 0
    copied_blocks: int = 0
    finished: int = 0
    cancelled: int = 0
    failed: int = 0
    peak_running: int = 0
    peak_blocks: int = 0


class Engine:
    """Continuous batching over a paged KV cache.

    Why: texts end at different times. A batch that is put together once waits for its longest text and pads the others;
    here it is put together anew for each token, and memory is taken a block at a time.

    `add` and `cancel` may be called from any thread and from a callback; `step`, `run` and `stream` from one at a time.

    Args:
        model: a GPTModel. Attention goes through "paged_attention", whatever its own setting, and each step computes in
            eval, whatever its mode.
        tokenizer: for text prompts, texts and stop strings; None: ids alone.
        num_blocks: memory of the cache, in blocks; None: what max_running texts of full length need, if half of the
            free memory can hold it.
        block_size: tokens in a block. A larger one wastes more behind each text's end and shares less.
        max_running: sequences at a time.
        max_batch_tokens: tokens read in one step: more reads prompts faster, and makes the others wait longer for their
            next token.
        prefix_sharing: sequences that begin with the same tokens hold the same blocks.
    Attributes:
        stats: an `EngineStats`.
    Raises:
        ValueError: sizes that make no sense, all at once, or more memory than is free.
    """

    def __init__(
        self,
        model,
        tokenizer=None,
        *,
        num_blocks: int | None = None,
        block_size: int = 16,
        max_running: int = 32,
        max_batch_tokens: int = 256,
        prefix_sharing: bool = True,
    ):
        check_sizes(
            model, num_blocks=num_blocks, block_size=block_size, max_running=max_running,
            max_batch_tokens=max_batch_tokens,
        )  # fmt: skip
        self.model, self.tokenizer = model, tokenizer
        self.device = model.final_norm.weight.device
        num_blocks = num_blocks or affordable_blocks(model, block_size, max_running)
        self.cache = make_paged_cache(model, num_blocks, block_size)
        self.blocks = BlockManager(num_blocks, block_size, prefix_sharing)
        self.scheduler = Scheduler(self.blocks, max_running, max_batch_tokens)
        self.stats = EngineStats()
        self._numbers = itertools.count()
        self._inbox: deque[tuple[Callable, tuple]] = deque()  # what is to be done before the next step
        self._lock = threading.Lock()  # of the numbers: `add` may be called from several threads
        self._open: dict[int, list[Sample]] = {}  # samples of each request that is not done
        self._done: dict[int, list[Completion]] = {}
        self._stepping = False

    def add(
        self,
        prompt: str | Sequence[int] | Tensor,
        max_new_tokens: int,
        sampling: Sampling = GREEDY,
        *,
        n: int = 1,
        stop: str | Sequence[str] = (),
        stop_tokens: int | Sequence[int] | None = None,
        logprobs: int | None = None,
        on_token: Callable[[TokenEvent], object] | None = None,
        keep: bool = True,
    ) -> int:
        """Take a request; it joins the others at the next step.

        Args:
            prompt: ids, or a text.
            max_new_tokens: 1 or more.
            sampling: with a seed, sample i draws from a generator of its own with seed + i.
            n: samples of the same prompt, which is read once for all of them.
            stop: texts before which the text ends. stop_tokens: ids; None: the tokenizer's end of text, if any.
            logprobs: how many of the likeliest tokens to note at each place, 0 for the chosen one's alone; None: none.
            on_token: called with a `TokenEvent` for each token and at the end, in the thread that steps. If it raises,
                the error is logged and its request cancelled; the others go on.
            keep: hold the completions for `run` and `take`; False: on_token alone hears of them.
        Returns:
            the request's number, for `cancel`, `run` and `take`.
        Raises:
            ValueError: everything that is wrong with it at once, also that it can never fit.
        """
        request, problems = read_request(
            self.tokenizer, prompt, max_new_tokens, sampling, n=n, stop=stop, stop_tokens=stop_tokens,
            logprobs=logprobs, on_token=on_token, keep=keep, vocab_size=self.model.cfg["vocab_size"],
        )  # fmt: skip
        problems += problems_of_request(request, self.model, self.tokenizer, self.scheduler.max_running, self.blocks)
        if problems:
            raise ValueError("the request cannot be taken:\n" + "\n".join(f"  - {problem}" for problem in problems))
        with self._lock:  # numbers are the order of arrival, so they enter the inbox in this order
            number = next(self._numbers)
            self._open[number] = []
            self._inbox.append((self._begin, (replace(request, number=number),)))
        return number

    def cancel(self, number: int) -> bool:
        """End a request at the next step, with what it has written so far; False: it is done already, or unknown.

        Samples that have not begun (n of them, while the prompt is being read) leave no completion.
        """
        if number not in self._open:
            return False
        self._inbox.append((self._cancel, (number,)))
        return True

    @property
    def idle(self) -> bool:
        """Nothing runs, waits or has come."""
        return not (self._inbox or self.scheduler.running or self.scheduler.waiting)

    def step(self) -> bool:
        """One forward pass; False: there was nothing to do.

        Raises:
            RuntimeError: another step is under way, in another thread or further up this one's stack.
            Whatever the forward pass raises, and KeyboardInterrupt: no text is lost, and the next step goes on.
        """
        with self._one_at_a_time():
            while self._inbox:
                what, about = self._inbox[0]
                what(*about)
                self._inbox.popleft()
            plan = self.scheduler.plan()
            if plan.reads:
                with evaluating(self.model):
                    logits = self._forward(plan)
                self._count(plan)
                self._write([sample for sample, _ in plan.reads], logits)
            return bool(plan.reads)

    def run(self) -> dict[int, list[Completion]]:
        """Step until nothing is left; what has ended since the last `run` or `take`, by request number."""
        while self.step():
            pass
        done, self._done = self._done, {}
        return done

    def take(self, number: int) -> list[Completion] | None:
        """The completions of a request that is done, once; None: it is not done, or was taken before."""
        return self._done.pop(number, None)

    def stream(
        self, prompt: str | Sequence[int] | Tensor, max_new_tokens: int, sampling: Sampling = GREEDY, **wishes
    ) -> Iterator[TokenEvent]:
        """Add a request now and yield its events as they come, while all others go on too.

        Arguments as in `add`, without on_token and keep: nothing is held for `run` and `take`.
        """
        events: deque[TokenEvent] = deque()
        number = self.add(prompt, max_new_tokens, sampling, **wishes, on_token=events.append, keep=False)

        def listen() -> Iterator[TokenEvent]:
            try:
                while number in self._open or events:
                    while events:
                        yield events.popleft()
                    self.step()
            finally:  # who stops listening does not want the rest
                self.cancel(number)

        return listen()

    @contextmanager
    def _one_at_a_time(self) -> Iterator[None]:
        """Guards a step: against a second one, and against its own failure."""
        if self._stepping:
            raise RuntimeError(
                "this engine is in a step already: step, run and stream go one at a time, not in on_token."
            )
        self._stepping = True
        try:
            yield
        except BaseException:
            self._start_over()
            raise
        finally:
            self._stepping = False

    def _start_over(self) -> None:
        """After a step that did not end: nothing that it left half done is believed but the tokens that were written.

        The cache is taken for empty, since blocks may be noted as written that are not, and everybody reads again.
        """
        # Lists: another thread may add a request meanwhile.
        old, samples = self.blocks, [sample for samples in list(self._open.values()) for sample in samples]
        self.blocks = BlockManager(old.num_blocks, old.block_size, old.prefix_sharing)
        for sample in samples:
            sample.table = None
            if sample.is_half_written:
                sample.fail("interrupted while a token was being written")
        for of_one_request in filter(None, list(self._open.values())):
            first = of_one_request[0]
            first.to_fork = 0 if first.finish_reason else first.request.n - len(of_one_request)
        self.scheduler.start_over(self.blocks, [sample for sample in samples if sample.finish_reason is None])
        for number in list(self._open):
            self._close(number)

    def _begin(self, request: Request) -> None:
        if not self._open[request.number]:  # else a step ended between this and the inbox's next line
            sample = Sample(request, 0, self.tokenizer, self.device)
            self._open[request.number].append(sample)
            self.scheduler.add(sample)

    def _cancel(self, number: int, tell: bool = True) -> None:
        for sample in list(self._open.get(number, ())):
            if sample.finish_reason is None:
                self._end(sample, sample.cancel(), tell)
                self.stats.cancelled += 1
        self._close(number)

    def _end(self, sample: Sample, event: TokenEvent, tell: bool = True) -> None:
        self.scheduler.remove(sample)
        if tell:
            self._tell(sample.request, event)

    def _tell(self, request: Request, event: TokenEvent) -> None:
        if request.on_token is None:
            return
        try:
            request.on_token(event)
        except Exception:  # whatever a caller's function raises must not end everybody's texts
            logger.exception("on_token of request %d raised; the request is cancelled", request.number)
            self._inbox.append((self._cancel, (request.number, False)))

    def _close(self, number: int) -> None:
        """File a request's completions once all of its samples have ended."""
        samples = self._open.get(number, ())
        if samples and all(sample.finish_reason is not None for sample in samples):
            if samples[0].request.keep:
                self._done[number] = [sample.text.completion() for sample in samples]
            del self._open[number]

    def _count(self, plan: Plan) -> None:
        stats = self.stats
        stats.steps += 1
        stats.preemptions += len(plan.preempted)
        stats.copied_blocks += len(plan.copies)
        stats.shared_tokens += plan.shared_tokens
        for sample, count in plan.reads:
            written = sample.first_reads_of_written(count)
            stats.decode_tokens += written
            stats.prefill_tokens += count - written
        stats.peak_running = max(stats.peak_running, len(self.scheduler.running))
        stats.peak_blocks = max(stats.peak_blocks, self.blocks.used_blocks)

    def _forward(self, plan: Plan) -> Tensor:
        """Scores for each sample of the plan, behind the last token that it reads now: (samples, vocab_size)."""
        for copy in plan.copies:
            self.cache.copy_block(copy.source, copy.target)
        tables, lengths, counts, ids = [], [], [], []
        for sample, count in plan.reads:
            end = len(sample.table.tokens)  # the manager counts the new ones as read already
            tables.append(sample.table.blocks)
            lengths.append(end - count)
            counts.append(count)
            ids += sample.table.tokens[end - count :]
        mask = PagedMask(tables, lengths, counts, self.blocks.block_size, self.device)
        return paged_forward(self.model, torch.tensor(ids, device=self.device), mask, self.cache)

    def _write(self, samples: list[Sample], logits: Tensor) -> None:
        """The next token of every sample that has nothing left unread."""
        likeliest = logits.argmax(dim=-1).tolist()  # for all at once, and as `generate` takes it
        are_numbers = logits.amax(dim=-1).isfinite().tolist()
        for row, sample in enumerate(samples):
            if sample.unread:
                continue
            for one in (sample, *self._forks(sample)):
                with self._blamed_on(one):
                    if not are_numbers[row]:
                        raise ValueError(NO_NUMBERS)
                    self._written(one, one.write(logits[row], likeliest[row]))

    def _forks(self, sample: Sample) -> list[Sample]:
        """Samples 1 to n - 1, when sample 0 has read the prompt: from now on they go their own ways."""
        open_now, forks = self._open[sample.request.number], []
        while sample.to_fork:
            forks.append(Sample(sample.request, len(open_now), self.tokenizer, self.device))
            self.scheduler.fork(sample, forks[-1])
            open_now.append(forks[-1])
            sample.to_fork = sample.request.n - len(open_now)
        return forks

    def _written(self, sample: Sample, event: TokenEvent) -> None:
        if sample.finish_reason is None:
            self._tell(sample.request, event)
        else:
            self.stats.finished += 1
            self._end(sample, event)
            self._close(sample.request.number)

    @contextmanager
    def _blamed_on(self, sample: Sample) -> Iterator[None]:
        """An error with one text ends that text, with the reason in its completion, and nobody else's."""
        try:
            yield
        except Exception as error:
            logger.warning("request %d ends with an error: %s", sample.request.number, error)
            self.stats.failed += 1
            self._end(sample, sample.fail(f"{type(error).__name__}: {error}"))
            self._close(sample.request.number)
