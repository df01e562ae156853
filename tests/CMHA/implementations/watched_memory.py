"""Where a kernel reads and writes, in Triton's interpreter: every address is held against the tensors of the call.

What compute-sanitizer does on a GPU. A read behind the end of a tensor often changes no number, so that no comparison
of results would find it; and two programs that write to one number are a race only where they run at once.
"""

from contextlib import contextmanager

import numpy as np
import torch

from CMHA.implementations import flash_triton

OUTPUTS = {"forward": 2, "backward_delta": 1, "backward_dkdv": 2, "backward_dq": 1}  # the last so many tensors


class WrongAccessError(Exception):
    """A kernel touched what is not its own."""


def addresses(tensors) -> np.ndarray:
    """Of every number of these tensors; of their memory, that is, and not of what lies between."""
    found = [np.empty(0, dtype=np.int64)]
    for tensor in tensors:
        steps = [np.arange(size) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True)]
        places = sum(np.ix_(*steps)).ravel() if steps else np.zeros(1, dtype=np.int64)
        found.append(tensor.data_ptr() + places.astype(np.int64) * tensor.element_size())
    return np.unique(np.concatenate(found))


class Watch:
    """Stands for the interpreter's memory: the same loads and stores, each looked at before it happens.

    Attributes:
        wrong: what was wrong first, None so far.
    """

    def __init__(self, real):
        self.real, self.wrong = real, None

    def __getattr__(self, name):
        return getattr(self.real, name)

    def refuse(self, wrong: str):
        self.wrong = wrong
        raise WrongAccessError(wrong)

    def load(self, places, mask, other, dtype):
        asked = np.asarray(places)[np.asarray(mask)].astype(np.int64)
        if not np.isin(asked, self.readable).all():
            self.refuse("a load outside the tensors that the kernel was given to read")
        return self.real.load(places, mask, other, dtype)

    def store(self, places, values, mask):
        asked = np.asarray(places)[np.asarray(mask)].astype(np.int64)
        if not np.isin(asked, self.writable).all():
            self.refuse("a store outside the tensors that the kernel was given to write")
        np.add.at(self.written, np.searchsorted(self.writable, asked), 1)
        return self.real.store(places, values, mask)


@contextmanager
def watched(monkeypatch):
    """While it lasts, a kernel that reads or writes where it must not raises WrongAccessError; and each number of its
    results must have been written exactly once."""
    from triton.runtime import interpreter

    watch, real = Watch(interpreter._interpreter), flash_triton.launch

    def launch(name, programs, tensors, *others):
        given = [tensor for tensor in tensors if tensor is not None]
        outputs = given[-OUTPUTS[name] :]
        watch.readable, watch.writable = addresses(given[: -OUTPUTS[name]]), addresses(outputs)
        watch.written = np.zeros(len(watch.writable), dtype=np.int64)
        for tensor in outputs:
            tensor.fill_(torch.nan)
        real(name, programs, tensors, *others)
        if not (watch.written == 1).all():
            watch.refuse(f"{name} wrote {(watch.written != 1).sum()} numbers never or more than once")

    with monkeypatch.context() as patch:
        patch.setattr(interpreter, "_interpreter", watch)
        patch.setattr(flash_triton, "launch", launch)
        yield watch
