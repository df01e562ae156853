"""Solutions to `exercises/adapters.py`. Try first: a formula that you have fought for stays.

    python -m orchestrator check --file exercises/solutions/adapters.py

Each is one way among several, written for reading, with nothing but tensor operations. The tasks are in the docstrings
of `exercises/adapters.py`.
"""

import math
from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

# ------------------------------------------------------------------ layers


def layer_norm(
    x: Float[Tensor, "*batch emb_dim"], weight: Float[Tensor, " emb_dim"], bias: Float[Tensor, " emb_dim"], eps: float
) -> Float[Tensor, "*batch emb_dim"]:
    centred = x - x.mean(dim=-1, keepdim=True)
    variance = centred.square().mean(dim=-1, keepdim=True)  # the mean of the squares: divided by n, not n - 1
    return centred / torch.sqrt(variance + eps) * weight + bias


def gelu(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
    return 0.5 * x * (1 + torch.tanh(inner))


# ------------------------------------------------------------------ attention


def causal_mask(query_len: int, key_len: int) -> Bool[Tensor, "query_len key_len"]:
    everything = torch.ones(query_len, key_len, dtype=torch.bool)
    return everything.tril(diagonal=key_len - query_len)  # the last query stands at the last key


def one_head(
    queries: Float[Tensor, "*batch query_len head_dim"],
    keys: Float[Tensor, "*batch key_len head_dim"],
    values: Float[Tensor, "*batch key_len value_dim"],
    mask: Bool[Tensor, "query_len key_len"],
) -> Float[Tensor, "*batch query_len value_dim"]:
    scores = queries @ keys.mT / math.sqrt(queries.shape[-1])  # (..., query_len, key_len)
    weights = torch.softmax(scores.masked_fill(~mask, -torch.inf), dim=-1)
    return weights @ values


def split_heads(x: Float[Tensor, "batch tokens emb_dim"], num_heads: int) -> Float[Tensor, "batch heads tokens width"]:
    # (B, T, C) -> (B, T, H, D) -> (B, H, T, D)
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def merge_heads(context: Float[Tensor, "batch heads tokens width"]) -> Float[Tensor, "batch tokens emb_dim"]:
    return context.transpose(1, 2).flatten(2)  # (B, H, T, D) -> (B, T, H, D) -> (B, T, C)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y = x @ weight.T
    return y if bias is None else y + bias


def multi_head_attention(
    x: Float[Tensor, "batch tokens emb_dim"],
    qkv_weight: Float[Tensor, "three_emb_dim emb_dim"],
    qkv_bias: Float[Tensor, " three_emb_dim"] | None,
    out_weight: Float[Tensor, "emb_dim emb_dim"],
    out_bias: Float[Tensor, " emb_dim"],
    num_heads: int,
) -> Float[Tensor, "batch tokens emb_dim"]:
    tokens = x.shape[1]
    queries, keys, values = linear(x, qkv_weight, qkv_bias).chunk(3, dim=-1)  # each (B, T, C)
    heads = (split_heads(part, num_heads) for part in (queries, keys, values))
    context = one_head(*heads, causal_mask(tokens, tokens))
    return linear(merge_heads(context), out_weight, out_bias)


def tiled_attention(
    queries: Float[Tensor, "batch heads query_len head_dim"],
    keys: Float[Tensor, "batch heads key_len head_dim"],
    values: Float[Tensor, "batch heads key_len head_dim"],
    mask: Bool[Tensor, "query_len key_len"],
    tile_size: int,
) -> tuple[Float[Tensor, "batch heads query_len head_dim"], Float[Tensor, "batch heads query_len"]]:
    largest = torch.full_like(queries[..., :1], -torch.inf)  # m, one for each query
    total = torch.zeros_like(largest)  # l
    output = torch.zeros_like(queries)  # O, not yet divided

    tiles = zip(
        keys.split(tile_size, dim=-2), values.split(tile_size, dim=-2), mask.split(tile_size, dim=-1), strict=True
    )
    for some_keys, some_values, visible in tiles:  # split leaves the last one shorter
        scores = queries @ some_keys.mT / math.sqrt(queries.shape[-1])
        scores = scores.masked_fill(~visible, -torch.inf)  # (B, H, query_len, tile)

        risen = torch.maximum(largest, scores.amax(dim=-1, keepdim=True))
        base = torch.where(risen == -torch.inf, 0.0, risen)  # nothing seen yet: -inf - (-inf) would be NaN
        rescale = torch.exp(largest - base)
        exponentials = torch.exp(scores - base)

        total = total * rescale + exponentials.sum(dim=-1, keepdim=True)
        output = output * rescale + exponentials @ some_values
        largest = risen

    output = output / torch.where(total == 0, 1.0, total)  # who has seen nothing keeps exactly 0
    return output, (largest + total.log()).squeeze(-1)  # and has -inf + log 0 = -inf


# ------------------------------------------------------------------ model


def part_of(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The weights below a prefix, by their names behind it."""
    return {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}


def norm(x: Tensor, weights: Mapping[str, Tensor], name: str) -> Tensor:
    return layer_norm(x, weights[f"{name}.weight"], weights[f"{name}.bias"], eps=1e-5)


def feed_forward(x: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
    hidden = linear(x, weights["feed_forward.up_proj.weight"], weights["feed_forward.up_proj.bias"])
    return linear(gelu(hidden), weights["feed_forward.down_proj.weight"], weights["feed_forward.down_proj.bias"])


def transformer_block(
    x: Float[Tensor, "batch tokens emb_dim"], weights: Mapping[str, Tensor], n_heads: int
) -> Float[Tensor, "batch tokens emb_dim"]:
    x = x + multi_head_attention(
        norm(x, weights, "norm_1"),
        weights["attention.W_qkv.weight"],
        weights.get("attention.W_qkv.bias"),
        weights["attention.out_proj.weight"],
        weights["attention.out_proj.bias"],
        n_heads,
    )
    return x + feed_forward(norm(x, weights, "norm_2"), weights)


def gpt2(
    ids: Int[Tensor, "batch tokens"], weights: Mapping[str, Tensor], cfg: Mapping
) -> Float[Tensor, "batch tokens vocab_size"]:
    tokens = ids.shape[1]
    x = weights["token_embedding.weight"][ids] + weights["position_embedding.weight"][:tokens]
    for layer in range(cfg["n_layers"]):
        x = transformer_block(x, part_of(weights, f"blocks.{layer}."), cfg["n_heads"])
    head = weights["token_embedding.weight" if cfg["tie_weights"] else "head.weight"]
    return norm(x, weights, "final_norm") @ head.T


# ------------------------------------------------------------------ sampling


def sampling_probabilities(
    logits: Float[Tensor, "batch vocab_size"], temperature: float, top_k: int | None, top_p: float | None
) -> Float[Tensor, "batch vocab_size"]:
    if temperature == 0:
        likeliest = logits.argmax(dim=-1, keepdim=True)
        return torch.zeros_like(logits).scatter(-1, likeliest, 1.0)
    logits = logits / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        cut = logits.topk(top_k).values[:, -1:]  # the smallest logit that stays
        logits = logits.masked_fill(logits < cut, -torch.inf)
    probabilities = torch.softmax(logits, dim=-1)
    if top_p is None or top_p >= 1:
        return probabilities
    falling, places = probabilities.sort(dim=-1, descending=True)
    before = falling.cumsum(dim=-1) - falling  # what the likelier tokens sum to: 0 for the first
    falling = falling.masked_fill(before >= top_p, 0.0)
    kept = torch.zeros_like(probabilities).scatter(-1, places, falling)  # back into place
    return kept / kept.sum(dim=-1, keepdim=True)


def sample(
    logits: Float[Tensor, "batch vocab_size"],
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    generator: torch.Generator,
) -> Int[Tensor, " batch"]:
    if temperature == 0:
        return logits.argmax(dim=-1)
    probabilities = sampling_probabilities(logits, temperature, top_k, top_p)
    return torch.multinomial(probabilities, num_samples=1, generator=generator).squeeze(-1)


# ------------------------------------------------------------------ cache


def kv_cache_attention(
    queries: Float[Tensor, "batch heads new head_dim"],
    new_keys: Float[Tensor, "batch heads new head_dim"],
    new_values: Float[Tensor, "batch heads new head_dim"],
    cached_keys: Float[Tensor, "batch heads past head_dim"],
    cached_values: Float[Tensor, "batch heads past head_dim"],
) -> tuple[
    Float[Tensor, "batch heads new head_dim"],
    Float[Tensor, "batch heads all head_dim"],
    Float[Tensor, "batch heads all head_dim"],
]:
    keys = torch.cat([cached_keys, new_keys], dim=-2)  # along the tokens
    values = torch.cat([cached_values, new_values], dim=-2)
    mask = causal_mask(queries.shape[-2], keys.shape[-2])
    return one_head(queries, keys, values, mask), keys, values


def gpt2_with_cache(
    ids: Int[Tensor, "batch new"],
    cache: list[tuple[Tensor, Tensor]] | None,
    weights: Mapping[str, Tensor],
    cfg: Mapping,
) -> tuple[Float[Tensor, "batch new vocab_size"], list[tuple[Tensor, Tensor]]]:
    embedding, heads = weights["token_embedding.weight"], cfg["n_heads"]
    if cache is None:
        nothing = embedding.new_zeros(len(ids), heads, 0, embedding.shape[1] // heads)
        cache = [(nothing, nothing)] * cfg["n_layers"]
    past, new = cache[0][0].shape[2], ids.shape[1]
    x = embedding[ids] + weights["position_embedding.weight"][past : past + new]
    grown = []
    for layer, (old_keys, old_values) in enumerate(cache):
        own = part_of(weights, f"blocks.{layer}.")
        qkv = linear(norm(x, own, "norm_1"), own["attention.W_qkv.weight"], own.get("attention.W_qkv.bias"))
        parts = (split_heads(part, heads) for part in qkv.chunk(3, dim=-1))
        context, keys, values = kv_cache_attention(*parts, old_keys, old_values)
        grown.append((keys, values))
        x = x + linear(merge_heads(context), own["attention.out_proj.weight"], own["attention.out_proj.bias"])
        x = x + feed_forward(norm(x, own, "norm_2"), own)
    return norm(x, weights, "final_norm") @ embedding.T, grown


# ------------------------------------------------------------------ accounting


def widths(cfg: Mapping) -> tuple[int, int]:
    return cfg["emb_dim"], cfg["ff_dim"] or 4 * cfg["emb_dim"]


def count_parameters(cfg: Mapping) -> int:
    C, F = widths(cfg)
    attention = (3 * C * C + (3 * C if cfg["qkv_bias"] else 0)) + (C * C + C)  # qkv, out_proj
    block = 2 * (2 * C) + attention + (F * C + F) + (C * F + C)  # two norms, attention, up_proj, down_proj
    head = 0 if cfg["tie_weights"] else cfg["vocab_size"] * C
    return (cfg["vocab_size"] + cfg["context_length"]) * C + cfg["n_layers"] * block + 2 * C + head


def forward_flops(cfg: Mapping, tokens: int) -> int:
    C, F = widths(cfg)
    linears = 3 * C * C + C * C + C * F + F * C  # qkv, out_proj, up_proj, down_proj: for each token
    table = 2 * tokens * C  # Q K^T and weights V: for each token, all heads together
    return 2 * tokens * (cfg["n_layers"] * (linears + table) + C * cfg["vocab_size"])


def attention_share(cfg: Mapping, tokens: int) -> float:
    C, _ = widths(cfg)
    return 2 * tokens * cfg["n_layers"] * 2 * tokens * C / forward_flops(cfg, tokens)
