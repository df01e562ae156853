"""The profile of a few steps: of the right ones, in files that others open, with memory that was counted by hand.

CUDA's memory snapshot needs a GPU, and is not tested here.
"""

import json
import re
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

from GPT2Model.config import from_preset
from GPT2Model.gpt2 import GPTModel
from orchestrator.training.loop import train
from orchestrator.training.profiling import Profile, live_bytes, shortened
from orchestrator.training.settings import TrainSettings
from orchestrator.training.watch import Several, StepRecord

FILES = ["memory.json", "memory.png", "operators.txt", "trace.json"]
SIZE = 3_000_001  # bytes: found again among all others


def allocate(profile: Profile, first: int, last: int, max_steps: int) -> None:
    """Steps which each hold one tensor of SIZE bytes for a while, and twice that for a moment; then `close`."""
    profile.start(first - 1, max_steps)
    for step in range(first, last + 1):
        one = torch.ones(SIZE, dtype=torch.uint8)
        two = one + one
        del one, two
        profile.step(StepRecord(step, 1.0, 1e-3, 1.0, 1, 0.1))
    profile.close()


def marks(folder) -> list[str]:
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    return [event["name"] for event in events if event["name"].startswith("ProfilerStep#") and event["ph"] == "X"]


def test_it_shows_the_steps_that_it_was_told_to_and_what_they_held(tmp_path):
    said = []
    allocate(Profile(tmp_path, steps=(2, 1, 3), say=said.append), 1, 9, 9)
    assert sorted(file.name for file in tmp_path.iterdir()) == FILES
    assert sorted(set(marks(tmp_path))) == ["ProfilerStep#3", "ProfilerStep#4", "ProfilerStep#5"]
    facts = json.loads((tmp_path / "memory.json").read_text())
    assert len(facts["steps"]) == 3
    assert 2 * SIZE <= facts["peak_bytes"] < 2 * SIZE + 100_000
    assert facts["steps"][0][0] <= facts["peak_ms"] <= facts["steps"][-1][1]
    held = [bytes_ for _, bytes_ in facts["live"]]
    assert max(held) == facts["peak_bytes"]
    rises = [b for a, b in pairwise(held) if a < 2 * SIZE <= b]
    assert len(rises) == 3  # once in each step
    table = (tmp_path / "operators.txt").read_text()
    assert re.search(r"aten::add .* 3 *$", table, flags=re.M)  # three calls, one in each step
    assert (tmp_path / "memory.png").read_bytes().startswith(b"\x89PNG")
    (told,) = said
    assert "3 steps from step 4 on" in told
    assert str(tmp_path) in told
    for name in ("trace.json", "perfetto", "operators.txt", "memory.png"):
        assert name in told


def test_it_goes_on_after_a_resume_and_makes_its_folder(tmp_path):
    said = []
    allocate(Profile(tmp_path / "a" / "profile", steps=(1, 1, 2), say=said.append), 101, 106, 200)
    assert "2 steps from step 103 on" in said[0]
    assert len(set(marks(tmp_path / "a" / "profile"))) == 2


@pytest.mark.parametrize(
    ("steps", "left", "expected"),
    [
        ((3, 2, 3), 100, (3, 2, 3)),
        ((3, 2, 3), 8, (3, 2, 3)),
        ((3, 2, 3), 7, (2, 2, 3)),
        ((3, 2, 3), 4, (0, 1, 3)),
        ((3, 2, 3), 1, (0, 0, 1)),
        ((3, 2, 3), 0, (0, 0, 0)),
    ],
)
def test_a_short_run_waits_less(steps, left, expected):
    assert shortened(steps, left) == expected


@pytest.mark.parametrize("count", [1, 3])
def test_a_run_of_few_steps_is_profiled_too(tmp_path, count):
    said = []
    allocate(Profile(tmp_path, say=said.append), 1, count, count)
    assert len(set(marks(tmp_path))) == count
    assert f"{count} steps from step 1 on" in said[0]


def test_a_run_without_a_step_left_writes_nothing(tmp_path):
    allocate(Profile(tmp_path / "profile", say=pytest.fail), 11, 10, 10)
    assert not (tmp_path / "profile").exists()


def test_a_run_that_ends_within_the_profile_keeps_what_there_is_and_one_before_it_says_so(tmp_path):
    said = []
    allocate(Profile(tmp_path / "within", steps=(1, 1, 5), say=said.append), 1, 4, 100)
    assert sorted(file.name for file in (tmp_path / "within").iterdir()) == FILES
    allocate(Profile(tmp_path / "before", steps=(5, 1, 2), say=said.append), 1, 4, 100)
    assert list((tmp_path / "before").iterdir()) == []
    assert len(said) == 2
    assert "ended before step 7" in said[1]


def test_after_the_profile_the_profiler_is_out_of_the_way(tmp_path):
    profile = Profile(tmp_path, steps=(0, 0, 1), say=lambda text: None)
    profile.start(0, 10)
    profile.step(StepRecord(1, 1.0, 1e-3, 1.0, 1, 0.1))
    assert profile.profiler is None
    assert not torch.autograd.profiler._is_profiler_enabled


class Corpus:
    def __init__(self):
        self.validation = [self.batch(0, 2)]

    def batch(self, index, batch_size):
        rows = (torch.arange(batch_size)[:, None] + index + torch.arange(9)) % 11
        return rows[:, :-1], rows[:, 1:].clone()


def test_a_profiled_training_is_the_same_training_to_the_bit(tmp_path):
    settings = TrainSettings(max_steps=6, batch_size=2, learning_rate=1e-3, warmup_steps=1, eval_steps=3)

    def losses(**more):
        torch.manual_seed(0)
        sizes = {"emb_dim": 8, "vocab_size": 11, "context_length": 8, "drop_rate": 0.2}
        return train(GPTModel(from_preset("nano", n_layers=1, n_heads=1, **sizes)), Corpus(), settings, **more).train

    said = []
    profile = Profile(tmp_path, steps=(1, 1, 2), say=said.append)
    assert losses(watch=Several(profile)) == losses(progress=False)
    table = (tmp_path / "operators.txt").read_text()
    for operator in ("aten::embedding", "aten::addmm", "AddmmBackward0", "Optimizer.step#AdamW.step"):
        assert operator in table
    assert len(said) == 1


def event(name, start, size=0, duration=0, device="CPU"):
    facts = {"name": name, "start_ns": start, "nbytes": size, "duration_ns": duration}
    facts["device_type"] = SimpleNamespace(name=device)
    return SimpleNamespace(**{key: (lambda value=value: value) for key, value in facts.items()})


def test_live_bytes_are_added_up_in_the_order_of_time_and_for_the_device_that_was_asked_for():
    events = [
        event("[memory]", 4_000_000, -100),
        event("ProfilerStep#5", 1_000_000, duration=5_000_000),
        event("[memory]", 2_000_000, 100),
        event("[memory]", 3_000_000, 50),
        event("aten::add", 2_500_000, 7),
        event("[memory]", 3_500_000, 999, device="CUDA"),
    ]
    facts = live_bytes(events)
    assert facts == {
        "peak_bytes": 150, "peak_ms": 2.0, "steps": [[0.0, 5.0]], "live": [(1.0, 100), (2.0, 150), (3.0, 50)],
    }  # fmt: skip
    assert live_bytes(events, on_cuda=True)["live"] == [(2.5, 999)]
    assert live_bytes([]) == {"peak_bytes": 0, "peak_ms": 0.0, "steps": [], "live": []}


@pytest.mark.parametrize("steps", [(1, 1, 0), (-1, 1, 1), (1, 1)])
def test_steps_that_make_no_sense_are_refused(steps, tmp_path):
    with pytest.raises(ValueError, match="active 1 or more"):
        Profile(tmp_path, steps=steps)
