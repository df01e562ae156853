"""Our GPU kernels under Triton's real compiler, for GPUs that need not be here: they compile, and their tiles fit.

The interpreter takes Python that the compiler refuses, and knows no limits. What is counted here, shared memory and
registers, says whether a kernel can run; how fast it runs, only a GPU can say.
"""

import json
import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest

from CMHA.implementations.flash_triton import ROOM, ROOM_FLOAT32, TILES, fitting

ROOT = Path(__file__).resolve().parent.parent.parent.parent
SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes that a program may have
KERNELS = ("forward", "backward_delta", "backward_dkdv", "backward_dq")
OFF = {"CAUSAL": False, "WINDOW": False, "TEXTS": False, "DROPOUT": False}
CAUSAL, ON = OFF | {"CAUSAL": True}, dict.fromkeys(OFF, True)


def job(kernel, dtype, capability, head_dim, features, tile=(64, 64, 4, 2)) -> dict:
    width = max(16, 1 << (head_dim - 1).bit_length())
    kind = {"HEAD_DIM": head_dim, "WIDTH": width, "BLOCK_Q": tile[0], "WIDEN": False}
    if kernel == "backward_delta":
        kind["BLOCK_Q"] = 16
    else:
        kind |= {"BLOCK_K": tile[1], "LENGTH": 1024} | features
    return {"kernel": kernel, "dtype": dtype, "capability": capability, "kind": kind, "warps": tile[2],
            "stages": tile[3]}  # fmt: skip


def compile_all(jobs: list[dict]) -> list[dict]:
    """In a process of its own, since triton is an interpreter in this one."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, Path(__file__).with_name("compile_kernels.py")]
    done = subprocess.run(command, input=json.dumps(jobs), env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


SMALL = (32, 32, 4, 2)
HANDFUL = [
    *(job(kernel, "bf16", 90, 64, CAUSAL) for kernel in KERNELS),
    *(job(kernel, "fp16", 80, 80, ON, SMALL) for kernel in KERNELS),
    *(job(kernel, "fp32", 80, 16, ON, (16, 16, 4, 1)) for kernel in KERNELS[2:]),
    job("forward", "fp32", 90, 32, OFF, (16, 32, 4, 1)),
    job("forward", "bf16", 100, 64, CAUSAL),
    job("forward", "bf16", 90, 64, CAUSAL | {"group": 1, "query_len": 1}),  # a launch makes a constant of every 1
    job("backward_dkdv", "bf16", 90, 64, CAUSAL | {"group": 1, "heads": 1}),
]


@pytest.fixture(scope="module")
def handful():
    return list(zip(HANDFUL, compile_all(HANDFUL), strict=True))


def test_a_handful_that_has_every_kernel_dtype_and_feature_compiles_and_fits(handful):
    assert len(handful) == len(HANDFUL)
    for asked, needs in handful:
        assert needs["shared"] <= SHARED[asked["capability"]], asked


def test_float32_is_multiplied_in_full_and_the_others_by_tensor_cores(handful):
    for asked, needs in handful:
        assert not needs["tf32"], asked
        assert needs["tensor_cores"] == (asked["dtype"] != "fp32"), asked


def test_no_program_adds_to_what_another_adds_to(handful):
    """Atomic sums come in an order of their own each time: the last bits would change from run to run."""
    assert not any(needs["atomics"] for _, needs in handful)


@pytest.mark.slow
@pytest.mark.parametrize("features", [CAUSAL, ON], ids=["causal", "all_features"])
@pytest.mark.parametrize(("dtype", "head_dim"), list(product(("bf16", "fp16", "fp32"), (16, 64, 128))), ids=str)
@pytest.mark.parametrize("capability", [80, 90])
def test_the_largest_sizes_that_may_be_given_fit_every_kernel(capability, dtype, head_dim, features):
    """So does the smallest of TILES, which is no larger: there is always one to be chosen."""
    q, k = fitting(128, 128, (ROOM_FLOAT32 if dtype == "fp32" else ROOM) // head_dim)
    tile = (q, k, 8 if q * k > 64 * 64 else 4, 2)
    for kernel, needs in zip(KERNELS, compile_all([job(name, dtype, capability, head_dim, features, tile)
                                                   for name in KERNELS]), strict=True):  # fmt: skip
        assert needs["shared"] <= SHARED[capability], (kernel, needs)


@pytest.mark.slow
@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_every_tile_that_is_tried_compiles_in_bf16(head_dim, tile):
    compile_all([job(kernel, "bf16", 90, head_dim, CAUSAL, tile) for kernel in KERNELS])
