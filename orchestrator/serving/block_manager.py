"""Who holds which block of the paged cache: reference counts, prefix sharing, copy on write.

The cache is `num_blocks` blocks of `block_size` slots; a slot holds one token's keys and values, of all layers. A
sequence has a *block table*: the list of the blocks in which its tokens stand, in order, wherever in the cache. It sees
one straight line of slots, as a program does through virtual memory, and nothing is set aside for what it may yet write
but the rest of its last block. This file decides; it holds no tensor and moves no number.

Sources: Kwon et al., 2023, "Efficient Memory Management for Large Language Model Serving with PagedAttention", section
4.2 (block tables) and 4.4 (sharing and copy on write); vLLM's "automatic prefix caching" (chained hashes).
"""

from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from orchestrator.serving.prefix import Prefix, chained_hash, extended


class OutOfBlocks(Exception):  # noqa: N818  it is no error: the scheduler hears it, and preempts somebody
    """There are too few free blocks just now. Nothing was changed."""


@dataclass(eq=False)  # two sequences with equal tables are still two
class BlockTable:
    """Where one sequence's keys and values stand: position i in slot i % block_size of blocks[i // block_size].

    Attributes:
        blocks: the blocks, in the order of the sequence. Only the last ones may be partly filled or empty.
        tokens: the tokens whose keys and values are written: len(tokens) is the length, and the next position.
        reserved: positions after them that `reserve` promised and `commit` has not reported written. Only these may be
            written: their blocks belong to this table alone.
    """

    blocks: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    reserved: int = 0


@dataclass(frozen=True)
class Copy:
    """What must be copied in the cache, block `source` to block `target`, before anything of this step is written.

    Do several in the order in which they came: a block that was given back may be the target of the next.
    """

    source: int
    target: int


@dataclass
class BlockStats:
    """What happened so far. hits: tables that opened with shared blocks; shared_tokens: that need no prefill for it;
    copies: blocks copied on write; evictions: findable blocks that were taken for something else."""

    hits: int = 0
    shared_tokens: int = 0
    copies: int = 0
    evictions: int = 0


class BlockManager:
    """Hands out the blocks of a paged cache, and knows which sequences may share one.

    A sequence: `open`, then for each step `reserve`, write to the cache, `commit`; at last `release`. Each block is
    always in one of three places: held by as many tables as its count says; free and empty; or free and *findable*:
    nobody holds it, but its contents are still there for the next sequence that begins alike.

    Args:
        num_blocks: blocks in the cache.
        block_size: slots in a block.
        prefix_sharing: whether `open` looks for blocks that are filled already. `fork` shares in any case.
        hash_function: (hash of the prefix before, tokens of the block) -> int. Any function gives the same sharing or
            less, never a wrong one; tests hand in a bad one.
    Raises:
        ValueError: sizes that are not positive.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        prefix_sharing: bool = True,
        *,
        hash_function: Callable[[int, tuple[int, ...]], int] = chained_hash,
    ):
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"num_blocks and block_size must be 1 or more, got {num_blocks} and {block_size}.")
        self.num_blocks, self.block_size, self.prefix_sharing = num_blocks, block_size, prefix_sharing
        self.stats = BlockStats()
        self._hash = hash_function
        self._counts = [0] * num_blocks  # how many tables hold each block: at 0 it is free, above 1 nobody may write
        self._empty = list(reversed(range(num_blocks)))  # free, nothing of use in it; the last is taken next
        self._evictable: OrderedDict[int, None] = OrderedDict()  # free but findable; the least recently used first
        self._prefixes: dict[int, Prefix] = {}  # what stands in a full block
        self._findable: dict[int, int] = {}  # a prefix's hash -> the one block found by it; no sharing: stays empty
        self._tables: set[BlockTable] = set()  # the open tables: a second release or a stranger's table shows

    def open(self, tokens: Sequence[int]) -> BlockTable:
        """A table for a sequence that begins with `tokens`, holding what is filled of them already: whole blocks only.

        The last token is never among them: the model must still run on it, since its logits choose the next token.
        Needs no free block, so it never fails for want of one.
        Raises:
            ValueError: no tokens.
        """
        if len(tokens) == 0:
            raise ValueError("A sequence needs at least one token, got none: nothing could be predicted from it.")
        tokens = [int(token) for token in tokens]
        found = self._longest_prefix(tokens)
        for block in found:
            self._counts[block] += 1
            self._evictable.pop(block, None)
        table = BlockTable(found, tokens[: len(found) * self.block_size])
        self._tables.add(table)
        self.stats.hits += bool(found)
        self.stats.shared_tokens += len(table.tokens)
        return table

    def undo_open(self, table: BlockTable) -> None:
        """As if a table had never been opened: for who looked, found too few free blocks, and comes back later.

        Raises:
            ValueError: a table that is not open.
        """
        shared = len(table.tokens)
        self.release(table)
        self.stats.hits -= bool(shared)
        self.stats.shared_tokens -= shared

    def reserve(self, table: BlockTable, new_tokens: int) -> list[Copy]:
        """Make the next `new_tokens` positions of a table writable. Ask before every write.

        Returns:
            What the engine must copy before it writes: the partly filled block, where another table holds it too.
        Raises:
            OutOfBlocks: too few free blocks; nothing has changed then.
            ValueError: a table that is not open, or a negative number.
        """
        self._must_be_open(table)
        if new_tokens < 0:
            raise ValueError(f"new_tokens must be 0 or more, got {new_tokens}.")
        missing = self.blocks_needed(table, len(table.tokens) + new_tokens)
        if missing > self.free_blocks:  # before anything is changed: a table is never left half served
            raise OutOfBlocks(f"{missing} blocks are needed and {self.free_blocks} of {self.num_blocks} are free.")
        copies = []
        if new_tokens and self._next_is_shared(table):
            copies = [Copy(source=table.blocks[-1], target=self._take())]
            self._counts[table.blocks[-1]] -= 1  # another table holds it, so this cannot free it
            table.blocks[-1] = copies[0].target
            self.stats.copies += 1
        table.reserved = max(table.reserved, new_tokens)
        total = self._blocks_for(len(table.tokens) + table.reserved)
        table.blocks += [self._take() for _ in range(total - len(table.blocks))]
        return copies

    def commit(self, table: BlockTable, tokens: Sequence[int]) -> None:
        """Say that the keys and values of these tokens are written: blocks that they fill may be shared from now on.

        Not sooner: who found a block between `reserve` and the write would read what is not there. (Within one step it
        is soon enough to say it when the step is planned, if all of its keys are written before any is read.)

        Raises:
            ValueError: a table that is not open, or more tokens than are reserved.
        """
        self._must_be_open(table)
        if len(tokens) > table.reserved:
            raise ValueError(f"{len(tokens)} tokens are committed, but only {table.reserved} positions were reserved.")
        before = len(table.tokens)
        table.tokens.extend(int(token) for token in tokens)
        table.reserved -= len(tokens)
        for i in range(before // self.block_size, len(table.tokens) // self.block_size):
            self._register(table, i)

    def fork(self, table: BlockTable) -> BlockTable:
        """A second sequence with the same tokens so far (n samples of one prompt): all blocks shared, also the last.

        Raises:
            ValueError: a table that is not open, or with positions that are reserved and not yet committed: both tables
                would write to them.
        """
        self._must_be_open(table)
        if table.reserved:
            raise ValueError(f"{table.reserved} positions are reserved and not committed: fork between two steps.")
        for block in table.blocks:
            self._counts[block] += 1
        other = BlockTable(list(table.blocks), list(table.tokens))
        self._tables.add(other)
        return other

    def release(self, table: BlockTable) -> None:
        """Give all of a table's blocks back, at the end, at a cancel or at a preemption. The table is empty afterwards.

        Raises:
            ValueError: a table that is not open, for one because it was released before.
        """
        self._must_be_open(table)
        self._tables.remove(table)
        # The end of a sequence goes first in line: without its beginning it could not be found anyway.
        for block in reversed(table.blocks):
            self._counts[block] -= 1
            if self._counts[block] == 0 and self._is_findable(block):
                self._evictable[block] = None
            elif self._counts[block] == 0:
                self._prefixes.pop(block, None)  # full, but an equal block is the one that is found
                self._empty.append(block)
        table.blocks, table.tokens, table.reserved = [], [], 0

    def blocks_needed(self, table: BlockTable | None, total_tokens: int) -> int:
        """Free blocks that it takes for a table (None: a new one that shares nothing) to hold `total_tokens` tokens."""
        table = table or BlockTable()
        more = max(0, self._blocks_for(total_tokens) - len(table.blocks))
        return more + (total_tokens > len(table.tokens) and self._next_is_shared(table))

    @property
    def free_blocks(self) -> int:
        """Blocks that no table holds, those included that are still findable."""
        return len(self._empty) + len(self._evictable)

    @property
    def used_blocks(self) -> int:
        """Blocks that a table holds; shared ones count once."""
        return self.num_blocks - self.free_blocks

    @property
    def cached_blocks(self) -> list[int]:
        """Free blocks that are still findable, in the order in which they would be evicted."""
        return list(self._evictable)

    def reference_count(self, block: int) -> int:
        """How many tables hold a block."""
        return self._counts[block]

    def check(self) -> None:
        """Count everything again. For tests, and to find a mistake in what calls this.
        Raises:
            RuntimeError: with all that is inconsistent.
        """
        wrong, size = [], self.block_size
        held = Counter(block for table in self._tables for block in table.blocks)
        if self._counts != [held[block] for block in range(self.num_blocks)]:
            wrong.append(f"the counts are {self._counts}, the tables hold {dict(held)}")
        if sorted([*self._empty, *self._evictable, *held]) != list(range(self.num_blocks)):
            wrong.append(f"not each block once: {self._empty} empty, {[*self._evictable]} evictable, {[*held]} held")
        own = {block: prefix.hash for block, prefix in self._prefixes.items()}
        if any(own.get(block) != hash_value for hash_value, block in self._findable.items()):
            wrong.append(f"found by {self._findable}, but the hashes are {own}")
        if set(self._evictable) - set(self._findable.values()) or set(self._empty) & set(own):
            wrong.append("a block is evictable but not findable, or empty with a prefix")
        for table in self._tables:
            length, next_block = len(table.tokens), len(table.tokens) // size
            if len(table.blocks) != self._blocks_for(length + table.reserved):
                wrong.append(f"{len(table.blocks)} blocks for {length} tokens and {table.reserved} reserved positions")
            if table.reserved and any(self._counts[block] != 1 for block in table.blocks[next_block:]):
                wrong.append(f"a shared block is about to be written: one of {table.blocks[next_block:]}")
            said = [self._prefixes[block].tokens for block in table.blocks if block in own]
            if said != [tuple(table.tokens[i * size : (i + 1) * size]) for i in range(next_block)]:
                wrong.append(f"the full blocks of {table.blocks} are said to hold {said}, not {table.tokens}")
        if wrong:
            raise RuntimeError("The block manager is inconsistent: " + "; ".join(wrong) + ".")

    def _longest_prefix(self, tokens: list[int]) -> list[int]:
        """The blocks that hold the beginning of `tokens`: whole blocks only, and never the last token."""
        found, parent = [], None
        for end in range(self.block_size, len(tokens), self.block_size):
            prefix = extended(parent, tokens[end - self.block_size : end], self._hash)
            block = self._findable.get(prefix.hash)
            if block is None or not self._prefixes[block].equals(prefix):
                break
            found.append(block)
            parent = self._prefixes[block]  # so that comparing the next block's chain stops at this one
        return found

    def _blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.block_size)

    def _register(self, table: BlockTable, i: int) -> None:
        """Block i of a table is full: note what stands in it, and let it be found, unless an equal one already is."""
        block, size = table.blocks[i], self.block_size
        parent = self._prefixes[table.blocks[i - 1]] if i else None
        prefix = extended(parent, table.tokens[i * size : (i + 1) * size], self._hash)
        self._prefixes[block] = prefix
        if not self.prefix_sharing:
            return
        # Two sequences may fill equal blocks at the same time, or hashes collide: both blocks are valid, one is found.
        found = self._prefixes[self._findable.setdefault(prefix.hash, block)]
        if found.equals(prefix):
            self._prefixes[block] = found  # one object for equal prefixes: comparing stops at it

    def _is_findable(self, block: int) -> bool:
        return block in self._prefixes and self._findable.get(self._prefixes[block].hash) == block

    def _next_is_shared(self, table: BlockTable) -> bool:
        """Whether the next token would be written into a block that another table holds too: a partly filled one."""
        next_block, slot = divmod(len(table.tokens), self.block_size)
        return slot > 0 and self._counts[table.blocks[next_block]] > 1

    def _take(self) -> int:
        """A free block, from now on held once; a findable one only when no other is left. There must be one."""
        if self._empty:
            block = self._empty.pop()
        else:
            block, _ = self._evictable.popitem(last=False)
            del self._findable[self._prefixes.pop(block).hash]
            self.stats.evictions += 1
        self._counts[block] = 1
        return block

    def _must_be_open(self, table: BlockTable) -> None:
        if table not in self._tables:
            raise ValueError("This table is not open here: it was released already, or another manager opened it.")
