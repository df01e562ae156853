"""What the adapters of the flash-attn packages share: reasons against a call, and how a mask is said in their words.

Their kernels know three rules: causal (lower-right aligned), a window, and where a packed sequence begins and ends. The
third is how padding and documents are said. The real tokens are packed one after the other, without the padding, and
each run of them that belongs to one document of one sequence (a segment) counts as a sequence, of n_q queries and n_k
keys. The queries are the last n_q tokens of their segment, so lower-right is exact, with a KV cache too.

A query that is padding itself is not packed and gives exactly 0. Nobody reads it.
Source: flash-attention 2.8.4, `flash_attn/flash_attn_interface.py`; Dao (2023), "FlashAttention-2".
"""

import logging
from dataclasses import dataclass
from types import ModuleType

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Int32
from torch import Tensor

from CMHA.implementations import sdpa
from CMHA.packages import PACKAGES, find
from CMHA.request import AttentionRequest, Reason


def reasons_of_call(request: AttentionRequest, max_head_dim: int = 256, head_dim_step: int = 1) -> list[Reason]:
    """What is asked for and no flash-attn package does, whatever the machine."""
    dtype, width, kind = str(request.dtype).removeprefix("torch."), request.head_dim, request.mask_kind
    half = dtype in ("float16", "bfloat16")
    too_wide = width > max_head_dim or width % head_dim_step != 0
    widths = f"up to {max_head_dim}" + (f" in steps of {head_dim_step}" if head_dim_step > 1 else "")
    # A query before the first key belongs to no segment, and some kernels take its window for no limit.
    unplaced = request.query_len > request.key_len and kind not in ("causal", "full")
    against = [
        (request.needs_weights, "weights_wanted", "it never forms the attention weights", "ask eager for them"),
        (request.device != "cuda", "cuda_only", f"it runs on CUDA, not on {request.device}", "leave it at auto here"),
        (not half, "dtype", f"it computes in fp16 and bf16, not in {dtype}", "use bf16, or torch.autocast"),
        (too_wide, "head_dim", f"it takes heads of a width {widths}, not {width}", "use sdpa, or other heads"),
        (unplaced, "more_queries_than_keys", f"it takes no {kind} mask with more queries than keys", "use sdpa"),
    ]
    return [Reason(code, message, remedy) for holds, code, message, remedy in against if holds]


def reasons_of_machine(*names: str) -> list[Reason]:
    """Why none of these packages (names of `PACKAGES`, the preferred one first) can be imported; empty if one can."""
    if any(find(name).available for name in names):
        return []
    broken = [(PACKAGES[name], find(name)) for name in names if find(name).error]
    if not broken:
        distributions = " or ".join(PACKAGES[name].distribution for name in names)
        remedy = f"on a CUDA machine {PACKAGES[names[0]].install}; or sdpa, which on CUDA already is FlashAttention-2"
        return [Reason("not_installed", f"{distributions} is not installed", remedy)]
    return [
        Reason(
            "import_failed",
            f"{package.distribution} {found.version} is installed but does not import ({found.error})",
            f"build it again for this torch, {torch.__version__}: pip uninstall -y {package.distribution}, then "
            f"{package.install} --no-cache-dir",
        )
        for package, found in broken
    ]


def first_importable(*names: str) -> ModuleType:
    """The first of these packages that is installed and imports, imported.

    Raises:
        ImportError: none; with the reasons, and what to do.
    """
    if reasons := reasons_of_machine(*names):
        raise ImportError("; ".join(f"{reason.message}: {reason.remedy}" for reason in reasons))
    return next(find(name).module for name in names if find(name).available)


def attend(
    module: ModuleType,
    queries: Float[Tensor, "batch heads query_len head_dim"],
    keys: Float[Tensor, "batch kv_heads key_len head_dim"],
    values: Float[Tensor, "batch kv_heads key_len head_dim"],
    mask,
    *,
    scale: float,
    **options,
) -> tuple[Float[Tensor, "batch heads query_len head_dim"], None]:
    """Attention by a flash-attn package. The contract of the registry; the weights are None.

    Few queries at the end of a KV cache are nothing special here: the plain function is lower-right aligned, and our
    cache hands over the keys that are filled. `flash_attn_with_kvcache` is for caches with empty room behind their
    keys, or in pages; it has no backward pass.

    Args:
        module: the imported package, with `flash_attn_func` and `flash_attn_varlen_func`.
        options: further keyword arguments of these two.
    """
    segments = None
    if mask.padding_mask is not None or mask.documents is not None:
        batch_size = len(queries)
        segments = mask.once(f"segments of {batch_size}", lambda: find_segments(mask, batch_size))
    if segments is not None and segments.have_holes and mask.window is not None:
        # Packing closes the holes, and the window would count real tokens where it should count positions.
        mask.once("said", say_that_holes_go_to_sdpa)
        context, _ = sdpa.attention(queries, keys, values, mask, scale=scale, dropout=options.get("dropout_p", 0.0))
        return context.masked_fill(~mask.padding_mask[:, None, mask.offset :, None], 0.0), None

    options |= {"softmax_scale": scale, "causal": mask.causal}
    options["deterministic"] = torch.are_deterministic_algorithms_enabled()  # in the backward pass; the other always is
    if mask.window is not None:
        reach = mask.window - 1  # our window counts the token itself
        options["window_size"] = (reach, reach)  # left and right; causal closes the right side
    # (B, H, T, D) -> (B, T, H, D). Under autocast a cache may hold its keys in a wider dtype than the queries have.
    queries, keys, values = (tensor.to(queries.dtype).transpose(1, 2) for tensor in (queries, keys, values))
    if segments is None:
        context = attend_in_rows(module, queries, keys, values, mask, options)
    else:
        context = attend_in_segments(module, queries, keys, values, segments, options)
    return context.transpose(1, 2), None


def say_that_holes_go_to_sdpa() -> None:
    """No check can foresee this: it is seen in the mask's values."""
    logging.getLogger("CMHA").warning(
        "flash-attn cannot serve a window over a sequence with padding in its middle: sdpa computes this mask instead. "
        "What to do: pad on one side only."
    )


def attend_in_rows(module, queries, keys, values, mask, options) -> Float[Tensor, "batch query_len heads head_dim"]:
    """Every row of the batch is one sequence of real tokens."""
    # Causal queries before the first key see nothing. FlashAttention-4's own tests leave out their backward pass.
    blind = max(0, -mask.offset) if mask.causal else 0
    context = first_of(module.flash_attn_func(queries[:, blind:], keys, values, **options))
    return F.pad(context, (0, 0, 0, 0, blind, 0)) if blind else context


def attend_in_segments(
    module, queries, keys, values, segments, options
) -> Float[Tensor, "batch query_len heads head_dim"]:
    """The real tokens are packed, attended to segment by segment, and put back; where there are none stays 0."""
    rows = queries.shape[:2]
    # (B, T, H, D) -> (real tokens, H, D)
    packed = queries.flatten(0, 1).index_select(0, segments.query_at)
    if len(packed):  # the packages take no empty batch
        keys, values = (tensor.flatten(0, 1).index_select(0, segments.key_at) for tensor in (keys, values))
        packed = first_of(module.flash_attn_varlen_func(packed, keys, values, **segments.lengths, **options))
    flat = packed.new_zeros(rows.numel(), *packed.shape[1:])
    return flat.index_copy(0, segments.query_at, packed).unflatten(0, rows)


def first_of(returned: Tensor | tuple) -> Tensor:
    """The context of what a package returned: alone, or before the log-sum-exp."""
    return returned[0] if isinstance(returned, tuple) else returned


@dataclass(frozen=True)
class Segments:
    """Where the packed tokens come from, and where each segment begins.

    Attributes:
        query_at, key_at: index of each packed token among the B * query_len or B * key_len tokens of the batch.
        lengths: what the varlen functions take: cu_seqlens_q and cu_seqlens_k, (segments + 1,) int32, where each
            segment begins and the last one ends; max_seqlen_q and max_seqlen_k, ints.
        have_holes: a segment has padding in its middle.
    """

    query_at: Int[Tensor, " packed_queries"]
    key_at: Int[Tensor, " packed_keys"]
    lengths: dict[str, Int32[Tensor, " starts"] | int]
    have_holes: bool


def find_segments(mask, batch_size: int) -> Segments:
    """The segments of a mask with padding or documents. A GPU waits here, once for each mask: all layers share it."""
    given = mask.padding_mask if mask.documents is None else mask.documents
    real = torch.ones_like(given, dtype=torch.bool) if mask.padding_mask is None else mask.padding_mask
    documents = torch.zeros_like(given, dtype=torch.long) if mask.documents is None else mask.documents
    real, documents = real.expand(batch_size, -1), documents.expand(batch_size, -1)

    row, position = real.nonzero(as_tuple=True)  # of each real token, in reading order
    is_query = position >= mask.offset
    names = torch.stack([row, documents[row, position].long()])
    _, segment, n_k = names.unique_consecutive(dim=1, return_inverse=True, return_counts=True)
    n_q = torch.bincount(segment[is_query], minlength=len(n_k))
    asked = n_q > 0  # the keys of a segment without queries are read by nobody
    n_q, n_k, is_key = n_q[asked], n_k[asked], asked[segment]

    neighbours = segment[1:] == segment[:-1]
    return Segments(
        query_at=(row * mask.query_len + position - mask.offset)[is_query],
        key_at=(row * mask.key_len + position)[is_key],
        lengths={
            "cu_seqlens_q": F.pad(n_q.cumsum(0), (1, 0)).int(),
            "cu_seqlens_k": F.pad(n_k.cumsum(0), (1, 0)).int(),
            "max_seqlen_q": max(n_q.tolist(), default=0),
            "max_seqlen_k": max(n_k.tolist(), default=0),
        },
        have_holes=bool((neighbours & (position.diff() != 1)).any()),
    )
