"""What all tests share."""

import importlib

import pytest
import torch

from tests.triton_interpreter import DEVICE, import_as_interpreter

# Tests run beside each other, one process for each core, and their models are small: threads that wait for one another
# would take most of the time.
torch.set_num_threads(1)
import_as_interpreter()


@pytest.fixture
def kernels(monkeypatch):
    """For this test flash_triton serves: on a GPU, or in Triton's interpreter. Gives the device to put tensors on."""
    remembered = importlib.import_module("CMHA.choosing.choose").chosen_once
    if DEVICE == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    remembered.cache_clear()
    yield DEVICE
    remembered.cache_clear()
