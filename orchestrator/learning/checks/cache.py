"""Exercises `kv_cache_attention` and `gpt2_with_cache`: new tokens meet kept keys and values; how that goes wrong."""

import torch

from orchestrator.learning.checks.attention import causal_mask, one_head
from orchestrator.learning.checks.exercise import Case, Exercise, Mistake, Numbers
from orchestrator.learning.checks.layers import gelu
from orchestrator.learning.checks.model import layers_deep, linear, model_weights, norm, small_cfg


def kv_cache_attention(
    queries, new_keys, new_values, cached_keys, cached_values, *, corner="lower right", order="old, new", axis=-2,
    gives_back="all", reads="all", masking="before", scale="root of head_dim", values_too=True,
):  # fmt: skip
    def join(old, new):
        return torch.cat([old, new] if order == "old, new" else [new, old], dim=axis)

    keys = join(cached_keys, new_keys)
    values = join(cached_values, new_values) if values_too else new_values
    Tq, Tk = queries.shape[-2], keys.shape[-2]
    if reads == "new":
        context = one_head(queries, new_keys, new_values, causal_mask(Tq, new_keys.shape[-2]), scale=scale)
    else:
        mask = causal_mask(Tq, Tk, corner=corner)
        context = one_head(queries, keys, values, mask, masking=masking, scale=scale)
    return context, *{"all": (keys, values), "old": (cached_keys, cached_values), "new": (new_keys, new_values)}[
        gives_back
    ]


def kv_cases() -> list[Case]:
    def case(label, seed, B, H, past, new, D, dtype=torch.float32):
        draw = Numbers(seed, dtype)
        return Case(label, {
            "queries": draw(B, H, new, D, scale=1.5), "new_keys": draw(B, H, new, D, scale=1.5),
            "new_values": draw(B, H, new, D), "cached_keys": draw(B, H, past, D, scale=1.5),
            "cached_values": draw(B, H, past, D),
        })  # fmt: skip

    return [
        case("1 new token, 5 kept", 90, 2, 3, 5, 1, 8),
        case("3 new tokens, 4 kept", 91, 1, 2, 4, 3, 8),
        case("as many new as kept", 92, 2, 2, 4, 4, 4),
        case("an empty cache", 93, 2, 1, 0, 6, 8),
        case("float64", 94, 1, 2, 3, 2, 6, dtype=torch.float64),
    ]


KV_CACHE_ATTENTION = Exercise(
    "kv_cache_attention", "cache", 7, kv_cache_attention, kv_cases,
    ("context (B, H, new, head_dim)", "keys (B, H, past + new, head_dim)", "values (B, H, past + new, head_dim)"),
    (
        Mistake("upper_left",
                "with kept keys the mask lies in the upper left corner (torch's is_causal=True puts it there), so a "
                "new token misses the latest keys. The last query stands at the last key: lower right.",
                ({"corner": "upper left"},)),
        Mistake("mask_forgotten",
                "there is no mask: of several new tokens, the earlier ones see the later.",
                ({"masking": "forgotten"},)),
        Mistake("new_before_old",
                "the new keys stand before the kept ones. Old first, then new.", ({"order": "new, old"},)),
        Mistake("wrong_axis",
                "keys are joined along another axis than the tokens' (dim=-2, which is dim 2).",
                ({"axis": 0}, {"axis": 1}, {"axis": -1})),
        Mistake("cache_not_read",
                "the new tokens see only one another: the kept keys and values are not read.", ({"reads": "new"},)),
        Mistake("cache_not_returned",
                "keys and values come back without the new tokens: the next step would not find them.",
                ({"gives_back": "old"},)),
        Mistake("only_new_returned",
                "only the new keys and values come back: the next step would have lost the old.",
                ({"gives_back": "new"}, {"gives_back": "new", "reads": "new"})),
        Mistake("values_not_joined", "keys are joined with the kept ones, values are not.", ({"values_too": False},)),
        Mistake("scale_forgotten", "the scores are not divided by the square root of head_dim.", ({"scale": "none"},)),
    ),
    "notebooks/generation.ipynb, sections 4 and 5",
)  # fmt: skip

# ------------------------------------------------------------------ the whole model, with a cache


def gpt2_with_cache(ids, cache, weights, cfg, *, positions="go on", corner="lower right", layers="each", keeps="all"):
    (B, T), C, H = ids.shape, cfg["emb_dim"], cfg["n_heads"]
    empty = weights["token_embedding.weight"].new_zeros(B, H, 0, C // H)
    cache = [(empty, empty)] * cfg["n_layers"] if cache is None else cache
    past = cache[0][0].shape[2]
    first = {"go on": past, "restart": 0, "one late": past + 1}[positions]
    x = weights["token_embedding.weight"][ids] + weights["position_embedding.weight"][first : first + T]
    kept = []
    for i in range(cfg["n_layers"]):
        own = {name.removeprefix(f"blocks.{i}."): value for name, value in weights.items()}
        qkv = norm(x, own, "norm_1") @ own["attention.W_qkv.weight"].T + own.get("attention.W_qkv.bias", 0)
        q, k, v = (part.view(B, T, H, C // H).transpose(1, 2) for part in qkv.split(C, dim=-1))
        old = cache[0 if layers == "shared" else i]
        context, keys, values = kv_cache_attention(q, k, v, *old, corner=corner)
        kept.append({"all": (keys, values), "old": old, "new": (k, v)}[keeps])
        x = x + linear(context.transpose(1, 2).reshape(B, T, C), own, "attention.out_proj")
        up = gelu(linear(norm(x, own, "norm_2"), own, "feed_forward.up_proj"))
        x = x + linear(up, own, "feed_forward.down_proj")
    return norm(x, weights, "final_norm") @ weights["token_embedding.weight"].T, kept


def model_cache_cases() -> list[Case]:
    def case(label, seed, B, past, new, dtype=torch.float32, **changes):
        draw, cfg = Numbers(seed, dtype), small_cfg(**changes)
        weights, ids = model_weights(draw, cfg), draw.ids(cfg["vocab_size"], B, past + new)
        cache = gpt2_with_cache(ids[:, :past], None, weights, cfg)[1] if past else None
        return Case(label, {"ids": ids[:, past:], "cache": cache, "weights": weights, "cfg": cfg})

    return [
        case("the prompt: no cache yet", 100, 2, 0, 5),
        case("1 new token, 5 kept", 101, 2, 5, 1),
        case("3 new tokens, 4 kept, 3 layers", 102, 1, 4, 3, n_layers=3, emb_dim=12, n_heads=3),
        case("up to the whole context, no bias in qkv", 103, 1, 10, 2, qkv_bias=False),
        case("float64", 104, 1, 3, 2, dtype=torch.float64),
    ]


GPT2_WITH_CACHE = Exercise(
    "gpt2_with_cache", "cache", 8, gpt2_with_cache, model_cache_cases,
    ("logits (B, new, vocab_size)", "cache: (keys, values) for each layer, each (B, H, past + new, head_dim)"),
    (
        Mistake("positions_restart",
                "the new tokens get the positions 0, 1, ...: they go on after the kept ones, at past.",
                ({"positions": "restart"},)),
        Mistake("positions_one_late",
                "the positions of the new tokens begin one too late; the first has position past.",
                ({"positions": "one late"},)),
        Mistake("upper_left",
                "right for one new token, wrong for several: the mask lies in the upper left corner. The last query "
                "stands at the last key.", ({"corner": "upper left"},)),
        Mistake("one_cache_for_all_layers",
                "every layer reads the first layer's cache. Each has its own keys and values.",
                ({"layers": "shared"},)),
        Mistake("cache_not_returned", "the cache comes back without the new tokens.", ({"keeps": "old"},)),
        Mistake("only_new_returned",
                "only the new tokens' keys and values come back: the old ones are lost.", ({"keeps": "new"},)),
    ),
    "notebooks/generation.ipynb, sections 4 and 5",
    depth=layers_deep,
)  # fmt: skip
