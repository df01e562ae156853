"""Flash attention as our own GPU kernels: what stands around them. The kernels are in flash_triton_kernels.py.

flash_tiled.py is the same algorithm to be stepped through; docs/from_tile_to_kernel.md puts the two side by side. Here:
when the kernels can serve, how a mask is told to them, how many programs are started, and how torch sees them, as two
custom ops (forward and backward) that autograd and torch.compile take as a whole.

Without a GPU they run in Triton's interpreter, on the CPU and very slowly: for reading and for tests. Set
TRITON_INTERPRET=1 before anything imports triton.
"""

import math
import os
from contextlib import nullcontext
from functools import cache

import torch
from jaxtyping import Float, Int32
from torch import Tensor

from CMHA.implementations.flash_tiled import cast_by_autocast
from CMHA.packages import PACKAGES, find
from CMHA.request import AttentionRequest, Reason

SUMMARY = "flash attention as our own GPU kernels, in Triton; on a CPU in Triton's interpreter, for tests"
ALIASES = ("triton",)
OPTIONS = ("query_block_size", "kv_block_size")
INTERPRETED_ON = "cpu"  # there `python -m orchestrator parity` tries it in short cases only
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_HEAD_DIM = 128
DEFAULT_BLOCK = 64  # queries and keys in a tile where nothing is there to be tuned for
# What is tried on a GPU: queries and keys in a tile, warps, stages of the pipeline of loads. Larger tiles read less,
# smaller ones leave room for wide heads and float32.
TILES = ((128, 128, 8, 3), (128, 64, 8, 3), (128, 64, 4, 3), (64, 128, 8, 3), (64, 64, 8, 2), (64, 64, 4, 3),
         (32, 128, 8, 2), (128, 32, 8, 2), (64, 32, 4, 3), (32, 64, 4, 3), (32, 32, 4, 2))  # fmt: skip
# The most that query_block_size * kv_block_size * head_dim may be: for a given size, so that it fits an A100's 163 KiB;
# for float32, which tensor cores do not take, so that its unrolled products compile in seconds and find registers.
ROOM, ROOM_FLOAT32 = 2**19, 2**16
LOG2_E = math.log2(math.e)


def check(request: AttentionRequest) -> list[Reason]:
    """Why the kernels cannot serve the request; empty when they can."""
    dtype = str(request.dtype).removeprefix("torch.")
    old = request.capability is not None and request.capability < (8, 0)
    against = [
        (request.needs_weights, "weights_wanted", "it never forms the attention weights", "ask eager for them"),
        (request.dtype not in DTYPES, "dtype", f"its kernels take float32, bfloat16 and float16, not {dtype}",
         "convert the model, or use flash_tiled"),
        (request.head_dim > MAX_HEAD_DIM, "head_dim",
         f"its tiles hold heads of a width up to {MAX_HEAD_DIM}, not {request.head_dim}", "use sdpa, or more heads"),
        (0 in (request.query_len, request.key_len), "empty", "it takes no call without queries or keys", "use sdpa"),
        (old, "capability", f"it needs compute capability 8.0 (Ampere), this device has {request.capability}",
         "use sdpa"),
    ]  # fmt: skip
    reasons = [Reason(code, message, remedy) for holds, code, message, remedy in against if holds]
    return reasons + reasons_of_device(request.device)


def reasons_of_device(device: str) -> list[Reason]:
    """What the device, or what is installed here, has against it."""
    if device not in ("cuda", "cpu"):
        return [Reason("cuda_only", f"it runs on CUDA, not on {device}", "leave it at auto here")]
    if device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        remedy = (
            "use flash_tiled, the same algorithm in PyTorch; or, to try the kernels, set TRITON_INTERPRET=1 before "
            "Python starts (in a notebook: restart the kernel, and set it in the first cell)"
        )
        return [Reason("cuda_only", "it runs on CUDA; on a CPU in Triton's interpreter only", remedy)]
    if not find("triton").available:
        error = find("triton").error
        message = f"triton does not import ({error})" if error else "triton is not installed"
        return [Reason("import_failed" if error else "not_installed", message, PACKAGES["triton"].install)]
    if device == "cpu" and not interpreted():
        remedy = "set TRITON_INTERPRET=1 before Python starts, or at least before torch.compile and triton are imported"
        return [Reason("import_failed", "triton was imported before TRITON_INTERPRET=1 was set", remedy)]
    if device == "cuda" and interpreted():
        remedy = "unset TRITON_INTERPRET, and start Python again"
        return [Reason("import_failed", "triton runs its interpreter here, since TRITON_INTERPRET=1 is set", remedy)]
    return []


# torch.compile takes the answer instead of reading how it is found. This is what torch.compiler.assume_constant_result
# does, and that would import the whole compiler here, a second or two for everybody.
reasons_of_device._dynamo_marked_constant = True


def interpreted() -> bool:
    """Whether triton was imported as an interpreter: it decides once, by the environment that it finds then."""
    triton = find("triton").module
    return triton is not None and not isinstance(triton.language.max, triton.runtime.JITFunction)


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
    """Attention by our kernels. The contract of the registry; the weights are None.

    Args:
        query_block_size, kv_block_size: queries and keys in a tile, powers of two, 16 or more; fewer where a GPU has no
            room for them. None: measured once for each kind of call on this GPU and kept on disk. They change the last
            digits, and nothing else.
    Raises:
        ValueError: a block size that is no such power of two, or tensors of unequal dtype.
    """
    if problem := wrong_tiles(query_block_size, kv_block_size):
        raise ValueError(problem)
    if not queries.dtype == keys.dtype == values.dtype:
        dtypes = ", ".join(str(tensor.dtype).removeprefix("torch.") for tensor in (queries, keys, values))
        raise ValueError(
            f"queries, keys and values must be of one dtype, got {dtypes}: convert them, .to(queries.dtype)."
        )
    queries, keys, values = (row_major(tensor) for tensor in cast_by_autocast(queries, keys, values))
    batch, device = len(queries), queries.device
    query_texts, key_texts = mask.once(f"texts:{batch}:{device}", lambda: texts_of(mask, batch, device))
    # On the device and as a tensor: a number would make the GPU wait, and torch.compile break its graph.
    seed = torch.randint(2**62, (1,), device=queries.device) if dropout > 0 else None
    blocks = (query_block_size or 0, kv_block_size or 0)
    context, _ = forward(
        queries, keys, values, query_texts, key_texts, seed, mask.causal, mask.window or 0, scale, dropout, *blocks
    )
    return context, None


def wrong_tiles(*sizes: int | None) -> str | None:
    """What is wrong with these block sizes, or None."""
    wrong = [str(size) for size in sizes if size is not None and not power_of_two(size)]
    if not wrong:
        return None
    return (
        "flash_triton's tiles hold 16, 32, 64, 128, ... queries and keys, so flash_query_block_size and "
        f"flash_kv_block_size must be such powers of two, or None (chosen); got {' and '.join(wrong)}. flash_tiled "
        "takes any."
    )


def power_of_two(size: object) -> bool:
    """Whether it is a whole number that a tile can have: 16, 32, 64, ..."""
    return isinstance(size, int) and size >= 16 and not size & (size - 1)


def row_major(tensor: Tensor) -> Tensor:
    """The numbers of one head of one token side by side, which is all that the kernels ask of a layout."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def texts_of(
    mask, batch: int, device=None
) -> tuple[Int32[Tensor, "batch query_len"] | None, Int32[Tensor, "batch key_len"] | None]:
    """Padding and documents in one: a query sees the keys of its own text, named by where it starts; -1 is padding."""
    if mask.padding_mask is None and mask.documents is None:
        return None, None
    if mask.documents is None:
        texts = torch.zeros_like(mask.padding_mask, dtype=torch.int32)
        query_texts = texts[:, :1].expand(-1, mask.query_len).contiguous()
    else:
        documents = mask.documents.contiguous()
        texts = torch.searchsorted(documents, documents, out_int32=True)
        query_texts = texts[:, mask.offset :].contiguous()
    key_texts = texts if mask.padding_mask is None else texts.masked_fill(~mask.padding_mask, -1)
    # One row may stand for all sequences; the kernels look up a row for each.
    return tuple(rows.expand(batch, -1).contiguous().to(device) for rows in (query_texts, key_texts))


@torch.library.custom_op("gpt2_from_scratch::flash_attention", mutates_args=())
def forward(
    queries: Tensor, keys: Tensor, values: Tensor, query_texts: Tensor | None, key_texts: Tensor | None,
    seed: Tensor | None, causal: bool, window: int, scale: float, dropout: float,
    query_block_size: int, kv_block_size: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(context, log_sum_exp): one program for each tile of queries, of each head, of each sequence."""
    context, log_sum_exp = empty_results(queries)
    batch, heads, query_len, _ = queries.shape
    launch(
        "forward", lambda block: -(-query_len // block["BLOCK_Q"]) * batch * heads,
        (queries, keys, values, query_texts, key_texts, seed, context, log_sum_exp),
        strides(queries, keys, values, context),
        numbers(queries, keys, window, scale, dropout), kinds(queries, causal, window, key_texts, dropout),
        (query_block_size, kv_block_size),
    )  # fmt: skip
    return context, log_sum_exp


@torch.library.custom_op("gpt2_from_scratch::flash_attention_backward", mutates_args=())
def backward(
    queries: Tensor, keys: Tensor, values: Tensor, query_texts: Tensor | None, key_texts: Tensor | None,
    seed: Tensor | None, context: Tensor, log_sum_exp: Tensor, grad_context: Tensor,
    causal: bool, window: int, scale: float, dropout: float, query_block_size: int, kv_block_size: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(grad_queries, grad_keys, grad_values), each number summed by one program: the same bits every time."""
    grad_context, delta = row_major(grad_context), torch.empty_like(log_sum_exp)
    grad_queries, grad_keys, grad_values = (by_token(tensor) for tensor in (queries, keys, values))
    batch, heads, query_len, _ = queries.shape
    kv_heads, key_len = keys.shape[1:3]
    kind = kinds(queries, causal, window, key_texts, dropout)
    tensors = (queries, keys, values, query_texts, key_texts, seed, grad_context, log_sum_exp, delta)
    given = numbers(queries, keys, window, scale, dropout, grad_scale=scale)
    blocks = (query_block_size, kv_block_size)

    def tiles_of_queries(block):
        return -(-query_len // block["BLOCK_Q"]) * batch * heads

    launch(
        "backward_delta", tiles_of_queries, (context, grad_context, delta), strides(context, grad_context),
        {"heads": heads, "query_len": query_len}, {key: kind[key] for key in ("HEAD_DIM", "WIDTH", "WIDEN")}, blocks,
    )  # fmt: skip
    launch(
        "backward_dkdv", lambda block: -(-key_len // block["BLOCK_K"]) * batch * kv_heads,
        (*tensors, grad_keys, grad_values), strides(queries, keys, values, grad_context, grad_keys, grad_values),
        given, kind, blocks,
    )  # fmt: skip
    launch(
        "backward_dq", tiles_of_queries, (*tensors, grad_queries),
        strides(queries, keys, values, grad_context, grad_queries), given, kind, blocks,
    )  # fmt: skip
    return grad_queries, grad_keys, grad_values


def remember(ctx, inputs, output) -> None:
    """Kept for backward: the inputs, the output, and one number for each row."""
    ctx.save_for_backward(*inputs[:6], *output)
    ctx.call = inputs[6:]


def gradient(ctx, grad_context, _):
    """What autograd asks for; only queries, keys and values have a gradient."""
    return *backward(*ctx.saved_tensors, grad_context, *ctx.call), *(None,) * (3 + len(ctx.call))


forward.register_autograd(gradient, setup_context=remember)


@forward.register_fake
def _(queries, *others):
    return empty_results(queries)


@backward.register_fake
def _(queries, keys, values, *others):
    return by_token(queries), by_token(keys), by_token(values)


def empty_results(queries: Tensor) -> tuple[Tensor, Tensor]:
    """Room for the context and for log_sum_exp, (B, H, query_len) float32."""
    return by_token(queries), queries.new_empty(queries.shape[:-1], dtype=torch.float32)


def by_token(tensor: Tensor) -> Tensor:
    """An empty (B, H, T, D) whose memory is (B, T, H, D): merging or splitting the heads then copies nothing."""
    batch, heads, tokens, head_dim = tensor.shape
    return tensor.new_empty(batch, tokens, heads, head_dim).transpose(1, 2)


def strides(*tensors: Tensor) -> list[int]:
    """From one sequence, head and token to the next, in numbers."""
    return [step for tensor in tensors for step in tensor.stride()[:3]]


def numbers(queries: Tensor, keys: Tensor, window: int, scale: float, dropout: float, **more: float) -> dict:
    """What may change from call to call without another kernel."""
    return {
        "heads": queries.shape[1],
        "group": queries.shape[1] // keys.shape[1],
        "query_len": queries.shape[2],
        "key_len": keys.shape[2],
        "window": window,
        "scale": scale * LOG2_E,
        **more,
        "threshold": int(dropout * 2**31),
        "keep_scale": 1.0 / (1.0 - dropout) if dropout < 1.0 else 0.0,
    }


def kinds(queries: Tensor, causal: bool, window: int, key_texts: Tensor | None, dropout: float) -> dict:
    """What a kernel is compiled for."""
    head_dim = queries.shape[-1]
    return {
        "HEAD_DIM": head_dim,
        "WIDTH": max(16, 1 << (head_dim - 1).bit_length()),
        "CAUSAL": causal,
        "WINDOW": window > 0,
        "TEXTS": key_texts is not None,
        "DROPOUT": dropout > 0,
        "LENGTH": length_class(queries.shape[2]),
        # The interpreter's tl.dot is wrong for bf16 (triton issue 11584): there tiles are float32 from the start.
        "WIDEN": interpreted() and queries.dtype == torch.bfloat16,
    }


def length_class(query_len: int) -> int:
    """Queries, rounded up to one of a few lengths: for one token other tiles are the fastest than for thousands."""
    return next((length for length in (1, 128, 1024, 8192) if query_len <= length), 65536)


def launch(name: str, programs, tensors: tuple, steps: list[int], given: dict, kind: dict, blocks: tuple) -> None:
    """Start one kernel, with the tiles that were asked for, or else with the fastest that were found."""
    from CMHA.implementations import flash_triton_kernels as kernels  # triton is asked for here, not at import

    sizes = {"BLOCK_Q": blocks[0], "BLOCK_K": blocks[1]}
    if name == "backward_delta":  # one pass over the rows: nothing to be tuned
        sizes = {"BLOCK_Q": rows_of_delta(tensors[0].dtype, *blocks)}
    elif interpreted():
        sizes = {key: size or DEFAULT_BLOCK for key, size in sizes.items()}
    kernel, float32, width = getattr(kernels, name), tensors[0].dtype == torch.float32, kind["WIDTH"]
    if 0 in sizes.values():
        kernel, sizes = tuned(name, *blocks, ROOM_FLOAT32 // width if float32 else 0), {}  # its own sizes come with it
    elif name != "backward_delta" and not interpreted():
        query_block_size, kv_block_size = fitting(*blocks, (ROOM_FLOAT32 if float32 else ROOM) // width)
        sizes = {"BLOCK_Q": query_block_size, "BLOCK_K": kv_block_size, "num_stages": 2}
        sizes["num_warps"] = 8 if query_block_size * kv_block_size > 64 * 64 else 4
    device = tensors[0].device
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[lambda block: (programs(block),)](*tensors, *steps, **given, **kind, **sizes)


def rows_of_delta(dtype: torch.dtype, query_block_size: int, kv_block_size: int) -> int:
    """Rows in a tile of backward_delta; few in float32, whose products are unrolled into single multiplications."""
    few = dtype == torch.float32
    if interpreted():  # numpy adds the products of small tiles up in another order: small where the others are small
        few = (query_block_size or DEFAULT_BLOCK) * (kv_block_size or DEFAULT_BLOCK) <= 1024
    return 16 if few else DEFAULT_BLOCK


def fitting(query_block_size: int, kv_block_size: int, room: int) -> tuple[int, int]:
    """The sizes, the larger one halved until their product is at most `room`; 0: any."""
    while room and query_block_size * kv_block_size > room and max(query_block_size, kv_block_size) > 16:
        if query_block_size > kv_block_size:
            query_block_size //= 2
        else:
            kv_block_size //= 2
    return query_block_size, kv_block_size


@cache
def tuned(name: str, query_block_size: int, kv_block_size: int, room: int):
    """The kernel with the fastest tiles for each kind of call (head_dim, dtype, mask, dropout), measured at its first.

    Tiles for which the GPU has no room are passed over. The result is kept on disk: other tiles are other roundings,
    and a run that is resumed must take the same.
    """
    import triton

    from CMHA.implementations import flash_triton_kernels as kernels

    sizes = {
        (*fitting(query_block_size or q, kv_block_size or k, room), warps, stages) for q, k, warps, stages in TILES
    }
    configs = [
        triton.Config({"BLOCK_Q": q, "BLOCK_K": k}, num_warps=warps, num_stages=stages)
        for q, k, warps, stages in sorted(sizes)
    ]
    kind = ["HEAD_DIM", "CAUSAL", "WINDOW", "TEXTS", "DROPOUT", "LENGTH", "group"]
    return triton.autotune(configs, key=kind, cache_results=True)(getattr(kernels, name))
