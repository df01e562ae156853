"""Those who watch a run: what a reader sees on a screen and in a file, and that none of them can end a training."""

import fcntl
import io
import math
import os
import pty
import re
import select
import struct
import sys
import termios

import pytest
import torch

from GPT2Model.config import from_preset
from GPT2Model.gpt2 import GPTModel
from orchestrator.evaluation.estimates import count_parameters
from orchestrator.training import mfu
from orchestrator.training.loop import train
from orchestrator.training.settings import TrainSettings
from orchestrator.training.watch import Bar, Pace, ProgressBar, Rate, Several, StepRecord, Watch, short

CFG = from_preset("nano")
RATE = Rate(CFG, 64, mfu.Peak(5e9, "a chip of our own", "this test"))
SETTINGS = TrainSettings(max_steps=6, batch_size=2, learning_rate=1e-3, warmup_steps=1, eval_steps=3)


def record(step, loss=3.0, tokens=100, seconds=0.1, skipped=None) -> StepRecord:
    return StepRecord(step, loss, 1e-3, 0.5, tokens, seconds, skipped)


class Corpus:
    """Rows that count up modulo 11."""

    def __init__(self):
        self.validation = [self.batch(0, 2)]

    def batch(self, index, batch_size):
        rows = (torch.arange(batch_size)[:, None] + index + torch.arange(9)) % 11
        return rows[:, :-1], rows[:, 1:].clone()


def small_model() -> GPTModel:
    torch.manual_seed(0)
    return GPTModel(from_preset("nano", n_layers=1, n_heads=1, emb_dim=8, vocab_size=11, context_length=8))


class Clock:
    """Time as the test says."""

    now = 0.0

    def __call__(self):
        return self.now


class Notes(Watch):
    def __init__(self):
        self.calls = []

    def __getattribute__(self, name):
        if name in ("start", "step", "evaluation", "sample", "say", "close"):
            return lambda *args: self.calls.append((name, *args))
        return super().__getattribute__(name)


class Broken(Watch):
    """Fails at one thing, always."""

    def __init__(self, at):
        self.at, self.told, self.closed = at, 0, 0

    def __str__(self):
        return "the broken one"

    def fail_if(self, what):
        self.told += 1
        if what == self.at:
            raise OSError(28, "No space left on device")

    def start(self, *args):
        self.fail_if("start")

    def step(self, record):
        self.fail_if("step")

    def evaluation(self, *args):
        self.fail_if("evaluation")

    def sample(self, *args):
        self.fail_if("sample")

    def close(self):
        self.closed += 1
        self.fail_if("close")


def test_several_are_told_everything_in_order():
    first, second = Notes(), Notes()
    both = Several(first, second)
    both.start(3, 10)
    both.step(record(4))
    both.evaluation(4, 2.5, 100, 0.3)
    both.sample(4, "text")
    both.say("a word")
    both.close()
    assert first.calls == second.calls
    assert first.calls == [
        ("start", 3, 10), ("step", record(4)), ("evaluation", 4, 2.5, 100, 0.3), ("sample", 4, "text"),
        ("say", "a word"), ("close",),
    ]  # fmt: skip


@pytest.mark.parametrize("at", ["start", "step", "evaluation", "sample", "close"])
def test_one_that_fails_is_named_once_and_the_training_and_the_others_go_on(at, capsys):
    broken, notes = Broken(at), Notes()
    expected = train(small_model(), Corpus(), SETTINGS, progress=False)
    history = train(
        small_model(), Corpus(), SETTINGS, watch=Several(broken, notes), write=lambda model: "x", sample_steps=3
    )
    assert history.train == expected.train  # the same run, to the bit
    assert [call[0] for call in notes.calls].count("step") == 6
    assert notes.calls[-1] == ("close",)
    said = capsys.readouterr().err
    assert said.count("the broken one failed") == 1
    assert "No space left on device" in said
    assert broken.closed >= 1  # it may hold something open
    assert broken.told <= {"start": 2, "step": 4, "evaluation": 3, "sample": 8, "close": 14}[at]


def test_ctrl_c_is_no_failure_of_a_watcher():
    class Interrupted(Watch):
        def step(self, record):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(small_model(), Corpus(), SETTINGS, watch=Several(Interrupted()))


def test_the_speed_is_that_of_the_last_twenty_steps_and_of_training_alone():
    pace = Pace(Clock())
    assert pace.tokens_per_second is None
    pace.step(record(1, tokens=100, seconds=50.0))  # it compiled
    assert pace.tokens_per_second == pytest.approx(2)
    for step in range(2, 12):
        pace.step(record(step, tokens=100, seconds=0.5))
    assert pace.tokens_per_second == pytest.approx(200)  # the first one counts no more
    for step in range(12, 32):
        pace.step(record(step, tokens=100, seconds=0.1))
    assert pace.tokens_per_second == pytest.approx(1000)  # nor do those before the last twenty


def test_the_time_left_holds_the_pauses_that_come_and_none_of_them_is_taken_for_the_speed():
    """1000 steps of 0.1 s, with a pause of 30 s after each 100: what is left is known exactly."""
    clock = Clock()
    bar = ProgressBar(live=True, stream=io.StringIO(), clock=clock)
    bar.start(0, 1000)
    clock.now += 30
    bar.evaluation(0, 9.0, 100, 30.0)  # before the first step, and never again
    for step in range(1, 1001):
        clock.now += 0.1
        bar.step(record(step))
        shown = bar.bar.format_dict
        left = (1000 - step) / shown["rate"]
        if 1 <= step < 100:
            assert left == pytest.approx(0.1 * (1000 - step), rel=1e-6)  # pauses are not known yet
        elif 101 <= step < 900:
            truth = 0.1 * (1000 - step) + 30 * (10 - step // 100)
            assert abs(left - truth) < 30 + 0.05 * truth, step  # a pause comes whole, and is expected in parts
        if step % 100 == 0:
            clock.now += 30
            bar.evaluation(step, 3.0, 100, 30.0)
    bar.close()


def test_the_bar_shows_the_numbers_as_they_stand():
    stream = io.StringIO()
    bar = ProgressBar(RATE, live=True, stream=stream)
    bar.start(7, 100)
    bar.evaluation(7, 4.25, 1000, 1.0)
    for step in (8, 9, 10):
        bar.step(record(step, loss=3.21449, tokens=1234, seconds=0.1))
    bar.step(record(11, loss=math.nan, tokens=1234, seconds=0.1, skipped="the loss is nan"))
    bar.close()
    last = stream.getvalue().rstrip("\n").rpartition("\r")[2]
    # 6 N + 6 L C T, from the formula and not from what is tested; the position table is only looked up.
    flops = 6 * (count_parameters(CFG) - CFG["context_length"] * CFG["emb_dim"])
    flops += 6 * CFG["n_layers"] * CFG["emb_dim"] * 64
    part = 100 * 12340 * flops / 5e9
    assert "step 11/100" in last
    assert last.rstrip(" ]").endswith(f"loss nan, val 4.250, 1 skipped, 12.3k tok/s, MFU {part:.1f}%")
    assert "step 7/100" in stream.getvalue()  # where it went on


def test_formula_and_peak_are_said_once_and_a_tuple_is_a_rate(capsys):
    bar = ProgressBar(tuple(RATE), live=True, stream=io.StringIO())
    bar.start(0, 2)
    bar.step(record(1))
    bar.step(record(2))
    bar.close()
    said = capsys.readouterr().out
    assert said.count("6 N + 6 L C T") == said.count("a chip of our own") == 1
    assert said.count("\n") == 1


def test_the_first_skipped_step_is_told_with_its_reason_and_the_others_are_counted(capsys):
    stream = io.StringIO()
    bar = ProgressBar(live=False, stream=stream)
    bar.start(0, 3)
    for step in (1, 2, 3):
        bar.step(record(step, skipped="the loss is inf"))
    bar.close()
    assert capsys.readouterr().out == "step 1 is skipped: the loss is inf\n"
    assert "3 skipped" in stream.getvalue().splitlines()[-1]


def test_into_a_file_goes_a_plain_line_now_and_then():
    clock, stream = Clock(), io.StringIO()
    bar = ProgressBar(stream=stream, clock=clock)  # a StringIO is no terminal
    bar.start(0, 1000)
    for step in range(1, 1001):
        clock.now += 0.1
        bar.step(record(step, loss=5.0))
        if step == 500:
            bar.evaluation(500, 4.5, 100, 0.0)
    bar.close()
    lines = stream.getvalue().splitlines()
    assert "\r" not in stream.getvalue()
    steps = [int(re.match(r"step (\d+)/1000: loss 5\.000, ", line).group(1)) for line in lines]
    assert steps[0] == 1  # that it began
    assert steps[-1] == 1000
    assert 8 <= len(steps) - 2 <= 11  # each 10 s of 100, and the evaluation
    assert 500 in steps
    assert re.search(r"validation 4\.500, 1\.00k tokens/s, 00:00 left$", lines[-1])
    assert "00:50 left" in lines[steps.index(500)]


@pytest.mark.parametrize("columns", [80, 0])  # 0: a terminal that does not know its size
def test_on_a_terminal_a_bar_is_drawn_and_what_is_said_stands_above_it(columns, monkeypatch):
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24 if columns else 0, columns, 0, 0))
    with open(theirs, "w", encoding="utf-8") as terminal:
        monkeypatch.setattr(sys, "stdout", terminal)
        monkeypatch.setattr(sys, "stderr", terminal)
        bar = ProgressBar()
        bar.start(0, 3)
        for step in (1, 2, 3):
            bar.step(record(step, loss=2.0))
            bar.bar.refresh()
            bar.sample(step, f"it wrote {step}")
        bar.evaluation(3, 1.5, 100, 0.1)
        bar.close()
        terminal.flush()
        screen = b""
        while select.select([ours], [], [], 0)[0]:
            screen += os.read(ours, 65536)
        monkeypatch.undo()
    os.close(ours)
    # What a terminal shows: a carriage return goes to the start of the line, and what follows is written over it.
    rows = []
    for line in screen.decode().split("\n"):
        row = ""
        for piece in line.split("\r"):
            row = piece + row[len(piece) :]
        rows.append(row.rstrip())
    assert [row for row in rows if row.startswith("it wrote")] == ["it wrote 1", "it wrote 2", "it wrote 3"]
    assert all("step 3/3" not in row for row in rows[: rows.index("it wrote 3")])
    (bar,) = [row for row in rows[rows.index("it wrote 3") :] if row.startswith("100%")]
    assert "step 3/3" in bar
    assert "loss 2.000, val 1.500, 1.00k tok/s" in bar
    assert max(map(len, rows)) <= 80


def test_without_a_watcher_the_loop_shows_a_bar_or_lines(capsys):
    train(small_model(), Corpus(), SETTINGS)
    assert re.search(r"step 6/6.*loss \d.*val(idation)? \d", capsys.readouterr().err)
    train(small_model(), Corpus(), SETTINGS, progress=False)
    assert capsys.readouterr().err == ""


def test_numbers_are_shortened_to_three_digits():
    shown = {
        843.2: "843",
        999.7: "1.00k",
        12345: "12.3k",
        1_234_567: "1.23M",
        4.2e9: "4.20G",
        3.14159: "3.14",
        0: "0.00",
    }
    assert {number: short(number) for number in shown} == shown


def test_a_bar_without_a_pace_is_an_ordinary_one():
    with Bar(total=2, file=io.StringIO()) as bar:
        bar.update(2)
        assert bar.n == 2
