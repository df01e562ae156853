"""The random states of every library, as tensors and plain data: with them, dropout goes on where it stopped.

Safe data only: a pickle could run code when it is read, so none is made, and the states of Python and numpy are taken
apart into lists of numbers.
"""

import logging
import random
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

logger = logging.getLogger("orchestrator")


def random_states() -> dict[str, Tensor | dict]:
    """Where the generators stand: "python", "numpy", "torch" (its CPU), and "cuda:0", ..., "mps" where they are in use.

    Returns:
        JSON-ready dicts for Python and numpy, (n,) uint8 tensors for torch.
    """
    version, numbers, gauss = random.getstate()
    states = {
        "python": {"version": version, "numbers": list(numbers), "gauss": gauss},
        "numpy": plain(np.random.get_state(legacy=False)),
        "torch": torch.get_rng_state(),
    }
    return states | {name: read() for name, (read, _) in devices().items()}


def restore_random_states(states: Mapping[str, Tensor | dict], say: Callable[[str], None] = logger.warning) -> None:
    """Put every generator back to where `random_states` found it.

    A machine with other devices gets as far as it goes: what is not here or does not fit is named, and left out.

    Args:
        say: is given a line for each generator that could not be put back.
    """
    write = {"python": set_python, "numpy": set_numpy, "torch": torch.set_rng_state}
    write |= {name: put for name, (_, put) in devices().items()}
    for name in sorted(states.keys() | write.keys()):
        if name not in write:
            say(f"the random state of {name} was saved, and {name} is not in use here: what it draws will differ.")
        elif name not in states:
            say(f"no random state of {name} was saved: it goes on from the seed, and what it draws will differ.")
        else:
            try:
                write[name](states[name])
            except (RuntimeError, TypeError, ValueError, KeyError, OverflowError) as error:
                say(f"the random state of {name} does not fit this version of it ({error}): what it draws will differ.")


def devices() -> dict[str, tuple[Callable[[], Tensor], Callable[[Tensor], None]]]:
    """How to read and to set the generator of each accelerator; none is woken that this process does not use."""
    found = {}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        for i in range(torch.cuda.device_count()):
            found[f"cuda:{i}"] = (
                lambda i=i: torch.cuda.get_rng_state(i),
                lambda state, i=i: torch.cuda.set_rng_state(state, i),
            )
    if torch.backends.mps.is_available():
        found["mps"] = (torch.mps.get_rng_state, torch.mps.set_rng_state)
    return found


def set_python(state: Mapping) -> None:
    random.setstate((state["version"], tuple(state["numbers"]), state["gauss"]))


def set_numpy(state: Mapping) -> None:
    np.random.set_state({**state, "state": {**state["state"], "key": np.array(state["state"]["key"], dtype=np.uint32)}})


def plain(value):
    """Nested dicts with numpy's arrays and numbers -> the same in Python's own lists and numbers."""
    if isinstance(value, Mapping):
        return {key: plain(part) for key, part in value.items()}
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else value
