"""Attention over the pages of a PagedKVCache: who reads them here, and why not another.

A sequence's keys lie in blocks anywhere in a pool, and its block table says where. There are four ways to look them up,
each a file beside this one with `SUMMARY`, `reasons(request, pages)` against it, and `read`, which attends:

    flash_attention_2  paged_flash_attention_2.py   the package flash-attn, blocks of 256 tokens
    triton             paged_triton.py              our kernel for sequences that write; plain for those that read
    plain              paged_plain.py               gather the blocks, then ordinary attention; every device
    flex               paged_flex.py                FlexAttention over the whole pool; when named

On CUDA the first without a reason against it is taken, elsewhere plain. `read_with("plain")` names one; it raises where
that one cannot serve. Start with paged_plain.py. Source: Kwon et al., 2023, section 4.1.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from jaxtyping import Float
from torch import Tensor

from CMHA.implementations import paged_flash_attention_2, paged_flex, paged_plain, paged_triton
from CMHA.paged_kv_cache import Pages
from CMHA.request import AttentionRequest, Reason

SUMMARY = "attention over the pages of a paged cache, for generation"
ALIASES = ("paged",)
READS_PAGES = True

READERS = {
    "flash_attention_2": paged_flash_attention_2,
    "triton": paged_triton,
    "plain": paged_plain,
    "flex": paged_flex,
}
# What is tried where none is named. On a CPU the kernels would run in Triton's interpreter, for tests only; flex is
# left out for what paged_flex.py says.
ON_CUDA, ELSEWHERE = ("flash_attention_2", "triton", "plain"), ("plain",)
_named: ContextVar[str | None] = ContextVar("the reader of pages that read_with names", default=None)


def check(request: AttentionRequest) -> list[Reason]:
    """Why there is nothing to page in the request; empty when it can be served."""
    reasons = []
    if request.needs_grad:
        message = "it is for generation: in training a text is read once and whole, and no keys are kept in pages"
        reasons.append(Reason("training", message, "leave it at auto, or name sdpa, for training"))
    elif not request.paged:
        message = "it reads the pages of a paged cache, and this call has none"
        reasons.append(
            Reason("no_pages", message, "write with generate() or the engine, which bring one, or take sdpa")
        )
    if request.needs_weights:
        reasons.append(Reason("weights_wanted", "it never forms the attention weights", "ask eager for them"))
    return reasons


def attention(
    queries: Float[Tensor, "1 heads tokens head_dim"],
    keys: Float[Tensor, "blocks kv_heads block_size head_dim"],
    values: Float[Tensor, "blocks kv_heads block_size head_dim"],
    mask,
    *,
    scale: float,
    dropout: float = 0.0,
) -> tuple[Float[Tensor, "1 heads tokens head_dim"], None]:
    """Each sequence's new tokens against all its tokens. keys and values are whole pools; the mask is a PagedMask.

    Raises:
        ValueError: the reader that `read_with` names cannot serve the call.
    """

    def choose() -> str:
        request = AttentionRequest.describe(queries, keys, mask, dropout=dropout)
        return choose_reader(request, Pages(keys.shape[2], keys.dtype))[0]

    call = f"{_named.get()} {queries.dtype} {tuple(queries.shape)} {keys.dtype} {tuple(keys.shape)} {dropout}"
    name = mask.once(f"reader of {call}", choose)  # the layers ask alike
    return READERS[name].read(queries, keys, values, mask, scale=scale, dropout=dropout), None


@contextmanager
def read_with(name: str | None) -> Iterator[None]:
    """While it lasts this reader is taken, or an error raised: for tests and benchmarks. None: chosen again.

    Raises:
        ValueError: an unknown name.
    """
    if name is not None and name not in READERS:
        raise ValueError(f"unknown reader of pages {name!r}. Known: {', '.join(READERS)}.")
    token = _named.set(name)
    try:
        yield
    finally:
        _named.reset(token)


def choose_reader(request: AttentionRequest, pages: Pages) -> tuple[str, dict[str, list[Reason]]]:
    """(name, those that were asked before it with their reasons).

    Raises:
        ValueError: the one that `read_with` names cannot serve; with every reason.
    """
    named = _named.get()
    rejected: dict[str, list[Reason]] = {}
    for name in (named,) if named else ON_CUDA if request.device == "cuda" else ELSEWHERE:
        against = READERS[name].reasons(request, pages)
        if not against:
            return name, rejected
        rejected[name] = against
    lines = [f"  {reason.message}; {reason.remedy}" for reason in rejected[named]]  # plain never refuses
    raise ValueError(f"pages cannot be read with {named} here:\n" + "\n".join(lines))


def readers_report(request: AttentionRequest | None = None, pages: Pages | None = None) -> dict:
    """Who would read the pages of this call, and why not the others.

    Args:
        request: the call; None: a forward pass in fp32 on the CPU.
        pages: of the cache; None: blocks of 16 tokens in the request's dtype.
    Returns:
        JSON-ready dict: chosen (None: the named one cannot serve), named (by `read_with`, or None), block_size,
        readers {name: [{"code", "message", "remedy"}, ...], empty = usable}, in the order of READERS.
    """
    request = request or AttentionRequest(paged=True)
    pages = pages or Pages(dtype=request.dtype)
    try:
        chosen = choose_reader(request, pages)[0]
    except ValueError:
        chosen = None
    return {
        "chosen": chosen,
        "named": _named.get(),
        "block_size": pages.block_size,
        "readers": {
            name: [vars(reason) for reason in reader.reasons(request, pages)] for name, reader in READERS.items()
        },
    }
