"""The learner's file, as a module. It is executed, as `python FILE` would; files beside it can be imported."""

import importlib.util
import linecache
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[3]
DEFAULT = Path("exercises") / "adapters.py"


def find(file: str | Path | None) -> Path:
    """The file that is meant: the one that is named, or the project's own.

    Raises:
        FileNotFoundError: it is not there, or no Python file.
    """
    path = Path(file) if file is not None else (DEFAULT if DEFAULT.is_file() else ROOT / DEFAULT)
    if not path.is_file() or path.suffix != ".py":
        raise FileNotFoundError(f"--file expects a Python file, got {str(path)!r}, which is none or is not there.")
    return path.resolve()


@contextmanager
def loaded(path: Path) -> Iterator[ModuleType]:
    """`with loaded(path) as module: ...`; afterwards Python has forgotten it, and what it imported from its folder.

    Why forgotten: whoever checks again in the same process, in a notebook for one, has changed the file.

    Raises:
        ValueError: it cannot be imported; with the learner's error, and the line that it is about.
    """
    folder, name = str(path.parent), f"exercise_{path.stem}"
    before = set(sys.modules)
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    bytecode, sys.dont_write_bytecode = sys.dont_write_bytecode, True  # a stale one could be taken for a fresh file
    sys.path.insert(0, folder)
    sys.modules[name] = module  # dataclasses and pickle look a class up by its module's name
    try:
        try:
            spec.loader.exec_module(module)
        except (Exception, SystemExit) as error:
            raise ValueError(what_is_wrong(path, error)) from error
        yield module
    finally:
        sys.path.remove(folder)
        sys.dont_write_bytecode = bytecode
        for added in set(sys.modules) - before:
            file = getattr(sys.modules[added], "__file__", None)
            if added == name or (file and Path(file).resolve().parent == path.parent):
                del sys.modules[added]


def what_is_wrong(path: Path, error: BaseException) -> str:
    """FILE:LINE and the error; below them, once, the line of the source, and a caret where Python stopped reading."""
    about, column = next(iter(str(error).splitlines()), ""), 0
    file, line = last_line(error, path)
    linecache.checkcache(str(file))  # in a notebook it may have changed since
    text = linecache.getline(str(file), line) if line else ""
    if isinstance(error, SyntaxError):  # it carries the place in itself, and in its text once more
        about, column = error.msg or about, error.offset or 0
        if error.lineno and error.filename:
            file, line, text = Path(error.filename), error.lineno, error.text or ""
    place = f"{file.name}:{line}" if line else file.name
    imported = "" if file == path else f", which {path.name} imports,"
    said = f"{type(error).__name__}: {about}" if about else type(error).__name__
    message = f"{place}{imported} cannot be imported: {said}."
    shown = text.strip()
    if not shown:
        return message
    column -= len(text) - len(text.lstrip())
    before = "".join(letter if letter == "\t" else " " for letter in shown[: max(column - 1, 0)])
    return f"{message}\n    {shown}" + f"\n    {before}^" * (column > 0)


def last_line(error: BaseException, path: Path) -> tuple[Path, int | None]:
    """The last file of the learner's folder, and the line in it, that the error came through."""
    file, line, trace = path, None, error.__traceback__
    while trace is not None:
        passed = Path(trace.tb_frame.f_code.co_filename)
        if passed.parent == path.parent:
            file, line = passed, trace.tb_lineno
        trace = trace.tb_next
    return file, line
