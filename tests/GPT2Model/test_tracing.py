"""trace() shows the model's own numbers under readable names, changes what it is told to, and nothing else."""

import copy
import gc
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import CMHA.cmha
from CMHA.choosing import decide
from CMHA.implementations import IMPLEMENTATIONS, eager
from GPT2Model.config import from_preset
from GPT2Model.gpt2 import GPTModel
from GPT2Model.tokenizer import get_tokenizer
from GPT2Model.tracing import copy_tokens, diff, trace, zero_heads

ROOT = Path(__file__).resolve().parents[2]
EPS = torch.finfo(torch.float32).eps
CFG = from_preset("nano", vocab_size=90, context_length=32, emb_dim=24, n_heads=3, n_layers=3, init_std=0.2)
EVERYWHERE = ("eager", "sdpa", "flash_tiled")


@pytest.fixture
def ids():
    return torch.randint(0, 90, (2, 11), generator=torch.Generator().manual_seed(1))


def make(**changes) -> GPTModel:
    torch.manual_seed(0)
    return GPTModel(CFG | changes).eval()


@pytest.fixture
def model():
    return make()


@torch.no_grad()
def by_hand(model, ids) -> dict[str, torch.Tensor]:
    """The whole forward pass written out in float64, in no terms of the package's: name -> value."""
    weights = {name: tensor.double() for name, tensor in model.state_dict().items()}
    cfg, found = model.cfg, {}
    B, T = ids.shape
    H, C = cfg["n_heads"], cfg["emb_dim"]

    def linear(x, name):
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(x, name):
        centred = x - x.mean(-1, keepdim=True)
        return (
            centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weights[f"{name}.weight"]
            + weights[f"{name}.bias"]
        )

    found["token_embedding"] = weights["token_embedding.weight"][ids]
    found["position_embedding"] = weights["position_embedding.weight"][:T][None]
    x = found["embeddings"] = found["token_embedding"] + found["position_embedding"]
    hidden = torch.ones(T, T, dtype=torch.bool).triu(1)
    for i in range(cfg["n_layers"]):
        of = f"blocks.{i}."
        found[f"{of}norm_1"] = norm(x, f"{of}norm_1")
        qkv = found[f"{of}attention.qkv"] = linear(found[f"{of}norm_1"], f"{of}attention.W_qkv")
        q, k, v = (part.reshape(B, T, H, C // H).permute(0, 2, 1, 3) for part in qkv.split(C, -1))
        found |= {f"{of}attention.queries": q, f"{of}attention.keys": k, f"{of}attention.values": v}
        scores = found[f"{of}attention.scores"] = torch.einsum("bhqd,bhkd->bhqk", q, k) / (C // H) ** 0.5
        found[f"{of}attention.weights"] = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        context = found[f"{of}attention.context"] = torch.einsum("bhqk,bhkd->bhqd", found[f"{of}attention.weights"], v)
        merged = found[f"{of}attention.merged"] = context.permute(0, 2, 1, 3).reshape(B, T, C)
        found[f"{of}attention.output"] = linear(merged, f"{of}attention.out_proj")
        x = found[f"{of}after_attention"] = x + found[f"{of}attention.output"]
        found[f"{of}norm_2"] = norm(x, f"{of}norm_2")
        h = found[f"{of}feed_forward.hidden"] = linear(found[f"{of}norm_2"], f"{of}feed_forward.up_proj")
        inner = (2 / torch.pi) ** 0.5 * (h + 0.044715 * h**3)
        found[f"{of}feed_forward.activated"] = 0.5 * h * (1 + inner.tanh())
        found[f"{of}feed_forward.output"] = linear(found[f"{of}feed_forward.activated"], f"{of}feed_forward.down_proj")
        x = found[f"{of}output"] = x + found[f"{of}feed_forward.output"]
    found["final_norm"] = norm(x, "final_norm")
    found["logits"] = found["final_norm"] @ weights["token_embedding.weight"].T
    return found


# --------------------------------------------------------------- what it shows


@pytest.mark.parametrize("name", EVERYWHERE)
def test_every_value_is_the_one_that_the_formulas_give(model, ids, name):
    model.set_attention(name)
    found, expected = trace(model, ids, recompute=True), by_hand(model, ids)
    assert len(expected) == 3 + 16 * 3 + 2
    for key, value in expected.items():
        # a few dozen roundings on the way, each of the size of the largest number
        torch.testing.assert_close(found[key].double(), value, rtol=0, atol=100 * EPS * float(value.abs().max()))
    others = {key for key in found.values if key not in expected and ".tile" not in key and "log_sum_exp" not in key}
    assert others == {f"blocks.{i}.attention.masked_scores" for i in range(3)}


def test_the_order_is_that_of_computation(model, ids):
    with model.using_attention("eager"):
        names = trace(model, ids).names()
    assert names[:3] == ["token_embedding", "position_embedding", "embeddings"]
    assert names[-2:] == ["final_norm", "logits"]
    block = [name.removeprefix("blocks.1.") for name in names if name.startswith("blocks.1.")]
    assert block == [
        "norm_1", "attention.qkv", "attention.queries", "attention.keys", "attention.values", "attention.scores",
        "attention.masked_scores", "attention.weights", "attention.context", "attention.merged", "attention.output",
        "after_attention", "norm_2", "feed_forward.hidden", "feed_forward.activated", "feed_forward.output", "output",
    ]  # fmt: skip


def test_it_shows_what_hugging_faces_gpt2_shows(ids):
    torch.manual_seed(0)
    theirs = GPT2LMHeadModel(GPT2Config(vocab_size=90, n_positions=32, n_embd=24, n_layer=3, n_head=3)).eval()
    ours = GPTModel.from_pretrained(theirs.state_dict(), CFG)
    with torch.no_grad():
        result = theirs(ids, output_hidden_states=True)
    found = trace(ours, ids)
    stream = [found["embeddings"], *(found[f"blocks.{i}.output"] for i in range(2)), found["final_norm"]]
    for mine, other in zip(stream, result.hidden_states, strict=True):  # their last one is after the final norm
        torch.testing.assert_close(mine, other, rtol=0, atol=50 * EPS * float(other.abs().max()))


@pytest.mark.parametrize("name", EVERYWHERE)
@pytest.mark.parametrize("recompute", [False, True])
def test_with_a_trace_the_logits_are_bitwise_equal(model, ids, name, recompute):
    model.set_attention(name)
    with torch.no_grad():
        expected = model(ids)
    assert torch.equal(trace(model, ids, recompute=recompute).logits, expected)
    with torch.no_grad():
        assert torch.equal(model(ids), expected)  # and nothing stays behind


def test_nothing_stays_on_the_model_not_even_after_an_error(model, ids):
    def hooks():
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())

    trace(model, ids)
    with pytest.raises(ValueError, match="context_length=32"):
        trace(model, ids.repeat(1, 4))
    with pytest.raises(ZeroDivisionError):
        trace(model, ids, patch={"blocks.0.output": lambda x: 1 / 0})
    assert hooks() == 0
    assert torch.equal(trace(model, ids).logits, model(ids))  # nobody listens any more


def test_axes_are_named_after_the_cfg_and_have_its_sizes(ids):
    model = make(n_kv_heads=1, attn_implementation="eager")
    sizes = {
        "batch": 2, "tokens": 11, "emb_dim": 24, "n_heads": 3, "n_kv_heads": 1, "head_dim": 8, "query_tokens": 11,
        "key_tokens": 11, "ff_dim": 96, "vocab_size": 90, "qkv": 24 + 8 + 8,
    }  # fmt: skip
    for value in trace(model, ids).values.values():
        for axis, size in zip(value.axes, value.tensor.shape, strict=True):
            assert sizes[axis] == size or (value.name == "position_embedding" and axis == "batch"), value
        assert len(value.about) > 10


def test_tiles_come_by_name_and_end_in_the_log_sum_exp(ids):
    model = make(attn_implementation="flash_tiled", flash_query_block_size=4, flash_kv_block_size=4)
    found = trace(model, ids, recompute=True)
    starts = {name.split("tile")[1].split(".")[0] for name in found.names("blocks.0.attention.tile[*].scores")}
    spans = [(0, 4), (4, 8), (8, 11)]
    assert starts == {f"[{a}:{b},{c}:{d}]" for a, b in spans for c, d in spans if c <= a}
    scores = found["blocks.2.attention.masked_scores"].double()
    expected = torch.logsumexp(scores, dim=-1)
    torch.testing.assert_close(
        found["blocks.2.attention.log_sum_exp"].flatten(1, 2).double(), expected, rtol=0, atol=20 * EPS
    )
    last = "blocks.2.attention.tile[8:11,8:11]."
    ended = found[f"{last}running_max"] + found[f"{last}running_sum"].log()
    torch.testing.assert_close(ended.flatten(1, 2)[..., 0].double(), expected[:, :, 8:11], rtol=0, atol=20 * EPS)


def test_statistics_are_those_of_numpy_and_leave_hidden_scores_out(ids):
    model = make(attn_implementation="eager")
    found = trace(model, ids)
    numbers = found["blocks.1.attention.scores"].double().numpy()
    statistics = found.values["blocks.1.attention.scores"].statistics()
    expected = {"mean": numbers.mean(), "std": numbers.std(), "min": numbers.min(), "max": numbers.max()}
    expected["rms"] = (numbers**2).mean() ** 0.5
    assert {key: statistics[key] for key in expected} == pytest.approx(expected, rel=1e-9)
    masked = found.values["blocks.1.attention.masked_scores"].statistics()
    assert masked["hidden"] == 2 * 3 * 11 * 10 // 2
    assert masked["min"] > -1e6
    assert found.values["blocks.1.attention.weights"].statistics()["zeros"] == masked["hidden"]


def test_dropouts_values_have_names_only_where_dropout_is_on(ids):
    model = make(drop_rate=0.5)
    assert not trace(model, ids).names("*dropped")
    model.train()
    torch.manual_seed(3)
    found = trace(model, ids)
    assert found.names("blocks.0.*dropped") == ["blocks.0.attention.dropped", "blocks.0.feed_forward.dropped"]
    kept = found["blocks.0.attention.dropped"] != 0
    torch.testing.assert_close(
        found["blocks.0.attention.dropped"][kept], 2 * found["blocks.0.attention.output"][kept], rtol=0, atol=0
    )
    assert "DROPOUT IS ON" in str(found)
    torch.manual_seed(3)
    with torch.no_grad():
        assert torch.equal(found.logits, model(ids))


def test_a_text_is_read_by_gpt2s_tokenizer_where_the_vocabulary_is_gpt2s(model):
    big = GPTModel(from_preset("nano", n_layers=1, emb_dim=8, n_heads=2)).eval()
    found = trace(big, "The cat sat.")
    assert found.tokens == [["The", " cat", " sat", "."]]
    assert found.ids.tolist() == [get_tokenizer().encode("The cat sat.")]
    with pytest.raises(ValueError, match="pass its tokenizer="):
        trace(model, "The cat sat.")
    assert trace(model, [5, 6]).tokens == [["5", "6"]]


@pytest.mark.parametrize("wrong", ["", [], torch.zeros(2, 2, 2, dtype=torch.long)])
def test_what_is_not_ids_or_text_is_refused_in_words(wrong):
    with pytest.raises(ValueError, match=r"has no tokens|one token at least"):
        trace(make(vocab_size=50257), wrong)


# -------------------------------------------------------- weights that are not there


@pytest.mark.parametrize("name", ["sdpa", "flash_tiled"])
def test_under_a_fused_implementation_it_says_why_weights_are_missing(model, ids, name):
    model.set_attention(name)
    found = trace(model, ids)
    with pytest.raises(KeyError) as error:
        found["blocks.0.attention.weights"]
    assert f"attention ran by {name}" in str(error.value)
    assert "recompute=True" in str(error.value)
    assert "blocks.0.attention.weights" not in found


def test_recomputed_weights_say_so_and_give_the_context_that_ran(model, ids):
    found = trace(model, ids, recompute=True)
    assert found.implementation == "sdpa"
    assert all(found.values[name].recomputed for name in found.names("*.weights"))
    assert not found.values["blocks.0.attention.context"].recomputed
    again = found["blocks.1.attention.weights"] @ found["blocks.1.attention.values"]
    torch.testing.assert_close(
        again, found["blocks.1.attention.context"], rtol=0, atol=20 * EPS * float(again.abs().max())
    )
    assert "(recomputed)" in found.table("*.weights")


def test_recomputing_honours_padding_and_grouped_heads(ids):
    model = make(n_kv_heads=1)
    padding_mask = torch.ones(2, 11, dtype=torch.bool)
    padding_mask[0, :4] = False
    found = trace(model, ids, recompute=True, padding_mask=padding_mask)
    weights = found["blocks.0.attention.weights"]
    assert weights[0, :, :, :4].abs().max() == 0
    assert weights[0, :, :4].abs().max() == 0
    assert weights[1, :, :, :4].abs().max() > 0
    again = weights @ found["blocks.0.attention.values"]  # one key-value head: it broadcasts
    torch.testing.assert_close(
        again, found["blocks.0.attention.context"], rtol=0, atol=20 * EPS * float(again.abs().max())
    )


# ------------------------------------------------------------------- patches


@pytest.mark.parametrize("name", EVERYWHERE)
def test_a_head_taken_out_is_a_head_whose_columns_of_the_projection_are_zero(model, ids, name):
    model.set_attention(name)
    without = copy.deepcopy(model)
    with torch.no_grad():
        without.blocks[1].attention.out_proj.weight[:, 2 * 8 : 3 * 8] = 0  # head 2 is 8 wide
    found = trace(model, ids, patch={"blocks.1.attention.context": zero_heads(2)})
    with torch.no_grad():
        expected = without(ids)
    torch.testing.assert_close(found.logits, expected, rtol=0, atol=100 * EPS * float(expected.abs().max()))
    assert (found.logits - trace(model, ids).logits).abs().max() > 1e-3
    assert found.values["blocks.1.attention.context"].patched
    assert not found.values["blocks.1.attention.queries"].patched


@pytest.mark.parametrize("at", ["embeddings", "blocks.0.output", "blocks.1.after_attention", "blocks.2.norm_1"])
def test_the_whole_stream_of_another_pass_gives_the_other_logits(model, ids, at):
    other = trace(model, ids.flip(1))
    found = trace(model, ids, patch={at: other[at]})
    if at == "blocks.2.norm_1":  # a side road: the stream itself goes on
        assert not torch.equal(found.logits, other.logits)
    else:
        assert torch.equal(found.logits, other.logits)


def test_copied_positions_change_nothing_before_them(model, ids):
    other = trace(model, ids.flip(1))
    found = trace(model, ids, patch={"blocks.0.output": copy_tokens(other["blocks.0.output"], 6, 7)})
    plain = trace(model, ids)
    moved = (found.logits - plain.logits).abs().amax(dim=(0, 2))
    assert moved[:6].max() == 0
    assert moved[6:].min() > 1e-4
    expected = plain["blocks.0.output"].clone()
    expected[:, 6], expected[:, 7] = other["blocks.0.output"][:, 6], other["blocks.0.output"][:, 7]
    assert torch.equal(found["blocks.0.output"], expected)


@pytest.mark.parametrize(
    "at", ["token_embedding", "blocks.0.attention.qkv", "blocks.0.attention.queries", "blocks.0.attention.weights",
           "blocks.0.attention.scores", "blocks.0.attention.merged", "blocks.0.attention.output",
           "blocks.0.feed_forward.hidden", "blocks.0.feed_forward.activated", "final_norm"],
)  # fmt: skip
def test_a_patch_goes_on_through_the_rest_of_the_pass(ids, at):
    model = make(attn_implementation="eager")
    found = trace(model, ids, patch={at: lambda x: -2 * x})
    assert (found.logits - trace(model, ids).logits).abs().max() > 1e-3
    assert torch.equal(found[at], -2 * trace(model, ids)[at])


def test_a_patch_that_writes_into_its_tensor_leaves_the_values_before_it_alone(model, ids):
    plain = trace(model, ids)

    def writes(x):
        x[:] = 0
        return x

    found = trace(model, ids, patch={"blocks.0.attention.merged": writes})
    assert torch.equal(found["blocks.0.attention.context"], plain["blocks.0.attention.context"])


def test_a_pattern_patches_every_layer(model, ids):
    found = trace(model, ids, patch={"blocks.*.attention.output": torch.zeros_like})
    assert all(torch.equal(found[f"blocks.{i}.after_attention"], found[x]) for i, x in
               enumerate(["embeddings", "blocks.0.output", "blocks.1.output"]))  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"names": "blocks.0.queries"}, r"names: 'blocks.0.queries' fits no value.*blocks.0.attention.queries"),
        ({"patch": {"blocks.9.output": torch.zeros_like}}, r"patch: 'blocks.9.output' fits no value"),
        ({"patch": {"blocks.0.attention.weights": torch.zeros_like}}, r"sdpa, which never forms it.*under eager"),
        ({"patch": {"blocks.0.attention.weights": torch.zeros_like}, "recompute": True}, r"sdpa, which never forms it"),
        ({"patch": {"blocks.0.output": torch.zeros(3, 3)}}, r"has shape \(3, 3\), the value it replaces \(2, 11, 24\)"),
        ({"patch": {"blocks.0.output": lambda x: None}}, r"gave NoneType: it must be a tensor, or return one"),
        ({"patch": {"blocks.0.output": zero_heads(1)}}, r"zero_heads\(1,\) needs a value"),
        ({"patch": {"blocks.0.attention.context": zero_heads(3)}}, r"with these heads"),
        ({"patch": {"blocks.0.output": copy_tokens(torch.zeros(1, 11, 24), 11)}}, r"from 0 to 10"),
        (
            {"patch": {"blocks.0.attention.context": copy_tokens(torch.zeros(1, 11, 24), 1)}},
            r"both are \(batch, tokens",
        ),
        (
            {"patch": {"blocks.0.output": copy_tokens(torch.zeros(3, 11, 24), 1)}},
            r"cannot put \(3, 11, 24\) into \(2, 11",
        ),
        ({"names": "blocks.0.attention.weights"}, r"sdpa, which never forms it: recompute=True"),
        ({"names": "blocks.7.attention.weights", "recompute": True}, r"fits no value of this pass. Near: blocks"),
    ],
)
def test_what_cannot_be_done_is_said(model, ids, arguments, words):
    with pytest.raises(ValueError, match=words):
        trace(model, ids, **arguments)


def test_first_tries_that_go_wrong_are_answered_in_words():
    """Beside the shapes that these tests check, so in a process of its own."""
    script = """
import torch
from GPT2Model.config import from_preset
from GPT2Model.gpt2 import GPTModel
from GPT2Model.tokenizer import GPT2Tokenizer
from GPT2Model.tracing import copy_tokens, diff, trace, zero_heads

model = GPTModel(from_preset("nano", n_layers=1)).eval()
t = trace(model, [1, 2])
for attempt in (
    lambda: trace("text", model), lambda: diff(t, t, t.ids), lambda: trace(model, "text", tokenizer=GPT2Tokenizer),
    lambda: trace(model, "text", patch=zero_heads(0)), lambda: t[0], lambda: zero_heads([0, 1]),
    lambda: t.table("blocks.0.querys"), lambda: trace(model, {"a": 1}), lambda: trace(model, torch.randn(1, 4)),
    lambda: trace(model, [1], names=None), lambda: trace(model, [1], names=[3]),
    lambda: diff(model, model, [1], names=[]),
    lambda: trace(model, [1], patch={0: torch.zeros(1)}), lambda: copy_tokens("x", 1),
    lambda: copy_tokens(torch.zeros(1, 2, 3), 1.5), lambda: diff(model, model, [1], tolerance="a"),
):
    try:
        attempt()
    except (TypeError, ValueError, KeyError) as error:
        print(type(error).__name__, "|", error)
    else:
        print("nothing was said")
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    expected = [
        "TypeError | the model comes first, and is a GPTModel; got str: trace(model, text).",
        "TypeError | the model comes first, and is a GPTModel; got Trace: trace(model, text).",
        "TypeError | tokenizer is the class GPT2Tokenizer: make one, GPT2Tokenizer().",
        "TypeError | patch is a dict,",
        'TypeError | values are asked for by name, trace["logits"], got 0',
        "TypeError | zero_heads takes numbers of heads, zero_heads(0, 2), got ([0, 1],)",
        "MissingValueError | no value is called 'blocks.0.querys'; the blocks are 0 to 0; near:",
        "ValueError | trace() takes a text or token ids (B, T), got dict.",
        "ValueError | ids must be an int64 tensor (B, T), got torch.float32",
        *["TypeError | names are texts, one at least"] * 4,
        *["TypeError | copy_tokens takes a value (batch, tokens, width)"] * 2,
        "ValueError | tolerance is a number, 0 or more",
    ]
    assert [line[: len(words)] for line, words in zip(said, expected, strict=True)] == expected


def test_a_name_that_was_left_out_or_misspelt_is_told_apart(model, ids):
    found = trace(model, ids, names=["blocks.0.*", "logits"])
    with pytest.raises(KeyError, match="was not recorded"):
        found["blocks.1.output"]
    with pytest.raises(KeyError, match=r"blocks\.0\.attention\.weights was not recorded: names="):
        trace(model, ids, names="logits", recompute=True)["blocks.0.attention.weights"]
    with pytest.raises(KeyError, match=r"no value is called .*weights'; the blocks are 0 to 2; near"):
        trace(model, ids, recompute=True)["blocks.3.attention.weights"]
    with pytest.raises(KeyError, match=r"near: blocks\.0\.attention\.queries"):
        found["blocks.0.attention.querys"]


# ------------------------------------------------------------ memory, gradients, compiling


def test_memory_is_bounded_by_the_names(model, ids):
    some = trace(model, ids, names=["*.context", "logits"])
    assert some.names() == [
        "blocks.0.attention.context",
        "blocks.1.attention.context",
        "blocks.2.attention.context",
        "logits",
    ]
    assert some.nbytes() == 3 * 2 * 11 * 24 * 4 + 2 * 11 * 90 * 4
    assert trace(model, ids).nbytes() > 5 * some.nbytes()


def test_what_several_names_share_is_counted_once(model, ids):
    whole = trace(model, ids, names="*.qkv").nbytes()
    assert trace(model, ids, names=["*.qkv", "*.queries", "*.keys", "*.values"]).nbytes() == whole


def test_no_table_is_made_for_weights_that_nobody_asked_for(model, ids, monkeypatch):
    made = []
    original = eager.attention
    monkeypatch.setattr(eager, "attention", lambda *args, **named: made.append(1) or original(*args, **named))
    trace(model, ids, names="logits", recompute=True)
    assert made == []
    trace(model, ids, names=["logits", "blocks.1.attention.scores"], recompute=True)
    assert made == [1]


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("name", [*EVERYWHERE, "auto", "flex_attention"])
def test_it_names_the_implementation_that_ran(model, ids, name, gradients, monkeypatch):
    model.set_attention(name)
    ran = []

    def choose(settings, request):
        choice = decide(settings, request)
        ran.append(choice.chosen)
        return choice

    monkeypatch.setattr(CMHA.cmha, "choose", choose)
    with torch.no_grad():  # what surrounds the trace is not what counts
        found = trace(model, ids, names="blocks.*.output", gradients=gradients)
    assert list(found.implementations.values()) == ran
    assert len(ran) == 3
    assert found.implementation == ran[0]
    if name == "flex_attention":
        assert (ran[0] == "flex_attention") is not gradients or not flex_usable()


def flex_usable() -> bool:
    layer = GPTModel(CFG).requires_grad_(False).blocks[0].attention
    return not IMPLEMENTATIONS["flex_attention"].check(layer.typical_request())


def test_a_dtype_other_than_the_models_is_taken_over(model, ids):
    given = trace(model, ids)["blocks.0.output"].double() * 2
    found = trace(model, ids, patch={"blocks.0.output": given})
    assert found["blocks.0.output"].dtype == torch.float32
    assert torch.equal(found["blocks.0.output"], given.float())


def test_nans_are_counted(model, ids):
    with torch.no_grad():
        model.blocks[1].feed_forward.down_proj.bias[3] = torch.nan
    assert trace(model, ids).values["blocks.1.feed_forward.output"].statistics()["nans"] == 2 * 11


def test_what_was_not_asked_for_is_let_go(model, ids):
    seen = []

    def look(x):
        seen.append(weakref.ref(x))
        return x

    kept = trace(model, ids, names="logits", patch={"blocks.0.feed_forward.hidden": look})
    gc.collect()
    assert kept.names() == ["logits"]
    assert seen[0]() is None


def test_gradients_reach_every_value(model, ids):
    found = trace(model, ids, gradients=True)
    found.logits.square().sum().backward()
    grad = found["blocks.1.output"].grad
    small = 1e-3  # a central difference along one direction of that value, in float64
    double, direction = copy.deepcopy(model).double(), torch.randn(2, 11, 24, dtype=torch.float64)
    losses = [
        trace(double, ids, patch={"blocks.1.output": lambda x, s=s: x + s * small * direction}).logits.square().sum()
        for s in (1, -1)
    ]
    expected = float(losses[0] - losses[1]) / (2 * small)
    assert float((grad.double() * direction).sum()) == pytest.approx(expected, rel=1e-4)


def test_a_compiled_model_is_traced_as_it_is_written():
    """In a process of its own, since torch.compile cannot see through the shapes that these tests check."""
    script = """
import torch
from GPT2Model.config import from_preset
from GPT2Model.gpt2 import GPTModel
from GPT2Model.tracing import trace

torch.manual_seed(0)
model = GPTModel(from_preset("nano", vocab_size=90, emb_dim=16, n_heads=2, n_layers=2)).eval()
ids = torch.arange(7)[None]
expected = trace(model, ids)
compiled = torch.compile(model, backend="eager")
compiled(ids)
found = trace(compiled, ids)
assert found.names() == expected.names() and torch.equal(found.logits, expected.logits)
for block in model.blocks:
    block.compile(backend="eager")
model(ids)
found = trace(model, ids)
assert found.names() == expected.names() and torch.equal(found.logits, expected.logits)
print("traced", len(found.names()))
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"traced {3 + 14 * 2 + 2}" in done.stdout


# ------------------------------------------------------------------------- diff


@pytest.mark.parametrize(
    ("weight", "first"),
    [
        ("token_embedding.weight", "token_embedding"),
        ("blocks.1.norm_1.bias", "blocks.1.norm_1"),
        ("blocks.2.attention.W_qkv.weight", "blocks.2.attention.qkv"),
        ("blocks.0.attention.out_proj.bias", "blocks.0.attention.output"),
        ("blocks.1.feed_forward.up_proj.weight", "blocks.1.feed_forward.hidden"),
        ("final_norm.weight", "final_norm"),
    ],
)
def test_diff_names_the_first_tensor_that_a_changed_weight_moves(model, ids, weight, first):
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.get_parameter(weight).add_(torch.randn(other.get_parameter(weight).shape))
    found = diff(model, other, ids)
    assert found.first == first
    one, two = trace(model, ids)[first], trace(other, ids)[first]
    assert found.amount == pytest.approx(float((one.double() - two.double()).abs().max()), rel=1e-12)
    assert f"They part at {first}: " in str(found)


def test_two_implementations_part_by_rounding_only(model, ids):
    other = copy.deepcopy(model)
    other.set_attention("eager")
    found = diff(model, other, ids)
    assert found.first is None
    assert found.amount == 0
    verdicts = {row.name: row.verdict for row in found.rows}
    assert verdicts["embeddings"] == "same bits"
    assert verdicts["logits"] in ("rounding", "same bits")
    assert verdicts["blocks.0.attention.weights"] == "only in b"
    assert diff(model, other, ids, tolerance=0.0).first is not None


def test_a_nan_and_another_width_are_seen(model, ids):
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.blocks[1].feed_forward.down_proj.bias[3] = torch.nan
    found = diff(model, other, ids)
    assert found.first == "blocks.1.feed_forward.output"
    assert found.amount == float("inf")
    wider = diff(model, make(emb_dim=48), ids)
    assert wider.first == "token_embedding"
    assert "shapes (2, 11, 24) and (2, 11, 48)" in str(wider)


def counted(found) -> dict[str, int]:
    """{verdict: how many} of the summary line, which must add up."""
    (line,) = [line for line in str(found).splitlines() if line.endswith(" in all")]
    counts, total = line.split("; ")
    counts = {verdict: int(count) for count, verdict in (part.split(" ", 1) for part in counts.split(", "))}
    assert sum(counts.values()) == int(total.split()[0]) == len(found.rows)
    return counts


def test_the_summary_counts_every_row_and_another_shape_has_no_figure(model, ids):
    found = diff(model, make(emb_dim=48), ids)
    verdicts = [row.verdict for row in found.rows]
    assert counted(found)["other shape"] == verdicts.count("other shape") > 0
    assert "inf" not in str(found)
    for row, line in zip(found.rows, str(found).splitlines()[2:], strict=True):
        assert (row.verdict == "other shape") is (f"  {row.note}" in line and "shapes (" in line)
    other = copy.deepcopy(model)
    other.set_attention("eager")
    assert counted(diff(model, other, ids))["only in b"] > 0
    with torch.no_grad():
        other.blocks[1].feed_forward.down_proj.bias[3] = torch.nan
    found = diff(model, other, ids)
    counted(found)
    assert "(a number against NaN or inf)" in str(found)
    assert "inf of the largest" not in str(found)


@pytest.mark.parametrize(
    ("dtype", "rounding", "more"),
    [
        (torch.float64, 1e-11, 1e-7),
        (torch.float32, 1e-7, 1e-3),
        (torch.bfloat16, 1e-2, 0.5),
        (torch.float16, 1e-2, 0.5),
    ],
)
def test_what_passes_as_rounding_depends_on_the_dtype_and_on_the_size(ids, dtype, rounding, more):
    """The embeddings are a thousand large: differences are held against that."""
    one = make()
    with torch.no_grad():
        one.token_embedding.weight.mul_(1000 / one.token_embedding.weight.abs().max())
    one = one.to(dtype)
    for change, parts in ((rounding, False), (more, True)):
        other = copy.deepcopy(one)
        with torch.no_grad():
            other.token_embedding.weight[ids[0, 3], 5] += 1000 * change
        found = diff(one, other, ids, names="token_embedding")
        (row,) = found.rows
        assert (row.verdict == "parted") is parts, row
        assert row.verdict != "same bits" or dtype in (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("name", ["flash_tiled", "eager"])
def test_hidden_scores_are_equal_and_do_not_count_as_large(ids, name):
    """-inf in tiles, the lowest number in eager: neither is a difference, nor what a difference is held against."""
    one = make(attn_implementation=name, flash_query_block_size=4, flash_kv_block_size=4)
    other = copy.deepcopy(one)
    with torch.no_grad():
        other.blocks[0].attention.W_qkv.weight.add_(0.1 * torch.randn_like(other.blocks[0].attention.W_qkv.weight))
    pattern = "blocks.0.attention.masked_scores" if name == "eager" else "blocks.0.attention.tile[0:4,0:4].scores"
    (row,) = diff(one, other, ids, names=pattern).rows
    assert row.verdict == "parted"
    assert 0 < row.amount < 100
    assert row.relative > 1e-3


def test_an_exact_gelu_is_found_in_the_first_block(model, ids):
    other = copy.deepcopy(model)
    for block in other.blocks:
        block.feed_forward.gelu = torch.nn.GELU()
    assert diff(model, other, ids).first == "blocks.0.feed_forward.activated"
