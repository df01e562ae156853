"""What a model learns from: `tales`, `python-docs`, or any text file or folder of the user's. Nothing is downloaded.

A corpus gives batches of (inputs, targets), the targets one token ahead. Which batch comes when is a pure function of
the seed and one number, the index of the batch: there is no hidden position to save or to lose.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor

from GPT2Model.tokenizer import END_OF_TEXT, get_tokenizer
from orchestrator.text import tales

IGNORED = -100  # a target that is not to be predicted: padding
NAMES = ("tales", "python-docs")
TEXT_FILES = (".txt", ".md", ".rst", ".text")
Batch = tuple[Int[Tensor, "batch tokens"], Int[Tensor, "batch tokens"]]


class TalesCorpus:
    """Whole stories from the grammar of `tales.py`, fresh ones in every batch, so that none is seen twice.

    Attributes:
        tokenizer: one token for each word.
        held_out: the stories of the validation split.
        floor: the exact loss, in nats per token, that a perfect model has on `held_out`.
        validation: batches of `held_out`, each story read from its first token.
    """

    name = "tales"

    def __init__(self, seed: int = 0, held_out: int = 200):
        self.seed = seed
        self.tokenizer = tales.TalesTokenizer()
        self.held_out = tales.stories(held_out, seed=self._seed_of(-1))
        predicted = sum(len(self.tokenizer.encode(story)) + 1 for story in self.held_out)  # + 1: the end
        self.floor = -math.fsum(map(tales.log_probability, self.held_out)) / predicted
        self.validation = [self._pack(self.held_out[i : i + 50]) for i in range(0, held_out, 50)]

    def batch(self, index: int, batch_size: int) -> Batch:
        """The batch number `index`: right-padded stories, start token in front, end token behind."""
        return self._pack(tales.stories(batch_size, seed=self._seed_of(index)))

    def prompt(self) -> Int[Tensor, "one tokens"]:
        """What a story starts from: the end of the one before."""
        return torch.tensor([[self.tokenizer.end_of_text]])

    def _seed_of(self, index: int) -> int:
        return self.seed * 1_000_003 + index + 1  # held-out stories have index -1

    def _pack(self, stories: Sequence[str]) -> Batch:
        end = self.tokenizer.end_of_text
        rows = [[end, *self.tokenizer.encode(story), end] for story in stories]
        longest = max(map(len, rows)) - 1
        inputs = torch.full((len(rows), longest), end)
        targets = torch.full((len(rows), longest), IGNORED)
        for i, row in enumerate(rows):  # padding on the right: under a causal mask no real token ever sees it
            inputs[i, : len(row) - 1] = torch.tensor(row[:-1])
            targets[i, : len(row) - 1] = torch.tensor(row[1:])
        return inputs, targets


class TextCorpus:
    """One long text in windows of context_length tokens; the last part of it is held out.

    Each epoch visits every window of the training part once, in an order drawn from the seed.

    Args:
        text: the text.
        name: for messages and the report.
        context_length: tokens in a window.
        seed: of the order.
        validation_part: how much of the text, from its end, is held out.
        max_validation: windows that are looked at, at most, spread over the held-out part.
    Raises:
        ValueError: an empty text, or one too short for a window to train on and one to validate on.
    """

    floor = None  # nobody knows the entropy of a text that people wrote

    def __init__(
        self, text: str, name: str, context_length: int, seed: int = 0, validation_part=0.1, max_validation: int = 16
    ):
        self.name, self.context_length, self.seed = name, context_length, seed
        self.tokenizer = get_tokenizer()
        ids = torch.tensor(self.tokenizer.encode(text))
        cut = int(len(ids) * (1 - validation_part))
        self.train_ids, self.validation_ids = ids[:cut], ids[cut:]
        shorter = min(len(self.train_ids), len(self.validation_ids))
        if shorter <= context_length:
            raise ValueError(
                f"{name} is too short: {len(ids)} tokens, {validation_part:.0%} of them held out, leave less than a "
                f"window of context_length={context_length} + 1 tokens. Give it at least "
                f"{math.ceil((context_length + 1) / validation_part)} tokens, or a model with a shorter context."
            )
        self.windows = (len(self.train_ids) - 1) // context_length
        held_out = (len(self.validation_ids) - 1) // context_length
        looked_at = sorted({i * held_out // max_validation for i in range(max_validation)}) if held_out else [0]
        self.validation = [self._cut(self.validation_ids, looked_at[i : i + 8]) for i in range(0, len(looked_at), 8)]

    def batch(self, index: int, batch_size: int) -> Batch:
        """The batch number `index`: windows index * batch_size and on, epoch after epoch.

        Raises:
            ValueError: fewer windows in the text than one batch takes.
        """
        if batch_size > self.windows:
            raise ValueError(
                f"{self.name} is too short for one batch: it has {self.windows} windows of {self.context_length} tokens"
                f" and a batch takes {batch_size}. Use a smaller batch, a shorter context, or more text."
            )
        samples = range(index * batch_size, (index + 1) * batch_size)
        orders = {epoch: self._order(epoch) for epoch in {sample // self.windows for sample in samples}}
        return self._cut(self.train_ids, [int(orders[s // self.windows][s % self.windows]) for s in samples])

    def prompt(self) -> Int[Tensor, "one tokens"]:
        """The first tokens of the held-out text, to be continued."""
        return self.validation_ids[None, : min(16, self.context_length // 2)]

    def unigram_loss(self) -> float:
        """The held-out loss, in nats per token, of the best guess that never looks at the tokens before.

        Word frequencies of the training part, each count plus one: what a model must beat to have learned anything
        about order.
        """
        counts = torch.bincount(self.train_ids, minlength=self.tokenizer.vocab_size).double() + 1
        targets = torch.cat([targets.flatten() for _, targets in self.validation])
        return -(counts / counts.sum()).log()[targets].mean().item()

    def _order(self, epoch: int) -> Tensor:
        return torch.randperm(self.windows, generator=torch.Generator().manual_seed(self.seed * 1_000_003 + epoch))

    def _cut(self, ids: Tensor, windows: Sequence[int]) -> Batch:
        length = self.context_length
        pieces = torch.stack([ids[window * length : window * length + length + 1] for window in windows])
        return pieces[:, :-1], pieces[:, 1:]


def load_corpus(name_or_path: str, context_length: int, seed: int = 0) -> TalesCorpus | TextCorpus:
    """A corpus by name ("tales", "python-docs"), or from a text file or a folder of text files.

    Raises:
        FileNotFoundError, ValueError: no such name or path, or nothing usable in it.
    """
    if name_or_path == "tales":
        return TalesCorpus(seed)
    return TextCorpus(read_text(name_or_path), str(name_or_path), context_length, seed)


def read_text(name_or_path: str | Path) -> str:
    """The text of "python-docs", of a file, or of all text files in a folder (in order of their paths).

    Raises:
        FileNotFoundError: no such name or path, or a folder without text files.
        ValueError: an empty file, or one that is not UTF-8 text.
    """
    if str(name_or_path) == "python-docs":
        return python_docs()
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() in TEXT_FILES and file.is_file())
        if not files:
            raise FileNotFoundError(f"{path} holds no text files ({', '.join(TEXT_FILES)}).")
    elif path.is_file():
        files = [path]
    else:
        raise FileNotFoundError(f"{name_or_path}: no such file, folder or dataset. Datasets: {', '.join(NAMES)}.")
    text = END_OF_TEXT.join(filter(None, map(read_file, files)))  # the mark keeps documents apart
    if not text.strip():
        raise ValueError(f"{path} is empty: give it some text to learn from.")
    return text


def read_file(path: Path) -> str:
    """One UTF-8 file; a byte-order mark is dropped."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 text (byte {error.start} is {error.object[error.start]:#04x}): save it as UTF-8, or "
            "pass a text file."
        ) from error
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}.") from error


def python_docs() -> str:
    """The prose that every CPython carries: the topics of `help()`, some 465,000 characters of English.

    Raises:
        FileNotFoundError: a Python that was packaged without it.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise FileNotFoundError("this Python has no pydoc_data: use --text FILE, or --dataset tales.") from error
    return END_OF_TEXT.join(topics[name] for name in sorted(topics))


def first_tokens(text: str, *, batch: int, tokens: int, name: str = "the text") -> Batch:
    """The first tokens of a text as one batch of (inputs, targets), through the GPT-2 tokenizer.

    Raises:
        ValueError: a text shorter than that.
    """
    needed = batch * tokens + 1
    ids = get_tokenizer().encode(text[: 16 * needed])  # a token is rarely longer than 16 characters
    if len(ids) < needed:
        ids = get_tokenizer().encode(text)
    if len(ids) < needed:
        raise ValueError(f"{name} is too short for one batch: it has {len(ids)} tokens, and {needed} are needed.")
    ids = torch.tensor(ids[:needed])
    return ids[:-1].view(batch, tokens), ids[1:].view(batch, tokens)
