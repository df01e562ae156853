"""The learner's file, as a module. It is executed, as `python FILE` would; files beside it can be imported."""

import importlib.util
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
        ValueError: it cannot be imported; with the learner's error in one line.
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
            line = getattr(error, "lineno", None) or last_line(error, path.parent)
            place = f", line {line}" if line else ""
            first = next(iter(str(error).splitlines()), "")
            raise ValueError(f"{path.name} cannot be imported: {type(error).__name__}: {first}{place}.") from error
        yield module
    finally:
        sys.path.remove(folder)
        sys.dont_write_bytecode = bytecode
        for added in set(sys.modules) - before:
            file = getattr(sys.modules[added], "__file__", None)
            if added == name or (file and Path(file).resolve().parent == path.parent):
                del sys.modules[added]


def last_line(error: BaseException, folder: Path) -> int | None:
    """The last line of the learner's folder that the error came through."""
    line, trace = None, error.__traceback__
    while trace is not None:
        if Path(trace.tb_frame.f_code.co_filename).parent == folder:
            line = trace.tb_lineno
        trace = trace.tb_next
    return line
