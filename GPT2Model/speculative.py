"""generate_speculative(): a small model guesses several tokens ahead, the large one checks them all in one pass.

Reading five tokens costs a large model hardly more than reading one: its weights travel from memory once either way. So
a draft proposes, and the model only judges. What is written has exactly the distribution of the model alone.
Leviathan et al., 2023 (Fast Inference from Transformers via Speculative Decoding), algorithm 1; Chen et al., 2023.

The papers' letters: p, the model's distribution of the next token, after all the cuts of `Sampling`; q, the draft's,
after the same cuts; gamma, how many tokens are guessed in a round; n, how many of them are accepted; r, a number drawn
evenly from 0 to 1.
"""

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from itertools import chain
from numbers import Integral

import torch
from jaxtyping import Float, Int
from torch import Tensor

from GPT2Model.generation import as_set, check_model, counted, evaluating, make_cache, problems_of
from GPT2Model.sampling import GREEDY, Sampler, Sampling, check_numbers


@dataclass(frozen=True)
class SpeculativeResult:
    """What was written, and what it took.

    Attributes:
        ids: (1, T + n), the prompt included.
        proposed: tokens that the draft guessed.
        accepted: those of them that stand in `ids`.
        rejected: those that were turned down. What was guessed behind one was never judged.
        rounds: passes of the model. Each writes its accepted guesses and one token more; a guessed stop is the last.
    """

    ids: Int[Tensor, "1 longer"]
    proposed: int
    accepted: int
    rejected: int
    rounds: int

    @property
    def acceptance_rate(self) -> float:
        """Accepted of judged, 0 to 1: on average the sum of min(p, q), the papers' alpha. NaN if none was judged."""
        judged = self.accepted + self.rejected
        return self.accepted / judged if judged else math.nan


@torch.no_grad()
def generate_speculative(
    model,
    draft,
    ids: Int[Tensor, "batch tokens"],
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    *,
    draft_tokens: int = 4,
    stop_tokens: int | Collection[int] = (),
    on_token: Callable[[Tensor], bool | None] | None = None,
) -> SpeculativeResult:
    """Continue `ids` by up to `max_new_tokens` tokens of `model`, with a `draft` that guesses ahead.

    Why it is exact: a token x comes out as an accepted guess with chance q(x) min(1, p(x) / q(x)) = min(p(x), q(x)).
    With chance R = 1 - sum min(p, q) = sum max(p - q, 0) it is rejected, and x then drawn with max(p(x) - q(x), 0) / R.
    Both ways together: min(p(x), q(x)) + max(p(x) - q(x), 0) = p(x). The draft decides how fast, never what.

    Greedy, p and q are 1 for one token and 0 for the others, and the same rule gives the tokens of the plain loop. (As
    far as rounding allows: the model reads several tokens at once, and logits that are equal but for their last digits
    may change places.)

    Args:
        model: the GPTModel whose text is wanted. Both are put into eval for the time, and back.
        draft: a faster one with the same vocabulary. It may be `model` itself: all is accepted, and nothing gained.
            Where the text is longer than the draft's context, the model goes on alone.
        ids: (1, T), one prompt.
        max_new_tokens: 0 or more. With the prompt it must fit into the model's context.
        sampling: applied to p and to q alike.
        draft_tokens: gamma, how many tokens are guessed in a round.
        stop_tokens: an id, or several. The text ends with the first that is written.
        on_token: called with each new id, (1,), in order: to show the text as it grows. Returning True ends it there.
    Returns:
        the ids, how many guesses and passes of the model they took, and how many guesses were accepted.
    Raises:
        ValueError: every argument that makes no sense, at once.
    """
    check_model(model)
    check_model(draft)
    stops = as_set(stop_tokens)
    problems = problems_of(model, ids, max_new_tokens, sampling, stops, past_context="slide")  # too long: see below
    problems += problems_of_a_pair(model, draft, ids, max_new_tokens, draft_tokens)
    if problems:
        raise ValueError("generate_speculative() cannot run:\n" + "\n".join(f"  - {problem}" for problem in problems))

    # Greedy has nothing to draw, and from a generator of its own it leaves torch's state as it was.
    sampler = Sampler(replace(sampling, seed=0) if sampling.greedy else sampling)
    end, draft_context = ids.shape[1] + max_new_tokens, draft.cfg["context_length"]
    judge, guesser = Reader(model, end, sampler), Reader(draft, min(end, draft_context), sampler)
    text, finished = ids[0].tolist(), False
    proposed = accepted = rejected = rounds = 0

    with evaluating(model), evaluating(draft):
        while len(text) < end and not finished:
            # A round writes one token more than it accepts. The last guess is not read by the draft itself.
            gamma = min(draft_tokens, end - len(text) - 1, draft_context - len(text) + 1)
            guesses, q = guess(guesser, text, gamma, stops)
            p = judge.distributions(text + guesses, first=len(text))
            n = count_accepted(p, q, guesses, sampler)
            following = p[n] if n == len(guesses) else residual(p[n], q[n])
            new = until_stop([*guesses[:n], sampler.draw(following)], stops)
            finished = new[-1] in stops
            if on_token is not None:
                for length, token in enumerate(new, 1):
                    if on_token(ids.new_tensor([token])) is True:
                        new, finished = new[:length], True
                        break
            n, turned_down = min(n, len(new)), n < len(guesses)
            text = text + new
            judge.forget(text)
            guesser.forget(text)
            proposed, accepted, rejected = proposed + len(guesses), accepted + n, rejected + turned_down
            rounds += 1
    return SpeculativeResult(ids.new_tensor([text]), proposed, accepted, rejected, rounds)


class Reader:
    """A model with its cache: it reads the tokens it has not read yet, and says what may follow them."""

    def __init__(self, model, max_length: int, sampler: Sampler):
        self.model, self.sampler = model, sampler
        self.cache = make_cache(model, 1, max_length)

    def distributions(self, text: list[int], first: int) -> list[Tensor]:
        """What follows the first `first` tokens of `text`, the first `first + 1`, ..., all of them. One pass.

        Returns:
            (vocab_size,) float64 each, on the CPU, since p - q needs the digits and not every device has them.
        """
        read = self.cache.length
        unread = torch.tensor([text[read:]], device=device_of(self.model))
        logits = self.model(unread, cache=self.cache)[0]
        check_numbers(logits[max(0, first - 1 - read) :])
        # The penalty of each position looks at the tokens before it, the guesses among them, and at none behind it.
        return [
            normalised(self.sampler.probabilities(logits[length - 1 - read], text[:length]))
            for length in range(first, len(text) + 1)
        ]

    def forget(self, text: list[int]) -> None:
        """Keep what stands in `text`. Its last token is new and was never read: the next pass begins with it."""
        self.cache.truncate(min(self.cache.length, len(text) - 1))


def guess(guesser: Reader, text: list[int], gamma: int, stops: set[int]) -> tuple[list[int], list[Tensor]]:
    """gamma tokens from the draft, one after the other, and the q that each was drawn from. A stop is the last."""
    guesses, q = [], []
    while len(guesses) < gamma and not (guesses and guesses[-1] in stops):
        q += guesser.distributions(text + guesses, first=len(text + guesses))
        guesses.append(guesser.sampler.draw(q[-1]))
    return guesses, q


def count_accepted(p: list[Tensor], q: list[Tensor], guesses: list[int], sampler: Sampler) -> int:
    """n: guesses are accepted in order, each with chance min(1, p / q), up to the first that is not."""
    for n, x in enumerate(guesses):
        r = float(torch.rand((), dtype=torch.float64, generator=sampler.generator))  # in [0, 1)
        if not r * float(q[n][x]) < float(p[n][x]):
            return n
    return len(guesses)


def residual(p: Float[Tensor, "vocab_size"], q: Float[Tensor, "vocab_size"]) -> Float[Tensor, "vocab_size"]:
    """max(p - q, 0), scaled to sum to 1: what the guesses have left over of p."""
    rest = (p - q).clamp(min=0)
    # Where p and q are equal but for their last digits, rounding can leave nothing over.
    return normalised(rest) if rest.sum() > 0 else p


def normalised(weights: Float[Tensor, "vocab_size"]) -> Float[Tensor, "vocab_size"]:
    weights = weights.cpu().double()
    return weights / weights.sum()


def until_stop(tokens: list[int], stops: set[int]) -> list[int]:
    """The tokens up to the first stop, it included."""
    return next((tokens[: i + 1] for i, token in enumerate(tokens) if token in stops), tokens)


def device_of(model) -> torch.device:
    return next(chain(model.parameters(), model.buffers())).device


def problems_of_a_pair(model, draft, ids, max_new_tokens, draft_tokens) -> list[str]:
    """What is wrong with a call beyond what `generate()` would say of it, one sentence each."""
    problems, vocab_size, context = [], model.cfg["vocab_size"], model.cfg["context_length"]
    if draft.cfg["vocab_size"] != vocab_size:
        problems.append(
            f"the draft's vocabulary has {draft.cfg['vocab_size']} tokens, the model's {vocab_size}: both must use the "
            "same tokenizer."
        )
    if device_of(model) != device_of(draft):
        problems.append(
            f"the model is on {device_of(model)}, the draft on {device_of(draft)}: move the draft with "
            f"draft.to({str(device_of(model))!r})."
        )
    if not isinstance(draft_tokens, Integral) or isinstance(draft_tokens, bool) or draft_tokens < 1:
        problems.append(f"draft_tokens must be a whole number, 1 or more, got {draft_tokens!r}.")
    if not isinstance(ids, Tensor) or ids.ndim != 2 or not ids.numel():
        return problems
    rows, tokens = ids.shape
    if rows > 1:
        problems.append(
            f"ids must be one prompt, (1, T), got {rows} rows: pass each by itself, since each accepts another number "
            "of guesses."
        )
    if isinstance(max_new_tokens, Integral) and tokens + max(0, max_new_tokens) > context:
        problems.append(
            f"a prompt of {counted(tokens, 'token')} and {counted(max_new_tokens, 'new one')} are more than the "
            f"model's context_length={context}: shorten the prompt, or ask for fewer."
        )
    if tokens > draft.cfg["context_length"]:
        problems.append(
            f"the prompt has {counted(tokens, 'token')} and the draft reads {draft.cfg['context_length']}: it could "
            "not guess one. Take a draft with a longer context."
        )
    return problems
