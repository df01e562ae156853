"""Log-probabilities of tokens are those of the model's own distribution."""

import math

import pytest
import torch

from GPT2Model.completion import token_logprobs

LOGITS = [0.5, -1.0, 3.0, 2.0]


def by_hand() -> list[float]:
    total = sum(math.exp(value) for value in LOGITS)
    return [math.log(math.exp(value) / total) for value in LOGITS]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_chosen_token_and_the_likeliest_ones_in_their_order(dtype):
    found = token_logprobs(torch.tensor(LOGITS, dtype=dtype), chosen=1, top=2)  # all four are exact in bfloat16
    assert list(found.top) == [2, 3]
    eps = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    assert found.logprob == pytest.approx(by_hand()[1], rel=8 * eps)
    assert list(found.top.values()) == pytest.approx([by_hand()[2], by_hand()[3]], rel=8 * eps)


@pytest.mark.parametrize(("top", "noted"), [(0, 0), (1, 1), (4, 4), (9, 4)])
def test_as_many_as_are_asked_for_and_as_there_are(top, noted):
    found = token_logprobs(torch.tensor(LOGITS), chosen=0, top=top)
    assert len(found.top) == noted
    assert sum(map(math.exp, found.top.values())) <= 1 + 1e-6
