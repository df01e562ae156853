"""The profile of a step: every operator is counted once, in the part that it was for, and no hook stays behind."""

from collections import Counter

import pytest
import torch
from torch.nn import Linear
from torch.profiler import ProfilerActivity, profile

from GPT2Model.config import from_preset
from GPT2Model.generation import generate
from GPT2Model.quantization import Int8Linear, quantize_int8
from orchestrator.evaluation.generation_profile import (
    ATTENTION,
    HEAD,
    MATRICES,
    MOVED,
    OUTSIDE,
    PARTS,
    REST,
    Marks,
    StepWatch,
    part_of,
    part_of_event,
    sort_events,
)
from orchestrator.evaluation.generation_requests import perturbed_model
from orchestrator.serving.engine import Engine

LAYERS = 3


@pytest.fixture(scope="module")
def model():
    return perturbed_model(from_preset("nano", vocab_size=257, n_layers=LAYERS, drop_rate=0.0))


@pytest.fixture(scope="module")
def peer():
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=257, n_embd=48, n_layer=LAYERS, n_head=3, n_positions=64)).eval()


def events_of(model, work) -> list:
    marks = Marks(model)
    try:
        with profile(activities=[ProfilerActivity.CPU]) as profiler, torch.no_grad():
            work()
    finally:
        marks.remove()
    return list(profiler.events())


def leaves(events, *names: str) -> Counter:
    """How often these operators stand in each part."""
    return Counter(part_of_event(event) for event in events if event.name in names)


def one_token(model):
    return lambda: generate(model, torch.tensor([[5]]), 2)


def test_matrix_products_and_attention_are_told_apart(model):
    events = events_of(model, one_token(model))
    # qkv, out, up and down in each layer; two passes
    assert leaves(events, "aten::addmm") == {MATRICES: 2 * 4 * LAYERS}
    assert leaves(events, "aten::mm") == {HEAD: 2}
    assert set(leaves(events, "aten::scaled_dot_product_attention")) == {ATTENTION}
    assert set(leaves(events, "aten::native_layer_norm", "aten::gelu", "aten::argmax")) == {REST}
    assert leaves(events, "aten::copy_")[MOVED] >= 2 * 2 * LAYERS  # keys and values into the cache


def test_transformers_modules_fall_into_the_same_parts(peer):
    events = events_of(peer, lambda: peer(torch.tensor([[5, 6]])))
    assert leaves(events, "aten::addmm") == {MATRICES: 4 * LAYERS}
    assert leaves(events, "aten::mm") == {HEAD: 1}
    assert leaves(events, "aten::scaled_dot_product_attention") == {ATTENTION: LAYERS}


def test_layers_of_int8_weights_fall_into_the_parts_of_those_that_they_stand_for(model):
    small = quantize_int8(model)
    parts, expected = (
        {name: part_of(name, module) for name, module in of.named_modules() if isinstance(module, kind)}
        for of, kind in ((small, Int8Linear), (model, Linear))
    )
    assert parts == expected
    assert Counter(parts.values()) == {MATRICES: 4 * LAYERS, HEAD: 1}


def test_the_pages_that_the_engine_fetches_are_counted_as_moved(model):
    engine = Engine(model, max_running=4)
    for prompt in ([1, 2, 3], [4, 5]):
        engine.add(prompt, 3)
    engine.step()
    events = events_of(model, engine.step)
    assert leaves(events, "aten::index_select")[MOVED] == 2 * 2 * LAYERS  # keys and values of two requests
    assert leaves(events, "aten::index_copy_")[MOVED] == 2 * LAYERS


def test_no_time_is_counted_twice_or_lost(model):
    events = events_of(model, one_token(model))
    parts, names = sort_events(events, "cpu")
    everything = sum(event.self_cpu_time_total for event in events if event.name.startswith("aten::"))
    assert sum(parts.values()) == pytest.approx(everything) == pytest.approx(sum(names.values()))
    assert set(parts) == set(PARTS)
    assert parts[OUTSIDE] == 0  # operators are never outside


@pytest.mark.parametrize("who", ["ours", "theirs"])
def test_a_watch_sees_as_many_steps_as_it_says_and_leaves_nothing_on_the_model(model, peer, who):
    module = model if who == "ours" else peer
    watch = StepWatch(module, steps=2, warm_up=3, tokens=4)
    during = []
    for _ in range(watch.needed):
        assert not watch.done
        with torch.no_grad():
            module(torch.tensor([[5, 6]]))
        watch.step()
        during.append(sum(len(part._forward_hooks) for part in module.modules()))
    assert watch.done
    assert during[:4] == [0] * 4
    assert during[4:6] == [5 * LAYERS + 1] * 2  # four matrices and attention in each layer, and the head
    assert during[6] == 0
    costs = watch.costs
    assert (costs.steps, costs.tokens) == (2, 4)
    assert sum(costs.parts.values()) == pytest.approx(max(costs.bare, sum(costs.parts.values()) - costs.parts[OUTSIDE]))
    assert min(costs.parts[part] for part in (MATRICES, HEAD, ATTENTION)) > 0
    assert 1 <= len(costs.operators) <= 5
