"""The formulas that judge are right: held against the packages, torch's own ops, and Hugging Face's GPT-2."""

import pytest
import torch
import torch.nn.functional as F

from CMHA.cmha import MultiHeadAttention
from CMHA.implementations import flash_tiled
from CMHA.masks import AttentionMask
from CMHA.tap import listening
from GPT2Model.config import PRESETS, from_preset
from GPT2Model.generation import filtered_probabilities, make_cache
from GPT2Model.gpt2 import GPTModel
from orchestrator.evaluation import estimates
from orchestrator.learning.checks import accounting, attention, cache, layers, model, sampling, tiles
from orchestrator.learning.checks.judge import judge
from orchestrator.learning.checks.registry import EXERCISES
from TransformerBlock.layers import GELU, LayerNorm
from TransformerBlock.transformer_block import TransformerBlock

EPS = torch.finfo(torch.float64).eps


def close(found, right, roundings):
    """In float64: to within so many roundings of the largest number."""
    torch.testing.assert_close(found, right, rtol=0, atol=roundings * EPS * max(1.0, float(right.detach().abs().max())))


def double(cases):
    """The float32 cases, their tensors as float64."""
    return [as_double(case.arguments) for case in cases]


def as_double(value):
    if isinstance(value, torch.Tensor):
        return value.double() if value.is_floating_point() else value
    return {name: as_double(item) for name, item in value.items()} if isinstance(value, dict) else value


def test_layer_norm_and_gelu_are_those_of_torch_and_of_the_package():
    for case in double(layers.layer_norm_cases()):
        right = F.layer_norm(case["x"], case["weight"].shape, case["weight"], case["bias"], case["eps"])
        close(layers.layer_norm(**case), right, 4000)  # a variance of 1e-6 divides: roundings grow a thousandfold
        if case["eps"] == 1e-5:
            norm = LayerNorm(len(case["weight"])).double()
            norm.load_state_dict({"weight": case["weight"], "bias": case["bias"]})
            close(layers.layer_norm(**case), norm(case["x"]), 4000)
    for case in double(layers.gelu_cases()):
        close(layers.gelu(**case), GELU()(case["x"]), 8)


def test_the_mask_and_one_head_are_those_of_torch_and_of_the_package():
    for case in attention.causal_mask_cases():
        mask = attention.causal_mask(**case.arguments)
        assert torch.equal(mask, AttentionMask(**case.arguments).dense()[0, 0])
    for case in double(attention.one_head_cases()):
        q, k, v, mask = case.values()
        close(attention.one_head(**case), F.scaled_dot_product_attention(q, k, v, attn_mask=mask), 32)


def test_several_heads_are_those_of_the_package():
    for case in double(attention.multi_head_cases()):
        C = case["x"].shape[-1]
        layer = MultiHeadAttention(C, C, 16, 0.0, case["num_heads"], qkv_bias=case["qkv_bias"] is not None).double()
        names = {"W_qkv.weight": "qkv_weight", "W_qkv.bias": "qkv_bias", "out_proj.weight": "out_weight"}
        weights = {name: case[ours] for name, ours in {**names, "out_proj.bias": "out_bias"}.items()}
        layer.load_state_dict({name: tensor for name, tensor in weights.items() if tensor is not None})
        close(attention.multi_head_attention(**case), layer(case["x"]), 64)


def test_tiles_give_torchs_output_and_its_logsumexp():
    for case in double(tiles.tiled_cases()):
        q, k, v, mask, _ = case.values()
        output, log_sum_exp = tiles.tiled_attention(**case)
        scores = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~mask, -torch.inf)
        sees = mask.any(dim=1)
        close(output[:, :, sees], F.scaled_dot_product_attention(q, k, v, attn_mask=mask)[:, :, sees], 4000)
        close(log_sum_exp[:, :, sees], scores.logsumexp(dim=-1)[:, :, sees], 64)
        assert (output[:, :, ~sees] == 0).all()
        assert (log_sum_exp[:, :, ~sees] == -torch.inf).all()


def test_the_block_and_the_model_are_those_of_the_package():
    for case in double(model.block_cases()):
        C, bias = case["x"].shape[-1], "attention.W_qkv.bias" in case["weights"]
        ff_dim = case["weights"]["feed_forward.up_proj.bias"].shape[0]
        cfg = {"emb_dim": C, "n_heads": case["n_heads"], "context_length": 16, "qkv_bias": bias, "ff_dim": ff_dim}
        block = TransformerBlock(cfg).double().eval()
        block.load_state_dict(case["weights"])
        close(model.transformer_block(**case), block(case["x"]), 256)
    for case in double(model.gpt2_cases()):
        close(model.gpt2(**case), built(case)(case["ids"]), 4000)


def built(case) -> GPTModel:
    gpt = GPTModel(case["cfg"]).double().eval()
    head = {"head.weight": case["weights"]["token_embedding.weight"]}
    gpt.load_state_dict(head | case["weights"])
    return gpt


def test_the_model_is_hugging_faces(tmp_path):
    from transformers import GPT2LMHeadModel

    case = double(model.gpt2_cases())[0]
    built(case).save_pretrained(tmp_path)
    theirs = GPT2LMHeadModel.from_pretrained(tmp_path).double().eval()
    with torch.no_grad():
        right = theirs(case["ids"]).logits
    close(model.gpt2(**case), right, 4000)


def test_the_probabilities_are_those_of_the_package():
    for case in sampling.probability_cases():
        if case.arguments["temperature"] > 0:
            found = sampling.sampling_probabilities(**case.arguments)
            right = filtered_probabilities(**case.arguments).to(found.dtype)
            torch.testing.assert_close(found, right, rtol=0, atol=16 * torch.finfo(torch.float32).eps)


def test_no_case_of_top_p_lies_where_rounding_decides():
    for case in sampling.probability_cases():
        logits, temperature, top_k, top_p = case.arguments.values()
        if top_p is not None and top_p < 1:
            for at in (1.0, temperature):
                for k in (top_k, None):
                    chances = filtered_probabilities(logits, at, top_k=k).sort(descending=True).values
                    assert (chances.cumsum(-1) - top_p).abs().min() > 1e-4, case.label


def test_the_cache_gives_what_one_pass_gives():
    for case in cache.kv_cases():
        q, new_k, new_v, old_k, old_v = case.arguments.values()
        context, keys, values = cache.kv_cache_attention(q, new_k, new_v, old_k, old_v)
        every = torch.cat([q[:, :, :1].expand(-1, -1, old_k.shape[2], -1), q], dim=2)  # any queries for the old tokens
        right = F.scaled_dot_product_attention(every, keys, values, is_causal=True)[:, :, old_k.shape[2] :]
        torch.testing.assert_close(context, right, rtol=0, atol=64 * torch.finfo(torch.float32).eps)
    for case in cache.model_cache_cases():
        ids, old, weights, cfg = case.arguments.values()
        dtype = weights["final_norm.bias"].dtype
        gpt = built({"cfg": cfg, "weights": weights}).to(dtype)
        kept = make_cache(gpt, len(ids), cfg["context_length"])
        for layer, (keys, values) in zip(kept.layers, old or [], strict=False):
            layer.append(keys, values)
        with torch.no_grad():
            right = gpt(ids, cache=kept)
        found, _ = cache.gpt2_with_cache(ids, old, weights, cfg)
        torch.testing.assert_close(found, right, rtol=0, atol=400 * torch.finfo(dtype).eps * float(right.abs().max()))


@pytest.mark.parametrize("name", PRESETS)
def test_accounting_agrees_with_models_that_were_built(name):
    cfg = from_preset(name)
    for changed in ({}, {"qkv_bias": False, "tie_weights": False}, {"ff_dim": 200, "context_length": 16384}):
        with torch.device("meta"):
            gpt = GPTModel(cfg | changed)
        assert accounting.count_parameters(cfg | changed) == gpt.num_parameters()


def test_flops_are_those_that_torch_counts():
    from torch.utils.flop_counter import FlopCounterMode

    cfg = from_preset("nano", ff_dim=200, use_flash=False)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        GPTModel(cfg).eval()(torch.zeros(1, 100, dtype=torch.long))
    assert accounting.forward_flops(cfg, 100) == counter.get_total_flops() == estimates.forward_flops(cfg, 1, 100)
    products = 2 * cfg["n_layers"] * 2 * 100 * 100 * cfg["emb_dim"]
    assert accounting.attention_share(cfg, 100) == products / counter.get_total_flops()


def test_the_figures_of_gpt2_xl():
    short, long = from_preset("gpt2-xl"), from_preset("gpt2-xl", context_length=16384)
    assert accounting.count_parameters(short) == 1_557_611_200
    assert accounting.count_parameters(long) - accounting.count_parameters(short) == (16384 - 1024) * 1600
    assert accounting.attention_share(short, 1024) == pytest.approx(0.0918, abs=1e-3)
    assert accounting.attention_share(long, 16384) == pytest.approx(0.6177, abs=1e-3)


def test_what_the_packages_compute_passes_as_an_answer():
    """Right answers that round differently: torch's fused op, and flash_tiled."""

    def one_head(queries, keys, values, mask):
        return F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)

    def gpt2_by(name):
        def gpt2(ids, weights, cfg):
            gpt = built({"cfg": cfg | {"attn_implementation": name}, "weights": weights})
            return gpt.to(weights["final_norm.bias"].dtype)(ids)

        return gpt2

    for implementation in ("sdpa", "flash_tiled", "eager"):
        verdict = judge(EXERCISES["gpt2"], gpt2_by(implementation))
        assert verdict.status == "right", verdict.says
    assert judge(EXERCISES["one_head"], one_head).status == "right"


class MaskOfATable:
    """What flash_tiled asks of a mask, from a table."""

    def __init__(self, table):
        self.table = table

    def visible_keys(self, first_query, last_query):
        return 0, self.table.shape[1]

    def tile(self, first_query, last_query, first_key, last_key):
        return self.table[None, None, first_query:last_query, first_key:last_key]


def by_flash_tiled(queries, keys, values, mask, tile_size):
    """The package's, and log_sum_exp from its tap: it has +inf where nothing is seen, for the sake of its backward."""
    heard = {}

    def listener(name, tensor, **where):
        heard[name] = tensor
        return tensor

    with listening(listener):
        output, _ = flash_tiled.attention(
            queries, keys, values, MaskOfATable(mask), scale=queries.shape[-1] ** -0.5, kv_block_size=tile_size
        )
    log_sum_exp = heard["log_sum_exp"].reshape(queries.shape[:-1])
    return output, log_sum_exp.masked_fill(~mask.any(dim=1), -torch.inf)


def by_copies_of_all_keys(queries, keys, values, mask, tile_size):
    """Keys turned round in memory, values copied: as large as they are, and no table."""
    return tiles.tiled_attention(queries, keys.mT.contiguous().mT, values.clone(), mask, tile_size)


def by_one_query_at_a_time(queries, keys, values, mask, tile_size):
    rows = [
        tiles.tiled_attention(query, keys, values, row, tile_size)
        for query, row in zip(queries.split(1, dim=-2), mask.split(1), strict=True)
    ]
    return torch.cat([row[0] for row in rows], dim=-2), torch.cat([row[1] for row in rows], dim=-1)


@pytest.mark.parametrize("answer", [by_flash_tiled, by_copies_of_all_keys, by_one_query_at_a_time])
def test_any_online_softmax_passes(answer):
    verdict = judge(EXERCISES["tiled_attention"], answer)
    assert verdict.status == "right", verdict.says


def test_any_right_way_of_drawing_passes():
    def by_inversion(logits, temperature, top_k, top_p, generator):
        if temperature == 0:
            return logits.argmax(dim=-1)
        sums = filtered_probabilities(logits, temperature, top_k=top_k, top_p=top_p).cumsum(dim=-1)
        point = torch.rand(len(logits), 1, generator=generator) * sums[:, -1:]
        return torch.searchsorted(sums, point, right=True).squeeze(-1)

    def by_gumbel(logits, temperature, top_k, top_p, generator):
        if temperature == 0:
            return logits.argmax(dim=-1)
        chances = filtered_probabilities(logits, temperature, top_k=top_k, top_p=top_p)
        waits = torch.empty_like(chances).exponential_(generator=generator)
        return (chances / waits).argmax(dim=-1)

    assert judge(EXERCISES["sample"], by_inversion).status == "right"
    assert judge(EXERCISES["sample"], by_gumbel).status == "right"
