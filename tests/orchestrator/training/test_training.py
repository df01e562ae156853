"""The training loop and its parts, each against a formula or a computation of its own."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from GPT2Model.config import from_preset
from GPT2Model.gpt2 import GPTModel
from orchestrator.text.corpora import IGNORED
from orchestrator.training.loop import TrainSettings, evaluate, next_token_loss, train
from orchestrator.training.optimizer import decay_groups, make_optimizer
from orchestrator.training.schedule import learning_rate

SIZES = {"vocab_size": 23, "context_length": 12, "emb_dim": 24, "n_heads": 3, "n_layers": 2, "drop_rate": 0.0}


class CountingCorpus:
    """Rows that count up modulo 23 from a random start: learnable in seconds. Half of each row's targets is padding."""

    validation = None

    def __init__(self):
        self.validation = [self.batch(-1, 4)]
        self.asked = []

    def batch(self, index, batch_size):
        generator = torch.Generator().manual_seed(index + 10)
        start = torch.randint(23, (batch_size, 1), generator=generator)
        rows = (start + torch.arange(13)) % 23
        targets = rows[:, 1:].clone()
        targets[:, 9:] = IGNORED
        if index >= 0:
            self.asked.append(index)
        return rows[:, :-1], targets


def small_model(seed=0, **changes) -> GPTModel:
    torch.manual_seed(seed)
    return GPTModel({**SIZES, **changes})


RECIPE = TrainSettings(max_steps=60, batch_size=8, learning_rate=5e-3, warmup_steps=5, eval_steps=20)


@given(warmup=st.integers(0, 20), length=st.integers(2, 300), ratio=st.floats(0, 1), peak=st.floats(1e-5, 1.0))
@settings(max_examples=60, deadline=None)
def test_the_learning_rate_rises_to_the_peak_and_falls_to_its_rest(warmup, length, ratio, peak):
    max_steps = warmup + length
    rates = [
        learning_rate(s, peak=peak, warmup_steps=warmup, max_steps=max_steps, min_ratio=ratio) for s in range(max_steps)
    ]
    assert math.isclose(max(rates), peak)
    assert math.isclose(rates[-1], peak * ratio, rel_tol=1e-6, abs_tol=1e-12)
    assert all(a < b for a, b in pairwise(rates[:warmup]))
    assert all(a >= b - 1e-15 for a, b in pairwise(rates[warmup:]))


def test_half_way_down_the_cosine_stands_half_way():
    rates = {"peak": 1.0, "warmup_steps": 10, "max_steps": 111, "min_ratio": 0.2}
    assert learning_rate(60, **rates) == pytest.approx(0.6)
    assert learning_rate(35, **rates) == pytest.approx(0.2 + 0.8 * (1 + math.cos(math.pi / 4)) / 2)


def test_matrices_decay_and_biases_and_norms_do_not_and_the_tied_weight_stands_once():
    model = small_model()
    decayed, kept = decay_groups(model, 0.1)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert all(names[id(p)].endswith("weight") and "norm" not in names[id(p)] for p in decayed["params"])
    assert all("norm" in names[id(p)] or names[id(p)].endswith("bias") for p in kept["params"])
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.1, 0.0)
    listed = [id(p) for group in (decayed, kept) for p in group["params"]]
    assert len(listed) == len(set(listed)) == len(list(model.parameters()))


def test_one_step_of_the_optimizer_is_adamw_by_hand():
    layer = torch.nn.Linear(3, 2).double()
    weight, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    layer(torch.randn(4, 3, dtype=torch.float64)).square().sum().backward()
    optimizer = make_optimizer(layer, learning_rate=0.1, weight_decay=0.2, betas=(0.9, 0.95))
    optimizer.step()
    # after one step both memories, corrected for their start at zero, are the gradient and its square
    move = {p: 0.1 * p.grad / (p.grad.abs() + 1e-8) for p in (layer.weight, layer.bias)}
    torch.testing.assert_close(layer.weight.detach(), weight * (1 - 0.1 * 0.2) - move[layer.weight])
    torch.testing.assert_close(layer.bias.detach(), bias - move[layer.bias])


def test_padding_counts_neither_in_the_sum_nor_in_the_mean_of_the_loss():
    logits = torch.randn(2, 5, 7, dtype=torch.float64)
    targets = torch.randint(7, (2, 5))
    targets[0, 3:] = targets[1, 1:] = IGNORED
    log_p = logits - logits.exp().sum(-1, keepdim=True).log()
    wanted = [(b, t) for b in range(2) for t in range(5) if targets[b, t] != IGNORED]
    by_hand = -sum(log_p[b, t, targets[b, t]] for b, t in wanted)
    torch.testing.assert_close(next_token_loss(logits, targets, "sum"), by_hand)
    torch.testing.assert_close(next_token_loss(logits, targets), by_hand / len(wanted))


def test_evaluation_is_the_mean_over_all_tokens_not_over_batches_and_without_dropout():
    model = small_model(drop_rate=0.5).train()
    corpus = CountingCorpus()
    one = corpus.batch(0, 2)
    other = corpus.batch(1, 3)
    other[1][:, 1:] = IGNORED  # 3 tokens only: a mean of batch means would weigh them like the other 18
    model.eval()
    with torch.no_grad():
        total = sum(next_token_loss(model(x), y, "sum").item() for x, y in (one, other))
    model.train()
    assert evaluate(model, [one, other]) == pytest.approx(total / 21, rel=1e-6)
    assert model.training


def test_one_seed_gives_one_training_run_and_another_seed_another():
    runs = []
    for seed in (0, 0, 1):
        model = small_model(drop_rate=0.1)
        settings_ = TrainSettings(**{**vars(RECIPE), "max_steps": 6, "seed": seed})
        runs.append((train(model, CountingCorpus(), settings_, progress=False), model.state_dict()))
    assert runs[0][0].train == runs[1][0].train
    assert all(torch.equal(runs[0][1][name], runs[1][1][name]) for name in runs[0][1])
    assert runs[0][0].train != runs[2][0].train  # the seed reaches dropout


def test_a_small_model_learns_to_count():
    model, corpus = small_model(), CountingCorpus()
    longer = TrainSettings(max_steps=150, batch_size=8, learning_rate=1e-2, warmup_steps=5, eval_steps=50)
    history = train(model, corpus, longer, progress=False)
    first, last = history.validation[0][1], history.validation[-1][1]
    assert first == pytest.approx(math.log(23), abs=0.2)  # nothing is known at first
    assert last < 0.3  # the next number is certain
    assert corpus.asked == list(range(150))
    assert [step for step, _ in history.validation] == [0, 50, 100, 150]
    assert history.tokens == 150 * 8 * 9
    assert not model.training


def test_three_steps_are_those_of_a_loop_written_out():
    settings_ = TrainSettings(**{**vars(RECIPE), "max_steps": 3})
    trained, corpus = small_model().double(), CountingCorpus()
    train(trained, corpus, settings_, progress=False)
    by_hand = small_model().double().train()
    optimizer = make_optimizer(by_hand, RECIPE.learning_rate, RECIPE.weight_decay, RECIPE.betas)
    for step in range(3):
        x, y = corpus.batch(step, RECIPE.batch_size)
        gradients = torch.autograd.grad(next_token_loss(by_hand(x), y), list(by_hand.parameters()))
        length = sum(g.square().sum() for g in gradients).sqrt()
        for parameter, gradient in zip(by_hand.parameters(), gradients, strict=True):
            parameter.grad = gradient * min(1.0, 1.0 / (length.item() + 1e-6))
        for group in optimizer.param_groups:
            group["lr"] = 5e-3 * (step + 1) / 5
        optimizer.step()
    for (name, one), other in zip(trained.named_parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12, msg=name)


def test_every_implementation_trains_alike():
    losses = {}
    for name in ("eager", "sdpa", "flash_tiled"):
        model = small_model(attn_implementation=name).double()
        losses[name] = [loss for _, loss in train(model, CountingCorpus(), RECIPE, progress=False).train]
    for name in ("sdpa", "flash_tiled"):
        assert max(abs(a - b) for a, b in zip(losses["eager"], losses[name], strict=True)) < 1e-9


def test_a_large_gradient_is_clipped(monkeypatch):
    lengths = []
    real = torch.nn.utils.clip_grad_norm_

    def watched(parameters, limit):
        parameters = list(parameters)
        before = real(parameters, limit)
        after = math.sqrt(sum(p.grad.square().sum().item() for p in parameters))
        lengths.append((before.item(), after, limit))
        return before

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", watched)
    train(
        small_model(), CountingCorpus(), TrainSettings(**{**vars(RECIPE), "max_steps": 3, "clip": 0.01}), progress=False
    )
    assert len(lengths) == 3
    assert all(before > 0.01 and after == pytest.approx(0.01, rel=1e-3) for before, after, _ in lengths)


def test_a_loss_that_is_no_number_stops_with_advice():
    model = small_model()
    with torch.no_grad():
        model.final_norm.bias.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="lower the learning rate"):
        train(model, CountingCorpus(), RECIPE, progress=False)


def test_all_wrong_settings_are_named_at_once():
    with pytest.raises(ValueError, match=r"max_steps.*batch_size.*min_lr_ratio.*clip"):
        TrainSettings(max_steps=0, batch_size=-1, learning_rate=1e-3, warmup_steps=0, min_lr_ratio=2, clip=0)


def test_a_preset_trains_with_the_vocabulary_it_is_given():
    assert GPTModel(from_preset("nano", vocab_size=23)).head.weight.shape == (23, from_preset("nano")["emb_dim"])
