"""CMHA/with_transformers.py at its limits: other models, masks that do not fit, names that cannot serve."""

import importlib
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForSeq2SeqLM,
)

from CMHA import with_transformers
from CMHA.choosing.choose import AttentionSettings
from CMHA.implementations import IMPLEMENTATIONS
from CMHA.masks import AttentionMask
from CMHA.transformers_masks import TableMask
from CMHA.with_transformers import register_with_transformers, transformers_names
from tests.CMHA.transformers_models import (
    EXACT,
    GENERATE,
    IDS,
    LLAMA,
    MODELS,
    PADDING,
    QUICK,
    TOKENS,
    build,
    registered,  # noqa: F401 (a fixture)
)

choosing = importlib.import_module("CMHA.choosing.choose")  # `CMHA.choosing.choose` is the function of that name


# --- other models: right, or refused


@pytest.mark.parametrize("name", QUICK)
@pytest.mark.parametrize("kind", ["mistral", "llama4_text"])
def test_windows_and_chunks_are_kept(kind, name):
    for padding in ("none", "left"):
        exact = build(kind, EXACT[kind])(IDS, attention_mask=PADDING[padding]).logits
        found = build(kind, name)(IDS, attention_mask=PADDING[padding]).logits
        real = PADDING[padding].bool()
        torch.testing.assert_close(found[real], exact[real], rtol=1e-9, atol=1e-10)
    wider = {"sliding_window": 40, "attention_chunk_size": 40}
    everything = build(kind, EXACT[kind], **{k: v for k, v in wider.items() if k in MODELS[kind]})(IDS).logits
    assert not torch.allclose(everything, build(kind, name)(IDS).logits)  # the window was felt


def test_a_squeeze_of_the_scores_is_refused_only_where_there_is_one():
    exact = build("gemma2", dtype=torch.float32)(IDS).logits  # every second layer has a window
    found = build("gemma2", "gpt2_tiled", torch.float32)(IDS).logits
    torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "changes", "words"),
    [
        ("gemma2", {"attn_logit_softcapping": 5.0}, "softcap: the scores are squeezed by a tanh"),
        ("gpt_oss", {}, "s_aux: each head has a sink"),
        ("bloom", {}, "this model computes with its attention mask"),
    ],
)
def test_what_ours_would_get_wrong_is_refused(kind, changes, words):
    model = build(kind, "gpt2_tiled", **changes)
    with pytest.raises(ValueError, match=f'{words}|use attn_implementation="eager"') as refused:
        model(IDS)
    assert words in str(refused.value)
    assert 'attn_implementation="eager"' in str(refused.value)


def test_a_bias_on_the_scores_is_refused():
    model = build("t5", "gpt2_tiled", kind_of_model=AutoModelForSeq2SeqLM)
    with pytest.raises(ValueError, match="position_bias: a bias is added to the scores"):
        model(IDS, decoder_input_ids=IDS)


@pytest.mark.parametrize("name", QUICK)
@pytest.mark.parametrize("padding", PADDING)
def test_attention_in_both_directions_is_right_in_bert(name, padding):
    found, exact = (
        build("bert", which, kind_of_model=AutoModel)(IDS, attention_mask=PADDING[padding])
        for which in (name, EXACT["bert"])
    )
    real = PADDING[padding].bool()
    torch.testing.assert_close(found.last_hidden_state[real], exact.last_hidden_state[real], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", QUICK)
def test_an_encoder_and_its_decoder_are_right(name):
    inputs = {"attention_mask": PADDING["right"], "decoder_input_ids": IDS[:, :7]}
    model = build("bart", EXACT["bart"], kind_of_model=AutoModelForSeq2SeqLM)
    exact = model(IDS, **inputs).logits
    more = {"attention_mask": PADDING["right"], "max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    expected = model.generate(IDS, **more)
    model.set_attn_implementation(name)
    torch.testing.assert_close(model(IDS, **inputs).logits, exact, rtol=1e-9, atol=1e-10)
    assert torch.equal(model.generate(IDS, **more), expected)


def test_a_model_that_is_set_to_look_both_ways_does():
    exact = build("llama", "sdpa", is_causal=False)(IDS).logits
    assert not torch.allclose(exact, build("llama", "sdpa")(IDS).logits)
    torch.testing.assert_close(build("llama", "gpt2_tiled", is_causal=False)(IDS).logits, exact, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", QUICK)
def test_a_table_of_ones_own_is_used(name):
    table = torch.rand(3, 1, TOKENS, TOKENS, generator=torch.Generator().manual_seed(1)) < 0.5
    table |= torch.eye(TOKENS, dtype=torch.bool)
    additive = torch.zeros(table.shape, dtype=torch.float64).masked_fill(~table, -torch.inf)
    exact = build("llama", "sdpa")(IDS, attention_mask=table).logits
    for mask in (table, additive):
        found = build("llama", name)(IDS, attention_mask=mask).logits
        torch.testing.assert_close(found, exact, rtol=1e-9, atol=1e-10)


def one_call(name="gpt2_tiled", strict=False, mask=None, width=8, **others):
    attend = with_transformers.attention_function(name, transformers_names()[name], strict)
    layer = build("gpt2").transformer.h[0].attn
    q, k, v = torch.randn(2, 4, 5, 8), torch.randn(2, 4, 5, 8), torch.randn(2, 4, 5, width)
    return attend(layer, q, k, v, mask, **others)


def test_everything_that_is_in_the_way_is_said_at_once_and_nothing_unknown_is_ignored():
    with pytest.raises(ValueError) as refused:
        one_call(softcap=3.0, head_mask=torch.ones(4), brand_new=1, cu_seq_lens_q=torch.tensor([0, 2, 5]), width=6)
    said = str(refused.value)
    assert "gpt2_tiled cannot compute the attention of GPT2Attention" in said
    for problem in (
        "softcap: ",
        "head_mask: ",
        "brand_new: not known to us",
        "cu_seq_lens_q: packed",
        "values are 6 wide",
    ):
        assert problem in said
    one_call(softcap=None, position_ids=torch.arange(5), use_cache=True, brand_new=None)


def test_the_scale_is_the_models_own_and_else_that_of_the_head():
    torch.manual_seed(0)
    default = one_call()[0]
    torch.manual_seed(0)
    assert torch.equal(one_call(scaling=8**-0.5)[0], default)
    torch.manual_seed(0)
    assert not torch.allclose(one_call(scaling=1.0)[0], default)
    exact = build("gpt2", scale_attn_by_inverse_layer_idx=True)(IDS).logits
    found = build("gpt2", "gpt2_tiled", scale_attn_by_inverse_layer_idx=True)(IDS).logits
    torch.testing.assert_close(found, exact, rtol=1e-9, atol=1e-10)


# --- masks that do not fit


@pytest.mark.parametrize("shape", [(1, TOKENS), (2, TOKENS), (4, TOKENS), (3, TOKENS - 1), (3, TOKENS + 2), (1, 2)])
@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("name", ["gpt2_eager", "gpt2_sdpa", "gpt2_tiled"])
@pytest.mark.parametrize("kind", ["llama", "mistral"])  # the GPT-2 of transformers reshapes a mask before we see it
def test_an_attention_mask_of_another_batch_or_length_is_refused_with_both_shapes(kind, name, use_cache, shape):
    mask = torch.ones(shape, dtype=torch.long)
    mask[:, 0] = 0
    with pytest.raises(ValueError, match="attention_mask") as refused:
        build(kind, name)(IDS, attention_mask=mask, use_cache=use_cache)
    assert str(shape) in str(refused.value) or str(shape[1]) in str(refused.value)
    if use_cache or shape[0] != 3:
        assert f"has shape {shape}, and (3, " in str(refused.value)


@pytest.mark.parametrize("name", QUICK)
def test_after_a_cache_the_mask_has_a_column_for_the_cached_tokens_too(name):
    model, mask = build("gpt2", name), PADDING["left"]
    cache = model(IDS[:, :8], attention_mask=mask[:, :8], use_cache=True).past_key_values
    with pytest.raises(ValueError, match=r"it has 3 columns for 11 tokens: .* the 8 in the cache included"):
        model(IDS[:, 8:], attention_mask=mask[:, 8:], past_key_values=cache)
    found = model(IDS[:, 8:], attention_mask=mask, past_key_values=cache).logits
    exact = build("gpt2")(IDS, attention_mask=mask).logits[:, 8:]
    torch.testing.assert_close(found, exact, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", QUICK)
def test_one_row_of_positions_and_one_table_serve_every_sequence(name):
    """What transformers itself lets one row stand for: it says nothing about padding."""
    places = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0, 1, 2, 3]])
    asked = {"position_ids": places, "use_cache": False}
    torch.testing.assert_close(
        build("gpt2", name)(IDS, **asked).logits, build("gpt2")(IDS, **asked).logits, rtol=1e-9, atol=1e-10
    )
    table = torch.ones(1, 1, TOKENS, TOKENS, dtype=torch.bool).tril()
    asked = {"attention_mask": table, "use_cache": False}
    torch.testing.assert_close(
        build("gpt2", name)(IDS, **asked).logits, build("gpt2")(IDS).logits, rtol=1e-9, atol=1e-10
    )


# --- where the named implementation cannot serve


def test_weights_come_from_eager_and_another_name_hands_over_with_a_warning(messages):
    for kind in ("gpt2", "llama"):
        exact = build(kind, dtype=torch.float32)(IDS, output_attentions=True).attentions
        found = build(kind, "gpt2_eager", torch.float32)(IDS, output_attentions=True).attentions
        assert messages == []
        handed_over = build(kind, "gpt2_tiled", torch.float32)(IDS, output_attentions=True).attentions
        for weights in (found, handed_over):
            assert len(weights) == len(exact) == 2
            for ours, theirs in zip(weights, exact, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
        assert "it never holds all the attention weights" in messages.pop().getMessage()
        messages.clear()
        choosing._warned.clear()
        choosing.chosen_once.cache_clear()


def test_a_name_that_cannot_run_here_falls_back_once_or_raises_when_strict(messages):
    exact = build("gpt2")(IDS).logits
    torch.testing.assert_close(build("gpt2", "gpt2_fa2")(IDS).logits, exact, rtol=1e-9, atol=1e-10)
    (message,) = messages
    assert message.levelname == "WARNING"
    assert "it runs on CUDA, not on cpu" in message.getMessage()
    assert "Using sdpa instead" in message.getMessage()
    assert message.getMessage().endswith('rid of this message: model.set_attn_implementation("gpt2_sdpa").')
    assert "cfg" not in message.getMessage()
    register_with_transformers(strict=True)
    with pytest.raises(ValueError, match="it computes in fp16 and bf16") as refused:
        build("gpt2", "gpt2_fa2")(IDS)
    assert "it runs on CUDA" in str(refused.value)
    assert "with strict=True nothing may take its place" in str(refused.value)
    assert "attn_strict" not in str(refused.value)
    torch.testing.assert_close(build("gpt2", "gpt2_tiled")(IDS).logits, exact, rtol=1e-9, atol=1e-10)
    register_with_transformers(strict=False)
    build("gpt2", "gpt2_fa2")(IDS)


def test_a_table_goes_to_sdpa_where_an_implementation_looks_at_rules(messages, monkeypatch):
    fakes = {"plain": {}, "dropping": {"PADDED_QUERIES_GIVE_ZERO": True}}
    for name, marks in fakes.items():
        fake = type("Fake", (), {"ALIASES": (), "SUMMARY": "", "check": lambda request: [], **marks})
        fake.attention = staticmethod(lambda *call, **options: pytest.fail("it was handed a table"))
        monkeypatch.setitem(IMPLEMENTATIONS, name, fake)
    register_with_transformers()
    table = torch.rand(2, 1, 5, 5) < 0.5
    torch.manual_seed(0)
    exact = one_call("gpt2_eager", mask=table)[0]
    for name in ("gpt2_plain", "gpt2_dropping"):
        torch.manual_seed(0)
        torch.testing.assert_close(one_call(name, mask=table)[0], exact, rtol=1e-4, atol=1e-5)
        said = messages.pop().getMessage()
        assert "it takes no mask that is only a table" in said
        assert 'model.set_attn_implementation("gpt2_sdpa")' in said
        with pytest.raises(ValueError, match="it takes no mask that is only a table; use gpt2_sdpa"):
            one_call(name, strict=True, mask=table)


def test_which_masks_are_handed_on_as_they_are():
    def after(name, mask):
        settings, mask = with_transformers.settings_for_mask(AttentionSettings(attn_implementation=name), mask)
        return settings.requested, mask

    padding = torch.tensor([[True, True, False]])
    row = TableMask(padding[:, None, None], 1)
    requested, mask = after("flex_attention", row)  # a row is a padding mask
    assert (requested, mask.kind) == ("flex_attention", "full+padding")
    assert torch.equal(mask.dense(), row.dense())
    # flash-attn takes query i for padding where key i is: in a row's last place, and in cross attention
    assert after("flash_attention_2", row) == ("sdpa", row)
    across = AttentionMask(3, 3, causal=False, padding_mask=padding)
    assert after("flash_attention_2", across) == ("sdpa", across)
    assert after("flex_attention", across) == ("flex_attention", across)
    causal = AttentionMask(3, 3, padding_mask=padding)
    assert after("flash_attention_2", causal) == ("flash_attention_2", causal)


COMPILED = """
    import sys
    sys.path.insert(0, {root!r})
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, CompileConfig
    from torch._dynamo.utils import counters
    from CMHA.with_transformers import register_with_transformers

    register_with_transformers()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **{llama!r}), attn_implementation="eager")
    ids, padding = torch.randint(0, 59, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    padding[1, :4] = 0
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for given in (None, padding):
        real = padding.bool() if given is not None else torch.ones(2, 9, dtype=torch.bool)
        model.set_attn_implementation("eager")
        exact = model(ids, attention_mask=given, use_cache=False).logits
        model.set_attn_implementation("gpt2_tiled")
        found = compiled(ids, attention_mask=given, use_cache=False).logits
        torch.testing.assert_close(found[real], exact[real], rtol=1e-4, atol=1e-5)
        found.sum().backward()
    settings = {generate!r} | {{"attention_mask": padding, "cache_implementation": "static"}}
    expected = model.generate(ids, **settings)
    counters.clear()
    compile_config = CompileConfig(backend="eager", fullgraph=True)
    compile_config._compile_all_devices = True
    assert torch.equal(model.generate(ids, **settings, compile_config=compile_config), expected)
    assert counters["stats"]["unique_graphs"] == 1, counters
    print("one graph")
"""


def test_a_compiled_model_is_one_graph_and_is_compiled_once_for_all_tokens_of_a_static_cache():
    root = Path(__file__).resolve().parents[2]
    code = textwrap.dedent(COMPILED).format(
        root=str(root), llama=LLAMA | {"num_hidden_layers": 1}, generate=GENERATE | {"max_new_tokens": 5}
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "one graph"
