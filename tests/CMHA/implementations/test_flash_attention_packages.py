"""The adapters of flash-attn say our masks in the packages' words.

The packages need a GPU, so these tests run against `fake_flash_attn.py`, which has their signatures and computes what
they document. What is right comes from a formula in float64, with the mask written out entry by entry.
"""

import copy
from dataclasses import dataclass, replace

import pytest
import torch

from CMHA.implementations import flash_attention_2, flash_attention_3, flash_package
from CMHA.masks import AttentionMask
from GPT2Model.config import from_preset
from GPT2Model.generation import make_cache
from GPT2Model.gpt2 import GPTModel
from tests.CMHA.implementations import fake_flash_attn

ADAPTERS = {
    "flash_attn_2": flash_attention_2,
    "flash_attn_3": flash_attention_3,
    "flash_attn_4": flash_attention_3,  # by the same door
}


@pytest.fixture(params=ADAPTERS)
def package(request, fakes):
    """(adapter, fake package): each of the three in turn, the only one that is installed."""
    return ADAPTERS[request.param], fakes(request.param)


# --- what is right ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Call:
    """One attention call. padding: a text for each sequence, "1" a real token; documents: a digit for each token."""

    query_len: int = 7
    key_len: int = 7
    causal: bool = True
    window: int | None = None
    padding: tuple[str, ...] | None = None
    documents: tuple[str, ...] | None = None
    heads: int = 2
    kv_heads: int = 2
    head_dim: int = 16
    dtype: torch.dtype = torch.bfloat16

    @property
    def scale(self) -> float:
        return 0.7 * self.head_dim**-0.5  # not the packages' default

    def mask(self) -> AttentionMask:
        padding, documents = (
            None if rows is None else torch.tensor([[int(digit) for digit in row] for row in rows])
            for rows in (self.padding, self.documents)
        )
        return AttentionMask(
            self.query_len, self.key_len, causal=self.causal, window=self.window, documents=documents,
            padding_mask=None if padding is None else padding.bool(), batch_size=2,
        )  # fmt: skip

    def tensors(self, poison: float | None = None) -> list[torch.Tensor]:
        """Queries, keys, values and the gradient of the context; where there is padding, `poison`."""
        generator = torch.Generator().manual_seed(0)
        shapes = [(self.heads, self.query_len), *[(self.kv_heads, self.key_len)] * 2, (self.heads, self.query_len)]
        made = [
            torch.randn(2, length, heads, self.head_dim, generator=generator).to(self.dtype).transpose(1, 2)
            for heads, length in shapes
        ]
        if poison is not None:
            hidden = ~self.mask().padding_mask
            for tensor in made[:3]:
                tensor[hidden[:, -tensor.shape[2] :, None].expand(-1, -1, tensor.shape[1]).transpose(1, 2)] = poison
        return made

    def sees(self, sequence: int, query: int, key: int) -> bool:
        """May this query see this key? A query that is padding itself sees nothing: nobody reads it."""
        at = query + self.key_len - self.query_len
        return not (
            (self.causal and key > at)
            or (self.window is not None and abs(at - key) >= self.window)
            or (self.padding is not None and "0" in (self.padding[sequence][key], self.padding[sequence][at]))
            or (self.documents is not None and self.documents[sequence][key] != self.documents[sequence][at])
        )


def formula(call: Call, dtype: torch.dtype) -> list[torch.Tensor]:
    """softmax(Q K^T) V in `dtype`: the context, and the gradients of queries, keys and values."""
    *inputs, grad = (tensor.to(dtype) for tensor in call.tensors())
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    group = call.heads // call.kv_heads
    keys, values = (leaf.repeat_interleave(group, dim=1) for leaf in leaves[1:])
    seen = torch.tensor(
        [[[call.sees(b, i, j) for j in range(call.key_len)] for i in range(call.query_len)] for b in range(2)]
    )[:, None]
    scores = (leaves[0] @ keys.mT * call.scale).masked_fill(~seen, torch.finfo(dtype).min)
    context = torch.softmax(scores, dim=-1).masked_fill(~seen, 0.0) @ values
    context.backward(grad)
    return [context.detach(), *(leaf.grad for leaf in leaves)]


def run(adapter, call: Call, poison: float | None = None, mask: AttentionMask | None = None) -> list[torch.Tensor]:
    """What the adapter computes: the context, and the gradients of queries, keys and values."""
    *inputs, grad = call.tensors(poison)
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    context, weights = adapter.attention(*leaves, mask or call.mask(), scale=call.scale)
    assert weights is None
    assert (context.shape, context.dtype) == (leaves[0].shape, call.dtype)
    context.backward(grad)
    return [context.detach(), *(leaf.grad for leaf in leaves)]


def assert_right(found: list[torch.Tensor], call: Call) -> None:
    """As near to float64 as the plain formula in the same dtype is, or twice as far; gradients three times."""
    exact, plain, eps = formula(call, torch.float64), formula(call, call.dtype), torch.finfo(call.dtype).eps
    _, _, values, grad = (tensor.double() for tensor in call.tensors())
    reach = (grad @ values.repeat_interleave(call.heads // call.kv_heads, dim=1).mT).abs().max() * call.scale
    scales = [values.abs().max(), *[reach * max(call.query_len, call.key_len) ** 0.5] * 3]
    for what, result, right, rough, scale in zip(
        ("context", "dQ", "dK", "dV"), found, exact, plain, scales, strict=True
    ):
        error, rough_error = (result.double() - right).abs().max(), (rough.double() - right).abs().max()
        bound = (2 if what == "context" else 3) * rough_error + 4 * eps * max(1.0, scale)
        assert error <= bound, f"{what}: {error} is more than {bound}"


CALLS = {
    "plain": Call(),
    "full": Call(causal=False),
    "grouped": Call(heads=4, kv_heads=2),
    "one key-value head": Call(heads=4, kv_heads=1),
    "one new token": Call(query_len=1),
    "five new tokens": Call(query_len=5, key_len=9),
    "five new tokens, full": Call(query_len=5, key_len=9, causal=False),
    "more queries than keys": Call(query_len=9, key_len=4),
    "more queries than keys, full": Call(query_len=9, key_len=4, causal=False),
    "window of one": Call(window=1),
    "window": Call(window=3),
    "window, full": Call(window=3, causal=False),
    "window, five new tokens": Call(query_len=5, key_len=9, window=4),
    "window, one new token, grouped": Call(query_len=1, window=3, heads=4),
    "window, five new tokens, full": Call(query_len=5, key_len=9, window=4, causal=False),
    "padded left": Call(padding=("0001111", "1111111")),
    "padded right": Call(padding=("1111000", "1111110")),
    "padded left, full": Call(padding=("0001111", "0111111"), causal=False),
    "a whole row of padding": Call(padding=("0000000", "0011111")),
    "padding in the middle": Call(padding=("1100111", "0110101")),
    "padded left, grouped": Call(padding=("0001111", "1111111"), heads=4),
    "padded left, one new token": Call(query_len=1, padding=("0001111", "1111111")),
    "padded left, five new tokens": Call(query_len=5, key_len=9, padding=("000000011", "001111111")),
    "padded right, five new tokens": Call(query_len=5, key_len=9, padding=("111000000", "111111100")),
    "documents": Call(documents=("0001122", "0111222")),
    "documents, full": Call(documents=("0001122", "0111222"), causal=False),
    "documents, five new tokens": Call(query_len=5, key_len=9, documents=("000111122", "000000111")),
    "documents with gaps in their numbers": Call(documents=("3334499", "0777778")),
    "documents that are the same in both sequences": Call(documents=("0000000", "0000000")),
    "padding and documents": Call(padding=("0011111", "1111100"), documents=("0000112", "0111222")),
    "padding, documents and five new tokens": Call(
        query_len=5, key_len=9, padding=("001111111", "111111000"), documents=("000001122", "000111222")
    ),
    "padding and window": Call(padding=("0011111", "1111100"), window=3),
    "padding in the middle and window": Call(padding=("1100111", "0110101"), window=3),
    "padding in the middle, window, five new tokens": Call(
        query_len=5, key_len=9, padding=("111001101", "011111111"), window=3
    ),
    "documents and window, full": Call(documents=("0000111", "0001111"), window=2, causal=False),
}


@pytest.mark.parametrize("dtype", fake_flash_attn.HALF, ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_context_and_gradients_are_those_of_the_formula_in_float64(name, dtype, package):
    adapter, fake = package
    call = replace(CALLS[name], dtype=dtype)
    assert_right(run(adapter, call), call)
    by_torch = "middle" in name and "window" in name  # the packed form would measure the window in real tokens
    assert len(fake.calls) == (0 if by_torch else 1)


@pytest.mark.parametrize(("name", "head_dim"), [("flash_attn_2", 256), ("flash_attn_2", 20), ("flash_attn_3", 256)])
def test_heads_may_be_as_wide_as_the_package_allows(name, head_dim, fakes):
    fakes(name)
    assert_right(run(ADAPTERS[name], call := Call(head_dim=head_dim, query_len=3)), call)


@pytest.mark.parametrize("call", [Call(query_len=9, key_len=4), Call(padding=("0000000", "0011111"))], ids=str)
def test_a_query_that_sees_nothing_gives_exactly_zero(call, package):
    context = run(package[0], call)[0]
    seeing = torch.tensor(
        [[any(call.sees(b, i, j) for j in range(call.key_len)) for i in range(call.query_len)] for b in range(2)]
    )
    assert not seeing.all()
    assert bool((context.transpose(1, 2)[~seeing] == 0).all())


def test_a_query_before_the_first_key_never_reaches_the_package(package):
    adapter, fake = package
    run(adapter, Call(query_len=9, key_len=4))
    assert fake.calls[-1][1]["q"].shape[1] == 4


def test_a_batch_of_nothing_but_padding_gives_zeros_without_a_call(package):
    adapter, fake = package
    queries, keys, values, _ = Call().tensors()
    queries.requires_grad_()
    mask = AttentionMask(7, 7, padding_mask=torch.zeros(2, 7, dtype=torch.bool))
    context, _ = adapter.attention(queries, keys, values, mask, scale=1.0)
    context.sum().backward()
    assert not context.any()
    assert not queries.grad.any()
    assert fake.calls == []


@pytest.mark.parametrize(
    "name",
    ["padded left", "padded right", "padding in the middle", "padded left, five new tokens", "padding and window",
     "padding, documents and five new tokens", "padding in the middle and window"],
)  # fmt: skip
def test_what_stands_in_the_padding_changes_nothing(name, package):
    clean, poisoned = (run(package[0], CALLS[name], poison) for poison in (None, 1e4))
    for one, other in zip(clean, poisoned, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_padding_is_left_out_and_not_computed(package):
    adapter, fake = package
    run(adapter, Call(query_len=5, key_len=9, padding=("000000011", "001111111")))
    name, arguments = fake.calls[-1]
    assert name == "flash_attn_varlen_func"
    assert (len(arguments["q"]), len(arguments["k"])) == (2 + 5, 2 + 7)
    assert (arguments["max_seqlen_q"], arguments["max_seqlen_k"]) == (5, 7)


def test_keys_of_documents_that_nobody_asks_about_are_left_out(package):
    adapter, fake = package
    run(adapter, Call(query_len=2, key_len=9, documents=("000111122", "000000111")))
    assert len(fake.calls[-1][1]["k"]) == 2 + 3


def test_without_padding_or_documents_nothing_is_packed(package):
    adapter, fake = package
    run(adapter, Call(query_len=5, key_len=9, window=4))
    assert fake.calls[-1][0] == "flash_attn_func"


def test_a_window_over_padding_in_the_middle_goes_to_sdpa_and_that_is_said_once_for_a_mask(package, messages):
    adapter, fake = package
    call = CALLS["padding in the middle and window"]
    mask = call.mask()
    for _ in range(2):  # two layers
        run(adapter, call, mask=mask)
    assert fake.calls == []
    assert ["sdpa computes this mask instead" in record.getMessage() for record in messages] == [True]
    run(adapter, CALLS["padding and window"])
    assert len(messages) == 1
    assert len(fake.calls) == 1


def test_a_mask_of_one_row_serves_every_sequence_of_the_batch(package):
    call = Call(padding=("0011111", "0011111"))
    one_row = AttentionMask(7, 7, padding_mask=call.mask().padding_mask[:1])
    assert_right(run(package[0], call, mask=one_row), call)


def test_under_autocast_a_cache_may_hold_its_keys_in_fp32(package):
    call = Call(query_len=2, key_len=6)
    queries, keys, values, _ = call.tensors()
    found, _ = package[0].attention(queries, keys.float(), values.float(), call.mask(), scale=call.scale)
    same, _ = package[0].attention(queries, keys, values, call.mask(), scale=call.scale)
    assert torch.equal(found, same)


@pytest.mark.parametrize("call", [Call(), Call(padding=("0011111", "1111111"))], ids=str)
def test_flash_attention_2_is_told_the_dropout(call, fakes):
    fake = fakes("flash_attn_2")
    *inputs, _ = call.tensors()
    kept = flash_attention_2.attention(*inputs, call.mask(), scale=call.scale)[0]
    dropped = flash_attention_2.attention(*inputs, call.mask(), scale=call.scale, dropout=0.5)[0]
    assert [arguments["dropout_p"] for _, arguments in fake.calls] == [0.0, 0.5]
    assert not torch.equal(kept, dropped)


def test_flash_attention_3_does_not_drop_a_dropout_in_silence(fakes):
    fakes("flash_attn_3")
    *inputs, _ = Call().tensors()
    with pytest.raises(ValueError, match="no dropout"):
        flash_attention_3.attention(*inputs, Call().mask(), scale=1.0, dropout=0.1)


def test_who_asks_torch_for_deterministic_algorithms_gets_a_deterministic_backward_pass(package):
    adapter, fake = package
    *inputs, _ = Call().tensors()
    try:
        for asked in (False, True):
            torch.use_deterministic_algorithms(asked)
            adapter.attention(*inputs, Call().mask(), scale=1.0)
    finally:
        torch.use_deterministic_algorithms(False)
    assert [arguments["deterministic"] for _, arguments in fake.calls] == [False, True]


# --- in the model -------------------------------------------------------------------------------------


@pytest.fixture
def model(package, monkeypatch):
    """A model in bf16 that attends through the fake: what speaks against it here, that this is no GPU, is not said."""
    adapter, _ = package
    check = adapter.check
    monkeypatch.setattr(
        adapter, "check", lambda request: [reason for reason in check(request) if reason.code != "cuda_only"]
    )
    torch.manual_seed(0)
    cfg = from_preset("nano", vocab_size=64, context_length=32, n_layers=3, drop_rate=0.0, attn_strict=True)
    model = GPTModel(cfg).to(torch.bfloat16).eval()
    model.set_attention(adapter.ALIASES[0])
    return model


def exact_logits(model, ids, padding_mask=None):
    """(float64, the largest error of eager in bf16): what is right, and how far bf16 itself is from it."""
    with torch.no_grad(), model.using_attention("eager"):
        plain = model(ids, padding_mask)
        exact = copy.deepcopy(model).double()(ids, padding_mask)
    return exact, plain


def test_a_model_computes_through_the_package_what_it_computes_with_eager_in_float64(model, package):
    ids = torch.randint(64, (2, 12), generator=torch.Generator().manual_seed(1))
    exact, plain = exact_logits(model, ids)
    with torch.no_grad():
        found = model(ids)
    assert len(package[1].calls) == 3
    assert (found - exact).abs().max() <= 2 * (plain - exact).abs().max()


def test_left_padding_and_a_cache_read_in_chunks_give_the_logits_of_one_whole_forward(model, package):
    ids = torch.randint(64, (2, 12), generator=torch.Generator().manual_seed(1))
    padding_mask = torch.ones(2, 12, dtype=torch.bool)
    padding_mask[0, :7] = False
    exact, plain = exact_logits(model, ids, padding_mask)
    bound = 2 * (plain - exact)[padding_mask].abs().max()
    with torch.no_grad():
        whole = model(ids, padding_mask)
        cache = make_cache(model, batch_size=2, max_length=32)
        chunks = [model(ids[:, a:b], padding_mask[:, :b], cache) for a, b in ((0, 5), (5, 10), (10, 11), (11, 12))]
    for found in (whole, torch.cat(chunks, dim=1)):
        assert (found - exact)[padding_mask].abs().max() <= bound
        assert found.isfinite().all()


def test_all_layers_share_the_segments_of_a_mask(model, monkeypatch):
    made = []
    find_segments = flash_package.find_segments
    monkeypatch.setattr(
        flash_package, "find_segments", lambda mask, batch: made.append(mask) or find_segments(mask, batch)
    )
    padding_mask = torch.ones(2, 6, dtype=torch.bool)
    padding_mask[0, :2] = False
    model(torch.zeros(2, 6, dtype=torch.long), padding_mask)
    assert len(made) == 1


def test_a_training_step_through_the_package_moves_every_weight(model):
    ids = torch.randint(64, (2, 12), generator=torch.Generator().manual_seed(1))
    padding_mask = torch.ones(2, 12, dtype=torch.bool)
    padding_mask[1, 9:] = False
    model(ids, padding_mask)[padding_mask].float().square().mean().backward()
    for name, parameter in model.blocks.named_parameters():
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name
