"""What the tests of attention over pages share: batches of sequences in a pool full of garbage, and what is right.

What is right comes from each sequence alone, its keys in one piece, in float64, by the formula written out here; the
bound on the error is that of orchestrator/evaluation/parity.py. Everything in the pool that is not a key of the batch,
whole blocks and the places behind each sequence's last key, is garbage.
"""

import os
import random
import sys
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path

import torch
from hypothesis import strategies as st
from torch import Tensor

from CMHA.implementations import paged_attention
from CMHA.paged_kv_cache import PagedMask
from tests.triton_interpreter import DEVICE

KERNELS = "CMHA.implementations.paged_triton_kernels"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def import_kernels(path: Path | None = None):
    """As they stand in their file: the tests' check of shapes wraps every function, and triton reads their source."""
    path = path or Path(__file__).parents[3].joinpath(*KERNELS.split(".")).with_suffix(".py")
    spec = spec_from_file_location(KERNELS, path)
    module, before = module_from_spec(spec), os.environ.get("TRITON_INTERPRET")
    if DEVICE == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
    try:
        spec.loader.exec_module(module)
    finally:
        os.environ.pop("TRITON_INTERPRET", None)
        if before is not None:
            os.environ["TRITON_INTERPRET"] = before
    return module


if KERNELS not in sys.modules and find_spec("triton") is not None:
    sys.modules[KERNELS] = import_kernels()


@dataclass(frozen=True)
class Batch:
    """Several sequences in one pass.

    Attributes:
        past, new: for each sequence its tokens in the cache already, and those read now.
        shared: so many of the first blocks of sequence 0 are those of all others too.
        garbage: what stands where no key of the batch does.
        seed: of the numbers, and of which blocks are whose.
        spare: blocks that nobody holds, 1 or more.
    """

    past: tuple[int, ...]
    new: tuple[int, ...]
    block_size: int = 16
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    dtype: torch.dtype = torch.float32
    shared: int = 0
    garbage: float = 1e4
    seed: int = 0
    spare: int = 3
    device: str = "cpu"

    def __str__(self) -> str:
        texts = "_".join(f"{past}+{new}" for past, new in zip(self.past, self.new, strict=True))
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{dtype}-d{self.head_dim}-h{self.heads}/{self.kv_heads}-blocks_{self.block_size}-{texts}"

    @property
    def scale(self) -> float:
        return 0.8 * self.head_dim**-0.5  # not anybody's default

    @property
    def lengths(self) -> list[int]:
        return [past + new for past, new in zip(self.past, self.new, strict=True)]

    @cached_property
    def tables(self) -> list[list[int]]:
        """Blocks in no order. Block 0 is nobody's: it stands behind the ends of the tables that kernels are told."""
        needed = [-(-length // self.block_size) for length in self.lengths]
        free = list(range(1, sum(needed) + self.spare))
        random.Random(self.seed).shuffle(free)
        tables = [[free.pop() for _ in range(count)] for count in needed]
        for table, past in zip(tables[1:], self.past[1:], strict=True):
            common = min(self.shared, past // self.block_size, self.past[0] // self.block_size)
            table[:common] = tables[0][:common]
        return tables

    @cached_property
    def num_blocks(self) -> int:
        return sum(-(-length // self.block_size) for length in self.lengths) + self.spare

    def mask(self) -> PagedMask:
        return PagedMask(self.tables, self.past, self.new, self.block_size, self.device)

    @cached_property
    def queries(self) -> Tensor:
        """(1, H, tokens, D), laid out as in the layer: a slice of a wider projection, tokens before heads."""
        generator = torch.Generator().manual_seed(self.seed)
        wide = torch.randn(1, sum(self.new), 3, self.heads, self.head_dim, generator=generator)
        return wide.to(self.device, self.dtype)[:, :, 1].transpose(1, 2)

    @cached_property
    def texts(self) -> list[tuple[Tensor, Tensor]]:
        """Each sequence's keys and values in one piece, (length, kv_heads, D); what is shared is the same."""
        generator = torch.Generator().manual_seed(self.seed + 1)
        shape = (self.kv_heads, self.head_dim)
        texts = [tuple(torch.randn(length, *shape, generator=generator).to(self.dtype) for _ in range(2))
                 for length in self.lengths]  # fmt: skip
        for text, table in zip(texts[1:], self.tables[1:], strict=True):
            common = sum(a == b for a, b in zip(table, self.tables[0], strict=False)) * self.block_size
            for own, first in zip(text, texts[0], strict=True):
                own[:common] = first[:common]
        return texts

    def pools(self) -> tuple[Tensor, Tensor]:
        """As PagedLayer.append hands them over: (blocks, kv_heads, block_size, D)."""
        shape = (self.num_blocks, self.block_size, self.kv_heads, self.head_dim)
        pools = [torch.full(shape, self.garbage, dtype=self.dtype) for _ in range(2)]
        for table, text in zip(self.tables, self.texts, strict=True):
            for pool, numbers in zip(pools, text, strict=True):
                for at, number in enumerate(numbers):
                    pool[table[at // self.block_size], at % self.block_size] = number
        return tuple(pool.to(self.device).transpose(1, 2) for pool in pools)

    def formula(self, dtype: torch.dtype) -> list[Tensor]:
        """softmax(Q K^T) V of each sequence in `dtype`, (1, H, new, D)."""
        queries, found, start = self.queries.cpu().to(dtype), [], 0
        for (keys, values), past, new in zip(self.texts, self.past, self.new, strict=True):
            kv_head = torch.arange(self.heads) // (self.heads // self.kv_heads)
            k, v = (tensor.to(dtype).transpose(0, 1)[kv_head] for tensor in (keys, values))  # (H, length, D)
            hidden = torch.arange(past + new)[None] > torch.arange(past, past + new)[:, None]
            scores = queries[0, :, start : start + new] @ k.mT * self.scale
            found.append((torch.softmax(scores.masked_fill(hidden, -torch.inf), dim=-1) @ v)[None])
            start += new
        return found

    def error_over_bound(self, context: Tensor) -> float:
        """The largest of the sequences' errors, in units of what each is allowed; above 1 is a miss."""
        assert (context.shape, context.dtype) == (self.queries.shape, self.dtype)
        eps, ratios = torch.finfo(self.dtype).eps, []
        sequences = context.cpu().double().split(self.new, dim=2)
        for own, exact, rough, (_, values) in zip(
            sequences, self.formula(torch.float64), self.formula(self.dtype), self.texts, strict=True
        ):
            bound = 2 * (rough.double() - exact).abs().max() + 4 * eps * max(1.0, float(values.double().abs().max()))
            ratios.append(float((own - exact).abs().max() / bound))
        return float("nan") if any(ratio != ratio for ratio in ratios) else max(ratios)

    def read(self, reader: str) -> Tensor:
        """What one reader gives, through the door of the registry."""
        with torch.no_grad(), paged_attention.read_with(reader):
            context, weights = paged_attention.attention(self.queries, *self.pools(), self.mask(), scale=self.scale)
        assert weights is None
        return context


@st.composite
def batches(draw, garbage=(1e4, float("nan")), most: int = 130) -> Batch:
    """Up to four sequences: some write, some read a piece of their prompt, some begin alike."""
    past, new = [], []
    for _ in range(draw(st.integers(1, 4))):
        new.append(draw(st.one_of(st.just(1), st.integers(1, 40))))
        past.append(draw(st.integers(0, most - new[-1])))
    heads, kv_heads = draw(st.sampled_from([(2, 2), (4, 2), (3, 1)]))
    return Batch(
        tuple(past), tuple(new), draw(st.sampled_from([1, 3, 16, 64])), heads, kv_heads,
        draw(st.sampled_from([8, 20, 64, 80, 128])), draw(st.sampled_from(DTYPES)), draw(st.integers(0, 9)),
        draw(st.sampled_from(garbage)), draw(st.integers(0, 99)),
    )  # fmt: skip


# Every block size with every width; the other kinds by turns. Three sequences write and one reads.
TURNS = [
    Batch((5, 129, 0, 33), (1, 1, 1, 7), block_size, *((2, 2), (4, 2), (3, 1))[number % 3], head_dim,
          DTYPES[number // 2 % 3], number % 3, (1e4, float("nan"))[number % 2], number)
    for number, (block_size, head_dim) in enumerate((b, d) for b in (1, 3, 16, 64) for d in (8, 20, 64, 80, 128))
]  # fmt: skip
