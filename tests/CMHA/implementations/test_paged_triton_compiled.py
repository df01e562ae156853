"""The kernels of attention over pages under Triton's real compiler, for GPUs that need not be here."""

import json
import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch

from CMHA.implementations.paged_triton import SPLIT, sizes
from tests.CMHA.implementations.test_flash_triton_compiled import ROOT, SHARED

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def decode(dtype, capability, head_dim, group=1, block_size=16, one_split=False, **ones) -> dict:
    width = max(16, 1 << (head_dim - 1).bit_length())
    kind = sizes(group, width, DTYPES[dtype])
    warps = kind.pop("num_warps")
    kind |= {"HEAD_DIM": head_dim, "WIDTH": width, "SPLIT": SPLIT, "BLOCK_SIZE": block_size, "ONE_SPLIT": one_split}
    kind |= {"WIDEN": False} | ones
    return {"kernel": "decode", "dtype": dtype, "capability": capability, "kind": kind, "warps": warps, "stages": 3}


def combine(dtype, capability, head_dim) -> dict:
    kind = {"HEAD_DIM": head_dim, "WIDTH": max(16, 1 << (head_dim - 1).bit_length()), "SPLIT": SPLIT}
    return {"kernel": "combine", "dtype": dtype, "capability": capability, "kind": kind, "warps": 4, "stages": 3}


def compile_all(jobs: list[dict]) -> list[dict]:
    """In a process of its own, since triton is an interpreter in this one."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, Path(__file__).with_name("compile_paged_kernels.py")]
    done = subprocess.run(command, input=json.dumps(jobs), env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


HANDFUL = [
    decode("bf16", 90, 64),
    decode("bf16", 100, 64, group=4, one_split=True),
    decode("fp16", 80, 80, group=3, block_size=3),
    decode("fp32", 80, 64),
    decode("bf16", 90, 64, heads=1, splits=1, most_blocks=1, one_split=True),  # a launch makes a constant of every 1
    combine("bf16", 90, 64),
    combine("fp32", 80, 20),
]


@pytest.fixture(scope="module")
def handful():
    return list(zip(HANDFUL, compile_all(HANDFUL), strict=True))


def test_a_handful_that_has_every_dtype_compiles_fits_and_spills_nothing(handful):
    assert len(handful) == len(HANDFUL)
    for asked, needs in handful:
        assert needs["shared"] <= SHARED[asked["capability"]], asked
        assert needs["spilled"] == 0, asked


def test_float32_is_multiplied_in_full_and_the_others_by_tensor_cores(handful):
    for asked, needs in handful:
        assert not needs["tf32"], asked
        assert needs["tensor_cores"] == (asked["kernel"] == "decode" and asked["dtype"] != "fp32"), asked


def test_no_program_adds_to_what_another_adds_to(handful):
    assert not any(needs["atomics"] for _, needs in handful)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("capability", SHARED)
def test_the_widest_heads_and_the_largest_groups_fit(capability, dtype):
    jobs = [decode(dtype, capability, head_dim, group) for head_dim, group in product((16, 128, 256), (1, 64))]
    for asked, needs in zip(jobs, compile_all(jobs), strict=True):
        assert needs["shared"] <= SHARED[capability], (asked, needs)
