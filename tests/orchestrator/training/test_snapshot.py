"""What a checkpoint holds comes back bit by bit, or is refused before anything is changed."""

import json
import random

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from GPT2Model.gpt2 import GPTModel
from orchestrator.training.checkpoint_folder import damages
from orchestrator.training.optimizer import MuonAndAdamW
from orchestrator.training.snapshot import restore, take_copy
from orchestrator.training.state import TrainState
from tests.orchestrator.training.small_runs import CFG, digest, fresh, go_on, samples, settings

RUNS = {
    "adamw": ({}, {}),
    "muon": ({"optimizer": "muon"}, {}),
    "fp16": ({"dtype": "fp16"}, {}),
    "bf16": ({"dtype": "bf16"}, {}),
    "no bias, head of its own": ({}, {"qkv_bias": False, "tie_weights": False}),
    "shared key-value heads": ({}, {"n_kv_heads": 1}),
    "activation checkpointing": ({"activation_checkpointing": True}, {}),
}


def scaler_that_moves(state: TrainState) -> TrainState:
    """Under fp16: a scaler whose scale has changed after five steps, down and up."""
    if state.scaler.is_enabled():
        state.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**13, growth_interval=2)
    return state


def saved(state: TrainState, place, facts=None):
    place.mkdir(parents=True)
    take_copy(state, facts or {}).write(place)
    return place


def scramble() -> None:
    """A new process has other random states."""
    torch.manual_seed(99)
    random.seed(99)
    np.random.seed(99)


@pytest.mark.parametrize("name", RUNS)
def test_everything_comes_back_bit_by_bit(tmp_path, name):
    changes, cfg = RUNS[name]
    state = scaler_that_moves(fresh(settings(**changes), **cfg))
    go_on(state, until=5)
    state.validation_loss = 1 / 3
    place, before = saved(state, tmp_path / "step-5"), digest(state)
    assert state.counters.step == 5

    scramble()
    again = fresh(settings(**changes), seed=1, **cfg)
    assert digest(again) != before
    restore(place, again)
    assert digest(again) == before
    assert (again.counters, again.validation_loss) == (state.counters, 1 / 3)
    if state.scaler.is_enabled():
        assert state.counters.skipped == 0  # an overflow under fp16 is no fault
        assert again.scaler.get_scale() == state.scaler.get_scale() != 65536.0


def test_a_checkpoint_is_a_folder_that_from_pretrained_opens(tmp_path):
    state = fresh(settings())
    go_on(state, until=3)
    model = GPTModel.from_pretrained(saved(state, tmp_path / "step-3"))
    assert model.cfg == state.model.cfg
    ids = samples().batch(0, 2).inputs
    assert torch.equal(model(ids), state.model.eval()(ids))
    assert model.head.weight is model.token_embedding.weight
    assert "lm_head.weight" not in load_file(tmp_path / "step-3" / "model.safetensors")  # stored once


def test_a_tied_head_stays_tied_and_goes_on_learning_as_one(tmp_path):
    state = fresh(settings())
    go_on(state, until=3)
    again = fresh(settings(), seed=1)
    restore(saved(state, tmp_path / "step-3"), again)
    assert again.model.head.weight is again.model.token_embedding.weight
    assert go_on(again).of == go_on_from(state, tmp_path / "step-3").of


def go_on_from(state: TrainState, place):
    """The run itself, with the random states that its checkpoint has."""
    restore(place, state)
    return go_on(state)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_the_optimizer_goes_by_names_whatever_the_order(tmp_path, kind):
    state = fresh(settings(optimizer=kind))
    go_on(state, until=3)
    place = saved(state, tmp_path / "step-3")
    again = fresh(settings(optimizer=kind), seed=1)
    for part in getattr(again.optimizer, "parts", [again.optimizer]):
        for group in part.param_groups:
            group["params"].reverse()
    restore(place, again)
    weights = dict(again.model.named_parameters())
    for name, weight in state.model.named_parameters():
        for what, value in state.optimizer.state[weight].items():
            assert torch.equal(again.optimizer.state[weights[name]][what], value), (name, what)
    assert isinstance(again.optimizer, MuonAndAdamW) == (kind == "muon")


def test_going_on_does_not_change_the_files_that_it_came_from(tmp_path):
    """What is read from a file may be the file itself, mapped into memory; an optimizer works in place."""
    state = fresh(settings())
    go_on(state, until=3)
    place = saved(state, tmp_path / "step-3")
    contents = {path: path.read_bytes() for path in place.iterdir()}
    expected = go_on_from(fresh(settings(), seed=1), place).of
    assert {path: path.read_bytes() for path in place.iterdir()} == contents
    again = fresh(settings(), seed=1)
    restore(place, again)
    for path, content in contents.items():
        path.write_bytes(bytes(len(content)))  # nor do the files change what was read from them
    assert go_on(again).of == expected
    assert not any(any(path.read_bytes()) for path in contents)


def test_a_learning_rate_that_was_lowered_stays_lowered(tmp_path):
    state = fresh(settings())
    go_on(state, until=3)
    again = fresh(settings(learning_rate=1e-4, weight_decay=0.3), seed=1)
    restore(saved(state, tmp_path / "step-3"), again)
    assert [group["peak"] for group in again.optimizer.param_groups] == [1e-4, 1e-4]
    assert again.optimizer.param_groups[0]["weight_decay"] == 0.3


def test_the_facts_of_a_run_come_back_and_the_true_cfg_and_settings_are_among_them(tmp_path):
    state = fresh(settings(learning_rate=2e-3))
    place = saved(state, tmp_path / "step-0", {"tokenizer": {"name": "bytes"}, "cfg": "stale"})
    facts = restore(place, state)
    assert facts["tokenizer"] == {"name": "bytes"}
    assert facts["cfg"] == state.model.cfg
    assert facts["settings"]["learning_rate"] == 2e-3
    record = json.loads((place / "state.json").read_text())
    assert record["versions"]["torch"] == torch.__version__
    assert record["versions"].keys() >= {"python", "numpy", "gpt2-from-scratch"}


def refused(place, state: TrainState) -> str:
    before = digest(state)
    with pytest.raises(ValueError, match="is of another run:") as error:
        restore(place, state)
    assert digest(state) == before, "something was changed before it was compared"
    return str(error.value)


def test_another_architecture_is_refused_with_every_difference(tmp_path):
    state = fresh(settings())
    go_on(state, until=2)
    place = saved(state, tmp_path / "step-2")
    changes = {"n_layers": 3, "n_heads": 4, "emb_dim": 32, "tie_weights": False, "drop_rate": 0.2}
    message = refused(place, fresh(settings(), **changes))
    for name, value in changes.items():
        assert f"cfg: {name}: {ours(name)!r} was saved, {value!r} is asked for" in message
    assert f"--model {place}" in message


def ours(name: str):
    return {"tie_weights": True, **CFG}[name]


def test_how_attention_is_computed_is_no_architecture(tmp_path):
    state = fresh(settings())
    again = fresh(settings(), seed=1, attn_implementation="eager", attn_strict=True, init_std=0.3)
    restore(saved(state, tmp_path / "step-0"), again)
    assert digest(again) == digest(state)


def test_tensors_that_do_not_fit_are_listed_where_the_cfg_says_the_same(tmp_path):
    place = saved(fresh(settings()), tmp_path / "step-0")
    other = fresh(settings())
    other.model.position_embedding = torch.nn.Embedding(8, 16)
    other.model.extra = torch.nn.Linear(2, 2, bias=False)
    del other.model.final_norm.bias
    message = refused(place, other)
    assert "position_embedding.weight has shape (16, 16), and (8, 16) was expected" in message
    assert "extra.weight is missing" in message
    assert "final_norm.bias is not part of this model" in message


def test_another_optimizer_is_refused(tmp_path):
    state = fresh(settings())
    go_on(state, until=2)
    message = refused(saved(state, tmp_path / "step-2"), fresh(settings(optimizer="muon")))
    assert "optimizer: ['AdamW'] was saved, ['Muon', 'AdamW'] is asked for" in message


def test_weights_of_another_type_are_refused(tmp_path):
    place = saved(fresh(settings()), tmp_path / "step-0")
    state = fresh(settings())
    state.model.to(torch.float64)
    assert "final_norm.weight: 'torch.float32' was saved, 'torch.float64' is asked for" in refused(place, state)


def test_a_weight_that_does_not_learn_any_more_is_refused(tmp_path):
    state = fresh(settings())
    go_on(state, until=2)
    other = fresh(settings())
    group = other.optimizer.param_groups[0]
    group["params"] = [weight for weight in group["params"] if weight is not other.model.token_embedding.weight]
    message = refused(saved(state, tmp_path / "step-2"), other)
    assert "the optimizer remembered token_embedding.weight/exp_avg" in message


def test_a_run_can_change_its_dtype(tmp_path):
    """fp16 has a scaler and fp32 has none: the one begins anew, the other is left out."""
    half, full = fresh(settings(dtype="fp16")), fresh(settings())
    go_on(half, until=2)
    restore(saved(half, tmp_path / "step-2"), full)
    assert full.counters.step == 2
    go_on(full, until=4)
    half = fresh(settings(dtype="fp16"))
    restore(saved(full, tmp_path / "step-4"), half)
    assert half.scaler.get_scale() == 65536.0
    assert go_on(half).losses.keys() == set(range(5, 13))


@pytest.mark.parametrize("name", ["state.json", "random.json", "model.safetensors", "optimizer.safetensors"])
def test_a_file_that_cannot_be_read_is_no_traceback(tmp_path, name):
    state = fresh(settings())
    place = saved(state, tmp_path / "step-0")
    (place / name).write_bytes(b"\xff\x00 nothing")
    before = digest(state)
    with pytest.raises(ValueError, match=r"step-0 (cannot be read|is no checkpoint)"):
        restore(place, state)
    assert digest(state) == before
    assert damages(place) == ["manifest.json is missing"]  # which `find` sees first
