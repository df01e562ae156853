"""What is kept of a run: whole, readable, each step once, and never a reason for the training to end."""

import io
import json
import math
import os
import subprocess
import sys
import textwrap
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from GPT2Model.config import from_preset
from orchestrator.evaluation.estimates import count_parameters
from orchestrator.training import mfu
from orchestrator.training.metrics import JsonLines, TensorBoard, WeightsAndBiases, read_metrics
from orchestrator.training.watch import Rate, Several, StepRecord

ROOT = Path(__file__).resolve().parents[3]
CFG = from_preset("nano")
RATE = Rate(CFG, 64, mfu.Peak(5e12, "a chip of our own", "this test"))


def record(step, loss=None, norm=0.5, skipped=None) -> StepRecord:
    return StepRecord(step, 10 / step if loss is None else loss, 1e-3 * step, norm, 1000 + step, 0.25, skipped)


def strict(path: Path) -> list[dict]:
    """The lines as a parser reads them that knows JSON and nothing else."""

    def refuse(word):
        raise ValueError(f"{word} is not JSON")

    lines = path.read_text(encoding="utf-8").splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def steps_of(rows, event="step") -> list[int]:
    return [row["step"] for row in rows if row["event"] == event]


def run_steps(watcher, first, last, max_steps, evaluations=()):
    watcher.start(first - 1, max_steps)
    for step in range(first, last + 1):
        watcher.step(record(step))
        if step in evaluations:
            watcher.evaluation(step, 3.0 + step, 2048, 0.5)


def test_every_event_is_a_line_with_its_numbers_and_its_time(tmp_path):
    path = tmp_path / "metrics.jsonl"
    before = datetime.now(UTC) - timedelta(milliseconds=1)
    watcher = JsonLines(path, rate=RATE)
    watcher.start(0, 2)
    watcher.step(record(1))
    assert steps_of(strict(path)) == [1]  # at once, not at the end
    watcher.step(record(2, loss=math.nan, norm=math.inf, skipped="the loss is nan"))
    watcher.evaluation(2, -math.inf, 4096, 1.5)
    watcher.sample(2, 'Zoë said:\n"nan" \u2028 \U0001f600')
    watcher.close()
    rows = strict(path)
    assert [row["event"] for row in rows] == ["start", "step", "step", "evaluation", "sample", "end"]
    times = [datetime.fromisoformat(row["time"]) for row in rows]
    assert times == sorted(times)
    assert before <= times[0]
    assert times[-1] <= datetime.now(UTC)
    start, first, second, evaluation, sample, end = ({k: v for k, v in row.items() if k != "time"} for row in rows)
    part = 4004 * (6 * (count_parameters(CFG) - CFG["context_length"] * CFG["emb_dim"])
                   + 6 * CFG["n_layers"] * CFG["emb_dim"] * 64) / 5e12  # fmt: skip
    assert start == {"event": "start", "step": 0, "max_steps": 2}
    assert first == {
        "event": "step", "step": 1, "loss": 10.0, "learning_rate": 1e-3, "gradient_norm": 0.5, "tokens": 1001,
        "seconds": 0.25, "tokens_per_second": 4004.0, "mfu": pytest.approx(part, rel=1e-3), "skipped": None,
    }  # fmt: skip
    assert (second["loss"], second["gradient_norm"], second["skipped"]) == ("nan", "inf", "the loss is nan")
    assert evaluation == {"event": "evaluation", "step": 2, "loss": "-inf", "tokens": 4096, "seconds": 1.5}
    assert sample["text"] == 'Zoë said:\n"nan" \u2028 \U0001f600'
    assert end == {"event": "end", "step": 2}

    read = read_metrics(path)
    assert math.isnan(read[2]["loss"])
    assert (read[2]["gradient_norm"], read[3]["loss"]) == (math.inf, -math.inf)
    assert read[4]["text"] == sample["text"]


def test_a_sample_that_is_the_word_nan_stays_a_word(tmp_path):
    watcher = JsonLines(tmp_path / "metrics.jsonl")
    watcher.start(0, 1)
    watcher.sample(0, "nan")
    watcher.close()
    assert read_metrics(tmp_path / "metrics.jsonl")[1]["text"] == "nan"


@pytest.mark.parametrize("explicit", [True, False])
def test_after_a_kill_and_a_resume_each_step_stands_once(tmp_path, explicit):
    path = tmp_path / "metrics.jsonl"
    run_steps(JsonLines(path), 1, 9, 12, evaluations=(3, 6, 9))  # killed: no close
    with path.open("ab") as file:
        file.write(b'{"event": "step", "step": 10, "lo')  # in the middle of a line
    kept = path.read_bytes().splitlines(keepends=True)[:9]  # start, steps 1 to 6, two evaluations
    again = JsonLines(path, resume_step=6 if explicit else None)
    run_steps(again, 7, 12, 12, evaluations=(9, 12))
    again.close()
    rows = strict(path)
    assert steps_of(rows) == list(range(1, 13))
    assert steps_of(rows, "evaluation") == [3, 6, 9, 12]
    assert steps_of(rows, "start") == [0, 6]
    assert path.read_bytes().splitlines(keepends=True)[:9] == kept  # not a byte of them changed
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_run_from_the_beginning_keeps_nothing_of_one_before_it(tmp_path):
    path = tmp_path / "metrics.jsonl"
    run_steps(JsonLines(path), 1, 5, 5, evaluations=(5,))
    run_steps(JsonLines(path), 1, 2, 5)
    assert steps_of(strict(path)) == [1, 2]
    assert steps_of(strict(path), "start") == [0]


FULL_FOR_A_WHILE = """
import os, resource, sys
from pathlib import Path
from orchestrator.training.metrics import JsonLines
from orchestrator.training.watch import Several, StepRecord

path = Path(sys.argv[1])
watch = Several(JsonLines(path))

def steps(first, last):
    for step in range(first, last + 1):
        watch.step(StepRecord(step, 2.5, 1e-3, 0.5, 100, 0.1))

watch.start(0, 12)
steps(1, 3)
whole = path.read_bytes()
soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + 20, hard))  # room for a part of a line
steps(4, 6)
watch.evaluation(6, 2.0, 100, 0.1)
assert path.read_bytes() == whole, path.read_bytes()
resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
steps(7, 9)
resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size, hard))  # no room at all
steps(10, 10)
resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
steps(11, 12)
watch.close()
"""


def test_what_a_full_disk_refuses_is_left_out_and_with_room_again_the_lines_go_on(tmp_path):
    path = tmp_path / "metrics.jsonl"
    done = child(FULL_FOR_A_WHILE, path)
    assert done.returncode == 0, done.stderr
    rows = strict(path)  # every line is whole
    assert steps_of(rows) == [1, 2, 3, 7, 8, 9, 11, 12]
    assert [row["event"] for row in rows] == ["start", *["step"] * 8, "end"]
    assert done.stderr.count("File too large") == done.stderr.count("the metrics file") == 1, done.stderr
    assert done.stderr.count("\n") == 1
    assert "tried again" in done.stderr


def test_what_cannot_be_read_is_left_out_and_the_rest_is_read(tmp_path):
    path = tmp_path / "metrics.jsonl"
    good = b'{"event": "step", "step": 1, "loss": 2.0}\n'
    path.write_bytes(good + b"\xff\xfe\n" + b"[1, 2]\n" + b'{"step": 3}\n' + b"\n" + good[:-1])
    assert read_metrics(path) == [{"event": "step", "step": 1, "loss": 2.0}]
    path.write_bytes(b"")
    assert read_metrics(path) == []
    with pytest.raises(FileNotFoundError, match=r"metrics\.jsonl"):
        read_metrics(tmp_path / "other" / "metrics.jsonl")


def child(code: str, *arguments, **environment) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)], cwd=ROOT, capture_output=True, text=True,
        timeout=120, env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
    )  # fmt: skip


def test_a_full_disk_ends_the_metrics_and_not_the_training(tmp_path, capsys):
    full, heard = JsonLines(tmp_path / "full.jsonl"), JsonLines(tmp_path / "heard.jsonl")
    nowhere = JsonLines(tmp_path / "no such folder" / "metrics.jsonl")
    everyone = Several(full, nowhere, heard)
    everyone.start(0, 5)
    full.file.close()
    full.file = io.FileIO("/dev/full", "w")  # Linux's disk without a free byte
    for step in range(1, 6):
        everyone.step(record(step))
    everyone.close()
    assert steps_of(strict(tmp_path / "heard.jsonl")) == [1, 2, 3, 4, 5]
    said = capsys.readouterr().err
    assert said.count("No space left on device") == said.count("No such file or directory") == 1
    assert said.count("\n") == 2


FULL = """
import resource, sys
from pathlib import Path
from orchestrator.training.metrics import JsonLines, TensorBoard
from orchestrator.training.watch import ProgressBar, Several, StepRecord

folder = Path(sys.argv[1])
watch = Several(ProgressBar(), JsonLines(folder / "metrics.jsonl"), TensorBoard(folder / "tensorboard"))
watch.start(0, 400)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))  # from here on no file grows beyond that
for step in range(1, 401):
    watch.step(StepRecord(step, 2.5, 1e-3, 0.5, 100, 0.1))
    if step % 50 == 0:
        watch.evaluation(step, 2.0, 100, 0.1)
watch.close()
print("trained to the end")
"""


def test_files_that_cannot_grow_are_told_of_once_each_and_hold_what_went_into_them(tmp_path):
    done = child(FULL, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("trained to the end\n")
    assert done.stderr.count("File too large") == 2, done.stderr
    assert done.stderr.count("failed and is left out") == 1, done.stderr  # TensorBoard's
    assert "the metrics file" in done.stderr
    assert "TensorBoard's log" in done.stderr
    assert "step 400/400" in done.stderr  # the bar went on
    assert "Traceback" not in done.stderr
    path = tmp_path / "metrics.jsonl"
    assert 19_000 < path.stat().st_size <= 20_000
    kept = steps_of(strict(path))
    assert kept == list(range(1, len(kept) + 1))
    assert len(kept) > 50
    run_steps(JsonLines(path), 41, 60, 400)  # with room again, a resume mends it
    assert steps_of(strict(path)) == list(range(1, 61))


def scalars(folder: Path) -> dict[str, dict[int, float]]:
    """What TensorBoard itself makes of its files."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0}).Reload()
    found = {}
    for tag in events.Tags()["scalars"]:
        steps = [event.step for event in events.Scalars(tag)]
        assert len(steps) == len(set(steps)), (tag, steps)
        found[tag] = {event.step: event.value for event in events.Scalars(tag)}
    return found


def test_tensorboard_reads_what_was_written(tmp_path):
    watcher = TensorBoard(tmp_path, rate=RATE)
    run_steps(watcher, 1, 4, 4, evaluations=(2, 4))
    watcher.step(record(5, loss=math.nan, norm=math.inf, skipped="the loss is nan"))
    watcher.sample(4, "Once upon\n  a time *there* was")
    watcher.close()
    found = scalars(tmp_path)
    assert set(found) == {
        "train/loss", "validation/loss", "learning_rate", "gradient_norm", "tokens_per_second", "mfu",
    }  # fmt: skip
    assert {step: found["train/loss"][step] for step in (1, 2, 3, 4)} == pytest.approx({1: 10, 2: 5, 3: 10 / 3, 4: 2.5})
    assert math.isnan(found["train/loss"][5])
    assert math.isinf(found["gradient_norm"][5])
    assert found["validation/loss"] == {2: 5.0, 4: 7.0}
    assert found["learning_rate"][3] == pytest.approx(3e-3)
    assert found["tokens_per_second"][2] == pytest.approx(4008)
    assert found["mfu"][2] == pytest.approx(mfu.mfu(CFG, 64, 4008, RATE.peak), rel=1e-4)
    events = EventAccumulator(str(tmp_path)).Reload()
    (text,) = events.Tensors("sample/text_summary")
    assert text.step == 4
    assert b"      a time *there* was" in text.tensor_proto.string_val[0]  # indented: shown as it stands


def test_after_a_resume_tensorboard_shows_each_step_once(tmp_path):
    killed = TensorBoard(tmp_path)
    run_steps(killed, 1, 9, 12, evaluations=(3, 6, 9))
    killed.writer.flush()  # and no close
    threading.excepthook = killed.hook
    again = TensorBoard(tmp_path, 6)
    again.start(6, 12)
    for step in range(7, 11):
        again.step(record(step, loss=100.0 + step))
    again.evaluation(9, 50.0, 1, 1.0)
    again.close()
    found = scalars(tmp_path)
    assert found["train/loss"] == pytest.approx(
        {step: 10 / step for step in range(1, 7)} | {step: 100 + step for step in range(7, 11)}
    )
    assert found["validation/loss"] == {3: 6.0, 6: 9.0, 9: 50.0}


def test_a_run_from_the_beginning_hides_the_log_of_one_before_it(tmp_path):
    old = TensorBoard(tmp_path)
    run_steps(old, 1, 5, 5, evaluations=(5,))
    old.close()
    new = TensorBoard(tmp_path)
    run_steps(new, 1, 2, 5)
    new.close()
    assert set(scalars(tmp_path)["train/loss"]) == {1, 2}


WITHOUT = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("tensorboard", "tensorflow", "wandb"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
from orchestrator.training.metrics import JsonLines, TensorBoard, WeightsAndBiases
for make in (lambda: TensorBoard("folder"), lambda: WeightsAndBiases("folder", {})):
    try:
        make()
    except ImportError as error:
        print(error)
"""


def test_a_package_that_is_not_installed_is_named_before_the_training(tmp_path):
    done = child(WITHOUT, tmp_path)
    assert done.returncode == 0, done.stderr
    tensorboard, wandb = done.stdout.splitlines()
    assert "pip install -r requirements-train.txt" in tensorboard
    assert "pip install wandb" in wandb


STAND_IN = """
import json, os

def note(*call):
    with open(os.environ["WANDB_CALLS"], "a") as file:
        file.write(json.dumps(call) + "\\n")

class Run:
    id = "abc123"
    def log(self, values, step):
        note("log", values, step)
    def finish(self):
        note("finish")

def init(**settings):
    note("init", settings)
    return Run()
"""


def test_weights_and_biases_is_told_of_each_step_and_goes_on_with_its_run(tmp_path, monkeypatch):
    """What wandb would be called with. The package needs an account and the internet: a small module stands in for it,
    which writes its calls down. That the service understands them, this does not show."""
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "wandb.py").write_text(STAND_IN)
    monkeypatch.syspath_prepend(tmp_path / "modules")
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setenv("WANDB_CALLS", str(tmp_path / "calls"))
    out = tmp_path / "my-run"
    out.mkdir()
    watcher = WeightsAndBiases(out, {"max_steps": 2}, rate=RATE)
    run_steps(watcher, 1, 2, 2, evaluations=(2,))
    watcher.sample(2, "a text")
    watcher.close()
    resumed = WeightsAndBiases(out, {"max_steps": 4}, resumed=True)
    run_steps(resumed, 3, 3, 4)
    resumed.close()
    anew = WeightsAndBiases(out, {"max_steps": 4})
    anew.start(0, 4)
    sys.modules.pop("wandb")
    calls = [json.loads(line) for line in (tmp_path / "calls").read_text().splitlines()]
    assert [call[0] for call in calls] == [
        "init", "log", "log", "log", "log", "finish", "init", "log", "finish", "init",
    ]  # fmt: skip
    first, second, third = (call[1] for call in calls if call[0] == "init")
    assert first == {
        "project": "gpt2-from-scratch", "name": "my-run", "dir": str(out), "config": {"max_steps": 2},
        "id": None, "resume": None,
    }  # fmt: skip
    assert (second["id"], second["resume"]) == ("abc123", "allow")
    assert third["id"] is None  # another run, not that one over again
    assert calls[1][2] == 1
    assert calls[1][1]["train/loss"] == 10
    assert calls[1][1]["learning_rate"] == 1e-3
    assert calls[1][1]["mfu"] == pytest.approx(mfu.mfu(CFG, 64, 4004, RATE.peak), rel=1e-3)
    assert calls[3][1:] == [{"validation/loss": 5.0}, 2]
    assert calls[4][1:] == [{"sample": "a text"}, 2]
    assert "mfu" not in calls[7][1]
    assert calls[7][2] == 3
