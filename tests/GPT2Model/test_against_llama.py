"""With grouped heads, rotary positions, RMSNorm and SwiGLU together, GPT-2 is Llama as transformers computes it.

The oracle is a randomly initialised LlamaForCausalLM with noise on every parameter; a table written here says which of
its weights is which of ours. In float32 it is as it came. It normalises, turns and takes the softmax in float32
whatever its weights are, so in float64 it has two formulas written here, and torch's attention instead of its own.
"""

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn

from CMHA.kv_cache import KVCache
from GPT2Model.generation import generate
from GPT2Model.gpt2 import GPTModel

SHAPE = {
    "vocab_size": 61, "hidden_size": 36, "num_attention_heads": 6, "num_key_value_heads": 2, "num_hidden_layers": 2,
    "intermediate_size": 50, "max_position_embeddings": 48, "rms_norm_eps": 1e-5,
    "pad_token_id": None, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
OURS = {
    "vocab_size": 61, "emb_dim": 36, "n_heads": 6, "n_kv_heads": 2, "n_layers": 2, "ff_dim": 50, "context_length": 48,
    "norm": "rmsnorm", "mlp": "swiglu", "positions": "rope", "drop_rate": 0.0,
    "flash_query_block_size": 16, "flash_kv_block_size": 11, "attn_strict": True,
}  # fmt: skip
TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-11}


class NormInFloat64(nn.Module):
    def __init__(self, theirs):
        super().__init__()
        self.weight, self.eps = theirs.weight, theirs.variance_epsilon

    def forward(self, x):
        return self.weight * (x / ((x * x).mean(-1, keepdim=True) + self.eps).sqrt())


class AnglesInFloat64(nn.Module):
    def forward(self, x, position_ids):
        slow = torch.tensor([10_000.0 ** (-2 * j / 6) for j in range(3)], dtype=torch.float64)
        angles = (position_ids[..., None].double() * slow).repeat(1, 1, 2)
        return angles.cos(), angles.sin()


@pytest.fixture(scope="module", params=TOLERANCE, ids=["fp32", "fp64"])
def dtype(request):
    return request.param


@pytest.fixture(scope="module", params=["biases, untied", "no biases, tied"])
def kind(request) -> dict:
    """The keys of a GPTModel's cfg; Llama has its own two names for them."""
    return {"qkv_bias": request.param.startswith("biases"), "tie_weights": request.param.endswith(" tied")}


@pytest.fixture(scope="module")
def oracle(dtype, kind, perturb):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SHAPE, attention_bias=kind["qkv_bias"], tie_word_embeddings=kind["tie_weights"])
    config._attn_implementation = "eager" if dtype == torch.float32 else "sdpa"
    oracle = perturb(transformers.LlamaForCausalLM(config), seed=4, scale=0.25).to(dtype).eval()
    if dtype == torch.float64:
        for layer in oracle.model.layers:
            layer.input_layernorm = NormInFloat64(layer.input_layernorm)
            layer.post_attention_layernorm = NormInFloat64(layer.post_attention_layernorm)
        oracle.model.norm = NormInFloat64(oracle.model.norm)
        oracle.model.rotary_emb = AnglesInFloat64()
    return oracle


def under_our_names(theirs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Llama's weights, or their gradients, as a GPTModel calls and stacks them."""
    table = [
        ("model.embed_tokens.", "token_embedding."), ("model.norm.", "final_norm."), ("model.layers.", "blocks."),
        ("lm_head.", "head."), ("input_layernorm.", "norm_1."), ("post_attention_layernorm.", "norm_2."),
        ("self_attn.o_proj.", "attention.out_proj."), ("mlp.", "feed_forward."),
    ]  # fmt: skip
    ours = {}
    for name, tensor in theirs.items():
        if "k_proj" in name or "v_proj" in name:
            continue
        if "q_proj" in name:
            tensor = torch.cat([theirs[name.replace("q_proj", part)] for part in ("q_proj", "k_proj", "v_proj")])
            name = name.replace("self_attn.q_proj", "attention.W_qkv")
        for their_part, our_part in table:
            name = name.replace(their_part, our_part)
        ours[name] = tensor
    return ours


@pytest.fixture(scope="module", params=["eager", "sdpa", "flash_tiled"])
def ours(request, oracle, dtype, kind) -> GPTModel:
    model = GPTModel({**OURS, **kind, "attn_implementation": request.param})
    weights = under_our_names(oracle.state_dict())
    found = model.to(dtype).eval().load_state_dict(weights, strict=False)
    assert found.unexpected_keys == []
    assert found.missing_keys == ([] if kind["qkv_bias"] else [f"blocks.{i}.attention.out_proj.bias" for i in range(2)])
    assert model.num_parameters() == oracle.num_parameters() + (0 if kind["qkv_bias"] else 2 * 36)  # biases that stay 0
    return model


def left_padded() -> tuple[torch.Tensor, torch.Tensor]:
    """ids and mask (4, 29): one row whole, one with 5 places of padding, one with 20, one with a single token."""
    ids = torch.randint(0, 61, (4, 29), generator=torch.Generator().manual_seed(3))
    return ids, torch.arange(29) >= torch.tensor([0, 5, 20, 28])[:, None]


def assert_same_loss_and_gradients(ours, oracle, our_logits, their_logits, targets, tolerance):
    ours.zero_grad()
    oracle.zero_grad()
    losses = [F.cross_entropy(logits, targets) for logits in (our_logits, their_logits)]
    assert abs(losses[0].item() - losses[1].item()) <= tolerance
    for loss in losses:
        loss.backward()
    expected = under_our_names({name: parameter.grad for name, parameter in oracle.named_parameters()})
    found = {name: parameter.grad for name, parameter in ours.named_parameters()}
    assert found.keys() - expected.keys() <= {f"blocks.{i}.attention.out_proj.bias" for i in range(2)}
    assert expected.keys() <= found.keys()
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0, f"{name} has no gradient to compare"
        torch.testing.assert_close(found[name], gradient, atol=tolerance, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


def test_logits_loss_and_every_gradient_are_those_of_llama(ours, oracle, dtype, random_ids):
    ids = random_ids(3, 41)
    our_logits, their_logits = ours(ids), oracle(ids).logits
    torch.testing.assert_close(our_logits, their_logits, atol=TOLERANCE[dtype], rtol=0)
    assert their_logits.std() > 0.5  # logits near 0 would agree whatever the weights
    flat = (logits[:, :-1].flatten(0, 1) for logits in (our_logits, their_logits))
    assert_same_loss_and_gradients(ours, oracle, *flat, ids[:, 1:].flatten(), TOLERANCE[dtype])


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_have_the_logits_loss_and_gradients_of_llama(ours, oracle, dtype, side):
    ids, mask = left_padded()
    if side == "right":
        ids, mask = ids.flip(1), mask.flip(1)
    places = (mask.long().cumsum(1) - 1).clamp(min=0)  # Llama counts padding too, unless it is told
    our_logits, their_logits = ours(ids, mask), oracle(ids, attention_mask=mask.long(), position_ids=places).logits
    torch.testing.assert_close(our_logits[mask], their_logits[mask], atol=TOLERANCE[dtype], rtol=0)
    scored = mask[:, :-1] & mask[:, 1:]
    flat = (logits[:, :-1][scored] for logits in (our_logits, their_logits))
    assert_same_loss_and_gradients(ours, oracle, *flat, ids[:, 1:][scored], TOLERANCE[dtype])


def test_greedy_tokens_are_those_of_llama_with_and_without_a_cache(ours, oracle, random_ids):
    ids = random_ids(2, 9, seed=1)
    expected = oracle.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=21, do_sample=False, pad_token_id=0
    )
    assert expected.shape == (2, 30)
    assert len(set(expected[:, 9:].flatten().tolist())) > 3  # not one token over and over
    for use_cache in (True, False):
        assert torch.equal(generate(ours, ids, 21, use_cache=use_cache), expected)


def test_greedy_tokens_after_left_padding_are_those_of_llama(ours, oracle):
    ids, mask = left_padded()
    expected = oracle.generate(ids, attention_mask=mask.long(), max_new_tokens=9, do_sample=False, pad_token_id=0)
    for use_cache in (True, False):
        assert torch.equal(generate(ours, ids, 9, padding_mask=mask, use_cache=use_cache), expected)


def test_reading_in_chunks_with_both_caches_gives_llama_s_logits(ours, oracle, dtype, random_ids):
    ids, theirs, cache, start = random_ids(2, 30), None, KVCache(2, 2, 2, 30, 6, dtype=dtype), 0
    for size in (7, 1, 13, 9):
        piece, start = ids[:, start : start + size], start + size
        output = oracle(piece, past_key_values=theirs, use_cache=True)
        theirs = output.past_key_values
        torch.testing.assert_close(ours(piece, cache=cache), output.logits, atol=TOLERANCE[dtype], rtol=0)
