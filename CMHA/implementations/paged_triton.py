"""Pages read by our own GPU kernel: what stands around it. The kernel is in paged_triton_kernels.py.

It serves the sequences that write, one new token each, which is what generation does nearly all of the time. The others
read their prompt: for them the keys are gathered (paged_plain.py), once for many queries.

Without a GPU it runs in Triton's interpreter, as flash_triton does: for reading and for tests.
"""

from contextlib import nullcontext

import torch
from jaxtyping import Float
from torch import Tensor

from CMHA.implementations import flash_triton, paged_plain
from CMHA.implementations.flash_triton import DTYPES, LOG2_E, interpreted, row_major
from CMHA.paged_kv_cache import PagedMask, PagedPart, Pages
from CMHA.request import AttentionRequest, Reason

SUMMARY = "our Triton kernel for sequences that write (CUDA, any block size), plain for those that read"
MAX_HEAD_DIM, MAX_GROUP = 256, 64  # what a program has registers for
SPLIT = 256  # keys that one program takes; always the same, so that a sequence's numbers do not depend on the others
BLOCK_K = 64  # keys in a tile, at most
# The most that keys in a tile * head_dim may be, so that a program's numbers find registers; in float32, whose products
# are unrolled into single multiplications, half of it.
ROOM = 2**11


def reasons(request: AttentionRequest, pages: Pages) -> list[Reason]:
    """Why the kernel cannot read these pages; empty when it can."""
    dtype, group = str(request.dtype).removeprefix("torch."), request.num_heads // request.num_kv_heads
    old = request.capability is not None and request.capability < (8, 0)
    against = [
        (request.dropout > 0, "dropout", "it has no dropout", "write in eval mode"),
        (request.dtype not in DTYPES, "dtype", f"it takes float32, bfloat16 and float16, not {dtype}",
         "convert the model"),
        (request.head_dim > MAX_HEAD_DIM, "head_dim",
         f"it takes heads of a width up to {MAX_HEAD_DIM}, not {request.head_dim}", "use plain"),
        (group > MAX_GROUP, "group", f"it takes up to {MAX_GROUP} query heads for each key head, not {group}",
         "use plain"),
        (old, "capability", f"it needs compute capability 8.0 (Ampere), this device has {request.capability}",
         "use plain"),
    ]  # fmt: skip
    wrong = [Reason(code, message, remedy) for holds, code, message, remedy in against if holds]
    return wrong + flash_triton.reasons_of_device(request.device)


def read(
    queries: Float[Tensor, "1 heads tokens head_dim"],
    keys: Float[Tensor, "blocks kv_heads block_size head_dim"],
    values: Float[Tensor, "blocks kv_heads block_size head_dim"],
    mask: PagedMask,
    *,
    scale: float,
    dropout: float = 0.0,
) -> Float[Tensor, "1 heads tokens head_dim"]:
    """Attention by our kernel for the sequences that write, by plain for those that read."""
    context, queries = torch.empty_like(queries), row_major(queries)
    reading = [mask.sequences[number] for number in mask.reading()]
    paged_plain.read_into(context, reading, queries, keys, values, scale=scale)
    if writing := mask.writing():
        decode(context, mask.part(writing), queries, keys, values, scale)
    return context


def decode(context: Tensor, part: PagedPart, queries: Tensor, keys: Tensor, values: Tensor, scale: float) -> None:
    """Write the rows of `context` of the sequences in `part`, of which each has one new token."""
    from CMHA.implementations import paged_triton_kernels as kernels  # triton is asked for here, not at import

    (_, heads, _, head_dim), (_, kv_heads, block_size, _), sequences = queries.shape, keys.shape, len(part.lengths)
    splits = -(-max(part.lengths) // SPLIT)
    # Each stretch's share: made where there is more than one. Never filled where a sequence is shorter than others.
    room = (sequences, heads, splits) if splits > 1 else (0,)
    partial = queries.new_empty((*room, head_dim), dtype=torch.float32)
    maxima, sums = (queries.new_empty(room, dtype=torch.float32) for _ in range(2))
    width = max(16, 1 << (head_dim - 1).bit_length())
    q_steps, o_steps = queries.stride()[1:3], context.stride()[1:3]
    kinds, tile = {"HEAD_DIM": head_dim, "WIDTH": width, "SPLIT": SPLIT}, sizes(heads // kv_heads, width, queries.dtype)
    device = queries.device
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernels.decode[sequences, kv_heads, splits](
            queries, keys, values, part.rows, part.lengths_there, part.tables, context, partial, maxima, sums,
            *q_steps, *keys.stride()[:3], *values.stride()[:3], *o_steps,
            heads, splits, part.tables.shape[1], scale * LOG2_E, **kinds, **tile,
            BLOCK_SIZE=block_size, ONE_SPLIT=splits == 1, WIDEN=interpreted() and queries.dtype == torch.bfloat16,
        )  # fmt: skip
        if splits > 1:
            kernels.combine[sequences, heads](
                part.rows, part.lengths_there, partial, maxima, sums, context, *o_steps, heads, splits, **kinds
            )


def sizes(group: int, width: int, dtype: torch.dtype) -> dict[str, int]:
    """How many query heads and keys are in a tile. Powers of two, and 16 at least: so tensor cores want them."""
    room = ROOM // 2 if dtype == torch.float32 else ROOM
    heads = max(16, 1 << (group - 1).bit_length())
    return {
        "GROUP": group,
        "GROUP_TILE": heads,
        "BLOCK_K": max(16, min(BLOCK_K, room // width)),
        "num_warps": 8 if heads * width > 2 * ROOM else 4,
    }
