"""What the engine promises beside its tokens: texts, events, cancels, errors, threads, memory, counts.

That every path writes the plain loop's tokens is in test_same_tokens.py.
"""

import logging
import threading
from dataclasses import asdict

import pytest
import torch

from GPT2Model.gpt2 import GPTModel
from GPT2Model.sampling import Sampling
from GPT2Model.text_generation import generate_text
from orchestrator.evaluation.memory import peak_tensor_bytes
from orchestrator.serving import capacity
from orchestrator.serving import engine as engine_module
from orchestrator.serving.engine import Engine
from orchestrator.text.tokenizers import BytesTokenizer
from tests.orchestrator.serving.bytes_model import CONTEXT, PROMPTS, alone

# --- texts -------------------------------------------------------------------------------------------


def test_a_completion_is_generate_texts_own_with_samples_stops_and_log_probabilities(model, make):
    wishes = {"logprobs": 2, "stop_tokens": ()}
    sampling = Sampling(temperature=0.9, top_k=40, repetition_penalty=1.2, seed=11)
    plain = generate_text(model, BytesTokenizer(), PROMPTS[1], 20, sampling, n=3, **wishes)
    stop = plain[1].text[4:6]  # it occurs in one of them at least
    expected = generate_text(model, BytesTokenizer(), PROMPTS[1], 20, sampling, n=3, stop=stop, **wishes)
    engine = make(BytesTokenizer(), max_batch_tokens=8, max_running=8)
    for prompt in PROMPTS:
        engine.add(prompt, 9)
    number = engine.add(PROMPTS[1], 20, sampling, n=3, stop=stop, **wishes)
    found = engine.run()[number]
    assert expected[1].finish_reason == "stop"
    for one, other in zip(found, expected, strict=True):
        assert (one.prompt_ids, one.ids, one.text) == (other.prompt_ids, other.ids, other.text)
        assert one.finish_reason == other.finish_reason
        for seen, right in zip(one.logprobs, other.logprobs, strict=True):
            assert seen.logprob == pytest.approx(right.logprob, abs=1e-9)
            assert seen.top == pytest.approx(right.top, abs=1e-9)


def test_the_events_of_a_request_are_its_completion_in_pieces(make):
    engine, events = make(BytesTokenizer()), []
    number = engine.add(PROMPTS[0], 25, Sampling(temperature=1.5, seed=0), n=2, stop="e", on_token=events.append)
    completions = engine.run()[number]
    for index, done in enumerate(completions):
        mine = [event for event in events if event.index == index]
        assert [event.id for event in mine] == done.ids
        assert "".join(event.text for event in mine) == done.text
        assert [event.finish_reason for event in mine] == [None] * (len(mine) - 1) + [done.finish_reason]
    assert {event.request for event in events} == {number}
    assert len(completions[0].text) > 3


def test_a_stop_token_ends_the_text_and_is_none_of_it(model, make):
    ((*_, third),) = [ids[:3] for ids in alone(model, PROMPTS[0], 9)]
    engine = make(BytesTokenizer())
    number = engine.add(PROMPTS[0], 9, stop_tokens=third)
    (done,) = engine.run()[number]
    first = alone(model, PROMPTS[0], 9)[0].index(third)
    assert done.finish_reason == "stop"
    assert done.ids == alone(model, PROMPTS[0], 9)[0][: first + 1]
    assert done.text == BytesTokenizer().decode(done.ids[:-1])


def test_without_a_tokenizer_there_are_ids_and_no_text(make):
    engine = make()
    number = engine.add(torch.tensor([1, 2, 3]), 4)
    (done,) = engine.run()[number]
    assert (len(done.ids), done.text, done.logprobs) == (4, None, None)
    assert done.prompt_ids == [1, 2, 3]


# --- coming and going --------------------------------------------------------------------------------


def test_what_is_done_is_handed_out_once(make):
    engine = make()
    first, second = engine.add([1, 2], 3), engine.add([3, 4], 1)
    assert engine.take(first) is None
    assert engine.step()
    assert len(engine.take(second)) == 1
    assert engine.take(second) is None
    assert list(engine.run()) == [first]
    assert engine.run() == {}
    assert engine.idle
    assert not engine.step()


def test_a_cancelled_request_keeps_what_it_wrote_and_others_go_on(model, make):
    engine = make(BytesTokenizer(), max_running=2)
    first, second, third = (engine.add(prompt, 20, stop_tokens=()) for prompt in PROMPTS[:3])
    for _ in range(4):
        engine.step()
    assert engine.cancel(second)  # it runs
    assert engine.cancel(third)  # it waits
    done = engine.run()
    assert not engine.cancel(second)
    assert not engine.cancel(99)
    assert [done[number][0].finish_reason for number in (first, second, third)] == ["length", "cancelled", "cancelled"]
    assert done[first][0].ids == alone(model, PROMPTS[0], 20, stop_tokens=())[0]
    assert done[second][0].ids == alone(model, PROMPTS[1], 20, stop_tokens=())[0][:4]
    assert done[second][0].text == BytesTokenizer().decode(done[second][0].ids)
    assert done[third][0].ids == []
    assert engine.stats.cancelled == 2
    assert engine.blocks.used_blocks == 0


def test_a_request_may_be_cancelled_from_a_callback_also_its_own(make):
    engine, numbers, seen = make(), [], []

    def on_token(event):
        seen.append(event.request)
        if len(seen) == 3:
            for number in numbers:
                engine.cancel(number)

    numbers += [engine.add([1, 2], 20, on_token=on_token), engine.add([3], 20)]
    done = engine.run()
    assert [done[number][0].finish_reason for number in numbers] == ["cancelled", "cancelled"]
    assert len(seen) == 4  # the last says that its own is cancelled
    assert engine.blocks.used_blocks == 0


def test_a_callback_that_raises_ends_its_own_request_and_is_heard_of(model, make, caplog):
    engine = make(BytesTokenizer())

    def broken(event):
        raise KeyError("my mistake")

    with caplog.at_level(logging.ERROR, logger="orchestrator"):
        first, second = engine.add(PROMPTS[0], 9, on_token=broken), engine.add(PROMPTS[1], 9, stop_tokens=())
        done = engine.run()
    assert "my mistake" in caplog.text
    assert f"request {first}" in caplog.text
    assert (done[first][0].finish_reason, len(done[first][0].ids)) == ("cancelled", 1)
    assert done[second][0].ids == alone(model, PROMPTS[1], 9, stop_tokens=())[0]


def test_a_stream_brings_tokens_while_others_go_on_and_is_cancelled_when_nobody_listens(make):
    engine = make(BytesTokenizer())
    other = engine.add(PROMPTS[2], 6, stop_tokens=())
    stream = engine.stream(PROMPTS[0], 30, stop_tokens=())
    ids = [next(stream).id for _ in range(8)]
    assert engine.take(other)[0].finish_reason == "length"
    stream.close()
    assert engine.run() == {}
    assert engine.stats.cancelled == 1
    whole = list(engine.stream(PROMPTS[0], 8, stop_tokens=()))
    assert [event.id for event in whole] == ids
    assert whole[-1].finish_reason == "length"
    assert engine.run() == {}  # nothing is held of a stream


def test_requests_may_come_from_many_threads_while_one_steps(model, make):
    engine, numbers = make(BytesTokenizer(), max_running=4), {}

    def add(worker: int) -> None:
        for i in range(5):
            numbers[worker, i] = engine.add(PROMPTS[worker], 3 + i, stop_tokens=())

    threads = [threading.Thread(target=add, args=(worker,)) for worker in range(4)]
    for thread in threads:
        thread.start()
    done = {}
    while any(thread.is_alive() for thread in threads) or not engine.idle:
        done |= engine.run()
    for thread in threads:
        thread.join()
    done |= engine.run()
    assert len(set(numbers.values())) == 20
    for (worker, i), number in numbers.items():
        assert done[number][0].ids == alone(model, PROMPTS[worker], 3 + i, stop_tokens=())[0]


# --- errors ------------------------------------------------------------------------------------------


def test_a_forward_pass_that_fails_loses_no_text(model, make, monkeypatch):
    engine = make(BytesTokenizer(), max_batch_tokens=32, max_running=4)
    numbers = [engine.add(prompt, 8, Sampling(temperature=1.0, seed=5), stop_tokens=()) for prompt in PROMPTS]
    real, calls = engine_module.paged_forward, []

    def fails_at_times(*args):
        calls.append(len(calls))
        if len(calls) in (2, 7, 12):
            for keys, values in args[-1].pools:  # what was being written is anything now, and nobody may read it again
                keys.fill_(torch.nan)
                values.fill_(torch.nan)
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(engine_module, "paged_forward", fails_at_times)
    done, interrupted = {}, 0
    while not engine.idle:
        try:
            done |= engine.run()
        except KeyboardInterrupt:
            interrupted += 1
            engine.blocks.check()
            assert engine.blocks.used_blocks == 0
    done |= engine.run()
    assert interrupted == 3
    for number, prompt in zip(numbers, PROMPTS, strict=True):
        expected = alone(model, prompt, 8, Sampling(temperature=1.0, seed=5), stop_tokens=())[0]
        assert done[number][0].ids == expected


def test_everything_wrong_with_a_request_is_said_at_once(make):
    engine = make(max_running=4)
    with pytest.raises(ValueError, match="the request cannot be taken") as error:
        engine.add([], 0, Sampling(top_k=3, min_p=2.0), n=9, stop=["x", ""], stop_tokens=(999,), logprobs=-1)
    words = ("prompts are empty", "max_new_tokens", "top_k", "min_p", "n=9", "max_running is 4", "0..256", "logprobs")
    words += ("stop string", "tokenizer")
    assert [word for word in words if word not in str(error.value)] == []
    for wrong, said in (([1, 257], "0..256"), ("text", "tokenizer"), ([[1], [2]], "one prompt, got 2")):
        with pytest.raises(ValueError, match=said):
            engine.add(wrong, 3)
    assert engine.idle


def test_what_can_never_fit_is_refused_at_once_with_the_figures(make):
    engine = make(num_blocks=5, block_size=4)
    with pytest.raises(ValueError, match=r"18 tokens of prompt and 4 new ones need 6 blocks .* whole cache has 5"):
        engine.add(range(18), 4)
    with pytest.raises(ValueError, match=rf"60 tokens of prompt and 9 new ones .*context_length={CONTEXT}.*ask for 4"):
        engine.add(range(60), 9)
    number = engine.add(range(18), 3)  # 20 tokens are read: exactly five blocks
    assert len(engine.run()[number][0].ids) == 3


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ({"max_running": 9, "max_batch_tokens": 8}, "max_running=9, max_batch_tokens=8"),
        ({"max_running": 0}, "max_running=0"),
        ({"num_blocks": 0}, "num_blocks=0"),
        ({"block_size": -1}, "block_size=-1"),
    ],
)
def test_sizes_that_make_no_sense_are_refused(sizes, said, make):
    with pytest.raises(ValueError, match=said):
        make(**sizes)


# --- memory, modes, counts ---------------------------------------------------------------------------


def test_the_cache_is_as_large_as_its_texts_need_or_as_half_of_the_free_memory_holds(model, monkeypatch):
    of_one_text, block = CONTEXT // 8, capacity.block_bytes(model, 8)
    assert block == 2 * 2 * 8 * 24 * 8  # keys and values, layers, tokens, width, bytes of a float64
    engine = Engine(model, block_size=8, max_running=3)
    assert engine.blocks.num_blocks == engine.cache.num_blocks == 3 * of_one_text
    measured = peak_tensor_bytes(lambda: Engine(model, block_size=8, max_running=3)).peak
    assert 3 * of_one_text * block <= measured <= 3 * of_one_text * block + 64 * 1024
    monkeypatch.setattr(capacity, "free_memory", lambda device: 2 * 10 * block + 3)
    assert Engine(model, block_size=8, max_running=3).blocks.num_blocks == 10
    monkeypatch.setattr(capacity, "free_memory", lambda device: 2 * (of_one_text - 1) * block)
    with pytest.raises(ValueError, match=r"one text of 64 tokens needs 8 blocks .* are free: pass num_blocks"):
        Engine(model, block_size=8)


@pytest.mark.parametrize("cfg", [{"attn_implementation": "sdpa", "attn_strict": True}, {"use_flash": False}], ids=str)
def test_each_step_computes_in_eval_and_the_models_mode_and_attention_stay(cfg, model, make):
    expected = alone(model, PROMPTS[0], 12, stop_tokens=())[0]
    dropping = GPTModel({**model.cfg, "drop_rate": 0.5, **cfg}).double()
    dropping.load_state_dict(model.state_dict())
    engine = Engine(dropping.train(), BytesTokenizer(), num_blocks=16)
    number = engine.add(PROMPTS[0], 12, stop_tokens=())
    dropping.blocks[0].eval()  # a part that is frozen in eval
    modes = [module.training for module in dropping.modules()]
    settings = [block.attention.settings for block in dropping.blocks]
    assert engine.run()[number][0].ids == expected
    assert [module.training for module in dropping.modules()] == modes
    assert [block.attention.settings for block in dropping.blocks] == settings


def test_counts_are_of_tokens_that_were_really_read(model, make, monkeypatch):
    read = []
    real = engine_module.paged_forward
    monkeypatch.setattr(engine_module, "paged_forward", lambda *args: (read.append(len(args[1])), real(*args))[1])
    engine = make(max_batch_tokens=16, max_running=4)
    common = list(range(12))
    lengths = [(14, 5), (15, 1), (13, 7)]  # prompt, new: the last token of each is never read
    for i, (prompt, new) in enumerate(lengths):
        engine.add([*common, *([100 + i] * (prompt - 12))], new)
    engine.run()
    stats = engine.stats
    assert stats.steps == len(read)
    assert stats.prefill_tokens + stats.decode_tokens == sum(read)
    assert stats.decode_tokens == sum(new - 1 for _, new in lengths)
    assert stats.shared_tokens == 24  # three full blocks of 4, by the second and the third
    assert stats.prefill_tokens == sum(prompt for prompt, _ in lengths) - 24
    assert (stats.finished, stats.cancelled, stats.preemptions, stats.copied_blocks) == (3, 0, 0, 0)
    assert max(read) <= 16
    assert set(asdict(stats)) >= {"peak_running", "peak_blocks"}
    assert stats.peak_running == 3


def test_a_preempted_text_is_read_again_and_counted_as_prefill(make):
    engine = make(num_blocks=6, block_size=4, prefix_sharing=False)
    engine.add([1] * 8, 12)
    engine.add([2] * 8, 12)
    engine.run()
    assert engine.stats.preemptions >= 1
    assert engine.stats.decode_tokens == 2 * 11
    assert engine.stats.prefill_tokens > 16


def test_samples_of_one_prompt_read_it_once_and_part_where_they_write(make):
    engine = make()
    number = engine.add(range(10), 6, Sampling(temperature=2.0, seed=1), n=4)
    texts = {tuple(done.ids) for done in engine.run()[number]}
    assert len(texts) == 4
    assert engine.stats.prefill_tokens == 10
    assert engine.stats.copied_blocks == 3  # the last of four writes into the block itself
    with pytest.raises(ValueError, match=r"n=3 samples .* max_running is 2"):
        make(max_running=2).add([1], 2, Sampling(temperature=1.0), n=3)
