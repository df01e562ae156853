"""Activation checkpointing changes what is remembered, and no number."""

import pytest
import torch

from orchestrator.training.loop import batch_loss, train
from orchestrator.training.memory_savers import checkpoint_activations
from tests.orchestrator.training.small import UnequalRows, recipe, same, small_model, weights_of


def step(model, rows) -> tuple[torch.Tensor, list[torch.Tensor]]:
    torch.manual_seed(5)
    loss = batch_loss(model.train(), rows)
    loss.backward()
    return loss.detach(), [parameter.grad for parameter in model.parameters()]


@pytest.mark.parametrize("implementation", ["eager", "sdpa", "flash_tiled"])
@pytest.mark.parametrize("drop_rate", [0.0, 0.3])
def test_gradients_are_the_same_with_dropout_on_too(implementation, drop_rate):
    rows = UnequalRows().batch(0, 4)
    plain, saved = (small_model(drop_rate=drop_rate, attn_implementation=implementation).double() for _ in range(2))
    checkpoint_activations(saved)
    loss, wanted = step(plain, rows)
    loss_again, found = step(saved, rows)
    assert torch.equal(loss, loss_again)
    assert same(found, wanted)
    if drop_rate:
        torch.manual_seed(6)
        assert batch_loss(saved, rows) != loss  # the seed does reach the dropout


def remembered(model, rows) -> int:
    """Bytes that the forward pass keeps for the backward pass, each storage once, the weights left out."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage  # held: an address is never given out twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = batch_loss(model.train(), rows)
    total = sum(storage.nbytes() for storage in kept.values())
    del loss
    return total


def test_far_less_is_remembered_and_each_block_runs_once_more():
    rows = UnequalRows().batch(0, 4)
    plain, saved = small_model(n_layers=4), small_model(n_layers=4)
    checkpoint_activations(saved)
    runs = {}
    for name, model in (("plain", plain), ("saved", saved)):
        runs[name] = 0

        def count(*_, name=name):
            runs[name] += 1

        model.blocks[2].attention.register_forward_hook(count)
        step(model, rows)
    assert runs == {"plain": 1, "saved": 2}
    assert remembered(saved, rows) < 0.4 * remembered(plain, rows)


def test_names_and_weights_stay_and_a_second_call_does_nothing():
    model = small_model()
    names = list(model.state_dict())
    checkpoint_activations(model)
    once = [block.forward for block in model.blocks]
    checkpoint_activations(model)
    assert [block.forward for block in model.blocks] == once
    assert list(model.state_dict()) == names
    x = UnequalRows().batch(0, 2).inputs
    assert torch.equal(model.eval()(x), small_model().eval()(x))


def test_a_run_is_bitwise_the_same():
    weights = []
    for saving in (False, True):
        model = small_model(drop_rate=0.2)
        train(model, UnequalRows(), recipe(activation_checkpointing=saving, dtype="bf16"), progress=False)
        weights.append(weights_of(model))
    assert same(*weights)
