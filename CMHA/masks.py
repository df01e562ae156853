"""AttentionMask: who may attend to whom. Built once per forward pass and shared by every layer.

Legend: True means "may attend", as in torch's scaled_dot_product_attention (masks that mean "hide this"
are the commonest cause of silently wrong attention). Query i stands at position i + offset of the keys,
with offset = key_len - query_len: the *last* query sees the *last* key. That is the lower-right alignment
that a KV cache needs, where a few new queries meet many old keys.

Four rules, each on or off, and a key must pass all that are on:

    causal      it stands at the query's position or before
    padding     it is a real token                                         (texts of unequal length in one batch)
    documents   it belongs to the query's document                         (several texts packed into one sequence)
    window      it stands fewer than `window` positions away               (Longformer, Mistral)
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor


class AttentionMask:
    """Which keys each query may attend to, as a rule; as a table only if somebody asks for one.

    Why: a T x T table is what flash attention exists to avoid. Each implementation takes what it needs:
    eager the whole table (`dense`), sdpa a flag, flash_tiled one small tile at a time.

    Args:
        query_len, key_len: in tokens.
        causal: a query sees only keys at its own position or before.
        padding_mask: (B, key_len) bool, True = a real token. None: every token is real.
        documents: (B, key_len) int, the number of each key's document, never falling along a row. None: one document.
        window: a query sees only keys fewer than this many positions away, itself included: with causal, the last
            `window` keys. None: any distance.
        batch_size: B, to hold padding_mask and documents against; None: not looked at.
        device: where the tables are made.
    Raises:
        TypeError, ValueError: padding_mask or documents of a wrong dtype or shape, or a window below 1.
    """

    paged = False  # a PagedMask's keys lie in the pages of a paged cache

    def __init__(
        self,
        query_len: int,
        key_len: int,
        *,
        causal: bool = True,
        padding_mask: Tensor | None = None,
        documents: Tensor | None = None,
        window: int | None = None,
        batch_size: int | None = None,
        device=None,
    ):
        if padding_mask is not None:
            check_padding_mask(padding_mask, key_len, batch_size)
            batch_size = padding_mask.shape[0]
        if documents is not None:
            check_documents(documents, query_len, key_len, batch_size)
        if min(query_len, key_len) < 0:
            raise ValueError(f"query_len and key_len are numbers of tokens, got {query_len} and {key_len}.")
        if window is not None and (not isinstance(window, int) or window < 1):
            raise ValueError(
                f"window must be 1 (a token sees itself) or a larger whole number, or None: any distance; got {window}."
            )
        self.query_len, self.key_len, self.causal = query_len, key_len, causal
        self.offset = key_len - query_len
        self.padding_mask, self.documents = padding_mask, documents
        rows = [len(tensor) for tensor in (padding_mask, documents) if tensor is not None]
        self.batch_size = rows[0] if rows else None  # None: the same for every sequence
        # A window as wide as the sequence hides nothing: then it is none.
        self.window = window if window is not None and window < max(query_len, key_len) else None
        given = [tensor.device for tensor in (padding_mask, documents) if tensor is not None]
        self.device = given[0] if given else device
        self._derived: dict[str, Any] = {}

    @property
    def kind(self) -> str:
        """ "causal" or "full", with "+padding", "+documents", "+window" where there are any: what choosing looks at."""
        rules = {"padding": self.padding_mask, "documents": self.documents, "window": self.window}
        given = [name for name, rule in rules.items() if rule is not None]
        return "+".join(["causal" if self.causal else "full", *given])

    @property
    def is_plain_causal(self) -> bool:
        """Causal and nothing else, as many queries as keys: the case every fused kernel has a flag for."""
        return self.kind == "causal" and self.offset == 0

    @property
    def hides_nothing(self) -> bool:
        """Every query sees every key: no mask needed at all (one new token at the end of a cache, say)."""
        return self.kind == "full" or (self.kind == "causal" and self.query_len == 1 and self.offset >= 0)

    def dense(self) -> Bool[Tensor, "batch_or_1 1 query_len key_len"]:
        """The whole table, True = may attend. Made at the first call, then shared by all layers."""

        def make() -> Tensor:
            tile = self.tile(0, self.query_len, 0, self.key_len)
            everything = torch.ones(1, 1, self.query_len, self.key_len, dtype=torch.bool, device=self.device)
            return everything if tile is None else tile.expand(-1, -1, self.query_len, self.key_len)

        return self.once("dense", make)

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """What `make()` gave when it was first asked for under this name: made by one layer, shared by the others.

        For what an implementation derives from the mask: the table, flex's BlockMask, the offsets of packed sequences.
        """
        if name not in self._derived:
            self._derived[name] = make()
        return self._derived[name]

    def positions(self) -> Int[Tensor, "batch_or_1 query_len"]:
        """Each query's place in its own text, counted over real tokens: padding and earlier documents shift nothing.

        With a cache (more keys than queries) they go on where it ends.

        Raises:
            ValueError: more queries than keys, so that the first of them stand nowhere.
        """
        if self.query_len > self.key_len:
            raise ValueError(
                f"{self.query_len} queries have no positions among {self.key_len} keys: the first stand before them."
            )
        before = torch.arange(self.key_len, device=self.device)[None]  # tokens before each token
        if self.padding_mask is not None:
            before = self.padding_mask.cumsum(dim=-1) - self.padding_mask.long()  # real ones
        if self.documents is not None:  # less those before its text, whose number stands there first
            documents = self.documents.contiguous()  # a slice of a longer tensor would make torch warn
            start = torch.searchsorted(documents, documents)
            before = before - before.expand_as(start).gather(1, start)
        return before[:, self.key_len - self.query_len :]

    def tile(
        self, query_start: int, query_end: int, key_start: int, key_end: int
    ) -> Bool[Tensor, "batch_or_1 1 queries_or_1 keys"] | None:
        """The table for one tile of queries and keys, or None where the tile hides nothing."""
        first, last = query_start + self.offset, query_end - 1 + self.offset  # positions of the tile's queries
        queries = torch.arange(first, last + 1, device=self.device)[:, None]
        keys = torch.arange(key_start, key_end, device=self.device)[None, :]
        rules = []
        if self.causal and key_end - 1 > first:  # else the tile lies below the diagonal
            rules.append((keys <= queries)[None, None])
        if self.window is not None and last - key_start >= self.window:
            rules.append((queries - keys < self.window)[None, None])
        if self.window is not None and not self.causal and key_end - 1 - first >= self.window:
            rules.append((keys - queries < self.window)[None, None])
        if self.padding_mask is not None:
            rules.append(self.padding_mask[:, None, None, key_start:key_end])
        if self.documents is not None:
            of_queries, of_keys = self.documents[:, first : last + 1], self.documents[:, key_start:key_end]
            rules.append((of_queries[:, :, None] == of_keys[:, None, :])[:, None])
        allowed = None
        for rule in rules:
            allowed = rule if allowed is None else allowed & rule
        return allowed

    def visible_keys(self, query_start: int, query_end: int) -> tuple[int, int]:
        """(first, end): keys outside are seen by none of these queries, so a loop over tiles may leave them out."""
        first, last = query_start + self.offset, query_end - 1 + self.offset
        start = 0 if self.window is None else max(0, first - self.window + 1)
        end = self.key_len
        if self.causal:
            end = last + 1
        elif self.window is not None:
            end = last + self.window
        end = max(0, min(self.key_len, end))
        return min(start, end), end

    def rules(self) -> dict[str, "AttentionMask"]:
        """Each rule that is on, as a mask by itself: a key is seen where all of them show it."""
        alone = {
            "padding": {"padding_mask": self.padding_mask},
            "causal": {"causal": True} if self.causal else {},
            "documents": {"documents": self.documents},
            "window": {"window": self.window},
        }
        given = {name: rule for name, rule in alone.items() if any(value is not None for value in rule.values())}
        lengths = (self.query_len, self.key_len)
        return {
            name: AttentionMask(*lengths, **{"causal": False, "device": self.device} | rule)
            for name, rule in given.items()
        }

    def show(self, sequence: int = 0, words=None):
        """Print one sequence's table and return a matplotlib figure of it: see `CMHA/mask_pictures.py`."""
        from CMHA.mask_pictures import figure, text  # drawing needs matplotlib; attending does not

        print(text(self, sequence))
        return figure(self, sequence, words)


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


def check_documents(documents: Tensor, query_len: int, key_len: int, batch_size: int | None = None) -> None:
    """Raise unless `documents` is (B, key_len) integers that never fall along a row, with one for every query."""
    if documents.is_floating_point() or documents.dtype == torch.bool:
        raise TypeError(f"documents must be integers, the number of each token's document, got {documents.dtype}.")
    if documents.ndim != 2 or documents.shape[1] != key_len or batch_size not in (None, documents.shape[0]):
        expected = f"({batch_size or 'B'}, {key_len})"
        raise ValueError(
            f"documents must have shape {expected}, one number for each key position, got {tuple(documents.shape)}."
        )
    if query_len > key_len:
        raise ValueError(
            f"{query_len} queries and {key_len} keys: with documents every query must stand at the position of a key."
        )
    # A look at the values would make a GPU wait for all work so far, and torch.compile break its graph.
    if documents.device.type == "cpu" and not torch.compiler.is_compiling() and bool((documents.diff(dim=1) < 0).any()):
        raise ValueError(
            "documents must not fall along a row: packed texts stand one after the other, numbered 0, 0, 1, 1, 1, 2."
        )
