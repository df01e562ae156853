"""Rotary positions: queries and keys are turned by an angle that grows with their position.

GPT-2 adds a learned vector for each position to the embeddings. Here nothing is added: pair j of a head's D numbers,
(x_j, x_{j + D/2}), is turned as a point of the plane by the angle position * base^(-2j / D). A score is a dot product,
and turning both sides leaves it depending on the *difference* of their angles: on how far apart two tokens stand, not
on where. Values are not turned. No weights; a cache holds keys that are turned already.

The pairs are the two halves of a head (as in Hugging Face's Llama), not neighbours (as in the paper): the same model
with its weights' rows in another order.
Source: "RoFormer: Enhanced Transformer with Rotary Position Embedding" (Su et al., 2021), section 3.4.2.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from CMHA.masks import AttentionMask


class RotaryPositions:
    """A callable that `MultiHeadAttention` hands its new queries and keys to, before they meet.

    Why a callable and no module: it has no weights, and where a token stands is a matter of the mask, which knows the
    padding, the packed texts and the cache. One table of angles serves all layers.

    Args:
        head_dim: width D of one head, even.
        base: pairs turn by 1 radian a token for the fastest down to base^(2/D - 1) for the slowest. 10,000 as in the
            paper and in Llama.
    Raises:
        ValueError: an odd head_dim, or a base that is not above 0.
    """

    def __init__(self, head_dim: int, base: float = 10_000.0):
        if head_dim < 2 or head_dim % 2:
            raise ValueError(f"rotary positions turn pairs of numbers: head_dim must be even, got {head_dim}.")
        if not 0 < base < float("inf"):
            raise ValueError(f"the base of rotary positions must be a number above 0, usually 10,000, got {base}.")
        self.head_dim, self.base = head_dim, base

    def __call__(
        self,
        queries: Float[Tensor, "batch heads tokens head_dim"],
        keys: Float[Tensor, "batch kv_heads tokens head_dim"],
        mask: AttentionMask,
    ) -> tuple[Float[Tensor, "batch heads tokens head_dim"], Float[Tensor, "batch kv_heads tokens head_dim"]]:
        """Both turned by the positions of `mask`'s queries, in float32 at least; the dtype stays.

        Raises:
            ValueError: heads of another width, or another number of tokens than the mask has queries.
        """
        if queries.shape[2:] != (mask.query_len, self.head_dim):  # a width of 1 or 2 would broadcast in silence
            raise ValueError(
                f"these rotary positions are for {mask.query_len} tokens and heads {self.head_dim} wide, "
                f"got queries {tuple(queries.shape)}."
            )
        precision = torch.promote_types(queries.dtype, torch.float32)
        name = f"rotary:{self.head_dim}:{self.base}:{precision}:{queries.device}"
        cos, sin = mask.once(name, lambda: [part.to(queries.device) for part in self.table(mask, precision)])
        return turn(queries, cos, sin), turn(keys, cos, sin)

    def table(self, mask: AttentionMask, precision: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosine and sine of each token's angles, position * base^(-2j / D) radians for pair j: (B or 1, 1, T, D/2)."""
        positions = mask.positions()
        # At position 100,000 a float32 angle would be off by 0.004 radians; MPS has nothing wider.
        exact = torch.float32 if positions.device.type == "mps" else torch.float64
        pairs = torch.arange(0, self.head_dim, 2, device=positions.device, dtype=exact)
        angles = positions[:, None, :, None].to(exact) * self.base ** (-pairs / self.head_dim)
        return angles.cos().to(precision), angles.sin().to(precision)


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Each pair (x_j, x_{j + D/2}) turned by its angle."""
    first, second = x.to(cos.dtype).chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1).to(x.dtype)
