"""CMHA/with_transformers.py: names and registries, the same numbers as transformers' own attention, training."""

import sys
from pathlib import Path

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
)

from CMHA import with_transformers
from CMHA.implementations import IMPLEMENTATIONS
from CMHA.with_transformers import register_with_transformers, transformers_names, unregister_from_transformers
from orchestrator.evaluation.memory import peak_tensor_bytes
from tests.CMHA.transformers_models import (
    EXACT,
    GENERATE,
    IDS,
    PAD,
    PADDING,
    QUICK,
    TOKENS,
    as_float32_should_be,
    build,
    calls_of,
    labels_of,
    registered,  # noqa: F401 (a fixture)
    usable,
)

# --- names and registries


def test_every_implementation_has_a_name_that_transformers_takes_for_no_kernel_of_its_hub():
    names = transformers_names()
    assert sorted(names.values()) == sorted(set(IMPLEMENTATIONS) - {"paged_attention"})
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
