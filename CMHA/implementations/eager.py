"""Read 2 of 6. Attention as it is defined: softmax(Q K^T / sqrt(d)) V, one operation a line.

"Attention Is All You Need" (Vaswani et al., 2017), equation 1, with a causal mask. It keeps a T x T table for
each head: simple, exact, and the only one that can return the weights. Next: `implementations/sdpa.py`.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from CMHA.tap import tap

SUMMARY = "the definition, written out; the only one that returns attention weights"
ALIASES = ("manual", "standard")


def check(request) -> list:
    """Nothing is ever in the way of the definition."""
    return []


def attention(
    queries: Float[Tensor, "batch heads query_len head_dim"],
    keys: Float[Tensor, "batch kv_heads key_len head_dim"],
    values: Float[Tensor, "batch kv_heads key_len head_dim"],
    mask, *, scale: float, dropout: float = 0.0,
) -> tuple[Float[Tensor, "batch heads query_len head_dim"], Float[Tensor, "batch heads query_len key_len"]]:  # fmt:skip
    if keys.shape[1] != queries.shape[1]:  # grouped heads: each key-value head serves several query heads
        group = queries.shape[1] // keys.shape[1]
        keys, values = keys.repeat_interleave(group, dim=1), values.repeat_interleave(group, dim=1)

    scores = tap("scores", queries @ keys.transpose(-2, -1) * scale)  # (B, H, query_len, key_len)
    hidden = ~mask.dense()
    # The lowest finite number instead of -inf: a row that may see nothing stays free of NaN ...
    scores = tap("masked_scores", scores.masked_fill(hidden, torch.finfo(scores.dtype).min))
    weights = torch.softmax(scores, dim=-1)
    weights = tap("weights", weights.masked_fill(hidden, 0.0))  # ... and becomes exactly zero here
    weights = torch.dropout(weights, dropout, train=dropout > 0)
    return weights @ values, weights
