"""Folders that are whole or not there, whatever happens to them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.training import checkpoint_folder
from orchestrator.training.checkpoint_folder import clear, damages, delete, find, publish, steps_in, verify

FILES = {"weights.bin": bytes(range(256)) * 8, "state.json": b'{"step": 1}\n'}


def write(place: Path) -> None:
    for name, content in FILES.items():
        (place / name).write_bytes(content)


@pytest.fixture
def folder(tmp_path) -> Path:
    """Three whole steps."""
    for step in (10, 20, 30):
        publish(tmp_path / "checkpoints", step, write)
    return tmp_path / "checkpoints"


def test_a_published_step_is_whole_and_nothing_else_is_left(folder):
    assert sorted(path.name for path in folder.iterdir()) == ["step-10", "step-20", "step-30"]
    assert all(damages(folder / f"step-{step}") == [] for step in steps_in(folder))
    assert find(folder).name == "step-30"
    verify(folder / "step-20")


def test_steps_are_in_the_order_of_their_numbers(folder):
    publish(folder, 100, write)
    assert steps_in(folder) == [10, 20, 30, 100]
    assert find(folder).name == "step-100"


def test_nothing_is_found_where_there_is_nothing(tmp_path):
    assert find(tmp_path) is None
    assert find(tmp_path / "not there") is None
    (tmp_path / "step-x").mkdir()
    (tmp_path / ".step-3.1.partial").mkdir()
    assert find(tmp_path) is None


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", [*FILES, "manifest.json"])
@pytest.mark.parametrize("part", [0.0, 0.3, 0.55, 0.99])
def test_one_flipped_bit_is_seen(folder, name, part):
    path = folder / "step-30" / name
    flip(path, int(part * path.stat().st_size))
    lines = []
    assert find(folder, lines.append).name == "step-20"
    assert len(lines) == 1
    assert lines[0].startswith("checkpoints/step-30 is damaged (")
    assert lines[0].endswith("going back to step-20.")


@pytest.mark.parametrize("name", [*FILES, "manifest.json"])
@pytest.mark.parametrize("damage", ["cut short", "empty", "missing", "longer", "a folder"])
def test_a_file_that_is_not_what_was_written_is_named(folder, name, damage):
    path = folder / "step-30" / name
    content = path.read_bytes()
    path.unlink()
    if damage == "a folder":
        path.mkdir()
    elif damage != "missing":
        path.write_bytes({"cut short": content[:-3], "empty": b"", "longer": content + b"}"}[damage])
    lines = []
    assert find(folder, lines.append).name == "step-20"
    assert name in lines[0]
    with pytest.raises(ValueError, match=rf"step-30 is damaged:\n  - {name}.*\n.*--resume RUN"):
        verify(folder / "step-30")


@pytest.mark.parametrize(
    "text",
    [
        "null", "[]", "{}", "\x00\x01",
        '{"format": 1, "step": 30, "files": 3}', '{"format": 1, "step": 30, "files": {}}',
        '{"format": 9, "step": 30, "files": {}}', '{"format": 1, "step": 30, "files": {"weights.bin": 5}}',
        '{"format": 1, "step": 31, "files": {"state.json": {"bytes": 1, "sha256": "0"}}}',
    ],
)  # fmt: skip
def test_a_manifest_that_is_something_else_is_no_traceback(folder, text):
    (folder / "step-30" / "manifest.json").write_text(text)
    assert find(folder, lambda line: None).name == "step-20"


def test_a_manifest_that_is_no_text_is_no_traceback(folder):
    (folder / "step-30" / "manifest.json").write_bytes(b"\xff\xfe\x80")
    assert find(folder, lambda line: None).name == "step-20"


def test_several_damaged_ones_are_each_said_with_where_it_goes_back_to(folder):
    flip(folder / "step-30" / "weights.bin", 3)
    (folder / "step-20" / "state.json").unlink()
    lines = []
    assert find(folder, lines.append).name == "step-10"
    assert lines == [
        "checkpoints/step-30 is damaged (weights.bin: its content has changed): going back to step-10.",
        "checkpoints/step-20 is damaged (state.json: missing): going back to step-10.",
    ]


def test_where_all_are_damaged_nothing_begins_anew_without_a_word(folder):
    for step in steps_in(folder):
        flip(folder / f"step-{step}" / "weights.bin", step)
    with pytest.raises(ValueError, match=r"no checkpoint in .* is whole:\n") as error:
        find(folder)
    assert [f"step-{step}: weights.bin" in str(error.value) for step in (10, 20, 30)] == [True] * 3
    assert "--out" in str(error.value)


def test_a_folder_that_is_not_there_is_said():
    with pytest.raises(FileNotFoundError, match="no such folder"):
        verify("nowhere/step-3")


def failing(place: Path) -> None:
    write(place)
    raise OSError(28, "No space left on device")


def test_a_write_that_fails_leaves_what_was_there(folder):
    for step in (40, 30):
        with pytest.raises(OSError, match="No space left"):
            publish(folder, step, failing)
        assert sorted(path.name for path in folder.iterdir()) == ["step-10", "step-20", "step-30"]
        assert find(folder).name == "step-30"


def test_a_step_that_is_there_is_replaced_by_the_new_one(folder):
    (folder / "step-30" / "weights.bin").write_bytes(b"damaged")
    publish(folder, 30, lambda place: (place / "weights.bin").write_bytes(b"new"))
    assert sorted(path.name for path in folder.iterdir()) == ["step-10", "step-20", "step-30"]
    assert (find(folder) / "weights.bin").read_bytes() == b"new"


def test_steps_behind_the_newest_are_set_aside_and_never_gone_on_with(folder):
    """Who goes back to step 10 and on from there must not find the old step 30 after the next crash."""
    lines = []
    publish(folder, 12, write, lines.append)
    assert find(folder).name == "step-12"
    assert sorted(path.name for path in folder.iterdir()) == [
        "step-10", "step-12", "step-20.set-aside", "step-30.set-aside",
    ]  # fmt: skip
    assert (folder / "step-30.set-aside" / "weights.bin").read_bytes() == FILES["weights.bin"]
    assert len(lines) == 2
    publish(folder, 30, write, lines.append)
    publish(folder, 12, write, lines.append)
    assert (folder / "step-30.set-aside-2").is_dir()


@pytest.mark.parametrize("written", [False, True])
def test_a_death_between_the_two_renames_of_a_replacement_loses_neither(folder, written):
    """A real process dies at the first rename, or after it."""
    code = f"""
import os, sys
from pathlib import Path
from orchestrator.training import checkpoint_folder
rename = Path.rename
def dies(self, target):
    if {written}:
        rename(self, target)
    os._exit(9)
Path.rename = dies
checkpoint_folder.publish(Path(sys.argv[1]), 30, lambda place: (place / "weights.bin").write_bytes(b"new"))
"""
    root = Path(__file__).resolve().parents[3]
    done = subprocess.run([sys.executable, "-c", code, folder], cwd=root, check=False)
    assert done.returncode == 9
    assert (folder / "step-30").exists() is not written
    assert find(folder).name == "step-30"
    clear(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["step-10", "step-20", "step-30"]
    assert (folder / "step-30" / "weights.bin").read_bytes() == FILES["weights.bin"]


def dead_process() -> int:
    """The number of a process that ran and is no more."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_what_dead_runs_left_is_cleared_and_what_live_ones_write_is_not(folder):
    live = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        dead = dead_process()
        for name in (f".step-31.{dead}.partial", f".step-5.{dead}.deleted", f".step-30.{dead}.replaced"):
            (folder / name).mkdir()
        (folder / f".step-40.{os.getpid()}.partial").mkdir()  # of a run before, which had the number that we have now
        (folder / f".step-31.{live.pid}.partial").mkdir()
        clear(folder)
        left = sorted(path.name for path in folder.iterdir())
        assert left == [f".step-31.{live.pid}.partial", "step-10", "step-20", "step-30"]
    finally:
        live.communicate(b"\n")


def test_what_this_process_is_writing_is_not_cleared(folder):
    def write_and_clear(place: Path) -> None:
        write(place)
        clear(folder)

    publish(folder, 40, write_and_clear)
    assert find(folder).name == "step-40"


def test_a_step_is_deleted_whole_and_a_death_in_the_middle_leaves_no_half_of_it(folder, monkeypatch):
    monkeypatch.setattr(checkpoint_folder.shutil, "rmtree", lambda path: None)
    delete([folder / "step-10"])
    assert steps_in(folder) == [20, 30]
    monkeypatch.undo()
    clear(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["step-20", "step-30"]


def test_the_manifest_is_written_when_all_else_is_on_the_disk(tmp_path, monkeypatch):
    """The order of what reaches the disk, from the calls themselves: a power cut cannot be had in a test."""
    flushed = []
    flush = checkpoint_folder.flush
    monkeypatch.setattr(checkpoint_folder, "flush", lambda path: (flushed.append(path.name), flush(path)))
    rename = Path.rename
    monkeypatch.setattr(Path, "rename", lambda self, target: (flushed.append("RENAMED"), rename(self, target))[1])
    publish(tmp_path, 7, write)
    partial = f".step-7.{os.getpid()}.partial"
    assert flushed == ["state.json", "weights.bin", "manifest.json", partial, "RENAMED", tmp_path.name]
    listed = json.loads((tmp_path / "step-7" / "manifest.json").read_text())["files"]
    assert listed.keys() == FILES.keys()
