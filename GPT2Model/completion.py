"""Completion: what was written behind one prompt, why it ended there, and how likely the model held each token.

generate_text(), the paged engine and the command line all answer with it.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

FinishReason = Literal["stop", "length", "cancelled", "error"]


@dataclass(frozen=True)
class TokenLogprobs:
    """How likely a token was, in nats, by the model's own distribution.

    That is log_softmax of the raw logits, before penalty, temperature and cuts: what was drawn from may differ from it,
    but only this says what the model thinks, and its mean over a text is the model's loss on it.

    Attributes:
        logprob: of the token that was chosen.
        top: id -> log-probability of the likeliest tokens, the likeliest first. The chosen one may be missing.
    """

    logprob: float
    top: dict[int, float]


@dataclass(frozen=True)
class Completion:
    """One continuation of one prompt.

    Attributes:
        prompt_ids: what was read.
        ids: what was written. A stop token, and tokens that hold a stop string, are still in it.
        text: of `ids`, without the stop token and cut before the stop string; None: there was no tokenizer.
        finish_reason: "stop": a stop token or a stop string came; "length": max_new_tokens did; "cancelled"; "error".
        logprobs: one for each of `ids`; None: nobody asked.
        error: what went wrong with this text, in the engine; None: nothing.
    """

    prompt_ids: list[int]
    ids: list[int]
    text: str | None
    finish_reason: FinishReason
    logprobs: list[TokenLogprobs] | None = None
    error: str | None = None


def token_logprobs(logits: Float[Tensor, "vocab_size"], chosen: int, top: int) -> TokenLogprobs:
    """The chosen token's log-probability and the `top` likeliest ones.

    Args:
        logits: (vocab_size,) as the model gave them.
        chosen: the id of the token that was written.
        top: how many of the likeliest to note; 0: none, more than there are: all.
    """
    # bf16 has three digits: too few for a sum over a vocabulary
    log_probabilities = torch.log_softmax(logits.float() if logits.dtype.itemsize < 4 else logits, dim=-1)
    best = log_probabilities.topk(min(top, log_probabilities.shape[0]))
    return TokenLogprobs(
        logprob=float(log_probabilities[chosen]),
        top=dict(zip(best.indices.tolist(), best.values.tolist(), strict=True)),
    )
