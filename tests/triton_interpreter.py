"""Our GPU kernels where there is no GPU: in Triton's interpreter. With a GPU the same tests run on it, compiled.

Triton decides at its first import whether it compiles or interprets, so `tests/conftest.py` imports it here before
anything else does. Whether flash_triton *serves* on a CPU is asked anew at every call, and only the fixture `kernels`
says yes: for all other tests it stays what it is for a user.
"""

import importlib
import inspect
import os
import sys
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path

import torch

KERNELS = "CMHA.implementations.flash_triton_kernels"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def import_as_interpreter() -> None:
    """Import triton, as an interpreter where there is no GPU to compile for, and our kernels; if there is a triton."""
    if find_spec("triton") is None:
        return
    if DEVICE == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
        make_it_faster(importlib.import_module("triton.runtime.interpreter"))
    import_kernels()
    os.environ.pop("TRITON_INTERPRET", None)


def import_kernels() -> None:
    """As they stand in their file: the tests' check of shapes wraps every function, and triton reads their source."""
    path = Path(__file__).parent.parent.joinpath(*KERNELS.split(".")).with_suffix(".py")
    spec = spec_from_file_location(KERNELS, path)
    sys.modules[KERNELS] = module_from_spec(spec)
    spec.loader.exec_module(sys.modules[KERNELS])


def make_it_faster(interpreter) -> None:
    """Let the interpreter prepare `triton.language` once for a kernel, and not again for every helper that it calls.

    It changes no number. It makes the tests of the kernels two to three times faster.
    """
    run, prepare = interpreter.GridExecutor.__call__, interpreter._patch_lang
    running = []  # for each kernel that runs: the modules that are prepared for it

    def run_once_prepared(self, *args, **kwargs):
        running.append(set())
        try:
            return run(self, *args, **kwargs)
        finally:
            running.pop()

    def prepare_once(function):
        modules = frozenset(id(value) for value in function.__globals__.values() if inspect.ismodule(value))
        if running and modules in running[-1]:
            return None
        if running:
            running[-1].add(modules)
        return prepare(function)

    interpreter.GridExecutor.__call__, interpreter._patch_lang = run_once_prepared, prepare_once
