"""Watchers that keep the numbers of a run: JSON lines always, TensorBoard and Weights & Biases if asked for."""

import io
import json
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from tqdm.auto import tqdm

from GPT2Model.files import replace_file, replace_text
from orchestrator.report import plain
from orchestrator.training.watch import Rate, StepRecord, Watch

WANDB_ID = "wandb_run_id.txt"


class JsonLines(Watch):
    """One JSON object a line for everything that happens, readable while the run goes on: `tail -f metrics.jsonl`.

    Each has "event" (start, step, evaluation, sample or end), "step" (so many were done) and "time" (UTC). A step has
    "loss" (nats per token), "learning_rate", "gradient_norm" (before clipping), "tokens", "seconds",
    "tokens_per_second", "mfu" (0 to 1, if it is known) and "skipped" (why, or null). NaN and infinities, which JSON
    lacks, are the strings "nan", "inf" and "-inf".

    A line that cannot be written (a full disk) is left out with one warning for the whole run, half of it is cut off
    again, and the next event is tried anew: with room again, the file goes on.

    Args:
        path: of the file. A run that begins replaces it; one that goes on keeps what it holds up to that step, so that
            each step stands once, however often the run was killed.
        resume_step: what is kept goes up to this step; None: up to the one that `start` is told.
        rate: for MFU: a `Rate`, or its three parts.
    """

    def __init__(self, path: str | Path, resume_step: int | None = None, rate: Rate | tuple | None = None):
        self.path, self.resume_step, self.at = Path(path), resume_step, 0
        self.rate = None if rate is None else Rate(*rate)
        self.file: io.FileIO | None = None
        self.whole, self.warned = 0, False  # bytes of whole lines

    def __str__(self):
        return f"the metrics file {self.path}"

    def start(self, step, max_steps):
        self.at = step
        keep_until(self.path, step if self.resume_step is None else self.resume_step)
        self.file = self.path.open("ab", buffering=0)  # each line is out at once, and whole
        self.whole = self.path.stat().st_size
        self.write("start", step, max_steps=max_steps)

    def step(self, record):
        self.at = record.step
        self.write("step", **measured(record, self.rate))

    def evaluation(self, step, loss, tokens, seconds):
        self.write("evaluation", step, loss=loss, tokens=tokens, seconds=round(seconds, 6))

    def sample(self, step, text):
        self.write("sample", step, text=text)

    def close(self):
        if self.file is None:
            return
        try:
            self.write("end", self.at)
        finally:
            self.file.close()
            self.file = None

    def write(self, event: str, step: int, **facts) -> None:
        if self.file is None:
            return
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        line = json.dumps(plain({"event": event, "step": step, **facts, "time": now}), allow_nan=False) + "\n"
        data = line.encode("ascii")
        try:
            self.cut()
            self.put(data)
            self.whole += len(data)
        except OSError as error:
            with suppress(OSError):
                self.cut()  # at once, so that a reader sees whole lines; if not now, then before the next line
            self.warn(error)

    def put(self, data: bytes) -> None:
        """Write it all, or raise the OSError that says why not."""
        written = self.file.write(data) or 0
        while written < len(data):  # a disk takes what still fits, and says at the next write why not the rest
            written += self.file.write(data[written:]) or 0

    def cut(self) -> None:
        """Drop what stands after the last whole line: half a line, of a write that failed."""
        if self.file.seek(0, io.SEEK_END) > self.whole:
            self.file.truncate(self.whole)

    def warn(self, error: OSError) -> None:
        """Say it once a run: a full disk fails at every step."""
        if self.warned:
            return
        self.warned = True
        with suppress(Exception):
            tqdm.write(
                f"{self}: a line could not be written, and is left out: {error}. The training goes on, and every later "
                "event is tried again.",
                file=sys.stderr,
            )


def measured(record: StepRecord, rate: Rate | None) -> dict:
    """A step as plain numbers; "mfu" only if the rate is known."""
    facts = {
        "step": record.step,
        "loss": record.loss,
        "learning_rate": record.learning_rate,
        "gradient_norm": record.gradient_norm,
        "tokens": record.tokens,
        "seconds": round(record.seconds, 6),
        "tokens_per_second": round(record.tokens_per_second, 3),
    }
    if rate is not None:
        facts["mfu"] = round(rate.mfu(record.tokens_per_second), 6)
    return facts | {"skipped": record.skipped}


def keep_until(path: Path, step: int) -> None:
    """Drop the lines of later steps, and a half-written last one; at step 0 everything goes: it was another run."""
    if not path.exists():
        return
    lines = path.read_bytes().splitlines(keepends=True) if step > 0 else []
    kept = [line for line in lines if (row := parse(line)) is not None and row["step"] <= step]
    replace_file(path, lambda beside: beside.write_bytes(b"".join(kept)))


def read_metrics(path: str | Path) -> list[dict]:
    """The lines of a metrics.jsonl, with NaN and infinities as numbers again.

    A last line without its end, of a run that was killed while it wrote, is left out; so is a damaged one.

    Raises:
        FileNotFoundError: no such file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file. A run writes metrics.jsonl into its folder.")
    lines = path.read_bytes().splitlines(keepends=True)
    return [row for line in lines if (row := parse(line)) is not None]


def parse(line: bytes) -> dict | None:
    """One line as a dict, None if it is cut or damaged."""
    try:
        row = json.loads(line) if line.endswith(b"\n") else None
    except ValueError:  # what is no UTF-8 is one too
        return None
    if not isinstance(row, dict) or not isinstance(row.get("step"), int) or "event" not in row:
        return None
    return {name: value if name in TEXTS else number(value) for name, value in row.items()}


TEXTS = ("event", "time", "text", "skipped")
NO_NUMBERS = {"nan": float("nan"), "inf": float("inf"), "-inf": float("-inf")}


def number(value):
    return NO_NUMBERS.get(value, value) if isinstance(value, str) else value


def scalars(record: StepRecord, rate: Rate | None) -> dict[str, float]:
    """A step under the names that dashboards group by."""
    facts = measured(record, rate)
    names = ("learning_rate", "gradient_norm", "tokens_per_second", "mfu")
    return {"train/loss": facts["loss"]} | {name: facts[name] for name in names if name in facts}


class TensorBoard(Watch):
    """Writes what TensorBoard shows: `tensorboard --logdir FOLDER`.

    Args:
        folder: for its event files. A run that begins hides what an earlier one left there.
        resume_step: the run goes on after this step: what was written of later ones is hidden, since they come again;
            None: the step that `start` is told.
        rate: for MFU: a `Rate`, or its three parts.
    Raises:
        ImportError: tensorboard is not installed.
    """

    def __init__(self, folder: str | Path, resume_step: int | None = None, rate: Rate | tuple | None = None):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError(
                "--tensorboard needs a package that is not installed: pip install -r requirements-train.txt "
                "(or: pip install tensorboard). metrics.jsonl is written without it."
            ) from error
        self.open, self.folder, self.resume_step = SummaryWriter, Path(folder), resume_step
        self.rate = None if rate is None else Rate(*rate)
        self.writer = self.hook = None

    def __str__(self):
        return f"TensorBoard's log in {self.folder}"

    def start(self, step, max_steps):
        step = step if self.resume_step is None else self.resume_step
        purge = step + 1 if step else 0  # hides this step and later ones
        # It writes in a thread. What fails there is raised here too: the thread need not print it with a traceback.
        self.hook = threading.excepthook
        threading.excepthook = self.one_message
        self.writer = self.open(str(self.folder), purge_step=purge)

    def one_message(self, failure) -> None:
        ours = type(failure.thread).__module__.startswith("tensorboard.")
        if not (ours and isinstance(failure.exc_value, OSError)):
            self.hook(failure)

    def step(self, record):
        for name, value in scalars(record, self.rate).items():
            self.writer.add_scalar(name, value, record.step)

    def evaluation(self, step, loss, tokens, seconds):
        self.writer.add_scalar("validation/loss", loss, step)

    def sample(self, step, text):
        self.writer.add_text("sample", "".join(f"    {line}\n" for line in text.splitlines()), step)  # as it stands

    def close(self):
        if self.writer is None:
            return
        writer, self.writer = self.writer, None
        try:
            writer.close()
        except OSError:
            with suppress(OSError):
                writer.file_writer.close()  # waits for the thread
            raise
        finally:
            threading.excepthook = self.hook


class WeightsAndBiases(Watch):
    """Reports to Weights & Biases, a service on the internet: only for who asked for it, and has an account there.

    Args:
        folder: of the run; its name is the name of the run there. The id of the run is kept in it, for a resume.
        settings: what the run was told.
        resumed: go on with that run. Steps that W&B had already are ignored there, and they are the same numbers.
        rate: for MFU: a `Rate`, or its three parts.
        project: the runs that are shown together.
    Raises:
        ImportError: wandb is not installed.
    """

    def __init__(
        self,
        folder: str | Path,
        settings: Mapping,
        *,
        resumed: bool = False,
        rate: Rate | tuple | None = None,
        project: str = "gpt2-from-scratch",
    ):
        try:
            import wandb
        except ImportError as error:
            raise ImportError("--wandb needs a package that is not installed: pip install wandb") from error
        self.init, self.folder, self.settings, self.project = wandb.init, Path(folder), dict(settings), project
        self.resumed, self.rate, self.run = resumed, None if rate is None else Rate(*rate), None

    def __str__(self):
        return "Weights & Biases"

    def start(self, step, max_steps):
        kept = self.folder / WANDB_ID
        known = kept.read_text(encoding="utf-8").strip() if self.resumed and kept.is_file() else None
        self.run = self.init(
            project=self.project, name=self.folder.resolve().name, dir=str(self.folder), config=self.settings,
            id=known, resume="allow" if known else None,
        )  # fmt: skip
        replace_text(kept, f"{self.run.id}\n")

    def step(self, record):
        self.run.log(scalars(record, self.rate), step=record.step)

    def evaluation(self, step, loss, tokens, seconds):
        self.run.log({"validation/loss": loss}, step=step)

    def sample(self, step, text):
        self.run.log({"sample": text}, step=step)

    def close(self):
        if self.run is not None:
            self.run.finish()
