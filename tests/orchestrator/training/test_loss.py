"""The loss in chunks is the loss; a step's loss and gradient are those of all its tokens, however they are divided."""

import itertools

import pytest
import torch

from orchestrator.text.corpora import IGNORED
from orchestrator.text.samples import Batch
from orchestrator.training.loop import accumulate_gradients, batch_loss, count_targets
from orchestrator.training.loss import chunked_next_token_loss, next_token_loss, without_head
from orchestrator.training.memory_savers import checkpoint_activations
from orchestrator.training.precision import Precision
from tests.orchestrator.training.small import UnequalRows, recipe, small_model

FP32 = Precision("fp32", "cpu")  # no autocast: a model in float64 stays there


def loss_by_hand(model, inputs, targets) -> torch.Tensor:
    """The mean over all predicted tokens of -log p, one token after the other."""
    logits = model(inputs)
    found = []
    for row, column in (targets != IGNORED).nonzero().tolist():
        scores = logits[row, column]
        found.append(scores.exp().sum().log() - scores[targets[row, column]])
    return torch.stack(found).mean()


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def farthest(one: dict, other: dict) -> float:
    """The largest relative distance between two gradients of the same parameter."""
    return max(((one[name] - other[name]).norm() / other[name].norm()).item() for name in other)


def of_the_whole_batch(rows) -> tuple[float, dict[str, torch.Tensor]]:
    model = small_model().double().train()
    loss = loss_by_hand(model, rows.inputs, rows.targets)
    loss.backward()
    return loss.item(), gradients(model)


@pytest.mark.parametrize("parts", [1, 2, 3, 6])
@pytest.mark.parametrize(("chunk", "activations"), list(itertools.product([0, 1, 5, 1000], [False, True])))
def test_the_gradient_of_an_accumulated_batch_is_that_of_the_whole_batch(parts, chunk, activations):
    rows = UnequalRows().batch(0, 6)
    assert len({int(count) for count in (rows.targets != IGNORED).sum(dim=1)}) > 3  # unequal counts of tokens
    wanted_loss, wanted = of_the_whole_batch(rows)
    model = small_model().double().train()
    if activations:
        checkpoint_activations(model)
    batches = [Batch(x, y) for x, y in zip(rows.inputs.chunk(parts), rows.targets.chunk(parts), strict=True)]
    loss = accumulate_gradients(model, batches, recipe(loss_chunk_tokens=chunk), FP32)
    assert loss == pytest.approx(wanted_loss, rel=1e-12)
    assert farthest(gradients(model), wanted) < 1e-12


def test_a_mean_of_means_would_be_another_gradient():
    rows = UnequalRows().batch(0, 6)
    wanted_loss, wanted = of_the_whole_batch(rows)
    model = small_model().double().train()
    means = [loss_by_hand(model, x, y) / 3 for x, y in zip(rows.inputs.chunk(3), rows.targets.chunk(3), strict=True)]
    for mean in means:
        mean.backward()
    assert abs(sum(means).item() - wanted_loss) > 1e-3
    assert farthest(gradients(model), wanted) > 1e-2


def test_a_batch_of_padding_alone_adds_nothing():
    rows = UnequalRows().batch(0, 2)
    wanted_loss, wanted = of_the_whole_batch(rows)
    for chunk in (0, 5):
        model = small_model().double().train()
        empty = Batch(rows.inputs, torch.full_like(rows.targets, IGNORED))
        loss = accumulate_gradients(model, [rows, empty], recipe(loss_chunk_tokens=chunk), FP32)
        assert loss == pytest.approx(wanted_loss, rel=1e-12)
        assert farthest(gradients(model), wanted) < 1e-12


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("chunk", [1, 7, 24, 25, 10_000])
def test_the_loss_in_chunks_is_the_loss_of_the_formula(reduction, chunk):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 12, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(9, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(9, (2, 12), generator=generator)
    targets[0, 4:] = targets[1, :3] = IGNORED

    def head(rows):
        return rows @ weight.T

    log_p = (hidden @ weight.T).log_softmax(-1)
    picked = [log_p[b, t, targets[b, t]] for b in range(2) for t in range(12) if targets[b, t] != IGNORED]
    by_hand = -torch.stack(picked).sum() / (len(picked) if reduction == "mean" else 1)
    wanted = torch.autograd.grad(by_hand, (hidden, weight))
    found = chunked_next_token_loss(hidden, head, targets, chunk, reduction)
    torch.testing.assert_close(found, by_hand, rtol=1e-12, atol=0)
    torch.testing.assert_close(next_token_loss(head(hidden), targets, reduction), by_hand, rtol=1e-12, atol=0)
    for one, other in zip(torch.autograd.grad(found, (hidden, weight)), wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("chunk", [4, 16])
def test_in_bf16_many_chunks_lose_no_more_of_the_heads_gradient_than_one_product(chunk):
    """One bf16 copy of the head for all chunks would add their gradients up in bf16, with eight bits a sum."""
    generator = torch.Generator().manual_seed(0)
    hidden, targets = torch.randn(1, 512, 24, generator=generator), torch.randint(23, (1, 512), generator=generator)
    head = torch.nn.Linear(24, 23, bias=False)
    with torch.no_grad():
        head.weight.copy_(torch.randn(23, 24, generator=generator) / 24**0.5)

    weight = head.weight.detach().double().requires_grad_()  # the gradient in float64
    log_p = (hidden[0].double() @ weight.T).log_softmax(-1)
    (wanted,) = torch.autograd.grad(-log_p.gather(1, targets[0][:, None]).mean(), weight)

    def error(loss_of) -> float:
        with Precision("bf16", "cpu").autocast():
            loss = loss_of()
        (found,) = torch.autograd.grad(loss, head.weight)
        return ((found.double() - wanted).norm() / wanted.norm()).item()

    whole = error(lambda: next_token_loss(head(hidden), targets))
    assert 1e-4 < whole < 1e-1  # bf16 it is, and the gradient meant
    assert error(lambda: chunked_next_token_loss(hidden, head, targets, chunk)) < 1.5 * whole


def test_in_chunks_the_head_never_sees_more_tokens_than_a_chunk():
    model, rows, seen = small_model(), UnequalRows().batch(0, 4), []
    model.head.register_forward_hook(lambda _, given, __: seen.append(given[0].numel() // 24))
    batch_loss(model, rows, 5).backward()
    assert max(seen) == 5
    assert sum(seen) == 2 * 48  # once forward, once again for the gradient
    seen.clear()
    batch_loss(model, rows).backward()
    assert seen == [48]


def test_the_head_is_back_also_after_an_error():
    model = small_model()
    head = model.head
    with without_head(model) as kept:
        assert kept is head
        assert model(torch.zeros(1, 3, dtype=torch.long)).shape == (1, 3, 24)
    assert model.head is head
    with pytest.raises(ValueError, match="token ids"), without_head(model):
        model(torch.full((1, 3), 99))
    assert model.head is head
    assert model.head.weight is model.token_embedding.weight


def test_a_tied_head_collects_the_gradient_of_both_of_its_uses_also_in_chunks():
    rows = UnequalRows().batch(0, 3)
    untied = small_model(tie_weights=False).double()
    with torch.no_grad():
        untied.head.weight.copy_(untied.token_embedding.weight)
    tied = small_model().double()
    tied.load_state_dict(untied.state_dict())
    batch_loss(untied, rows).backward()
    wanted = untied.head.weight.grad + untied.token_embedding.weight.grad
    for chunk in (0, 4):
        tied.zero_grad()
        batch_loss(tied, rows, chunk).backward()
        torch.testing.assert_close(tied.token_embedding.weight.grad, wanted, rtol=1e-12, atol=1e-14)


def test_only_predicted_tokens_are_counted():
    rows = UnequalRows().batch(0, 6)
    assert count_targets([rows]) == sum(1 + i * 5 % 12 for i in range(6))
    assert count_targets([rows, rows]) == 2 * count_targets([rows])


def packed_rows() -> tuple[Batch, list[tuple[torch.Tensor, torch.Tensor]]]:
    """Two rows of twelve tokens that hold five texts, and each text by itself with its targets."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(23, (2, 13), generator=generator)
    documents = torch.tensor([[0] * 5 + [1] * 3 + [2] * 4, [0] * 7 + [1] * 5])
    alone = []
    for row in range(2):
        for number in documents[row].unique():
            places = (documents[row] == number).nonzero().flatten()
            alone.append((ids[row, places][None], ids[row, places + 1][None]))
    return Batch(ids[:, :-1], ids[:, 1:], documents), alone


@pytest.mark.parametrize("chunk", [0, 5])
def test_packed_texts_are_learned_as_if_each_came_alone(chunk):
    packed, alone = packed_rows()
    separate = small_model().double()
    sums = [loss_by_hand(separate, x, y) * y.numel() for x, y in alone]
    wanted_loss = sum(sums) / 24
    wanted_loss.backward()
    model = small_model().double()
    loss = batch_loss(model, packed, chunk)
    loss.backward()
    torch.testing.assert_close(loss, wanted_loss, rtol=1e-12, atol=0)
    assert farthest(gradients(model), gradients(separate)) < 1e-12
    mixed = batch_loss(model, packed._replace(documents=None), chunk)
    assert abs(mixed.item() - wanted_loss.item()) > 1e-3  # without the numbers the texts see each other
