"""What the engine says that it did: exact counts of small cases. And who comes first, when several threads ask."""

import itertools
import threading

import pytest
import torch

from GPT2Model.sampling import Sampling
from GPT2Model.text_generation import generate_text
from orchestrator.serving import engine as engine_module
from orchestrator.serving.engine import Engine
from tests.orchestrator.serving.mixes import model


def make(**sizes) -> Engine:
    return Engine(model("gpt2", torch.float64), **{"num_blocks": 64, "block_size": 4} | sizes)


def test_greedy_with_a_penalty_is_not_the_likeliest_token():
    wishes = {"max_new_tokens": 12, "stop_tokens": ()}
    small = model("gpt2", torch.float64)
    texts = {}
    for penalty in (1.0, 1.8, 0.6):
        sampling, engine = Sampling(repetition_penalty=penalty), make()
        number = engine.add([1, 2, 3], sampling=sampling, **wishes)
        (alone,) = generate_text(small, None, [1, 2, 3], sampling=sampling, **wishes)
        texts[penalty] = engine.run()[number][0].ids
        assert texts[penalty] == alone.ids
    assert len(set(map(tuple, texts.values()))) == 3  # the penalty decides something here


@pytest.mark.parametrize("max_batch_tokens", [256, 32])
def test_a_beginning_that_sixteen_requests_have_in_common_is_read_once(max_batch_tokens):
    """All come at once. Of 43 tokens 40 are common, ten blocks; then each has three of its own."""
    engine = make(max_batch_tokens=max_batch_tokens)
    common = [i % 61 for i in range(40)]
    for i in range(16):
        engine.add([*common, i, 60 - i, 5], 2)
    engine.run()
    stats = engine.stats
    assert stats.prefill_tokens == 40 + 16 * 3
    assert stats.shared_tokens == 15 * 40
    assert stats.decode_tokens == 16  # of two new tokens the second is not read
    assert stats.preemptions == 0


def test_peaks_are_of_what_was_held_at_a_time():
    """Three come, two run at a time. Written are 5 + 4, 9 + 2 and 3 + 1 tokens; the last of each is not read."""
    engine = make(max_running=2, prefix_sharing=False)
    engine.add(range(5), 4)  # 8 tokens: 2 blocks
    engine.add(range(9), 2)  # 10 tokens: 3 blocks
    engine.add(range(3), 1)  # 1 block, when the second has gone
    engine.step()
    assert (engine.stats.peak_running, engine.stats.peak_blocks) == (2, 5)
    engine.run()
    assert (engine.stats.peak_running, engine.stats.peak_blocks) == (2, 5)
    engine.add([1], 1)
    engine.run()
    assert (engine.stats.peak_running, engine.stats.peak_blocks) == (2, 5)
    engine.add(range(40), 1)
    engine.run()
    assert (engine.stats.peak_running, engine.stats.peak_blocks) == (2, 10)


@pytest.mark.parametrize("sharing", [True, False])
def test_blocks_are_shared_as_before_after_a_step_that_failed(sharing, monkeypatch):
    engine = make(prefix_sharing=sharing)

    def fails(*args):
        raise KeyboardInterrupt

    engine.add(range(9), 3)
    with monkeypatch.context() as broken:
        broken.setattr(engine_module, "paged_forward", fails)
        with pytest.raises(KeyboardInterrupt):
            engine.step()
    engine.run()
    assert engine.stats.shared_tokens == 0
    engine.add(range(9), 3)
    engine.run()
    assert engine.stats.shared_tokens == (8 if sharing else 0)


class HeardLock:
    """A lock that tells when somebody has to wait for it."""

    def __init__(self, told: threading.Event):
        self.lock, self.told = threading.Lock(), told

    def __enter__(self):
        if not self.lock.acquire(blocking=False):
            self.told.set()
            self.lock.acquire()

    def __exit__(self, *_):
        self.lock.release()


class HandedOver:
    """Counts from 0, and lets another thread go on before 0 is handed out."""

    def __init__(self, other: threading.Thread, go_on: threading.Event):
        self.count, self.other, self.go_on = itertools.count(), other, go_on

    def __next__(self) -> int:
        number = next(self.count)
        if number == 0:
            self.other.start()
            assert self.go_on.wait(60), "the other thread neither came in nor had to wait"
        return number


def test_who_has_the_lower_number_is_served_first_whatever_thread_it_came_from():
    """A second thread asks, and steps, just when the first has its number and is not in line yet. It has to wait."""
    engine, events, go_on = make(), [], threading.Event()
    engine._lock = HeardLock(go_on)

    def ask_and_step():
        engine.add([4, 5], 2, on_token=events.append)
        engine.step()
        go_on.set()

    second = threading.Thread(target=ask_and_step)
    engine._numbers = HandedOver(second, go_on)
    engine.add([1, 2, 3], 2, on_token=events.append)
    second.join()
    engine.run()
    assert [event.request for event in events[:2]] == [0, 1]
