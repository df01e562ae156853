"""What this machine has, and which attention it gets."""

import os
import platform

import torch

from CMHA.choosing import attention_report, detect_device_type
from CMHA.request import AttentionRequest


def describe_machine(device: str = "cpu") -> list[str]:
    """A few lines for a person: system, cores, torch, devices, and the choice of attention for training and eval."""
    kind = torch.device(device).type
    lines = [
        f"{platform.system()} on {platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, "
        f"torch {torch.__version__} with {torch.get_num_threads()} threads",
        f"best device here: {detect_device_type()}; this run uses: {device}",
    ]
    for purpose, dropout in (("evaluation", 0.0), ("training with dropout", 0.1)):
        report = attention_report(request=AttentionRequest(device=kind, dropout=dropout, needs_grad=dropout > 0))
        kernel = f", torch's {report['torch_sdpa_kernel']} kernel" if report["torch_sdpa_kernel"] else ""
        lines.append(f"attention for {purpose}: {report['chosen']}{kernel} ({report['reason']})")
    return lines


def wait_for(device: torch.device | str) -> None:
    """Until the device has done all it was given: a GPU's call returns before its work is done."""
    kind = torch.device(device).type
    if kind != "cpu":
        getattr(torch, kind).synchronize()


def check_device(name: str) -> str:
    """The torch device behind `name`; "auto" is the best one here.

    Raises:
        ValueError: a device that is unknown or not here.
    """
    best = {"gpu": "cuda", "mps": "mps"}.get(detect_device_type(), "cpu")
    if name == "auto":
        return best
    try:
        torch.empty(1, device=torch.device(name))
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # what torch raises for a device it lacks
        raise ValueError(f"device {name!r} cannot be used here. The best one is {best!r}: --device {best}.") from error
    return name
