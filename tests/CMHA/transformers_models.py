"""Small random models of transformers, for the tests of CMHA/with_transformers.py, and what those tests share."""

import importlib

import pytest
import torch
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModelForCausalLM,
)

from CMHA.choosing.choose import reasons_against
from CMHA.implementations import IMPLEMENTATIONS
from CMHA.request import AttentionRequest
from CMHA.with_transformers import register_with_transformers, transformers_names, unregister_from_transformers

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
GENERATE = {"max_new_tokens": 13, "do_sample": False, "pad_token_id": PAD, "eos_token_id": None}


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
