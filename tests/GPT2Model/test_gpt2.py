"""The whole network: causal, blind to padding, started as GPT-2 was, and the same under every implementation."""

import logging
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from CMHA.choosing import AttentionSettings
from CMHA.kv_cache import KVCache
from CMHA.masks import AttentionMask
from GPT2Model.config import from_preset
from GPT2Model.gpt2 import GPTModel

IMPLEMENTATIONS = ("eager", "sdpa", "flash_tiled")


@pytest.fixture
def said():
    """Everything that the package says while a test runs, as "LEVEL: message"."""
    lines = []

    class Collect(logging.Handler):
        def emit(self, record):
            lines.append(f"{record.levelname}: {record.getMessage()}")

    handler, logger = Collect(), logging.getLogger("CMHA")
    logger.addHandler(handler)
    yield lines
    logger.removeHandler(handler)


def written_out(model: GPTModel, ids: torch.Tensor) -> torch.Tensor:
    """The logits of one row of ids, from the state dict alone, in formulas."""
    w, cfg = model.state_dict(), model.cfg
    head_dim = cfg["emb_dim"] // cfg["n_heads"]
    tokens = len(ids)
    hidden = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)

    def norm(x, name):
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / ((centred**2).mean(-1, keepdim=True) + 1e-5).sqrt()
        return scaled * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    x = w["token_embedding.weight"][ids] + w["position_embedding.weight"][:tokens]
    for i in range(cfg["n_layers"]):
        block = f"blocks.{i}"
        q, k, v = linear(norm(x, f"{block}.norm_1"), f"{block}.attention.W_qkv").chunk(3, -1)
        heads = [
            ((a @ b.T / math.sqrt(head_dim)).masked_fill(hidden, -math.inf).softmax(-1) @ c)
            for a, b, c in zip(q.split(head_dim, -1), k.split(head_dim, -1), v.split(head_dim, -1), strict=True)
        ]
        x = x + linear(torch.cat(heads, -1), f"{block}.attention.out_proj")
        inner = linear(norm(x, f"{block}.norm_2"), f"{block}.feed_forward.up_proj")
        inner = 0.5 * inner * (1 + torch.tanh(math.sqrt(2 / math.pi) * (inner + 0.044715 * inner**3)))
        x = x + linear(inner, f"{block}.feed_forward.down_proj")
    return norm(x, "final_norm") @ w["head.weight"].T


# --- what it computes --------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_the_logits_are_gpt2_s_formulas(implementation, tied, build, random_ids):
    model = build(attn_implementation=implementation, tie_weights=tied)
    ids = random_ids(3, 24)
    expected = torch.stack([written_out(model, row) for row in ids])
    torch.testing.assert_close(model(ids), expected, atol=1e-11, rtol=0)


@pytest.fixture(scope="module")
def models(build):
    return {name: build(attn_implementation=name) for name in IMPLEMENTATIONS}


@settings(max_examples=40, deadline=None)
@given(
    data=st.data(), implementation=st.sampled_from(IMPLEMENTATIONS), tokens=st.integers(2, 24), seed=st.integers(0, 99)
)
def test_a_later_token_never_changes_an_earlier_logit_and_does_change_its_own(
    data, implementation, tokens, seed, models, random_ids
):
    model, ids = models[implementation], random_ids(2, tokens, seed=seed)
    changed = data.draw(st.integers(0, tokens - 1))
    other = ids.clone()
    other[:, changed] = (ids[:, changed] + 1 + seed % 60) % 61
    difference = (model(ids) - model(other)).abs().amax((0, 2))
    assert (difference[:changed] == 0).all()
    assert (difference[changed:] > 1e-6).all()


@settings(max_examples=40, deadline=None)
@given(
    implementation=st.sampled_from(IMPLEMENTATIONS),
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=4),
    left=st.booleans(),
    seed=st.integers(0, 99),
)
def test_padding_of_any_content_on_either_side_changes_no_real_logit(
    implementation, lengths, left, seed, models, random_ids
):
    model, longest = models[implementation], 24
    ids = random_ids(len(lengths), longest, seed=seed)  # what is not a row's own stays garbage
    mask = torch.zeros(len(lengths), longest, dtype=torch.bool)
    for row, length in zip(mask, lengths, strict=True):
        row[-length:] = left
        row[:length] |= not left
    logits = model(ids, mask)
    assert torch.isfinite(logits).all()
    for row, real, found in zip(ids, mask, logits, strict=True):
        torch.testing.assert_close(found[real], model(row[real][None])[0], atol=1e-11, rtol=0)


def test_padding_gives_its_embeddings_no_gradient(models, random_ids):
    model, ids = models["sdpa"], random_ids(1, 10)
    ids[:, :4], ids[:, 4:] = 7, ids[:, 4:].clamp(min=8)
    mask = torch.arange(10)[None] >= 4
    model.zero_grad()
    embedded = []
    hook = model.token_embedding.register_forward_hook(lambda _m, _i, out: embedded.append(out))
    logits = model(ids, mask)
    hook.remove()
    (gradient,) = torch.autograd.grad(logits[:, 4:].square().sum(), embedded)
    assert (gradient[:, :4] == 0).all()
    assert (gradient[:, 4:].abs().amax(-1) > 0).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("chunks", [[24], [1] * 24, [5, 1, 11, 7], [23, 1]], ids=str)
def test_reading_in_pieces_with_a_cache_gives_the_logits_of_reading_at_once(implementation, chunks, models, random_ids):
    model, ids = models[implementation], random_ids(2, 24)
    mask = torch.arange(24) >= torch.tensor([0, 6])[:, None]
    for padding_mask in (None, mask):
        cache, pieces, start = KVCache(2, 2, 5, 24, 6, dtype=torch.float64), [], 0
        for size in chunks:
            end = start + size
            pieces.append(model(ids[:, start:end], None if padding_mask is None else padding_mask[:, :end], cache))
            start = end
        whole, found = model(ids, padding_mask), torch.cat(pieces, 1)
        real = mask if padding_mask is not None else torch.ones_like(mask)
        torch.testing.assert_close(found[real], whole[real], atol=1e-11, rtol=0)


# --- its start ---------------------------------------------------------------------------------------


def test_initial_weights_have_gpt2_s_spread_and_biases_are_zero():
    torch.manual_seed(0)
    model = GPTModel({"vocab_size": 401, "context_length": 90, "emb_dim": 96, "n_heads": 6, "n_layers": 5})
    seen = set()
    for name, parameter in model.named_parameters():
        kind = re.sub(r"blocks\.\d\.", "", name)
        seen.add(kind)
        if kind.endswith("bias"):
            assert (parameter == 0).all(), name
        elif "norm" in kind:
            assert (parameter == 1).all(), name
        else:
            expected = 0.02 / math.sqrt(2 * 5) if kind.endswith(("out_proj.weight", "down_proj.weight")) else 0.02
            n = parameter.numel()
            assert abs(parameter.std().item() / expected - 1) < 5 / math.sqrt(2 * n), name  # 5 standard errors
            assert abs(parameter.mean().item()) < 5 * expected / math.sqrt(n), name
    assert len(seen) == 2 + 2 + 4 + 4 + 4  # embeddings; final norm; two norms, attention's and feed-forward's linears


def test_an_untied_head_starts_with_the_same_spread():
    torch.manual_seed(0)
    head = GPTModel({"vocab_size": 401, "context_length": 9, "emb_dim": 96, "n_heads": 6, "n_layers": 1,
                     "tie_weights": False}).head.weight  # fmt: skip
    assert abs(head.std().item() / 0.02 - 1) < 5 / math.sqrt(2 * head.numel())


def test_a_tied_head_is_the_embedding_s_tensor_and_its_gradient_sums_both_uses(build, random_ids):
    tied = build()
    assert tied.head.weight is tied.token_embedding.weight
    untied = build(tie_weights=False)
    untied.load_state_dict(tied.state_dict())
    assert untied.head.weight.data_ptr() != untied.token_embedding.weight.data_ptr()
    ids = random_ids(2, 20)
    for model in (tied, untied):
        F.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    both = untied.head.weight.grad + untied.token_embedding.weight.grad
    torch.testing.assert_close(tied.token_embedding.weight.grad, both, atol=1e-13, rtol=0)
    assert untied.num_parameters() - tied.num_parameters() == 61 * 30


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("gpt2", 124_439_808), ("gpt2-medium", 354_823_168), ("gpt2-large", 774_030_080), ("gpt2-xl", 1_557_611_200)],
)
def test_the_presets_build_models_of_openai_s_sizes(name, parameters):
    with torch.device("meta"):  # shapes without memory
        assert GPTModel(from_preset(name)).num_parameters() == parameters


def test_the_book_s_dict_builds_a_model_whose_head_is_tied():
    book = {
        "vocab_size": 50257, "context_length": 1024, "emb_dim": 768, "n_heads": 12, "n_layers": 12, "drop_rate": 0.1,
        "qkv_bias": False,
    }  # fmt: skip
    with torch.device("meta"):
        assert GPTModel(book).num_parameters() == 124_412_160
        assert GPTModel({**book, "tie_weights": False}).num_parameters() == 163_009_536


# --- the same seed, the same numbers -----------------------------------------------------------------


def step(seed: int, cfg: dict, **changes):
    """Weights, loss and gradients of one training step, and the weights after it."""
    torch.manual_seed(seed)
    model = GPTModel({**cfg, **changes})
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ids = torch.randint(0, 61, (2, 24))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    loss = F.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    optimizer.step()
    return start, loss.item(), model.state_dict()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_the_same_seed_gives_the_same_training_step_to_the_bit(implementation, small_cfg):
    kind = {"attn_implementation": implementation, "drop_rate": 0.2}
    first, second = step(3, small_cfg, **kind), step(3, small_cfg, **kind)
    assert first[1] == second[1]
    for one, other in ((first[0], second[0]), (first[2], second[2])):
        assert all(torch.equal(one[name], other[name]) for name in one)
    assert step(4, small_cfg, **kind)[1] != first[1]
    assert any(not torch.equal(first[0][name], first[2][name]) for name in first[0])


def test_flipping_use_flash_leaves_the_weights_as_they_are(small_cfg):
    manual, fused = (step(5, small_cfg, use_flash=use_flash) for use_flash in (False, True))
    assert manual[0].keys() == fused[0].keys()
    assert all(torch.equal(manual[0][name], fused[0][name]) for name in manual[0])
    assert manual[1] == pytest.approx(fused[1], abs=1e-6)


def test_dropout_acts_in_training_and_never_in_eval(build, random_ids):
    model, ids = build(drop_rate=0.5), random_ids(2, 24)
    assert torch.equal(model(ids), model(ids))
    torch.testing.assert_close(model(ids), build(drop_rate=0.0)(ids), atol=1e-12, rtol=0)
    model.train()
    assert not torch.equal(model(ids), model(ids))


# --- the toggle --------------------------------------------------------------------------------------


def chosen(model: GPTModel) -> list[str]:
    return [block.attention.choice().chosen for block in model.blocks]


@pytest.mark.parametrize(
    ("wish", "backend"),
    [({}, "sdpa"), ({"use_flash": False}, "eager"), ({"attn_implementation": "flash_tiled"}, "flash_tiled")],
)
def test_every_model_says_once_what_computes_its_attention(wish, backend, said, small_cfg):
    GPTModel({**small_cfg, **wish})
    assert len(said) == 1
    assert said[0].startswith(f"INFO: Attention backend: {backend} (")


def test_the_line_goes_to_stderr_even_where_nobody_set_logging_up():
    program = (
        "from GPT2Model.gpt2 import GPTModel\n"
        "model = GPTModel({'vocab_size': 9, 'context_length': 4, 'emb_dim': 4, 'n_heads': 2, 'n_layers': 2})\n"
        "model.set_attention('eager')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=Path(__file__).resolve().parents[2], capture_output=True, text=True
    )
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert [line.split(" (")[0] for line in lines] == [
        "INFO: Attention backend: sdpa", "INFO: Attention backend: eager"
    ]  # fmt: skip


def test_set_attention_changes_every_block_and_no_number(build, random_ids, said):
    model, ids = build(), random_ids(2, 24)
    before, weights = model(ids), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for request, expected in (
        ("eager", "eager"), ("flash_tiled", "flash_tiled"), ({"use_flash": False}, "eager"), ("sdpa", "sdpa"),
        ({**model.cfg, "attn_implementation": "flash_tiled"}, "flash_tiled"), ("auto", "sdpa"),
    ):  # fmt: skip
        said.clear()
        model.set_attention(request)
        assert chosen(model) == [expected] * 2
        assert model.attention_report()["chosen"] == expected
        assert [line.split(" (")[0] for line in said] == [f"INFO: Attention backend: {expected}"]
        torch.testing.assert_close(model(ids), before, atol=1e-11, rtol=0)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


def test_changing_the_dict_alone_does_nothing_to_a_built_model(small_cfg):
    cfg = dict(small_cfg)
    model = GPTModel(cfg)
    cfg["use_flash"] = False
    assert chosen(model) == ["sdpa"] * 2
    assert model.cfg["use_flash"] is True
    model.cfg["use_flash"] = False
    assert chosen(model) == ["sdpa"] * 2
    model.set_attention(cfg)
    assert chosen(model) == ["eager"] * 2


def test_using_attention_goes_back_also_after_an_error(build):
    model = build(attn_implementation="flash_tiled")
    before = [block.attention.settings for block in model.blocks]
    with model.using_attention("eager") as same:
        assert same is model
        assert chosen(model) == ["eager"] * 2
        with model.using_attention({"attn_implementation": "sdpa"}):
            assert chosen(model) == ["sdpa"] * 2
        assert chosen(model) == ["eager"] * 2
    assert [block.attention.settings for block in model.blocks] == before
    with pytest.raises(ZeroDivisionError), model.using_attention("eager"):
        raise ZeroDivisionError
    assert [block.attention.settings for block in model.blocks] == before


@pytest.mark.parametrize("wrong", ["egaer", {"use_flush": False}, {"attn_implementation": "egaer"}, {"emb_dim": 30}])
def test_a_wrong_request_raises_and_changes_nothing(wrong, build):
    model = build()
    for change in (model.set_attention, lambda request: model.using_attention(request).__enter__()):
        with pytest.raises(ValueError):
            change(wrong)
        assert [block.attention.settings for block in model.blocks] == [
            AttentionSettings(flash_query_block_size=7, flash_kv_block_size=5)
        ] * 2


# --- wrong input -------------------------------------------------------------------------------------


def test_ids_outside_the_vocabulary_are_refused(build):
    model = build()
    for ids in ([[0, 61]], [[-1, 3]]):
        with pytest.raises(ValueError, match=r"0\.\.60, got .*tokenizer"):
            model(torch.tensor(ids))
    assert model(torch.tensor([[0, 60]])).shape == (1, 2, 61)


def test_more_tokens_than_the_context_are_refused_with_a_cache_too(build, random_ids):
    model = build()
    assert model(random_ids(1, 24)).shape == (1, 24, 61)
    with pytest.raises(ValueError, match="25 tokens are more than context_length=24"):
        model(random_ids(1, 25))
    cache = KVCache(2, 1, 5, 40, 6, dtype=torch.float64)
    model(random_ids(1, 20), cache=cache)
    with pytest.raises(ValueError, match="25 tokens are more than context_length=24"):
        model(random_ids(1, 5), cache=cache)


def test_a_mask_that_does_not_fit_is_refused(build, random_ids):
    model, ids = build(), random_ids(2, 9)
    for mask in (torch.ones(2, 9), torch.ones(2, 9, dtype=torch.long)):
        with pytest.raises(TypeError, match="padding_mask"):
            model(ids, mask)
    for shape in ((2, 8), (2, 10), (3, 9), (1, 9), (9,)):
        with pytest.raises((ValueError, TypeError), match="padding_mask"):
            model(ids, torch.ones(shape, dtype=torch.bool))


def test_ids_without_a_batch_axis_or_that_are_no_whole_numbers_are_refused(build):
    model = build()
    for ids in (torch.tensor([1, 2, 3]), torch.zeros(1, 3)):
        with pytest.raises((ValueError, TypeError), match="ids"):
            model(ids)


def test_the_embeddings_are_dropped_in_training(build, random_ids):
    model = build(drop_rate=0.25)
    for block in model.blocks:  # nothing but the embeddings reaches the last norm
        for linear in (block.attention.out_proj, block.feed_forward.down_proj):
            torch.nn.init.zeros_(linear.weight)
            torch.nn.init.zeros_(linear.bias)
    seen = []
    model.final_norm.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    ids = random_ids(30, 20)
    model.eval()(ids)
    model.train()(ids)
    whole, thinned = seen
    dropped = thinned == 0
    assert ((thinned / whole - 1 / 0.75).abs() < 1e-6)[~dropped].all()
    assert abs(dropped.double().mean().item() - 0.25) < 4 * (0.25 * 0.75 / dropped.numel()) ** 0.5


def test_one_mask_is_made_for_all_layers(build, random_ids, monkeypatch):
    made = []

    class Counted(AttentionMask):
        def __init__(self, *args, **kwargs):
            made.append(args)
            super().__init__(*args, **kwargs)

    monkeypatch.setattr("GPT2Model.gpt2.AttentionMask", Counted)
    monkeypatch.setattr("CMHA.cmha.AttentionMask", Counted)
    model = build(n_layers=3, attn_implementation="eager")
    model(random_ids(2, 11))
    assert made == [(11, 11)]
