"""Watching a run: what the loop tells of each step, and the first who listen: a progress bar, and several at once.

The files and dashboards that listen are in `metrics.py`, the profiler in `profiling.py`.
"""

import os
import sys
import time
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple

from tqdm.auto import tqdm

from orchestrator.training import mfu

LAST_STEPS = 20  # the speed that is shown is that of so many steps


@dataclass(frozen=True)
class StepRecord:
    """What one step of the optimizer was.

    Attributes:
        step: counted from 1: so many steps are done.
        loss: nats per token of the step's own batch, before its update.
        learning_rate, gradient_norm: before clipping.
        tokens: predicted in this step. seconds: that it took, without evaluation, samples and saving.
        skipped: why there was no update ("the loss is nan"), None: there was one.
    """

    step: int
    loss: float
    learning_rate: float
    gradient_norm: float
    tokens: int
    seconds: float
    skipped: str | None = None

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / max(self.seconds, 1e-9)  # a clock may not have ticked


class Watch:
    """One who listens to a run and does nothing; the others override what they need."""

    def start(self, step: int, max_steps: int) -> None:
        """The run begins, or goes on, after `step` steps."""

    def step(self, record: StepRecord) -> None:
        """A step is done."""

    def evaluation(self, step: int, loss: float, tokens: int, seconds: float) -> None:
        """A look at the validation split after `step` steps: nats per token over so many predicted tokens."""

    def sample(self, step: int, text: str) -> None:
        """What the model wrote after `step` steps."""

    def say(self, text: str) -> None:
        """A line for the reader."""

    def close(self) -> None:
        """The run ends, for whatever reason."""

    def __str__(self):
        return type(self).__name__


class Several(Watch):
    """Tells each of several watchers, in order. One that fails is told nothing more, and the training goes on.

    Why: hours of training must not end because a disk is full of metrics, or a dashboard does not answer.
    """

    def __init__(self, *watchers: Watch):
        self.watchers = list(watchers)

    def start(self, *args):
        self._tell("start", *args)

    def step(self, record):
        self._tell("step", record)

    def evaluation(self, *args):
        self._tell("evaluation", *args)

    def sample(self, *args):
        self._tell("sample", *args)

    def say(self, text):
        self._tell("say", text)

    def close(self):
        self._tell("close")

    def _tell(self, what: str, *args) -> None:
        for watcher in tuple(self.watchers):
            try:
                getattr(watcher, what)(*args)
            except Exception as error:  # whatever it is: a watcher only looks on
                self.watchers.remove(watcher)
                with suppress(Exception):
                    watcher.close()  # what it holds open; it may fail again
                with suppress(Exception):
                    tqdm.write(
                        f"{watcher} failed and is left out from here on, the training goes on: "
                        f"{type(error).__name__}: {error}",
                        file=sys.stderr,
                    )


class Rate(NamedTuple):
    """What turns tokens/s into MFU: the model, the length of its sequences, and the most the machine could do.

    Attributes:
        cfg: of the model. max_length: tokens in a sequence. peak: from `mfu.peak_flops`.
    """

    cfg: Mapping
    max_length: int
    peak: mfu.Peak

    def mfu(self, tokens_per_second: float) -> float:
        """The part of the peak that is put to use, 0 to 1."""
        return mfu.mfu(self.cfg, self.max_length, tokens_per_second, self.peak)


class Pace:
    """How fast a run goes: tokens/s of the last steps, and the time that is left.

    Why not the bar's own: it divides by all the time that has passed, and right after a look at the validation split it
    takes that pause for the speed of every step to come. Here steps and pauses (evaluation, samples, saving) are kept
    apart: the pauses are spread over the steps between them, and so is the time that is left.

    The first step does not count once there is another: compiling and warming up are in it.
    """

    def __init__(self, clock=time.perf_counter):
        self.clock, self.last = clock, deque(maxlen=LAST_STEPS)
        self.steps, self.began, self.trained, self.pause = 0, 0.0, 0.0, 0.0

    def step(self, record: StepRecord) -> None:
        self.steps += 1
        if self.steps == 1:
            self.began = self.clock()
        else:
            self.trained += record.seconds
            if self.steps == 2:
                self.last.clear()
        self.last.append((record.tokens, record.seconds))

    def paused(self) -> None:
        """A pause is over: spread all of them over the steps so far."""
        if self.steps > 1:
            self.pause = max(self.clock() - self.began - self.trained, 0.0) / (self.steps - 1)

    @property
    def tokens_per_second(self) -> float | None:
        """In training alone, without the pauses; None before the first step."""
        tokens, seconds = (sum(column) for column in zip(*self.last, strict=True)) if self.last else (0, 0)
        return tokens / seconds if seconds > 0 else None

    @property
    def step_seconds(self) -> float | None:
        """What a step is expected to take, its part of the pauses included; None before the first."""
        if not self.last:
            return None
        return sum(seconds for _, seconds in self.last) / len(self.last) + self.pause


def say_above_bar(text: str) -> None:
    """Print to stdout, above a bar if there is one."""
    tqdm.write(text)
    sys.stdout.flush()


class Bar(tqdm):
    """tqdm's bar with our own pace, from which it works out the time left."""

    pace: Pace | None = None

    @property
    def format_dict(self):
        seconds = self.pace.step_seconds if self.pace else None
        return super().format_dict | {"rate": 1 / seconds if seconds else None}


class ProgressBar(Watch):
    """A bar with the loss, the validation loss, tokens/s, MFU and the time left; into a file, a line now and then.

    Args:
        rate: for MFU: a `Rate`, or its three parts. None: MFU is not shown.
        live: whether there is a screen to draw a bar on; None: look. Without one, plain lines: the first step, each
            look at the validation split, and every `every` seconds.
        stream: where the bar or the lines go; None: stderr. What is said, and samples, go to stdout.
        clock: seconds.
    """

    def __init__(
        self, rate: Rate | tuple | None = None, *, live=None, stream=None, every=10.0, clock=time.perf_counter
    ):
        self.rate = None if rate is None else Rate(*rate)
        self.stream = stream or sys.stderr
        in_a_notebook = stream is None and "ipykernel" in sys.modules
        self.live = live if live is not None else self.stream.isatty() or in_a_notebook
        self.every, self.clock, self.pace = every, clock, Pace(clock)
        self.bar, self.at, self.max_steps, self.shown_at, self.shown_when = None, 0, 0, None, None
        self.loss = self.validation = None
        self.skipped = 0

    def __str__(self):
        return "the progress bar"

    def start(self, step, max_steps):
        self.at, self.max_steps = step, max_steps
        if self.rate is not None:
            self.say(mfu.explain(*self.rate))
        if self.live:
            self.bar = Bar(
                total=max_steps, initial=step, file=self.stream, **screen(self.stream),
                bar_format="{percentage:3.0f}%|{bar}| step {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]",
            )  # fmt: skip
            self.bar.pace = self.pace

    def step(self, record):
        self.at, self.loss = record.step, record.loss
        self.pace.step(record)
        if record.skipped is not None:
            self.skipped += 1
            if self.skipped == 1:  # the others are counted beside the bar
                self.say(f"step {record.step} is skipped: {record.skipped}")
        if self.bar is not None:
            self.bar.set_postfix_str(self.facts("val", "tok/s"), refresh=False)
            self.bar.update()
        elif self.shown_when is None or self.clock() - self.shown_when >= self.every:
            self.print_line()

    def evaluation(self, step, loss, tokens, seconds):
        self.validation = loss
        self.pace.paused()
        if self.bar is not None:
            self.bar.set_postfix_str(self.facts("val", "tok/s"))
        else:
            self.print_line()

    def sample(self, step, text):
        self.say(f"-- after step {step} --\n{text}\n--")

    def say(self, text):
        say_above_bar(text)

    def close(self):
        if self.bar is not None:
            self.bar.close()
        elif self.shown_at != self.at:
            self.print_line()

    def facts(self, validation: str = "validation", speed: str = "tokens/s") -> str:
        """The numbers as they stand, in the order of what a narrow screen may cut off last."""
        facts, pace = [], self.pace.tokens_per_second
        if self.loss is not None:
            facts.append(f"loss {self.loss:.3f}")
        if self.validation is not None:
            facts.append(f"{validation} {self.validation:.3f}")
        if self.skipped:
            facts.append(f"{self.skipped} skipped")
        if pace is not None:
            facts.append(f"{short(pace)} {speed}")
            if self.rate is not None:
                facts.append(f"MFU {100 * self.rate.mfu(pace):.1f}%")
        return ", ".join(facts)

    def print_line(self) -> None:
        """One plain line: for a file or a pipe, where a bar would be a thousand carriage returns."""
        self.shown_at, self.shown_when = self.at, self.clock()
        seconds = self.pace.step_seconds
        left = "" if seconds is None else f", {tqdm.format_interval((self.max_steps - self.at) * seconds)} left"
        print(f"step {self.at}/{self.max_steps}: {self.facts()}{left}", file=self.stream, flush=True)


def screen(stream) -> dict:
    """How large tqdm should take the screen to be: what it finds, but 80 columns where a terminal says 0.

    Those of some containers do. On a screen of 0 rows tqdm draws nothing.
    """
    with suppress(OSError, ValueError, AttributeError):  # no terminal at all
        if 0 in os.get_terminal_size(stream.fileno()):
            return {"ncols": 80, "nrows": 24}
    return {"dynamic_ncols": True}


def short(number: float) -> str:
    """Three digits: 843, 12.3k, 1.23M."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= 0.9995 * size:
            return f"{number / size:#.3g}".rstrip(".") + letter
    return f"{number:#.3g}".rstrip(".")
