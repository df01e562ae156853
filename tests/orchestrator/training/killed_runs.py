"""The runs that the tests kill, fill the disk of, and go on with: each a real process, see `forks.py`."""

import json
import os
import resource
from pathlib import Path

import torch

from orchestrator.training.checkpoint import Checkpoints, find, restore
from orchestrator.training.loop import train
from orchestrator.training.rng import random_states, restore_random_states
from orchestrator.training.state import TrainState
from tests.orchestrator.training.small_runs import Digests, fresh, samples, set_seeds, settings

# Half a million weights: writing them takes long enough to be killed in the middle.
CFG = {"context_length": 32, "emb_dim": 128, "n_heads": 4, "n_layers": 2, "drop_rate": 0.1}


class Log(Digests):
    """Writes a line for each step, (step, hash of everything, loss), at once."""

    def __init__(self, state, path: Path):
        super().__init__(state, python=True)
        self.descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def step(self, record):
        super().step(record)
        line = json.dumps([record.step, self.of[record.step], record.loss])
        os.write(self.descriptor, f"{line}\n".encode())


def run(out: str, log: str, max_steps: int, every: int) -> None:
    """Begin, or go on with what is in `out`, to the end."""
    set_seeds(3)
    folder = Path(out) / "checkpoints"
    state = fresh(settings(max_steps=max_steps, eval_steps=5, eval_tokens=256), **CFG)
    found = find(folder)
    if found is not None:
        restore(found, state)
    with Checkpoints(folder, every=every) as checkpoints:
        train(
            state.model, samples(32), state.settings, state=state, watch=Log(state, Path(log)), checkpoints=checkpoints
        )


def run_on_a_full_disk(out: str, most_bytes: int, full_from: int, full_until: int, max_steps: int = 8) -> int:
    """No file can be longer than `most_bytes` while the step is from `full_from` to before `full_until`.

    The system's own limit: what writes gets the error that a full disk gives, in the middle of a file. Returns 3 where
    the end of the run is an OSError.
    """
    state = fresh(settings(max_steps=max_steps))

    class Disk(Digests):
        def step(self, record):
            super().step(record)
            checkpoints.wait()  # what was given to it before is written under the limit of before
            full = full_from <= record.step < full_until
            resource.setrlimit(
                resource.RLIMIT_FSIZE, (most_bytes if full else resource.RLIM_INFINITY, resource.RLIM_INFINITY)
            )

    said, code = [], 0
    try:
        with Checkpoints(Path(out) / "checkpoints", every=2, keep_last=9, say=said.append) as checkpoints:
            train(state.model, samples(), state.settings, state=state, watch=Disk(state), checkpoints=checkpoints)
            said.append(f"trained to step {state.counters.step}")
    except OSError as error:
        said.append(f"the end: {error}")
        code = 3
    set_limit(resource.RLIM_INFINITY)  # what is printed goes to a file too
    print("\n".join(said))
    return code


def set_limit(most_bytes: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, resource.RLIM_INFINITY))


def run_in_parts(
    out: str,
    log: str,
    part: str,
    until: int | None = None,
    pack_documents: bool = False,
    cfg: dict | None = None,
    **changes,
) -> None:
    """Twelve steps with dropout, in one go or in two.

    Args:
        part: "from the beginning"; "gone on": from the checkpoint; or the name of what is then left out of it.
        until: stop before this step, and save.
        cfg: keys of the model's cfg dict.
        changes: of the settings.
    """
    given = settings(**changes)
    set_seeds(3 if part == "from the beginning" else 8)
    state = fresh(given, **(cfg or {}))
    if state.scaler.is_enabled():  # one that changes in a dozen steps
        state.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**13, growth_interval=2)
    folder = Path(out) / "checkpoints"
    if part != "from the beginning":
        new, states = fresh(given, **(cfg or {})), random_states()
        restore(find(folder), state)
        leave_out(part, state, new, states)
    with Checkpoints(folder, every=100) as checkpoints:
        stop = lambda: "enough" if state.counters.step == until else None  # noqa: E731
        watch = Log(state, Path(log))
        data = samples(pack_documents=pack_documents)
        train(state.model, data, given, state=state, watch=watch, checkpoints=checkpoints, stop=stop)


def leave_out(part: str, state: TrainState, new: TrainState, states: dict) -> None:
    """Undo one part of `restore`, as if it had not been saved."""
    match part:
        case "weights":
            state.model.load_state_dict(new.model.state_dict())
        case "optimizer":
            state.optimizer.load_state_dict(new.optimizer.state_dict())
        case "scaler":
            state.scaler.load_state_dict(new.scaler.state_dict())
        case "data position":
            state.counters.sample = 0
        case "schedule":
            state.counters.step -= 1
        case "torch" | "python" | "numpy":
            restore_random_states({part: states[part]}, say=lambda line: None)
        case _:
            assert part == "gone on"
