"""attention_report(): the choice as plain data, for JSON, bug reports and tests."""

import platform
from dataclasses import replace

import torch

from CMHA.choosing.choose import AttentionSettings, decide, reasons_against
from CMHA.choosing.names import AUTO, known_names
from CMHA.implementations import paged_attention, sdpa
from CMHA.packages import PACKAGES, find
from CMHA.request import AttentionRequest

# torch names its kernels by number; from ATen's SDPBackend enum.
TORCH_KERNELS = {-1: "error", 0: "math", 1: "flash", 2: "efficient", 3: "cudnn", 4: "overrideable"}


def attention_report(settings: AttentionSettings | None = None, request: AttentionRequest | None = None) -> dict:
    """What would compute this request here, and why.

    Args:
        settings: what the user asked for; None: the defaults (auto).
        request: the call; None: a causal forward pass in fp32 on the CPU.
    Returns:
        JSON-ready dict: requested, chosen, reason, rejected {name: [codes]}, torch_sdpa_kernel (None unless sdpa
        was chosen), paged_readers (None unless the call brings pages: who reads them, and why not the others), usable
        {name: [codes against it, empty = usable]}, device, versions.
    Raises:
        ValueError: as `choose`, under attn_strict.
    """
    settings, request = settings or AttentionSettings(), request or AttentionRequest()
    request = replace(request, mps_guard=not settings.disable_mps_fix)  # as `choose` asks
    choice = decide(settings, request)
    return {
        "requested": choice.requested,
        "chosen": choice.chosen,
        "reason": choice.explain(),
        "rejected": {name: [reason.code for reason in reasons] for name, reasons in choice.rejected},
        "torch_sdpa_kernel": torch_kernel(request) if choice.chosen == "sdpa" else None,
        "paged_readers": paged_attention.readers_report(request) if request.paged else None,
        "usable": {
            name: [reason.code for reason in reasons_against(name, request)] for name in known_names() if name != AUTO
        },
        "known_names": {name: list(aliases) for name, aliases in known_names().items()},
        "device": request.device,
        "dtype": str(request.dtype).removeprefix("torch."),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            **{name: find(name).version for name in PACKAGES},
        },
    }


def torch_kernel(request: AttentionRequest) -> str:
    """Which of its kernels torch's fused op would take: "flash", "efficient", "cudnn" or "math" (which makes a table).

    "unknown" where this machine has no such device, or this torch no such question.
    """
    shape = (1, request.num_heads, request.query_len, request.head_dim)
    kv_shape = (1, request.num_kv_heads, request.key_len, request.head_dim)
    plain = request.mask_kind == "causal" and request.query_len == request.key_len
    no_mask = plain or request.mask_kind == "full" or (request.mask_kind == "causal" and request.query_len == 1)
    try:
        queries = torch.empty(shape, dtype=request.dtype, device=request.device)
        keys = torch.empty(kv_shape, dtype=request.dtype, device=request.device)
        table = (1, 1, request.query_len, request.key_len)
        mask = None if no_mask else torch.empty(table, dtype=torch.bool, device=request.device)
        grouped = request.num_heads != request.num_kv_heads
        with sdpa.kernels(request.device):
            number = torch._fused_sdp_choice(queries, keys, keys, mask, request.dropout, plain, enable_gqa=grouped)
    except (AttributeError, RuntimeError, AssertionError, ImportError):  # a private function; a device not here
        return "unknown"
    return TORCH_KERNELS.get(int(number), str(number))
