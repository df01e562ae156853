"""Flash attention as GPU kernels, to be read beside flash_tiled.py: the same names, the same order, one tile a program.

flash_tiled.py walks over the tiles in two loops. Here the outer loop is gone: the GPU starts one program for each tile
(`tl.program_id`), all at once, and each walks the inner loop alone. What that changes:

    forward          a program owns a tile of queries and meets the keys; nothing is shared with another program
    backward_delta   delta = O . grad O of each row, once, since two kernels need it
    backward_dkdv    a program owns a tile of keys and meets the queries, of all the heads that share its keys: so each
                     sum has one owner, no two programs add to one number, and every run gives the same bits
    backward_dq      a program owns a tile of queries again

and what a GPU asks for: tiles are powers of two, so the last tile of a ragged length and the last columns of a head_dim
such as 80 are masked on every load and store; exp2 instead of exp, which the hardware has, with log2(e) folded into the
scale, so scores and log_sum_exp are in units of log 2; offsets in int64, since B * H * T * D passes 2**31.

Who may see whom comes as numbers: CAUSAL, `window` (0: none) and `texts`, where each token's document starts, and -1
for a padded key. LENGTH is not read: it is there so that tiles are tuned for each. Sources: FlashAttention-2 (Dao,
2023), algorithms 1 and 2; CMHA/dropout.py for the dropout.
"""

import triton
import triton.language as tl

INFINITY = tl.constexpr(float("inf"))
GOLDEN, FIRST = tl.constexpr(0x9E3779B97F4A7C15), tl.constexpr(0xBF58476D1CE4E5B9)  # of CMHA/dropout.py
SECOND = tl.constexpr(0x94D049BB133111EB)


@triton.jit
def forward(
    queries, keys, values, query_texts, key_texts, seed, context, log_sum_exp,
    q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token, o_batch, o_head, o_token,
    heads, group, query_len, key_len, window, scale, threshold, keep_scale,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, TEXTS: tl.constexpr,
    DROPOUT: tl.constexpr, WIDEN: tl.constexpr, LENGTH: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tile, table = tile_of_program(tl.cdiv(query_len, BLOCK_Q), LAST_FIRST=CAUSAL)
    batch, head = (table // heads).to(tl.int64), (table % heads).to(tl.int64)
    kv_head = head // group  # grouped heads: several query heads share it
    first = tile * BLOCK_Q
    rows = first + tl.arange(0, BLOCK_Q)
    queries += batch * q_batch + head * q_head
    keys += batch * k_batch + kv_head * k_head
    values += batch * v_batch + kv_head * v_head

    q = load(queries, rows, q_token, query_len, HEAD_DIM, WIDTH, WIDEN, True)
    text_of_q = load_texts(query_texts, batch, rows, query_len, TEXTS)
    running_max = tl.full([BLOCK_Q], -INFINITY, tl.float32)
    running_sum = tl.zeros([BLOCK_Q], tl.float32)
    accumulated = tl.zeros([BLOCK_Q, WIDTH], tl.float32)

    start, whole, end = visible_keys(first, BLOCK_Q, BLOCK_K, query_len, key_len, window, CAUSAL, WINDOW, TEXTS)
    for EDGE in tl.static_range(2):  # first the tiles that the mask leaves whole, then those that it cuts
        for column in range(whole if EDGE else start, end if EDGE else whole, BLOCK_K):
            columns = column + tl.arange(0, BLOCK_K)
            k = load(keys, columns, k_token, key_len, HEAD_DIM, WIDTH, WIDEN, EDGE)
            v = load(values, columns, v_token, key_len, HEAD_DIM, WIDTH, WIDEN, EDGE)
            scores = product(q, tl.trans(k)) * scale
            if EDGE:
                text_of_k = load_texts(key_texts, batch, columns, key_len, TEXTS)
                scores = masked(
                    scores, rows, columns, text_of_q, text_of_k, query_len, key_len, window, CAUSAL, WINDOW, TEXTS
                )

            new_max = tl.maximum(running_max, tl.max(scores, 1))
            # A row that has seen nothing yet has m = -inf, and (-inf) - (-inf) would be NaN: shift by 0 there.
            shift = tl.where(new_max == -INFINITY, 0.0, new_max)
            weights = tl.exp2(scores - shift[:, None])
            correction = tl.exp2(running_max - shift)

            running_sum = running_sum * correction + tl.sum(weights, 1)  # before dropout
            keep = keep_mask(seed, table, query_len, key_len, rows, columns, threshold, DROPOUT)
            weights = drop(weights, keep, keep_scale, DROPOUT)
            accumulated = accumulated * correction[:, None] + product(weights.to(v.dtype), v)
            running_max = new_max

    nothing_seen = running_sum == 0  # such a row gives exactly 0, and +inf makes its weights 0 in backward
    result = accumulated / tl.where(nothing_seen, 1.0, running_sum)[:, None]
    row_lse = tl.where(nothing_seen, INFINITY, running_max + tl.log2(tl.where(nothing_seen, 1.0, running_sum)))
    store(context + batch * o_batch + head * o_head, result, rows, o_token, query_len, HEAD_DIM, WIDTH)
    tl.store(log_sum_exp + table.to(tl.int64) * query_len + rows, row_lse, mask=rows < query_len)


@triton.jit
def backward_delta(
    context, grad_context, delta,
    o_batch, o_head, o_token, do_batch, do_head, do_token, heads, query_len,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, WIDEN: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """delta: what softmax's gradient subtracts from each row, sum_j weight_j * grad_weight_j = O . grad O.

    The diagonal of a matrix product, as grad_o @ v.T is one: rounded alike, the two cancel where there is one key.
    """
    tile, table = tile_of_program(tl.cdiv(query_len, BLOCK_Q), LAST_FIRST=False)
    batch, head = (table // heads).to(tl.int64), (table % heads).to(tl.int64)
    rows = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
    o = load(context + batch * o_batch + head * o_head, rows, o_token, query_len, HEAD_DIM, WIDTH, WIDEN, True)
    grad_of_head = grad_context + batch * do_batch + head * do_head
    grad_o = load(grad_of_head, rows, do_token, query_len, HEAD_DIM, WIDTH, WIDEN, True)
    diagonal = rows[:, None] == rows[None, :]
    row_delta = tl.sum(tl.where(diagonal, product(grad_o, tl.trans(o)), 0.0), 1)
    tl.store(delta + table.to(tl.int64) * query_len + rows, row_delta, mask=rows < query_len)


@triton.jit
def backward_dkdv(
    queries, keys, values, query_texts, key_texts, seed, grad_context, log_sum_exp, delta, grad_keys, grad_values,
    q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token, do_batch, do_head, do_token,
    dk_batch, dk_head, dk_token, dv_batch, dv_head, dv_token,
    heads, group, query_len, key_len, window, scale, grad_scale, threshold, keep_scale,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, TEXTS: tl.constexpr,
    DROPOUT: tl.constexpr, WIDEN: tl.constexpr, LENGTH: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tile, kv_table = tile_of_program(tl.cdiv(key_len, BLOCK_K), LAST_FIRST=False)
    kv_heads = heads // group
    batch, kv_head = (kv_table // kv_heads).to(tl.int64), (kv_table % kv_heads).to(tl.int64)
    first = tile * BLOCK_K
    columns = first + tl.arange(0, BLOCK_K)

    k = load(keys + batch * k_batch + kv_head * k_head, columns, k_token, key_len, HEAD_DIM, WIDTH, WIDEN, True)
    v = load(values + batch * v_batch + kv_head * v_head, columns, v_token, key_len, HEAD_DIM, WIDTH, WIDEN, True)
    text_of_k = load_texts(key_texts, batch, columns, key_len, TEXTS)
    grad_k = tl.zeros([BLOCK_K, WIDTH], tl.float32)
    grad_v = tl.zeros([BLOCK_K, WIDTH], tl.float32)

    start, whole, end = seeing_queries(first, BLOCK_Q, BLOCK_K, query_len, key_len, window, CAUSAL, WINDOW, TEXTS)
    for member in range(0, group):  # keys and values serve the whole group of query heads: sum over it
        head = kv_head * group + member
        table = batch * heads + head
        q_of_head = queries + batch * q_batch + head * q_head
        grad_of_head = grad_context + batch * do_batch + head * do_head

        for EDGE in tl.static_range(2):  # under a causal mask the queries at the start are those that it cuts
            for row in range(start if EDGE else whole, whole if EDGE else end, BLOCK_Q):
                rows = row + tl.arange(0, BLOCK_Q)
                q = load(q_of_head, rows, q_token, query_len, HEAD_DIM, WIDTH, WIDEN, True)
                grad_o = load(grad_of_head, rows, do_token, query_len, HEAD_DIM, WIDTH, WIDEN, True)
                # No such row: +inf, and its weights are 0.
                row_lse = tl.load(log_sum_exp + table * query_len + rows, mask=rows < query_len, other=INFINITY)
                row_delta = tl.load(delta + table * query_len + rows, mask=rows < query_len, other=0.0)
                scores = product(q, tl.trans(k)) * scale
                if EDGE:
                    text_of_q = load_texts(query_texts, batch, rows, query_len, TEXTS)
                    scores = masked(
                        scores, rows, columns, text_of_q, text_of_k, query_len, key_len, window, CAUSAL, WINDOW, TEXTS
                    )
                weights = tl.exp2(scores - row_lse[:, None])  # the tile's softmax, recomputed

                keep = keep_mask(seed, table, query_len, key_len, rows, columns, threshold, DROPOUT)
                dropped = drop(weights, keep, keep_scale, DROPOUT)
                grad_weights = drop(product(grad_o, tl.trans(v)), keep, keep_scale, DROPOUT)
                grad_scores = weights * (grad_weights - row_delta[:, None])

                grad_v += product(tl.trans(dropped.to(grad_o.dtype)), grad_o)
                grad_k += product(tl.trans(grad_scores.to(q.dtype)), q)

    grad_k *= grad_scale
    store(grad_keys + batch * dk_batch + kv_head * dk_head, grad_k, columns, dk_token, key_len, HEAD_DIM, WIDTH)
    store(grad_values + batch * dv_batch + kv_head * dv_head, grad_v, columns, dv_token, key_len, HEAD_DIM, WIDTH)


@triton.jit
def backward_dq(
    queries, keys, values, query_texts, key_texts, seed, grad_context, log_sum_exp, delta, grad_queries,
    q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token, do_batch, do_head, do_token,
    dq_batch, dq_head, dq_token,
    heads, group, query_len, key_len, window, scale, grad_scale, threshold, keep_scale,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, TEXTS: tl.constexpr,
    DROPOUT: tl.constexpr, WIDEN: tl.constexpr, LENGTH: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tile, table = tile_of_program(tl.cdiv(query_len, BLOCK_Q), LAST_FIRST=CAUSAL)
    batch, head = (table // heads).to(tl.int64), (table % heads).to(tl.int64)
    kv_head = head // group  # grouped heads: several query heads share it
    first = tile * BLOCK_Q
    rows = first + tl.arange(0, BLOCK_Q)
    keys += batch * k_batch + kv_head * k_head
    values += batch * v_batch + kv_head * v_head

    q = load(queries + batch * q_batch + head * q_head, rows, q_token, query_len, HEAD_DIM, WIDTH, WIDEN, True)
    grad_of_head = grad_context + batch * do_batch + head * do_head
    grad_o = load(grad_of_head, rows, do_token, query_len, HEAD_DIM, WIDTH, WIDEN, True)
    at = table.to(tl.int64) * query_len + rows
    row_lse = tl.load(log_sum_exp + at, mask=rows < query_len, other=INFINITY)
    row_delta = tl.load(delta + at, mask=rows < query_len, other=0.0)
    text_of_q = load_texts(query_texts, batch, rows, query_len, TEXTS)
    grad_q = tl.zeros([BLOCK_Q, WIDTH], tl.float32)

    start, whole, end = visible_keys(first, BLOCK_Q, BLOCK_K, query_len, key_len, window, CAUSAL, WINDOW, TEXTS)
    for EDGE in tl.static_range(2):
        for column in range(whole if EDGE else start, end if EDGE else whole, BLOCK_K):
            columns = column + tl.arange(0, BLOCK_K)
            k = load(keys, columns, k_token, key_len, HEAD_DIM, WIDTH, WIDEN, EDGE)
            v = load(values, columns, v_token, key_len, HEAD_DIM, WIDTH, WIDEN, EDGE)
            scores = product(q, tl.trans(k)) * scale
            if EDGE:
                text_of_k = load_texts(key_texts, batch, columns, key_len, TEXTS)
                scores = masked(
                    scores, rows, columns, text_of_q, text_of_k, query_len, key_len, window, CAUSAL, WINDOW, TEXTS
                )
            weights = tl.exp2(scores - row_lse[:, None])

            keep = keep_mask(seed, table, query_len, key_len, rows, columns, threshold, DROPOUT)
            grad_weights = drop(product(grad_o, tl.trans(v)), keep, keep_scale, DROPOUT)
            grad_scores = weights * (grad_weights - row_delta[:, None])
            grad_q += product(grad_scores.to(k.dtype), k)

    grad_q *= grad_scale
    store(grad_queries + batch * dq_batch + head * dq_head, grad_q, rows, dq_token, query_len, HEAD_DIM, WIDTH)


@triton.jit
def tile_of_program(tiles, LAST_FIRST: tl.constexpr):
    """(tile, table): which tile of which T x T table (one for each sequence and head) is this program's.

    Under a causal mask the last queries meet the most keys, and the first keys the most queries: what takes longest
    starts first, so that it does not end alone.
    """
    program = tl.program_id(0)
    tile = program % tiles
    if LAST_FIRST:
        tile = tiles - 1 - tile
    return tile, program // tiles


@triton.jit
def visible_keys(
    first, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, query_len, key_len, window,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, TEXTS: tl.constexpr,
):  # fmt: skip
    """(start, whole, end): outside start..end no key is seen by any of the tile's queries, so the loop leaves it out;
    the tiles in start..whole are seen by all of them, so nothing has to be masked."""
    position = first + key_len - query_len  # of the tile's first query: the last query sees the last key
    start, end = 0, key_len
    if WINDOW:
        start = tl.maximum(0, position - window + 1)
        end = tl.minimum(key_len, position + BLOCK_Q - 1 + window)
    if CAUSAL:
        end = tl.minimum(key_len, position + BLOCK_Q)
    whole = start
    if not (WINDOW or TEXTS):
        seen_by_all = tl.maximum(0, tl.minimum(key_len, position + 1)) if CAUSAL else key_len
        whole = seen_by_all // BLOCK_K * BLOCK_K
    return start, whole, end


@triton.jit
def seeing_queries(
    first, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, query_len, key_len, window,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, TEXTS: tl.constexpr,
):  # fmt: skip
    """(start, whole, end): outside start..end no query sees any of the tile's keys; in whole..end each sees all."""
    offset = key_len - query_len
    start, end = 0, query_len
    if WINDOW:
        start = tl.maximum(0, first - offset - window + 1)
        end = tl.minimum(query_len, first + BLOCK_K - 1 - offset + window)
    if CAUSAL:
        start = tl.maximum(0, first - offset)
    whole = end
    if not (WINDOW or TEXTS):
        whole = start
        if CAUSAL:
            sees_all = tl.maximum(start, first + BLOCK_K - 1 - offset)
            whole = start + tl.cdiv(sees_all - start, BLOCK_Q) * BLOCK_Q
            whole = tl.minimum(whole, tl.maximum(start, end))
    return start, whole, end


@triton.jit
def masked(
    scores, rows, columns, text_of_q, text_of_k, query_len, key_len, window,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, TEXTS: tl.constexpr,
):  # fmt: skip
    """One tile of scores, with -inf where the mask hides the key."""
    ahead = rows[:, None] + (key_len - query_len) - columns[None, :]  # by how much a query stands ahead of a key
    allowed = (columns < key_len)[None, :]
    if CAUSAL:
        allowed = allowed & (ahead >= 0)
    if WINDOW:
        allowed = allowed & (ahead < window) & (ahead > -window)
    if TEXTS:
        allowed = allowed & (text_of_q[:, None] == text_of_k[None, :])
    return tl.where(allowed, scores, -INFINITY)


@triton.jit
def keep_mask(seed, table, query_len, key_len, rows, columns, threshold, DROPOUT: tl.constexpr):
    """Which weights of the tile dropout keeps, drawn from their absolute position: `keep_mask` of CMHA/dropout.py."""
    keep = True
    if DROPOUT:
        bits = (table.to(tl.uint64) * query_len + rows[:, None]) * key_len + columns[None, :]
        bits = (bits + 1) * GOLDEN + tl.load(seed).to(tl.uint64) * FIRST
        bits = (bits ^ (bits >> 30)) * FIRST
        bits = (bits ^ (bits >> 27)) * SECOND
        bits = bits ^ (bits >> 31)
        keep = (bits >> 33).to(tl.int64) >= threshold
    return keep


@triton.jit
def drop(tile, keep, keep_scale, DROPOUT: tl.constexpr):
    """Dropout on one tile."""
    if DROPOUT:
        tile = tl.where(keep, tile * keep_scale, 0.0)
    return tile


@triton.jit
def product(a, b):
    """a @ b, summed in float32. For float32 itself in full precision, not in the 10 bits of TF32."""
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def load(
    base, rows, stride, length,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, WIDEN: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """(rows, WIDTH) of a matrix (length, HEAD_DIM); 0 where it has no such row (looked at if EDGE) or column."""
    column = tl.arange(0, WIDTH)
    at = base + rows.to(tl.int64)[:, None] * stride + column[None, :]
    if EDGE or HEAD_DIM != WIDTH:
        tile = tl.load(at, mask=(rows < length)[:, None] & (column < HEAD_DIM)[None, :], other=0.0)
    else:
        tile = tl.load(at)
    if WIDEN:
        tile = tile.to(tl.float32)
    return tile


@triton.jit
def load_texts(texts, batch, tokens, length, TEXTS: tl.constexpr):
    """The text of each token; -2, which none has, behind the end."""
    found = tokens
    if TEXTS:
        found = tl.load(texts + batch * length + tokens, mask=tokens < length, other=-2)
    return found


@triton.jit
def store(base, tile, rows, stride, length, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr):
    """The rows and columns of the tile that the matrix has."""
    column = tl.arange(0, WIDTH)
    at = base + rows.to(tl.int64)[:, None] * stride + column[None, :]
    tl.store(at, tile.to(base.dtype.element_ty), mask=(rows < length)[:, None] & (column < HEAD_DIM)[None, :])
