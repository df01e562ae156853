"""Attention in one call: what this machine has, the same numbers with and without flash, padding, tiles, gradients.

    python examples/example_flash_attention.py

Runs anywhere in a few seconds. Exit code 1 if something that should agree does not.
"""

import json
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the packages lie one folder up, installed or not

import torch

from CMHA.adaptive import adaptive_flash_attention
from CMHA.choosing import get_flash_attention_config
from orchestrator.evaluation.memory import peak_tensor_bytes


def main() -> int:
    torch.manual_seed(0)
    print("What this machine has:")
    print(json.dumps(get_flash_attention_config(), indent=2))

    # Two sequences, four heads, 300 tokens, 64 numbers a head. On a GPU: .cuda(), and bfloat16.
    query, key, value = (torch.randn(2, 4, 300, 64) for _ in range(3))
    padding_mask = torch.ones(2, 300, dtype=torch.bool)
    padding_mask[1, :40] = False  # the second sequence is shorter: 40 padded places on its left

    flash = adaptive_flash_attention(query, key, value, padding_mask=padding_mask)
    manual = adaptive_flash_attention(query, key, value, padding_mask=padding_mask, use_flash_attention=False)
    exact = adaptive_flash_attention(
        query.double(), key.double(), value.double(), padding_mask=padding_mask, use_flash_attention=False
    )
    limit = 2 * distance(manual, exact) + 4 * torch.finfo(torch.float32).eps * float(value.abs().max())
    agree = distance(flash, exact) <= limit
    print(f"\ndistance from float64: flash {distance(flash, exact):.1e}, manual {distance(manual, exact):.1e}")
    print(f"limit: {limit:.1e}, twice manual's and a few units of rounding; they agree: {agree}")

    # A query that may see nothing, the padded places here, gives exactly zero: no NaN.
    empty = bool((flash[1, :, :40] == 0).all())
    print(f"the 40 queries that may see nothing are exactly zero: {empty}")

    # Tiles of any size give the same up to the last digits: they only change the order of a sum.
    print("\ntiles of flash_tiled, distance from float64:")
    tiles_agree = True
    for size in (16, 64, 300):
        tiled = adaptive_flash_attention(
            query, key, value, padding_mask=padding_mask, query_block_size=size, kv_block_size=size
        )
        tiles_agree &= distance(tiled, exact) <= limit
        print(f"  {size:3} x {size:3}: {distance(tiled, exact):.1e}")

    # Why flash: no table of 300 x 300 weights for each head. Here over 2048 tokens, with gradients.
    print("\npeak memory of one call and its backward pass, 2048 tokens, one head:")
    long = [torch.randn(1, 1, 2048, 64, requires_grad=True) for _ in range(3)]
    for toggle in (True, False):
        call = partial(adaptive_flash_attention, *long, use_flash_attention=toggle)
        memory = peak_tensor_bytes(lambda call=call: call().sum().backward())
        print(f"  use_flash_attention={toggle}: {memory.peak / 2**20:.1f} MiB")

    passed = agree and empty and tiles_agree
    print(f"\n{'PASS' if passed else 'FAIL'}")
    return 0 if passed else 1


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one.double() - other.double()).abs().max())


if __name__ == "__main__":
    raise SystemExit(main())
