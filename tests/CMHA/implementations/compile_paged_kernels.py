"""Compiles the kernels of attention over pages for GPUs that are not here, as compile_kernels.py does the others."""

import json
import sys

from CMHA.implementations import paged_triton_kernels
from tests.CMHA.implementations import compile_kernels

compile_kernels.flash_triton_kernels = paged_triton_kernels
compile_kernels.TYPES = {
    "rows": "*i64", "lengths": "*i32", "tables": "*i32", "partial": "*fp32", "maxima": "*fp32", "sums": "*fp32",
    "scale": "fp32",
}  # fmt: skip

if __name__ == "__main__":
    for job in json.load(sys.stdin):
        print(json.dumps(compile_kernels.compiled(job)), flush=True)
