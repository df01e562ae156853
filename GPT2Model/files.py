"""Files written beside their place and then renamed: after an error the old ones are there, or the new, never half."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write(path beside)` fill a file, and rename it to its place when it is whole."""
    replace_files({path: write})


def replace_text(path: Path, text: str) -> None:
    """Write a text, UTF-8 with plain line ends."""
    replace_file(path, lambda beside: beside.write_text(text, encoding="utf-8", newline="\n"))


def replace_files(writers: Mapping[Path, Callable[[Path], object]]) -> None:
    """Let each writer fill a file beside its place, and rename them when all are whole: old ones, or new ones."""
    beside = {path: path.with_name(f".{path.name}.{os.getpid()}.partial") for path in writers}
    try:
        for path, write in writers.items():
            write(beside[path])
        for path, partial in beside.items():
            os.replace(partial, path)
    finally:
        for partial in beside.values():
            partial.unlink(missing_ok=True)
