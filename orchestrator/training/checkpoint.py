"""Checkpoints: a run is kept now and then, so that a killed one goes on as if it had never been killed.

    with Checkpoints(out / "checkpoints", every=250, facts={...}) as checkpoints:
        train(model, samples, settings, state=state, checkpoints=checkpoints)
    ...
    found = find(out / "checkpoints")           # the newest whole one, or None
    if found is not None:
        restore(found, state)

What is in a checkpoint: `snapshot.py`. How it stays whole whatever happens: `checkpoint_folder.py`.
"""

import json
import logging
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

from safetensors import SafetensorError

from orchestrator.training.checkpoint_folder import clear, delete, find, publish, steps_in, verify
from orchestrator.training.same_run import changed, differences, other_run, phrase_of
from orchestrator.training.snapshot import STATE, Copy, read_json, restore, take_copy, versions
from orchestrator.training.state import TrainState

__all__ = ["Checkpoints", "check_same_run", "differences", "find", "restore", "verify"]

logger = logging.getLogger("orchestrator")


class Checkpoints:
    """Where a run keeps its checkpoints: the last few, and the best.

    `save` copies everything and returns; a thread writes while the training goes on. A save that fails (a full disk,
    say) is told and costs nothing but itself; if it was the last one of the run, `close` raises, as does the end of a
    `with Checkpoints(...)`.

    Args:
        folder: OUT/checkpoints; made if it is not there, and cleared of what dead runs left half done.
        every: steps between two saves.
        keep_last: so many of the newest stay, and the one with the lowest validation loss, however old.
        facts: JSON-ready, saved with each: what the run is (see `same_run.py`). "cfg" and "settings" are added.
        background: False: `save` itself writes.
        say: is given a line for what a person should know.
    Raises:
        ValueError: numbers that make no sense. OSError: the folder cannot be made.
    """

    def __init__(
        self,
        folder: Path | str,
        *,
        every: int,
        keep_last: int = 2,
        facts: Mapping | None = None,
        background: bool = True,
        say: Callable[[str], None] = logger.warning,
    ):
        low = {"save_steps": every, "keep_last": keep_last}
        if problems := [f"{name} must be 1 or more, got {value}" for name, value in low.items() if not value >= 1]:
            raise ValueError("the settings of checkpoints are wrong: " + "; ".join(problems) + ".")
        self.folder, self.every, self.keep_last = Path(folder), every, keep_last
        self.facts, self.background, self.say = dict(facts or {}), background, say
        self.failure: str | None = None  # of the last save
        self._writer: threading.Thread | None = None
        self._bug: BaseException | None = None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(f"{folder} cannot be made: {error.strerror}. Choose another folder with --out.") from error
        clear(self.folder)

    def due(self, step: int) -> bool:
        """Whether this is a step to save after."""
        return step > 0 and step % self.every == 0

    def save(self, state: TrainState) -> None:
        """Keep the run as it stands now. Waits only for the save before, so that there is never more than one copy."""
        self.wait()
        copy = take_copy(state, self.facts)
        self._writer = threading.Thread(target=self._write, args=[copy], name=f"checkpoint of step {copy.step}")
        self._writer.start()
        if not self.background:
            self.wait()

    def wait(self) -> str | None:
        """Until everything given to `save` is on the disk; returns why the last save failed, None: it did not."""
        if self._writer is not None:
            self._writer.join()
            self._writer = None
        if self._bug is not None:
            bug, self._bug = self._bug, None
            raise bug
        return self.failure

    def healthy(self) -> Path | None:
        """The newest checkpoint of before the loss stopped being a number."""
        sound = [step for step in steps_in(self.folder) if is_sound(self.folder / f"step-{step}")]
        return self.folder / f"step-{sound[-1]}" if sound else None

    def close(self) -> None:
        """The run is over.

        Raises:
            OSError: the last save failed: what was learned since the one before is not kept.
        """
        if failure := self.wait():
            raise OSError(failure)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind, error, trace) -> None:
        if error is None:
            self.close()
        else:
            self.wait()  # what failed was told, and the error on its way is the more important

    def _write(self, copy: Copy) -> None:
        try:
            publish(self.folder, copy.step, copy.write, self.say)
            self.failure = None
            delete(self.folder / f"step-{step}" for step in superfluous(self.folder, self.keep_last))
        except (OSError, SafetensorError) as error:
            self.failure = self._advice(copy, error.__cause__ or error)
            self.say(self.failure)
        except BaseException as error:  # a mistake of ours: raised where the run can see it
            self._bug = error

    def _advice(self, copy: Copy, error: BaseException) -> str:
        there = steps_in(self.folder)
        kept = f"step-{there[-1]} is there" if there else "there is none before it"
        return (
            f"the checkpoint of step {copy.step} could not be written ({error}); {kept}. It takes "
            f"{copy.bytes() / 1e6:,.1f} MB in {self.folder}: make room, or choose another place with --out."
        )


def superfluous(folder: Path, keep_last: int) -> list[int]:
    """Steps that are neither the newest, nor of the last `keep_last` with a finite loss, nor the best.

    Why: a run that has gone wrong goes on for a few steps before it stops, and must not push out what was good.
    """
    steps = steps_in(folder)
    sound = [step for step in steps if is_sound(folder / f"step-{step}")]
    losses = {step: validation_loss(folder / f"step-{step}") for step in steps}
    known = [step for step in steps if losses[step] is not None]
    kept = {*steps[-1:], *sound[-keep_last:], *([min(known, key=losses.get)] if known else [])}
    return [step for step in steps if step not in kept]


def is_sound(place: Path) -> bool:
    """Whether the last step before it had a loss and a gradient that were numbers. A damaged one counts as not."""
    try:
        return json.loads((place / STATE).read_text(encoding="utf-8"))["counters"]["bad_in_a_row"] == 0
    except (OSError, ValueError, KeyError, TypeError):
        return False


def validation_loss(place: Path) -> float | None:
    """A checkpoint's loss on held-out text, None: nobody looked."""
    try:
        loss = json.loads((place / STATE).read_text(encoding="utf-8"))["validation_loss"]
        return loss if loss == loss else None  # not NaN
    except (OSError, ValueError, KeyError, TypeError):
        return None


def check_same_run(place: Path, facts: Mapping, say: Callable[[str], None] = logger.warning) -> None:
    """Raise for what would make it another run, and say what differs besides.

    Raises:
        ValueError: every difference of architecture, tokenizer, data and the like, at once.
    """
    record = read_json(Path(place) / STATE)
    refused, allowed = differences(record["facts"], facts)
    allowed += [
        phrase_of(f"version of {name}", record["versions"].get(name), versions()[name])
        for name in changed(record["versions"], versions())
        if name in versions()
    ]
    if refused:
        raise ValueError(other_run(place, refused))
    if allowed:
        say(f"going on from {place} with differences:\n" + "\n".join(f"  - {phrase}" for phrase in allowed))
