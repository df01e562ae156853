"""The functions of flash-attn 2.8.4 that take a block table, for the stand-in of `fake_flash_attn.py`.

Signatures as in flash_attn/flash_attn_interface.py, refusals as in csrc/flash_attn/flash_api.cpp. Keys are looked up in
the table one by one, up to the length that is given, so a wrong table, length or scale gives wrong numbers.
"""

from types import ModuleType

import torch
from torch import Tensor

from tests.CMHA.implementations.fake_flash_attn import check_inputs, one_sequence, require


def looked_up(pool: Tensor, blocks: Tensor, length: int) -> Tensor:
    """(blocks, block_size, Hk, D) -> (length, Hk, D) in fp32."""
    size = pool.shape[1]
    return torch.stack([pool[blocks[at // size], at % size] for at in range(length)]).float()


def check_pages(q: Tensor, k: Tensor, v: Tensor, block_table: Tensor, sequences: int, longest: int) -> None:
    require(block_table.dtype == torch.int32, "block_table must have dtype torch.int32")
    require(block_table.stride(-1) == 1, "block_table must have contiguous last dimension")
    require(k.ndim == 4 and k.shape == v.shape, "pages are (num_blocks, page_block_size, nheads_k, headdim)")
    require(k.shape[1] % 256 == 0, "Paged KV cache block size must be divisible by 256")
    require(k.stride(-1) == v.stride(-1) == 1, "Input tensor must have contiguous last dimension")
    require(len(block_table) == sequences > 0, "batch size must be positive")
    # The true ones do not look: they read outside the table.
    require(longest <= block_table.shape[1] * k.shape[1], "a sequence is longer than its blocks")
    # They pad q, and the whole cache with it.
    require(q.shape[-1] % 8 == 0, "the cache would be copied")


def add_pages(module: ModuleType) -> ModuleType:
    """The stand-in of flash-attn 2, with its paged functions. `module.calls` notes their calls too."""
    without_pages = module.flash_attn_varlen_func

    def flash_attn_with_kvcache(
        q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None,
        cache_batch_idx=None, cache_leftpad=None, block_table=None, softmax_scale=None, causal=False,
        window_size=(-1, -1), softcap=0.0, rotary_interleaved=True, alibi_slopes=None, num_splits=0,
        return_softmax_lse=False,
    ):  # fmt: skip
        module.calls.append(("flash_attn_with_kvcache", dict(locals())))
        require(q.ndim == 4 and k is None and v is None, "q is (batch_size, seqlen, nheads, headdim)")
        check_inputs(q, k_cache, v_cache, widest=256, step=1)
        check_pages(q, k_cache, v_cache, block_table, len(q), int(cache_seqlens.max()))
        require(cache_seqlens.dtype == torch.int32 and cache_seqlens.shape == (len(q),), "seqlens_k must be int32")
        scale = softmax_scale or q.shape[-1] ** -0.5
        rows = [
            one_sequence(row.float(), *(looked_up(pool, blocks, int(length)) for pool in (k_cache, v_cache)), scale,
                         causal, None, None, 0.0)
            for row, blocks, length in zip(q, block_table, cache_seqlens, strict=True)
        ]  # fmt: skip
        return torch.stack(rows).to(q.dtype)

    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
        causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False,
        return_attn_probs=False, block_table=None,
    ):  # fmt: skip
        if block_table is None:
            lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
            return without_pages(q, k, v, *lengths, dropout_p, softmax_scale, causal, window_size)
        module.calls.append(("flash_attn_varlen_func", dict(locals())))
        require(q.ndim == 3, "packed tensors are (total, nheads, headdim)")
        check_inputs(q, k[:, 0], v[:, 0], widest=256, step=1)
        check_pages(q, k, v, block_table, len(cu_seqlens_q) - 1, max_seqlen_k)
        for starts, longest in ((cu_seqlens_q, max_seqlen_q), (cu_seqlens_k, max_seqlen_k)):
            require(starts.dtype == torch.int32 and starts[0] == 0, "cu_seqlens must have dtype int32")
            require(type(longest) is int and starts.diff().max() <= longest, "a sequence is longer than max_seqlen")
        require(cu_seqlens_q[-1] == len(q) and len(cu_seqlens_k) == len(cu_seqlens_q), "cu_seqlens covers the tokens")
        scale = softmax_scale or q.shape[-1] ** -0.5
        found = [
            one_sequence(row.float(), *(looked_up(pool, blocks, int(length)) for pool in (k, v)), scale, causal, None,
                         None, 0.0)
            for row, blocks, length in zip(
                q.split(cu_seqlens_q.diff().tolist()), block_table, cu_seqlens_k.diff(), strict=True
            )
        ]  # fmt: skip
        return torch.cat(found).to(q.dtype)

    module.flash_attn_with_kvcache, module.flash_attn_varlen_func = flash_attn_with_kvcache, flash_attn_varlen_func
    return module
