"""The parts of a block that models after GPT-2 changed: GELU, RMSNorm, SwiGLU, positions; and who hands them out.

`norm`, `feed_forward`, `position_embedding` and `rotary` give what the cfg asks for: GPT-2's own part, unless it says
otherwise. docs/variants/ has what each changes, why, and what it costs.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from CMHA.choosing import did_you_mean
from CMHA.rotary import RotaryPositions
from TransformerBlock.layers import FeedForward, LayerNorm


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + 1e-5) * weight, over the last axis: LayerNorm without the mean and without a bias.

    Why: what LayerNorm is needed for is the scale; leaving the mean alone costs nothing and saves a pass.

    Args:
        emb_dim: size of the last axis.
    Source: "Root Mean Square Layer Normalization" (Zhang and Sennrich, 2019), section 3.
    """

    EPS = 1e-5

    def __init__(self, emb_dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(emb_dim))

    def forward(self, x: Float[Tensor, "*batch emb_dim"]) -> Float[Tensor, "*batch emb_dim"]:
        return F.rms_norm(x, self.weight.shape, self.weight, self.EPS)


def exact_feed_forward(cfg: Mapping) -> FeedForward:
    """GPT-2's layer with x P(Z <= x) = 0.5 x (1 + erf(x / sqrt(2))), Z normal: what GELU's tanh form approximates.

    Why: torch's nn.GELU() is this one, and so are nanoGPT's since May 2023 and Hugging Face's "gelu". The weights have
    the same names and shapes under both; the two forms are never more than 5e-4 apart.

    Args:
        cfg: as FeedForward's.
    Source: "Gaussian Error Linear Units" (Hendrycks and Gimpel, 2016), section 2.
    """
    layer = FeedForward(cfg)
    layer.gelu = nn.GELU()
    return layer


class SwiGLU(nn.Module):
    """down_proj(silu(gate_proj(x)) * up_proj(x)): a feed-forward layer whose units are opened and shut by a gate.

    Why: one projection says what to write, the other how much of it, for each token anew. Three matrices instead of
    two, so ff_dim is 2/3 of GPT-2's for as many parameters. No biases, as in the paper.

    Args:
        cfg: `emb_dim`, and `ff_dim` (None: see `swiglu_width`).
    Source: "GLU Variants Improve Transformer" (Shazeer, 2020), equation 6.
    """

    def __init__(self, cfg: Mapping):
        super().__init__()
        emb_dim = cfg["emb_dim"]
        ff_dim = cfg.get("ff_dim") or swiglu_width(emb_dim)
        self.gate_proj = nn.Linear(emb_dim, ff_dim, bias=False)
        self.up_proj = nn.Linear(emb_dim, ff_dim, bias=False)
        self.down_proj = nn.Linear(ff_dim, emb_dim, bias=False)

    def forward(self, x: Float[Tensor, "*batch emb_dim"]) -> Float[Tensor, "*batch emb_dim"]:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class NoPositionEmbedding(nn.Module):
    """Adds nothing: where the attention turns queries and keys, the embeddings hold no positions."""

    def forward(self, positions: Int[Tensor, "batch_or_1 tokens"]) -> float:
        return 0.0


def swiglu_width(emb_dim: int) -> int:
    """8/3 of emb_dim, up to the next multiple of 8: three such matrices hold what two of 4 * emb_dim do."""
    return -(-8 * emb_dim // 24) * 8


def norm(cfg: Mapping) -> nn.Module:
    """`cfg["norm"]`: "layernorm" (also where the key is missing) or "rmsnorm"."""
    return choose(cfg, "norm", {"layernorm": LayerNorm, "rmsnorm": RMSNorm})(cfg["emb_dim"])


def feed_forward(cfg: Mapping) -> nn.Module:
    """`cfg["mlp"]`: "gelu" (also where the key is missing), "gelu_exact" or "swiglu"."""
    return choose(cfg, "mlp", {"gelu": FeedForward, "gelu_exact": exact_feed_forward, "swiglu": SwiGLU})(cfg)


def position_embedding(cfg: Mapping) -> nn.Module:
    """A learned vector for each position, or, with rotary positions, nothing."""
    if rotary(cfg) is not None:
        return NoPositionEmbedding()
    return nn.Embedding(cfg["context_length"], cfg["emb_dim"])


def rotary(cfg: Mapping) -> RotaryPositions | None:
    """`cfg["positions"]`: what turns queries and keys for "rope"; None for "learned", also where the key is missing."""
    turn = choose(cfg, "positions", {"learned": None, "rope": RotaryPositions})
    emb_dim, n_heads = cfg["emb_dim"], cfg["n_heads"]
    if turn is None or n_heads < 1 or emb_dim % n_heads:  # such heads are refused by the attention they are meant for
        return None
    return turn(emb_dim // n_heads)


def choose(cfg: Mapping, key: str, parts: Mapping[str, Any]) -> Any:
    """The part that `cfg[key]` names; the first, GPT-2's, where the key is missing.

    Raises:
        ValueError: no part has that name (a block used alone reads a cfg that nobody has checked).
    """
    name = cfg.get(key, next(iter(parts)))
    if name not in list(parts):
        raise ValueError(f"{key!r} must be {' or '.join(map(repr, parts))}, got {name!r}.{did_you_mean(name, parts)}")
    return parts[name]
