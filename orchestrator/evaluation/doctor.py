"""What this machine has and what every name of attention gives on it, as plain data.

The commands ask what the layers ask: `decide` gets the requests of GPT-2's training and generation, and its answer is
what a model would get. Requests are data, so a device that is not here can be asked about too.
"""

import importlib.util
import os
import platform
from dataclasses import asdict

import torch

from CMHA.choosing import AttentionSettings, decide, known_names
from CMHA.choosing.choose import reasons_against
from CMHA.choosing.names import AUTO
from CMHA.choosing.report import torch_kernel
from CMHA.implementations import IMPLEMENTATIONS
from CMHA.packages import PACKAGES, find
from CMHA.request import MACHINE_CODES, AttentionRequest, capability_of
from orchestrator.evaluation.build_tools import Finding, look_at_build_tools, read_memory
from orchestrator.evaluation.machine import check_device, cpu_name, triton_runs
from orchestrator.evaluation.tokenizer_and_weights import find_vocabulary, find_weights, missing_for_text

TOKENS = 1024
AUTO_SUMMARY = "the best that passes its own checks here"
# GPT-2's calls: what each asks beyond device and dtype. Reading the prompt is a forward pass without a backward pass.
PURPOSES = {
    "training": {"dropout": 0.1, "needs_grad": True},  # 0.1 is GPT-2's own
    "training_without_dropout": {"needs_grad": True},
    "prompt": {},
    "generation": {"query_len": 1},  # one new token against a full cache
}


def examine(device: str = "auto", dtype: torch.dtype | None = None) -> dict:
    """Look at this machine.

    Args:
        device: "cpu", "cuda" or "mps", here or not; "auto": the one that a run takes here.
        dtype: of queries, keys and values; None: what people use on the device.
    Returns:
        JSON-ready dict: machine, torch, devices, tokenizer, weights, packages, attention, build {name: Finding as a
        dict}, missing.
    """
    device = check_device("auto") if device == "auto" else device
    dtype = dtype or usual_dtype(device)
    build, vocabulary, weights = look_at_build_tools(), find_vocabulary(), find_weights()
    return {
        "machine": {
            "system": f"{platform.system()} {platform.release()}",
            "architecture": platform.machine(),
            "python": platform.python_version(),
        },
        "torch": about_torch(),
        "devices": devices(),
        "tokenizer": vocabulary,
        "weights": weights,
        "packages": packages(),
        "attention": attention(device, dtype),
        "build": {name: asdict(finding) for name, finding in build.items()},
        "missing": missing_for_text(vocabulary, weights) + missing(device, dtype, build),
    }


def is_here(device: str) -> bool:
    """Whether this torch can compute on such a device here."""
    return {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}[device]


def usual_dtype(device: str) -> torch.dtype:
    """What people use there: bf16 on CUDA, fp16 on the GPUs before it (Turing and older), fp32 elsewhere."""
    if device != "cuda":
        return torch.float32
    capability = capability_of(torch.device(device))
    return torch.float16 if capability is not None and capability < (8, 0) else torch.bfloat16


def about_torch() -> dict:
    """Version, what it was built for, and what it can use here."""
    return {
        "version": torch.__version__,
        "threads": torch.get_num_threads(),
        "built_for_cuda": torch.version.cuda,
        "built_for_rocm": torch.version.hip,
        "cuda_available": torch.cuda.is_available(),
        "mps_available": torch.backends.mps.is_available(),
        "torch_xla_installed": importlib.util.find_spec("torch_xla") is not None,
    }


def devices() -> list[dict]:
    """Each device here: type, name, capability, memory in bytes."""
    here = [about_cpu()]
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        try:
            properties = torch.cuda.get_device_properties(index)
        except RuntimeError as error:  # a GPU that is there and out of order
            here.append({"type": f"cuda:{index}", "error": next(iter(str(error).splitlines()), "")})
            continue
        capability = capability_of(torch.device("cuda", index))
        here.append(
            {
                "type": f"cuda:{index}",
                "name": properties.name,
                "capability": None if capability is None else list(capability),
                "memory_bytes": properties.total_memory,
            }
        )
    if torch.backends.mps.is_available():
        memory = torch.mps.recommended_max_memory()
        here.append({"type": "mps", "name": cpu_name(), "capability": None, "memory_bytes": memory})
    return here


def about_cpu() -> dict:
    """The processor, and whether it has instructions for bf16 (without them bf16 is right, and slow)."""
    flags = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else None
    memory = read_memory()
    return {
        "type": "cpu",
        "name": cpu_name(),
        "cores": os.cpu_count(),
        "capability": torch.backends.cpu.get_cpu_capability(),  # the instructions that torch's kernels use
        "bf16_instructions": None if flags is None else sorted(n for n, on in flags.items() if "bf16" in n and on),
        "memory_bytes": memory["total_bytes"],
        "memory_available_bytes": memory["available_bytes"],
    }


def packages() -> dict[str, dict]:
    """Each package that an implementation can use: imported, and what came of it; of triton, how it runs kernels."""
    return {
        name: {
            "distribution": package.distribution,
            "version": find(name).version,
            "imports": find(name).available,
            "error": find(name).error,
            "purpose": package.purpose,
            "install": package.install,
            **({"runs": triton_runs()} if name == "triton" else {}),
        }
        for name, package in PACKAGES.items()
    }


def request_for(purpose: str, device: str, dtype: torch.dtype) -> AttentionRequest:
    """The call that GPT-2 (124M) makes for a purpose of `PURPOSES`: 12 heads of 64, 1,024 tokens, causal."""
    asked = {"query_len": TOKENS, "key_len": TOKENS, "capability": capability_of(torch.device(device))}
    return AttentionRequest(device=device, dtype=dtype, **asked | PURPOSES[purpose])


def attention(device: str, dtype: torch.dtype) -> dict:
    """What each known name gives on the device, for each purpose, and why."""
    requests = {purpose: request_for(purpose, device, dtype) for purpose in PURPOSES}
    return {
        "device": device,
        "here": is_here(device),
        "dtype": str(dtype).removeprefix("torch."),
        "names": {
            name: {
                "aliases": list(aliases),
                "summary": AUTO_SUMMARY if name == AUTO else IMPLEMENTATIONS[name].SUMMARY,
                **{purpose: answer(name, request) for purpose, request in requests.items()},
            }
            for name, aliases in known_names().items()
        },
    }


def answer(name: str, request: AttentionRequest) -> dict:
    """What `choose` would give for this name and request, without its warning."""
    choice = decide(AttentionSettings(attn_implementation=name), request)
    return {
        "chosen": choice.chosen,
        "torch_sdpa_kernel": torch_kernel(request) if choice.chosen == "sdpa" else None,
        "why": choice.explain(),
        "rejected": {other: [asdict(reason) for reason in reasons] for other, reasons in choice.rejected},
    }


def missing(device: str, dtype: torch.dtype, build: dict[str, Finding]) -> list[dict]:
    """What an installation would change on this machine: for each thing `what`, `why`, and `do`, steps in order.

    A name counts where nothing but this machine's software is in its way; flash-attn on a CPU does not.
    """
    wanted = []
    if build["GPU"].verdict == "mismatch":
        wanted.append({"what": "the GPU", "why": build["GPU"].found, "do": [build["GPU"].remedy]})
    for name in known_names() if is_here(device) else ():
        lacking = {} if name == AUTO else software_in_the_way(name, device, dtype)
        if lacking:
            steps = dict.fromkeys(lacking.values())
            if name == "flash_attention_2":  # the one that is compiled by pip
                steps = steps_to_compile_flash_attn(build)
            wanted.append({"what": name, "why": "; ".join(lacking), "do": list(steps)})
    for name, package in PACKAGES.items():
        if find(name).error and not torch.cuda.is_available():  # elsewhere the name that uses it has said so
            why = f"{find(name).version} does not import, and what it is for cannot be used here: {package.purpose}"
            wanted.append({"what": package.distribution, "why": why, "do": [f"pip uninstall {package.distribution}"]})
    return wanted


def software_in_the_way(name: str, device: str, dtype: torch.dtype) -> dict[str, str]:
    """{why: remedy} where some purpose fails for want of an installation alone; empty where none does."""
    for purpose in PURPOSES:
        reasons = reasons_against(name, request_for(purpose, device, dtype))
        if reasons and {reason.code for reason in reasons} <= MACHINE_CODES - {"no_device"}:
            return {reason.message: reason.remedy for reason in reasons}
    return {}


def steps_to_compile_flash_attn(build: dict[str, Finding]) -> list[str]:
    """What stops the build comes first; a package that does not import goes, with the wheel that pip has kept of it."""
    package = PACKAGES["flash_attn_2"]
    steps = [finding.remedy for finding in build.values() if finding.stops and finding.remedy]
    install = package.install
    if find("flash_attn_2").error:
        steps.append(f"pip uninstall -y {package.distribution}")
        install += " --no-cache-dir"
    return [*steps, f"export MAX_JOBS={build['memory'].facts['max_jobs']}", install]
