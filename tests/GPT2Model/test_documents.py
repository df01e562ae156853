"""Packed texts: in a row of several, each is read as if it came alone, by every implementation."""

import pytest
import torch

from CMHA.implementations import IMPLEMENTATIONS
from CMHA.masks import AttentionMask

LENGTHS = [[5, 3, 7, 1, 4], [20], [1, 18, 1]]  # of the texts in each row
NUMBERS = [[0, 1, 2, 3, 4], [0], [3, 4, 90]]  # any that do not fall
# Its kernels take no float64, so flex_attention is held to float32's own precision.
HERE = {"eager": torch.float64, "sdpa": torch.float64, "flash_tiled": torch.float64, "flex_attention": torch.float32}


def packed() -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(61, (3, 20), generator=torch.Generator().manual_seed(2))
    rows = [
        [number for number, length in zip(numbers, lengths, strict=True) for _ in range(length)]
        for numbers, lengths in zip(NUMBERS, LENGTHS, strict=True)
    ]
    return ids, torch.tensor(rows)


def one_by_one(model, ids) -> torch.Tensor:
    """The logits of each text by itself, put where it stands in its row."""
    rows = [torch.cat([model(text[None])[0] for text in row.split(of)]) for row, of in zip(ids, LENGTHS, strict=True)]
    return torch.stack(rows)


def test_all_implementations_that_need_no_gpu_are_looked_at():
    elsewhere = {"flash_attention_2", "flash_attention_3", "flash_triton"}  # no float64, and a GPU only
    elsewhere |= {"paged_attention"}  # it reads pages: each text is a sequence of its own there
    assert HERE.keys() == IMPLEMENTATIONS.keys() - elsewhere


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * ("flex" in name)) for name in HERE])
def test_the_logits_of_a_packed_row_are_those_of_each_text_alone(name, build, monkeypatch):
    ids, documents = packed()
    module, calls = IMPLEMENTATIONS[name], []
    real = module.attention
    monkeypatch.setattr(module, "attention", lambda *given, **more: calls.append(name) or real(*given, **more))
    exact = {"rtol": 1e-10, "atol": 1e-10} if HERE[name] == torch.float64 else {"rtol": 1e-4, "atol": 1e-5}
    with torch.no_grad():
        wanted = one_by_one(build(attn_implementation="eager"), ids).to(HERE[name])
        model = build(HERE[name], attn_implementation=name)
        calls.clear()
        found = model(ids, documents=documents)
        assert calls == [name] * 2  # in both blocks, no other in its place
        together = model(ids)
    torch.testing.assert_close(found, wanted, **exact)
    for row, lengths in enumerate(LENGTHS):  # the first text of a row has nothing before it anyway
        first = lengths[0]
        torch.testing.assert_close(together[row, :first], wanted[row, :first], **exact)
    assert (together[0, 5:] - wanted[0, 5:]).abs().amax(dim=-1).min() > 1e-3


@pytest.mark.parametrize("name", ["eager", "sdpa", "flash_tiled"])
def test_the_gradients_are_those_of_each_text_alone(name, build):
    ids, documents = packed()
    weights = torch.randn(3, 20, 61, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    model = build(attn_implementation=name, attn_strict=True)
    (model(ids, documents=documents) * weights).sum().backward()
    alone = build(attn_implementation="eager")
    (one_by_one(alone, ids) * weights).sum().backward()
    for (parameter, one), (_, other) in zip(model.named_parameters(), alone.named_parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-9, atol=1e-9, msg=parameter)


def test_a_change_in_one_text_changes_no_logit_of_another(build):
    ids, documents = packed()
    model = build()
    changed = ids.clone()
    changed[0, 8] = (ids[0, 8] + 1) % 61  # the first token of the third text
    with torch.no_grad():
        moved = (model(changed, documents=documents) - model(ids, documents=documents)).abs().amax(dim=-1) > 0
    assert moved[0, 8:15].all()
    assert moved.sum() == 7


def test_the_positions_start_again_with_each_text(build):
    ids, documents = packed()
    model, given = build(), []
    model.position_embedding.register_forward_hook(lambda _, places, __: given.append(places[0]))
    with torch.no_grad():
        model(ids, documents=documents)
    wanted = [[place for length in lengths for place in range(length)] for lengths in LENGTHS]
    assert given[0].tolist() == wanted
    assert AttentionMask(20, 20, documents=documents).positions().tolist() == wanted


def test_padding_behind_the_texts_is_a_text_of_its_own(build):
    """How a short row is filled up: what stands there is seen by nobody."""
    ids, documents = packed()
    documents[1, 12:] = 1
    model = build()
    with torch.no_grad():
        found = model(ids, documents=documents)[1, :12]
        torch.testing.assert_close(found, model(ids[1:2, :12])[0], rtol=1e-10, atol=1e-10)


def test_one_text_in_a_row_is_what_no_numbers_mean(build):
    ids, _ = packed()
    model = build()
    with torch.no_grad():
        assert torch.equal(model(ids, documents=torch.zeros_like(ids)), model(ids))


@pytest.mark.parametrize(
    ("documents", "word"),
    [
        (torch.zeros(3, 19, dtype=torch.long), "shape"),
        (torch.zeros(2, 20, dtype=torch.long), "shape"),
        (torch.zeros(20, dtype=torch.long), "shape"),
        (torch.zeros(3, 20), "integers"),
        (torch.zeros(3, 20, dtype=torch.bool), "integers"),
        (torch.arange(20).flip(0).repeat(3, 1), "fall"),
    ],
    ids=["too short", "too few rows", "one row without a batch", "floats", "bool", "falling"],
)
def test_numbers_that_do_not_fit_raise_an_error_of_ours(documents, word, build):
    import inspect
    import traceback

    ids, _ = packed()
    model = build()
    forward = inspect.unwrap(type(model).forward)  # without the tests' own type checks, which would come first
    with pytest.raises((ValueError, TypeError), match=word) as caught:
        forward(model, ids, documents=documents)
    assert "CMHA" in traceback.extract_tb(caught.value.__traceback__)[-1].filename
