"""How long one call keeps a device busy, and how many FLOPs it had to do.

On a GPU a call returns before its work is done. So its time is taken by two CUDA events that the device itself stamps,
with the device idle before; and what an earlier call left in the L2 cache is overwritten first, for in a model other
layers run between two calls of attention. What the launches cost is in it as far as the device waits for them, which
is most of the time of a short call. The lines for CUDA were written without a GPU and have not been run.
"""

import time
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from orchestrator.evaluation.cases import Case
from orchestrator.evaluation.machine import wait_for
from orchestrator.evaluation.memory import peak_tensor_bytes

FLUSHED = 256 * 2**20  # bytes that are overwritten, at least: more than the L2 cache of any GPU today
# FLOPs of a pass, in those of Q K^T and weights x values, the two products of forward. Backward has five: the scores
# again, and the gradients of weights, values, queries and keys.
PRODUCTS = {"forward": 1.0, "forward_backward": 3.5}


def timed(function: Callable, device: str) -> float:
    """Seconds of one call by the clock on the wall, on a device that has nothing else of ours to do."""
    wait_for(device)
    start = time.perf_counter()
    function()
    wait_for(device)
    return time.perf_counter() - start


def device_timed(function: Callable, device: str) -> float:
    """Seconds that the device took for one call, its L2 cache cold: by CUDA's events; elsewhere as `timed`."""
    if torch.device(device).type != "cuda":
        return timed(function, device)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    wait_for(device)
    buffer_to_flush(device).zero_()
    start.record()
    function()
    end.record()
    wait_for(device)
    return start.elapsed_time(end) / 1000


@cache
def buffer_to_flush(device: str) -> Tensor:
    """Memory that is larger than the L2 cache of the device."""
    cache_bytes = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0)
    return torch.empty(max(FLUSHED, 2 * cache_bytes), dtype=torch.int8, device=device)


def peak_memory(function: Callable, device: str) -> int | None:
    """Bytes alive at the worst moment above what lived before; None where the device does not tell (MPS)."""
    if device == "cpu":
        return peak_tensor_bytes(function).peak
    if device != "cuda":
        return None
    wait_for(device)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    wait_for(device)
    return torch.cuda.max_memory_allocated() - before


def attention_flops(case: Case, name: str) -> float:
    """FLOPs of one call, as FlashAttention's papers count: 4 B H Tq Tk D forward, half of it under a causal mask.

    Args:
        name: "forward", or "forward_backward", which is 3.5 times that.
    """
    pairs = case.batch_size * case.num_heads * case.query_len * case.key_len
    return PRODUCTS[name] * 4 * pairs * case.head_dim * (0.5 if case.causal else 1.0)
