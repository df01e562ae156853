"""The random states of all libraries, as safe data."""

import json
import random

import numpy as np
import pytest
import torch

from orchestrator.training.rng import random_states, restore_random_states


def draws() -> list:
    """From every generator, and a second normal number of Python's, which is kept from the first."""
    return [
        [random.random(), random.gauss(0, 1), random.gauss(0, 1)],
        [*np.random.randn(3).tolist(), int(np.random.randint(1000))],
        [*torch.rand(3).tolist(), *torch.nn.functional.dropout(torch.ones(20), 0.5).tolist()],
    ]


def kept() -> dict:
    """The states after they were written as JSON and read again, tensors aside."""
    states = random_states()
    return {name: value if torch.is_tensor(value) else json.loads(json.dumps(value)) for name, value in states.items()}


def test_what_is_drawn_after_a_state_is_put_back_is_what_was_drawn_after_it_was_taken():
    random.gauss(0, 1)  # leaves half a pair behind, which is a part of the state
    np.random.randn()  # here too
    states = kept()
    first = draws()
    assert draws() != first
    restore_random_states(states)
    assert draws() == first


@pytest.mark.parametrize(("library", "place"), [("python", 0), ("numpy", 1), ("torch", 2)])
def test_each_library_counts(library, place):
    states = kept()
    first = draws()
    lines = []
    restore_random_states({name: state for name, state in states.items() if name != library}, lines.append)
    again = draws()
    assert [a == b for a, b in zip(first, again, strict=True)] == [i != place for i in range(3)]
    assert len(lines) == 1
    assert library in lines[0]


def test_a_state_of_another_machine_is_restored_as_far_as_it_goes_and_the_rest_is_said():
    states, lines = kept(), []
    first = draws()
    states |= {"cuda:7": torch.zeros(16, dtype=torch.uint8), "numpy": {"bit_generator": "MT19937"}}
    restore_random_states(states, lines.append)
    again = draws()
    assert again[0] == first[0]
    assert again[2] == first[2]
    assert len(lines) == 2
    assert "cuda:7 is not in use here" in lines[0]
    assert "numpy does not fit" in lines[1]


def test_nothing_but_tensors_and_plain_data_is_in_it():
    states = random_states()
    assert states["torch"].dtype == torch.uint8
    assert json.loads(json.dumps(states["python"])) == states["python"] | {"numbers": list(states["python"]["numbers"])}
    assert json.loads(json.dumps(states["numpy"])) == states["numpy"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a GPU's generator")
def test_every_gpu_has_its_own_state():
    torch.zeros(1, device="cuda")
    states = kept()
    assert f"cuda:{torch.cuda.device_count() - 1}" in states
    first = torch.rand(3, device="cuda")
    restore_random_states(states)
    assert torch.equal(torch.rand(3, device="cuda"), first)
