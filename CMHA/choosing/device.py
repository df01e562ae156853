"""What this machine computes on."""

import importlib.util

import torch

TORCH_DEVICES = {"gpu": "cuda", "mps": "mps", "tpu": "xla", "cpu": "cpu"}  # our word -> torch's


def detect_device_type() -> str:
    """The best device here: "gpu" (CUDA or ROCm), "mps" (Apple), "tpu" (torch_xla is installed) or "cpu"."""
    if torch.cuda.is_available():
        return "gpu"
    if torch.backends.mps.is_available():
        return "mps"
    return "tpu" if importlib.util.find_spec("torch_xla") else "cpu"
