"""answered(): a program from its work to its exit code; what a user did wrong ends in one line, not in a traceback."""

import os
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

INTERRUPTED = 130  # what a shell reports of a program that Ctrl-C ended: 128 + SIGINT
NOBODY_READS = 141  # ... that ended because of `| head`: 128 + SIGPIPE
WRONG_INPUT = 2


def answered(work: Callable[[], int]) -> int:
    """Run `work` and return its exit code, or the one that says how it ended.

    Errors that a line of this project raised are for the user: printed in one piece, exit code 2. All others are bugs,
    and their traceback is worth more than a short line.
    """
    try:
        try:
            code = with_errors_explained(work)
        except SystemExit:  # after --help
            print(end="", flush=True)
            raise
        print(end="", flush=True)  # what is buffered: here, since nobody can catch an error when Python ends
        return code
    except BrokenPipeError:  # `| head` has read enough: an end, and nothing to complain of
        turn_to_nowhere()
        return NOBODY_READS


def with_errors_explained(work: Callable[[], int]) -> int:
    for stream in (sys.stdout, sys.stderr):  # a console that is not UTF-8 must not end a run
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        return work()
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        raise
    except (ValueError, TypeError, OSError, ImportError, FloatingPointError, RuntimeError) as error:
        if not _is_ours(error):
            raise
        print(f"error: {error}", file=sys.stderr)
        return WRONG_INPUT


def turn_to_nowhere() -> None:
    """Send what the closed streams still hold to nowhere: Python flushes once more when it ends, and would complain.

    Source: the note on SIGPIPE in the documentation of Python's `signal`.
    """
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:
            with suppress(OSError, ValueError):  # a stream without a file behind it: a notebook's
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, stream.fileno())
                os.close(nowhere)


def _is_ours(error: BaseException) -> bool:
    """Whether the error was raised by a line of this project, as every error for a user is."""
    trace = error.__traceback__
    while trace.tb_next is not None:
        trace = trace.tb_next
    root = Path(__file__).resolve().parent.parent
    raised_in = Path(trace.tb_frame.f_code.co_filename).resolve()
    rooms = ("CMHA", "TransformerBlock", "GPT2Model", "orchestrator")
    return any(raised_in.is_relative_to(root / room) for room in rooms)
