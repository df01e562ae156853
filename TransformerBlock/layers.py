"""The small layers of a block: LayerNorm, GELU, FeedForward.

The formulas are in the docstrings and, written out, in `notebooks/llm.ipynb`; the code calls torch's fused kernels
for the first two, since written out they read and write the activations several times over.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


class LayerNorm(nn.Module):
    """(x - mean) / sqrt(variance + 1e-5) * weight + bias, over the last axis.

    Why: it keeps each token's vector at one scale, whatever the layers before added to it. The variance is the
    biased one (divided by n, not n - 1), as GPT-2's is.

    Args:
        emb_dim: size of the last axis.
    Source: "Layer Normalization" (Ba et al., 2016).
    """

    EPS = 1e-5

    def __init__(self, emb_dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(emb_dim))
        self.bias = nn.Parameter(torch.zeros(emb_dim))

    def forward(self, x: Float[Tensor, "*batch emb_dim"]) -> Float[Tensor, "*batch emb_dim"]:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.EPS)


class GELU(nn.Module):
    """0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))): the tanh form, which is the one GPT-2 was trained with.

    Why it matters: with the exact form (through erf) the text stays fluent and the logits are wrong. Weights that were
    trained with that one need it: `exact_feed_forward` in `TransformerBlock/variants.py`.
    Source: "Gaussian Error Linear Units" (Hendrycks and Gimpel, 2016), section 2.
    """

    def forward(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        return F.gelu(x, approximate="tanh")


class FeedForward(nn.Module):
    """Two linear layers with a GELU between: each token by itself, widened to ff_dim and back.

    Args:
        cfg: `emb_dim`, and `ff_dim` (None: 4 * emb_dim).
    """

    def __init__(self, cfg: Mapping):
        super().__init__()
        ff_dim = cfg.get("ff_dim") or 4 * cfg["emb_dim"]
        self.up_proj = nn.Linear(cfg["emb_dim"], ff_dim)
        self.gelu = GELU()
        self.down_proj = nn.Linear(ff_dim, cfg["emb_dim"])

    def forward(self, x: Float[Tensor, "*batch emb_dim"]) -> Float[Tensor, "*batch emb_dim"]:
        return self.down_proj(self.gelu(self.up_proj(x)))
