"""KVCache: the keys and values of the tokens already read, so that each new token costs one row.

Why it may exist at all: under a causal mask an old token never sees a new one, so its keys and values
never change again. Memory is set aside once, for `max_length` tokens.
"""

import torch
from jaxtyping import Float
from torch import Tensor


class LayerCache:
    """Keys and values of one layer: (B, H, max_length, D), of which the first `length` are filled."""

    def __init__(self, batch_size: int, num_kv_heads: int, max_length: int, head_dim: int, dtype=None, device=None):
        shape = (batch_size, num_kv_heads, max_length, head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.length = 0

    def append(
        self,
        keys: Float[Tensor, "batch kv_heads new_len head_dim"],
        values: Float[Tensor, "batch kv_heads new_len head_dim"],
    ) -> tuple[Float[Tensor, "batch kv_heads key_len head_dim"], Float[Tensor, "batch kv_heads key_len head_dim"]]:
        """Store the new keys and values, and return all so far, as views.

        Raises:
            ValueError: more tokens than were set aside.
        """
        end = self.length + keys.shape[2]
        if end > self.keys.shape[2]:
            raise ValueError(
                f"the KV cache holds {self.keys.shape[2]} tokens, {end} are needed: make it with a larger max_length."
            )
        self.keys[:, :, self.length : end] = keys
        self.values[:, :, self.length : end] = values
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def truncate(self, length: int) -> None:
        """Forget all tokens behind the first `length`; their places are written over by what comes next.

        Raises:
            ValueError: a length that is negative, or longer than what is there.
        """
        if not 0 <= length <= self.length:
            raise ValueError(
                f"the KV cache has {self.length} tokens and cannot be cut to {length}: pass a length from 0 to "
                f"{self.length}."
            )
        self.length = length


class KVCache:
    """One `LayerCache` for each layer. `cache.length` tokens have been read.

    Args:
        n_layers, batch_size, num_kv_heads, head_dim: as in the model.
        max_length: tokens to set memory aside for.
        dtype, device: of the keys.
    """

    def __init__(
        self, n_layers: int, batch_size: int, num_kv_heads: int, max_length: int, head_dim: int, **tensor_kind
    ):
        self.layers = [
            LayerCache(batch_size, num_kv_heads, max_length, head_dim, **tensor_kind) for _ in range(n_layers)
        ]

    @property
    def length(self) -> int:
        return self.layers[-1].length

    def truncate(self, length: int) -> None:
        """Forget all tokens behind the first `length`, in every layer. Speculative decoding takes back with it.

        Raises:
            ValueError: a length that is negative, or longer than what is there; then nothing was forgotten.
        """
        for layer in reversed(self.layers):  # the last has the fewest, should a pass have ended in an error half-way
            layer.truncate(length)

    @property
    def nbytes(self) -> int:
        """Memory set aside, in bytes."""
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self.layers)
