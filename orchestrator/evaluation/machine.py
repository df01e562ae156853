"""What this machine has, and which attention a model gets on it."""

import os
import platform
import shutil
import subprocess
from dataclasses import replace

import torch
from torch.nn import attention as torch_attention

from CMHA.choosing import attention_report, detect_device_type
from CMHA.implementations import IMPLEMENTATIONS
from CMHA.implementations.flash_triton import interpreted
from CMHA.packages import find


def describe_machine(device: str = "cpu") -> list[str]:
    """A few lines for a person: system, cores, torch, devices."""
    return [
        f"{platform.system()} on {platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, "
        f"torch {torch.__version__} with {torch.get_num_threads()} threads",
        f"best device here: {detect_device_type()}; this run uses: {device}",
    ]


def machine_facts(device: str = "cpu") -> dict:
    """What a result must be read with: the device, threads and versions. JSON-ready."""
    kind = torch.device(device).type
    name = torch.cuda.get_device_name(device) if kind == "cuda" else f"{kind}, {platform.machine()}"
    return {
        "device": name,
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()}, {platform.machine()}",
        "versions": attention_report()["versions"],
        "triton_runs": triton_runs(),
        **({"gpu": gpu_facts(device)} if kind == "cuda" else {}),
    }


def triton_runs() -> str | None:
    """How our kernels would run in this process: by Triton's "compiler" or its "interpreter"; None: no triton.

    Triton decides at its first import, by TRITON_INTERPRET, and keeps to it.
    """
    return None if not find("triton").available else "interpreter" if interpreted() else "compiler"


def gpu_facts(device: str = "cuda") -> dict:
    """What a figure taken on an NVIDIA GPU must be read with. JSON-ready. Written without a GPU, and not run."""
    properties = torch.cuda.get_device_properties(device)
    which_flash = getattr(torch_attention, "current_flash_attention_impl", lambda: None)
    return {
        "name": properties.name,
        "capability": [properties.major, properties.minor],
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "driver": driver_version(),
        "cudnn": torch.backends.cudnn.version(),
        "flash_of_sdpa": which_flash() or "FA2",  # the default of torch's op, unless another was activated
    }


def driver_version() -> str | None:
    """NVIDIA's driver; None where there is no nvidia-smi to ask."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    asked = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(asked, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return next(iter(said.split()), None)


def cpu_name() -> str:
    """The processor's own name where the system tells it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def describe_attention(model) -> list[str]:
    """Two lines: what computes attention in this model as it stands, in evaluation and in training, and why."""
    lines, was_training = [], model.training
    for purpose, training in (("evaluation", False), ("training", True)):
        with torch.set_grad_enabled(training):
            report = model.train(training).attention_report()
        kernel = f", torch's {report['torch_sdpa_kernel']} kernel" if report["torch_sdpa_kernel"] else ""
        dropout = f" with dropout {model.cfg['drop_rate']}" if training and model.cfg["drop_rate"] else ""
        lines.append(f"attention for {purpose}{dropout}: {report['chosen']}{kernel} ({report['reason']})")
    model.train(was_training)
    return lines


def trainable_here(model) -> list[str]:
    """The implementations whose own check accepts this model's forward and backward pass: each really runs when named.

    Why: one that would fall back to another must not be compared with it.
    """
    request = replace(model.blocks[0].attention.typical_request(), needs_grad=True)
    return [name for name, module in IMPLEMENTATIONS.items() if not module.check(request)]


def wait_for(device: torch.device | str) -> None:
    """Until the device has done all it was given: a GPU's call returns before its work is done."""
    kind = torch.device(device).type
    if kind != "cpu":
        getattr(torch, kind).synchronize(*([device] if kind == "cuda" else []))


def check_device(name: str) -> str:
    """The torch device behind `name`; "auto" is the best one here.

    Raises:
        ValueError: a device that is unknown or not here.
    """
    best = {"gpu": "cuda", "mps": "mps"}.get(detect_device_type(), "cpu")
    name = name.lower()
    if name == "auto":
        return best
    try:
        torch.empty(1, device=torch.device(name)).item()  # "meta" has no numbers
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # what torch raises for a device it lacks
        raise ValueError(f"device {name!r} cannot be used here. The best one is {best!r}: --device {best}.") from error
    return name
