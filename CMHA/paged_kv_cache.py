"""PagedKVCache: keys and values in blocks of a few tokens, so that many sequences of any length share one memory.

A `KVCache` sets aside the longest possible text for every row; most of it is never filled. Here memory is cut into
blocks of `block_size` tokens, and a sequence has a *block table*: the numbers of its blocks, in the order of its text.
It grows by one block when it needs one, sequences that begin alike may hold the same blocks, and nothing has to lie
beside anything else. Who holds which block is decided elsewhere (`orchestrator/serving/block_manager.py`); here it is
looked up.
Source: "Efficient Memory Management for Large Language Model Serving with PagedAttention" (Kwon et al., 2023),
section 4.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from CMHA.kv_cache import KVCache, LayerCache
from CMHA.masks import AttentionMask

Pool = Float[Tensor, "blocks kv_heads block_size head_dim"]  # as attention is handed it


class Pages(NamedTuple):
    """What a reader of pages must know of them before it sees them.

    Attributes:
        block_size: tokens in a block.
        dtype: of the keys; under autocast it may be another than the queries'.
    """

    block_size: int = 16
    dtype: torch.dtype = torch.float32


class PagedKVCache(KVCache):
    """One pool of blocks for each layer; block b holds the same tokens in all of them.

    Args:
        n_layers, num_kv_heads, head_dim: as in the model.
        num_blocks, block_size: the memory, num_blocks * block_size tokens.
        dtype, device: of the keys.
    Attributes:
        pools: a pair (keys, values) for each layer, both (num_blocks, block_size, kv_heads, D): a block's tokens stand
            one after the other, as flash-attn's paged kernels want them.
    Raises:
        ValueError: fewer than one block, or than one token in it.
    """

    def __init__(
        self, n_layers: int, num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int, **tensor_kind
    ):
        if min(num_blocks, block_size) < 1:
            raise ValueError(f"a paged cache needs blocks and tokens in them, got {num_blocks=}, {block_size=}.")
        self.num_blocks, self.block_size = num_blocks, block_size
        shape = (num_blocks, block_size, num_kv_heads, head_dim)
        self.pools = [
            (torch.zeros(shape, **tensor_kind), torch.zeros(shape, **tensor_kind)) for _ in range(n_layers)
        ]  # fmt: skip
        self.layers = []  # a layer is read and written through `at`

    @property
    def length(self) -> int:
        return 0  # how much has been read is a matter of each sequence: its block table knows

    @property
    def nbytes(self) -> int:
        """Memory set aside, in bytes."""
        return sum(keys.nbytes + values.nbytes for keys, values in self.pools)

    def at(self, mask: "PagedMask") -> list["PagedLayer"]:
        """The layers, ready to take the keys and values of the tokens of `mask`.

        Raises:
            ValueError: a mask that was made for blocks of another size, or that names a block which is not here.
        """
        if mask.block_size != self.block_size:
            raise ValueError(f"the mask is for blocks of {mask.block_size} tokens, the cache has {self.block_size}.")
        self.check_blocks(mask.highest_block)
        return [PagedLayer(keys, values, mask.slots) for keys, values in self.pools]

    def copy_block(self, source: int, target: int) -> None:
        """Block `target` becomes what `source` is, in every layer: before one of two holders writes into it.

        Raises:
            ValueError: a block that is not here.
        """
        self.check_blocks(source, target)
        for keys, values in self.pools:
            keys[target], values[target] = keys[source], values[source]

    def check_blocks(self, *blocks: int) -> None:
        """Raise unless the cache has these blocks: on a GPU a wrong number would end the process."""
        missing = [block for block in blocks if not 0 <= block < self.num_blocks]
        if missing:
            raise ValueError(f"the cache has blocks 0 to {self.num_blocks - 1}, asked for: {missing}.")

    def truncate(self, length: int) -> None:
        """Not here: a sequence is cut by passing a smaller length, and fewer blocks, to its next PagedMask.

        Raises:
            TypeError: always.
        """
        raise TypeError("a paged cache has no length of its own: cut the sequence's block table and its length.")


class PagedLayer(LayerCache):
    """One layer's pool during one forward pass, in the place of a LayerCache."""

    length = 0  # as in PagedKVCache

    def __init__(self, keys: Tensor, values: Tensor, slots: Int[Tensor, " tokens"]):
        self.keys, self.values, self.slots = keys, values, slots

    def append(
        self, keys: Float[Tensor, "1 kv_heads tokens head_dim"], values: Float[Tensor, "1 kv_heads tokens head_dim"]
    ) -> tuple[Pool, Pool]:
        """Write each new token into its slot, and return the whole pool: the mask says which blocks are whose."""
        for pool, new in ((self.keys, keys), (self.values, values)):
            # Under autocast new keys are narrower than the pool that was made in the weights' dtype.
            pool.view(-1, *pool.shape[2:]).index_copy_(0, self.slots, new[0].transpose(0, 1).to(pool.dtype))
        return self.keys.transpose(1, 2), self.values.transpose(1, 2)


@dataclass(frozen=True)
class PagedSequence:
    """One sequence's part of a forward pass.

    Attributes:
        rows: where its new tokens stand among those of the pass.
        table: (blocks,) int64, the numbers of its blocks in the order of its text, as many as its keys need.
        mask: as in any attention: its new tokens against all its tokens so far, themselves included.
    """

    rows: slice
    table: Int[Tensor, " blocks"]
    mask: AttentionMask


class PagedPart(NamedTuple):
    """Some of a pass's sequences, as kernels want them told.

    Attributes:
        rows: (tokens,) int64, where their new tokens stand among those of the pass.
        new_tokens, lengths: for each sequence its new tokens, and its keys, the new ones included.
        lengths_there: (sequences,) int32, the lengths on the device.
        tables: (sequences, most blocks) int32, each sequence's blocks, and 0 behind them.
    """

    rows: Int[Tensor, " tokens"]
    new_tokens: list[int]
    lengths: list[int]
    lengths_there: Int[Tensor, " sequences"]
    tables: Int[Tensor, "sequences most_blocks"]


class PagedMask(AttentionMask):
    """Who may attend to whom when the new tokens of several sequences stand in one row, end to end, without padding.

    Why one row: a prompt of 100 tokens and ten sequences that each write one are 110 tokens for every matrix product.
    Only attention has to tell them apart: each token sees its own sequence, through that sequence's block table.

    Args:
        tables: for each sequence the numbers of its blocks.
        lengths: for each sequence how many of its tokens are in the cache already.
        new_tokens: for each sequence how many are read now, 1 or more.
        block_size: of the cache.
        device: where the numbers go.
    Attributes:
        slots: (tokens,) int64, where in a layer's pool each new token goes.
        last: (sequences,) int64, where each sequence's last new token stands in the row.
        highest_block: the largest number in the tables.
    Raises:
        ValueError: a table that is too short for its tokens or names a block twice, a sequence without a new token,
            two sequences that would write into one slot.
    """

    paged = True

    def __init__(
        self,
        tables: Sequence[Sequence[int]],
        lengths: Sequence[int],
        new_tokens: Sequence[int],
        block_size: int,
        device=None,
    ):
        total = sum(new_tokens)
        super().__init__(total, total, device=device)
        self.block_size = block_size
        self.sequences: list[PagedSequence] = []
        self.blocks: list[list[int]] = []  # of each sequence, on the host
        slots, positions = [], []
        if not len(tables) == len(lengths) == len(new_tokens) > 0:
            counts = f"{len(tables)} tables, {len(lengths)} lengths and {len(new_tokens)} numbers of new tokens"
            raise ValueError(f"a pass needs the same number of each, and one sequence at least; got {counts}.")
        for table, length, new in zip(tables, lengths, new_tokens, strict=True):
            end = length + new
            count = -(-end // block_size)  # rounded up
            if new < 1 or length < 0 or count > len(table):
                raise ValueError(
                    f"{new} new tokens behind {length} need {count} blocks of {block_size}, and the table has "
                    f"{len(table)}: reserve them first."
                )
            blocks = list(table[:count])
            if len(set(blocks)) < count or min(blocks) < 0:
                raise ValueError(f"a block table names different blocks, by numbers from 0 on; got {blocks}.")
            slots += [blocks[at // block_size] * block_size + at % block_size for at in range(length, end)]
            positions += range(length, end)
            self.blocks.append(blocks)
        if len(set(slots)) < total:
            twice = sorted({slot // block_size for slot in slots if slots.count(slot) > 1})
            raise ValueError(f"two sequences would write into one place of the blocks {twice}: copy them first.")

        self.highest_block = max(map(max, self.blocks))
        padded = torch.tensor(padded_rows(self.blocks), dtype=torch.int64, device=device)  # one copy to the device
        start = 0
        for row, blocks, length, new in zip(padded, self.blocks, lengths, new_tokens, strict=True):
            mask = AttentionMask(new, length + new, device=device)
            self.sequences.append(PagedSequence(slice(start, start + new), row[: len(blocks)], mask))
            start += new
        self.slots = torch.tensor(slots, dtype=torch.int64, device=device)
        self.last = torch.tensor([s.rows.stop - 1 for s in self.sequences], device=device)
        self._positions = torch.tensor([positions], dtype=torch.int64, device=device)

    def positions(self) -> Int[Tensor, "1 tokens"]:
        """Each token's place in its own sequence."""
        return self._positions

    def tile(self, *_):
        raise TypeError("the tokens of a paged batch have no table in common: take each sequence's own mask.")

    def part(self, chosen: Sequence[int]) -> PagedPart:
        """The sequences with these numbers, one or more, as kernels want them told. Made once for all layers."""

        def make() -> PagedPart:
            taken = [self.sequences[number] for number in chosen]
            rows = [row for sequence in taken for row in range(sequence.rows.start, sequence.rows.stop)]
            lengths = [sequence.mask.key_len for sequence in taken]
            tables = padded_rows([self.blocks[number] for number in chosen])
            return PagedPart(
                torch.tensor(rows, dtype=torch.int64, device=self.device),
                [sequence.mask.query_len for sequence in taken],
                lengths,
                torch.tensor(lengths, dtype=torch.int32, device=self.device),
                torch.tensor(tables, dtype=torch.int32, device=self.device),
            )

        return self.once(f"part {tuple(chosen)}", make)

    def writing(self) -> list[int]:
        """The numbers of the sequences that read one new token: they are writing, and a key meets one query."""
        return [number for number, sequence in enumerate(self.sequences) if sequence.mask.query_len == 1]

    def reading(self) -> list[int]:
        """The numbers of the others: they are reading their prompt."""
        return [number for number, sequence in enumerate(self.sequences) if sequence.mask.query_len > 1]


def padded_rows(rows: list[list[int]]) -> list[list[int]]:
    """Rows of one length, with 0 behind the shorter ones."""
    longest = max(map(len, rows))
    return [row + [0] * (longest - len(row)) for row in rows]
