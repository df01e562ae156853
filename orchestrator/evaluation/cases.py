"""The cases in which implementations of attention are compared: lengths, dtypes, masks, heads, tiles, layouts.

The grid is the product of AXES, 38,016 cases; by default a few dozen of them in which every two values of any two axes
meet, since mistakes that need three things at once are rare.
"""

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain, combinations, product

import torch
from torch import Tensor

from CMHA.masks import AttentionMask
from CMHA.request import AttentionRequest, capability_of

LENGTHS = ((1, 1), (1, 239), (3, 799), (17, 50), (50, 17), (97, 97), (113, 203), (128, 128), (239, 1), (257, 257),
           (1023, 1024))  # fmt: skip
AXES = {  # fields of a Case -> the values they take together
    ("dtype",): ((torch.float32,), (torch.bfloat16,), (torch.float16,)),
    ("head_dim",): ((16,), (32,), (64,), (80,), (96,), (128,)),
    ("query_len", "key_len"): LENGTHS,
    ("causal",): ((True,), (False,)),
    ("padding",): (("none",), ("right",), ("left",), ("row",)),
    ("num_heads", "num_kv_heads"): ((4, 4), (4, 2), (4, 1)),
    ("strided",): ((False,), (True,)),
    ("query_block_size", "kv_block_size"): ((16, 16), (32, 64), (64, 32), (128, 128)),  # last: see `grid`
}
# A second, smaller grid: all products of AttentionMask's rules, with the padding full of 1e4.
RULES = ("causal", "padding", "documents", "window", "poison")
MASK_AXES = {
    ("dtype",): AXES["dtype",],
    ("head_dim",): ((16,), (64,)),
    ("query_len", "key_len"): ((1, 239), (17, 50), (97, 97), (257, 257)),
    RULES: tuple(
        (causal, padding, documents, window, padding != "none")
        for causal, padding, documents, window in product(
            (True, False), ("none", "right", "left", "row"), (False, True), (None, 7)
        )
    ),
    ("num_heads", "num_kv_heads"): AXES["num_heads", "num_kv_heads"],
    ("query_block_size", "kv_block_size"): AXES["query_block_size", "kv_block_size"],
}
POISON = 1e4
# Both grids for an interpreter, where a case of 1,000 tokens takes an hour: short sequences and fewer heads.
SHORT = {
    ("query_len", "key_len"): ((1, 1), (1, 130), (3, 129), (17, 50), (50, 17), (97, 97), (113, 130), (128, 128),
                               (130, 1)),
    ("num_heads", "num_kv_heads"): ((2, 2), (4, 2), (2, 1)),
}  # fmt: skip
SHORT_AXES = AXES | SHORT
SHORT_MASK_AXES = MASK_AXES | SHORT | {("query_len", "key_len"): ((1, 130), (17, 50), (61, 61))}


@dataclass(frozen=True)
class Case:
    """One attention call to be tried.

    Attributes:
        dtype, head_dim, query_len, key_len, causal, batch_size: of the call; lengths in tokens.
        padding: "none", a third of the last sequence's keys on the "right" or on the "left", or its whole "row".
        documents: each sequence is three packed documents of unequal length.
        window: only keys fewer than this many positions away are seen; None: any.
        poison: the hidden keys and values hold 1e4 instead of ordinary numbers.
        padded_queries: what a query that is padding itself gives: it may "attend" like any other, or give "zero".
        num_heads, num_kv_heads: equal, or grouped.
        query_block_size, kv_block_size: for the implementations that take them.
        strided: tensors laid out as in the layer, a slice of a wider projection with tokens before heads.
        seed: of the numbers.
        device: torch's device type.
    """

    dtype: torch.dtype = torch.float32
    head_dim: int = 64
    query_len: int = 128
    key_len: int = 128
    causal: bool = True
    padding: str = "none"
    documents: bool = False
    window: int | None = None
    poison: bool = False
    padded_queries: str = "attend"
    num_heads: int = 4
    num_kv_heads: int = 4
    query_block_size: int | None = None
    kv_block_size: int | None = None
    strided: bool = False
    seed: int = 0
    batch_size: int = 2
    device: str = "cpu"

    @property
    def scale(self) -> float:
        """1 / sqrt(D), and for odd seeds another, so that one who ignores the argument is seen."""
        return self.head_dim**-0.5 * (0.8 if self.seed % 2 else 1.0)

    def __str__(self) -> str:
        mask = f"{'causal' if self.causal else 'full'}-pad_{self.padding}-{'strided' if self.strided else 'contiguous'}"
        mask += "-documents" * self.documents + f"-window_{self.window}" * bool(self.window) + "-poison" * self.poison
        sizes = f"d{self.head_dim}-{self.query_len}x{self.key_len}-h{self.num_heads}/{self.num_kv_heads}"
        return f"{self.dtype}-{sizes}-b{self.query_block_size}/{self.kv_block_size}-{mask}".removeprefix("torch.")


def tensors(case: Case) -> tuple[list[Tensor], Tensor, Tensor | None]:
    """The numbers of a case: [queries, keys, values], the gradient of the context, the padding mask or None.

    With `poison`, keys and values at padded positions are 1e4.
    """
    generator = torch.Generator().manual_seed(case.seed)

    def normal(heads: int, length: int) -> Tensor:
        if not case.strided:
            shape = (case.batch_size, heads, length, case.head_dim)
            return torch.randn(shape, generator=generator).to(case.device, case.dtype)
        wide = torch.randn(case.batch_size, length, 3, heads, case.head_dim, generator=generator)
        return wide.to(case.device, case.dtype)[:, :, 1].transpose(1, 2)

    queries = normal(case.num_heads, case.query_len)
    keys, values = (normal(case.num_kv_heads, case.key_len) for _ in range(2))
    padding_mask = None
    if case.padding != "none":
        third = -(-case.key_len // 3)
        hidden = {"right": slice(case.key_len - third, None), "left": slice(third), "row": slice(None)}[case.padding]
        padding_mask = torch.ones(case.batch_size, case.key_len, dtype=torch.bool, device=case.device)
        padding_mask[-1, hidden] = False
        if case.poison:
            keys[-1, :, hidden], values[-1, :, hidden] = POISON, POISON
    inputs = [tensor.requires_grad_() for tensor in (queries, keys, values)]
    return inputs, normal(case.num_heads, case.query_len), padding_mask


def documents_of(case: Case) -> Tensor | None:
    """(B, key_len) document numbers: three documents, whose lengths differ from sequence to sequence."""
    if not case.documents:
        return None
    positions = torch.arange(case.key_len, device=case.device)
    shift = torch.arange(case.batch_size, device=case.device)[:, None]
    return (positions >= case.key_len // 4 + shift).long() + (positions >= case.key_len * 2 // 3).long()


def mask_of(case: Case, padding_mask: Tensor | None) -> AttentionMask:
    return AttentionMask(
        case.query_len, case.key_len, causal=case.causal, padding_mask=padding_mask, documents=documents_of(case),
        window=case.window, device=case.device,
    )  # fmt: skip


def request_of(case: Case, needs_grad: bool = True) -> AttentionRequest:
    """What the case asks of an implementation."""
    padding_mask = None if case.padding == "none" else tensors(replace(case, query_len=1, head_dim=1))[2]
    mask = mask_of(case, padding_mask)
    return AttentionRequest(
        device=case.device, dtype=case.dtype, head_dim=case.head_dim, query_len=case.query_len, key_len=case.key_len,
        num_heads=case.num_heads, num_kv_heads=case.num_kv_heads, mask_kind=mask.kind, needs_grad=needs_grad,
        capability=capability_of(torch.device(case.device)),
    )  # fmt: skip


def grid(pairwise: bool = True, axes: Mapping = AXES, device: str = "cpu") -> Iterator[Case]:
    """The cases to try: a few in which every two values of any two axes meet, or all of the axes' product (38,016).

    In the product the cases that differ in their tiles alone follow each other and hold the same numbers, so that what
    is exact needs to be computed once for all of them.
    """
    sizes = [len(values) for values in axes.values()]
    rows = all_pairs(sizes) if pairwise else product(*map(range, sizes))
    for number, row in enumerate(rows):
        chosen = [zip(fields, axes[fields][index], strict=True) for fields, index in zip(axes, row, strict=True)]
        yield Case(**dict(chain(*chosen)), seed=number if pairwise else number // sizes[-1], device=device)


def all_pairs(sizes: list[int], seed: int = 0, tries: int = 20) -> list[tuple[int, ...]]:
    """Rows of indices in which every pair of values of every two axes occurs: greedy, so small but not the smallest.

    Each row starts from a pair not yet seen and is filled up at random; the best of `tries` such rows is kept.
    """
    rng, axes = random.Random(seed), list(combinations(range(len(sizes)), 2))
    missing = {(a, b): set(product(range(sizes[a]), range(sizes[b]))) for a, b in axes}
    rows = []
    while any(missing.values()):
        a, b = max(axes, key=lambda pair: len(missing[pair]))
        start = dict(zip((a, b), min(missing[a, b]), strict=True))
        drawn = [tuple(start.get(x, rng.randrange(size)) for x, size in enumerate(sizes)) for _ in range(tries)]
        rows.append(max(drawn, key=lambda row: sum((row[x], row[y]) in missing[x, y] for x, y in axes)))
        for x, y in axes:
            missing[x, y].discard((rows[-1][x], rows[-1][y]))
    return rows
