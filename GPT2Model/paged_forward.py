"""One forward pass over several sequences at once, whose keys and values lie in the pages of a PagedKVCache.

The same weights and the same blocks as `GPTModel.forward`. Two things differ: the new tokens of all sequences stand in
one row (`PagedMask` tells them apart), and the head, a third of a small GPT-2's work, scores only each last token.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from CMHA.paged_kv_cache import PagedKVCache, PagedMask


@torch.no_grad()
def paged_forward(
    model, ids: Int[Tensor, "tokens"], mask: PagedMask, cache: PagedKVCache
) -> Float[Tensor, "sequences vocab_size"]:
    """Scores for the token after each sequence's last one; the keys and values of `ids` are written on the way.

    Args:
        model: a GPTModel, in eval mode.
        ids: the new tokens, those of the first sequence, then those of the second, and so on.
        mask: which of them are whose, and where their blocks are.
    Raises:
        ValueError: another number of ids than the mask has, or a sequence longer than the model's context.
    """
    longest, limit = max(sequence.mask.key_len for sequence in mask.sequences), model.cfg["context_length"]
    if len(ids) != mask.query_len or longest > limit:
        raise ValueError(
            f"the mask is for {mask.query_len} new tokens in sequences of up to {longest}, got {len(ids)} ids for a "
            f"model of context_length={limit}."
        )
    x = model.token_embedding(ids[None]) + model.position_embedding(mask.positions())  # (1, tokens, C)
    for block, layer in zip(model.blocks, cache.at(mask), strict=True):
        x = block(x, mask=mask, cache=layer)  # a mask of pages: "paged_attention" serves, whatever the model's setting
    return model.head(model.final_norm(x[0, mask.last]))


def make_paged_cache(model, num_blocks: int, block_size: int = 16) -> PagedKVCache:
    """An empty PagedKVCache that fits `model`, in its dtype and on its device."""
    attention, weight = model.blocks[0].attention, model.final_norm.weight  # a norm's: matrices may be 8 bits
    kind = {"dtype": weight.dtype, "device": weight.device}
    return PagedKVCache(len(model.blocks), num_blocks, block_size, attention.num_kv_heads, attention.head_dim, **kind)


class PagedRows:
    """A paged cache for a batch of rows that grow together: what `generate()` uses for "paged_attention".

    Row i owns blocks i * n to (i + 1) * n - 1 from the start: nothing is shared and nothing is won by it but the same
    path through the pages. The engine in `orchestrator/serving/` is where pages pay. Padding is not stored.

    Args:
        model: a GPTModel.
        batch_size, max_length: rows, and tokens of the longest.
    """

    def __init__(self, model, batch_size: int, max_length: int, block_size: int = 16):
        blocks = -(-max_length // block_size)
        self.cache = make_paged_cache(model, batch_size * blocks, block_size)
        self.tables: Sequence[Sequence[int]] = [range(i * blocks, (i + 1) * blocks) for i in range(batch_size)]
        self.lengths = [0] * batch_size  # real tokens of each row that have been read
        self.length = 0  # columns of `ids` that have been read, padding included

    @property
    def nbytes(self) -> int:
        """Memory set aside, in bytes."""
        return self.cache.nbytes

    def next_logits(
        self, model, ids: Int[Tensor, "batch tokens"], padding_mask: Tensor | None
    ) -> Float[Tensor, "batch vocab_size"]:
        """Read what is new in each row of `ids` and score the token after it."""
        new = ids[:, self.length :]
        real = torch.ones_like(new, dtype=torch.bool) if padding_mask is None else padding_mask[:, self.length :]
        counts = real.sum(dim=1).tolist()
        mask = PagedMask(self.tables, self.lengths, counts, self.cache.block_size, ids.device)
        logits = paged_forward(model, new[real], mask, self.cache)  # new[real]: row by row
        self.lengths = [length + count for length, count in zip(self.lengths, counts, strict=True)]
        self.length = ids.shape[1]
        return logits
