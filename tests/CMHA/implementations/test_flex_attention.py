"""FlexAttention as it really runs on a CPU, compiled: right for every mask, compiled and prepared no more than needed.

A kernel takes seconds to compile, so the quick tests share theirs: the same heads, head_dim and batch size, and tensors
laid out as in the layer. What needs many kernels is marked slow. Without a compiler these tests fail, and should.
"""

import random
from dataclasses import dataclass
from itertools import product

import pytest
import torch
from torch._dynamo.utils import counters

from CMHA.choosing import AttentionSettings, attention_report, choose
from CMHA.cmha import MultiHeadAttention
from CMHA.implementations import flex_attention
from CMHA.kv_cache import KVCache, LayerCache
from CMHA.masks import AttentionMask
from CMHA.packages import PACKAGES, Found
from CMHA.request import MACHINE_CODES, AttentionRequest
from GPT2Model.config import from_preset
from GPT2Model.gpt2 import GPTModel
from orchestrator.evaluation.memory import peak_tensor_bytes

BATCH, HEADS, HEAD_DIM = 7, 4, 16  # 7: unlike any number of tiles below, for torch takes equal sizes for one size
PADDINGS = ("none", "left", "right", "row")
# None a multiple of the 128 of a tile. The first has unequal numbers of tiles, so that its kernel fits the others.
LENGTHS = [(150, 300), (257, 257), (129, 641), (300, 150)]


@dataclass(frozen=True)
class Rules:
    """Which keys a query may see, in words."""

    causal: bool = True
    padding: str = "none"
    documents: bool = False
    window: int | None = None

    def __str__(self) -> str:
        names = ["causal" if self.causal else "full", *([] if self.padding == "none" else [self.padding])]
        return "-".join(names + ["documents"] * self.documents + ([f"window{self.window}"] if self.window else []))

    def tables(self, key_len: int, batch: int = BATCH) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """(padding_mask, documents): the last sequence is padded by a third or wholly, and documents cross tiles."""
        padding_mask = documents = None
        if self.padding != "none":
            third = -(-key_len // 3)
            hidden = {"left": slice(third), "right": slice(key_len - third, None), "row": slice(None)}[self.padding]
            padding_mask = torch.ones(batch, key_len, dtype=torch.bool)
            padding_mask[-1, hidden] = False
        if self.documents:
            starts = torch.rand(batch, key_len, generator=torch.Generator().manual_seed(key_len)) < 0.03
            documents = starts.long().cumsum(dim=1)
        return padding_mask, documents

    def mask(self, query_len: int, key_len: int) -> AttentionMask:
        padding_mask, documents = self.tables(key_len)
        return AttentionMask(
            query_len, key_len, causal=self.causal, padding_mask=padding_mask, documents=documents, window=self.window
        )

    def allowed(self, query_len: int, key_len: int) -> torch.Tensor:
        """(B, 1, query_len, key_len), written out again: the last query stands at the last key."""
        at_query = torch.arange(key_len - query_len, key_len)[:, None]
        distance = at_query - torch.arange(key_len)
        allowed = torch.ones(BATCH, 1, query_len, key_len, dtype=torch.bool)
        if self.causal:
            allowed = allowed & (distance >= 0)
        if self.window:
            allowed = allowed & (distance.abs() < self.window)
        padding_mask, documents = self.tables(key_len)
        if padding_mask is not None:
            allowed = allowed & padding_mask[:, None, None]
        if documents is not None:
            allowed = allowed & (documents[:, at_query] == documents[:, None])[:, None]
        return allowed


def tensors(query_len, key_len, dtype=torch.float32, heads=HEADS, kv_heads=HEADS, head_dim=HEAD_DIM, batch=BATCH):
    """Queries, keys and values as the layer hands them over: slices of a projection, with tokens before heads."""
    generator = torch.Generator().manual_seed(1000 * query_len + key_len)
    widths = [heads * head_dim, kv_heads * head_dim, kv_heads * head_dim]

    def project(tokens: int) -> list[torch.Tensor]:
        parts = torch.randn(batch, tokens, sum(widths), generator=generator).to(dtype).split(widths, dim=-1)
        return [part.unflatten(-1, (-1, head_dim)).transpose(1, 2) for part in parts]

    return project(query_len)[0], *project(key_len)[1:]


def formula(queries, keys, values, allowed, dtype=torch.float64):
    """softmax(Q K^T / sqrt(d)) V in `dtype`; a row that may see nothing is 0."""
    group = queries.shape[1] // keys.shape[1]
    keys, values = (tensor.to(dtype).repeat_interleave(group, dim=1) for tensor in (keys, values))
    scores = queries.to(dtype) @ keys.mT * queries.shape[-1] ** -0.5
    weights = scores.masked_fill(~allowed, torch.finfo(dtype).min).softmax(dim=-1).masked_fill(~allowed, 0.0)
    return weights @ values


def flex(queries, keys, values, mask):
    with torch.no_grad():
        return flex_attention.attention(queries, keys, values, mask, scale=queries.shape[-1] ** -0.5)[0]


def error_over_bound(rules: Rules, lengths: tuple[int, int], inputs=None, **kind) -> float:
    """The error as a part of the bound that `orchestrator/evaluation/parity.py` states; above 1 is a miss."""
    inputs, allowed = inputs or tensors(*lengths, **kind), rules.allowed(*lengths)
    exact = formula(*inputs, allowed)
    dtype, largest_value = inputs[0].dtype, inputs[2].double().abs().max().item()
    plain_error = (formula(*inputs, allowed, dtype).double() - exact).abs().max().item()
    bound = 2 * plain_error + 4 * torch.finfo(dtype).eps * max(1.0, largest_value)
    context = flex(*inputs, rules.mask(*lengths))
    assert context.dtype == dtype
    assert context.isfinite().all()
    return (context.double() - exact).abs().max().item() / bound


def kernels_compiled() -> int:
    return counters["stats"]["unique_graphs"]


# --- the same numbers ------------------------------------------------------------------------------------

QUICK = [
    Rules(),
    Rules(causal=False),
    Rules(padding="left"),
    Rules(padding="right"),
    Rules(padding="row"),
    Rules(documents=True),
    Rules(window=20),
    Rules(causal=False, padding="left", documents=True, window=40),
]


@pytest.mark.parametrize("rules", QUICK, ids=str)
def test_the_context_is_that_of_the_formula_for_each_rule(rules):
    for lengths in LENGTHS[:3] if rules.documents else LENGTHS:  # documents: a key at every query's position
        assert error_over_bound(rules, lengths) <= 1, lengths


@pytest.mark.parametrize("key_len", [300, 131, 641])
@pytest.mark.parametrize("query_len", [1, 5])
def test_new_queries_that_meet_a_cache_see_it_whole_and_not_each_others_future(query_len, key_len):
    queries, keys, values = tensors(query_len, key_len)
    cache = LayerCache(BATCH, HEADS, 700, HEAD_DIM)  # it lays keys and values out in its own way
    assert error_over_bound(Rules(), (query_len, key_len), (queries, *cache.append(keys, values))) <= 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_context_is_that_of_the_formula_in_half_precision(dtype):
    for padding, lengths in product(("left", "row"), LENGTHS):
        assert error_over_bound(Rules(padding=padding), lengths, dtype=dtype) <= 1


EVERY_RULE = [
    Rules(*choices) for choices in product((True, False), PADDINGS, (False, True), (None, 1, 40))
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("rules", EVERY_RULE, ids=str)
def test_the_context_is_that_of_the_formula_for_all_products_of_rules(rules):
    for lengths in [*LENGTHS[:3], (256, 256), (1024, 1024), (97, 97), (128, 128), (3, 3), (1, 300)]:
        assert error_over_bound(rules, lengths) <= 1, lengths


@pytest.mark.slow
def test_a_query_before_every_key_and_lengths_of_one_and_three_are_served():
    for rules in (Rules(), Rules(causal=False), Rules(padding="left"), Rules(window=2)):
        for lengths in [(1, 1), (3, 3), (1, 3), (3, 1), (50, 17), (239, 1), (3, 799)]:
            assert error_over_bound(rules, lengths) <= 1, (rules, lengths)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head_dim", [1, 5, 8, 24, 80, 256])
def test_any_head_dim_is_served_on_a_cpu(head_dim, dtype):
    assert error_over_bound(Rules(padding="right"), (150, 300), head_dim=head_dim, dtype=dtype) <= 1


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kv_heads", [1, 2])
def test_grouped_heads_share_keys_and_values(kv_heads, dtype):
    assert error_over_bound(Rules(padding="right"), (150, 300), kv_heads=kv_heads, dtype=dtype) <= 1


def test_hidden_keys_and_values_of_any_size_change_nothing():
    for padding, lengths in product(("left", "right", "row"), LENGTHS):
        rules = Rules(padding=padding)
        queries, keys, values = tensors(*lengths)
        clean = flex(queries, keys, values, rules.mask(*lengths))
        hidden = ~rules.tables(lengths[1])[0][:, None, :, None]
        keys.masked_fill_(hidden, 1e4)  # in place, to keep the layout
        values.masked_fill_(hidden, 1e4)
        assert torch.equal(flex(queries, keys, values, rules.mask(*lengths)), clean)


def test_a_query_that_may_see_nothing_gives_exactly_zero_and_every_other_something():
    for rules, lengths in [
        (Rules(), (300, 150)),
        (Rules(padding="left"), (257, 257)),
        (Rules(padding="row"), (257, 257)),
    ]:
        sees_nothing = ~rules.allowed(*lengths).any(dim=-1).expand(BATCH, HEADS, -1)
        assert sees_nothing.any()
        context = flex(*tensors(*lengths), rules.mask(*lengths))
        assert (context[sees_nothing] == 0).all()
        assert (context[~sees_nothing] != 0).any(dim=-1).all()


def test_one_row_of_padding_serves_the_whole_batch_as_in_eager():
    lengths, padding_mask = (257, 257), torch.arange(257)[None] >= 100
    inputs, mask = tensors(*lengths), AttentionMask(*lengths, padding_mask=padding_mask)
    expected = formula(*inputs, torch.ones(257, 257, dtype=torch.bool).tril() & padding_mask)
    torch.testing.assert_close(flex(*inputs, mask).double(), expected, rtol=0, atol=5e-6)


def test_scores_are_multiplied_by_the_scale_that_is_given():
    queries, keys, values = tensors(150, 300)
    found, _ = flex_attention.attention(queries, keys, values, AttentionMask(150, 300, causal=False), scale=0.7)
    expected = (queries.double() @ keys.double().mT * 0.7).softmax(dim=-1) @ values.double()
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=5e-6)


def test_under_no_grad_it_takes_tensors_that_would_require_a_gradient():
    inputs, mask = tensors(257, 257), AttentionMask(257, 257)
    expected = flex(*inputs, mask)
    assert torch.equal(flex(*(tensor.requires_grad_() for tensor in inputs), mask), expected)


# --- compiled and prepared no more than needed -------------------------------------------------------------


def test_a_new_length_needs_no_new_kernel():
    """Without symbolic lengths each would be compiled, and past torch's limit of 8 not even that."""
    for length in (100, 257):  # one tile, and several
        error_over_bound(Rules(), (length, length))
    before = kernels_compiled()
    for length in random.Random(0).sample(range(2, 700), 20):
        assert error_over_bound(Rules(), (length, length)) <= 1
    assert kernels_compiled() == before


def test_a_new_length_of_padded_packed_texts_needs_no_new_kernel_either():
    rules = Rules(causal=False, padding="left", documents=True, window=40)
    error_over_bound(rules, (150, 300))
    before = kernels_compiled()
    for key_len in random.Random(1).sample(range(260, 700), 10):
        assert error_over_bound(rules, (key_len - 100, key_len)) <= 1
    assert kernels_compiled() == before


def test_the_kernel_makes_no_table_of_scores():
    length = 1024
    inputs, mask = tensors(length, length), AttentionMask(length, length)
    flex(*inputs, mask)  # compiles, and makes the BlockMask
    table = BATCH * HEADS * length * length * 4
    assert peak_tensor_bytes(lambda: flex(*inputs, mask)).peak < table / 10


@pytest.fixture
def block_masks(monkeypatch):
    """The BlockMasks that are made during the test."""
    made, create = [], flex_attention.create_block_mask

    def counted(*args, **kwargs):
        made.append(create(*args, **kwargs))
        return made[-1]

    monkeypatch.setattr(flex_attention, "create_block_mask", counted)
    return made


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    cfg = from_preset("nano", n_layers=3, n_heads=HEADS, emb_dim=HEADS * HEAD_DIM, context_length=300, drop_rate=0.0)
    return GPTModel(cfg).eval()


def logits(model, name, ids, **kwargs):
    with torch.no_grad(), model.using_attention(name):
        return model(ids, **kwargs)


def ids_for(model, length):
    return torch.randint(0, model.cfg["vocab_size"], (BATCH, length), generator=torch.Generator().manual_seed(0))


def test_all_layers_of_a_model_share_one_block_mask_and_one_kernel(model, block_masks):
    ids = ids_for(model, 200)
    before = kernels_compiled()
    found = logits(model, "flex_attention", ids)
    assert len(block_masks) == 1
    assert kernels_compiled() <= before + 1
    torch.testing.assert_close(found, logits(model, "eager", ids), rtol=0, atol=2e-5)

    before = kernels_compiled()
    logits(model, "flex_attention", ids[:, :150])
    assert len(block_masks) == 2
    assert kernels_compiled() == before


def test_reading_on_with_a_cache_gives_the_logits_of_reading_at_once(model):
    ids, cfg = ids_for(model, 200), model.cfg
    cache = KVCache(cfg["n_layers"], BATCH, HEADS, cfg["context_length"], HEAD_DIM)
    pieces = [logits(model, "flex_attention", piece, cache=cache) for piece in ids.split([190, 5, 5], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), logits(model, "eager", ids), rtol=0, atol=2e-5)


# --- what it says no to --------------------------------------------------------------------------------------

CUDA = {"device": "cuda", "dtype": torch.bfloat16, "capability": (8, 0)}


@pytest.mark.parametrize(
    ("wish", "codes"),
    [
        ({}, []),
        ({"num_kv_heads": 4, "mask_kind": "full+padding+documents+window", "query_len": 1, "head_dim": 7}, []),
        ({"dtype": torch.bfloat16}, []),
        ({"dtype": torch.float16}, []),
        ({"needs_grad": True}, ["needs_grad"]),
        ({"dropout": 0.1}, ["dropout"]),
        ({"needs_weights": True}, ["weights_wanted"]),
        ({"dtype": torch.float64}, ["dtype"]),
        ({"dropout": 0.1, "needs_grad": True, "dtype": torch.float64}, ["needs_grad", "dropout", "dtype"]),
        ({"device": "mps"}, ["mps"]),
        ({"device": "xpu"}, ["device"]),
        (CUDA, []),
        (CUDA | {"needs_grad": True}, []),
        (CUDA | {"dropout": 0.1}, ["dropout"]),
        (CUDA | {"head_dim": 8}, ["head_dim"]),
        (CUDA | {"dtype": torch.float64}, ["dtype"]),
        (CUDA | {"capability": (6, 1)}, ["capability"]),
        (CUDA | {"capability": None}, []),
    ],
    ids=str,
)
def test_it_says_what_it_cannot_serve_and_why(wish, codes):
    reasons = flex_attention.check(AttentionRequest(**wish))
    assert [reason.code for reason in reasons if reason.code not in MACHINE_CODES] == codes
    assert all(reason.message and reason.remedy for reason in reasons)


def test_on_this_machine_a_cpu_can_compile_it():
    assert flex_attention.check(AttentionRequest()) == []


def test_on_cuda_it_needs_triton(monkeypatch):
    monkeypatch.setattr(flex_attention, "find", lambda name: Found("3.6", module=torch))
    assert flex_attention.check(AttentionRequest(**CUDA)) == []
    monkeypatch.setattr(flex_attention, "find", lambda name: Found())
    (reason,) = flex_attention.check(AttentionRequest(**CUDA))
    assert (reason.code, reason.remedy) == ("no_compiler", PACKAGES["triton"].install)


@pytest.fixture
def another_machine(monkeypatch):
    """To change what the machine has: what was found on it is forgotten before and after."""
    flex_attention.missing_for_cpu.cache_clear()
    yield monkeypatch
    flex_attention.missing_for_cpu.cache_clear()


@pytest.mark.parametrize(
    ("lacking", "said"),
    [
        ("a compiler", "there is no g\\+\\+; install g\\+\\+"),
        ("the compiler that CXX names", "there is no /no/such/g\\+\\+; install g\\+\\+, or set CXX"),
        ("Python's headers", "there is no .*Python.h; install python3-dev"),
        ("AVX2", "AVX2 only, and not on macOS; use sdpa"),
    ],
)
def test_what_a_cpu_lacks_is_said_before_anything_is_compiled(another_machine, tmp_path, lacking, said):
    if lacking == "a compiler":
        another_machine.delenv("CXX", raising=False)
        another_machine.setenv("PATH", str(tmp_path))
    elif lacking == "the compiler that CXX names":
        another_machine.setenv("CXX", "/no/such/g++")
    elif lacking == "Python's headers":
        another_machine.setattr(flex_attention.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    else:
        another_machine.setattr(torch.cpu, "_is_avx2_supported", lambda: False)
    (reason,) = flex_attention.check(AttentionRequest())
    assert reason.code == "no_compiler"
    with pytest.raises(ValueError, match=said):
        choose(AttentionSettings(attn_implementation="flex", attn_strict=True), AttentionRequest())


def test_what_it_says_no_to_would_really_fail():
    queries, keys, values = tensors(20, 20)
    with pytest.raises(Exception, match="does not support backward on CPU"):
        flex_attention.attention(queries.clone().requires_grad_(), keys, values, AttentionMask(20, 20), scale=1.0)
    with pytest.raises(Exception, match=r"float64"):
        flex(queries.double(), keys.double(), values.double(), AttentionMask(20, 20))
    with pytest.raises(ValueError, match=r"has no dropout, got 0\.5: use sdpa or flash_tiled"):
        flex_attention.attention(queries, keys, values, AttentionMask(20, 20), scale=1.0, dropout=0.5)


def test_in_training_sdpa_takes_its_place_with_one_warning_and_under_no_grad_it_serves(messages):
    torch.manual_seed(0)
    width = HEADS * HEAD_DIM
    layer = MultiHeadAttention(width, width, 300, 0.0, HEADS, attn_implementation="flex_attention").train()
    x = torch.randn(BATCH, 200, width)
    for _ in range(2):
        layer(x).sum().backward()
    assert layer.W_qkv.weight.grad.isfinite().all()
    warnings = [record.getMessage() for record in messages if record.levelname == "WARNING"]
    assert len(warnings) == 1
    for part in ("flex_attention cannot be used here", "Using sdpa instead", "torch.no_grad()", "attn_implementation"):
        assert part in warnings[0]

    messages.clear()
    before = layer.choice(), kernels_compiled()
    layer.eval()
    with torch.no_grad():
        found = layer(x)
        assert layer.choice(200).chosen == "flex_attention"
        layer.set_attention("eager")
        torch.testing.assert_close(found, layer(x), rtol=0, atol=5e-6)
    assert before[0].chosen == "sdpa"
    assert [record for record in messages if record.levelname == "WARNING"] == []


def test_the_report_says_that_it_was_chosen_and_why_not():
    asked = AttentionSettings(attn_implementation="flex")
    assert attention_report(asked, AttentionRequest())["chosen"] == "flex_attention"
    report = attention_report(asked, AttentionRequest(needs_grad=True))
    assert (report["chosen"], report["rejected"]) == ("sdpa", {"flex_attention": ["needs_grad"]})


# --- the limit: last, for it throws the kernels of this process away ------------------------------------------


def test_past_the_limit_of_kernels_it_raises_and_never_runs_uncompiled(monkeypatch):
    error_over_bound(Rules(), (257, 257))
    monkeypatch.setattr(flex_attention, "MOST_KERNELS", 1)
    before = kernels_compiled()
    with pytest.raises(RuntimeError, match=r"more than 1 kinds of call.*use sdpa for some, or call torch.compi"):
        flex(*tensors(257, 257, head_dim=7), AttentionMask(257, 257))
    assert kernels_compiled() == before

    torch.compiler.reset()
    assert error_over_bound(Rules(), (257, 257)) <= 1


def test_a_call_without_queries_or_keys_is_refused_beforehand():
    for lengths in ({"query_len": 0}, {"key_len": 0}):
        assert "empty" in [reason.code for reason in flex_attention.check(AttentionRequest(**lengths))]
