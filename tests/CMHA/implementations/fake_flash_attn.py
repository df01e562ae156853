"""Stand-ins for the packages flash-attn, flash-attn-3 and flash-attn-4, which need a GPU that most machines lack.

They have the true signatures and compute real attention on any device: fp32 inside, rounded once at the end, one
sequence and one head after the other, with the meanings that the packages' docstrings and C++ give to `causal`,
`window_size` and `cu_seqlens`. They refuse what the true ones refuse, except tensors outside CUDA. Nothing is shared
with CMHA. What they cannot show: the kernels' own rounding, speed and bugs.

Read from Dao-AILab/flash-attention at commit 0251105 (15 August 2026):
    flash-attn 2.8.4    flash_attn/flash_attn_interface.py, csrc/flash_attn/flash_api.cpp
    flash-attn-3 3.0.0  hopper/flash_attn_interface.py, hopper/flash_api.cpp
    flash-attn-4 beta   flash_attn/cute/interface.py
"""

import sys
from types import ModuleType

import torch
from torch import Tensor

HALF = (torch.float16, torch.bfloat16)
MODULES = {"flash_attn_2": "flash_attn", "flash_attn_3": "flash_attn_interface", "flash_attn_4": "flash_attn.cute"}
VERSIONS = {"flash_attn_2": "2.8.4", "flash_attn_3": "3.0.0", "flash_attn_4": "4.0.0b9"}
# What pip calls them, as their setup.py or pyproject.toml write it.
DISTRIBUTIONS = {"flash_attn_2": "flash_attn", "flash_attn_3": "flash_attn_3", "flash_attn_4": "flash-attn-4"}


def require(holds: bool, message: str, error: type[Exception] = RuntimeError) -> None:
    """torch's TORCH_CHECK in C++ raises RuntimeError, the Python of FlashAttention-4 AssertionError."""
    if not holds:
        raise error(message)


def check_inputs(
    q: Tensor, k: Tensor, v: Tensor, widest: int, step: int, error: type[Exception] = RuntimeError
) -> None:
    require(q.dtype in HALF, "FlashAttention only support fp16 and bf16 data type", error)
    require(k.dtype == q.dtype and v.dtype == q.dtype, "query, key and value must have the same dtype", error)
    require(q.shape[-1] <= widest, f"FlashAttention only supports head dimension at most {widest}", error)
    require(q.shape[-1] % step == 0, f"head_size should be a multiple of {step}", error)
    require(q.shape[-2] % k.shape[-2] == 0, "Number of heads in key/value must divide number of heads in query", error)
    require(k.shape == v.shape and k.shape[-1] == q.shape[-1] and k.ndim == q.ndim, "shapes do not fit", error)


def one_sequence(q, k, v, scale: float, causal: bool, left: int | None, right: int | None, dropout: float) -> Tensor:
    """(n_q, H, D), (n_k, Hk, D), (n_k, Hk, D) in fp32 -> (n_q, H, D). Query i stands at i + n_k - n_q."""
    n_q, n_k, group = len(q), len(k), q.shape[1] // k.shape[1]
    seen = torch.zeros(n_q, n_k, dtype=torch.bool)
    for i in range(n_q):
        position = i + n_k - n_q
        last = position if causal else n_k - 1 if right is None else position + right
        first = 0 if left is None else position - left
        seen[i, max(first, 0) : max(min(last, n_k - 1) + 1, 0)] = True
    blind = ~seen.any(dim=1, keepdim=True)
    heads = []
    for head in range(q.shape[1]):
        scores = (q[:, head] @ k[:, head // group].T * scale).masked_fill(~seen, -torch.inf).masked_fill(blind, 0.0)
        weights = torch.softmax(scores, dim=1).masked_fill(blind, 0.0)  # "if the row is all zero, so is the output"
        heads.append(torch.nn.functional.dropout(weights, dropout) @ v[:, head // group])
    return torch.stack(heads, dim=1)


def batch_of_rows(q, k, v, scale, causal, left, right, dropout=0.0) -> Tensor:
    """(B, Tq, H, D), (B, Tk, Hk, D) -> (B, Tq, H, D)."""
    require(q.ndim == 4 and len(q) == len(k) > 0, "batch size must be positive")
    wide = [tensor.float() for tensor in (q, k, v)]
    rows = [one_sequence(*row, scale, causal, left, right, dropout) for row in zip(*wide, strict=True)]
    return torch.stack(rows).to(q.dtype)


def packed_rows(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale, causal, left, right, dropout=0.0
) -> Tensor:
    """(total_q, H, D), (total_k, Hk, D) -> (total_q, H, D)."""
    for offsets, tokens, longest in ((cu_seqlens_q, q, max_seqlen_q), (cu_seqlens_k, k, max_seqlen_k)):
        require(offsets.dtype == torch.int32, "cu_seqlens must have dtype int32")
        require(offsets.ndim == 1 and offsets.is_contiguous(), "cu_seqlens must be contiguous")
        # The true ones do not look: they read outside, or leave tokens out.
        require(offsets[0] == 0 and offsets[-1] == len(tokens), "cu_seqlens must cover the tokens")
        require(bool((offsets.diff() >= 0).all()), "cu_seqlens must not fall")
        require(offsets.diff().max() <= longest, "a sequence is longer than max_seqlen")
        require(type(longest) is int, "max_seqlen must be an int")
    require(len(cu_seqlens_q) == len(cu_seqlens_k) > 1, "batch size must be positive")
    require(q.ndim == 3, "packed tensors are (total, nheads, headdim)")
    wide_q, wide_k, wide_v = q.float(), k.float(), v.float()
    results = []
    for start_q, end_q, start_k, end_k in zip(
        cu_seqlens_q[:-1], cu_seqlens_q[1:], cu_seqlens_k[:-1], cu_seqlens_k[1:], strict=True
    ):
        sequence = wide_q[start_q:end_q], wide_k[start_k:end_k], wide_v[start_k:end_k]
        results.append(one_sequence(*sequence, scale, causal, left, right, dropout))
    return torch.cat(results).to(q.dtype)


def fa2_window(window_size, longest_k: int) -> tuple[int | None, int | None]:
    """flash_api.cpp of flash-attn, lines 422 and 638: a side as long as the keys counts as no limit."""
    return tuple(None if side < 0 or side >= longest_k else side for side in window_size)


def fa3_window(window_size, longest_q: int, longest_k: int) -> tuple[int | None, int | None]:
    """hopper/flash_api.cpp, line 796."""
    left, right = window_size
    return None if left < 0 or left >= longest_k - 1 else left, None if right < 0 or right >= longest_q - 1 else right


def fa4_window(window_size, causal: bool) -> tuple[int | None, int | None]:
    """cute/interface.py, `_resolve_causal_local_window`: None is no limit, and so are two sides with a sum below 0."""
    left, right = window_size
    right = 0 if causal else right
    return (None, None) if left is not None and right is not None and left + right < 0 else (left, right)


def flash_attn_2() -> ModuleType:
    """flash-attn 2.8.4. `module.calls` notes the name and the arguments of each call."""
    module = ModuleType("flash_attn")
    module.__version__, module.calls = VERSIONS["flash_attn_2"], []

    def flash_attn_func(
        q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
        alibi_slopes=None, deterministic=False, return_attn_probs=False,
    ):  # fmt: skip
        module.calls.append(("flash_attn_func", dict(locals())))
        check_inputs(q, k, v, widest=256, step=1)  # its Python pads the heads to a multiple of 8
        require(dropout_p < 1, "p_dropout < 1.f")
        window = fa2_window(window_size, k.shape[1])
        return batch_of_rows(q, k, v, softmax_scale or q.shape[-1] ** -0.5, causal, *window, dropout_p)

    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
        causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False,
        return_attn_probs=False, block_table=None,
    ):  # fmt: skip
        module.calls.append(("flash_attn_varlen_func", dict(locals())))
        check_inputs(q, k, v, widest=256, step=1)
        require(dropout_p < 1, "p_dropout < 1.f")
        window = fa2_window(window_size, max_seqlen_k)
        lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        return packed_rows(q, k, v, *lengths, softmax_scale or q.shape[-1] ** -0.5, causal, *window, dropout_p)

    module.flash_attn_func, module.flash_attn_varlen_func = flash_attn_func, flash_attn_varlen_func
    return module


def flash_attn_3() -> ModuleType:
    """flash-attn-3 3.0.0."""
    module = ModuleType("flash_attn_interface")
    module.calls = []

    def flash_attn_func(
        q, k, v, softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None,
        window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False,
        sm_margin=0, return_attn_probs=False,
    ):  # fmt: skip
        module.calls.append(("flash_attn_func", dict(locals())))
        check_inputs(q, k, v, widest=256, step=8)
        window = fa3_window(window_size, q.shape[1], k.shape[1])
        return batch_of_rows(q, k, v, softmax_scale or q.shape[-1] ** -0.5, causal, *window)

    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None, seqused_k=None,
        softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None,
        window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False,
        sm_margin=0, return_attn_probs=False,
    ):  # fmt: skip
        module.calls.append(("flash_attn_varlen_func", dict(locals())))
        check_inputs(q, k, v, widest=256, step=8)
        window = fa3_window(window_size, max_seqlen_q, max_seqlen_k)
        lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        return packed_rows(q, k, v, *lengths, softmax_scale or q.shape[-1] ** -0.5, causal, *window)

    module.flash_attn_func, module.flash_attn_varlen_func = flash_attn_func, flash_attn_varlen_func
    return module


def flash_attn_4() -> ModuleType:
    """flash-attn-4, beta. It returns (out, lse), and its word for no limit in a window is None."""
    module = ModuleType("flash_attn.cute")
    module.calls = []

    def flash_attn_func(
        q, k, v, qv=None, gather_kv_indices=None, softmax_scale=None, causal=False, window_size=(None, None),
        learnable_sink=None, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False, score_mod=None,
        score_mod_bwd=None, mask_mod=None, aux_tensors=None, aux_scalars=None, block_sparse_tensors=None,
        block_sparse_tensors_bwd=None, return_lse=False,
    ):  # fmt: skip
        module.calls.append(("flash_attn_func", dict(locals())))
        check_inputs(q, k, v, widest=256, step=8, error=AssertionError)  # on Hopper; 128 on Blackwell
        window = fa4_window(window_size, causal)
        return batch_of_rows(q, k, v, softmax_scale or q.shape[-1] ** -0.5, causal, *window), None

    def flash_attn_varlen_func(
        q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None,
        min_seqlen_k=None, seqused_q=None, seqused_k=None, gather_kv_indices=None, page_table=None,
        softmax_scale=None, causal=False, window_size=(None, None), learnable_sink=None, softcap=0.0, num_splits=1,
        pack_gqa=None, deterministic=False, score_mod=None, score_mod_bwd=None, mask_mod=None,
        block_sparse_tensors=None, aux_tensors=None, aux_scalars=None, return_lse=False, scheduler_metadata=None,
        seqlen_k_per_split=None, disable_scheduler_metadata=False,
    ):  # fmt: skip
        module.calls.append(("flash_attn_varlen_func", dict(locals())))
        check_inputs(q, k, v, widest=256, step=8, error=AssertionError)
        window = fa4_window(window_size, causal)
        lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        return packed_rows(q, k, v, *lengths, softmax_scale or q.shape[-1] ** -0.5, causal, *window), None

    module.flash_attn_func, module.flash_attn_varlen_func = flash_attn_func, flash_attn_varlen_func
    return module


BUILDERS = {"flash_attn_2": flash_attn_2, "flash_attn_3": flash_attn_3, "flash_attn_4": flash_attn_4}


def write_distribution(site, name: str, version: str) -> None:
    """What pip leaves beside a package in the folder `site`: importlib.metadata reads it."""
    info = site / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    text = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    (info / "METADATA").write_text(text, encoding="utf-8")


def install(name: str, site, monkeypatch) -> ModuleType:
    """Let `CMHA.packages.find(name)` find the fake: a real .dist-info in the folder `site`, the module in sys.modules.

    The caller clears what `find` remembers, before and after.
    """
    write_distribution(site, DISTRIBUTIONS[name], VERSIONS[name])
    monkeypatch.syspath_prepend(str(site))
    module = BUILDERS[name]()
    if name == "flash_attn_4" and "flash_attn" not in sys.modules:
        monkeypatch.setitem(sys.modules, "flash_attn", ModuleType("flash_attn"))  # alone it is a package without code
    monkeypatch.setitem(sys.modules, MODULES[name], module)
    return module
