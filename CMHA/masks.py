"""AttentionMask: who may attend to whom. Built once per forward pass and shared by every layer.

Legend: True means "may attend", as in torch's scaled_dot_product_attention (masks that mean "hide this"
are the commonest cause of silently wrong attention). Query i stands at position i + offset of the keys,
with offset = key_len - query_len: the *last* query sees the *last* key. That is the lower-right alignment
that a KV cache needs, where a few new queries meet many old keys.
"""

import torch
from jaxtyping import Bool
from torch import Tensor


class AttentionMask:
    """Which keys each query may attend to, as a rule; as a table only if somebody asks for one.

    Why: a T x T table is what flash attention exists to avoid. Each implementation takes what it needs:
    eager the whole table (`dense`), sdpa a flag, flash_tiled one small tile at a time.

    Args:
        query_len, key_len: in tokens.
        causal: a query sees only keys at its own position or before.
        padding_mask: (B, key_len) bool, True = a real token. None: every token is real.
        batch_size: B, to hold the padding mask against; None: not looked at.
        device: where the tables are made.
    Raises:
        TypeError, ValueError: a padding mask that is not a bool tensor of shape (B, key_len).
    """

    def __init__(
        self,
        query_len: int,
        key_len: int,
        *,
        causal: bool = True,
        padding_mask: Tensor | None = None,
        batch_size: int | None = None,
        device=None,
    ):
        if padding_mask is not None:
            check_padding_mask(padding_mask, key_len, batch_size)
        self.query_len, self.key_len, self.causal = query_len, key_len, causal
        self.offset = key_len - query_len
        self.padding_mask = padding_mask
        self.device = padding_mask.device if padding_mask is not None else device
        self._dense: Tensor | None = None

    @property
    def kind(self) -> str:
        """ "causal" or "full", with "+padding" where there is any: what the choosing needs to know."""
        return ("causal" if self.causal else "full") + ("" if self.padding_mask is None else "+padding")

    @property
    def is_plain_causal(self) -> bool:
        """Causal, no padding, as many queries as keys: the case every fused kernel has a flag for."""
        return self.kind == "causal" and self.offset == 0

    @property
    def hides_nothing(self) -> bool:
        """Every query sees every key: no mask needed at all (one new token at the end of a cache, say)."""
        return self.padding_mask is None and (not self.causal or (self.query_len == 1 and self.offset >= 0))

    def dense(self) -> Bool[Tensor, "batch_or_1 1 query_len key_len"]:
        """The whole table, True = may attend. Made at the first call, then shared by all layers."""
        if self._dense is None:
            tile = self.tile(0, self.query_len, 0, self.key_len)
            everything = torch.ones(1, 1, self.query_len, self.key_len, dtype=torch.bool, device=self.device)
            self._dense = everything if tile is None else tile.expand(-1, -1, self.query_len, self.key_len)
        return self._dense

    def tile(
        self, query_start: int, query_end: int, key_start: int, key_end: int
    ) -> Bool[Tensor, "batch_or_1 1 queries_or_1 keys"] | None:
        """The table for one tile of queries and keys, or None where the tile hides nothing."""
        allowed = None
        if self.causal and key_end - 1 > query_start + self.offset:  # else the tile lies below the diagonal
            query_positions = torch.arange(query_start, query_end, device=self.device) + self.offset
            key_positions = torch.arange(key_start, key_end, device=self.device)
            allowed = (key_positions[None, :] <= query_positions[:, None])[None, None]
        if self.padding_mask is not None:
            real = self.padding_mask[:, None, None, key_start:key_end]
            allowed = real if allowed is None else allowed & real
        return allowed

    def visible_keys(self, query_end: int) -> int:
        """How many leading keys the queries before `query_end` can see at all: where a loop may stop."""
        return max(0, min(self.key_len, query_end + self.offset)) if self.causal else self.key_len


def check_padding_mask(padding_mask: Tensor, key_len: int, batch_size: int | None = None) -> None:
    """Raise unless `padding_mask` is (B, key_len) bool, so that a wrong one never reaches the formula."""
    if padding_mask.dtype != torch.bool:
        raise TypeError(
            f"padding_mask must be torch.bool with True = a real token, got {padding_mask.dtype}. "
            "Do: padding_mask.bool() if 1 marks the real tokens."
        )
    if padding_mask.ndim != 2 or padding_mask.shape[1] != key_len or batch_size not in (None, padding_mask.shape[0]):
        expected = f"({batch_size or 'B'}, {key_len})"
        raise ValueError(
            f"padding_mask must have shape {expected}, one value for each key position (with a KV cache, for the "
            f"cached tokens too), got {tuple(padding_mask.shape)}."
        )
