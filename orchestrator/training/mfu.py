"""MFU, model FLOPs utilisation: which part of what a processor can multiply goes into the model.

    MFU = tokens/s x FLOPs per token / peak FLOPs/s
    FLOPs per token = 6 N + 6 L C T

N: the parameters that a token is multiplied with: all but the position embeddings (and but the token embeddings where
the head has weights of its own), since these are looked up. 2 FLOPs for each forward, 4 backward. The second term is
attention, the two products Q K^T and weights x values: L layers, C wide, T tokens, with the half of the T x T table
that a causal mask leaves, as llm.c counts. nanoGPT counts the whole table, 12 L C T: a higher MFU for one run.

What is computed again (activation checkpointing, the loss in chunks) does not count: it is not the model's work. Nor do
additions, norms, activations, and the turning of rotary positions.
Source: "PaLM: Scaling Language Modeling with Pathways" (Chowdhery et al., 2022), appendix B.
"""

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch

from GPT2Model.config import complete
from orchestrator.evaluation.estimates import count_parameters, embedding_parameters
from orchestrator.evaluation.machine import check_device, wait_for

TORCH_DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SECONDS = 0.4  # that a measurement takes, about


@dataclass(frozen=True)
class Peak:
    """What a processor can do at best.

    Attributes:
        flops: floating-point operations in a second.
        name: of the chip and the dtype, or how it was measured.
        source: where the number is from.
    """

    flops: float
    name: str
    source: str


# Dense, in 1e12 FLOPs/s, bf16 and fp16 summed in fp32. Datasheets since Ampere print twice that, "with sparsity": for
# matrices of which half is zero. A pattern is looked for in the name that torch gives, or that a user typed; the first
# that fits is taken. Not in it: laptop chips and other cut-down ones of the same name, and slices of a chip (MIG).
CHIPS = (
    ("H200", r"\bH200\b(?!.*NVL)", {"bf16": 989, "fp16": 989, "tf32": 494, "fp32": 67}),
    ("H100 PCIe", r"\bH100\b.*PCIe", {"bf16": 756, "fp16": 756, "tf32": 378, "fp32": 51}),
    ("H100 SXM", r"\bH100\b(?!.*NVL)", {"bf16": 989, "fp16": 989, "tf32": 494, "fp32": 67}),
    ("A100", r"\bA100\b", {"bf16": 312, "fp16": 312, "tf32": 156, "fp32": 19.5}),
    ("A10", r"\bA10\b", {"bf16": 125, "fp16": 125, "tf32": 62.5, "fp32": 31.2}),
    ("L40S", r"\bL40S\b", {"bf16": 362, "fp16": 362, "tf32": 183, "fp32": 91.6}),
    ("L4", r"\bL4\b", {"bf16": 121, "fp16": 121, "tf32": 60, "fp32": 30.3}),
    ("RTX 4090", r"\b4090$", {"bf16": 165.2, "fp16": 165.2, "tf32": 82.6, "fp32": 82.6}),
    ("RTX 3090", r"\b3090$", {"bf16": 71, "fp16": 71, "tf32": 35.6, "fp32": 35.6}),
    ("V100 PCIe", r"\bV100\b.*PCIe", {"fp16": 112, "fp32": 14}),
    ("V100 SXM", r"\bV100\b", {"fp16": 125, "fp32": 15.7}),
    ("T4", r"\bT4\b", {"fp16": 65, "fp32": 8.1}),
)
CUT_DOWN = r"\bMIG\b|Laptop|Max-Q"
WHITE_PAPERS = {
    "RTX 4090": 'NVIDIA, "Ada GPU Architecture", appendix A',
    "RTX 3090": 'NVIDIA, "Ampere GA102 GPU Architecture", appendix A',
}


def flops_per_token(cfg: Mapping, tokens: int, *, causal: bool = True) -> float:
    """FLOPs of training on one token: 6 N + 6 L C T, forward and backward.

    Args:
        cfg: the cfg dict. tokens: T, of a sequence.
        causal: False: 6 N + 12 L C T, attention over the whole table, as eager computes it and nanoGPT counts it.
    """
    cfg = complete(cfg)
    attention = (6 if causal else 12) * cfg["n_layers"] * cfg["emb_dim"] * tokens
    return 6.0 * multiplied_parameters(cfg) + attention


def multiplied_parameters(cfg: Mapping) -> int:
    """N: all parameters but those that are only looked up."""
    embeddings = embedding_parameters(cfg)
    looked_up = embeddings["position"] + (0 if complete(cfg)["tie_weights"] else embeddings["token"])
    return count_parameters(cfg) - looked_up


def mfu(cfg: Mapping, tokens: int, tokens_per_second: float, peak: Peak) -> float:
    """Which part of the peak training at this speed is: 1.0 would be all of it.

    Args:
        cfg: the cfg dict. tokens: T, of a sequence. tokens_per_second: trained on, in all sequences together.
        peak: of all processors that train, see `peak_flops`.
    """
    return tokens_per_second * flops_per_token(cfg, tokens) / peak.flops


def tokens_per_second_at(cfg: Mapping, tokens: int, part: float, peak: Peak) -> float:
    """The speed that an MFU of `part` means."""
    return part * peak.flops / flops_per_token(cfg, tokens)


def explain(cfg: Mapping, tokens: int, peak: Peak) -> str:
    """One line to print wherever an MFU stands: the formula, its numbers, and the peak."""
    cfg = complete(cfg)
    per_token = flops_per_token(cfg, tokens)
    without = " without position embeddings" if cfg["positions"] == "learned" else ""
    return (
        f"MFU = tokens/s x (6 N + 6 L C T) / peak: N = {multiplied_parameters(cfg):,} parameters{without}, "
        f"L = {cfg['n_layers']}, C = {cfg['emb_dim']}, T = {tokens}, attention causal: "
        f"{per_token / 1e9:.4g} GFLOP a token; peak {peak.flops / 1e12:.4g} TFLOP/s, {peak.name} ({peak.source})"
    )


def peak_flops(device: str, dtype: str) -> Peak:
    """The dense peak of a device in a dtype: from the table where the chip is in it, else measured.

    Args:
        device: of torch: "cpu", "cuda", "cuda:1", "mps"; or a chip by name, here or not: "A100", "H100 PCIe".
        dtype: "fp32", "tf32", "bf16" or "fp16". Where torch's matrix products in fp32 are set to use TF32, "fp32"
            means "tf32".
    Raises:
        ValueError: no device here and no chip of the table, or a dtype that the chip does not have.
    """
    if dtype not in TORCH_DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(TORCH_DTYPES)}, got {dtype!r}.")
    kind = str(device).partition(":")[0].lower()
    if kind in ("cpu", "cuda", "mps"):
        if kind == "cuda" and dtype == "fp32" and torch.get_float32_matmul_precision() != "highest":
            dtype = "tf32"
        name = torch.cuda.get_device_name(device) if kind == "cuda" and torch.cuda.is_available() else ""
        return known_peak(name, dtype) or measured_peak(str(device).lower(), dtype)
    found = known_peak(str(device), dtype)
    if found is None:
        chips = ", ".join(name for name, _, peaks in CHIPS if dtype in peaks)
        raise ValueError(
            f"the peak of {device!r} in {dtype} is not known. Known: {chips}; of cpu, cuda and mps it is measured. Or "
            "give the number of its datasheet, without sparsity: --peak_tflops X."
        )
    return found


def known_peak(name: str, dtype: str) -> Peak | None:
    """The table's peak for a chip's name, None where it has none."""
    if re.search(CUT_DOWN, name, re.IGNORECASE):
        return None
    for chip, pattern, peaks in CHIPS:
        if re.search(pattern, name, re.IGNORECASE):
            source = WHITE_PAPERS.get(chip, "its datasheet, without sparsity")
            return Peak(peaks[dtype] * 1e12, f"NVIDIA {chip}, dense {dtype}", source) if dtype in peaks else None
    return None


@lru_cache
def measured_peak(device: str, dtype: str) -> Peak:
    """The best of several products of two square matrices on this machine: what can be had, not what is printed.

    Once for each device and dtype in a process, in about half a second. A product of another size may be a little
    faster, so that an MFU near 1 by this peak is possible.

    Raises:
        ValueError: the device is not here.
    """
    check_device(device)
    size = 8192 if device.startswith("cuda") else 2048
    small = best_seconds(256, device, dtype, most=3)
    # Smaller for a slow processor, and for one that must emulate the dtype.
    while size > 256 and 4 * small * (size / 256) ** 3 > SECONDS:
        size //= 2
    seconds = best_seconds(size, device, dtype)
    threads = torch.get_num_threads()
    where = f", {threads} CPU thread{'s' * (threads > 1)}" if device == "cpu" else f", {device}"
    name = f"measured here: {size}x{size} matrix product, {dtype}{where}"
    return Peak(2 * size**3 / seconds, name, "best of several")


def best_seconds(size: int, device: str, dtype: str, most: int = 20) -> float:
    """Of one product; the first, which sets things up, does not count."""
    numbers = torch.Generator(device).manual_seed(0)  # of its own: a run's random numbers stay as they are
    a, b = (torch.randn(size, size, device=device, generator=numbers).to(TORCH_DTYPES[dtype]) for _ in range(2))
    best, runs, until = float("inf"), 0, time.perf_counter() + SECONDS
    a @ b
    wait_for(device)
    while runs < 3 or (runs < most and time.perf_counter() < until):
        began = time.perf_counter()
        a @ b
        wait_for(device)
        best, runs = min(best, time.perf_counter() - began), runs + 1
    return best
