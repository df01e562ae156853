"""Which numbers the matrix products are computed in: fp32, bf16 or fp16, and what fp16 needs besides.

Weights, gradients and the optimizer stay in float32; `torch.autocast` computes the matrix products in the shorter type.
bf16 has float32's range and eight bits of precision. fp16 has more precision and a small range: gradients below 6e-8
would become zero, so the loss is scaled up before the backward pass and the gradients down after it (GradScaler).
"""

from contextlib import AbstractContextManager

import torch

TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_dtype(name: str, device: str) -> str:
    """ "auto" becomes what the processor does natively: bf16 where it has it, else fp16 on CUDA, else fp32.

    Raises:
        ValueError: a dtype that this device does not compute in, with what to use.
    """
    kind = torch.device(device).type
    if name == "auto":
        if native_bf16(device):
            return "bf16"
        return "fp16" if kind == "cuda" else "fp32"
    if kind == "cuda" and name == "bf16" and not torch.cuda.is_bf16_supported():
        raise ValueError(f"{torch.cuda.get_device_name(device)} does not compute in bf16: use --dtype fp16, or auto.")
    return name


def native_bf16(device: str) -> bool:
    """Whether this processor multiplies bf16 matrices itself: where it must emulate them, float32 is faster."""
    kind = torch.device(device).type
    if kind == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if kind == "cpu":
        has = torch.cpu.get_capabilities()
        return any(has.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))  # "bf16": on ARM
    return False


class Precision:
    """What a training step does about its dtype.

    Args:
        dtype: "fp32", "bf16" or "fp16". device: a torch device. scaler: one that has learned its scale already.
    Attributes:
        scaler: a GradScaler, which does nothing but under fp16.
    """

    def __init__(self, dtype: str, device: str, scaler: torch.amp.GradScaler | None = None):
        self.dtype, self.device_type = dtype, torch.device(device).type
        self.scaler = scaler or torch.amp.GradScaler(self.device_type, enabled=dtype == "fp16")

    def autocast(self) -> AbstractContextManager:
        """A fresh `with` in which matrix products are computed in this dtype."""
        return torch.autocast(self.device_type, TORCH_DTYPES[self.dtype], enabled=self.dtype != "fp32")
