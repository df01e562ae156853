"""Which parameters decay, who sees to which, and what a step of Muon is."""

import re

import pytest
import torch

from GPT2Model.config import from_preset
from GPT2Model.gpt2 import GPTModel
from orchestrator.training.loop import set_learning_rate, start, train
from orchestrator.training.optimizer import MuonAndAdamW, decay_groups, make_optimizer
from tests.orchestrator.training.small import UnequalRows, memories_of, recipe, small_model

# GPT-2's own names say what each tensor is; this rule reads the name alone, the code reads the shape alone.
DECAYS = re.compile(
    r"(token|position)_embedding\.weight|blocks\.\d+\.(attention\.(W_qkv|out_proj)|feed_forward\.(up|down)_proj)\.weight"
)
BLOCK_MATRIX = re.compile(r"blocks\.\d+\.(attention\.(W_qkv|out_proj)|feed_forward\.(up|down)_proj)\.weight")


def names_in(model, parameters) -> set[str]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(parameter)] for parameter in parameters}


def test_the_decay_groups_of_gpt2_are_gpt2s():
    with torch.device("meta"):
        model = GPTModel(from_preset("gpt2"))
    decayed, kept = decay_groups(model, 0.1)
    names = {name for name, _ in model.named_parameters()}
    assert len(names) == 2 + 12 * 12 + 2 == 148  # the tied head is not one of its own
    assert names_in(model, decayed["params"]) == {name for name in names if DECAYS.fullmatch(name)}
    assert names_in(model, kept["params"]) == {name for name in names if not DECAYS.fullmatch(name)}
    assert (len(decayed["params"]), len(kept["params"])) == (50, 98)
    e, v, t = 768, 50257, 1024
    assert sum(p.numel() for p in decayed["params"]) == (v + t) * e + 12 * 12 * e * e
    assert sum(p.numel() for p in kept["params"]) == 12 * (3 * e + e + 4 * e + e + 4 * e) + 2 * e
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.1, 0.0)


def test_an_untied_head_decays_too_and_what_is_frozen_is_in_no_group():
    model = small_model(tie_weights=False)
    model.position_embedding.weight.requires_grad_(False)
    decayed, kept = decay_groups(model, 0.1)
    assert "head.weight" in names_in(model, decayed["params"])
    assert "position_embedding.weight" not in names_in(model, decayed["params"] + kept["params"])


def test_muon_gets_the_matrices_of_the_blocks_and_adamw_all_else_in_its_two_groups():
    model = small_model()
    optimizer = make_optimizer(model, 0.01, 0.1, (0.9, 0.95), "muon")
    muon, adamw = optimizer.parts
    assert isinstance(muon, torch.optim.Muon)
    assert isinstance(adamw, torch.optim.AdamW)
    names = {name for name, _ in model.named_parameters()}
    matrices = {name for name in names if BLOCK_MATRIX.fullmatch(name)}
    assert len(matrices) == 4 * 2
    assert names_in(model, [p for group in muon.param_groups for p in group["params"]]) == matrices
    decayed, kept = adamw.param_groups
    assert names_in(model, decayed["params"]) == {"token_embedding.weight", "position_embedding.weight"}
    assert names_in(model, kept["params"]) == names - matrices - names_in(model, decayed["params"])
    assert (decayed["weight_decay"], kept["weight_decay"], muon.param_groups[0]["weight_decay"]) == (0.1, 0.0, 0.1)
    listed = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert len(listed) == len(set(listed)) == len(names)


def newton_schulz(gradient: torch.Tensor) -> torch.Tensor:
    """Five steps of the quintic iteration, in float64: towards U V^T of the gradient's U S V^T."""
    a, b, c = 3.4445, -4.7750, 2.0315
    u, s, v = torch.linalg.svd(gradient / gradient.norm(), full_matrices=False)
    for _ in range(5):
        s = a * s + b * s**3 + c * s**5  # on the singular values alone: the vectors never change
    return u @ torch.diag(s) @ v


def test_one_step_of_muon_is_newton_schulz_on_the_gradient():
    model = small_model()
    optimizer = make_optimizer(model, 0.01, 0.2, (0.9, 0.95), "muon")
    before = {name: parameter.detach().double() for name, parameter in model.named_parameters()}
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step()
    for name, parameter in model.named_parameters():
        if BLOCK_MATRIX.fullmatch(name):
            direction = newton_schulz(parameter.grad.double())
            size = 0.2 * max(parameter.shape) ** 0.5  # a root mean square of about 0.2, as AdamW's steps have
            wanted = before[name] * (1 - 0.01 * 0.2) - 0.01 * size * direction
            off = (parameter.double() - wanted).norm() / (wanted - before[name]).norm()
            assert off < 0.05, name  # torch iterates in bf16
        else:  # after one step AdamW's two memories are the gradient and its square
            decay = 0.2 if parameter.ndim == 2 else 0.0
            move = parameter.grad.double() / (parameter.grad.double().abs() + 1e-8)
            torch.testing.assert_close(
                parameter.double(), before[name] * (1 - 0.01 * decay) - 0.01 * move, rtol=1e-4, atol=1e-6
            )


def test_state_and_groups_of_both_optimizers_show_in_the_pair():
    model = small_model()
    settings = recipe(optimizer="muon", max_steps=2)
    state = start(model, settings)
    train(model, UnequalRows(), settings, state=state, progress=False)
    assert isinstance(state.optimizer, MuonAndAdamW)
    for name, parameter in model.named_parameters():
        wanted = {"momentum_buffer"} if BLOCK_MATRIX.fullmatch(name) else {"step", "exp_avg", "exp_avg_sq"}
        assert set(state.optimizer.state[parameter]) == wanted, name
    assert len(memories_of(state.optimizer)) == 8 + 3 * (len(list(model.parameters())) - 8)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_the_learning_rate_reaches_every_group(kind):
    settings = recipe(optimizer=kind, warmup_steps=4, learning_rate=0.02)
    state = start(small_model(), settings)
    assert set_learning_rate(state.optimizer, 0, settings) == pytest.approx(0.005)
    parts = getattr(state.optimizer, "parts", [state.optimizer])
    found = [group["lr"] for part in parts for group in part.param_groups]
    assert found == pytest.approx([0.005] * (3 if kind == "muon" else 2))


def test_no_gradient_is_left_after_zero_grad_of_the_pair():
    model = small_model()
    optimizer = make_optimizer(model, 0.01, 0.1, (0.9, 0.95), "muon")
    model(torch.zeros(1, 3, dtype=torch.long)).sum().backward()
    optimizer.zero_grad()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_muon_says_where_it_has_nothing_to_do():
    with pytest.raises(ValueError, match="use adamw"):
        make_optimizer(torch.nn.Linear(3, 3), 0.01, 0.1, (0.9, 0.95), "muon")


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_both_optimizers_learn(kind):
    model, settings = small_model(), recipe(optimizer=kind, max_steps=60, learning_rate=1e-2, eval_on_start=True)
    (_, first), (_, last) = train(model, UnequalRows(), settings, progress=False).validation
    assert first > 3
    assert last < 1
