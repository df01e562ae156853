"""The main job, every command, and the experiments, from one door.

    python main.py                        assemble GPT-2, run it, prove that every way of computing attention agrees
    python main.py --train                and let a small model learn to write
    python main.py --experiment quick     speed and memory of training and generation, every implementation: minutes
    python main.py --experiment full      the same with GPT-2 124M: a quarter of an hour on two cores

`--experiment KIND` is the command `experiment KIND`, and takes its options: `python main.py experiment --help`.
Everything else goes to `python -m orchestrator` as it is:
"""

import sys
from collections.abc import Sequence

from orchestrator import cli
from orchestrator.answered import answered
from orchestrator.commands.experiment import experiment_first


def main(argv: Sequence[str] | None = None) -> int:
    """Run what the arguments ask for; the exit code is returned."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv in (["--help"], ["-h"]):
        print(__doc__)
    return answered(lambda: cli.run_arguments(experiment_first(argv)))


if __name__ == "__main__":
    raise SystemExit(main())
