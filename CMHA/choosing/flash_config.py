"""Flash attention on this machine as plain data: is it supported, on what, with which tiles, by which packages."""

import os
import platform
from dataclasses import asdict, dataclass

import torch

from CMHA.choosing.choose import AttentionSettings, decide
from CMHA.choosing.device import TORCH_DEVICES, detect_device_type
from CMHA.choosing.report import torch_kernel
from CMHA.implementations.flash_tiled import BLOCK_SIZE
from CMHA.packages import PACKAGES, find
from CMHA.request import AttentionRequest, capability_of

HAS_FLASH_ATTN_2: bool = find("flash_attn_2").available  # the package flash-attn is installed, and imports


@dataclass(frozen=True)
class BlockSizes:
    """Queries and keys in a tile of flash_tiled, where the cfg leaves them to us."""

    query_block_size: int = BLOCK_SIZE
    kv_block_size: int = BLOCK_SIZE


def is_flash_attention_supported(device_type: str | None = None) -> bool:
    """Whether `auto` reaches a fused flash kernel for a plain causal call, one that makes no T x T table.

    Why: "is flash attention supported" has no answer by itself. Our flash_tiled runs anywhere; what people want to
    know is whether the fast path is a flash kernel here.

    Args:
        device_type: "cpu", "gpu", "mps" or "tpu", as `detect_device_type` says; None: the best one here.
    Returns:
        True on a CPU and on CUDA; False on MPS, where the fused op is guarded, and on a TPU, where torch's op has none.
    Raises:
        ValueError: an unknown device type.
    """
    request = flash_request(device_type)
    chosen = decide(AttentionSettings(), request).chosen
    return torch_kernel(request) in ("flash", "efficient", "cudnn") if chosen == "sdpa" else chosen != "eager"


def get_flash_attention_config(device_type: str | None = None) -> dict:
    """What there is to know before calling flash attention here.

    Args:
        device_type: "cpu", "gpu", "mps" or "tpu"; None: the best one here.
    Returns:
        JSON-ready dict:
        device_type; flash_attention_supported; device_info (name, and on CUDA capability and memory in bytes);
        forward_params and backward_params {query_block_size, kv_block_size}: the tiles of flash_tiled;
        <package>_available for each package of `CMHA/packages.py`: installed, and really imported.
    Raises:
        ValueError: an unknown device type.
    """
    device_type = device_type or detect_device_type()
    return {
        "device_type": device_type,
        "flash_attention_supported": is_flash_attention_supported(device_type),
        "device_info": device_info(device_type),
        "forward_params": asdict(BlockSizes()),
        "backward_params": asdict(BlockSizes()),
        **{f"{name}_available": find(name).available for name in PACKAGES},
    }


def flash_request(device_type: str | None) -> AttentionRequest:
    """A plain causal call in the dtype that people use on the device: bf16 on CUDA, fp32 elsewhere."""
    device_type = device_type or detect_device_type()
    if device_type not in TORCH_DEVICES:
        raise ValueError(f"unknown device_type {device_type!r}: expected one of {', '.join(TORCH_DEVICES)}.")
    device = TORCH_DEVICES[device_type]
    return AttentionRequest(
        device=device,
        dtype=torch.bfloat16 if device == "cuda" else torch.float32,
        capability=capability_of(torch.device(device)),
    )


def device_info(device_type: str) -> dict:
    """Name of the device, and what else decides about kernels."""
    if device_type == "gpu" and torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        capability = capability_of(torch.device("cuda"))
        return {
            "name": properties.name,
            "capability": None if capability is None else list(capability),
            "memory_bytes": properties.total_memory,
            "count": torch.cuda.device_count(),
        }
    return {"name": platform.processor() or platform.machine(), "cores": os.cpu_count()}
