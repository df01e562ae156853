"""Attention whose mask is code: a small function of two positions, compiled into the kernel.

"FlexAttention" (Dong et al., 2024, arXiv:2412.05496), from `torch.nn.attention.flex_attention`. The other files are
handed a flag or a table. Here each rule of an AttentionMask is a line of Python about one query and one key:

    rules        may this query see this key? `mask_rules` has them; a mask of your own would be one line more
    BlockMask    which tiles of 128 x 128 are empty (skipped), full (no rule is asked) or mixed; once a forward pass
    kernel       rules, softmax and both matrix products in one compiled loop; compiled once, for all layers and models

A kernel takes seconds to compile (on two CPU cores 12 for the first and 4 for each other kind of call; then it runs at
once), so nothing that changes from call to call may be a constant of it: lengths are symbols (`dynamic=True`), and the
numbers and tables that a rule reads are tensors.
"""

import os
import shutil
import sys
import sysconfig
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, and_masks, create_block_mask, flex_attention

from CMHA.packages import PACKAGES, find
from CMHA.request import AttentionRequest, Reason

SUMMARY = "PyTorch's FlexAttention: masks as code, compiled; on a CPU without gradients"
ALIASES = ("flex",)
COMPILES = True  # for seconds, at the first call of each kind: `parity` tries fewer cases of it unless it is named
MOST_KERNELS = 256  # one for each dtype, head_dim, number of heads and set of rules, not for each length
TABLE_ROWS, TABLE_COLUMNS = 64, 1024  # tables that rules read are filled up to multiples of these


def check(request: AttentionRequest) -> list[Reason]:
    """Why FlexAttention cannot serve the request; empty when it can."""
    reasons = [*reasons_of_device(request)]
    if request.needs_weights:
        reasons.append(Reason("weights_wanted", "it never forms the attention weights", "ask eager for them"))
    if request.dropout > 0:
        remedy = "train with drop_rate=0, or with sdpa or flash_tiled, which have it"
        reasons.append(Reason("dropout", "it has no dropout", remedy))
    if 0 in (request.query_len, request.key_len):  # torch's compiled kernel divides by zero there
        reasons.append(Reason("empty", "it takes no call without queries or keys", "use sdpa or eager"))
    if request.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        message = f"its kernels take float32, bfloat16 and float16, not {str(request.dtype).removeprefix('torch.')}"
        reasons.append(Reason("dtype", message, "convert the model, or use flash_tiled"))
    return reasons


def reasons_of_device(request: AttentionRequest) -> list[Reason]:
    """What the device has against it. CUDA is as torch's source says; it was not run here."""
    reasons = []
    if request.device == "cpu":
        if request.needs_grad:
            remedy = "run it under torch.no_grad(), and train with sdpa or flash_tiled"
            reasons.append(Reason("needs_grad", "on a CPU it has no backward pass", remedy))
        if missing := missing_for_cpu():
            reasons.append(Reason("no_compiler", *missing))
    elif request.device == "cuda":
        if request.head_dim < 16:
            message = f"on CUDA it needs a head_dim of 16 or more, not {request.head_dim}"
            reasons.append(Reason("head_dim", message, "use sdpa, or fewer heads"))
        if request.capability is not None and request.capability < (7, 0):
            reasons.append(Reason("capability", "torch.compile needs a GPU of Volta (7.0) or later", "use sdpa"))
        if not find("triton").available:
            message = "torch.compile needs triton on CUDA, and it cannot be imported"
            reasons.append(Reason("no_compiler", message, PACKAGES["triton"].install))
    elif request.device == "mps":
        message = "torch's kernel for MPS is new, has no backward pass, and was not tried"
        reasons.append(Reason("mps", message, "keep eager there"))
    else:
        reasons.append(Reason("device", f"it was written for CPU and CUDA, not {request.device}", "use sdpa or eager"))
    return reasons


@cache
def missing_for_cpu() -> tuple[str, str] | None:
    """(what torch.compile lacks on this machine's CPU, what to do); None: nothing. Looked at once in a process."""
    without_avx2 = not torch.cpu._is_avx2_supported() or os.environ.get("ATEN_CPU_CAPABILITY") == "default"
    if without_avx2 or sys.platform == "darwin":
        return "for CPUs torch compiles it with AVX2 only, and not on macOS", "use sdpa"
    compiler = os.environ.get("CXX", "cl" if sys.platform == "win32" else "g++")
    if shutil.which(compiler) is None:
        return f"on a CPU it is compiled as C++, and there is no {compiler}", "install g++, or set CXX to your compiler"
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    if not header.exists():
        return f"on a CPU it is compiled with Python's headers, and there is no {header}", "install python3-dev"
    return None


def attention(
    queries: Float[Tensor, "batch heads query_len head_dim"],
    keys: Float[Tensor, "batch kv_heads key_len head_dim"],
    values: Float[Tensor, "batch kv_heads key_len head_dim"],
    mask,
    *,
    scale: float,
    dropout: float = 0.0,
) -> tuple[Float[Tensor, "batch heads query_len head_dim"], None]:
    """Attention by FlexAttention's compiled kernel. The contract of the registry; the weights are None.

    Raises:
        ValueError: dropout, which it does not have.
        RuntimeError: more kernels than MOST_KERNELS in one process.
    """
    if dropout > 0:
        raise ValueError(f"flex_attention has no dropout, got {dropout}: use sdpa or flash_tiled, or set drop_rate=0.")
    if not torch.is_grad_enabled():  # a CPU's kernel refuses parameters, even where no gradient is recorded
        queries, keys, values = queries.detach(), keys.detach(), values.detach()
    batch, device = len(queries), queries.device
    block_mask = mask.once(f"flex_block_mask:{batch}:{device}", lambda: build_block_mask(mask, batch, device))
    grouped = keys.shape[1] != queries.shape[1]
    try:
        with torch._dynamo.config.patch(recompile_limit=MOST_KERNELS):
            context = compiled()(queries, keys, values, block_mask=block_mask, scale=scale, enable_gqa=grouped)
    except torch._dynamo.exc.FailOnRecompileLimitHit as error:
        raise RuntimeError(
            f"flex_attention would be compiled for more than {MOST_KERNELS} kinds of call in a process, one for each "
            "dtype, head_dim, number of heads and set of rules: use sdpa for some, or call torch.compiler.reset()."
        ) from error
    return context, None


@cache
def compiled() -> Callable:
    """torch's function, compiled where it is called; all layers and models of the process share the kernels.

    dynamic: lengths are symbols, or each new one would take seconds. fullgraph: where torch cannot compile it raises;
    without it, past its limit of kernels, torch goes on uncompiled, with a table of all scores, and only logs it.
    """
    return torch.compile(flex_attention, dynamic=True, fullgraph=True)


def build_block_mask(mask, batch: int, device) -> BlockMask:
    """Which tiles are empty, full or mixed.

    torch asks the rules about every pair of positions, in tables of 10 bytes a pair that live for a moment: 10 MB for
    1024 tokens, 12 ms on a CPU, once a forward pass.
    """
    has_tables = mask.padding_mask is not None or mask.documents is not None
    rules = and_masks(*mask_rules(mask, batch, device))
    return create_block_mask(rules, batch if has_tables else None, None, mask.query_len, mask.key_len, device=device)


def mask_rules(mask, batch: int, device) -> list[Callable]:
    """One function for each rule that is on: (sequence, head, query, key) -> may this query see this key?

    Lambdas, for the type checks of our tests wrap every `def`, and torch cannot compile the wrapping.
    """
    offset = torch.tensor(mask.offset, device=device)  # query i stands at position i + offset
    rules = []
    if mask.causal:
        rules.append(lambda b, h, query, key: key <= query + offset)
    if mask.padding_mask is not None:
        is_real = fixed_size(mask.padding_mask, batch)
        rules.append(lambda b, h, query, key: is_real[b, key])
    if mask.documents is not None:
        document = fixed_size(mask.documents, batch)
        rules.append(lambda b, h, query, key: document[b, query + offset] == document[b, key])
    if mask.window is not None:
        window = torch.tensor(mask.window, device=device)
        rules.append(lambda b, h, query, key: query + offset - key < window)
        if not mask.causal:
            rules.append(lambda b, h, query, key: key - (query + offset) < window)
    return rules


def fixed_size(table: Tensor, batch: int) -> Tensor:
    """(B, key_len) -> the same, filled up to a size that seldom changes and is a constant of the kernel.

    As a symbol it would break the kernel: torch 2.13 writes names like `ks3` into its C++ by replacing text, and a size
    called `ks37` is hit as well, so that it does not compile.
    """
    table = table.expand(batch, -1)
    table = F.pad(table, (0, -table.shape[1] % TABLE_COLUMNS, 0, -batch % TABLE_ROWS))
    torch._dynamo.mark_static(table)
    return table
