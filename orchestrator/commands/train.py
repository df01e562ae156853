"""Train a GPT-2: from a text to a folder with the model, its figures, and checkpoints to go on from.

The same as `python train.py`: every option stands in `orchestrator/training/options.py`, with its meaning. A run can be
stopped at any moment and gone on with; docs/TRAINING.md says how, and what a run leaves.
"""

import argparse
from collections.abc import Sequence

from orchestrator.answered import answered

HELP = "train a GPT-2 on a data set or a text of your own (the same as `python train.py`)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """None: `cli.py` hands what follows the command to `run_command`, where tyro reads it into a dataclass."""


def run_command(argv: Sequence[str] | None = None) -> int:
    """Read the options, train, and return the exit code."""
    from orchestrator.training import job  # here: the other commands start faster without it
    from orchestrator.training.options import parse

    return job.run(parse(argv))


def main(argv: Sequence[str] | None = None) -> int:
    """What `train.py` runs."""
    return answered(lambda: run_command(argv))
