"""Grouped heads, RMSNorm, SwiGLU and rotary positions in GPT-2, alone and in every combination.

The reference is `written_out`: the logits of one text from the state dict alone, in float64 formulas that share no code
with the packages. Whatever else a batch holds (padding, other texts, a cache), a text's logits are those it has alone.
"""

import cmath
import itertools
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from CMHA.implementations import IMPLEMENTATIONS
from CMHA.kv_cache import KVCache
from CMHA.masks import AttentionMask
from GPT2Model.generation import generate
from GPT2Model.gpt2 import GPTModel

CHANGES = {
    "grouped heads": {"n_kv_heads": 2},
    "rmsnorm": {"norm": "rmsnorm"},
    "swiglu": {"mlp": "swiglu"},
    "rope": {"positions": "rope"},
}
SHAPE = {"emb_dim": 36, "n_heads": 6}


def together(*names: str) -> dict:
    return SHAPE | {key: value for name in names for key, value in CHANGES[name].items()}


ALONE = {name: together(name) for name in CHANGES} | {"all four": together(*CHANGES)}
EVERY = {
    " + ".join(names) or "GPT-2": together(*names)
    for count in range(5)
    for names in itertools.combinations(CHANGES, count)
}
EXACT = {"alone": SHAPE, "among others": together("grouped heads", "rmsnorm", "rope")}  # and the GELU through erf
each = pytest.mark.parametrize("kind", ALONE)
IN_FLOAT64 = ("eager", "sdpa", "flash_tiled")


def written_out(w: dict[str, torch.Tensor], cfg: dict, ids: torch.Tensor) -> torch.Tensor:
    """The logits (T, vocab_size) of one text."""
    T, H, D = len(ids), cfg["n_heads"], cfg["emb_dim"] // cfg["n_heads"]
    kv_heads = cfg["n_kv_heads"] or H
    hidden = torch.ones(T, T, dtype=torch.bool).triu(1)

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0.0)

    def norm(x, name):
        if cfg["norm"] == "rmsnorm":
            return x / ((x**2).mean(-1, keepdim=True) + 1e-5).sqrt() * w[f"{name}.weight"]
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / ((centred**2).mean(-1, keepdim=True) + 1e-5).sqrt()
        return scaled * w[f"{name}.weight"] + w[f"{name}.bias"]

    def turned(x):  # (heads, T, D)
        if cfg["positions"] == "learned":
            return x
        turns = [[cmath.exp(1j * t * 10_000 ** (-2 * j / D)) for j in range(D // 2)] for t in range(T)]
        pairs = torch.complex(x[..., : D // 2], x[..., D // 2 :]) * torch.tensor(turns, dtype=torch.complex128)
        return torch.cat([pairs.real, pairs.imag], dim=-1)

    def attention(x, name):
        q, k, v = linear(x, f"{name}.W_qkv").split([H * D, kv_heads * D, kv_heads * D], dim=-1)
        q, k, v = (part.reshape(T, -1, D).transpose(0, 1) for part in (q, k, v))
        q, k = turned(q), turned(k)
        heads = []
        for h in range(H):
            shared = h // (H // kv_heads)
            weights = (q[h] @ k[shared].T / math.sqrt(D)).masked_fill(hidden, -math.inf).softmax(-1)
            heads.append(weights @ v[shared])
        return linear(torch.cat(heads, dim=-1), f"{name}.out_proj")

    def feed_forward(x, name):
        up = linear(x, f"{name}.up_proj")
        if cfg["mlp"] == "swiglu":
            gate = x @ w[f"{name}.gate_proj.weight"].T
            return linear(gate / (1 + torch.exp(-gate)) * up, f"{name}.down_proj")
        if cfg["mlp"] == "gelu_exact":
            return linear(0.5 * up * (1 + torch.erf(up / math.sqrt(2))), f"{name}.down_proj")
        bent = 0.5 * up * (1 + torch.tanh(math.sqrt(2 / math.pi) * (up + 0.044715 * up**3)))
        return linear(bent, f"{name}.down_proj")

    x = w["token_embedding.weight"][ids]
    if cfg["positions"] == "learned":
        x = x + w["position_embedding.weight"][:T]
    for i in range(cfg["n_layers"]):
        x = x + attention(norm(x, f"blocks.{i}.norm_1"), f"blocks.{i}.attention")
        x = x + feed_forward(norm(x, f"blocks.{i}.norm_2"), f"blocks.{i}.feed_forward")
    return norm(x, "final_norm") @ w["head.weight"].T


@pytest.fixture(scope="module")
def models(build):
    """name of the variant, implementation -> the model, built once."""
    made = {}

    def get(kind: str, name: str = "eager", dtype: torch.dtype = torch.float64) -> GPTModel:
        if (kind, name, dtype) not in made:
            made[kind, name, dtype] = build(dtype, attn_implementation=name, **EVERY.get(kind, ALONE.get(kind)))
        return made[kind, name, dtype]

    return get


def alone(model: GPTModel, ids: torch.Tensor) -> torch.Tensor:
    return written_out(model.state_dict(), model.cfg, ids)


def assert_each_text_is_as_alone(found, model, ids, texts, atol=1e-11):
    """`texts`: for each row, the places of each of its texts."""
    for row, (logits, of_row) in enumerate(zip(found, texts, strict=True)):
        for places in of_row:
            expected = alone(model, ids[row, places]).to(found.dtype)
            torch.testing.assert_close(logits[places], expected, atol=atol, rtol=0)


# --- the formulas --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", EVERY)
def test_logits_loss_and_every_gradient_are_the_formulas(kind, build, random_ids):
    model, ids = build(**EVERY[kind], tie_weights=False), random_ids(2, 24)
    weights = {name: w.detach().clone().requires_grad_() for name, w in model.state_dict().items()}
    expected = torch.stack([written_out(weights, model.cfg, row) for row in ids])
    found = model(ids)
    torch.testing.assert_close(found, expected, atol=1e-11, rtol=0)
    assert found.std() > 0.1
    losses = [F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()) for logits in (found, expected)]
    for loss in losses:
        loss.backward()
    assert losses[0].item() == pytest.approx(losses[1].item(), abs=1e-12)
    for name, parameter in model.named_parameters():
        assert weights[name].grad.abs().max() > 0, name
        torch.testing.assert_close(parameter.grad, weights[name].grad, atol=1e-11, rtol=0, msg=name)


def test_no_two_combinations_are_the_same_model(build, random_ids):
    """The same seed, and for each pair of combinations other logits: no key goes unread."""
    ids = random_ids(1, 24)
    logits = [build(**changes)(ids) for changes in EVERY.values()]
    for one, other in itertools.combinations(logits, 2):
        assert (one - other).abs().max() > 1e-3


@pytest.mark.parametrize("kind", EXACT)
def test_with_the_exact_gelu_logits_gradients_and_greedy_texts_are_the_formulas(kind, build, random_ids):
    exact = {**EXACT[kind], "mlp": "gelu_exact", "tie_weights": False}
    model, ids = build(**exact), random_ids(2, 19)
    weights = {name: w.detach().clone().requires_grad_() for name, w in model.state_dict().items()}
    expected = torch.stack([written_out(weights, model.cfg, row) for row in ids])
    for name in IN_FLOAT64:
        with model.using_attention(name):
            torch.testing.assert_close(model(ids), expected, atol=1e-11, rtol=0)
    model(ids).square().mean().backward()
    expected.square().mean().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, weights[name].grad, atol=1e-11, rtol=0, msg=name)
    text = ids
    for _ in range(5):
        last = torch.stack([alone(model, row)[-1] for row in text])
        text = torch.cat([text, last.argmax(-1)[:, None]], dim=1)
    assert torch.equal(generate(model, ids, 5), text)
    assert torch.equal(generate(model, ids, 5, use_cache=False), text)


@pytest.mark.parametrize("kind", EXACT)
def test_one_seed_gives_one_state_dict_for_both_forms_of_gelu(kind, build, random_ids):
    """It decides no weight, and so each loads the other's; what they compute differs, and by more than rounding."""
    usual, exact = (build(**EXACT[kind], mlp=mlp) for mlp in ("gelu", "gelu_exact"))
    assert list(usual.state_dict()) == list(exact.state_dict())
    assert all(torch.equal(tensor, exact.state_dict()[name]) for name, tensor in usual.state_dict().items())
    exact.load_state_dict(usual.state_dict())
    ids = random_ids(2, 24)
    difference = (exact(ids) - usual(ids)).abs().max()
    assert 1e-6 < difference < 1e-2 * usual(ids).abs().max()


@each
def test_grouped_heads_are_full_heads_with_their_keys_and_values_repeated(kind, build, random_ids):
    grouped = build(**{**ALONE[kind], "n_kv_heads": 2})
    full = build(**{**ALONE[kind], "n_kv_heads": None})
    weights = grouped.state_dict()
    for name, tensor in weights.items():
        if "W_qkv" in name:
            queries, keys, values = tensor.split([36, 12, 12])
            repeated = [part.unflatten(0, (2, 6)).repeat_interleave(3, dim=0).flatten(0, 1) for part in (keys, values)]
            weights[name] = torch.cat([queries, *repeated])
    full.load_state_dict(weights)
    ids = random_ids(2, 24)
    torch.testing.assert_close(grouped(ids), full(ids), atol=1e-12, rtol=0)


# --- a text among others is a text alone ---------------------------------------------------------------------------


def padded(side: str) -> tuple[torch.Tensor, list]:
    """A mask (4, 23) and each row's real places."""
    mask = torch.arange(23) >= torch.tensor([0, 4, 13, 22])[:, None]
    if side == "right":
        mask = mask.flip(1)
    if side == "holes":
        mask = (
            torch.rand(4, 23, generator=torch.Generator().manual_seed(5)) < torch.tensor([1.1, 0.8, 0.5, 0.2])[:, None]
        )
        assert mask.sum(1).tolist() == sorted(mask.sum(1).tolist(), reverse=True)
    return mask, [[row.nonzero().flatten()] for row in mask]


@pytest.mark.parametrize("name", IN_FLOAT64)
@pytest.mark.parametrize("side", ["left", "right", "holes"])
@each
@torch.no_grad()
def test_padding_of_any_content_changes_no_real_logit(kind, side, name, models, random_ids):
    model, ids = models(kind, name), random_ids(4, 23)
    mask, texts = padded(side)
    found = model(ids, mask)
    assert torch.isfinite(found).all()
    assert_each_text_is_as_alone(found, model, ids, texts)


LENGTHS = [[5, 3, 7, 1, 7], [23], [1, 20, 2]]


def packed() -> tuple[torch.Tensor, list]:
    documents = torch.tensor([[7 * i for i, length in enumerate(row) for _ in range(length)] for row in LENGTHS])
    return documents, [list(torch.arange(23).split(row)) for row in LENGTHS]


@pytest.mark.parametrize("name", IN_FLOAT64)
@each
@torch.no_grad()
def test_packed_texts_are_read_as_if_each_came_alone(kind, name, models, random_ids):
    model, ids = models(kind, name), random_ids(3, 23)
    documents, texts = packed()
    assert_each_text_is_as_alone(model(ids, documents=documents), model, ids, texts)


@each
@torch.no_grad()
def test_packed_texts_with_padding_among_them_too(kind, models, random_ids):
    model, ids = models(kind), random_ids(3, 23)
    documents, texts = packed()
    real = torch.rand(3, 23, generator=torch.Generator().manual_seed(6)) < 0.7
    texts = [[places[real[row, places]] for places in of_row] for row, of_row in enumerate(texts)]
    texts = [[places for places in of_row if len(places)] for of_row in texts]
    assert_each_text_is_as_alone(model(ids, real, documents=documents), model, ids, texts)


@pytest.mark.parametrize("name", IN_FLOAT64)
@pytest.mark.parametrize("rules", ["one text", "left", "holes", "packed"])
@each
@torch.no_grad()
def test_reading_in_chunks_with_a_cache_changes_no_logit(kind, rules, name, models, random_ids):
    model = models(kind, name)
    given, texts = {}, [[torch.arange(23)]] * 3
    if rules == "packed":
        given["documents"], texts = packed()
    elif rules != "one text":
        given["padding_mask"], texts = padded(rules)
    ids, pieces, start = random_ids(len(texts), 23), [], 0
    heads = model.blocks[0].attention.num_kv_heads
    cache = KVCache(2, len(ids), heads, 23, 6, dtype=torch.float64)
    for size in (6, 1, 1, 10, 5):
        end = start + size
        pieces.append(model(ids[:, start:end], cache=cache, **{key: rule[:, :end] for key, rule in given.items()}))
        start = end
    assert_each_text_is_as_alone(torch.cat(pieces, dim=1), model, ids, texts)
    assert cache.layers[0].keys.shape[1] == (2 if "n_kv_heads" in ALONE[kind] else 6)


@pytest.mark.slow
@each
@torch.no_grad()
def test_flex_attention_reads_them_so_too(kind, models, random_ids):
    """In float32, which is what its kernels take, and without gradients, which it has not on a CPU."""
    model, ids = models(kind, "flex_attention", torch.float32), random_ids(3, 23)
    assert model.attention_report()["chosen"] == "flex_attention"
    exact = models(kind)
    documents, texts = packed()
    assert_each_text_is_as_alone(model(ids, documents=documents), exact, ids, texts, atol=2e-5)
    mask, texts = padded("left")
    ids = random_ids(4, 23)
    assert_each_text_is_as_alone(model(ids, mask), exact, ids, texts, atol=2e-5)


@each
def test_a_later_token_never_changes_an_earlier_logit_and_does_change_its_own(kind, models, random_ids):
    model, ids = models(kind, "sdpa"), random_ids(1, 12)
    for changed in range(12):
        other = ids.clone()
        other[:, changed] = (ids[:, changed] + 7) % 61
        difference = (model(ids) - model(other)).abs().amax((0, 2))
        assert (difference[:changed] == 0).all()
        assert (difference[changed:] > 1e-6).all()


@torch.no_grad()
def test_with_rotary_positions_a_text_may_stand_anywhere_and_with_learned_ones_it_may_not(models, random_ids):
    """Told to stand 8 places further on, all its tokens keep their distances; in a table each place has its own row."""

    class Moved(AttentionMask):
        def positions(self):
            return super().positions() + 8

    ids, change = random_ids(1, 15), {}
    for kind in ALONE:
        model = models(kind)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("GPT2Model.gpt2.AttentionMask", Moved)
            moved = model(ids)
        change[kind] = (moved - model(ids)).abs().max().item()
    turned = {kind for kind in ALONE if ALONE[kind].get("positions") == "rope"}
    assert turned == {"rope", "all four"}
    for kind, difference in change.items():
        assert difference < 1e-11 if kind in turned else difference > 1e-2, kind


# --- one set of weights ---------------------------------------------------------------------------------------


@each
def test_one_seed_gives_one_state_dict_that_every_implementation_computes_the_same_from(kind, small_cfg, random_ids):
    ids, first, logits = random_ids(2, 24), None, None
    for name in IMPLEMENTATIONS:
        torch.manual_seed(0)
        tiles = {"flash_query_block_size": 16, "flash_kv_block_size": 32} if name == "flash_triton" else {}
        model = GPTModel({**small_cfg, **ALONE[kind], "attn_implementation": name, **tiles}).double().eval()
        state = model.state_dict()
        first, logits = first or state, model(ids) if logits is None else logits
        assert list(state) == list(first)
        assert all(torch.equal(state[key], first[key]) for key in first)
        if name in IN_FLOAT64:
            torch.testing.assert_close(model(ids), logits, atol=1e-12, rtol=0)


def shapes(**changes) -> dict[str, tuple[int, ...]]:
    cfg = {"vocab_size": 61, "context_length": 24, "emb_dim": 36, "n_heads": 6, "n_layers": 1, **changes}
    return {name: tuple(tensor.shape) for name, tensor in GPTModel(cfg).state_dict().items()}


def test_gpt2_s_state_dict_has_the_names_and_shapes_that_it_always_had():
    expected = {
        "token_embedding.weight": (61, 36), "position_embedding.weight": (24, 36),
        "blocks.0.attention.W_qkv.weight": (108, 36), "blocks.0.attention.W_qkv.bias": (108,),
        "blocks.0.attention.out_proj.weight": (36, 36), "blocks.0.attention.out_proj.bias": (36,),
        "blocks.0.feed_forward.up_proj.weight": (144, 36), "blocks.0.feed_forward.up_proj.bias": (144,),
        "blocks.0.feed_forward.down_proj.weight": (36, 144), "blocks.0.feed_forward.down_proj.bias": (36,),
        "blocks.0.norm_1.weight": (36,), "blocks.0.norm_1.bias": (36,),
        "blocks.0.norm_2.weight": (36,), "blocks.0.norm_2.bias": (36,),
        "final_norm.weight": (36,), "final_norm.bias": (36,), "head.weight": (61, 36),
    }  # fmt: skip
    assert shapes() == expected
    assert shapes(norm="layernorm", mlp="gelu", positions="learned", n_kv_heads=6) == expected


def test_each_change_adds_and_removes_its_own_weights_and_no_other():
    gpt2, inside = shapes(), "blocks.0.feed_forward"
    assert shapes(positions="rope") == {name: s for name, s in gpt2.items() if name != "position_embedding.weight"}
    assert shapes(norm="rmsnorm") == {name: s for name, s in gpt2.items() if not re.search("norm.*bias", name)}
    grouped = {"blocks.0.attention.W_qkv.weight": (36 + 2 * 12, 36), "blocks.0.attention.W_qkv.bias": (36 + 2 * 12,)}
    assert shapes(n_kv_heads=2) == {**gpt2, **grouped}
    swiglu = {f"{inside}.gate_proj.weight": (96, 36), f"{inside}.up_proj.weight": (96, 36),
              f"{inside}.down_proj.weight": (36, 96)}  # fmt: skip
    assert shapes(mlp="swiglu") == {name: s for name, s in gpt2.items() if inside not in name} | swiglu
    assert shapes(mlp="swiglu", ff_dim=44)[f"{inside}.gate_proj.weight"] == (44, 36)
    assert shapes(ff_dim=44)[f"{inside}.up_proj.weight"] == (44, 36)
    assert shapes(mlp="gelu_exact") == gpt2
    assert shapes(mlp="gelu_exact", ff_dim=44) == shapes(ff_dim=44)


def test_a_gpt2_checkpoint_does_not_load_into_another_model_in_silence():
    gpt2 = GPTModel({"vocab_size": 61, "context_length": 24, "n_layers": 1, **SHAPE}).state_dict()
    for changes in ALONE.values():
        other = GPTModel({"vocab_size": 61, "context_length": 24, "n_layers": 1, **changes})
        with pytest.raises(RuntimeError, match=r"size mismatch|Missing key|Unexpected key"):
            other.load_state_dict(gpt2)


# --- its start, and in use ---------------------------------------------------------------------------------------


def test_initial_weights_have_gpt2_s_spread_whatever_the_parts_are():
    torch.manual_seed(0)
    model = GPTModel({"vocab_size": 401, "context_length": 90, "n_layers": 5, "init_std": 0.03,
                      **together(*CHANGES), "emb_dim": 96})  # fmt: skip
    seen = set()
    for name, parameter in model.named_parameters():
        kind = re.sub(r"blocks\.\d\.", "", name)
        seen.add(kind)
        if kind.endswith("bias"):
            assert (parameter == 0).all(), name
        elif "norm" in kind:
            assert (parameter == 1).all(), name
        else:
            added_to_the_stream = kind.endswith(("out_proj.weight", "down_proj.weight"))
            expected = 0.03 / math.sqrt(2 * 5) if added_to_the_stream else 0.03
            n = parameter.numel()
            assert abs(parameter.std().item() / expected - 1) < 5 / math.sqrt(2 * n), name  # 5 standard errors
            assert abs(parameter.mean().item()) < 5 * expected / math.sqrt(n), name
    assert seen == {
        "token_embedding.weight", "final_norm.weight", "norm_1.weight", "norm_2.weight", "attention.W_qkv.weight",
        "attention.W_qkv.bias", "attention.out_proj.weight", "attention.out_proj.bias",
        "feed_forward.gate_proj.weight", "feed_forward.up_proj.weight", "feed_forward.down_proj.weight",
    }  # fmt: skip


@each
def test_greedy_text_is_the_formulas_with_and_without_a_cache_and_past_the_context(kind, models, random_ids):
    model, ids = models(kind, "sdpa"), random_ids(2, 19)
    expected = ids
    for _ in range(8):  # the context holds 24: the last three tokens are read through a window that slides
        logits = torch.stack([alone(model, row[-24:])[-1] for row in expected])
        expected = torch.cat([expected, logits.argmax(-1)[:, None]], dim=1)
    for use_cache in (True, False):
        assert torch.equal(generate(model, ids, 8, use_cache=use_cache, past_context="slide"), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@each
@torch.no_grad()
def test_in_half_precision_the_logits_are_off_by_its_rounding_and_no_more(kind, dtype, build, models, random_ids):
    """By no more than twice what GPT-2 itself is off by, with the same rounded weights."""
    ids, errors = random_ids(3, 24), {}
    for name, changes in {"GPT-2": SHAPE, kind: ALONE[kind]}.items():
        half = build(dtype, **changes, attn_implementation="eager")
        exact = half(ids).double(), build(dtype, **changes).double()(ids)
        assert half(ids).dtype == dtype
        errors[name] = ((exact[0] - exact[1]).abs().max() / exact[1].abs().max()).item()
    assert 0 < errors[kind] <= 2 * errors["GPT-2"] + 4 * torch.finfo(dtype).eps


@each
def test_a_training_step_under_autocast_has_every_gradient_near_the_exact_one(kind, small_cfg, random_ids):
    torch.manual_seed(0)
    model, ids = GPTModel({**small_cfg, **ALONE[kind], "init_std": 0.2}), random_ids(4, 24)
    grads = []
    for enabled in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            loss = F.cross_entropy(model(ids)[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
        loss.backward()
        grads.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    for name, exact in grads[0].items():
        assert grads[1][name].dtype == torch.float32
        error = (grads[1][name] - exact).norm() / exact.norm()
        assert error < 0.1, f"{name}: {error:.3f}"


COMPILED = """
import sys
import torch
from GPT2Model.gpt2 import GPTModel

torch.manual_seed(0)
cfg = {"vocab_size": 61, "context_length": 24, "emb_dim": 36, "n_heads": 6, "n_layers": 1, "drop_rate": 0.0,
       "n_kv_heads": 2, "norm": "rmsnorm", "mlp": "swiglu", "positions": "rope"}
model = GPTModel(cfg)
compiled = torch.compile(model, fullgraph=True, backend=sys.argv[1])
ids = torch.randint(0, 61, (2, 23))
for rules in ({}, {"padding_mask": torch.arange(23) >= torch.tensor([[0], [9]])}):
    grads = []
    for run in (model, compiled):
        model.zero_grad()
        logits = run(ids, **rules)
        logits.square().mean().backward()
        grads.append([logits.detach(), *(parameter.grad.clone() for parameter in model.parameters())])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)
print("the same")
"""


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_all_four_compile_without_a_graph_break(backend):
    """In a process of its own: torch.compile and the type checks of these tests do not mix."""
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", COMPILED, backend], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "the same" in done.stdout
