"""Each planted mistake changes exactly what it says, under every implementation in which it acts, and leaves nothing.

What it says is written out here once more, as formulas in float64 that take the model's weights and nothing else of it.
"""

import contextlib
import math

import pytest
import torch
import torch.nn.functional as F
import transformers

import orchestrator.learning.planted as planting
from CMHA.cmha import MultiHeadAttention
from CMHA.masks import AttentionMask
from GPT2Model import generation
from GPT2Model.generation import generate, make_cache
from GPT2Model.gpt2 import GPTModel
from GPT2Model.tracing import trace
from orchestrator.learning.planted import MISTAKES, PLACES, Mistake, Patch, planted
from orchestrator.text.corpora import IGNORED
from orchestrator.training import loop
from TransformerBlock.layers import GELU, LayerNorm
from TransformerBlock.transformer_block import TransformerBlock

CFG = {
    "vocab_size": 61, "context_length": 24, "emb_dim": 30, "n_heads": 5, "n_layers": 2, "drop_rate": 0.0,
    "flash_query_block_size": 7, "flash_kv_block_size": 5,
}  # fmt: skip
THREE = ("eager", "sdpa", "flash_tiled")
IN_EAGER = ("mask_after_softmax", "softmax_over_queries")
TOUCHED = (
    GPTModel, MultiHeadAttention, AttentionMask, TransformerBlock, GELU, LayerNorm, planting.cmha, generation, loop,
)  # fmt: skip


def build(dtype=torch.float64, **changes) -> GPTModel:
    torch.manual_seed(0)
    model = GPTModel({**CFG, **changes})
    with torch.no_grad():  # a fresh model's biases are 0 and its norms 1, and a mix-up of them would not show
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn(parameter.shape)
    return model.to(dtype).eval()


@pytest.fixture
def model() -> GPTModel:
    return build()


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, CFG["vocab_size"], (2, 17), generator=torch.Generator().manual_seed(1))


def formula(model: GPTModel, ids: torch.Tensor, wrong: str | None = None) -> torch.Tensor:
    """GPT-2 in float64 with one line wrong."""
    w = {name: tensor.detach().double() for name, tensor in model.state_dict().items()}
    heads, width = model.cfg["n_heads"], model.cfg["emb_dim"]
    B, T = ids.shape
    D = width // heads
    later = {"mask_forgotten": T, "mask_shifted": 1, "mask_too_strict": -1}.get(wrong, 0)
    allowed = torch.arange(T)[None, :] <= torch.arange(T)[:, None] + later
    scale = {"scale_forgotten": 1.0, "scale_by_emb_dim": 1 / math.sqrt(width)}.get(wrong, 1 / math.sqrt(D))

    def norm(x, name):
        if wrong == "norm_forgotten" and name != "final_norm":
            return x
        n = width - 1 if wrong == "unbiased_variance" else width
        centred = x - x.mean(-1, keepdim=True)
        eps = 1e-12 if wrong == "epsilon_wrong" else 1e-5
        return centred / ((centred**2).sum(-1, keepdim=True) / n + eps).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]

    def attention(x, name):
        qkv = x @ w[f"{name}.W_qkv.weight"].T + w[f"{name}.W_qkv.bias"]
        parts = [part.contiguous() for part in qkv.split(width, dim=-1)]
        if wrong == "view_without_transpose":
            q, k, v = (part.view(B, heads, T, D) for part in parts)
        else:
            q, k, v = (torch.stack(part.split(D, dim=-1), dim=1) for part in parts)
        scores = torch.einsum("bhqd,bhkd->bhqk", q, k) * scale
        if wrong == "mask_after_softmax":
            weights = (scores.exp() / scores.exp().sum(-1, keepdim=True)) * allowed
        else:
            e = scores.exp() * allowed
            sums = e.sum(-2 if wrong == "softmax_over_queries" else -1, keepdim=True)
            weights = torch.where(sums > 0, e / sums.clamp(min=1e-300), 0.0)
        context = weights @ v
        merged = torch.cat(list(context.unbind(1)), dim=-1)
        if wrong == "merge_without_transpose":
            merged = context.contiguous().view(B, T, width)
        out = w[f"{name}.out_proj.weight"]
        return merged @ (out if wrong == "projection_not_transposed" else out.T) + w[f"{name}.out_proj.bias"]

    def feed_forward(x, name):
        x = x @ w[f"{name}.up_proj.weight"].T + w[f"{name}.up_proj.bias"]
        inner = torch.erf(x / math.sqrt(2))
        if wrong != "exact_gelu":
            inner = torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))
        return 0.5 * x * (1 + inner) @ w[f"{name}.down_proj.weight"].T + w[f"{name}.down_proj.bias"]

    x = w["token_embedding.weight"][ids]
    if wrong != "positions_forgotten":
        x = x + w["position_embedding.weight"][:T]
    for i in range(model.cfg["n_layers"]):
        block = f"blocks.{i}"
        if wrong == "post_norm":
            x = norm(x + attention(x, f"{block}.attention"), f"{block}.norm_1")
            x = norm(x + feed_forward(x, f"{block}.feed_forward"), f"{block}.norm_2")
            continue
        added = attention(norm(x, f"{block}.norm_1"), f"{block}.attention")
        x = added if wrong == "residual_forgotten" else x + added
        x = x + feed_forward(norm(x, f"{block}.norm_2"), f"{block}.feed_forward")
    return norm(x, "final_norm") @ w["head.weight"].T


IN_FORMULA = (
    "scale_forgotten", "scale_by_emb_dim", "mask_forgotten", "mask_shifted", "mask_too_strict", "mask_after_softmax",
    "softmax_over_queries", "view_without_transpose", "merge_without_transpose", "projection_not_transposed",
    "exact_gelu", "unbiased_variance", "epsilon_wrong", "norm_forgotten", "post_norm", "residual_forgotten",
    "positions_forgotten",
)  # fmt: skip
BY_OTHER_TESTS = (
    "mask_upper_left_with_cache", "head_untied", "dropout_left_on", "targets_not_shifted", "gradients_not_cleared",
    "positions_restart_with_cache", "logits_from_first_position", "sampling_without_softmax",
)  # fmt: skip


def test_every_mistake_has_a_test_of_what_it_does():
    assert sorted(IN_FORMULA + BY_OTHER_TESTS) == sorted(MISTAKES)
    assert len(MISTAKES) >= 20


@pytest.mark.parametrize("implementation", THREE)
@pytest.mark.parametrize("name", IN_FORMULA)
@torch.no_grad()
def test_it_computes_what_the_formula_with_that_line_wrong_gives(name, implementation, model, ids):
    acts = name not in IN_EAGER or implementation == "eager"
    assert (MISTAKES[name].implementations == ("eager",)) == (name in IN_EAGER)
    model.set_attention(implementation)
    right, wrong = formula(model, ids), formula(model, ids, name)
    assert (right - wrong).abs().max() > 1e-4
    with planted(name):
        inside = model(ids)
    torch.testing.assert_close(inside, wrong if acts else right, rtol=0, atol=1e-9)
    torch.testing.assert_close(model(ids), right, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("scale_forgotten", {"scale_attn_weights": False}),
        ("exact_gelu", {"activation_function": "gelu"}),
        ("epsilon_wrong", {"layer_norm_epsilon": 1e-12}),
    ],
)
@torch.no_grad()
def test_what_transformers_can_be_told_to_do_wrong_is_the_same_there(name, change, model, ids, tmp_path):
    model.save_pretrained(tmp_path)
    config = transformers.GPT2Config.from_pretrained(tmp_path, **change)
    theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path, config=config, dtype=torch.float64).eval()
    with planted(name):
        torch.testing.assert_close(model(ids), theirs(ids).logits, rtol=0, atol=1e-9)


# ------------------------------------------------------------------ where it changes nothing, it says so


def said(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "orchestrator"]


@pytest.mark.parametrize("implementation", ["sdpa", "flash_tiled"])
@pytest.mark.parametrize("name", IN_EAGER)
@torch.no_grad()
def test_where_it_does_not_act_it_says_so_once_and_what_to_do(name, implementation, model, ids, caplog):
    right = formula(model, ids)
    with model.using_attention(implementation), planted(name):
        assert said(caplog) == []  # a pass shows it, not the with
        torch.testing.assert_close(model(ids), right, rtol=0, atol=1e-9)
        with planted("exact_gelu"):
            model(ids)
        model(ids)
        (warning,) = said(caplog)
    assert f"planted('{name}') changes nothing here: attention ran by {implementation}" in warning
    advice = f'with model.using_attention("eager"), planted("{name}"):'
    assert advice in warning
    with model.using_attention(implementation), planted(name):  # another with, another warning
        model(ids)
    assert said(caplog) == [warning, warning]
    caplog.clear()
    with model.using_attention("eager"), planted(name):  # as it advises
        assert (model(ids) - right).abs().max() > 1e-4
    assert said(caplog) == []


@torch.no_grad()
def test_where_it_has_acted_a_look_at_another_implementation_is_no_mistake(model, ids, caplog):
    with planted("mask_after_softmax"):
        for implementation in ("eager", "sdpa"):
            with model.using_attention(implementation):
                model(ids)
    assert said(caplog) == []


@pytest.mark.parametrize("name", [name for name in MISTAKES if name not in IN_EAGER])
@torch.no_grad()
def test_those_that_act_everywhere_never_warn(name, model, ids, caplog):
    for implementation in THREE:
        with model.using_attention(implementation), planted(name):
            model(ids)
            GPTModel(CFG)
    assert said(caplog) == []


@torch.no_grad()
def test_building_a_model_or_asking_for_its_attention_is_no_pass(model, ids, caplog):
    with planted("mask_after_softmax"):
        GPTModel(CFG)
        model.blocks[0].attention.choice()
        model.attention_report()
    assert said(caplog) == []


# ------------------------------------------------------------------ nothing stays


def everything() -> dict:
    return {(owner.__name__, name): value for owner in TOUCHED for name, value in vars(owner).items()}


@pytest.mark.parametrize("name", MISTAKES)
@torch.no_grad()
def test_afterwards_everything_is_as_before_bit_for_bit_also_after_an_error(name, ids):
    model = build(torch.float32)
    before, code = model(ids), everything()
    hooks = [len(module._forward_hooks) for module in model.modules()]
    with contextlib.suppress(KeyError), planted(name) as mistake:
        assert mistake is MISTAKES[name]
        planted_code = everything()
        model(ids)
        raise KeyError("something of the user's")
    assert planted_code != code
    now = everything()
    assert [key for key in code if now[key] is not code[key]] == []
    assert now.keys() == code.keys()
    assert torch.equal(model(ids), before)
    assert not model.training
    assert hooks == [len(module._forward_hooks) for module in model.modules()]


@torch.no_grad()
def test_different_ones_may_be_nested_and_each_is_taken_back_by_itself(model, ids):
    right, one = model(ids), formula(model, ids, "mask_shifted")
    with planted("mask_shifted"):
        with planted("exact_gelu"), planted("scale_forgotten"):
            assert (model(ids) - one).abs().max() > 1e-3
        torch.testing.assert_close(model(ids), one, rtol=0, atol=1e-9)
    assert torch.equal(model(ids), right)


@torch.no_grad()
def test_left_in_another_order_the_one_that_stays_still_acts(model, ids):
    right, gelu = model(ids), formula(model, ids, "exact_gelu")
    first, second = planted("mask_shifted"), planted("exact_gelu")
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    torch.testing.assert_close(model(ids), gelu, rtol=0, atol=1e-9)
    second.__exit__(None, None, None)
    assert torch.equal(model(ids), right)


@pytest.mark.parametrize(
    ("outer", "inner", "message"),
    [
        ("mask_shifted", "mask_shifted", "it is planted already"),
        ("mask_shifted", "mask_forgotten", r"'mask_shifted' is planted, and both change CMHA.cmha.choose \(mask\)"),
        ("post_norm", "residual_forgotten", "both change TransformerBlock.forward"),
    ],
)
@torch.no_grad()
def test_two_that_change_the_same_line_are_refused_and_the_first_goes_on(outer, inner, message, model, ids):
    right = model(ids)
    with planted(outer):
        with pytest.raises(ValueError, match=message), planted(inner):
            pass
        torch.testing.assert_close(model(ids), formula(model, ids, outer), rtol=0, atol=1e-9)
    assert torch.equal(model(ids), right)


def test_a_patch_that_fails_while_it_is_planted_leaves_nothing(model, ids):
    code = everything()
    bad = Mistake("bad", "", "", "", "", "block", (Patch(GELU, "forward", lambda right: right), Patch(GELU, "no", id)))
    with pytest.raises(KeyError), planted(bad):
        pass
    assert [key for key, value in everything().items() if value is not code[key]] == []
    with planted("exact_gelu"):
        pass


def test_an_unknown_name_is_told_the_nearest():
    with pytest.raises(ValueError, match=r"unknown mistake 'scale_forgoten'\. Did you mean 'scale_forgotten'"):
        planted("scale_forgoten").__enter__()


def test_each_says_in_short_lines_what_it_is():
    for name, mistake in MISTAKES.items():
        assert mistake.name == name
        assert mistake.where in PLACES
        for text in (mistake.what, mistake.wrong, mistake.right, mistake.why):
            assert 5 <= len(text) <= 120, name
            assert "\n" not in text
        assert mistake.wrong != mistake.right
        assert mistake.patches
    assert {mistake.where for mistake in MISTAKES.values()} == set(PLACES)


# ------------------------------------------------------------------ those that no formula above has


def test_view_fails_on_a_part_of_the_fused_projection_as_the_hint_says(model):
    queries = model.blocks[0].attention.W_qkv(torch.randn(2, 17, 30, dtype=torch.float64)).split(30, dim=-1)[0]
    with pytest.raises(RuntimeError, match=r"Use \.reshape"):
        queries.view(2, 5, 17, 6)


@pytest.mark.parametrize("implementation", THREE)
@torch.no_grad()
def test_the_upper_left_mask_is_right_without_a_cache_and_hides_the_latest_keys_with_one(implementation, model, ids):
    model.set_attention(implementation)
    q, k, v = torch.randn(3, 1, 2, 9, 6, dtype=torch.float64)
    flagged = F.scaled_dot_product_attention(q[:, :, 6:], k, v, is_causal=True)  # the classic line itself
    with planted("mask_upper_left_with_cache"):
        attention = model.blocks[0].attention
        torch.testing.assert_close(model(ids), formula(model, ids), rtol=0, atol=1e-9)
        choice = planting.cmha.choose(attention.settings, attention.typical_request())
        ours, _ = choice.attention(q[:, :, 6:], k, v, AttentionMask(3, 9), scale=6**-0.5)
    torch.testing.assert_close(ours, flagged, rtol=0, atol=1e-12)


@torch.no_grad()
def test_positions_that_restart_are_those_of_a_text_that_begins_there(model, ids):
    def pieces():
        cache = make_cache(model, 2, 17)
        return torch.cat([model(ids[:, :6], cache=cache), model(ids[:, 6:], cache=cache)], dim=1)

    with planted("positions_restart_with_cache"):
        torch.testing.assert_close(model(ids), formula(model, ids), rtol=0, atol=1e-9)
        restarted = pieces()
    table = model.position_embedding.weight
    order = [*range(6), *range(11)]
    table[:17] = table[order].clone()  # the same error made in the weights instead
    torch.testing.assert_close(restarted, formula(model, ids), rtol=0, atol=1e-9)


def test_positions_restart_with_padding_too(model, ids):
    padding = torch.ones(2, 17, dtype=torch.bool)
    padding[0, :3] = False
    with planted("positions_restart_with_cache"):
        assert AttentionMask(1, 17, padding_mask=padding).positions().tolist() == [[0], [0]]
        assert AttentionMask(17, 17, padding_mask=padding).positions()[0].tolist() == [0, 0, 0, *range(14)]
        of_two = torch.arange(17)[None].ge(9).long()
        assert AttentionMask(17, 17, documents=of_two).positions().tolist() == [[*range(9), *range(8)]]


@pytest.mark.parametrize("positions", ["learned", "rope"])
@torch.no_grad()
def test_forgotten_positions_leave_a_token_where_all_are_alike_without_a_place(positions, ids):
    """Without positions the last token's logits are the same in whatever order the others come, in the first block."""
    model = build(n_layers=1, positions=positions)
    shuffled = torch.cat([ids[:, :-1].flip(1), ids[:, -1:]], dim=1)
    with planted("positions_forgotten"):
        torch.testing.assert_close(model(ids)[:, -1], model(shuffled)[:, -1], rtol=0, atol=1e-9)
    assert (model(ids)[:, -1] - model(shuffled)[:, -1]).abs().max() > 1e-3
    assert (model.blocks[0].attention.rotary is None) == (positions == "learned")


@torch.no_grad()
def test_an_untied_head_is_fresh_in_a_live_model_and_learns_in_one_that_is_built(model, ids):
    right = formula(model, ids)
    with planted("head_untied"):
        live, again = model(ids), model(ids)
        built = GPTModel(CFG)
        traced = trace(model, ids)
    assert torch.equal(live, again)
    assert torch.equal(traced.logits, live)
    hidden = torch.linalg.lstsq(model.token_embedding.weight, right.flatten(0, 1).T).solution  # (C, B * T)
    fitted = torch.linalg.lstsq(hidden.T, live.flatten(0, 1)).solution.T  # the head that was used, from what it gave
    assert fitted.std().item() == pytest.approx(0.02, rel=0.1)
    assert (fitted - model.token_embedding.weight).abs().max() > 0.3
    assert built.num_parameters() == GPTModel(CFG).num_parameters() + 61 * 30
    assert built.head.weight is not built.token_embedding.weight
    assert built.head.weight.requires_grad


def test_dropout_left_on_draws_in_eval_and_needs_a_drop_rate(ids):
    model, without = build(torch.float32, drop_rate=0.1), build(torch.float32)
    right = model(ids)
    with planted("dropout_left_on"):
        torch.manual_seed(0)
        first, second = model(ids), model(ids)
        assert not any(module.training for module in model.modules())
        assert torch.equal(without(ids), right)
    torch.manual_seed(0)
    assert torch.equal(model.train()(ids), first)  # what a model in training mode draws
    assert not torch.equal(first, second)
    assert dict(MISTAKES["dropout_left_on"].needs) == {"drop_rate": 0.1}


def test_targets_that_are_not_shifted_reward_saying_the_token_again(ids):
    inputs, targets = ids[:, :-1], ids[:, 1:].clone()
    targets[0, -3:] = IGNORED
    echo = 50.0 * F.one_hot(inputs, 61).float()
    with planted("targets_not_shifted"):
        assert loop.next_token_loss(echo, targets).item() == pytest.approx(0, abs=1e-6)
    assert loop.next_token_loss(echo, targets).item() > 40


def test_gradients_that_are_not_cleared_add_up(ids):
    model = build(torch.float32)
    with planted("gradients_not_cleared"):
        optimizer = loop.make_optimizer(model, 0.0, 0.0, (0.9, 0.95))  # a rate of 0: the weights stay
        for _ in range(3):
            model(ids).mean().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    summed = model.final_norm.bias.grad.clone()
    optimizer = loop.make_optimizer(model, 0.0, 0.0, (0.9, 0.95))
    optimizer.zero_grad()
    model(ids).mean().backward()
    torch.testing.assert_close(summed, 3 * model.final_norm.bias.grad, rtol=0, atol=1e-6)


def test_the_first_positions_logits_are_those_of_the_first_token_alone(model, ids):
    prompt = ids[:1, :5]
    with planted("logits_from_first_position"):
        wrong = generate(model, prompt, 1)[0, -1]
        one_token = generate(model, prompt[:, :1], 6)
    assert wrong == formula(model, prompt[:, :1])[0, 0].argmax()
    assert torch.equal(one_token, generate(model, prompt[:, :1], 6))  # with a cache and a prompt of one: silent


def test_drawing_from_logits_stops_with_torchs_error(model, ids):
    with planted("sampling_without_softmax"):
        assert torch.equal(generate(model, ids, 3), generate(model, ids, 3))  # greedy: silent
        with pytest.raises(RuntimeError, match="probability tensor"):
            generate(model, ids, 3, 1.0, seed=0)


@torch.no_grad()
def test_a_trace_shows_the_planted_values(model, ids):
    model.set_attention("eager")
    with planted("mask_after_softmax"):
        weights = trace(model, ids)["blocks.0.attention.weights"]
    assert (weights.sum(-1) < 0.999).any()
    with planted("positions_forgotten"):
        assert not trace(model, ids)["position_embedding"].any()
