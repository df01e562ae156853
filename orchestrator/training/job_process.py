"""A run as a process among others: alone in its folder, and stopped by a signal after the step that it is in."""

import hashlib
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

SIGNALS = {signal.SIGTERM: "SIGTERM", signal.SIGINT: "Ctrl-C"}


@contextmanager
def alone_in(out: Path) -> Iterator[None]:
    """For the time of a `with`, the only run of this machine in a folder.

    Raises:
        ValueError: another process trains there.
    """
    name = hashlib.sha256(str(out.resolve()).encode()).hexdigest()[:16]
    lock = FileLock(Path(tempfile.gettempdir()) / f"gpt2-training-{name}.lock")
    with suppress(OSError):  # another user's file: then nobody can say
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise ValueError(
                f"another process is training in {out}: wait until it has ended, or choose another --out."
            ) from error
    try:
        yield
    finally:
        lock.release(force=True)


@contextmanager
def stop_signal() -> Iterator:
    """For the time of a `with`, SIGTERM and Ctrl-C end the run after its step; a second Ctrl-C ends it at once."""
    asked: list[str] = []

    def note(number, frame):
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.append(SIGNALS[number])

    before = {number: signal.signal(number, note) for number in SIGNALS}
    try:
        yield lambda: asked[0] if asked else None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
