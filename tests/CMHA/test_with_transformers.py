"""CMHA/with_transformers.py: transformers' own models on our implementations, against their own eager attention."""

import importlib
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
)

from CMHA import with_transformers
from CMHA.choosing.choose import AttentionSettings, reasons_against
from CMHA.implementations import IMPLEMENTATIONS
from CMHA.masks import AttentionMask
from CMHA.request import AttentionRequest
from CMHA.transformers_masks import TableMask
from CMHA.with_transformers import register_with_transformers, transformers_names, unregister_from_transformers
from orchestrator.evaluation.memory import peak_tensor_bytes

choosing = importlib.import_module("CMHA.choosing.choose")  # `CMHA.choosing.choose` is the function of that name

VOCABULARY, PAD, TOKENS = 61, 59, 11
WIDTHS = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 60, "pad_token_id": PAD}
LLAMA = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, **WIDTHS,
}  # fmt: skip
MODELS = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, **WIDTHS},
    "llama": LLAMA,
    "mistral": {**LLAMA, "sliding_window": 4},
    "gemma2": {**LLAMA, "head_dim": 8, "sliding_window": 4, "attn_logit_softcapping": None},
    "llama4_text": {
        **LLAMA, "head_dim": 8, "attention_chunk_size": 4, "num_local_experts": 2, "intermediate_size_mlp": 48,
    },
    "gpt_oss": {**LLAMA, "head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1, "rope_scaling": None},
    "bloom": {"hidden_size": 32, "n_layer": 1, "n_head": 4, **WIDTHS},
    "bert": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, **WIDTHS},
    "t5": {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4, "pad_token_id": 0, "vocab_size": 61},
    "bart": {
        "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
        "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 64,
        "decoder_start_token_id": 0, "forced_eos_token_id": None, **WIDTHS,
    },
}  # fmt: skip


def usable(dtype=torch.float32, needs_grad=False) -> list[str]:
    """Our names for transformers that run here, for models as small as these."""
    request = AttentionRequest(
        dtype=dtype, needs_grad=needs_grad, head_dim=8, query_len=TOKENS, key_len=TOKENS, num_heads=4, num_kv_heads=4
    )
    return [name for name, canonical in transformers_names().items() if not reasons_against(canonical, request)]


QUICK = usable(torch.float64, needs_grad=True)  # exact, and nothing to be compiled
IDS = torch.randint(0, PAD, (3, TOKENS), generator=torch.Generator().manual_seed(5))
PADDING = {
    "none": torch.ones(3, TOKENS, dtype=torch.long),
    "left": (torch.arange(TOKENS)[None] >= torch.tensor([[0], [4], [7]])).long(),
    "right": (torch.arange(TOKENS)[None] < torch.tensor([[TOKENS], [6], [3]])).long(),
}
# The reference in float64. Llama's eager attention takes its softmax in float32 whatever the dtype, and gives NaN in
# float64 for a query that may see nothing: transformers' sdpa is the exact one there.
EXACT = {"gpt2": "eager", "llama": "sdpa", "mistral": "sdpa", "llama4_text": "sdpa", "bert": "sdpa", "bart": "sdpa"}


def labels_of(padding: str) -> torch.Tensor:
    """What is predicted from a real token, and is one: a padded query has no right answer."""
    real = PADDING[padding].bool()
    return IDS.masked_fill(~(real & real.roll(1, dims=1)), -100)


@pytest.fixture(autouse=True)
def registered():
    """The registries are transformers' own and the process's: our names leave with the test."""
    unregister_from_transformers()
    before = dict(AttentionInterface._global_mapping), dict(AttentionMaskInterface._global_mapping)
    register_with_transformers()
    yield
    unregister_from_transformers()
    assert (AttentionInterface._global_mapping, AttentionMaskInterface._global_mapping) == before


def build(kind: str, name: str = "eager", dtype=torch.float64, kind_of_model=AutoModelForCausalLM, **changes):
    """A small model with random weights far from their start: the same for every name and dtype."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **MODELS[kind] | changes)
    model = kind_of_model.from_config(config, attn_implementation=name, dtype=torch.float64)
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.2)
    return model.to(dtype).eval()


def as_float32_should_be(found, plain, exact, factor=2) -> bool:
    """The bound: `factor` times the error of transformers' own eager attention in the same dtype, and some rounding."""
    scale = max(1.0, float(exact.abs().max()))
    limit = factor * float((plain - exact).abs().max()) + 4 * torch.finfo(torch.float32).eps * scale
    return float((found - exact).abs().max()) <= limit


def calls_of(monkeypatch, canonical: str) -> list:
    """Every (mask, dropout) that the implementation is called with from now on."""
    calls, real = [], IMPLEMENTATIONS[canonical].attention

    def counted(queries, keys, values, mask, **options):
        calls.append((mask, options["dropout"]))
        return real(queries, keys, values, mask, **options)

    monkeypatch.setattr(IMPLEMENTATIONS[canonical], "attention", counted)
    choosing.chosen_once.cache_clear()
    return calls


# --- names and registries


def test_every_implementation_has_a_name_that_transformers_takes_for_no_kernel_of_its_hub():
    names = transformers_names()
    assert sorted(names.values()) == sorted(IMPLEMENTATIONS)
    assert all(name.startswith("gpt2_") and "flash" not in name and "/" not in name for name in names)
    expected = {
        "gpt2_eager": "eager", "gpt2_sdpa": "sdpa", "gpt2_tiled": "flash_tiled", "gpt2_fa2": "flash_attention_2",
        "gpt2_fa3": "flash_attention_3", "gpt2_flex": "flex_attention",
    }  # fmt: skip
    assert expected.items() <= names.items()
    assert with_transformers.short_name("flash_triton", ()) == "triton"


def test_the_page_has_every_name():
    page = (Path(__file__).resolve().parents[2] / "docs" / "WITH_TRANSFORMERS.md").read_text(encoding="utf-8")
    for name, canonical in transformers_names().items():
        assert f"| `{name}` | `{canonical}` |" in page


def test_a_new_file_in_the_registry_is_registered_by_itself(monkeypatch):
    monkeypatch.setitem(IMPLEMENTATIONS, "mine", IMPLEMENTATIONS["eager"])
    assert register_with_transformers()["gpt2_mine"] == "mine"
    assert "gpt2_mine" in AttentionInterface()
    assert "gpt2_mine" in AttentionMaskInterface()


def test_registering_writes_both_registries_replaces_nothing_and_may_be_repeated():
    unregister_from_transformers()
    before = dict(AttentionInterface._global_mapping), dict(AttentionMaskInterface._global_mapping)
    for _ in range(2):
        names = register_with_transformers()
        for mapping, old in zip((AttentionInterface, AttentionMaskInterface), before, strict=True):
            assert mapping._global_mapping.keys() - old.keys() == names.keys()
            assert all(mapping._global_mapping[name] is function for name, function in old.items())
    unregister_from_transformers()
    unregister_from_transformers()
    assert (AttentionInterface._global_mapping, AttentionMaskInterface._global_mapping) == before


def test_strict_stays_as_it_was_until_it_is_given_again_or_our_names_are_taken_out():
    def is_strict() -> bool:
        register_with_transformers()
        try:
            build("gpt2", "gpt2_fa2")(IDS)
        except ValueError:
            return True
        return False

    assert not is_strict()
    register_with_transformers(strict=True)
    assert is_strict()
    assert is_strict()
    register_with_transformers(strict=False)
    assert not is_strict()
    register_with_transformers(strict=True)
    unregister_from_transformers()
    assert not is_strict()


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("registry", [AttentionInterface, AttentionMaskInterface])
def test_somebody_elses_function_of_that_name_stays_and_nothing_is_registered(registry, late):
    if not late:  # else theirs comes after ours
        unregister_from_transformers()
    registry.register("gpt2_tiled", test_every_test_is_independent)
    try:
        before = dict(AttentionInterface._global_mapping), dict(AttentionMaskInterface._global_mapping)
        with pytest.raises(ValueError, match="another attention implementation called gpt2_tiled"):
            register_with_transformers()
        assert (AttentionInterface._global_mapping, AttentionMaskInterface._global_mapping) == before
        unregister_from_transformers()
        assert registry._global_mapping["gpt2_tiled"] is test_every_test_is_independent
    finally:
        del registry._global_mapping["gpt2_tiled"]


def test_every_test_is_independent():
    """Whatever a test before did: what stands in the registries is transformers' own, and ours."""
    assert {name for name in AttentionInterface() if name.startswith("gpt2_")} == transformers_names().keys()


def test_without_transformers_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r'pip install "transformers>=5,<6"'):
        register_with_transformers()
    monkeypatch.undo()  # the fixture takes our names out again


# --- the same numbers


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("name", usable())
def test_the_logits_are_those_of_transformers(name, kind, padding, monkeypatch):
    # Torch's function as it is: compiling it takes seconds for each kind of call, and its own tests do.
    monkeypatch.setattr(IMPLEMENTATIONS["flex_attention"], "compiled", lambda: flex_attention)
    calls = calls_of(monkeypatch, transformers_names()[name])
    inputs = {"input_ids": IDS, "attention_mask": PADDING[padding]}
    real = PADDING[padding].bool()
    with torch.no_grad():
        exact = build(kind, EXACT[kind])(**inputs).logits[real]
        plain = build(kind, dtype=torch.float32)(**inputs).logits[real]
        found = build(kind, name, torch.float32)(**inputs).logits
    assert len(calls) == 2  # our function, once for each layer
    assert torch.isfinite(found).all()
    assert as_float32_should_be(found[real], plain, exact)


@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("name", QUICK)
def test_loss_and_every_gradient_are_those_of_transformers(name, kind, padding):
    found = {}
    for implementation in (EXACT[kind], name):
        model = build(kind, implementation)
        loss = model(IDS, attention_mask=PADDING[padding], labels=labels_of(padding)).loss
        loss.backward()
        found[implementation] = {"loss": loss.detach()} | {k: p.grad for k, p in model.named_parameters()}
    for quantity, exact in found[EXACT[kind]].items():
        torch.testing.assert_close(found[name][quantity], exact, rtol=1e-9, atol=1e-10, msg=quantity)
    assert len(found[name]) > 10


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("name", usable(needs_grad=True))
def test_gradients_in_float32_meet_the_bound(name, kind):
    def gradients(implementation, dtype):
        model = build(kind, implementation, dtype)
        model(IDS, attention_mask=PADDING["left"], labels=labels_of("left")).loss.backward()
        return [parameter.grad for parameter in model.parameters()]

    exact, plain = gradients(EXACT[kind], torch.float64), gradients("eager", torch.float32)
    for found, reference, same_dtype in zip(gradients(name, torch.float32), exact, plain, strict=True):
        assert as_float32_should_be(found, same_dtype, reference, factor=3)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_our_kernels_give_transformers_logits_and_gradients(kind, kernels):
    def logits_and_gradients(name, dtype, device="cpu"):
        model = build(kind, name, dtype).to(device)
        out = model(IDS.to(device), attention_mask=PADDING["left"].to(device), labels=labels_of("left").to(device))
        out.loss.backward()
        return [out.logits.detach()[PADDING["left"].bool()]] + [parameter.grad for parameter in model.parameters()]

    register_with_transformers(strict=True)
    exact, plain = logits_and_gradients(EXACT[kind], torch.float64), logits_and_gradients("eager", torch.float32)
    for found, reference, same_dtype in zip(
        logits_and_gradients("gpt2_triton", torch.float32, kernels), exact, plain, strict=True
    ):
        assert as_float32_should_be(found.cpu(), same_dtype, reference, factor=3)


@pytest.mark.parametrize("cache", [None, "static"])
def test_our_kernels_generate_transformers_tokens(cache, kernels):
    register_with_transformers(strict=True)
    settings = {**GENERATE, "max_new_tokens": 4, "cache_implementation": cache}
    model = build("llama", dtype=torch.float32).to(kernels)
    ids, padding = IDS.to(kernels), PADDING["left"].to(kernels)
    expected = model.generate(ids, attention_mask=padding, **settings)
    model.set_attn_implementation("gpt2_triton")
    assert torch.equal(model.generate(ids, attention_mask=padding, **settings), expected)


GENERATE = {"max_new_tokens": 13, "do_sample": False, "pad_token_id": PAD, "eos_token_id": None}
WAYS = {
    "dynamic": {},
    "static": {"cache_implementation": "static"},
    "no cache": {"use_cache": False},
    "the prompt in pieces": {"prefill_chunk_size": 4},
    "beams": {"num_beams": 2},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["gpt2", "llama", "mistral"])
@pytest.mark.parametrize("name", QUICK)
def test_generation_with_left_padding_gives_transformers_tokens(name, kind, way):
    model = build(kind, dtype=torch.float32)
    expected = model.generate(IDS, attention_mask=PADDING["left"], **GENERATE, **WAYS[way])
    model.set_attn_implementation(name)
    assert torch.equal(model.generate(IDS, attention_mask=PADDING["left"], **GENERATE, **WAYS[way]), expected)
    alone = model.generate(IDS[1:2, 4:], **GENERATE, **WAYS[way])  # as if there had been no padding
    assert torch.equal(alone[0, TOKENS - 4 :], expected[1, TOKENS:])


def test_a_static_cache_with_room_left_attends_to_the_filled_keys_alone(monkeypatch):
    from transformers import StaticCache

    model = build("llama", "sdpa")
    exact = model(IDS).logits
    model.set_attn_implementation("gpt2_tiled")
    calls = calls_of(monkeypatch, "flash_tiled")
    cache = StaticCache(config=model.config, max_cache_len=40)
    pieces = [model(IDS[:, start:end], past_key_values=cache).logits for start, end in ((0, 5), (5, 10), (10, 11))]
    torch.testing.assert_close(torch.cat(pieces, dim=1), exact, rtol=1e-9, atol=1e-10)
    assert [mask.key_len for mask, _ in calls[::2]] == [5, 10, 40]  # one query: a row that says which are filled
    assert int(calls[-1][0].dense()[0].sum()) == 11


def test_weights_over_a_static_cache_have_a_column_for_every_key_of_it():
    from transformers import StaticCache

    weights = {}
    for name in ("eager", "gpt2_eager"):
        model = build("llama", name, torch.float32)
        cache = StaticCache(config=model.config, max_cache_len=40)
        weights[name] = model(IDS, past_key_values=cache, output_attentions=True).attentions[0]
    torch.testing.assert_close(weights["gpt2_eager"], weights["eager"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", QUICK)
def test_values_in_padded_places_reach_nobody(name):
    for kind in ("gpt2", "llama"):
        model = build(kind, name)
        embeddings = model.get_input_embeddings()(IDS).detach()
        real = PADDING["left"].bool()
        clean = model(inputs_embeds=embeddings, attention_mask=PADDING["left"]).logits
        embeddings[~real] = 1e4
        poisoned = model(inputs_embeds=embeddings, attention_mask=PADDING["left"]).logits
        assert torch.isfinite(poisoned).all()
        torch.testing.assert_close(poisoned[real], clean[real], rtol=0, atol=0)


# --- how a model comes by them


def test_from_pretrained_and_switching_back_and_forth(tmp_path, monkeypatch):
    model = build("gpt2", dtype=torch.float32)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="gpt2_tiled")
    exact = model(IDS).logits
    calls = calls_of(monkeypatch, "flash_tiled")
    for name, times in (("gpt2_tiled", 2), ("eager", 2), ("gpt2_sdpa", 2), ("gpt2_tiled", 4)):
        loaded.set_attn_implementation(name)
        torch.testing.assert_close(loaded(IDS).logits, exact, rtol=1e-4, atol=1e-4)
        assert len(calls) == times
    assert "gpt2_tiled" not in (tmp_path / "config.json").read_text()


def test_gpt2_tiled_makes_no_table_of_tokens_by_tokens():
    tokens = 600
    ids = torch.randint(0, PAD, (1, tokens))
    padding = torch.ones(1, tokens, dtype=torch.long)
    padding[:, :50] = 0

    def largest(name, **inputs):
        model = build("gpt2", name, torch.float32, n_positions=tokens)
        ours = peak_tensor_bytes(
            lambda: model.transformer(ids, use_cache=False, **inputs).last_hidden_state.sum().backward()
        )
        return ours.largest

    table = tokens * tokens  # in bytes, of a table of bools for one head
    for inputs in ({}, {"attention_mask": padding}):
        assert largest("gpt2_tiled", **inputs) < 1.2 * table  # a tile of 128 x 128 for 4 heads, and the layer's own
        assert largest("gpt2_eager", **inputs) >= 4 * 4 * table
    model = build("gpt2", "gpt2_tiled", torch.float32)
    assert "dense" not in model.transformer.h[0].attn.__dict__


# --- training


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_dropout_is_ours_in_training_and_absent_in_evaluation(kind, monkeypatch):
    zeros = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.4} if kind == "gpt2" else {"attention_dropout": 0.4}
    calls = calls_of(monkeypatch, "flash_tiled")
    model = build(kind, "gpt2_tiled", **zeros)

    def run(seed):
        torch.manual_seed(seed)
        return model(IDS).logits

    evaluated = run(1)
    assert torch.equal(evaluated, run(2))
    model.train()
    assert torch.equal(run(1), run(1))
    assert not torch.allclose(run(1), run(2))
    assert [dropout for _, dropout in calls] == [0.0] * 4 + [0.4] * 8


def test_a_layer_in_evaluation_has_no_dropout_even_if_its_model_hands_some_over():
    attend = AttentionInterface()["gpt2_tiled"]
    layer = build("gpt2").transformer.h[0].attn
    q, k, v = (torch.randn(2, 4, 5, 8) for _ in range(3))
    assert torch.equal(attend(layer, q, k, v, None, dropout=0.9)[0], attend(layer, q, k, v, None)[0])
    assert not torch.equal(attend(layer.train(), q, k, v, None, dropout=0.9)[0], attend(layer, q, k, v, None)[0])


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(reentrant):
    gradients = {}
    for checkpointing in (False, True):
        model = build("llama", "gpt2_tiled", attention_dropout=0.3).train()
        if checkpointing:
            model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": reentrant})
        torch.manual_seed(3)
        model(IDS, attention_mask=PADDING["left"], labels=IDS, use_cache=False).loss.backward()
        gradients[checkpointing] = [parameter.grad for parameter in model.parameters()]
    for plain, recomputed in zip(gradients[False], gradients[True], strict=True):
        torch.testing.assert_close(recomputed, plain, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", QUICK)
def test_packed_sequences_do_not_see_each_other(name, monkeypatch):
    lengths = (4, 5, 2)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    calls = calls_of(monkeypatch, transformers_names()[name])
    for kind in ("gpt2", "llama"):
        model = build(kind, name)
        packed = model(IDS[:1], position_ids=positions, use_cache=False).logits[0]
        assert calls[-1][0].documents is not None
        alone = [build(kind, EXACT[kind])(piece[None]).logits[0] for piece in IDS[0].split(lengths)]
        torch.testing.assert_close(packed, torch.cat(alone), rtol=1e-9, atol=1e-10)


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
