"""Real processes without the wait: one that has imported torch forks a child for each run, to be killed or waited for.

`with Forks() as forks: process = forks.start(run_until_done, out=...)`. A child is a process like any other; only its
imports, which take seconds, are there already. The process that forks has one thread and computes nothing.
"""

import importlib
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


class Forks:
    """The process that forks, as the test sees it."""

    def __init__(self):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.orchestrator.training.forks"],
            cwd=ROOT, env=os.environ | ONE_THREAD, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip

    def start(self, function: Callable, output: Path, **arguments) -> int:
        """Call a function of a module in a child of its own; returns the number of its process.

        Args:
            output: where what it prints goes.
            arguments: JSON-ready.
        """
        return self._ask([f"{function.__module__}:{function.__name__}", str(output), arguments])

    def wait(self, process: int) -> int:
        """Until a child ends; returns its exit code, -9 for SIGKILL. Its number is not given away before."""
        return self._ask(process)

    def _ask(self, question) -> int:
        print(json.dumps(question), file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        assert answer, "the process that forks has died"
        return json.loads(answer)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.stdin.close()
        self.process.wait()


def serve() -> None:
    """Fork a child for each line that is no number, wait for the child that a number names."""
    import torch
    import torch._dynamo  # what the first optimizer of a process imports, which takes two seconds

    import tests.orchestrator.training.killed_runs  # noqa: F401  all else that a run needs, once

    torch.set_num_threads(1)
    for line in sys.stdin:
        question = json.loads(line)
        if isinstance(question, int):
            answer = os.waitstatus_to_exitcode(os.waitpid(question, 0)[1])
        elif (answer := os.fork()) == 0:
            run_in_child(*question)
        print(json.dumps(answer), flush=True)
    os._exit(0)  # taking torch down takes seconds


def run_in_child(name: str, output: str, arguments: dict) -> None:
    """Call `module:function`; the child ends here, whatever happens. 1: an error, its trace is in `output`."""
    code = 1
    try:
        descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for stream in (1, 2):
            os.dup2(descriptor, stream)
        module, function = name.split(":")
        code = getattr(importlib.import_module(module), function)(**arguments) or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    serve()
