"""The speeds that stand under a text are tokens by seconds, of reading and of writing apart."""

import pytest

from GPT2Model.completion import Completion
from orchestrator.writing.clock import Clock

TWO = [Completion([1, 2, 3], [4, 5, 6, 7, 8], "", "length"), Completion([1, 2, 3, 4, 5], [6, 7], "", "stop")]


def test_the_first_tokens_come_with_the_prompts_and_the_others_after_them():
    clock = Clock()
    clock.token(0, 4)
    clock.stop()
    clock.started, clock.first, clock.ended = 10.0, 10.5, 12.5
    assert clock.facts(TWO) == {
        "prompt_tokens": 8, "samples": 1, "prompt_tokens_read": 8, "new_tokens": 7,
        "prefill_seconds": 0.5, "decode_seconds": 2.0,
        "prefill_tokens_per_second": 16.0, "decode_tokens_per_second": 2.5,
    }  # fmt: skip
    assert clock.line(TWO) == (
        "8 prompt tokens in 0.50 s (16.0 tokens/s); 7 new tokens, the first with the prompt, the others in 2.00 s "
        "(2.5 tokens/s)"
    )


def test_samples_read_their_prompt_each_and_a_window_that_slides_no_more_than_the_context():
    clock = Clock(n=2, context_length=4)
    clock.token(0, 4)
    clock.stop()
    clock.started, clock.first, clock.ended = 10.0, 10.5, 12.5
    twice = [Completion([1, 2, 3, 4, 5], ids, "", "length") for ids in ([1, 2], [3, 4])]
    facts = clock.facts(twice)
    assert (facts["prompt_tokens"], facts["prompt_tokens_read"], facts["prefill_tokens_per_second"]) == (5, 8, 16.0)
    assert clock.line(twice).startswith("5 prompt tokens, 2 samples: 8 read in 0.50 s (16.0 tokens/s); 4 new tokens")


def test_only_the_first_token_of_all_sets_the_time():
    clock = Clock()
    assert clock.first is None
    clock.token(0, 4)
    first = clock.first
    clock.token(1, 4)
    clock.stop()
    assert clock.started <= first == clock.first <= clock.ended


@pytest.mark.parametrize(("ids", "line"), [([], "0 new tokens"), ([7], "1 new token")])
def test_what_was_not_done_has_no_speed(ids, line):
    clock = Clock()
    for id in ids:
        clock.token(0, id)
    clock.stop()
    found = [Completion([1, 2], ids, "", "length")]
    assert clock.facts(found)["decode_tokens_per_second"] is None
    assert clock.line(found).endswith(f"; {line}")
    assert clock.line(found).startswith("2 prompt tokens;" if not ids else "2 prompt tokens in ")
