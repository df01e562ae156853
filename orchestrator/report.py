"""Run: the steps of one run as they pass or fail, on the screen and in report.json."""

import json
import math
import os
import time
from datetime import datetime
from pathlib import Path

from GPT2Model.files import replace_text


class Run:
    """Collects the steps of a run, prints each, and leaves a folder.

    Args:
        folder: where the report, the figures and the model go; made at once, so that a folder that cannot be written is
            known before the work. None: nothing is written.
    Attributes:
        steps: a dict for each step: name, passed, figure, seconds, and what it measured.
    Raises:
        OSError: the folder cannot be made or written, with what to do.
    """

    def __init__(self, folder: str | os.PathLike | None = None):
        self.folder = None if folder is None else Path(folder)
        self.steps: list[dict] = []
        self._started = self._step_started = time.perf_counter()
        if self.folder is not None:
            make_folder(self.folder)

    def heading(self, text: str) -> None:
        print(f"\n{text}", flush=True)

    def say(self, text: str) -> None:
        """A line that is worth reading and is neither passed nor failed."""
        print(f"      {text}", flush=True)

    def step(self, name: str, passed: bool, figure: str, **measured) -> None:
        """Record a step and print `PASS` or `FAIL` with its figure.

        Args:
            name: what was to be shown, as a statement.
            passed: whether it was.
            figure: the number that says so, beside what it was held against.
            measured: JSON-ready numbers for the report.
        """
        now = time.perf_counter()
        seconds, self._step_started = round(now - self._step_started, 3), now
        self.steps.append({"name": name, "passed": bool(passed), "figure": figure, "seconds": seconds, **measured})
        print(f"{'PASS' if passed else 'FAIL'}  {name}: {figure}", flush=True)

    @property
    def passed(self) -> bool:
        """Whether there were steps, and all passed."""
        return bool(self.steps) and all(step["passed"] for step in self.steps)

    def save_figure(self, figure, name: str) -> None:
        """Write a matplotlib figure as a PNG into the folder, if there is one."""
        if self.folder is not None:
            figure.savefig(self.folder / name, dpi=130, bbox_inches="tight")
            self.say(f"figure: {self.folder / name}")

    def close(self, error: BaseException | None = None, **about) -> None:
        """Print the verdict, and write report.json: beside its place first, then renamed.

        Args:
            error: what ended the run early, if anything did.
            about: further facts for the report.
        """
        seconds = time.perf_counter() - self._started
        failed = [step["name"] for step in self.steps if not step["passed"]]
        verdict = (
            f"{len(failed)} of {len(self.steps)} steps FAILED: {', '.join(failed)}"
            if failed
            else (f"all {len(self.steps)} steps PASSED")
        )
        if error is None:
            print(f"\n{verdict}, in {seconds:.0f} s")
        if self.folder is None:
            return
        report = {
            "passed": self.passed and error is None,
            "error": None if error is None else f"{type(error).__name__}: {error}",
            "finished": datetime.now().astimezone().isoformat(timespec="seconds"),
            "seconds": round(seconds, 2),
            **about,
            "steps": self.steps,
        }
        replace_text(self.folder / "report.json", json.dumps(plain(report), indent=2) + "\n")
        print(f"report: {self.folder / 'report.json'}")


def make_folder(folder: str | os.PathLike) -> Path:
    """Make a folder for results, and see that it can be written, before the work and not after it.

    Raises:
        OSError: it cannot, with what to do.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe.{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise OSError(f"cannot write to {folder}: {error.strerror}. Choose another: --out DIR.") from error
    return folder


def plain(value):
    """The same without what JSON lacks: NaN and infinities become strings."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
