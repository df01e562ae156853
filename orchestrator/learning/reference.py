"""GPT-2's formulas once more, in float64, without any of the project's layers: what logits are compared with.

It takes weights by name and reads the classes of the model nowhere, so that a mistake in those cannot be in both. One
head and one layer after the other: slow, and for small models.
Letters: B sequences, T tokens, C width, H heads, D width of a head.
"""

import math
from collections.abc import Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor


def reference_logits(
    weights: Mapping[str, Tensor], cfg: Mapping, ids: Int[Tensor, "batch tokens"]
) -> Float[Tensor, "batch tokens vocab_size"]:
    """Logits (B, T, V) in float64.

    Why: two implementations that share a mistake agree with each other; a third, written apart, does not.

    Args:
        weights: a `state_dict()` of a GPTModel.
        cfg: its cfg dict: n_layers, n_heads, tie_weights.
        ids: (B, T) token ids.
    Raises:
        ValueError: grouped key-value heads, which these formulas do not have.
    Source: Radford et al., 2019, section 2.3; Hendrycks and Gimpel, 2016, section 2; Ba et al., 2016.
    """
    if cfg.get("n_kv_heads") not in (None, cfg["n_heads"]):
        raise ValueError("reference_logits knows GPT-2's heads only: n_kv_heads must be None.")
    w = {name: tensor.detach().double() for name, tensor in weights.items()}
    tokens = ids.shape[1]
    future = torch.full((tokens, tokens), -math.inf, dtype=torch.float64, device=ids.device).triu(1)
    x = w["token_embedding.weight"][ids] + w["position_embedding.weight"][:tokens]
    for i in range(cfg["n_layers"]):
        here = f"blocks.{i}."
        read = normalised(x, w, f"{here}norm_1")
        queries, keys, values = linear(read, w, f"{here}attention.W_qkv").chunk(3, dim=-1)  # each (B, T, C)
        width, contexts = x.shape[-1] // cfg["n_heads"], []
        for head in range(cfg["n_heads"]):
            mine = slice(head * width, (head + 1) * width)
            scores = torch.einsum("bqd,bkd->bqk", queries[..., mine], keys[..., mine]) / math.sqrt(width) + future
            exponentials = torch.exp(scores - scores.amax(-1, keepdim=True))
            contexts.append(exponentials / exponentials.sum(-1, keepdim=True) @ values[..., mine])
        x = x + linear(torch.cat(contexts, dim=-1), w, f"{here}attention.out_proj")
        hidden = linear(normalised(x, w, f"{here}norm_2"), w, f"{here}feed_forward.up_proj")
        hidden = 0.5 * hidden * (1 + torch.tanh(math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3)))
        x = x + linear(hidden, w, f"{here}feed_forward.down_proj")
    head = w["token_embedding.weight" if cfg["tie_weights"] else "head.weight"]
    return normalised(x, w, "final_norm") @ head.T


def linear(x: Tensor, w: Mapping[str, Tensor], name: str) -> Tensor:
    """x W^T + b; some layers have no b."""
    product = x @ w[f"{name}.weight"].T
    return product + w[f"{name}.bias"] if f"{name}.bias" in w else product


def normalised(x: Tensor, w: Mapping[str, Tensor], name: str) -> Tensor:
    """LayerNorm: variance divided by C, and 1e-5 added to it."""
    centred = x - x.sum(-1, keepdim=True) / x.shape[-1]
    variance = (centred**2).sum(-1, keepdim=True) / x.shape[-1]
    return centred / (variance + 1e-5) ** 0.5 * w[f"{name}.weight"] + w[f"{name}.bias"]
