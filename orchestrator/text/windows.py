"""A long row of tokens in windows: which sample comes when, and what a batch of them holds.

Sample i is a pure function of (seed, i). See samples.py for why that is all the state there is.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from orchestrator.text.corpora import IGNORED
from orchestrator.text.prepare import Prepared
from orchestrator.text.shards import open_shard
from orchestrator.text.tokenizers import Tokenizer, fingerprint

PROMPT_TOKENS = 16


class Batch(NamedTuple):
    """Sequences to learn from.

    Attributes:
        inputs: (B, T) int64 token ids.
        targets: (B, T) int64, the token that follows each input; IGNORED (-100) where nothing is to be predicted.
        documents: (B, T) int64, the number of each token's document within its row, never falling along it, for the
            mask that keeps documents apart; None: no such mask.
    """

    inputs: Int[Tensor, "batch tokens"]
    targets: Int[Tensor, "batch tokens"]
    documents: Int[Tensor, "batch tokens"] | None = None


class TokenStream:
    """The ids of several shards, read as if they stood in one row.

    Args:
        shards: (count,) arrays of ids, in order; memory-mapped ones stay on the disk.
    """

    def __init__(self, shards: Sequence[np.ndarray]):
        # np.asarray: a plain view of the same map, since a slice of an np.memmap costs ten times that of an array.
        self._shards = [np.asarray(shard) for shard in shards]
        self._starts = np.cumsum([0, *map(len, self._shards)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def read(self, start: int, out: np.ndarray) -> None:
        """Fill `out` with the ids from `start` on, through as many shards as it takes."""
        filled = 0
        shard = int(np.searchsorted(self._starts, start, side="right")) - 1
        place = start - int(self._starts[shard])
        while filled < len(out):
            piece = self._shards[shard][place : place + len(out) - filled]
            out[filled : filled + len(piece)] = piece
            filled, shard, place = filled + len(piece), shard + 1, 0


class TokenWindows:
    """A long row of tokens, cut into windows of context_length + 1: all but the last are inputs, all but the first
    targets.

    Each epoch visits every one of its windows once, in an order drawn from (seed, epoch). It also starts at another
    offset, so that the next epoch cuts the text elsewhere and each token is seen with other contexts.

    Args:
        data: what `prepare` made, or (training ids, held-out ids, tokenizer), ids as arrays, tensors or lists.
        context_length: tokens in an input.
        seed: of order and offsets, 0 or more.
        pack_documents: give `Batch.documents`. A document begins with its end-of-text token, and all its targets stay:
            the last token of a document predicts the end-of-text that opens the next one, as in generation.
        name: for messages; None: that of the prepared text.
    Raises:
        ValueError: less than one window to train on, nothing held out, or settings that make no sense.
    """

    floor = None  # nobody knows the entropy of a text that people wrote

    def __init__(
        self,
        data: Prepared | tuple[Sequence[int], Sequence[int], Tokenizer],
        context_length: int,
        seed: int = 0,
        pack_documents: bool = False,
        name: str | None = None,
    ):
        check_numbers(context_length=(context_length, 1), seed=(seed, 0))
        if isinstance(data, Prepared):
            self.tokenizer, self.name = data.tokenizer, name or data.name
            made_with = fingerprint(data.tokenizer)
            self._train = TokenStream([open_shard(path, made_with) for path in data.train])
            self._held_out = TokenStream([open_shard(path, made_with) for path in data.validation])
            self.documents = data.documents
            self.content = [shard["sha256"] for split in ("train", "validation") for shard in data.manifest[split]]
        else:
            train, held_out, self.tokenizer = data
            self._train, self._held_out = (TokenStream([_ids(part)]) for part in (train, held_out))
            self.name = name or "the text"
            self.content = [len(self._train), len(self._held_out)]
            self.documents = sum(int((_ids(part) == self.tokenizer.end_of_text).sum()) for part in (train, held_out))
        self.context_length, self.seed, self.pack_documents = context_length, seed, pack_documents
        self._check_length()
        # As many windows as fit behind every offset up to context_length - 1 (in a very short text: one).
        self.per_epoch = max(1, (len(self._train) - context_length) // context_length)
        spare = len(self._train) - 1 - self.per_epoch * context_length
        self._offsets = min(context_length, spare + 1)  # offsets 0 .. this - 1
        self._epoch: tuple[int, int, np.ndarray] | None = None  # number, offset, order: of the epoch last read

    def batch(self, first: int, count: int) -> Batch:
        """Samples first .. first + count - 1, whichever epochs they lie in.

        Raises:
            ValueError: more samples than an epoch has, or numbers that make no sense.
        """
        check_numbers(first=(first, 0), count=(count, 1))
        if count > self.per_epoch:
            raise ValueError(
                f"{self.name} is too short for a batch of {count}: an epoch of its {len(self._train):,} tokens has "
                f"{self.per_epoch} windows of context_length={self.context_length}. Use a smaller batch, a shorter "
                "context, or more text."
            )
        ids = np.empty((count, self.context_length + 1), dtype=np.int64)
        for row, sample in enumerate(range(first, first + count)):
            epoch, place = divmod(sample, self.per_epoch)
            offset, order = self._order(epoch)
            self._train.read(offset + int(order[place]) * self.context_length, ids[row])
        return self._batch(ids)

    def validation(self, tokens: int, batch_size: int = 8) -> list[Batch]:
        """Windows spread evenly over the held-out part, about `tokens` predicted tokens, the same at every call.

        Where `tokens` reaches the end of it, every held-out token but the first is predicted once; the last window is
        then padded, with targets of IGNORED.
        """
        check_numbers(tokens=(tokens, 1), batch_size=(batch_size, 1))
        length, predicted = self.context_length, len(self._held_out) - 1
        whole = predicted // length
        asked = max(1, tokens // length)
        if tokens >= predicted or whole == 0:
            windows = list(range(math.ceil(predicted / length)))
        else:
            windows = [i * whole // asked for i in range(asked)]
        return [self._held_out_batch(windows[i : i + batch_size]) for i in range(0, len(windows), batch_size)]

    def prompt(self) -> Int[Tensor, "one tokens"]:
        """The first tokens of the held-out text, to be continued."""
        ids = np.empty(min(PROMPT_TOKENS, max(1, self.context_length // 2), len(self._held_out)), dtype=np.int64)
        self._held_out.read(0, ids)
        return torch.from_numpy(ids)[None]

    def describe(self) -> str:
        """The data set in one line."""
        documents = f"{self.documents:,} document{'' if self.documents == 1 else 's'}"
        return (
            f"{self.name}: {documents}, {len(self._train):,} tokens to train on ({self.per_epoch:,} windows of "
            f"{self.context_length} an epoch), {len(self._held_out):,} held out; tokenizer {self.tokenizer.name}, "
            f"vocabulary {self.tokenizer.vocab_size:,}"
        )

    def _check_length(self) -> None:
        if len(self._train) <= self.context_length:
            raise ValueError(
                f"{self.name} is too short: it has {len(self._train):,} tokens to train on, and one window of "
                f"context_length={self.context_length} takes {self.context_length + 1:,}. Use more text, or a shorter "
                "context."
            )
        if len(self._held_out) < 2:
            raise ValueError(
                f"{self.name} is too short: its held-out part has {len(self._held_out)} tokens, and 2 are the least "
                "from which one can be predicted. Use more text, or hold out more of it (validation_part)."
            )

    def _order(self, epoch: int) -> tuple[int, np.ndarray]:
        """The offset and the order of an epoch's windows; the last one is kept, since batches come epoch by epoch."""
        kept = self._epoch  # read once: another thread may put another epoch there
        if kept is None or kept[0] != epoch:
            # PCG64 by name: what default_rng() stands for may change with numpy.
            rng = np.random.Generator(np.random.PCG64([self.seed, epoch]))
            offset = int(rng.integers(self._offsets))
            order = np.arange(self.per_epoch, dtype=np.int32 if self.per_epoch < 2**31 else np.int64)
            rng.shuffle(order)  # in place: 4 bytes a window, and no copy
            self._epoch = kept = (epoch, offset, order)
        return kept[1], kept[2]

    def _batch(self, ids: np.ndarray, targets: np.ndarray | None = None) -> Batch:
        inputs = torch.from_numpy(ids[:, :-1]).contiguous()
        targets = torch.from_numpy(ids[:, 1:] if targets is None else targets).contiguous()
        documents = (inputs == self.tokenizer.end_of_text).cumsum(dim=1) if self.pack_documents else None
        return Batch(inputs, targets, documents)

    def _held_out_batch(self, windows: Sequence[int]) -> Batch:
        length = self.context_length
        ids = np.full((len(windows), length + 1), self.tokenizer.end_of_text, dtype=np.int64)
        targets = np.full((len(windows), length), IGNORED, dtype=np.int64)
        for row, window in enumerate(windows):
            there = min(length + 1, len(self._held_out) - window * length)
            self._held_out.read(window * length, ids[row, :there])
            targets[row, : there - 1] = ids[row, 1:there]
        return self._batch(ids, targets)


def _ids(ids) -> np.ndarray:
    return ids.numpy() if isinstance(ids, Tensor) else np.asarray(ids)


def check_numbers(**numbers: tuple[int, int]) -> None:
    """Raise one ValueError for every whole number that is below the least it may be."""
    problems = [
        f"{name} must be a whole number, {least} or more, got {value!r}"
        for name, (value, least) in numbers.items()
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least
    ]
    if problems:
        raise ValueError("; ".join(problems) + ".")
