"""The commands of `python -m orchestrator COMMAND`. Each file has HELP, `add_arguments(parser)` and `run(args)`.

`run` returns the exit code; an error that it raises is one line for the user (see `orchestrator/cli.py`). To add a
command, add its file and its line in `COMMANDS`.
"""

from orchestrator.commands import (
    attention_bench,
    check,
    compare_attention,
    doctor,
    estimate,
    experiment,
    generate,
    mistakes,
    parity,
    perplexity,
    prepare,
    train,
)

COMMANDS = {
    "train": train,
    "generate": generate,
    "perplexity": perplexity,
    "prepare": prepare,
    "estimate": estimate,
    "experiment": experiment,
    "compare-attention": compare_attention,
    "doctor": doctor,
    "parity": parity,
    "attention-bench": attention_bench,
    "check": check,
    "mistakes": mistakes,
}
