"""Exercises `transformer_block` and `gpt2`: the parts put together, and how that goes wrong."""

import torch

from orchestrator.learning.checks.attention import multi_head_attention
from orchestrator.learning.checks.exercise import Case, Exercise, Mistake, Numbers
from orchestrator.learning.checks.layers import gelu, layer_norm


def norm(x, weights, name):
    return layer_norm(x, weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-5)


def linear(x, weights, name):
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def transformer_block(
    x, weights, n_heads, *, order="pre", first_residual=True, second_residual=True, second_norm="norm_2",
    reads="stream", adds_to="stream", form="tanh", masking="before", first_norm=True,
):  # fmt: skip
    def attention(of):
        names = ("W_qkv.weight", "W_qkv.bias", "out_proj.weight", "out_proj.bias")
        parts = [weights.get(f"attention.{name}") for name in names]
        return multi_head_attention(of, *parts, n_heads, masking=masking)

    def feed_forward(of):
        return linear(gelu(linear(of, weights, "feed_forward.up_proj"), form=form), weights, "feed_forward.down_proj")

    if order == "post":
        x = norm(x + attention(x), weights, "norm_1")
        return norm(x + feed_forward(x), weights, "norm_2")
    start = x
    normed = norm(x, weights, "norm_1") if first_norm else x
    x = (0 if not first_residual else normed if adds_to == "norm" else x) + attention(normed)
    normed = norm(start if reads == "input" else x, weights, second_norm) if second_norm else x
    return (0 if not second_residual else normed if adds_to == "norm" else x) + feed_forward(normed)


def block_weights(draw: Numbers, C: int, F: int, qkv_bias: bool = True) -> dict:
    """Weights by the names of `TransformerBlock.state_dict()`, of a size at which every part counts."""
    shapes = {
        "attention.W_qkv": (3 * C, C), "attention.out_proj": (C, C),
        "feed_forward.up_proj": (F, C), "feed_forward.down_proj": (C, F),
    }  # fmt: skip
    weights = {}
    for name, (out, into) in shapes.items():
        weights[f"{name}.weight"] = draw(out, into, scale=into**-0.5)
        if qkv_bias or name != "attention.W_qkv":
            weights[f"{name}.bias"] = draw(out, scale=0.3)
    for name in ("norm_1", "norm_2"):
        weights[f"{name}.weight"], weights[f"{name}.bias"] = draw(C, scale=0.3, mean=1.0), draw(C, scale=0.3)
    return weights


def block_cases() -> list[Case]:
    def case(label, seed, B, T, C, H, F=None, qkv_bias=True, dtype=torch.float32):
        draw = Numbers(seed, dtype)
        weights = block_weights(draw, C, F or 4 * C, qkv_bias)
        return Case(label, {"x": draw(B, T, C, scale=2.0, mean=0.5), "weights": weights, "n_heads": H})

    return [
        case("2 heads", 50, 2, 6, 16, 2),
        case("4 heads, 9 tokens", 51, 1, 9, 32, 4),
        case("one token", 52, 3, 1, 8, 2),
        case("ff_dim is not 4 emb_dim", 53, 1, 5, 12, 3, F=20),
        case("no bias in qkv", 54, 2, 4, 8, 1, qkv_bias=False),
        case("float64", 55, 1, 4, 8, 2, dtype=torch.float64),
    ]


TRANSFORMER_BLOCK = Exercise(
    "transformer_block", "model", 8, transformer_block, block_cases, ("(B, T, emb_dim), as x",),
    (
        Mistake("post_norm",
                "post-norm: the norm comes after the addition, as in 2017. GPT-2 normalises what a layer *reads*, x "
                "+ attention(norm_1(x)).", ({"order": "post"},)),
        Mistake("first_residual_forgotten",
                "what attention gives replaces the stream; it is added to it.", ({"first_residual": False},)),
        Mistake("second_residual_forgotten",
                "what feed-forward gives replaces the stream; it is added to it.", ({"second_residual": False},)),
        Mistake("residual_from_norm",
                "attention and feed-forward are added to the *normalised* copy. They are added to the stream "
                "itself.", ({"adds_to": "norm"},)),
        Mistake("norm_1_used_twice",
                "norm_1 serves both layers; feed-forward reads through norm_2.", ({"second_norm": "norm_1"},)),
        Mistake("first_norm_forgotten", "attention reads the stream without norm_1.", ({"first_norm": False},)),
        Mistake("second_norm_forgotten", "feed-forward reads the stream without norm_2.", ({"second_norm": None},)),
        Mistake("in_parallel",
                "attention and feed-forward read the same x. In GPT-2 feed-forward comes after: it reads what "
                "attention has added.", ({"reads": "input"},)),
        Mistake("exact_gelu",
                "the GELU is the exact one, through erf (torch's default); GPT-2 has the tanh form.",
                ({"form": "exact"},)),
        Mistake("gelu_forgotten",
                "another bend stands where the GELU should: ReLU or SiLU.", ({"form": "relu"}, {"form": "silu"})),
        Mistake("mask_forgotten", "attention sees the future: there is no causal mask.", ({"masking": "forgotten"},)),
    ),
    "notebooks/llm.ipynb, section 5",
    depth=lambda arguments: 4,
)  # fmt: skip

# ------------------------------------------------------------------ the whole model


def gpt2(
    ids, weights, cfg, *, positions="counted", final_norm=True, blocks="all", head="right", ends="logits",
    embedding_scale=False, past=0, cache=None, **block,
):  # fmt: skip
    T, C, L = ids.shape[1], cfg["emb_dim"], cfg["n_layers"]
    x = weights["token_embedding.weight"][ids]
    if embedding_scale:
        x = x * C**0.5
    if positions != "forgotten":
        first = past + (positions == "from 1")
        x = x + weights["position_embedding.weight"][torch.arange(first, first + T)]
    names = {
        "all": range(L),
        "first": [0] * L,
        "but one": range(L - 1),
        "sorted": sorted(range(L), key=str),
        "reversed": range(L)[::-1],
    }[blocks]
    for i in names:
        prefix = f"blocks.{i}."
        own = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
        x = transformer_block(x, own, cfg["n_heads"], **block)
    if final_norm:
        x = norm(x, weights, "final_norm")
    table = weights["token_embedding.weight"]
    if not cfg["tie_weights"] and head != "tied always":
        table = weights["head.weight"]
    logits = x @ (table if head == "turned" else table.T)
    return {"logits": logits, "probabilities": logits.softmax(-1), "logarithms": logits.log_softmax(-1)}[ends]


def model_weights(draw: Numbers, cfg: dict) -> dict:
    """Weights by the names of `GPTModel.state_dict()`; head.weight only if the head is not tied."""
    V, C = cfg["vocab_size"], cfg["emb_dim"]
    weights = {
        "token_embedding.weight": draw(V, C, scale=0.7),
        "position_embedding.weight": draw(cfg["context_length"], C, scale=0.5),
    }
    for i in range(cfg["n_layers"]):
        own = block_weights(draw, C, cfg["ff_dim"] or 4 * C, cfg["qkv_bias"])
        weights |= {f"blocks.{i}.{name}": value for name, value in own.items()}
    weights["final_norm.weight"], weights["final_norm.bias"] = draw(C, scale=0.3, mean=1.0), draw(C, scale=0.3)
    if not cfg["tie_weights"]:
        weights["head.weight"] = draw(V, C, scale=0.7)
    return weights


def small_cfg(**changes) -> dict:
    return {
        "vocab_size": 23, "context_length": 12, "emb_dim": 16, "n_heads": 2, "n_layers": 2, "ff_dim": None,
        "drop_rate": 0.1, "qkv_bias": True, "tie_weights": True, **changes,
    }  # fmt: skip


def gpt2_cases() -> list[Case]:
    def case(label, seed, B, T, dtype=torch.float32, **changes):
        draw, cfg = Numbers(seed, dtype), small_cfg(**changes)
        return Case(label, {"ids": draw.ids(cfg["vocab_size"], B, T), "weights": model_weights(draw, cfg), "cfg": cfg})

    return [
        case("2 layers", 60, 2, 7),
        case("as many words as emb_dim", 61, 1, 5, vocab_size=16, n_heads=4),
        case("a head of its own", 62, 2, 4, tie_weights=False),
        case("11 layers", 63, 1, 4, n_layers=11, emb_dim=8),
        case("one token, ff_dim 24, no bias in qkv", 64, 2, 1, ff_dim=24, qkv_bias=False),
        case("the whole context", 65, 1, 12),
        case("float64", 66, 1, 5, dtype=torch.float64),
    ]


def layers_deep(arguments) -> int:
    return 4 * arguments["cfg"]["n_layers"] + 2


GPT2 = Exercise(
    "gpt2", "model", 12, gpt2, gpt2_cases, ("logits (B, T, vocab_size)",),
    (
        Mistake("positions_forgotten",
                "the position embedding is not added: the model cannot tell the order of the words before a token.",
                ({"positions": "forgotten"},)),
        Mistake("positions_from_1",
                "positions are counted from 1; the first token has row 0.", ({"positions": "from 1"},)),
        Mistake("final_norm_forgotten", "final_norm is not applied before the head.", ({"final_norm": False},)),
        Mistake("one_block_for_all", "the weights of blocks.0 are used in every layer.", ({"blocks": "first"},)),
        Mistake("last_block_left_out", "the last block is left out: range(n_layers - 1).", ({"blocks": "but one"},)),
        Mistake("blocks_sorted_as_text",
                "with 11 layers the blocks are taken in the order of their names as text, where blocks.10 stands "
                "before blocks.2. Count from 0 to n_layers - 1.", ({"blocks": "sorted"},)),
        Mistake("blocks_reversed", "the blocks run from last to first.", ({"blocks": "reversed"},)),
        Mistake("head_transposed",
                "the head multiplies by the table, not by its transpose. It runs only where vocab_size = emb_dim: "
                "(B, T, C) @ (C, V), and the table is (V, C).", ({"head": "turned"},)),
        Mistake("own_head_ignored",
                "the token embedding serves as head always. With tie_weights False the weights hold a head.weight: "
                "use it.", ({"head": "tied always"},)),
        Mistake("probabilities_returned",
                "the softmax of the logits is returned, or its logarithm. Return the logits.",
                ({"ends": "probabilities"}, {"ends": "logarithms"})),
        Mistake("embedding_scaled",
                "the token embedding is multiplied by sqrt(emb_dim), as in the Transformer of 2017. GPT-2 adds it "
                "as it is.", ({"embedding_scale": True},)),
        Mistake("dropout_left_on",
                "two calls with the same ids give different logits: dropout is on (cfg has drop_rate, for "
                "training). Here it must be off: eval()."),
        Mistake("post_norm", "the blocks are post-norm; see transformer_block.", ({"order": "post"},)),
        Mistake("exact_gelu", "the GELU is the exact one; GPT-2 has the tanh form.", ({"form": "exact"},)),
        Mistake("mask_forgotten", "attention sees the future: there is no causal mask.", ({"masking": "forgotten"},)),
    ),
    "notebooks/llm.ipynb, section 6",
    depth=layers_deep,
)  # fmt: skip
