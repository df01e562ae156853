"""Are int8 weights faster than float ones, and by which kernel? All contenders in turn, in one run.

    python benchmarks/int8_against_float.py                       the matrices of GPT-2 124M, then whole models: minutes
    python benchmarks/int8_against_float.py --rows 1 8 --rounds 12 --skip_models
    python benchmarks/int8_against_float.py --preset nano --rows 1 --rounds 2 --tokens 4       does it run?

First the matrix products alone: `rows` tokens through every matrix of the model, one contender after the other in an
order drawn anew for each round; a contender's time is divided by F.linear's in float32 of the same round. Then whole
models: one new token with a cache, and a prompt that is read. The tables give medians, with the middle half in
brackets. Times swing with whatever else the machine does: run it when nothing else runs.
"""

import argparse
import json
import random
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F
from tqdm.auto import tqdm

from GPT2Model.config import PRESET_ALIASES, PRESETS, from_preset
from GPT2Model.files import replace_text
from GPT2Model.generation import make_cache
from GPT2Model.gpt2 import GPTModel
from GPT2Model.int8_matmul import ALIGNED, by_digits, by_floats, by_packed
from GPT2Model.quantization import quantize_int8, quantize_rows, weight_bytes
from orchestrator.evaluation.machine import machine_facts

RESULTS = Path(__file__).resolve().parent / "results" / "cpu-int8-against-float.json"
BASE = "float32: F.linear"


def contenders(weights: list[torch.Tensor]) -> dict[str, tuple[torch.dtype, Callable]]:
    """name -> (dtype of x, the product of x, keyed by its width, with every matrix)."""
    stored = [quantize_rows(weight) for weight in weights]
    named: dict[str, tuple[torch.dtype, Callable]] = {}

    def add(name: str, dtype: torch.dtype, one: Callable, of: list) -> None:
        def all_of_them(x: dict[int, torch.Tensor]) -> None:
            for width, prepared in of:
                one(x[width], prepared)

        named[name] = (dtype, all_of_them)

    def halves(x, pair):
        return torch.bmm(x.expand(2, -1, -1), pair)

    widths = [weight.shape[1] for weight in weights]
    for dtype, name in ((torch.float32, "float32"), (torch.bfloat16, "bfloat16")):
        floats = [weight.to(dtype) for weight in weights]
        pairs = [f[: len(f) // 2 * 2].view(2, len(f) // 2, -1).mT for f in floats]
        add(f"{name}: F.linear", dtype, F.linear, list(zip(widths, floats, strict=True)))
        add(f"{name}: bmm over two halves", dtype, halves, list(zip(widths, pairs, strict=True)))
        both = list(zip(widths, stored, strict=True))
        add(f"int8, {name}: by_digits", dtype, lambda x, qs: by_digits(x, *qs), both)
        add(f"int8, {name}: by_floats", dtype, lambda x, qs: by_floats(x, *qs), both)
        if all(width % ALIGNED == 0 for width in widths):  # else this op reads past the end of a row
            add(f"int8, {name}: by_packed", dtype, lambda x, qs: by_packed(x, *qs), both)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch means to remove it
        dynamic = [quantized_dynamically(weight) for weight in weights]
    name = "int8 weights and activations: quantize_dynamic"
    add(name, torch.float32, lambda x, layer: layer(x), list(zip(widths, dynamic, strict=True)))
    return named


def quantized_dynamically(weight: torch.Tensor) -> torch.nn.Module:
    layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight.data = weight
    return torch.ao.quantization.quantize_dynamic(torch.nn.Sequential(layer), {torch.nn.Linear}, dtype=torch.qint8)


def in_turn(functions: dict[str, Callable], rounds: int, base: str, what: str) -> list[dict]:
    """Medians over rounds in which each function runs once, in an order drawn anew."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        function()
    for _ in tqdm(range(rounds), desc=what, leave=False):
        for name in random.sample(list(functions), len(functions)):
            started = time.perf_counter()
            functions[name]()
            times[name].append(time.perf_counter() - started)
    rows = []
    for name, found in times.items():
        speeds = sorted(one / other for one, other in zip(times[base], found, strict=True))
        rows.append(
            {
                "what": what,
                "contender": name,
                "milliseconds": 1e3 * statistics.median(found),
                "speed": statistics.median(speeds),
                "middle_half": [speeds[len(speeds) // 4], speeds[-1 - len(speeds) // 4]],
            }
        )
    return rows


def matrix_products(model: GPTModel, counts: list[int], rounds: int) -> list[dict]:
    linears = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    named = contenders([layer.weight.detach() for layer in linears])
    rows = []
    for count in counts:
        x = {layer.in_features: torch.randn(count, layer.in_features) for layer in linears}
        kinds = {dtype: {width: row.to(dtype) for width, row in x.items()} for dtype, _ in named.values()}
        functions = {name: lambda run=run, x=kinds[dtype]: run(x) for name, (dtype, run) in named.items()}
        rows += in_turn(functions, rounds, BASE, f"matrices, {count} rows")
    return rows


def whole_models(model: GPTModel, tokens: int, rounds: int) -> list[dict]:
    """A new token after `tokens` others, and a prompt of so many."""
    models = {"float32": model, "int8, float32": quantize_int8(model)}
    models["bfloat16"] = GPTModel(model.cfg).to(torch.bfloat16).eval()
    models["int8, bfloat16"] = quantize_int8(model).to(torch.bfloat16)
    ids, rows = torch.randint(0, model.cfg["vocab_size"], (1, tokens + 1)), []

    def writer(one: GPTModel) -> Callable:
        cache = make_cache(one, 1, tokens + 1)
        one(ids[:, :tokens], None, cache)

        def write() -> None:
            for layer in cache.layers:
                layer.length = tokens
            one(ids[:, tokens:], None, cache)

        return write

    writers = {name: writer(one) for name, one in models.items()}
    rows += in_turn(writers, rounds, "float32", f"one new token after {tokens}")
    readers = {name: lambda one=one: one(ids[:, :tokens]) for name, one in models.items()}
    rows += in_turn(readers, rounds, "float32", f"a prompt of {tokens}")
    for row in rows:
        row["weight_bytes"] = weight_bytes(models[row["contender"]])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ", ".join([*PRESETS, *PRESET_ALIASES])
    parser.add_argument("--preset", default="gpt2", help=f"whose matrices: {names} (default: gpt2)")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 16, 64, 256], help="tokens that are multiplied")
    parser.add_argument("--tokens", type=int, default=128, help="of context for the whole models (default: 128)")
    parser.add_argument("--rounds", type=int, default=15, help="times that each runs (default: 15)")
    parser.add_argument("--skip_models", action="store_true", help="the matrix products alone")
    parser.add_argument(
        "--out", type=Path, default=RESULTS, help=f"JSON file (default: benchmarks/results/{RESULTS.name})"
    )
    args = parser.parse_args()
    torch.manual_seed(0)
    random.seed(0)
    model = GPTModel(from_preset(args.preset, drop_rate=0.0)).eval()
    with torch.inference_mode():
        rows = matrix_products(model, args.rows, args.rounds)
        rows += [] if args.skip_models else whole_models(model, args.tokens, args.rounds)
    for row, before in zip(rows, [None, *rows], strict=False):
        if before is None or before["what"] != row["what"]:
            print(f"\n{row['what']:48} {'ms':>9} {'speed':>7}   (middle half)")
        size = f"  {row['weight_bytes'] / 2**20:.0f} MiB" if "weight_bytes" in row else ""
        low, high = row["middle_half"]
        print(
            f"  {row['contender']:46} {row['milliseconds']:9.2f} {row['speed']:6.2f}x   ({low:.2f} to {high:.2f}){size}"
        )
    report = {
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "machine": machine_facts("cpu"),
        "method": "each round runs every contender once in a new order; speed: F.linear's time in float32 / its own",
        "settings": {name: str(value) if name == "out" else value for name, value in vars(args).items()},
        "rows": rows,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    replace_text(args.out, json.dumps(report, indent=2) + "\n")
    print(f"\nwritten: {args.out}")


if __name__ == "__main__":
    main()
