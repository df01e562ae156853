"""Attention of one new token over the pages of its sequence, as GPU kernels. Read flash_triton_kernels.py first.

A sequence that writes has one query a head and a long row of keys, so the tiles of queries that keep a GPU busy in
forward are not there. Two things take their place, known as flash-decoding:

    the group      a program owns all query heads that share a key head, and reads its keys once for all of them
    the splits     the keys are cut into stretches of SPLIT; a program takes one and leaves behind its running maximum,
                   its running sum and its unnormalised result, and `combine` puts a row's stretches together

What is paged about it is two lines: key number n of a sequence lies in block tables[n // BLOCK_SIZE], at place
n % BLOCK_SIZE. Keys behind the sequence's end are never loaded, so whatever was left there cannot be seen.

Stretches are of one length whatever else is in the batch: a sequence gets the same bits alone and among others.
Scores are in units of log 2. Offsets are in int64, since a pool passes 2**31 numbers. Sources: Kwon et al., 2023,
section 4.1; "Flash-Decoding for long-context inference" (Dao, Haziza, Massa and Sizov, 2023).
"""

import triton
import triton.language as tl

INFINITY = tl.constexpr(float("inf"))


@triton.jit
def decode(
    queries, keys, values, rows, lengths, tables, context, partial, maxima, sums,
    q_head, q_token, k_block, k_head, k_token, v_block, v_head, v_token, o_head, o_token,
    heads, splits, most_blocks, scale,
    GROUP: tl.constexpr, GROUP_TILE: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, SPLIT: tl.constexpr, BLOCK_K: tl.constexpr, ONE_SPLIT: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    sequence, kv_head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    split = tl.program_id(2)
    length = tl.load(lengths + sequence)
    start = split * SPLIT
    if start >= length:  # another sequence is longer
        return
    end = tl.minimum(length, start + SPLIT)

    member = tl.arange(0, GROUP_TILE)  # of the query heads that share the key head
    head = kv_head * GROUP + member
    column = tl.arange(0, WIDTH)
    is_number = (member < GROUP)[:, None] & (column < HEAD_DIM)[None, :]
    row = tl.load(rows + sequence)
    q = tl.load(
        queries + row * q_token + head[:, None] * q_head + column[None, :], mask=is_number, other=0.0
    )  # fmt: skip
    if WIDEN:
        q = q.to(tl.float32)

    running_max = tl.full([GROUP_TILE], -INFINITY, tl.float32)
    running_sum = tl.zeros([GROUP_TILE], tl.float32)
    accumulated = tl.zeros([GROUP_TILE, WIDTH], tl.float32)
    for first in range(start, end, BLOCK_K):  # every tile has a key, so that no maximum stays -inf
        number = first + tl.arange(0, BLOCK_K)
        exists = number < end
        block = tl.load(tables + sequence * most_blocks + number // BLOCK_SIZE, mask=exists, other=0).to(tl.int64)
        place = (number % BLOCK_SIZE).to(tl.int64)
        k = load_keys(keys + kv_head * k_head, block * k_block + place * k_token, exists, q, HEAD_DIM, WIDTH)
        v = load_keys(values + kv_head * v_head, block * v_block + place * v_token, exists, q, HEAD_DIM, WIDTH)

        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        scores = tl.where(exists[None, :], scores, -INFINITY)
        new_max = tl.maximum(running_max, tl.max(scores, 1))
        weights = tl.exp2(scores - new_max[:, None])
        correction = tl.exp2(running_max - new_max)
        running_sum = running_sum * correction + tl.sum(weights, 1)
        accumulated = accumulated * correction[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        running_max = new_max

    if ONE_SPLIT:
        result = (accumulated / running_sum[:, None]).to(context.dtype.element_ty)
        tl.store(context + row * o_token + head[:, None] * o_head + column[None, :], result, mask=is_number)
    else:
        at = (sequence * heads + head) * splits + split
        tl.store(partial + at[:, None] * HEAD_DIM + column[None, :], accumulated, mask=is_number)
        tl.store(maxima + at, running_max, mask=member < GROUP)
        tl.store(sums + at, running_sum, mask=member < GROUP)


@triton.jit
def combine(
    rows, lengths, partial, maxima, sums, context, o_head, o_token, heads, splits,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """One row of the context from its stretches, by the same rescaling as from tile to tile."""
    sequence, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    column = tl.arange(0, WIDTH)
    table = (sequence * heads + head) * splits
    running_max = tl.load(maxima + table)
    running_sum = tl.load(sums + table)
    accumulated = tl.load(partial + table * HEAD_DIM + column, mask=column < HEAD_DIM, other=0.0)
    for split in range(1, tl.cdiv(tl.load(lengths + sequence), SPLIT)):
        at = table + split
        its_max = tl.load(maxima + at)
        new_max = tl.maximum(running_max, its_max)
        correction, weight = tl.exp2(running_max - new_max), tl.exp2(its_max - new_max)
        its_result = tl.load(partial + at * HEAD_DIM + column, mask=column < HEAD_DIM, other=0.0)
        accumulated = accumulated * correction + its_result * weight
        running_sum = running_sum * correction + tl.load(sums + at) * weight
        running_max = new_max
    result = (accumulated / running_sum).to(context.dtype.element_ty)
    tl.store(context + tl.load(rows + sequence) * o_token + head * o_head + column, result, mask=column < HEAD_DIM)


@triton.jit
def load_keys(pool, places, exists, q, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr):
    """(keys, WIDTH) out of the pool, in the dtype of the queries; 0 for a key or a column that is not there."""
    column = tl.arange(0, WIDTH)
    tile = tl.load(
        pool + places[:, None] + column[None, :], mask=exists[:, None] & (column < HEAD_DIM)[None, :], other=0.0
    )  # fmt: skip
    return tile.to(q.dtype)
