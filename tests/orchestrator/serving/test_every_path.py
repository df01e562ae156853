"""Greedy text is the plain loop's on every other path too: no cache, cache, batch, pages, texts, a draft. In float32.

The engine's own is test_same_tokens.py.
"""

from collections import Counter
from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from GPT2Model.generation import generate
from GPT2Model.speculative import generate_speculative
from GPT2Model.text_generation import generate_text
from tests.GPT2Model.exact_sampling import shapes_unchecked
from tests.orchestrator.serving.mixes import NEAR, PROMPTS, VARIANTS, model, plain_loop

FLOAT32 = torch.float32


@dataclass(frozen=True)
class Batch:
    prompts: list[tuple[int, ...]]
    new_tokens: int
    variant: str
    draft: str
    draft_tokens: int


BATCHES = st.builds(
    Batch, st.lists(PROMPTS, min_size=1, max_size=4), st.integers(1, 20), st.sampled_from(sorted(VARIANTS)),
    st.sampled_from(sorted(VARIANTS)), st.integers(1, 6),
)  # fmt: skip


def every_path(batch: Batch) -> dict[str, list[list[int]]]:
    """{path: the new tokens of each prompt}."""
    ours, draft, new = model(batch.variant, FLOAT32), model(batch.draft, FLOAT32), batch.new_tokens
    longest = max(map(len, batch.prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in batch.prompts])
    real = torch.tensor([[False] * (longest - len(prompt)) + [True] * len(prompt) for prompt in batch.prompts])
    alone = [torch.tensor([prompt]) for prompt in batch.prompts]
    found = {
        "no cache": [generate(ours, one, new, use_cache=False)[0, -new:].tolist() for one in alone],
        "cache": [generate(ours, one, new)[0, -new:].tolist() for one in alone],
        "batch": generate(ours, ids, new, padding_mask=real)[:, -new:].tolist(),
        "batch, no cache": generate(ours, ids, new, padding_mask=real, use_cache=False)[:, -new:].tolist(),
        "texts": [done.ids for done in generate_text(ours, None, batch.prompts, new)],
        "a draft": [
            generate_speculative(ours, draft, one, new, draft_tokens=batch.draft_tokens).ids[0, -new:].tolist()
            for one in alone
        ],
    }
    with ours.using_attention("paged_attention"):
        found["pages"] = generate(ours, ids, new, padding_mask=real)[:, -new:].tolist()
    return found


def hold(batch: Batch) -> Counter:
    expected, met = (
        [plain_loop(batch.variant, FLOAT32, prompt, batch.new_tokens) for prompt in batch.prompts],
        Counter(),
    )
    for path, texts in every_path(batch).items():
        for (right, margins), text in zip(expected, texts, strict=True):
            met["texts"] += 1
            if min(margins) < NEAR:
                met["near ties"] += 1
                continue
            assert text == right, (path, batch)
            met["different tokens"] = max(met["different tokens"], len(set(text)))
    return met


def over_many(count: int) -> Counter:
    met = Counter()

    @settings(max_examples=count, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(BATCHES)
    def run(batch):
        for name, number in hold(batch).items():
            met[name] = max(met[name], number) if name == "different tokens" else met[name] + number

    with shapes_unchecked():
        run()
    return met


def test_every_path_writes_the_tokens_of_the_plain_loop():
    met = over_many(40)
    assert met["texts"] > 250, met
    assert met["near ties"] < 0.05 * met["texts"], met
    assert met["different tokens"] > 8, met  # texts that vary


@pytest.mark.slow
def test_every_path_over_many_more_batches():
    met = over_many(2000)
    assert met["near ties"] < 0.05 * met["texts"], met
