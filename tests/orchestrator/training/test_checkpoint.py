"""Saving in the background, what is kept and what is deleted, and what happens when the disk is full."""

import json
import threading
from pathlib import Path

import pytest

from orchestrator.training import checkpoint
from orchestrator.training.checkpoint import Checkpoints, check_same_run, find, restore, superfluous
from orchestrator.training.checkpoint_folder import damages, publish, steps_in
from tests.orchestrator.training.forks import Forks
from tests.orchestrator.training.killed_runs import run_on_a_full_disk
from tests.orchestrator.training.small_runs import digest, fresh, go_on, settings


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "out" / "checkpoints"


@pytest.fixture
def gate(monkeypatch):
    """The thread that writes waits here until the test lets it go on. What it then does is the real thing."""
    opened, publishing = threading.Event(), []

    def wait_then_publish(*args):
        publishing.append(threading.current_thread())
        assert opened.wait(60)
        publish(*args)

    monkeypatch.setattr(checkpoint, "publish", wait_then_publish)
    opened.threads = publishing
    yield opened
    opened.set()


def test_every_so_many_steps_one_is_due(folder):
    checkpoints = Checkpoints(folder, every=4)
    assert [step for step in range(13) if checkpoints.due(step)] == [4, 8, 12]


def test_a_run_leaves_whole_checkpoints_of_its_last_steps(folder):
    with Checkpoints(folder, every=3) as checkpoints:
        go_on(fresh(settings(max_steps=10, eval_steps=100)), checkpoints)
    assert steps_in(folder) == [9, 10]
    assert [damages(folder / f"step-{step}") for step in (9, 10)] == [[], []]
    assert find(folder).name == "step-10"


def test_what_is_written_is_the_moment_of_the_save_whatever_is_trained_meanwhile(folder, gate):
    state = fresh(settings(optimizer="muon"))
    go_on(state, until=3)
    checkpoints = Checkpoints(folder, every=1)
    checkpoints.save(state)
    at_the_save = digest(state)
    go_on(state)  # nine more steps, all of them before a byte is written
    assert digest(state) != at_the_save
    gate.set()
    checkpoints.close()
    again = fresh(settings(optimizer="muon"), seed=1)
    restore(find(folder), again)
    assert again.counters.step == 3
    assert digest(again) == at_the_save


def test_a_save_waits_for_the_one_before_so_that_only_one_copy_is_ever_held(folder, gate, monkeypatch):
    state, writing = fresh(settings()), []
    checkpoints = Checkpoints(folder, every=1)
    wait, take_copy = checkpoints.wait, checkpoint.take_copy

    def note_and_copy(*args):
        writing.append(sum(thread.name.startswith("checkpoint of") for thread in threading.enumerate()))
        return take_copy(*args)

    def open_and_wait():
        gate.set()  # until it waits, the first one cannot end
        return wait()

    monkeypatch.setattr(checkpoint, "take_copy", note_and_copy)
    checkpoints.save(state)
    checkpoints.wait = open_and_wait
    checkpoints.save(state)
    checkpoints.close()
    assert writing == [0, 0]
    assert len(gate.threads) == 2


def test_without_a_background_the_save_itself_writes(folder):
    checkpoints = Checkpoints(folder, every=1, background=False)
    checkpoints.save(fresh(settings()))
    assert damages(folder / "step-0") == []


def saves(folder: Path, losses: dict[int, float | None], keep_last: int = 2) -> None:
    """Save at each step, with that validation loss."""
    state = fresh(settings())
    with Checkpoints(folder, every=1, keep_last=keep_last) as checkpoints:
        for step, loss in losses.items():
            state.counters.step, state.validation_loss = step, loss
            checkpoints.save(state)


@pytest.mark.parametrize(
    ("losses", "keep_last", "kept"),
    [
        ({1: 5.0, 2: 4.0, 3: 3.0, 4: 2.0}, 2, [3, 4]),
        ({1: 5.0, 2: 1.0, 3: 3.0, 4: 2.0, 5: 2.5}, 2, [2, 4, 5]),
        ({1: 1.0, 2: 2.0, 3: 3.0, 4: 4.0, 5: 5.0, 6: 6.0}, 1, [1, 6]),
        ({1: 2.0, 2: 2.0, 3: 3.0, 4: 4.0}, 1, [1, 4]),
        ({1: None, 2: 2.0, 3: None, 4: None, 5: None}, 2, [2, 4, 5]),
        ({1: None, 2: None, 3: None}, 2, [2, 3]),
        ({1: float("nan"), 2: 2.0, 3: 3.0, 4: float("inf")}, 1, [2, 4]),
        ({9: 1.0, 10: 2.0, 100: 3.0}, 1, [9, 100]),
    ],
)
def test_the_last_and_the_best_are_kept(folder, losses, keep_last, kept):
    saves(folder, losses, keep_last)
    assert steps_in(folder) == kept


def test_nothing_is_deleted_before_the_new_one_is_whole(folder, monkeypatch):
    saves(folder, {1: None, 2: None})
    seen = []

    def looks_first(place, step, write, say):
        def write_and_look(partial):
            write(partial)
            seen.append(steps_in(folder))

        publish(place, step, write_and_look, say)

    monkeypatch.setattr(checkpoint, "publish", looks_first)
    saves(folder, {3: None, 4: None})
    assert seen == [[1, 2], [2, 3]]
    assert steps_in(folder) == [3, 4]


def test_what_dead_runs_left_is_cleared_at_the_start(folder):
    folder.mkdir(parents=True)
    (folder / ".step-3.999999999.partial").mkdir()
    Checkpoints(folder, every=1)
    assert list(folder.iterdir()) == []


def test_after_going_back_from_a_damaged_checkpoint_the_run_is_the_same(folder):
    """Step 8 is damaged: from step 4 on, everything comes again as it was, and is kept in its place."""
    with Checkpoints(folder, every=4, keep_last=3) as checkpoints:
        whole = go_on(fresh(settings()), checkpoints).of
    weights = folder / "step-8" / "model.safetensors"
    good = weights.read_bytes()
    weights.write_bytes(good[:-1])
    (folder / "step-12" / "manifest.json").unlink()
    state, lines = fresh(settings(), seed=1), []
    restore(find(folder, lines.append), state)
    assert [line.partition(" ")[0] for line in lines] == ["checkpoints/step-12", "checkpoints/step-8"]
    with Checkpoints(folder, every=4, keep_last=3, say=lines.append) as checkpoints:
        later = go_on(state, checkpoints).of
    assert later == {step: whole[step] for step in range(5, 13)}
    assert weights.read_bytes() == good
    assert steps_in(folder) == [4, 8, 12]
    assert [damages(folder / f"step-{step}") for step in (4, 8, 12)] == [[], [], []]
    assert "step-12.set-aside" in lines[-1]


@pytest.fixture(scope="module")
def forks():
    with Forks() as process:
        yield process


def on_a_full_disk(forks, tmp_path, **limit) -> tuple[int, str]:
    said = tmp_path / "said.txt"
    code = forks.wait(forks.start(run_on_a_full_disk, said, out=str(tmp_path / "out"), **limit))
    return code, said.read_text()


# model.safetensors has 46 kB, optimizer.safetensors 96 kB, state.json 1 kB.
@pytest.mark.parametrize("most_bytes", [60_000, 20_000, 300, 0])
def test_a_full_disk_loses_nothing_that_was_saved_and_the_run_goes_on(forks, tmp_path, folder, most_bytes):
    """It is full at step 4, and has room again at step 6. The limit is the system's, and cuts a file in the middle."""
    code, said = on_a_full_disk(forks, tmp_path, most_bytes=most_bytes, full_from=4, full_until=6)
    assert code == 0, said
    assert "trained to step 8" in said
    assert steps_in(folder) == [2, 6, 8]
    assert [damages(folder / f"step-{step}") for step in (2, 6, 8)] == [[], [], []]
    assert sorted(path.name for path in folder.iterdir()) == ["step-2", "step-6", "step-8"]
    lines = [line for line in said.splitlines() if "could not be written" in line]
    assert len(lines) == 1
    assert lines[0].startswith("the checkpoint of step 4 could not be written (")
    assert "File too large" in lines[0]
    assert "step-2 is there" in lines[0]
    assert "make room" in lines[0]


def test_a_last_save_that_fails_is_an_error_and_what_was_saved_is_there(forks, tmp_path, folder):
    code, said = on_a_full_disk(forks, tmp_path, most_bytes=60_000, full_from=8, full_until=9)
    assert code == 3, said
    assert said.index("trained to step 8") < said.index("the end: the checkpoint of step 8 could not be written")
    assert steps_in(folder) == [2, 4, 6]
    assert find(folder).name == "step-6"


def test_a_first_save_that_fails_is_said_as_such(forks, tmp_path, folder):
    code, said = on_a_full_disk(forks, tmp_path, most_bytes=60_000, full_from=2, full_until=4)
    assert code == 0, said
    assert "there is none before it" in said
    assert steps_in(folder) == [4, 6, 8]


def test_an_error_that_is_on_its_way_is_not_hidden_by_a_save_that_failed(folder):
    lines, state = [], fresh(settings())

    def run():
        with Checkpoints(folder, every=1, say=lines.append) as checkpoints:
            fill(folder)
            checkpoints.save(state)
            raise FloatingPointError("the real one")

    with pytest.raises(FloatingPointError, match="the real one"):
        run()
    assert len(lines) == 1


def fill(folder: Path) -> None:
    """Make writing impossible: where the folder was, there is a file."""
    folder.rmdir()
    folder.write_text("")


def test_a_folder_that_cannot_be_made_is_said(tmp_path):
    (tmp_path / "out").write_text("a file")
    with pytest.raises(OSError, match=r"cannot be made: .*--out"):
        Checkpoints(tmp_path / "out" / "checkpoints", every=1)


def test_a_mistake_of_ours_is_no_full_disk(folder, monkeypatch):
    checkpoints = Checkpoints(folder, every=1, facts={"not": {1, 2}})  # no JSON
    checkpoints.save(fresh(settings()))
    with pytest.raises(TypeError, match="JSON"):
        checkpoints.close()
    assert list(folder.iterdir()) == []


def test_numbers_that_make_no_sense_are_all_said(folder):
    with pytest.raises(ValueError, match=r"save_steps must be 1 or more, got 0; keep_last must be 1 or more, got -2\."):
        Checkpoints(folder, every=0, keep_last=-2)


def test_another_run_is_refused_and_a_changed_one_is_told(folder):
    with Checkpoints(folder, every=1, facts={"tokenizer": {"name": "bytes"}, "data": "a"}) as checkpoints:
        checkpoints.save(fresh(settings()))
    place, lines = find(folder), []
    facts = json.loads((place / "state.json").read_text())["facts"]
    check_same_run(place, facts, lines.append)
    assert lines == []
    check_same_run(place, facts | {"settings": facts["settings"] | {"max_steps": 99}}, lines.append)
    assert "max_steps: 12 was saved, 99 is asked for" in lines[0]
    asked = facts | {"data": "b", "tokenizer": {"name": "char"}, "cfg": facts["cfg"] | {"n_layers": 9}}
    with pytest.raises(ValueError, match="is of another run:") as error:
        check_same_run(place, asked)
    for phrase in (
        "'a' was saved, 'b'",
        "tokenizer: 'bytes' was saved, 'char' is",
        "cfg: n_layers: 2 was saved, 9 is asked for",
    ):
        assert phrase in str(error.value)
    record = json.loads((place / "state.json").read_text())
    record["versions"]["torch"] = "1.0"
    (place / "state.json").write_text(json.dumps(record))
    lines.clear()
    check_same_run(place, facts, lines.append)
    assert "version of torch: '1.0' was saved" in lines[0]


def test_checkpoints_of_steps_that_went_wrong_do_not_push_out_those_of_before(tmp_path):
    bad_in_a_row = {10: 0, 20: 0, 30: 0, 40: 2, 50: 5}
    for step, bad in bad_in_a_row.items():
        (tmp_path / f"step-{step}").mkdir()
        record = {"validation_loss": None, "counters": {"bad_in_a_row": bad}}
        (tmp_path / f"step-{step}" / "state.json").write_text(json.dumps(record))
    assert superfluous(tmp_path, keep_last=2) == [10, 40]  # the newest stays, and the last two that were sound
