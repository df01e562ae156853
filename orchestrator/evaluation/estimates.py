"""Parameters, FLOPs and memory of a GPT-2 by closed formula, to hold what was measured against.

Letters: V vocab_size, C emb_dim, L n_layers, T tokens, F ff_dim, K width of the keys (C unless heads are grouped).
"""

from collections.abc import Mapping

import torch

from GPT2Model.config import complete


def count_parameters(cfg: Mapping) -> int:
    """How many numbers a model of this cfg trains; a tied head counts once.

    Embeddings V*C + T*C; a block: two norms 4C, qkv C*(C + 2K), projection C*C + C, feed-forward 2*C*F + F + C; the
    last norm 2C; an untied head V*C.
    """
    cfg = complete(cfg)
    C, F, K = _widths(cfg)
    qkv = C * (C + 2 * K) + (C + 2 * K) * cfg["qkv_bias"]
    block = 4 * C + qkv + (C * C + C) + (2 * C * F + F + C)
    head = 0 if cfg["tie_weights"] else cfg["vocab_size"] * C
    return (cfg["vocab_size"] + cfg["context_length"]) * C + cfg["n_layers"] * block + 2 * C + head


def forward_flops(cfg: Mapping, batch: int, tokens: int) -> int:
    """Floating-point operations of one forward pass: 2 for each multiply-add of the matrix products.

    Norms, GELU, softmax and additions are left out (about one in a hundred). Attention is counted over the whole T x T
    table, as eager computes it; a causal kernel may do half of it. A backward pass costs twice the forward.
    """
    cfg = complete(cfg)
    C, F, K = _widths(cfg)
    per_token = cfg["n_layers"] * (C * (C + 2 * K) + C * C + 2 * C * F + 2 * tokens * C) + cfg["vocab_size"] * C
    return 2 * per_token * batch * tokens


def memory_bytes(cfg: Mapping, batch: int, tokens: int, dtype: torch.dtype = torch.float32) -> dict[str, int]:
    """Bytes of what a training step and a generation hold.

    Returns:
        "weights"; "gradients" (as many); "adam" (two numbers for each weight); "logits" of a (batch, tokens) pass;
        "eager_table" (one layer's T x T weights, which a fused implementation never makes); "kv_cache".
    """
    cfg = complete(cfg)
    _, _, K = _widths(cfg)
    size, weights = dtype.itemsize, count_parameters(cfg) * dtype.itemsize
    return {
        "weights": weights,
        "gradients": weights,
        "adam": 2 * weights,
        "logits": batch * tokens * cfg["vocab_size"] * size,
        "eager_table": batch * cfg["n_heads"] * tokens * tokens * size,
        "kv_cache": 2 * cfg["n_layers"] * batch * tokens * K * size,
    }


def _widths(cfg: Mapping) -> tuple[int, int, int]:
    kv_heads = cfg["n_kv_heads"] or cfg["n_heads"]
    return cfg["emb_dim"], cfg["ff_dim"] or 4 * cfg["emb_dim"], cfg["emb_dim"] // cfg["n_heads"] * kv_heads
