"""Compiles our kernels with Triton's real compiler for GPUs that are not here. test_flash_triton_compiled.py starts it.

Reads a JSON list of jobs from standard input and writes one JSON line for each: what a program of the kernel needs.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from CMHA.implementations import flash_triton_kernels

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TENSORS = {"queries", "keys", "values", "context", "grad_context", "grad_queries", "grad_keys", "grad_values"}
TYPES = {"query_texts": "*i32", "key_texts": "*i32", "seed": "*i64", "log_sum_exp": "*fp32", "delta": "*fp32",
         "scale": "fp32", "grad_scale": "fp32", "keep_scale": "fp32"}  # fmt: skip
NEEDED_BY = {"query_texts": "TEXTS", "key_texts": "TEXTS", "seed": "DROPOUT"}


def compiled(job: dict) -> dict:
    """One kernel: `kernel`, `dtype`, `capability`, `kind` (its constexprs), `warps`, `stages`."""
    function, kind = getattr(flash_triton_kernels, job["kernel"]), job["kind"]
    signature, constants = {}, {}
    for place, name in enumerate(function.arg_names):
        absent = name in NEEDED_BY and not kind[NEEDED_BY[name]]
        if name in kind or absent:
            signature[name], constants[place,] = "constexpr", kind.get(name)
        else:
            signature[name] = f"*{job['dtype']}" if name in TENSORS else TYPES.get(name, "i32")
    aligned = {  # as a launch finds them: memory begins at multiples of 16 bytes, and so do tokens and heads
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(function.arg_names)
        if signature[name].startswith("*") or name.endswith(("_batch", "_head", "_token"))
    }
    source = ASTSource(fn=function, signature=signature, constexprs=constants, attrs=aligned)
    options = {"num_warps": job["warps"], "num_stages": job["stages"]}
    made = triton.compile(source, target=GPUTarget("cuda", job["capability"], 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        command = [TOOLS / "cuobjdump", "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    ptx = made.asm["ptx"]
    return {
        "shared": made.metadata.shared,  # bytes
        "registers": int(registers),  # of each thread
        "spilled": int(stack),  # bytes of each thread that found no register
        "tf32": "tf32" in ptx,
        "tensor_cores": "wgmma" in ptx or "mma.sync" in ptx or "tcgen05" in ptx,
        "atomics": re.search(r"\b(atom|red)\.", ptx) is not None,
    }


if __name__ == "__main__":
    for job in json.load(sys.stdin):
        print(json.dumps(compiled(job)), flush=True)
