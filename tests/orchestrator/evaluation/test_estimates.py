"""Parameters, FLOPs and memory by formula are what is counted."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from GPT2Model.config import PRESETS, from_preset
from GPT2Model.generation import make_cache
from GPT2Model.gpt2 import GPTModel
from orchestrator.evaluation.estimates import (
    attention_flops,
    count_parameters,
    embedding_parameters,
    forward_flops,
    forward_peak,
    memory_bytes,
    training_flops,
)
from orchestrator.evaluation.memory import peak_tensor_bytes
from orchestrator.training.loss import next_token_loss

ODD = {"vocab_size": 131, "context_length": 37, "emb_dim": 60, "n_heads": 6, "n_layers": 3}
VARIANTS = [
    {},
    {"tie_weights": False},
    {"qkv_bias": False},
    {"ff_dim": 77},
    {"n_kv_heads": 2},
    {"n_kv_heads": 1, "qkv_bias": False, "ff_dim": 12},
    {"norm": "rmsnorm"},
    {"mlp": "gelu_exact"},
    {"mlp": "swiglu"},
    {"mlp": "swiglu", "ff_dim": 77, "tie_weights": False},
    {"positions": "rope"},
    {"norm": "rmsnorm", "mlp": "swiglu", "positions": "rope", "n_kv_heads": 2, "qkv_bias": False},
]
TODAYS = {"norm": "rmsnorm", "mlp": "swiglu", "positions": "rope", "n_kv_heads": 2}


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_parameters_of_the_formula_are_those_of_the_model(variant):
    cfg = {**ODD, **variant}
    assert count_parameters(cfg) == GPTModel(cfg).num_parameters()


@pytest.mark.parametrize(
    ("preset", "published"),
    [("gpt2", 124_439_808), ("gpt2-medium", 354_823_168), ("gpt2-large", 774_030_080), ("gpt2-xl", 1_557_611_200)],
)
def test_the_presets_have_openais_sizes(preset, published):
    cfg = PRESETS[preset]
    config = GPT2Config(n_embd=cfg["emb_dim"], n_head=cfg["n_heads"], n_layer=cfg["n_layers"])
    with torch.device("meta"):
        counted = sum(p.numel() for p in GPT2LMHeadModel(config).parameters())
    assert count_parameters(from_preset(preset)) == counted == published


def test_the_books_dict_gives_a_tied_model_without_qkv_bias():
    book = {"vocab_size": 50257, "context_length": 1024, "emb_dim": 768, "n_heads": 12, "n_layers": 12,
            "drop_rate": 0.1, "qkv_bias": False}  # fmt: skip
    assert count_parameters(book) == 124_412_160
    assert count_parameters({**book, "tie_weights": False}) == 163_009_536


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_flops_of_the_formula_are_those_torch_counts_under_eager(variant):
    model = GPTModel({**ODD, **variant, "use_flash": False}).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.randint(131, (2, 29)))
    assert forward_flops(model.cfg, 2, 29) == counter.get_total_flops()


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_training_step_takes_the_flops_of_the_formula_under_eager(variant):
    model = GPTModel({**ODD, **variant, "drop_rate": 0.1, "use_flash": False}).train()
    ids = torch.randint(131, (2, 30))
    with FlopCounterMode(display=False) as forward:
        loss = next_token_loss(model(ids[:, :-1]), ids[:, 1:])
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    by_formula = training_flops(model.cfg, 2, 29)
    assert by_formula["forward"] == forward.get_total_flops()
    assert by_formula["backward"] == backward.get_total_flops()
    assert by_formula["training"] == by_formula["forward"] + by_formula["backward"]
    # The two products of attention are the batched ones; a causal count takes half of them.
    batched = sum(
        flops for counter in (forward, backward) for flops in [counter.get_flop_counts()["Global"][torch.ops.aten.bmm]]
    )
    assert batched == 3 * attention_flops(model.cfg, 2, 29)
    causal = training_flops(model.cfg, 2, 29, causal=True)["training"]
    assert causal == by_formula["training"] - batched // 2


def test_llamas_shape_has_the_parameters_that_transformers_counts():
    cfg = {**ODD, **TODAYS, "qkv_bias": False, "tie_weights": False, "ff_dim": 88}
    config = LlamaConfig(
        vocab_size=131, hidden_size=60, intermediate_size=88, num_hidden_layers=3, num_attention_heads=6,
        num_key_value_heads=2, attention_bias=False, mlp_bias=False,
    )  # fmt: skip
    with torch.device("meta"):
        counted = sum(p.numel() for p in LlamaForCausalLM(config).parameters())
    assert count_parameters(cfg) == counted + 3 * 60  # our projection of the heads has a bias, as GPT-2's


def test_with_rope_there_are_no_position_embeddings():
    assert embedding_parameters({**ODD, "positions": "rope"}) == {"token": 131 * 60, "position": 0}
    saved = count_parameters(ODD) - count_parameters({**ODD, "positions": "rope"})
    assert saved == GPTModel(ODD).position_embedding.weight.numel()


def test_embeddings_are_counted_apart():
    model = GPTModel(ODD)
    counted = {"token": model.token_embedding.weight.numel(), "position": model.position_embedding.weight.numel()}
    assert embedding_parameters(ODD) == counted


FORWARD_CASES = [
    ({"vocab_size": 300, "context_length": 128, "emb_dim": 96, "n_heads": 6, "n_layers": 4}, 8, "feed-forward"),
    ({"vocab_size": 300, "context_length": 256, "emb_dim": 64, "n_heads": 4, "n_layers": 2}, 4, "feed-forward"),
    ({"vocab_size": 50257, "context_length": 64, "emb_dim": 64, "n_heads": 4, "n_layers": 2}, 2, "logits"),
    ({"vocab_size": 300, "context_length": 128, "emb_dim": 96, "n_heads": 6, "n_layers": 2, "n_kv_heads": 2}, 8,
     "feed-forward"),
]  # fmt: skip


@pytest.mark.parametrize("short", [False, True])
@pytest.mark.parametrize("attention", ["eager", "sdpa", "flash_tiled"])
@pytest.mark.parametrize(("cfg", "batch", "worst_under_sdpa"), FORWARD_CASES)
def test_a_forward_pass_holds_the_bytes_of_the_formula(cfg, batch, worst_under_sdpa, attention, short):
    model = GPTModel({**cfg, "attn_implementation": attention}).eval()
    ids = torch.randint(cfg["vocab_size"], (batch, cfg["context_length"]))

    def forward():
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=short):
            return model(ids)

    forward()
    weights = sum(p.nbytes for p in model.parameters())
    peak = peak_tensor_bytes(forward).peak
    by_formula = forward_peak(cfg, batch, cfg["context_length"], short=short, attention=attention)
    assert by_formula["weights"] == weights
    assert by_formula["bytes"] - weights == pytest.approx(peak, rel=0.1)
    if worst_under_sdpa and attention == "sdpa":
        assert by_formula["moment"] == worst_under_sdpa


@pytest.mark.parametrize("short", [False, True])
@pytest.mark.parametrize("attention", ["eager", "sdpa", "flash_tiled"])
@pytest.mark.parametrize(
    "variant",
    [
        {"norm": "rmsnorm"},
        {"mlp": "swiglu"},
        {"positions": "rope"},
        TODAYS,
        {"positions": "rope", "ff_dim": 24},
        {"ff_dim": 24},
    ],
    ids=["rmsnorm", "swiglu", "rope", "all", "rope, attention is the worst", "gpt2, attention is the worst"],
)
def test_a_forward_pass_of_a_variant_holds_the_bytes_of_the_formula(variant, attention, short):
    test_a_forward_pass_holds_the_bytes_of_the_formula(FORWARD_CASES[0][0] | variant, 8, None, attention, short)


@pytest.mark.parametrize("variant", [{}, {"n_kv_heads": 2}, TODAYS])
def test_the_memory_of_the_formula_is_that_of_the_tensors(variant):
    model = GPTModel({**ODD, **variant})
    by_formula = memory_bytes(model.cfg, 2, 37)
    assert by_formula["weights"] == by_formula["gradients"] == sum(p.nbytes for p in model.parameters())
    assert by_formula["adam"] == 2 * by_formula["weights"]
    assert by_formula["logits"] == model(torch.zeros(2, 37, dtype=torch.long)).nbytes
    assert by_formula["kv_cache"] == make_cache(model, 2, 37).nbytes
    _, weights = model.blocks[0].attention(torch.randn(2, 37, 60), return_weights=True)
    assert by_formula["eager_table"] == weights.nbytes
