"""Perplexity of a text longer than the context: windows that slide over it, and each token predicted once.

A model that reads at most L tokens cannot read a whole book before each word. So a window of L tokens moves on by
`stride` tokens, and in each only the tokens that no window held before are predicted. A smaller stride gives every
token more to read before it and costs more windows: the figure falls, and means nothing without its stride.
Documents that have nothing to do with one another can be read each by itself.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from GPT2Model.generation import evaluating
from orchestrator.training.loss import without_head

ROWS = 1024  # positions whose logits are in memory at a time


@dataclass(frozen=True)
class Window:
    """Tokens begin..end - 1 are read, and of them first_target..end - 1 predicted; the others were before, if any."""

    begin: int
    end: int
    first_target: int
    overlaps: bool = False  # with the window before

    @property
    def predicted(self) -> int:
        return self.end - self.first_target


@dataclass(frozen=True)
class Perplexity:
    """What a model makes of a text.

    Attributes:
        tokens: of the text. predicted: those of them that are predicted. nats: what all of those cost together.
        max_length, stride: of the windows, in tokens. windows: how many there were.
        tokens_read: by all windows together, which is what it costs.
        least_context: tokens that stood before each predicted one in its window, at least; in the first window fewer.
        mean_context: the same, on average, the first window included.
        documents: how many, each read by itself after an opening mark; 0: one text, as it is.
        by_transformers_loop: the perplexity that the loop of transformers' documentation gives (see `transformers`).
    """

    tokens: int
    predicted: int
    nats: float
    max_length: int
    stride: int
    windows: int
    tokens_read: int
    least_context: int
    mean_context: float
    by_transformers_loop: float
    documents: int = 0

    @property
    def nats_per_token(self) -> float:
        return self.nats / self.predicted

    @property
    def perplexity(self) -> float:
        """exp(nats per predicted token): as unsure as if it chose among so many tokens evenly."""
        return exp(self.nats_per_token)

    def bits_per_byte(self, size: int) -> float:
        """Of a text of `size` bytes: its tokens at their mean cost, also the few that were not predicted."""
        return self.nats_per_token * (self.tokens - self.documents) / size / math.log(2)

    def per_word(self, words: int) -> float:
        """Perplexity per word of a text of so many words: exp(what all tokens cost / words)."""
        return exp(self.nats_per_token * (self.tokens - self.documents) / words)

    def as_dict(self) -> dict:
        """JSON-ready."""
        return {**asdict(self), "nats_per_token": self.nats_per_token, "perplexity": self.perplexity}


def perplexity(
    model,
    ids: Sequence[int] | Tensor,
    *,
    stride: int | None = None,
    max_length: int | None = None,
    batch_size: int = 8,
    documents: Sequence[int] | None = None,
    tick: Callable[[int], object] | None = None,
) -> Perplexity:
    """The perplexity of a text by sliding windows.

    Args:
        model: a GPTModel. ids: the text's token ids, in one row.
        stride: tokens that a window moves on; None: max_length, windows side by side.
        max_length: tokens in a window; None: the model's context_length.
        batch_size: windows that are computed together; the figure does not depend on it, beyond rounding.
        documents: the lengths of the texts that `ids` holds one after the other, each opened by a mark that is not
            predicted; each is read by itself. None: all of it is one text.
        tick: is told after each batch how many tokens were read.
    Raises:
        ValueError: everything wrong with the arguments, at once; or logits that are NaN.
    Source: "Perplexity of fixed-length models", in transformers' documentation: the same windows, and the same tokens
        predicted in each.
    """
    max_length = model.cfg["context_length"] if max_length is None else max_length
    stride = max_length if stride is None else stride
    ids = torch.as_tensor(ids)
    check(model, ids, stride, max_length, batch_size, documents)
    device = next(model.parameters()).device
    slid = windows_of(documents or [len(ids)], stride, max_length)
    groups, costs = batches(slid, batch_size), []
    with evaluating(model), torch.inference_mode():
        for some in groups:
            costs += costs_of(model, ids, some, device)
            if tick is not None:
                tick(sum(window.end - window.begin for window in some))
    slid = [window for some in groups for window in some]
    if not all(map(math.isfinite, costs)):
        first = next(window for window, cost in zip(slid, costs, strict=True) if not math.isfinite(cost))
        raise ValueError(
            f"the model's logits for tokens {first.begin} to {first.end - 1} are NaN or infinite: its weights are, or "
            "its dtype is too short for it (float16 ends at 65,504). Try --dtype float32, or another checkpoint."
        )
    predicted = sum(window.predicted for window in slid)
    contexts = sum(window.predicted * (window.first_target + window.end - 1 - 2 * window.begin) / 2 for window in slid)
    least = max_length - stride if any(window.overlaps for window in slid) else 1
    return Perplexity(
        tokens=len(ids), predicted=predicted, nats=math.fsum(costs), max_length=max_length, stride=stride,
        windows=len(slid), tokens_read=sum(window.end - window.begin for window in slid),
        least_context=least, mean_context=contexts / predicted,
        by_transformers_loop=transformers_loop(slid, costs), documents=len(documents or ()),
    )  # fmt: skip


def windows(tokens: int, stride: int, max_length: int, start: int = 0) -> list[Window]:
    """The windows over a text: each begins `stride` tokens after the one before, the last ends with the text.

    The first token in a window has nothing before it there and is not predicted: with stride == max_length that is one
    token of each window, and otherwise the first of the text alone.

    Args:
        start: where the text stands among others.
    """
    made, end = [], 0
    for begin in range(0, tokens, stride):
        before, end = end, min(begin + max_length, tokens)
        made.append(Window(start + begin, start + end, start + max(before, begin + 1), overlaps=before > begin))
        if end == tokens:
            break
    return [window for window in made if window.predicted]  # the last may hold nothing but its first token


def windows_of(lengths: Iterable[int], stride: int, max_length: int) -> list[Window]:
    """The windows over several texts that stand one after the other, each read by itself."""
    made, start = [], 0
    for length in lengths:
        made += windows(length, stride, max_length, start)
        start += length
    return made


def batches(slid: Sequence[Window], batch_size: int) -> list[list[Window]]:
    """Windows that can be computed together: as long as one another, and as much of them predicted."""
    alike: dict[tuple[int, int], list[Window]] = {}
    for window in slid:
        alike.setdefault((window.end - window.begin, window.predicted), []).append(window)
    return [some[i : i + batch_size] for some in alike.values() for i in range(0, len(some), batch_size)]


def costs_of(model, ids: Tensor, some: Sequence[Window], device) -> list[float]:
    """What the predicted tokens of each window cost, in nats. Only their positions go through the head."""
    rows = torch.stack([ids[window.begin : window.end] for window in some]).to(device, torch.int64)
    count = some[0].predicted
    with without_head(model) as head:
        hidden = model(rows)[:, -count - 1 : -1].flatten(0, 1)  # what stands before each predicted token
    targets, costs = rows[:, -count:].flatten(), []
    for states, following in zip(hidden.split(ROWS), targets.split(ROWS), strict=True):
        logits = head(states)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        costs.append(F.cross_entropy(logits, following, reduction="none").double().cpu())
    return torch.cat(costs).view(len(some), count).sum(dim=1).tolist()


def transformers_loop(slid: Sequence[Window], costs: Sequence[float]) -> float:
    """The figure of the loop in transformers' documentation, which weighs windows a little differently.

    That loop takes the mean cost of a window's predicted tokens, and weighs it with their number less one: right for
    a window that begins with a target, which has nothing before it, and one too few for windows that overlap. With
    stride == max_length it is the perplexity; with stride == 1 only the first window counts.
    """
    weights = [window.predicted - window.overlaps for window in slid]
    if not sum(weights):
        return math.nan
    means = (weight * cost / window.predicted for weight, cost, window in zip(weights, costs, slid, strict=True))
    return exp(math.fsum(means) / sum(weights))


def check(model, ids: Tensor, stride: int, max_length: int, batch_size: int, documents=None) -> None:
    """Raise one ValueError that lists everything that is wrong."""
    problems, context, vocab_size = [], model.cfg["context_length"], model.cfg["vocab_size"]
    if ids.ndim != 1 or (ids.is_floating_point() and ids.numel()):
        raise ValueError(f"ids must be the token ids of one text, in one row: got {ids.dtype} {tuple(ids.shape)}.")
    if len(ids) < 2:
        problems.append(
            f"the text has {len(ids)} token{'s' * (len(ids) != 1)}, and the first of a text is not predicted: at least "
            "2 are needed."
        )
    elif not 0 <= ids.min() <= ids.max() < vocab_size:
        problems.append(
            f"token ids must be in 0..{vocab_size - 1}, got {ids.min()}..{ids.max()}: another tokenizer than the "
            "model's?"
        )
    if not 2 <= max_length <= context:
        problems.append(
            f"max_length must be from 2 to the model's context_length, {context}, got {max_length}: a window holds the "
            "token that is predicted and at least one before it."
        )
    if stride < 1:
        problems.append(f"stride must be 1 token or more, got {stride}: windows would not move on.")
    elif stride > max_length:
        problems.append(
            f"stride {stride} is more than the {max_length} tokens of a window: the tokens between two windows would "
            f"never be predicted, and the figure be that of another text. Use {max_length} or less."
        )
    if documents is not None and (sum(documents) != len(ids) or min(documents, default=0) < 2):
        problems.append(
            f"documents must be of 2 tokens or more each, {len(ids)} together; got {sum(documents)} together, the "
            f"shortest of {min(documents, default=0)}."
        )
    if batch_size < 1:
        problems.append(f"batch_size must be 1 window or more, got {batch_size}.")
    if problems:
        raise ValueError(problems[0] if len(problems) == 1 else "\n  - ".join(["these do not work:", *problems]))


def exp(value: float) -> float:
    return math.exp(value) if value < 709 else math.inf
