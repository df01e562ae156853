"""Exercises `causal_mask`, `one_head` and `multi_head_attention`: the definition, and how it goes wrong."""

from itertools import permutations

import torch

from orchestrator.learning.checks.exercise import Case, Exercise, Mistake, Numbers

# ------------------------------------------------------------------ who may see whom


def causal_mask(query_len, key_len, *, shift=0, corner="lower right", triangle="lower", inverted=False):
    query = torch.arange(query_len)[:, None] + (key_len - query_len if corner == "lower right" else 0)
    key = torch.arange(key_len)[None, :]
    if triangle == "none":
        allowed = (key == key) & (query == query)
    else:
        allowed = key <= query + shift if triangle == "lower" else key >= query - shift
    return ~allowed if inverted else allowed


def causal_mask_cases() -> list[Case]:
    lengths = [(4, 4), (1, 1), (7, 7), (2, 5), (1, 6), (3, 8)]
    return [Case(f"{q} queries, {k} keys", {"query_len": q, "key_len": k}) for q, k in lengths]


CAUSAL_MASK = Exercise(
    "causal_mask", "attention", 4, causal_mask, causal_mask_cases, ("(query_len, key_len), torch.bool",),
    (
        Mistake("inverted",
                "it marks what is hidden. Here, as in torch's scaled_dot_product_attention, True = may attend.",
                ({"inverted": True},)),
        Mistake("upper_triangle",
                "it is the other triangle: each query sees itself and the future.", ({"triangle": "upper"},)),
        Mistake("own_token_hidden",
                "shifted by one: the diagonal is missing, so a token cannot see itself, and the first sees nothing.",
                ({"shift": -1},)),
        Mistake("mask_shifted", "shifted by one: each query sees one token of the future.", ({"shift": 1},)),
        Mistake("upper_left",
                "right for as many queries as keys; with fewer queries (a cache) the triangle lies in the upper "
                "left corner. The last query stands at the last key: lower right.", ({"corner": "upper left"},)),
        Mistake("nothing_hidden", "it hides nothing: every query sees every key.", ({"triangle": "none"},)),
    ),
    "notebooks/llm.ipynb, sections 2 and 7",
)  # fmt: skip

# ------------------------------------------------------------------ one head

SCALES = {
    "root of head_dim": lambda q, k: q.shape[-1] ** -0.5,
    "none": lambda q, k: 1.0,
    "head_dim": lambda q, k: 1.0 / q.shape[-1],
    "times root": lambda q, k: q.shape[-1] ** 0.5,
    "root of tokens": lambda q, k: k.shape[-2] ** -0.5,
}


def one_head(
    queries, keys, values, mask, *, scale="root of head_dim", masking="before", softmax_axis=-1, transposed=True,
    exchanged=False,
):  # fmt: skip
    """`scale` is a name in SCALES, or a number."""
    if exchanged:
        queries, keys = keys, queries
    factor = SCALES[scale](queries, keys) if isinstance(scale, str) else scale
    scores = queries @ (keys.transpose(-2, -1) if transposed else keys) * factor
    if masking in ("before", "inverted"):
        scores = scores.masked_fill(mask if masking == "inverted" else ~mask, -torch.inf)
    elif masking == "zeros":
        scores = scores * mask
    weights = torch.softmax(scores, dim=softmax_axis)
    if masking == "after":
        weights = weights * mask
    return weights @ values


SCORES = (
    Mistake("scale_forgotten", "the scores are not divided by the square root of head_dim.", ({"scale": "none"},)),
    Mistake("scaled_by_width", "the scores are divided by head_dim, not by its square root.", ({"scale": "head_dim"},)),
    Mistake("multiplied_by_root",
            "the scores are multiplied by the square root of head_dim; divide.", ({"scale": "times root"},)),
    Mistake("mask_forgotten", "the mask is not used: every token sees the future.", ({"masking": "forgotten"},)),
    Mistake("mask_inverted",
            "the mask is turned round: it hides what it should show. True = may attend.", ({"masking": "inverted"},)),
    Mistake("mask_after_softmax",
            "the mask comes after the softmax, so the rows no longer sum to 1: the future has taken its share. Mask "
            "the scores, with -inf.", ({"masking": "after"},)),
    Mistake("masked_with_zero",
            "hidden scores are set to 0. exp(0) = 1 is not nothing: -inf is.", ({"masking": "zeros"},)),
    Mistake("softmax_wrong_axis",
            "the softmax runs over the queries; each query's weights over the *keys* sum to 1 (dim=-1).",
            ({"softmax_axis": -2},)),
)  # fmt: skip


def one_head_cases() -> list[Case]:
    def case(label, seed, batch, query_len, key_len, head_dim, value_dim=None, dtype=torch.float32):
        draw = Numbers(seed, dtype)
        q, k = draw(*batch, query_len, head_dim, scale=1.5), draw(*batch, key_len, head_dim, scale=1.5)
        v = draw(*batch, key_len, value_dim or head_dim)
        return Case(label, {"queries": q, "keys": k, "values": v, "mask": causal_mask(query_len, key_len)})

    return [
        case("6 tokens, width 8", 20, (), 6, 6, 8),
        case("as many tokens as the head is wide", 21, (), 4, 4, 4),
        case("batch and heads, (2, 3, 5, 16)", 22, (2, 3), 5, 5, 16),
        case("values wider than keys", 23, (2,), 7, 7, 4, 6),
        case("2 queries, 5 keys", 24, (3,), 2, 5, 8),
        case("one token", 25, (1,), 1, 1, 8),
        case("float64", 26, (2,), 5, 5, 6, dtype=torch.float64),
    ]


ONE_HEAD = Exercise(
    "one_head", "attention", 8, one_head, one_head_cases, ("(*batch, query_len, value_dim)",),
    (
        *SCORES,
        Mistake("scaled_by_tokens",
                "the scores are divided by the square root of the number of keys; the width of a head is meant.",
                ({"scale": "root of tokens"},)),
        Mistake("keys_not_transposed",
                "queries @ keys, without transposing: it runs only where there are as many tokens as the head is "
                "wide, and is wrong there.", ({"transposed": False},)),
        Mistake("queries_and_keys_exchanged",
                "the scores are K Q^T: row i must belong to *query* i.", ({"exchanged": True},)),
    ),
    "notebooks/llm.ipynb, section 2",
)  # fmt: skip

# ------------------------------------------------------------------ several heads


def multi_head_attention(
    x, qkv_weight, qkv_bias, out_weight, out_bias, num_heads, *, order="qkv", cut="thirds", split="transpose",
    merge="transpose", project=True, biased=True, out_biased=True, turned=False, wide_scale=None, **head,
):  # fmt: skip
    B, T, C = x.shape
    D = C // num_heads
    qkv = x @ (qkv_weight if turned else qkv_weight.T)
    if qkv_bias is not None and biased:
        qkv = qkv + qkv_bias
    if cut == "thirds":
        parts = dict(zip(order, qkv.split(C, dim=-1), strict=True))
    else:  # each head's queries, keys and values together
        by_head = qkv.view(B, T, num_heads, 3, D)
        parts = {name: by_head[..., i, :].reshape(B, T, C) for i, name in enumerate(order)}
    if split == "transpose":
        q, k, v = (parts[name].view(B, T, num_heads, D).transpose(1, 2) for name in "qkv")
    else:
        q, k, v = (parts[name].reshape(B, num_heads, T, D) for name in "qkv")
    if wide_scale:
        head = head | {"scale": C**-0.5}
    context = one_head(q, k, v, causal_mask(T, T), **head)
    merged = context.transpose(1, 2).reshape(B, T, C) if merge == "transpose" else context.reshape(B, T, C)
    if not project:
        return merged
    output = merged @ (out_weight if turned else out_weight.T)
    return output + out_bias if out_biased else output


def multi_head_cases() -> list[Case]:
    def case(label, seed, B, T, C, H, bias=True, dtype=torch.float32):
        draw = Numbers(seed, dtype)
        return Case(label, {
            "x": draw(B, T, C), "qkv_weight": draw(3 * C, C, scale=1.5 / C**0.5),
            "qkv_bias": draw(3 * C, scale=0.5) if bias else None,
            "out_weight": draw(C, C, scale=C**-0.5), "out_bias": draw(C, scale=0.5), "num_heads": H,
        })  # fmt: skip

    return [
        case("2 heads", 30, 2, 5, 16, 2),
        case("4 heads, 9 tokens", 31, 1, 9, 24, 4),
        case("one head", 32, 2, 6, 8, 1),
        case("no bias in qkv", 33, 3, 4, 12, 3, bias=False),
        case("one token", 34, 2, 1, 8, 4),
        case("float64", 35, 1, 5, 12, 2, dtype=torch.float64),
    ]


OTHER_ORDERS = tuple({"order": "".join(order)} for order in permutations("qkv") if order != tuple("qkv"))

MULTI_HEAD_ATTENTION = Exercise(
    "multi_head_attention", "attention", 10, multi_head_attention, multi_head_cases, ("(B, T, emb_dim), as x",),
    (
        Mistake("view_without_transpose",
                "the heads are split by view (or reshape) to (B, H, T, D) at once, which mixes up tokens. First (B, "
                "T, H, D), then transpose(1, 2).", ({"split": "view"}, {"split": "view", "merge": "view"})),
        Mistake("merged_without_transpose",
                "the heads are merged without going back to (B, T, H, D) first: the result has the right shape, and "
                "other tokens' numbers.", ({"merge": "view"},)),
        Mistake("scaled_by_emb_dim",
                "the scores are divided by the square root of emb_dim; of head_dim is right: it is the width that "
                "is summed over.", ({"wide_scale": True},)),
        Mistake("out_proj_forgotten",
                "the merged heads are returned as they are; out_weight and out_bias come last.", ({"project": False},)),
        Mistake("qkv_order",
                "queries, keys and values are taken from qkv_weight in another order. Its rows hold first all "
                "queries, then all keys, then all values.", OTHER_ORDERS),
        Mistake("qkv_cut_by_head",
                "qkv is cut as if each head's queries, keys and values stood together. First all queries (of all "
                "heads), then all keys, then all values.", ({"cut": "heads"},)),
        Mistake("qkv_bias_forgotten", "qkv_bias is not added.", ({"biased": False},)),
        Mistake("out_bias_forgotten", "out_bias is not added.", ({"out_biased": False},)),
        Mistake("weights_not_transposed",
                "x @ weight; weights are (out, in), as torch.nn.Linear keeps them: x @ weight.T.", ({"turned": True},)),
        *SCORES,
    ),
    "notebooks/llm.ipynb, section 3",
)  # fmt: skip
