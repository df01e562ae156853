"""Parameters, FLOPs and memory of a GPT-2 by closed formula, to hold what was measured against.

Letters: V vocab_size, C emb_dim, L n_layers, H heads, B sequences of T tokens, BT their product, F ff_dim, K width of
the keys (C unless heads are grouped), s bytes of a number that matrix products read. The cfg's variants (`norm`, `mlp`,
`positions`) change some terms; each function says which. What a training step holds at its worst moment is in
`training_memory.py`; how much of a machine's speed it uses, in `orchestrator/training/mfu.py`.
"""

from collections.abc import Mapping

import torch

from CMHA.implementations.flash_tiled import BLOCK_SIZE
from GPT2Model.config import complete
from TransformerBlock.variants import swiglu_width


def count_parameters(cfg: Mapping) -> int:
    """How many numbers a model of this cfg trains; a tied head counts once.

    Embeddings V*C + P*C; a block: two norms 4C, qkv C*(C + 2K), projection C*C + C, feed-forward 2*C*F + F + C; the
    last norm 2C; an untied head V*C. With rmsnorm a norm has C instead of 2C (no bias), with swiglu the feed-forward
    3*C*F (a third matrix, no biases), with rope there is no P*C.
    """
    cfg = complete(cfg)
    C, F, K = widths(cfg)
    norm = C if cfg["norm"] == "rmsnorm" else 2 * C
    qkv = C * (C + 2 * K) + (C + 2 * K) * cfg["qkv_bias"]
    biases = 0 if cfg["mlp"] == "swiglu" else F + C
    block = 2 * norm + qkv + (C * C + C) + feed_forward_matrices(cfg) + biases
    embeddings = sum(embedding_parameters(cfg).values())
    head = 0 if cfg["tie_weights"] else cfg["vocab_size"] * C
    return embeddings + cfg["n_layers"] * block + norm + head


def embedding_parameters(cfg: Mapping) -> dict[str, int]:
    """Numbers in "token" (V*C) and "position" (P*C; 0 with rope) embeddings: looked up, not multiplied with.

    P is context_length.
    """
    cfg = complete(cfg)
    positions = cfg["context_length"] if cfg["positions"] == "learned" else 0
    return {"token": cfg["vocab_size"] * cfg["emb_dim"], "position": positions * cfg["emb_dim"]}


def forward_flops(cfg: Mapping, batch: int, tokens: int) -> int:
    """Floating-point operations of one forward pass: 2 for each multiply-add of the matrix products.

    Norms, GELU or SiLU, the gate's product, the turning of rotary positions, softmax and additions are left out (about
    one in a hundred). Attention is counted over the whole T x T table, as eager computes it; a causal kernel may do
    half of it. A backward pass costs twice the forward.
    """
    cfg = complete(cfg)
    per_token = cfg["n_layers"] * (block_matrices(cfg) + 2 * tokens * cfg["emb_dim"])
    return 2 * (per_token + cfg["vocab_size"] * cfg["emb_dim"]) * batch * tokens


def attention_flops(cfg: Mapping, batch: int, tokens: int) -> int:
    """The part of `forward_flops` that Q K^T and weights x values take: 2 * 2 * L * T * C for each token."""
    cfg = complete(cfg)
    return 2 * 2 * cfg["n_layers"] * tokens * cfg["emb_dim"] * batch * tokens


def training_flops(cfg: Mapping, batch: int, tokens: int, *, causal: bool = False) -> dict[str, int]:
    """FLOPs of "forward", "backward" (twice that: by the weights, and by what they were multiplied with), "training".

    Args:
        causal: count half of attention's table, what a kernel that leaves hidden pairs out computes at least.
    """
    forward = forward_flops(cfg, batch, tokens) - causal * attention_flops(cfg, batch, tokens) // 2
    return {"forward": forward, "backward": 2 * forward, "training": 3 * forward}


def memory_bytes(cfg: Mapping, batch: int, tokens: int, dtype: torch.dtype = torch.float32) -> dict[str, int]:
    """Bytes of what a training step and a generation hold.

    Returns:
        "weights"; "gradients" (as many); "adam" (two numbers for each weight); "logits" of a (batch, tokens) pass;
        "eager_table" (one layer's T x T weights, which a fused implementation never makes); "kv_cache".
    """
    cfg = complete(cfg)
    _, _, K = widths(cfg)
    size, weights = dtype.itemsize, count_parameters(cfg) * dtype.itemsize
    return {
        "weights": weights,
        "gradients": weights,
        "adam": 2 * weights,
        "logits": batch * tokens * cfg["vocab_size"] * size,
        "eager_table": batch * cfg["n_heads"] * tokens * tokens * size,
        "kv_cache": 2 * cfg["n_layers"] * batch * tokens * K * size,
    }


def forward_peak(cfg: Mapping, batch: int, tokens: int, *, short: bool = False, attention: str = "sdpa") -> dict:
    """The worst moment of a forward pass without gradients: nothing is kept for a backward pass.

    Args:
        short: under autocast to bf16 or fp16: s = 2 instead of 4, and a copy of every matrix.
        attention: "eager" makes three tables (B, H, T, T), "flash_tiled" a few tiles; any other is a fused kernel.
    Returns:
        "moment" ("attention", "feed-forward" or "logits"), "bytes" of all that is alive then, "weights" among them,
        and "moments", the bytes of each.
    """
    cfg = complete(cfg)
    (C, F, K), BT, s = widths(cfg), batch * tokens, 2 if short else 4
    weights = 4 * count_parameters(cfg)
    copies = s * cfg["n_layers"] * block_matrices(cfg) * short  # made by autocast, and kept until its `with` ends
    cast = s * BT * C * short  # of a norm's result, which is fp32
    rope, swiglu = cfg["positions"] == "rope", cfg["mlp"] == "swiglu"
    x, normed, qkv = 4 * BT * C, 4 * BT * C, s * BT * (C + 2 * K)
    # Turned queries and keys stand beside them, since the values are a part of qkv. While they are made: halves and
    # products of halves in fp32, of short numbers a copy in fp32 too.
    turned, turning = s * BT * (C + K) * rope, (12 if short else 8) * BT * C * rope
    if attention == "eager":  # scores, softmax, weights; the mask; grouped keys and values once for each head
        attending = 3 * s * cfg["n_heads"] * BT * tokens + 2 * tokens**2 + 2 * s * BT * C * (K < C)
    else:  # the result, a number for each row, and what flash_tiled holds of tiles: always fp32
        tile = min(tokens, BLOCK_SIZE) * (attention == "flash_tiled")
        tiles = 4 * batch * cfg["n_heads"] * tile**2 * (4 if tile < tokens else 3)
        rows = 4 * batch * tile * C * (4 if short else 1)  # what is summed up; of short numbers, a tile's rows in fp32
        # Then the output; and before it, of what was turned, the heads merged: elsewhere that is no copy.
        after = s * BT * C * (2 if rope else 1)
        attending = s * BT * C + max(4 * BT * cfg["n_heads"] + tiles + rows, after)
    moments = {
        "attention": x + normed + qkv + max(turned + attending, turning),
        # The block's input, and what attention made of it; before and after GELU, or SiLU(gate), up and their product.
        "feed-forward": x + x + normed + (3 if swiglu else 2) * s * BT * F,
        "logits": x + normed + cast + s * BT * cfg["vocab_size"] + s * cfg["vocab_size"] * C * short,
    }
    moments = {name: weights + copies + size for name, size in moments.items()}
    worst = max(moments, key=moments.__getitem__)
    return {"moment": worst, "bytes": moments[worst], "weights": weights, "moments": moments}


def block_matrices(cfg: Mapping) -> int:
    """Numbers in the matrices of one block of a complete cfg, with which each token is multiplied once."""
    C, _, K = widths(cfg)
    return C * (C + 2 * K) + C * C + feed_forward_matrices(cfg)


def feed_forward_matrices(cfg: Mapping) -> int:
    """Numbers in the matrices of one feed-forward layer of a complete cfg: 2*C*F, with a gate 3*C*F."""
    C, F, _ = widths(cfg)
    return (3 if cfg["mlp"] == "swiglu" else 2) * C * F


def widths(cfg: Mapping) -> tuple[int, int, int]:
    """(C, F, K) of a complete cfg: of the stream, inside the feed-forward, of all keys together."""
    C, kv_heads = cfg["emb_dim"], cfg["n_kv_heads"] or cfg["n_heads"]
    usual = swiglu_width(C) if cfg["mlp"] == "swiglu" else 4 * C
    return C, cfg["ff_dim"] or usual, C // cfg["n_heads"] * kv_heads
