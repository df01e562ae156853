"""Folders `step-N` that are whole or not there: written beside and renamed, with a manifest of hashes; found, cleared.

What is in them is the business of `checkpoint.py`. A process may be killed between any two lines here, and the next one
finds every step that was whole before. The steps to a new folder, in this order:

1. everything is written into `.step-N.PID.partial` and flushed to the disk, the manifest last;
2. the folder gets its name, in one rename;
3. only then older ones are deleted.
"""

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from tqdm.auto import tqdm

MANIFEST = "manifest.json"
FORMAT = 1
STEP = re.compile(r"step-(\d+)")
# `.step-N.PID.KIND`: being written; the one that a new step-N replaces; being deleted.
HIDDEN = re.compile(r"\.(step-\d+)\.(\d+)\.(partial|replaced|deleted)")

logger = logging.getLogger("orchestrator")
_being_written: set[Path] = set()  # by this process


def steps_in(folder: Path) -> list[int]:
    """The steps that have a folder here, whole or damaged, in order."""
    names = [path.name for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []
    return sorted(int(found.group(1)) for name in names if (found := STEP.fullmatch(name)))


def find(folder: Path | str, say: Callable[[str], None] = logger.warning) -> Path | None:
    """The newest whole checkpoint in OUT/checkpoints: every hash is checked. None: there is none yet.

    Args:
        say: is given a line for each that is passed over, with what is wrong with it.
    Raises:
        ValueError: there are checkpoints and none is whole. (A run must not begin anew without a word.)
    """
    folder, damaged = Path(folder), {}
    bring_back(folder)
    for step in reversed(steps_in(folder)):
        place = folder / f"step-{step}"
        problems = damages(place)
        if not problems:
            for name, found in damaged.items():
                say(f"{folder.name}/{name} is damaged ({'; '.join(found)}): going back to {place.name}.")
            return place
        damaged[place.name] = problems
    if damaged:
        raise ValueError(
            f"no checkpoint in {folder} is whole:\n"
            + "\n".join(f"  - {name}: {'; '.join(found)}" for name, found in damaged.items())
            + "\nBring one back from a copy, or begin a new run in another folder (--out)."
        )
    return None


def verify(place: Path | str) -> None:
    """Raise for what is wrong with one checkpoint.

    Raises:
        FileNotFoundError: no such folder. ValueError: it is damaged, with every file that is.
    """
    place = Path(place)
    if not place.is_dir():
        raise FileNotFoundError(f"{place}: no such folder. A checkpoint is a folder RUN/checkpoints/step-N.")
    if problems := damages(place):
        raise ValueError(
            f"{place} is damaged:\n"
            + "\n".join(f"  - {problem}" for problem in problems)
            + "\nUse another checkpoint of "
            "the run: --resume RUN takes the newest that is whole."
        )


def damages(place: Path) -> list[str]:
    """What is wrong with a checkpoint, a phrase for each file; nothing: it is what was written."""
    try:
        manifest = json.loads((place / MANIFEST).read_text(encoding="utf-8"))
        files = {str(name): (facts["bytes"], facts["sha256"]) for name, facts in manifest["files"].items()}
        known, step = manifest["format"] == FORMAT, manifest["step"]
    except FileNotFoundError:
        return [f"{MANIFEST} is missing"]
    except OSError as error:
        return [f"{MANIFEST} cannot be read: {error.strerror}"]
    except (ValueError, KeyError, TypeError, AttributeError):  # ValueError: not JSON, or not UTF-8
        return [f"{MANIFEST} is not what was written"]
    if not known:
        return [f"{MANIFEST} has format {str(manifest['format'])[:20]}, where {FORMAT} was expected"]
    if not files:
        return [f"{MANIFEST} lists no files"]
    named = STEP.fullmatch(place.name)
    if named and int(named.group(1)) != step:
        return [f"{MANIFEST} says that this is step {str(step)[:20]}"]
    problems = []
    sizes = [size for size, _ in files.values() if isinstance(size, int)]
    with tqdm(total=sum(sizes), desc=f"checking {place.name}", unit="B", unit_scale=True, delay=2, leave=False) as bar:
        for name, (size, sha256) in files.items():
            problem = damage(place / name, size, sha256)
            problems += [] if problem is None else [f"{name}: {problem}"]
            bar.update(size if isinstance(size, int) else 0)
    return problems


def damage(path: Path, size: int, sha256: str) -> str | None:
    """What is wrong with one file."""
    try:
        there = path.stat().st_size
        if there != size:
            return f"{there} bytes, where {size} were written"
        return None if hash_of(path) == sha256 else "its content has changed"
    except FileNotFoundError:
        return "missing"
    except OSError as error:
        return f"cannot be read: {error.strerror}"


def hash_of(path: Path) -> str:
    """SHA-256 in hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def publish(
    folder: Path, step: int, write: Callable[[Path], None], say: Callable[[str], None] = logger.warning
) -> None:
    """Let `write(empty folder)` fill a folder, and make it `folder/step-N` when it is whole and on the disk.

    Steps behind it, if there are any, are of a run that was gone back on: they are set aside, so that they are neither
    lost nor gone on with.

    Raises:
        whatever `write` raises, OSError: nothing has changed then.
    """
    place, partial = folder / f"step-{step}", hidden(folder, step, "partial")
    _being_written.add(partial)
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        write(partial)
        write_manifest(partial, step)
        for later in (number for number in steps_in(folder) if number > step):
            say(set_aside(folder / f"step-{later}"))
        replaced = hidden(folder, step, "replaced")
        if place.exists():  # a folder that is not empty cannot be renamed over: see `bring_back`
            place.rename(replaced)
        partial.rename(place)
        flush(folder)
        shutil.rmtree(replaced, ignore_errors=True)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        bring_back(folder)
        raise
    finally:
        _being_written.discard(partial)


def write_manifest(place: Path, step: int) -> None:
    """The size and hash of each file, all of them on the disk before the manifest is."""
    files = sorted(path for path in place.iterdir() if path.is_file())
    for path in files:
        flush(path)
    listed = {path.name: {"bytes": path.stat().st_size, "sha256": hash_of(path)} for path in files}
    text = json.dumps({"format": FORMAT, "step": step, "files": listed}, indent=1)
    (place / MANIFEST).write_text(text + "\n", encoding="utf-8", newline="\n")
    flush(place / MANIFEST)
    flush(place)


def flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk: a power cut takes what is only in memory."""
    if path.is_dir() and os.name == "nt":  # Windows cannot open a folder, and writes names in order
        return
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def set_aside(place: Path) -> str:
    """Rename a step behind the newest to `step-N.set-aside`, or `step-N.set-aside-2`, ...; says so."""
    names = [f"{place.name}.set-aside", *(f"{place.name}.set-aside-{i}" for i in range(2, 1000))]
    free = next(name for name in names if not (place.parent / name).exists())
    place.rename(place.parent / free)
    return f"{place.parent.name}/{place.name} is of a run that was gone back on: it is set aside as {free}."


def delete(places: Iterable[Path]) -> None:
    """Delete checkpoints; a kill in the middle leaves no half of one under its name."""
    for place in places:
        try:
            doomed = hidden(place.parent, int(STEP.fullmatch(place.name).group(1)), "deleted")
            place.rename(doomed)
            shutil.rmtree(doomed)
        except OSError as error:
            logger.warning("%s could not be deleted (%s): it stays.", place, error.strerror)


def clear(folder: Path) -> None:
    """Remove what runs that are dead left half done."""
    bring_back(folder)
    for path, _, process in hidden_in(folder):
        if path not in _being_written and not (process != os.getpid() and alive(process)):
            shutil.rmtree(path, ignore_errors=True)


def bring_back(folder: Path) -> None:
    """If a process died in `publish` between two renames, there is no step-N, but the one to be replaced: rename it."""
    for path, name, _ in hidden_in(folder):
        if path.name.endswith(".replaced") and not (folder / name).exists():
            with suppress(OSError):  # a folder that may only be read
                path.rename(folder / name)


def hidden(folder: Path, step: int, kind: str) -> Path:
    return folder / f".step-{step}.{os.getpid()}.{kind}"


def hidden_in(folder: Path) -> list[tuple[Path, str, int]]:
    """(path, step-N, process) of what is being written, replaced or deleted."""
    paths = sorted(folder.iterdir()) if folder.is_dir() else []
    return [(path, found[1], int(found[2])) for path in paths if (found := HIDDEN.fullmatch(path.name))]


def alive(process: int) -> bool:
    """Whether a process of this number runs on this machine."""
    if os.name == "nt":  # there, os.kill(pid, 0) ends the process
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it is another user's
        return True
    return True
