"""A run that was stopped, or killed with SIGKILL at any moment, goes on bit by bit as if it had not been."""

import json
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from orchestrator.training.checkpoint_folder import find, steps_in
from tests.orchestrator.training.forks import ONE_THREAD, ROOT, Forks
from tests.orchestrator.training.killed_runs import run, run_in_parts

KILLS, INSIDE_A_SAVE = 21, 6


@pytest.fixture(scope="module")
def forks():
    with Forks() as process:
        yield process


def lines_of(log: Path) -> dict[int, list]:
    """step -> [hash of everything, loss], of the whole lines of a log."""
    text = log.read_text() if log.exists() else ""
    return {step: rest for step, *rest in map(json.loads, text.splitlines(keepends=False)[: text.count("\n")])}


class Parts:
    """Runs of `run_in_parts` in one folder, each a process of its own."""

    def __init__(self, forks: Forks, folder: Path, **changes):
        self.forks, self.folder, self.changes = forks, folder, changes
        folder.mkdir()

    def run(self, part: str, until: int | None = None, out: str = "out") -> dict[int, list]:
        log, said = (self.folder / f"{out} {part} {until}.{kind}" for kind in ("jsonl", "txt"))
        given = {"out": str(self.folder / out), "log": str(log), "part": part, "until": until, **self.changes}
        code = self.forks.wait(self.forks.start(run_in_parts, said, **given))
        assert code == 0, said.read_text()
        return lines_of(log)


@pytest.fixture(scope="module")
def fp16(forks, tmp_path_factory):
    """A whole run, and the first five steps of it, which the others go on from."""
    parts = Parts(forks, tmp_path_factory.mktemp("fp16") / "runs", dtype="fp16")
    whole = parts.run("from the beginning", out="whole")
    first = parts.run("from the beginning", until=5)
    assert first == {step: whole[step] for step in range(1, 6)}
    (parts.folder / "out").rename(parts.folder / "five steps")
    return parts, whole


def gone_on(fp16, part: str) -> tuple[dict, dict]:
    """What the steps after the fifth were, with something left out, and what they should be."""
    parts, whole = fp16
    shutil.copytree(parts.folder / "five steps", parts.folder / part)
    return parts.run(part, out=part), {step: whole[step] for step in range(6, 13)}


def test_five_steps_and_seven_in_another_process_are_twelve(fp16):
    """Weights, optimizer, scaler, counters, the random states of all libraries, losses: with dropout, under fp16."""
    later, expected = gone_on(fp16, "gone on")
    assert later == expected


PARTS = ("weights", "optimizer", "scaler", "data position", "schedule", "torch", "python", "numpy")


@pytest.mark.parametrize("part", PARTS)
def test_each_part_counts(fp16, part):
    """With any one of them left out, the test above fails; where it is a part of the learning, the losses show it."""
    later, expected = gone_on(fp16, part)
    last = max(later)
    assert later[last][0] != expected[last][0]
    losses, right = ([line[1] for line in lines.values()] for lines in (later, expected))
    if part != "scaler":  # a scale that suffices gives the same losses, another rounding others
        assert (losses[-3:] == right[-3:]) == (part in ("python", "numpy"))


@pytest.mark.parametrize("changes", [
    {"dtype": "bf16"}, {"gradient_accumulation_steps": 3}, {"optimizer": "muon"}, {"activation_checkpointing": True},
    {"loss_chunk_tokens": 16, "schedule": "wsd"}, {"pack_documents": True},
    {"cfg": {"norm": "rmsnorm", "mlp": "swiglu", "positions": "rope", "n_kv_heads": 1}, "optimizer": "muon"},
])  # fmt: skip
def test_a_run_in_two_processes_is_the_run_in_one(forks, tmp_path, changes):
    runs = Parts(forks, tmp_path / "runs", **changes)
    whole = runs.run("from the beginning", out="whole")
    runs.run("from the beginning", until=5)
    assert runs.run("gone on") == {step: whole[step] for step in range(6, 13)}
    finals = [find(tmp_path / "runs" / out / "checkpoints") for out in ("whole", "out")]
    assert contents(finals[0]) == contents(finals[1])


def contents(place: Path) -> dict[str, bytes]:
    """Every file of a checkpoint."""
    assert place.name.startswith("step-")
    return {path.name: path.read_bytes() for path in place.iterdir()}


MAX_STEPS, EVERY = 60, 3


class Life:
    """One process of a run, from its start to its death."""

    def __init__(self, forks: Forks, out: Path, name: str):
        self.forks, self.folder, self.log = forks, out / "checkpoints", out / f"{name}.jsonl"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.said = out / f"{name}.txt"
        arguments = {"out": str(out), "log": str(self.log), "max_steps": MAX_STEPS, "every": EVERY}
        self.process = forks.start(run, self.said, **arguments)

    def steps(self) -> int:
        """How many steps it has taken."""
        return self.log.read_bytes().count(b"\n") if self.log.exists() else 0

    def being_written(self) -> str | None:
        """The folder that its save is filling just now."""
        names = (entry.name for entry in os.scandir(self.folder))
        return next((name for name in names if name.endswith(f".{self.process}.partial")), None)

    def done(self) -> bool:
        return self.steps() and max(lines_of(self.log), default=0) == MAX_STEPS

    def until(self, condition: Callable) -> None:
        """Wait until `condition()`, or all steps are done."""
        limit = time.monotonic() + 60
        while not condition() and not self.done():
            assert time.monotonic() < limit, self.said.read_text()
            time.sleep(0.0005)

    def kill(self) -> int:
        os.kill(self.process, signal.SIGKILL)
        return self.end()

    def end(self) -> int:
        code = self.forks.wait(self.process)
        assert code in (0, -signal.SIGKILL), self.said.read_text()
        return code


@pytest.fixture(scope="module")
def never_killed(forks, tmp_path_factory):
    """Its log, its last checkpoint, and how long it takes to begin, for a step, and for a save."""
    out = tmp_path_factory.mktemp("never killed") / "out"
    began, saves, steps = time.perf_counter(), [], []
    life = Life(forks, out, "log")
    while not life.done():
        life.until(life.being_written)
        at = time.perf_counter()
        steps.append(at)
        life.until(lambda: not life.being_written())
        saves.append(time.perf_counter() - at)
    assert life.end() == 0
    pace = {"start": steps[0] - began, "step": (steps[-1] - steps[0]) / MAX_STEPS, "save": statistics.median(saves)}
    return lines_of(life.log), contents(find(life.folder)), pace


def test_a_run_killed_with_sigkill_at_any_moment_goes_on_bit_by_bit(forks, never_killed, tmp_path, record_property):
    """Every step of every life is compared with that of the run that was never killed, and the last checkpoint."""
    expected, last_checkpoint, pace = never_killed
    chance = random.Random(20)
    kills = inside = resumed = lives = runs = 0
    out, newest = tmp_path / "run 0", 0
    while kills < KILLS or inside < INSIDE_A_SAVE:
        lives += 1
        life = Life(forks, out, f"life {lives}")
        if chance.random() < 0.45:
            life.until(life.being_written)
            time.sleep(chance.uniform(0, 0.9) * pace["save"])
        else:
            steps = chance.randint(0, 5)
            life.until(lambda life=life, steps=steps: life.steps() >= steps)
            time.sleep(chance.uniform(0, pace["step"] if steps else 1.2 * pace["start"]))
        killed = life.kill() != 0
        kills += killed
        inside += killed and life.being_written() is not None
        newest, resumed = look_at(life, newest, expected), resumed + (newest > 0 and life.steps() > 0)
        if not killed or life.done():
            runs, newest = runs + 1, 0
            out = tmp_path / f"run {runs}"
    life = Life(forks, out, "the last life")
    assert life.end() == 0
    assert look_at(life, newest, expected) == MAX_STEPS
    assert contents(find(life.folder)) == last_checkpoint
    assert [path.name for path in life.folder.iterdir() if path.name.startswith(".")] == []
    record_property("kills", f"{kills}, {inside} of them inside a save, {resumed} resumes that took steps")
    print(f"{kills} kills, {inside} of them inside a save, {resumed} resumes that took steps, pace {pace}")
    assert resumed >= KILLS // 2


def look_at(life: Life, newest: int, expected: dict[int, list]) -> int:
    """After a life that began from step `newest`: nothing is lost, each step is right. Returns the newest now."""
    lines = lines_of(life.log)
    assert lines == {step: expected[step] for step in lines}
    assert list(lines) == list(range(newest + 1, newest + 1 + len(lines)))
    found = find(life.folder, say=lambda line: pytest.fail(line))
    step = 0 if found is None else int(found.name.removeprefix("step-"))
    assert step >= newest
    return step


TRAIN = [
    "--model", "nano", "--n_layers", "2", "--emb_dim", "64", "--drop_rate", "0.1", "--tokenizer", "char",
    "--max_length", "32", "--batch_size", "8", "--max_steps", "120", "--save_steps", "3", "--eval_steps", "60",
    "--eval_tokens", "200", "--device", "cpu", "--dtype", "fp32",
]  # fmt: skip


def train(out: Path, *more: str) -> subprocess.Popen:
    """`python train.py`, as a person runs it."""
    text = out.parent / "text.txt"
    if not text.exists():
        text.write_text("".join(random.Random(4).choices("to be or not", k=20_000)))
    command = [sys.executable, "train.py", *TRAIN, "--dataset", text, "--data_dir", f"{out} data", "--out", out]
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([*command, *more], cwd=ROOT, env=os.environ | ONE_THREAD, **pipe)


def steps_of(out: Path) -> int:
    """How far the newest checkpoint is, whole or not."""
    return max(steps_in(out / "checkpoints"), default=0)


def wait_for(process: subprocess.Popen, condition: Callable[[], bool]) -> None:
    while not condition() and process.poll() is None:
        time.sleep(0.001)


def test_train_py_killed_and_terminated_goes_on_bit_by_bit(tmp_path):
    whole, out, chance = tmp_path / "whole", tmp_path / "out", random.Random(7)
    never_killed = train(whole)
    for number, step in ((signal.SIGKILL, 9), (signal.SIGTERM, 27)):
        process = train(out, "--resume", "auto")
        wait_for(process, lambda step=step: steps_of(out) >= step)
        time.sleep(chance.uniform(0, 0.05))
        process.send_signal(number)
        said, _ = process.communicate()
        assert process.returncode == {signal.SIGKILL: -9, signal.SIGTERM: 143}[number], said
        if number == signal.SIGTERM:
            stopped = int(re.search(r"stopped by SIGTERM after step (\d+), saved", said)[1])
            assert find(out / "checkpoints").name == f"step-{stopped}"
            assert "--resume" in said[said.index("stopped by") :]

    process = train(out, "--resume", "auto")
    said, _ = process.communicate()
    assert process.returncode == 0, said
    assert re.search(r"resumed from .*step-\d+, after step \d+", said)
    said, _ = never_killed.communicate()
    assert never_killed.returncode == 0, said
    ends = [contents(folder / "checkpoints" / "step-120") for folder in (whole, out)]
    for name in ("model.safetensors", "optimizer.safetensors", "random.safetensors"):
        assert ends[0][name] == ends[1][name]
    weights = [(folder / "final" / "model.safetensors").read_bytes() for folder in (whole, out)]
    assert weights[0] == weights[1]
    counters = [json.loads(end["state.json"])["counters"] for end in ends]
    assert counters[0] == counters[1]


COMPILED = """
import os, sys, torch
sys.path.insert(0, os.getcwd())
from pathlib import Path
from orchestrator.training.checkpoint import Checkpoints, find, restore
from tests.orchestrator.training.small_runs import fresh, go_on, settings
given = settings(max_steps=6, eval_steps=100, compile=True)
folder = Path(sys.argv[1])
if sys.argv[2] == "whole":
    with Checkpoints(folder, every=3, keep_last=9) as checkpoints:
        state = fresh(given)
        digests = go_on(state, checkpoints).of
else:
    state = fresh(given, seed=1)
    restore(folder / "step-3", state)
    digests = go_on(state).of
assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1
print(*(digests[step] for step in (4, 5, 6)))
"""


@pytest.mark.slow  # a minute: it is compiled twice
def test_a_compiled_run_goes_on_bit_by_bit_in_another_process(tmp_path):
    found = []
    for part in ("whole", "gone on"):
        command = [sys.executable, "-c", COMPILED, tmp_path / "checkpoints", part]
        done = subprocess.run(
            command, cwd=ROOT, env=os.environ | ONE_THREAD, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        found.append(done.stdout.split())
    assert len(found[0]) == 3
    assert found[0] == found[1]
