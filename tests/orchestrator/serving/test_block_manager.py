"""The block manager as a state machine: whatever is opened, written, forked and released whenever, the books are right.

The test keeps its own books, and a cache in which each slot holds what a real one's would be a function of: all tokens
up to that position. So a block that is shared wrongly, copied too late or overwritten reads back wrong.
"""

import random
from collections import Counter

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from orchestrator.serving.block_manager import BlockManager, BlockTable, Copy, OutOfBlocks
from orchestrator.serving.prefix import chained_hash

# Few stems and two tokens, so that prefixes really meet; few blocks, so that they really run out.
STEMS = [[0] * 9, [0, 1, 1, 0, 1, 0, 0, 1, 1], [0, 1, 1, 0, 1, 1, 1, 0, 0]]
TOKENS = st.builds(
    lambda stem, length, rest: (stem[:length] + rest) or [1],
    st.sampled_from(STEMS), st.integers(0, 9), st.lists(st.integers(0, 1), max_size=3),
)  # fmt: skip
WHICH = st.integers(0, 5)
HASHES = {
    "good": chained_hash,
    "constant": lambda parent, tokens: 7,  # every block collides with every other
    "of the block alone": lambda parent, tokens: hash(tokens),  # forgets what came before
    "three values": lambda parent, tokens: hash((parent, tokens)) % 3,
}


class FakeEngine:
    """A cache and what an engine does with it: copies as it is told, then writes; it reads through block tables."""

    def __init__(self, manager: BlockManager):
        self.manager = manager
        self.cache = [[None] * manager.block_size for _ in range(manager.num_blocks)]
        self.pending: list[Copy] = []

    def reserve(self, table: BlockTable, new_tokens: int) -> None:
        self.pending += self.manager.reserve(table, new_tokens)

    def write(self, table: BlockTable, tokens: list[int]) -> None:
        for copy in self.pending:
            self.cache[copy.target] = list(self.cache[copy.source])
        self.pending = []
        for i, position in enumerate(range(len(table.tokens), len(table.tokens) + len(tokens))):
            block, slot = divmod(position, self.manager.block_size)
            self.cache[table.blocks[block]][slot] = (*table.tokens, *tokens[: i + 1])
        self.manager.commit(table, tokens)

    def read(self, table: BlockTable) -> list[tuple]:
        size = self.manager.block_size
        return [self.cache[table.blocks[i // size]][i % size] for i in range(len(table.tokens))]


class Books(RuleBasedStateMachine):
    """Requests in any order. `held` is the test's own record: table -> the tokens that it must hold."""

    @initialize(
        num_blocks=st.integers(2, 9),
        block_size=st.integers(1, 4),
        sharing=st.sampled_from([True, True, True, False]),
        hash_name=st.sampled_from(["good", *HASHES]),
    )
    def start(self, num_blocks, block_size, sharing, hash_name):
        self.manager = BlockManager(num_blocks, block_size, sharing, hash_function=HASHES[hash_name])
        self.engine = FakeEngine(self.manager)
        self.held: dict[BlockTable, list[int]] = {}
        self.filled: set[tuple] = set()  # every run of full blocks that was ever written
        self.hash_name = hash_name
        self.out_of_blocks = 0

    def table(self, which: int) -> BlockTable:
        return list(self.held)[which % len(self.held)]

    def seen(self):
        """All that a caller can see: to compare before and after."""
        tables = [(list(table.blocks), list(table.tokens), table.reserved) for table in self.held]
        counts = [self.manager.reference_count(block) for block in range(self.manager.num_blocks)]
        return tables, counts, self.manager.cached_blocks, self.manager.free_blocks, vars(self.manager.stats).copy()

    def try_reserve(self, table: BlockTable, new_tokens: int) -> bool:
        needed = self.manager.blocks_needed(table, len(table.tokens) + new_tokens)
        free, before = self.manager.free_blocks, self.seen()
        try:
            self.engine.reserve(table, new_tokens)
        except OutOfBlocks:
            self.out_of_blocks += 1
            assert needed > free
            assert self.seen() == before  # nothing is half done
            return False
        assert self.manager.free_blocks == free - needed
        assert table.reserved >= new_tokens
        return True

    def write_reserved(self, table: BlockTable, tokens: list[int]) -> None:
        self.engine.write(table, tokens)
        self.held[table] += tokens
        size, length = self.manager.block_size, len(self.held[table])
        self.filled |= {tuple(self.held[table][:end]) for end in range(size, length + 1, size)}

    @rule(tokens=TOKENS, prefill=st.booleans())
    def open(self, tokens, prefill):
        free = self.manager.free_blocks
        table = self.manager.open(tokens)
        length, size = len(table.tokens), self.manager.block_size
        assert self.manager.free_blocks <= free
        ends = [end for end in range(size, len(tokens), size) if tuple(tokens[:end]) in self.filled]
        if not self.manager.prefix_sharing:
            assert length == 0
        elif self.hash_name == "good" and self.manager.stats.evictions == 0:
            assert length == max(ends, default=0)  # all that was ever filled is still there to be found
        else:
            assert length in (0, *ends)
        self.held[table] = tokens[:length]
        if prefill and self.try_reserve(table, len(tokens) - length):
            self.write_reserved(table, tokens[length:])

    @precondition(lambda self: self.held)
    @rule(which=WHICH, new_tokens=st.integers(0, 9))
    def reserve(self, which, new_tokens):
        self.try_reserve(self.table(which), new_tokens)

    @precondition(lambda self: self.held)
    @rule(which=WHICH, tokens=st.lists(st.integers(0, 1), min_size=1, max_size=4))
    def write_all_or_a_part(self, which, tokens):
        table = self.table(which)
        if table.reserved or self.try_reserve(table, len(tokens)):
            self.write_reserved(table, tokens[: table.reserved])

    @precondition(lambda self: self.held)
    @rule(which=WHICH)
    def write_more_than_is_reserved(self, which):
        before = self.seen()
        with pytest.raises(ValueError, match="reserved"):
            self.manager.commit(self.table(which), [0] * (self.table(which).reserved + 1))
        assert self.seen() == before

    @precondition(lambda self: self.held)
    @rule(which=WHICH, copies=st.integers(1, 3))
    def fork(self, which, copies):
        table, free = self.table(which), self.manager.free_blocks
        if table.reserved:
            with pytest.raises(ValueError, match="between two steps"):
                self.manager.fork(table)
            return
        for _ in range(copies):
            other = self.manager.fork(table)
            assert (other.blocks, other.tokens, self.manager.free_blocks) == (table.blocks, table.tokens, free)
            self.held[other] = list(self.held[table])

    @precondition(lambda self: self.held)
    @rule(which=WHICH)
    def release(self, which):
        table = self.table(which)
        self.manager.release(table)
        del self.held[table]
        for misuse in (self.manager.release, self.manager.fork, lambda table: self.manager.reserve(table, 1)):
            with pytest.raises(ValueError, match="not open"):
                misuse(table)

    @invariant()
    def counts_are_those_of_the_tables(self):
        if hasattr(self, "manager"):
            holders = Counter(block for table in self.held for block in set(table.blocks))
            blocks = range(self.manager.num_blocks)
            assert [self.manager.reference_count(block) for block in blocks] == [holders[block] for block in blocks]
            assert all(len(set(table.blocks)) == len(table.blocks) for table in self.held)

    @invariant()
    def free_and_used_are_disjoint_and_complete(self):
        if hasattr(self, "manager"):
            used = {block for table in self.held for block in table.blocks}
            assert self.manager.used_blocks == len(used)
            assert self.manager.free_blocks == self.manager.num_blocks - len(used)
            assert not used & set(self.manager.cached_blocks)

    @invariant()
    def what_may_be_written_is_nobody_elses(self):
        for table in getattr(self, "held", ()):
            size = self.manager.block_size
            last = len(table.tokens) + table.reserved
            assert len(table.blocks) * size >= last
            for position in range(len(table.tokens), last):
                block = table.blocks[position // size]
                assert self.manager.reference_count(block) == 1
                assert [block in other.blocks for other in self.held].count(True) == 1

    @invariant()
    def every_table_reads_its_own_tokens(self):
        for table, tokens in getattr(self, "held", {}).items():
            assert table.tokens == tokens
            if not self.engine.pending:  # between two steps: everything that was promised is there
                assert self.engine.read(table) == [tuple(tokens[: i + 1]) for i in range(len(tokens))]

    @invariant()
    def it_agrees_with_itself(self):
        if hasattr(self, "manager"):
            self.manager.check()

    def teardown(self):
        if hasattr(self, "manager"):
            for table in list(self.held):
                self.manager.release(table)
            self.manager.check()
            assert self.manager.free_blocks == self.manager.num_blocks
            # All of them can really be taken, whatever was left in them.
            table = self.manager.open([0])
            self.manager.reserve(table, self.manager.num_blocks * self.manager.block_size)
            assert sorted(table.blocks) == list(range(self.manager.num_blocks))


TestBooks = Books.TestCase
TestBooks.settings = settings(
    max_examples=200, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)


def one_random_rule(books: Books, draw: random.Random) -> None:
    actions = ["open", "open", "reserve", "write", "write", "write", "overdraw", "fork", "fork", "release"]
    action, which = draw.choice(actions) if books.held else "open", draw.randrange(6)
    if action == "open":
        prompt = draw.choice(STEMS)[: draw.randint(0, 9)] + draw.choices([0, 1], k=draw.randint(0, 3))
        books.open(prompt or [1], draw.random() < 0.7)
    elif action == "reserve":
        books.reserve(which, draw.randint(0, 9))
    elif action == "write":
        books.write_all_or_a_part(which, draw.choices([0, 1], k=draw.randint(1, 3)))
    elif action == "overdraw":
        books.write_more_than_is_reserved(which)
    elif action == "fork":
        books.fork(which, draw.randint(1, 2))
    else:
        books.release(which)
    while len(books.held) > 5:
        books.release(draw.randrange(6))


def test_a_long_random_walk_meets_everything_that_can_happen():
    """The same rules and invariants in long runs: hypothesis prefers short ones, which rarely evict a block."""
    draw = random.Random(0)
    met = Counter()
    for walk in range(12):
        books = Books()
        books.start(draw.randint(6, 12), draw.randint(2, 4), walk != 0, "good" if walk % 2 else draw.choice([*HASHES]))
        for _ in range(200):
            one_random_rule(books, draw)
            books.counts_are_those_of_the_tables()
            books.free_and_used_are_disjoint_and_complete()
            books.what_may_be_written_is_nobody_elses()
            books.every_table_reads_its_own_tokens()
            books.it_agrees_with_itself()
        met += Counter(vars(books.manager.stats)) + Counter(out_of_blocks=books.out_of_blocks)
        books.teardown()
    assert all(met[name] > 50 for name in ("hits", "shared_tokens", "copies", "evictions", "out_of_blocks")), met


def written(manager: BlockManager, prompt: list[int]) -> BlockTable:
    """A table whose prompt is written, as after a prefill."""
    table = manager.open(prompt)
    assert manager.reserve(table, len(prompt) - len(table.tokens)) == []
    manager.commit(table, prompt[len(table.tokens) :])
    return table


def test_a_prompt_that_begins_like_a_written_one_shares_its_full_blocks():
    manager = BlockManager(8, 4)
    first = written(manager, list(range(10)))
    second = manager.open([*range(8), 77])
    assert second.blocks == first.blocks[:2]
    assert second.tokens == list(range(8))
    assert [manager.reference_count(block) for block in first.blocks] == [2, 2, 1]
    assert (manager.stats.hits, manager.stats.shared_tokens) == (1, 8)


def test_the_last_token_is_never_shared_since_its_logits_are_needed():
    manager = BlockManager(8, 4)
    written(manager, list(range(8)))
    assert manager.open(list(range(8))).tokens == list(range(4))


def test_a_block_cannot_be_found_before_it_is_written():
    manager = BlockManager(8, 2)
    table = manager.open([1, 2, 3, 4])
    manager.reserve(table, 4)
    assert manager.open([1, 2, 3, 4]).blocks == []
    manager.commit(table, [1, 2, 3])
    assert manager.open([1, 2, 3, 4, 5]).tokens == [1, 2]


def test_a_released_block_is_found_until_it_is_needed_and_the_end_of_a_sequence_goes_first():
    manager = BlockManager(4, 2)
    old = written(manager, [1, 2, 3, 4, 5, 6])
    ends = old.blocks[2]
    manager.release(old)
    assert manager.free_blocks == 4
    other = written(manager, [7, 8, 9])  # the empty block, then one of the three
    assert other.blocks[1] == ends
    assert manager.stats.evictions == 1
    assert manager.open([1, 2, 3, 4, 5, 6]).tokens == [1, 2, 3, 4]


def test_the_least_recently_used_sequence_is_evicted_first():
    manager = BlockManager(3, 2)
    for prompt in ([1, 1], [2, 2], [3, 3]):
        manager.release(written(manager, prompt))
    manager.release(manager.open([1, 1, 0]))  # used again
    manager.release(written(manager, [4, 4]))
    found = [manager.open([token, token, 0]).tokens for token in (1, 2, 3, 4)]
    assert found == [[1, 1], [], [3, 3], [4, 4]]


def test_a_child_is_not_found_through_the_number_of_an_evicted_parent():
    """A block held [1, 1] and now holds [2, 2]. Its child, [5, 5] after [1, 1], is still there: not one of [2, 2]."""
    manager = BlockManager(3, 2, hash_function=HASHES["of the block alone"])
    first, second = manager.open([1, 1, 5, 5]), manager.open([1, 1, 5, 5])
    for table in (first, second):
        manager.reserve(table, 2)
    for table in (first, second):
        manager.commit(table, [1, 1])  # the second one's is a twin of the first one's, which is the one that is found
    manager.reserve(second, 2)
    manager.commit(second, [5, 5])
    (parent,) = first.blocks
    manager.release(first)  # now nobody holds the parent that the child is found through
    assert written(manager, [2, 2]).blocks == [parent]
    assert manager.stats.evictions == 1
    assert manager.open([2, 2, 5, 5, 0]).tokens == [2, 2]
    manager.check()


def test_two_sequences_that_filled_equal_blocks_at_the_same_time_both_stay_valid():
    manager = BlockManager(8, 2)
    tables = [manager.open([1, 2, 3]) for _ in range(2)]
    for table in tables:
        manager.reserve(table, 3)
    for table in tables:
        manager.commit(table, [1, 2, 3])
    assert tables[0].blocks[0] != tables[1].blocks[0]
    third = manager.open([1, 2, 3])
    assert third.blocks == tables[0].blocks[:1]
    manager.release(tables[1])
    manager.check()
    assert manager.free_blocks == 6


@pytest.mark.parametrize("name", [*HASHES])
def test_equal_tokens_after_another_beginning_are_never_shared(name):
    manager = BlockManager(8, 2, hash_function=HASHES[name])
    written(manager, [1, 1, 5, 5, 0])
    other = manager.open([2, 2, 5, 5, 0])
    assert other.tokens == []
    assert manager.open([5, 5, 0]).tokens == []
    manager.reserve(other, 5)
    manager.commit(other, [2, 2, 5, 5, 0])
    for prompt in ([1, 1, 5, 5, 0], [2, 2, 5, 5, 0]):
        assert manager.open(prompt).tokens in ([], prompt[:2], prompt[:4])
    manager.check()


def test_n_samples_share_all_blocks_and_copy_only_the_last_one_when_they_part():
    manager = BlockManager(8, 4)
    first = written(manager, [1, 2, 3, 4, 5])
    full, last = first.blocks
    samples = [first, manager.fork(first), manager.fork(first)]
    assert manager.used_blocks == 2
    copies = [manager.reserve(table, 1) for table in samples]
    assert [len(copy) for copy in copies] == [1, 1, 0]  # who comes last keeps the original
    assert all(copy.source == last for copied in copies for copy in copied)
    assert {table.blocks[0] for table in samples} == {full}
    assert len({table.blocks[1] for table in samples}) == 3
    assert manager.used_blocks == 4


def test_a_sequence_of_whole_blocks_forks_without_a_copy():
    manager = BlockManager(8, 2)
    first = written(manager, [1, 2, 3, 4])
    second = manager.fork(first)
    assert manager.reserve(first, 1) == manager.reserve(second, 1) == []
    assert first.blocks[2] != second.blocks[2]


def test_too_few_blocks_change_nothing_and_say_how_many_are_missing():
    manager = BlockManager(3, 2)
    first = written(manager, [1, 2, 3])
    second = manager.fork(first)
    with pytest.raises(OutOfBlocks, match="2 blocks are needed and 1 of 3 are free"):
        manager.reserve(second, 2)  # one to copy, one to grow
    assert second.blocks == first.blocks
    assert manager.reserve(second, 1) == [Copy(source=1, target=2)]


def test_blocks_needed_counts_the_copy_too():
    manager = BlockManager(8, 4)
    assert [manager.blocks_needed(None, total) for total in (0, 1, 4, 5)] == [0, 1, 1, 2]
    table = written(manager, [1, 2, 3])
    assert [manager.blocks_needed(table, total) for total in (3, 4, 5)] == [0, 0, 1]
    manager.fork(table)
    assert [manager.blocks_needed(table, total) for total in (3, 4, 5)] == [0, 1, 2]


def test_without_sharing_no_prompt_is_found_but_samples_still_share():
    manager = BlockManager(8, 2, prefix_sharing=False)
    table = written(manager, [1, 2, 3])
    assert manager.open([1, 2, 3]).blocks == []
    manager.fork(table)
    assert manager.used_blocks == 2
    manager.check()


def test_tokens_may_be_numbers_of_any_library():
    manager = BlockManager(8, 2)
    table = manager.open(torch.tensor([1, 2, 3]))
    manager.reserve(table, 3)
    manager.commit(table, torch.tensor([1, 2, 3]))
    assert manager.open([1, 2, 3]).tokens == [1, 2]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: BlockManager(0, 16), "1 or more, got 0 and 16"),
        (lambda: BlockManager(4, 0), "1 or more"),
        (lambda: BlockManager(4, 2).open([]), "at least one token"),
        (lambda: (m := BlockManager(4, 2)).reserve(m.open([1]), -1), "0 or more, got -1"),
        (lambda: (m := BlockManager(4, 2)).commit(m.open([1]), [1]), "only 0 positions were reserved"),
        (lambda: BlockManager(4, 2).release(BlockManager(4, 2).open([1])), "another manager"),
    ],
)
def test_a_wrong_call_is_answered_in_words(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda manager, table: table.blocks.pop(), "the counts are"),
        (lambda manager, table: manager._empty.append(0), "not each block once"),
        (lambda manager, table: manager._prefixes.pop(0), "but the hashes are"),
        (lambda manager, table: table.tokens.append(1), "0 reserved positions"),
        (lambda manager, table: table.tokens.__setitem__(0, 9), "are said to hold"),
    ],
)
def test_check_says_what_is_inconsistent(spoil, message):
    manager = BlockManager(4, 2)
    table = written(manager, [1, 2])
    manager.check()
    spoil(manager, table)
    with pytest.raises(RuntimeError, match=message):
        manager.check()
