"""TrainSettings: what makes no sense is named, all of it at once."""

import math
from dataclasses import fields

import pytest

from orchestrator.training.settings import TrainSettings
from tests.orchestrator.training.small import RECIPE, recipe

WRONG = {
    "max_steps": [0, -1],
    "batch_size": [0],
    "learning_rate": [-1e-3, math.nan, math.inf, -math.inf],
    "warmup_steps": [-1],
    "min_lr_ratio": [-0.1, 1.1, math.nan],
    "weight_decay": [-0.1, math.nan, math.inf, -math.inf],
    "betas": [(0.9, 1.0), (-0.1, 0.9), (math.nan, 0.9)],
    "clip": [0, -1.0, math.nan, math.inf, -math.inf],
    "eval_steps": [0],
    "seed": [-1, 2**63],
    "gradient_accumulation_steps": [0],
    "decay_part": [-0.1, 1.1, math.nan],
    "loss_chunk_tokens": [-1],
    "eval_tokens": [0],
    "max_bad_steps": [0],
    "schedule": ["linear"],
    "optimizer": ["sgd"],
    "dtype": ["float32", "fp8"],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG.items() for value in values])
def test_a_number_that_makes_no_sense_is_named_with_what_it_is(name, value):
    with pytest.raises(ValueError, match=name) as caught:
        recipe(**{name: value})
    assert repr(value).strip("'") in str(caught.value)
    others = WRONG.keys() - {name}
    assert not [other for other in others if f"{other} must" in str(caught.value)]
    assert str(caught.value).count(f"{name} must") == 1


def test_every_knob_but_the_switches_is_looked_at():
    assert {field.name for field in fields(TrainSettings) if field.type is not bool} == WRONG.keys()


def test_all_problems_are_named_at_once():
    with pytest.raises(ValueError, match="the training settings are wrong") as caught:
        TrainSettings(**{name: values[0] for name, values in WRONG.items()})
    assert all(f"{name} must" in str(caught.value) for name in WRONG)


def test_the_borders_are_allowed():
    borders = {"learning_rate": 0, "warmup_steps": 0, "weight_decay": 0, "seed": 2**63 - 1, "clip": 1e-9}
    recipe(**borders, min_lr_ratio=0, decay_part=1, betas=(0.0, 0.0), loss_chunk_tokens=0)


def test_a_step_reads_batch_times_accumulation():
    assert RECIPE.samples_per_step == 4
    assert recipe(batch_size=3, gradient_accumulation_steps=5).samples_per_step == 15
