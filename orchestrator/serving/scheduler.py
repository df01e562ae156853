"""Scheduler: who reads how many tokens in the next step, and who waits.

Continuous batching: after every single token the batch is put together anew, so a text that ends makes room at once
and a new one need not wait for the others. The rules, in this order:

    1. Every running sequence advances in every step, by one token at least.
    2. What is left of `max_batch_tokens` goes to unread prompts, in the order of arrival: a long one is read in chunks,
       so that it never stops the others from writing.
    3. What is left then admits waiting requests, first come, first served: nobody is overtaken.
    4. If a block is missing, the running sequence that came last gives all of its own back and waits (*preemption by
       recompute*: later its prompt, and what it has written, are read again). So the one that came first always ends.

Source: Kwon et al., 2023, section 4.5; chunks as in "Sarathi-Serve" (Agrawal et al., 2024).
"""

from bisect import insort
from dataclasses import dataclass, field

from orchestrator.serving.block_manager import BlockManager, Copy, OutOfBlocks
from orchestrator.serving.request import Sample


@dataclass
class Plan:
    """One step of the engine.

    Attributes:
        reads: (sample, how many of its tokens), in the order of arrival. Their blocks are theirs already, and the
            manager takes them for written: a sequence later in the same plan may share them, since every layer writes
            all new keys before it reads any.
        copies: blocks to copy before anything is written.
        preempted: samples that had to give their blocks back.
        shared_tokens: tokens of the samples admitted now that need no reading, since blocks hold them already.
    """

    reads: list[tuple[Sample, int]] = field(default_factory=list)
    copies: list[Copy] = field(default_factory=list)
    preempted: list[Sample] = field(default_factory=list)
    shared_tokens: int = 0


class Scheduler:
    """Queues and rules; no tensor.

    Args:
        blocks: the manager of the cache.
        max_running: sequences that run at a time.
        max_batch_tokens: tokens read in one step; at least max_running, or rule 1 could not hold.
    Attributes:
        waiting, running: samples in the order of arrival.
    Raises:
        ValueError: sizes that contradict each other.
    """

    def __init__(self, blocks: BlockManager, max_running: int, max_batch_tokens: int):
        if not 1 <= max_running <= max_batch_tokens:
            raise ValueError(
                f"max_running must be 1 or more and at most max_batch_tokens, so that each sequence reads a token in "
                f"each step, got {max_running=}, {max_batch_tokens=}."
            )
        self.blocks, self.max_running, self.max_batch_tokens = blocks, max_running, max_batch_tokens
        self.waiting: list[Sample] = []
        self.running: list[Sample] = []

    def add(self, sample: Sample) -> None:
        insort(self.waiting, sample, key=lambda one: one.arrived)

    def fork(self, sample: Sample, other: Sample) -> None:
        """Let `other` run beside `sample`, which has read all of its tokens, with the same blocks."""
        other.table = self.blocks.fork(sample.table)
        insort(self.running, other, key=lambda one: one.arrived)

    def remove(self, sample: Sample) -> None:
        """Take a sample out, wherever it is, and free its blocks."""
        for queue in (self.waiting, self.running):
            if sample in queue:
                queue.remove(sample)
        self._release(sample)

    def start_over(self, blocks: BlockManager, samples: list[Sample]) -> None:
        """All of these wait, none runs, and the blocks are other ones."""
        self.blocks, self.running = blocks, []
        self.waiting = sorted(samples, key=lambda one: one.arrived)

    def preempt(self, sample: Sample) -> None:
        """Send a running sample back to wait; it keeps what it has written."""
        self.running.remove(sample)
        self._release(sample)
        self.add(sample)

    def plan(self) -> Plan:
        """The next step. Empty reads: nothing to do."""
        plan, budget = Plan(), self.max_batch_tokens
        position = 0
        while position < len(self.running):
            sample = self.running[position]
            behind = len(self.running) - position - 1  # each of them must get a token too
            count = min(sample.unread, budget - behind)
            if not self._make_room(sample, count, plan):
                continue  # it was itself the last in line: whoever stands at this position now is next
            self._read(sample, count, plan)
            budget -= count
            position += 1
        while budget > 0 and self.waiting and not plan.preempted and self._admit(self.waiting[0]):
            sample = self.waiting.pop(0)
            self.running.append(sample)  # all that run came before all that wait, so it is the last in line
            plan.shared_tokens += len(sample.table.tokens)
            count = min(sample.unread, budget)
            self._read(sample, count, plan)
            budget -= count
        return plan

    @property
    def places_taken(self) -> int:
        """Running sequences, and those that they will fork into."""
        return sum(1 + sample.to_fork for sample in self.running)

    def _make_room(self, sample: Sample, count: int, plan: Plan) -> bool:
        """Reserve a running sample's next positions, preempting from the end of the line; False: it was itself."""
        while True:
            try:
                plan.copies += self.blocks.reserve(sample.table, count)
                return True
            except OutOfBlocks:
                last = self.running[-1]
                self.preempt(last)
                plan.preempted.append(last)
                if last is sample:
                    return False

    def _admit(self, sample: Sample) -> bool:
        """Open a waiting sample's table and reserve all that it has to read, if there is room; else change nothing.

        One free block is left for every running sequence: who is admitted into the last one is often preempted at once.
        """
        if self.places_taken + 1 + sample.to_fork > self.max_running:
            return False
        table = self.blocks.open(sample.tokens)
        needed = self.blocks.blocks_needed(table, len(sample.tokens))
        if needed > self.blocks.free_blocks - len(self.running):
            self.blocks.undo_open(table)
            return False
        self.blocks.reserve(table, len(sample.tokens) - len(table.tokens))
        sample.table = table
        return True

    def _read(self, sample: Sample, count: int, plan: Plan) -> None:
        done = len(sample.table.tokens)
        plan.reads.append((sample, count))
        self.blocks.commit(sample.table, sample.tokens[done : done + count])

    def _release(self, sample: Sample) -> None:
        if sample.table is not None:
            self.blocks.release(sample.table)
            sample.table = None
