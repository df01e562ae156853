"""adaptive_flash_attention(): attention in one call, for tensors that you have already. No layer, no cfg, no weights.

It looks at the tensors, asks the implementations, takes the best one that can serve, and says so when that is not what
was asked for. What it knows about the machine is data: `CMHA.choosing.get_flash_attention_config()`.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from CMHA.choosing import AttentionSettings, choose
from CMHA.masks import AttentionMask
from CMHA.request import AttentionRequest


def adaptive_flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float | None = None,
    causal: bool = True,
    padding_mask: Tensor | None = None,
    use_flash_attention: bool = True,
    query_block_size: int | None = None,
    kv_block_size: int | None = None,
    *,
    attn_implementation: str | None = None,
    attn_strict: bool = False,
    dropout: float = 0.0,
) -> Float[Tensor, "batch heads query_len head_dim"]:
    """softmax(scale * query key^T) value, by the best implementation that can serve this call here.

    Why: one door for code that has queries, keys and values, on any device, without knowing which packages are there.

    Args:
        query: (B, H, query_len, D). key, value: (B, kv_heads, key_len, D), H a multiple of kv_heads; all of one dtype.
        scale: what the scores are multiplied by; None: 1 / sqrt(D).
        causal: a query sees no later key. The last query stands at the last key, as with a KV cache.
        padding_mask: (B, key_len) bool, True = a real token.
        use_flash_attention: False: the definition (eager), always. True: the implementation named, or the best.
        query_block_size, kv_block_size: queries and keys in a tile. Only our tiled implementations have tiles to set: a
            size given, and no implementation named, means flash_tiled.
        attn_implementation: a name or an alias; None: auto.
        attn_strict: raise, instead of falling back with a warning, when the named one cannot serve.
        dropout: probability of dropping a weight; leave it 0 outside training.
    Returns:
        (B, H, query_len, D), of the dtype of the query. A query that may see nothing gives exactly 0.
    Raises:
        TypeError, ValueError: tensors that do not fit each other (all problems at once), a mask that does not fit, an
            unknown name, or under attn_strict every reason why the named one cannot serve.
    """
    check_tensors(query, key, value, query_block_size, kv_block_size, dropout)
    sizes = {"flash_query_block_size": query_block_size, "flash_kv_block_size": kv_block_size}
    if attn_implementation is None and any(size is not None for size in sizes.values()):
        attn_implementation = "flash_tiled"
    settings = AttentionSettings(use_flash_attention, attn_implementation, attn_strict, **sizes)
    mask = AttentionMask(
        query.shape[2], key.shape[2], causal=causal, padding_mask=padding_mask, batch_size=len(query),
        device=query.device,
    )  # fmt: skip
    needs_grad = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, key, value))
    choice = choose(settings, AttentionRequest.describe(query, key, mask, dropout=dropout, needs_grad=needs_grad))
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return choice.attention(query, key, value, mask, scale=scale, dropout=dropout)[0]


def check_tensors(query, key, value, query_block_size, kv_block_size, dropout) -> None:
    """Raise for tensors that cannot be attended with, before torch does with a message about sizes."""
    tensors = {"query": query, "key": key, "value": value}
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) or tensor.ndim != 4 or not tensor.is_floating_point():
            got = f"{tensor.dtype} {tuple(tensor.shape)}" if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"{name} must be a floating-point tensor (batch, heads, length, head_dim), got {got}.")
    problems = []
    if key.shape != value.shape:
        problems.append(f"key and value must have one shape, got {tuple(key.shape)} and {tuple(value.shape)}.")
    if query.shape[0] != key.shape[0] or query.shape[3] != key.shape[3]:
        problems.append(
            f"query and key must agree in batch and head_dim, got {tuple(query.shape)} and {tuple(key.shape)}: "
            "is the order (batch, heads, length, head_dim)?"
        )
    if key.shape[1] < 1 or query.shape[1] % key.shape[1]:
        problems.append(f"{query.shape[1]} query heads are not a multiple of {key.shape[1]} key heads.")
    for what in ("dtype", "device"):
        if len({getattr(tensor, what) for tensor in tensors.values()}) > 1:
            seen = ", ".join(f"{name} {getattr(tensor, what)}" for name, tensor in tensors.items())
            problems.append(f"query, key and value must have one {what}, got {seen}.")
    for name, size in (("query_block_size", query_block_size), ("kv_block_size", kv_block_size)):
        if size is not None and (not isinstance(size, int) or isinstance(size, bool) or size < 1):
            problems.append(f"{name} must be a whole number, 1 or more (or None), got {size!r}.")
    if not 0.0 <= dropout <= 1.0:
        problems.append(f"dropout must be a probability, from 0 to 1, got {dropout!r}.")
    if problems:
        raise ValueError("adaptive_flash_attention cannot be called so:\n" + "\n".join(f"  - {p}" for p in problems))
