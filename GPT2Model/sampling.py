"""From logits to a token: what is cut, in which order, and how one is drawn.

repetition penalty -> temperature -> top-k -> top-p -> min-p -> draw. Each step takes what the one before left, as in
transformers, so that the same settings mean the same distribution there and here.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. The defaults are greedy: always the likeliest.

    Why a class: one sequence, a batch, the paged engine and speculative decoding must all mean the same by it.

    Attributes:
        temperature: logits are divided by it. 0: greedy. 1: the model's own distribution; lower is safer.
        top_k: keep the k likeliest tokens.
        top_p: keep the fewest likeliest tokens whose chances sum to p at least ("nucleus"; Holtzman et al., 2019).
        min_p: keep the tokens at least this many times as likely as the likeliest (Nguyen et al., 2024).
        repetition_penalty: a token that was read or written has its logit divided by this if it is positive, and
            multiplied if negative, before all else (Keskar et al., 2019). 1: none; above: repeat less. Also in greedy.
        seed: of the draws; None: torch's global state.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    seed: int | None = None

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    def problems(self) -> list[str]:
        """Everything that makes no sense, one sentence each; empty: nothing."""
        settings = {name: getattr(self, name) for name in RULES}
        found = [
            f"{name} must be {rule}, got {value!r}."
            for name, value in settings.items()
            for rule, holds in [RULES[name]]
            if not holds(value)
        ]
        unused = [name for name in ("top_k", "top_p", "min_p") if getattr(self, name) is not None]
        if self.greedy and unused:
            found.append(
                f"temperature 0 always takes the likeliest token, and {', '.join(unused)} would change nothing: leave "
                "them out, or set a temperature above 0."
            )
        return found


def is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def is_whole(value: object) -> bool:
    return is_number(value) and isinstance(value, Integral)


# What each setting may hold. NaN is a number too, and no comparison with it is true.
RULES = {
    "temperature": ("0 (greedy) or a positive number", lambda v: is_number(v) and 0 <= v < float("inf")),
    "top_k": ("a whole number, 1 or more, or None", lambda v: v is None or (is_whole(v) and v >= 1)),
    "top_p": ("a number above 0 and at most 1, or None", lambda v: v is None or (is_number(v) and 0 < v <= 1)),
    "min_p": ("a number from 0 to 1, or None", lambda v: v is None or (is_number(v) and 0 <= v <= 1)),
    "repetition_penalty": ("a number above 0 (1: none)", lambda v: is_number(v) and 0 < v < float("inf")),
    "seed": (f"a whole number from 0 to {2**63 - 1}, or None", lambda v: v is None or (is_whole(v) and 0 <= v < 2**63)),
}


GREEDY = Sampling()
NO_NUMBERS = (
    "the model's logits are NaN or infinite: its weights are, or its dtype is too short for it (float16 ends at "
    "65,504). Take float32, or another checkpoint."
)


class Sampler:
    """One sequence's choices. It draws from a generator of its own, so nothing else in a batch changes what it gets.

    Args:
        sampling: the settings.
        device: where the logits are.
    """

    def __init__(self, sampling: Sampling, device: torch.device | str = "cpu"):
        self.sampling = sampling
        self.generator = None if sampling.seed is None else torch.Generator(device).manual_seed(sampling.seed)

    def logits(self, logits: Float[Tensor, "vocab_size"], history: Sequence[int] | Tensor) -> Tensor:
        """The logits after the repetition penalty. history: ids of all tokens read and written so far."""
        return penalised(logits, history, self.sampling.repetition_penalty)

    def probabilities(self, logits: Float[Tensor, "vocab_size"], history: Sequence[int] | Tensor = ()) -> Tensor:
        """The distribution that `pick` draws from: (vocab_size,), float32. Greedy: all on the likeliest token."""
        logits = self.logits(logits, history)
        if self.sampling.greedy:
            return torch.zeros_like(logits, dtype=torch.float32).scatter_(0, logits.argmax(dim=0, keepdim=True), 1.0)
        kept = {name: getattr(self.sampling, name) for name in ("top_k", "top_p", "min_p")}
        return filtered_probabilities(logits, self.sampling.temperature, **kept)

    def pick(self, logits: Float[Tensor, "vocab_size"], history: Sequence[int] | Tensor = ()) -> int:
        """The next token's id."""
        if self.sampling.greedy:
            return int(self.logits(logits, history).argmax())
        return self.draw(self.probabilities(logits, history))

    def draw(self, probabilities: Float[Tensor, "vocab_size"]) -> int:
        """One id, as often as its probability says."""
        return int(torch.multinomial(probabilities, 1, generator=self.generator))


def check_numbers(logits: Tensor) -> None:
    """Raise ValueError where a row of logits has NaN or infinity: greedy would write some token, and a draw fail."""
    if not bool(logits.amax(dim=-1).isfinite().all()):  # NaN is the largest of all
        raise ValueError(NO_NUMBERS)


def penalised(logits: Tensor, history: Sequence[int] | Tensor, penalty: float) -> Tensor:
    """Logits of the tokens in `history` moved down by the penalty (up, where it is below 1); each token once."""
    if penalty == 1:
        return logits
    seen = torch.as_tensor(history, dtype=torch.int64, device=logits.device).unique()
    moved = torch.where(logits[seen] > 0, logits[seen] / penalty, logits[seen] * penalty)
    largest = torch.finfo(logits.dtype).max  # an extreme penalty would make logits infinite, and softmax NaN of them
    return logits.scatter(0, seen, moved.clamp(-largest, largest))


def sample(
    logits: Float[Tensor, "batch vocab_size"],
    temperature: float = 0.0,
    *,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Int[Tensor, "batch"]:
    """One token id for each row, drawn from what `filtered_probabilities` leaves; temperature 0: the likeliest."""
    if temperature == 0.0:
        return logits.argmax(dim=-1)
    probabilities = filtered_probabilities(logits, temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    return torch.multinomial(probabilities, 1, generator=generator).squeeze(1)


def filtered_probabilities(
    logits: Float[Tensor, "*batch vocab_size"],
    temperature: float,
    *,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
) -> Float[Tensor, "*batch vocab_size"]:
    """The distribution that is drawn from: what was cut has probability 0, the rest sums to 1. float32."""
    # softmax does not change when a row is shifted; from the maximum down, a tiny temperature cannot overflow
    logits = (logits.float() - logits.float().amax(dim=-1, keepdim=True)) / max(temperature, 1e-30)
    if top_k is not None and top_k < logits.shape[-1]:
        kept = logits.topk(top_k, dim=-1)
        logits = torch.full_like(logits, float("-inf")).scatter(-1, kept.indices, kept.values)
    probabilities = torch.softmax(logits, dim=-1)
    if top_p is not None and top_p < 1:  # at 1 nothing is cut, though the rounded sums below reach 1 too early
        ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
        before = ordered.cumsum(dim=-1) - ordered  # mass of the likelier tokens: 0 for the first, which always stays
        probabilities = torch.zeros_like(probabilities).scatter(-1, order, ordered.masked_fill(before >= top_p, 0.0))
    if min_p:
        least = min_p * probabilities.amax(dim=-1, keepdim=True)
        probabilities = probabilities.masked_fill(probabilities < least, 0.0)
    if min_p or (top_p is not None and top_p < 1):
        probabilities = probabilities / probabilities.sum(dim=-1, keepdim=True)
    return probabilities
