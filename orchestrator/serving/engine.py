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
from dataclasses import dataclass, replace

import torch

from CMHA.paged_kv_cache import PagedMask
from GPT2Model.completion import Completion
from GPT2Model.generation import as_set
from GPT2Model.paged_forward import make_paged_cache, paged_forward
from GPT2Model.sampling import Sampling
from GPT2Model.text_generation import read_prompts
from orchestrator.serving.block_manager import BlockManager
from orchestrator.serving.capacity import affordable_blocks
from orchestrator.serving.request import Request, Sample, TokenEvent, problems_of_request, too_long
from orchestrator.serving.scheduler import Plan, Scheduler

logger = logging.getLogger("orchestrator")


@dataclass
class EngineStats:
    """What an engine has done so far, in tokens unless it says otherwise.

    Attributes:
        steps: forward passes.
        prefill_tokens: read from prompts, and read again after a preemption. decode_tokens: written, then read.
        shared_tokens: not read at all, since another sequence's blocks held them.
        preemptions, copied_blocks: how often. finished, cancelled: samples.
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
    peak_running: int = 0
    peak_blocks: int = 0


class Engine:
    """Continuous batching over a paged KV cache.

    Why: texts end at different times. A batch that is put together once waits for its longest text and pads the others;
    here it is put together anew for each token, and memory is taken a block at a time.

    `add` and `cancel` may be called from any thread and from a callback; `step`, `run` and `stream` from one at a time.

    Args:
        model: a GPTModel; it is put into eval mode. Attention goes through "paged_attention", whatever its own setting.
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
        ValueError: sizes that contradict each other, or no room for one block.
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
        self.model, self.tokenizer = model.eval(), tokenizer
        self.device = model.final_norm.weight.device
        if num_blocks is None:
            num_blocks = affordable_blocks(model, block_size, max_running)
        self.cache = make_paged_cache(model, num_blocks, block_size)
        self.blocks = BlockManager(num_blocks, block_size, prefix_sharing)
        self.scheduler = Scheduler(self.blocks, max_running, max_batch_tokens)
        self.stats = EngineStats()
        self._numbers = itertools.count()
        self._inbox: deque[tuple[str, Request | int]] = deque()  # what came since the last step; append is atomic
        self._lock = threading.Lock()
        self._open: dict[int, list[Sample]] = {}  # samples of each request that is not done
        self._done: dict[int, list[Completion]] = {}

    def add(
        self,
        prompt: str | Sequence[int],
        max_new_tokens: int,
        sampling: Sampling | None = None,
        *,
        n: int = 1,
        stop: str | Sequence[str] = (),
        stop_tokens: int | Sequence[int] | None = None,
        logprobs: int | None = None,
        on_token: Callable[[TokenEvent], object] | None = None,
    ) -> int:
        """Take a request; it joins the others at the next step.

        Args:
            prompt: ids, or a text.
            max_new_tokens: 1 or more.
            sampling: None: greedy. With a seed, sample i draws from a generator of its own with seed + i.
            n: samples of the same prompt, which is read once for all of them.
            stop: texts before which the text ends. stop_tokens: ids; None: the tokenizer's end of text, if any.
            logprobs: how many of the likeliest tokens to note at each place, 0 for the chosen one's alone; None: none.
            on_token: called with a `TokenEvent` for each token, in the thread that steps. If it raises, the error is
                logged and its request cancelled; the others go on.
        Returns:
            the request's number, for `cancel`, `run` and `take`.
        Raises:
            ValueError: everything that is wrong with it at once, also that it can never fit.
        """
        rows, problems = read_prompts(prompt, self.tokenizer)
        if len(rows) > 1:
            problems.append(f"a request has one prompt, got {len(rows)}: add each.")
        if stop_tokens is None:
            stop_tokens = getattr(self.tokenizer, "end_of_text", ())
        request = Request(
            0, rows[0] if rows else [], max_new_tokens, sampling or Sampling(), n,
            (stop,) if isinstance(stop, str) else stop, as_set(stop_tokens), logprobs, on_token,
        )  # fmt: skip
        problems += problems_of_request(request, self.model, self.tokenizer, self.scheduler.max_running)
        if not problems:
            problems = too_long(request, self.model.cfg["context_length"]) + self._never_fits(request)
        if problems:
            raise ValueError("the request cannot be taken:\n" + "\n".join(f"  - {problem}" for problem in problems))
        with self._lock:  # numbers are the order of arrival, so they enter the inbox in this order
            number = next(self._numbers)
            self._open[number] = []
            self._inbox.append(("add", replace(request, number=number)))
        return number

    def cancel(self, number: int) -> bool:
        """End a request at the next step, with what it has written so far; False: it is done already, or unknown."""
        with self._lock:
            if number not in self._open:
                return False
        self._inbox.append(("cancel", number))
        return True

    @property
    def idle(self) -> bool:
        """Nothing runs, waits or has come."""
        return not (self._inbox or self.scheduler.running or self.scheduler.waiting)

    def step(self) -> bool:
        """One forward pass; False: there was nothing to do."""
        self._look_into_inbox()
        plan = self.scheduler.plan()
        if not plan.reads:
            return False
        self._count(plan)
        try:
            logits = self._forward(plan)
        except BaseException:
            self._forget_cache()  # blocks are taken for written that may not be
            raise
        self._write([sample for sample, _ in plan.reads], logits)
        return True

    def run(self) -> dict[int, list[Completion]]:
        """Step until nothing is left; what has ended since the last `run` or `take`, by request number."""
        while self.step():
            pass
        done, self._done = self._done, {}
        return done

    def take(self, number: int) -> list[Completion] | None:
        """The completions of a request that is done, once; None: it is not done, or was taken before."""
        return self._done.pop(number, None)

    def stream(self, prompt: str | Sequence[int], max_new_tokens: int, *args, **kwargs) -> Iterator[TokenEvent]:
        """Add a request and yield its tokens as they come, while all others go on too. Arguments as in `add`."""
        events: deque[TokenEvent] = deque()
        number = self.add(prompt, max_new_tokens, *args, **kwargs, on_token=events.append)
        try:
            while number in self._open or events:
                while events:
                    yield events.popleft()
                self.step()
        finally:  # who stops listening does not want the rest
            self.cancel(number)

    def _never_fits(self, request: Request) -> list[str]:
        """Whether the whole pool would be too small: refused now, since waiting would not help."""
        tokens = len(request.prompt_ids) + request.max_new_tokens - 1  # the last one is never read
        needed = self.blocks.blocks_needed(None, tokens)
        if needed <= self.blocks.num_blocks:
            return []
        size = self.blocks.block_size
        return [
            f"{len(request.prompt_ids)} tokens of prompt and {request.max_new_tokens} new ones need {needed} blocks of "
            f"{size} tokens, and the whole cache has {self.blocks.num_blocks}: ask for fewer, or give the engine more "
            "blocks (num_blocks)."
        ]

    def _look_into_inbox(self) -> None:
        while self._inbox:
            what, about = self._inbox.popleft()
            if what == "add":
                sample = Sample(about, 0, self.tokenizer, self.device)
                sample.to_fork = about.n - 1
                self._open[about.number].append(sample)
                self.scheduler.add(sample)
            else:
                self._cancel(about)

    def _cancel(self, number: int) -> None:
        for sample in self._open.get(number, ()):
            if sample.finish_reason is None:
                sample.cancel()
                self.scheduler.remove(sample)
                self.stats.cancelled += 1
        self._close(number)

    def _close(self, number: int) -> None:
        """File a request's completions once all of its samples have ended."""
        samples = self._open.get(number, ())
        if samples and all(sample.finish_reason is not None and not sample.to_fork for sample in samples):
            self._done[number] = [sample.text.completion() for sample in samples]
            with self._lock:
                del self._open[number]

    def _count(self, plan: Plan) -> None:
        stats, running = self.stats, self.scheduler.running
        stats.steps += 1
        stats.preemptions += len(plan.preempted)
        stats.copied_blocks += len(plan.copies)
        stats.shared_tokens += plan.shared_tokens
        for sample, count in plan.reads:
            written = sample.first_reads_of_written(count)
            stats.decode_tokens += written
            stats.prefill_tokens += count - written
        stats.peak_running = max(stats.peak_running, len(running))
        stats.peak_blocks = max(stats.peak_blocks, self.blocks.used_blocks)

    def _forward(self, plan: Plan) -> torch.Tensor:
        """Scores for each sample of the plan, behind the last token that it reads now: (samples, vocab_size)."""
        for copy in plan.copies:
            self.cache.copy_block(copy.source, copy.target)
        tables, lengths, counts, ids = [], [], [], []
        for sample, count in plan.reads:
            end = len(sample.table.tokens)  # the manager counts the new ones as read already
            tables.append(sample.table.blocks)
            lengths.append(end - count)
            counts.append(count)
            ids += sample.tokens[end - count : end]
        mask = PagedMask(tables, lengths, counts, self.blocks.block_size, self.device)
        return paged_forward(self.model, torch.tensor(ids, device=self.device), mask, self.cache)

    def _write(self, samples: list[Sample], logits: torch.Tensor) -> None:
        """The next token of every sample that has nothing left unread."""
        likeliest = logits.argmax(dim=-1).tolist()  # for all at once
        for row, sample in enumerate(samples):
            if sample.unread:
                continue
            forks = [Sample(sample.request, i, self.tokenizer, self.device) for i in range(1, sample.to_fork + 1)]
            sample.to_fork = 0
            for other in forks:
                self._open[sample.request.number].append(other)
                self.scheduler.fork(sample, other)
            for one in (sample, *forks):
                self._write_one(one, logits[row], likeliest[row])

    def _write_one(self, sample: Sample, logits: torch.Tensor, likeliest: int) -> None:
        sampling, request = sample.sampler.sampling, sample.request
        plain = sampling.greedy and sampling.repetition_penalty == 1
        id = likeliest if plain else sample.sampler.pick(logits, sample.tokens)
        event = sample.write(id, logits)
        if sample.finish_reason is not None:
            self.scheduler.remove(sample)
            self.stats.finished += 1
            self._close(request.number)
        if request.on_token is not None:
            try:
                request.on_token(event)
            except Exception:  # whatever a caller's function raises must not end everybody's texts
                logger.exception("on_token of request %d raised; the request is cancelled", request.number)
                self.cancel(request.number)

    def _forget_cache(self) -> None:
        """Start over with an empty cache after a forward pass that did not end; everybody reads again."""
        for sample in list(self.scheduler.running):
            self.scheduler.preempt(sample)
        old = self.blocks
        self.blocks = self.scheduler.blocks = BlockManager(old.num_blocks, old.block_size, old.prefix_sharing)
