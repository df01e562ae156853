"""Flash attention in plain PyTorch, made to be stepped through: tiles, the online softmax, its own backward.

FlashAttention-2 (Dao, 2023), algorithms 1 and 2. The T x T table of eager.py never exists: a tile of queries
meets one tile of keys after another, and three running quantities for each query row carry what matters:

    running_max   m   the largest score seen so far
    running_sum   l   sum of exp(score - m) so far
    accumulated   O   sum of exp(score - m) * value so far

When a new tile raises the maximum, the old sum and accumulation are multiplied by exp(old m - new m): that is
the whole trick. Saved for backward: the output and one number for each row, log_sum_exp = m + log l, from which
each tile's weights come back as exp(score - log_sum_exp). Memory grows with T, not with T squared.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from CMHA.dropout import draw_seed, keep_mask
from CMHA.request import AttentionRequest, Reason
from CMHA.tap import tap

SUMMARY = "flash attention in plain PyTorch: tiles, the online softmax, its own backward"
ALIASES = ()
OPTIONS = ("query_block_size", "kv_block_size")
BLOCK_SIZE = 128  # queries and keys in a tile, unless asked otherwise; docs/decisions.md has the timings


def check(request: AttentionRequest) -> list[Reason]:
    """Why the tiled form cannot serve the request; empty when it can."""
    if request.needs_weights:
        return [Reason("weights_wanted", "it never holds all the attention weights at once", "ask eager for them")]
    return []


def attention(
    queries: Float[Tensor, "batch heads query_len head_dim"],
    keys: Float[Tensor, "batch kv_heads key_len head_dim"],
    values: Float[Tensor, "batch kv_heads key_len head_dim"],
    mask,
    *,
    scale: float,
    dropout: float = 0.0,
    query_block_size: int | None = None,
    kv_block_size: int | None = None,
) -> tuple[Float[Tensor, "batch heads query_len head_dim"], None]:
    """Attention tile by tile. The contract of the registry; the weights are None.

    Args:
        query_block_size, kv_block_size: queries and keys in a tile. They change the order of summation, hence
            the last digits, and nothing else.
    """
    # Grouped heads: (B, H, T, D) -> (B, kv_heads, group, T, D), and the keys broadcast over the group.
    batch, heads, query_len, head_dim = queries.shape
    grouped = queries.reshape(batch, keys.shape[1], heads // keys.shape[1], query_len, head_dim)
    seed = draw_seed() if dropout > 0 else 0
    grouped, keys, values = cast_by_autocast(grouped, keys, values)
    blocks = (query_block_size or BLOCK_SIZE, kv_block_size or BLOCK_SIZE)
    with torch.autocast(queries.device.type, enabled=False):  # the tiles are summed in fp32, whatever surrounds them
        context = TiledAttention.apply(
            grouped, keys.unsqueeze(2), values.unsqueeze(2), mask, scale, dropout, seed, blocks
        )
    return context.reshape(batch, heads, query_len, head_dim), None


class TiledAttention(torch.autograd.Function):
    """Queries (B, kv_heads, group, query_len, D); keys and values (B, kv_heads, 1, key_len, D)."""

    @staticmethod
    def forward(ctx, queries, keys, values, mask, scale, dropout, seed, blocks):
        precision = torch.promote_types(queries.dtype, torch.float32)  # bf16 and fp16 are summed in fp32
        context = torch.zeros_like(queries)
        log_sum_exp = queries.new_empty(queries.shape[:-1], dtype=precision)

        for rows in spans(0, queries.shape[-2], blocks[0]):
            q = queries[..., rows, :].to(precision)
            running_max = q.new_full((*q.shape[:-1], 1), -math.inf)
            running_sum = torch.zeros_like(running_max)
            accumulated = torch.zeros_like(q)

            for columns in spans(*mask.visible_keys(rows.start, rows.stop), blocks[1]):
                k, v = keys[..., columns, :].to(precision), values[..., columns, :].to(precision)
                scores = tap("scores", masked_scores(q, k, mask, rows, columns, scale), rows=rows, columns=columns)

                new_max = torch.maximum(running_max, scores.amax(dim=-1, keepdim=True))
                # A row that has seen nothing yet has m = -inf, and (-inf) - (-inf) would be NaN: shift by 0 there.
                shift = new_max.masked_fill(new_max == -math.inf, 0.0)
                weights = torch.exp(scores - shift)
                correction = torch.exp(running_max - shift)

                running_sum = running_sum * correction + weights.sum(dim=-1, keepdim=True)  # before dropout
                weights = drop(weights, queries, keys, rows, columns, dropout, seed)
                accumulated = accumulated * correction + weights @ v
                running_max = tap("running_max", new_max, rows=rows, columns=columns)
                running_sum = tap("running_sum", running_sum, rows=rows, columns=columns)
                accumulated = tap("accumulated", accumulated, rows=rows, columns=columns)

            nothing_seen = running_sum == 0  # such a row gives exactly 0, and +inf makes its weights 0 in backward
            context[..., rows, :] = (accumulated / running_sum.masked_fill(nothing_seen, 1.0)).to(context.dtype)
            row_lse = (running_max + torch.log(running_sum)).masked_fill(nothing_seen, math.inf)
            log_sum_exp[..., rows] = row_lse.squeeze(-1)

        log_sum_exp = tap("log_sum_exp", log_sum_exp)
        ctx.save_for_backward(queries, keys, values, context, log_sum_exp)
        ctx.call = (mask, scale, dropout, seed, blocks)
        return context

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_context):
        queries, keys, values, context, log_sum_exp = ctx.saved_tensors
        mask, scale, dropout, seed, blocks = ctx.call
        precision = log_sum_exp.dtype
        grad_queries = torch.zeros_like(queries, dtype=precision)
        grad_keys = torch.zeros_like(keys, dtype=precision)
        grad_values = torch.zeros_like(values, dtype=precision)

        for rows in spans(0, queries.shape[-2], blocks[0]):
            q, grad_o = queries[..., rows, :].to(precision), grad_context[..., rows, :].to(precision)
            # delta: what softmax's gradient subtracts from each row, sum_j weight_j * grad_weight_j = O . grad O.
            # A matrix product, as grad_o @ v.mT is below: rounded alike, the two cancel where there is one key.
            delta = (grad_o.unsqueeze(-2) @ context[..., rows, :].to(precision).unsqueeze(-1)).squeeze(-1)

            for columns in spans(*mask.visible_keys(rows.start, rows.stop), blocks[1]):
                k, v = keys[..., columns, :].to(precision), values[..., columns, :].to(precision)
                scores = masked_scores(q, k, mask, rows, columns, scale)
                weights = torch.exp(scores - log_sum_exp[..., rows, None])  # the tile's softmax, recomputed

                dropped = drop(weights, queries, keys, rows, columns, dropout, seed)
                grad_weights = drop(grad_o @ v.mT, queries, keys, rows, columns, dropout, seed)
                grad_scores = weights * (grad_weights - delta) * scale

                # keys and values serve the whole group of query heads: sum over it (dim 2)
                grad_values[..., columns, :] += (dropped.mT @ grad_o).sum(dim=2, keepdim=True)
                grad_keys[..., columns, :] += (grad_scores.mT @ q).sum(dim=2, keepdim=True)
                grad_queries[..., rows, :] += grad_scores @ k

        grads = (grad_queries.to(queries.dtype), grad_keys.to(keys.dtype), grad_values.to(values.dtype))
        return *grads, None, None, None, None, None


def cast_by_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """As torch's own op: inputs in the dtype of autocast, where it is on."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    return tuple(tensor.to(torch.get_autocast_dtype(device)) for tensor in tensors)


def spans(start: int, end: int, block: int) -> list[slice]:
    """start..end cut into slices of at most `block`."""
    return [slice(at, min(at + block, end)) for at in range(start, end, block)]


def masked_scores(q, k, mask, rows: slice, columns: slice, scale: float) -> Tensor:
    """One tile of Q K^T * scale, with -inf where the mask hides the key."""
    scores = q @ k.mT * scale
    allowed = mask.tile(rows.start, rows.stop, columns.start, columns.stop)
    return scores if allowed is None else scores.masked_fill(~allowed.unsqueeze(2), -math.inf)


def drop(tile, queries, keys, rows: slice, columns: slice, dropout: float, seed: int) -> Tensor:
    """Dropout on one tile, drawn from the absolute position of each weight: forward and backward agree."""
    if dropout == 0.0:
        return tile
    whole_table = (*queries.shape[:3], queries.shape[-2], keys.shape[-2])
    keep = keep_mask(seed, whole_table, rows, columns, dropout, tile.device)
    return tile * keep / (1.0 - dropout) if dropout < 1.0 else torch.zeros_like(tile)
