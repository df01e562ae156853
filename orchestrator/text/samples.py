"""What a training loop reads: samples by number, and the held-out text.

The whole state of a reader is **one number, the index of the next sample**. Sample i is a pure function of the seed
and i: it does not matter how many are read at a time, by how many processes, or what was read before. So a run that is
resumed needs no more than that number to see exactly the samples that it would have seen, and a run on other hardware
sees the same ones.

    samples = open_samples("tinyshakespeare.txt", "char", context_length=64)
    inputs, targets, documents = samples.batch(first=0, count=12)       # samples 0..11; the next batch starts at 12
"""

import errno
import math
import os
import random
import re
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import torch
from jaxtyping import Int
from torch import Tensor

from orchestrator.text import tales
from orchestrator.text.corpora import IGNORED
from orchestrator.text.documents import Source, find_source
from orchestrator.text.prepare import (
    MANIFEST,
    VALIDATION_PART,
    check_tokenizer,
    is_prepared,
    open_prepared,
    prepare,
    settings_name,
)
from orchestrator.text.tokenizers import Tokenizer, make_tokenizer
from orchestrator.text.windows import Batch, TokenWindows, check_numbers

TALES_LENGTH = 62  # inputs of the longest story: its words and marks, and the end-of-text in front


class Samples(Protocol):
    """What a training loop asks of a data set.

    Attributes:
        name: for messages and reports.
        tokenizer: what made the ids.
        floor: the exact loss of a perfect model on the held-out text, in nats per token, where it is known, else None.
        per_epoch: samples in an epoch; None: endless, none comes twice.
    """

    name: str
    tokenizer: Tokenizer
    floor: float | None
    per_epoch: int | None

    def batch(self, first: int, count: int) -> Batch:
        """Samples first .. first + count - 1. Raises ValueError for a count that the data does not have."""

    def validation(self, tokens: int, batch_size: int = 8) -> list[Batch]:
        """At most about `tokens` predicted tokens of the held-out part, the same ones at every call."""

    def prompt(self) -> Int[Tensor, "one tokens"]:
        """Ids to sample from, (1, t)."""

    def describe(self) -> str:
        """The data set in one line."""


class TalesSamples:
    """Whole stories from the grammar of `tales.py`, one a row, padded on the right. No story comes twice.

    Args:
        seed: of the training stories. The held-out ones are the same for every seed, so that runs compare.
        held_out: how many stories are held out.
    Attributes:
        held_out: the held-out stories.
        floor: the exact loss of a perfect model on all of them, in nats per token.
    """

    name = "tales"
    per_epoch = None
    documents = None

    def __init__(self, seed: int = 0, held_out: int = 500):
        check_numbers(seed=(seed, 0), held_out=(held_out, 1))
        self.seed, self.tokenizer = seed, make_tokenizer("tales")
        # Seeds are texts, which Random hashes: no training seed can be that of the held-out stories.
        self.held_out = [_story(f"held out/{i}") for i in range(held_out)]
        self._lengths = [len(self.tokenizer.encode(story)) + 1 for story in self.held_out]  # + 1: the end
        self._scores = [tales.log_probability(story) for story in self.held_out]
        self.floor = self.floor_of(sum(self._lengths))

    def batch(self, first: int, count: int) -> Batch:
        """Stories first .. first + count - 1: end-of-text in front, end-of-text behind, padded to the longest."""
        check_numbers(first=(first, 0), count=(count, 1))
        return self._batch([_story(f"train/{self.seed}/{i}") for i in range(first, first + count)])

    def validation(self, tokens: int, batch_size: int = 8) -> list[Batch]:
        """Held-out stories, evenly spread, of at most about `tokens` predicted tokens."""
        check_numbers(tokens=(tokens, 1), batch_size=(batch_size, 1))
        stories = [self.held_out[i] for i in self._looked_at(tokens)]
        return [self._batch(stories[i : i + batch_size]) for i in range(0, len(stories), batch_size)]

    def floor_of(self, tokens: int) -> float:
        """The exact floor of `validation(tokens)`, in nats per token: `floor` where that is all stories."""
        chosen = self._looked_at(tokens)
        return -math.fsum(self._scores[i] for i in chosen) / sum(self._lengths[i] for i in chosen)

    def prompt(self) -> Int[Tensor, "one tokens"]:
        """What a story starts from: the end of the one before."""
        return torch.tensor([[self.tokenizer.end_of_text]])

    def describe(self) -> str:
        """The data set in one line."""
        return (
            f"tales: endless stories of about {tales.TOKENS_PER_STORY:.0f} tokens, {len(self.held_out)} others held "
            f"out ({sum(self._lengths):,} tokens), exact floor {self.floor:.4f} nats/token; tokenizer tales, "
            f"vocabulary {self.tokenizer.vocab_size}"
        )

    def _looked_at(self, tokens: int) -> list[int]:
        stories = len(self.held_out)
        asked = stories if tokens >= sum(self._lengths) else max(1, tokens * stories // sum(self._lengths))
        return [i * stories // asked for i in range(asked)]

    def _batch(self, stories: Sequence[str]) -> Batch:
        end = self.tokenizer.end_of_text
        rows = [[end, *self.tokenizer.encode(story), end] for story in stories]
        longest = max(map(len, rows)) - 1
        inputs = torch.full((len(rows), longest), end)
        targets = torch.full((len(rows), longest), IGNORED)
        for i, row in enumerate(rows):  # padding on the right: under a causal mask no real token ever sees it
            inputs[i, : len(row) - 1] = torch.tensor(row[:-1])
            targets[i, : len(row) - 1] = torch.tensor(row[1:])
        return Batch(inputs, targets)


def open_samples(
    dataset: str | os.PathLike,
    tokenizer: str | None = None,
    context_length: int = 1024,
    seed: int = 0,
    data_dir: str | os.PathLike = "data",
    pack_documents: bool = False,
    validation_part: float = VALIDATION_PART,
    workers: int | None = None,
    progress: bool = True,
    say: Callable[[str], None] | None = None,
) -> Samples:
    """The one door: a data set by name, a file, a folder, a glob, or a folder of token shards, ready to be read.

    A text is turned into token shards once, under data_dir/prepared (or, where that cannot be written, in the folder
    for temporary files), and found there the next time.

    Args:
        dataset: what `documents.find_source` finds, "tales", or a folder that `prepare` made.
        tokenizer: "gpt2", "char" or "bytes"; None: the data set's own where it has one, else "gpt2".
        context_length: tokens in an input.
        seed: of the order of the samples.
        data_dir: where data sets are looked for and shards are kept.
        pack_documents: give the number of each token's document, for the mask that keeps documents apart. (A row of
            tales is one document anyway.)
        validation_part: how much is held out where the data set has no validation split of its own.
        workers, progress: of preparing.
        say: is given what happens, a line at a time; None: to stderr.
    Raises:
        FileNotFoundError, ValueError, ImportError, ConnectionError, OSError: with what to do.
    """
    check_numbers(context_length=(context_length, 1), seed=(seed, 0))
    say = say or (lambda line: print(line, file=sys.stderr))
    if str(dataset) == "tales":
        return _open_tales(tokenizer, context_length, seed)
    if is_prepared(dataset):
        prepared = open_prepared(dataset)
        if tokenizer not in (None, prepared.tokenizer.name):
            raise ValueError(
                f"{dataset} was prepared with the tokenizer {prepared.tokenizer.name!r}, and {tokenizer!r} is asked "
                "for: leave --tokenizer out, or pass the text itself as the data set."
            )
    else:
        check_tokenizer(tokenizer := tokenizer or "gpt2")
        source = find_source(str(dataset), Path(data_dir))
        folder = cache_folder(source, tokenizer, validation_part, data_dir, say)
        making = {"workers": workers, "validation_part": validation_part, "progress": progress}
        prepared = prepare(source, tokenizer, folder, **making)
    return TokenWindows(prepared, context_length, seed, pack_documents)


def _open_tales(tokenizer: str | None, context_length: int, seed: int) -> TalesSamples:
    if tokenizer not in (None, "tales"):
        raise ValueError(
            f"tales has a tokenizer of its own, one token for each of its words, and {tokenizer!r} is asked for: its "
            "exact floor is counted in those tokens. Leave --tokenizer out; or prepare a text of tales with the other "
            "one (python -m orchestrator prepare tales --tokenizer NAME --out DIR) and learn from DIR."
        )
    samples = TalesSamples(seed)
    if context_length < TALES_LENGTH:
        raise ValueError(
            f"tales are read whole, and the longest has {TALES_LENGTH} tokens: context_length={context_length} is too "
            f"short. Use {TALES_LENGTH} or more."
        )
    return samples


def cache_folder(
    source: Source, tokenizer: str, validation_part: float, data_dir: str | os.PathLike, say: Callable[[str], None]
) -> Path:
    """Where the shards of a text are kept, under a name that changes with all that decides them.

    Args:
        source, tokenizer, validation_part: what is prepared.
        data_dir: it is data_dir/prepared/NAME; where that cannot be written, a folder for temporary files.
        say: is told of the latter.
    """
    name = f"{_file_name(source.name)}-{tokenizer}-{settings_name(source, tokenizer, validation_part)}"
    folder = Path(data_dir) / "prepared" / name
    if (folder / MANIFEST).is_file():  # also where nothing can be written
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(folder.parent, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        other = Path(tempfile.gettempdir()) / f"gpt2-from-scratch-{_user()}" / "prepared" / name
        say(f"{folder} cannot be written ({error.strerror}): the tokens are kept in {other}.")
        return other
    return folder


def _user() -> str:
    return str(os.getuid()) if hasattr(os, "getuid") else os.environ.get("USERNAME", "user")


def _file_name(name: str) -> str:
    """A name of a data set as part of a file's name."""
    return re.sub(r"[^\w.-]+", "_", Path(name).stem or name).strip("._")[:60] or "text"


def _story(seed: str) -> str:
    return tales.write_story(random.Random(f"tales/{seed}"))
