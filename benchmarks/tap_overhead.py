"""Do the taps that trace() listens to cost anything when nobody traces? Side by side with the same code without them.

    python benchmarks/tap_overhead.py

The functions that hold taps are compiled a second time from their own source with each `tap(name, value)` replaced by
`value`. Both are then timed in turn, in an order drawn anew for each round: one new token of a small model with a cache
(where Python's own time weighs most), a short prompt, and a longer one.
"""

import argparse
import ast
import json
import random
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from tqdm.auto import tqdm

import CMHA.cmha
import CMHA.implementations.eager
import TransformerBlock.transformer_block as blocks
from CMHA.cmha import MultiHeadAttention
from GPT2Model.config import from_preset
from GPT2Model.generation import make_cache
from GPT2Model.gpt2 import GPTModel
from TransformerBlock.transformer_block import TransformerBlock


class TapRemover(ast.NodeTransformer):
    removed = 0

    def visit_Call(self, node):
        self.generic_visit(node)
        if isinstance(node.func, ast.Name) and node.func.id == "tap":
            self.removed += 1
            return node.args[1]
        return node


def without_taps(module) -> dict:
    """The names of a module, made from its source with the taps taken out."""
    remover = TapRemover()
    tree = ast.fix_missing_locations(remover.visit(ast.parse(Path(module.__file__).read_text(encoding="utf-8"))))
    if not remover.removed:
        raise RuntimeError(f"{module.__name__} holds no tap: nothing would be compared.")
    names = {"__name__": module.__name__, "__file__": module.__file__}
    exec(compile(tree, module.__file__, "exec"), names)
    return names


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=300, help="pairs of measurements for each case (default: 300)")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    rounds, as_json = vars(parser.parse_args()).values()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    # Code objects are exchanged, not functions: what was chosen once and is kept runs the other code too.
    functions = {
        CMHA.implementations.eager.attention: without_taps(CMHA.implementations.eager)["attention"],
        MultiHeadAttention.forward: without_taps(CMHA.cmha)["MultiHeadAttention"].forward,
        TransformerBlock.forward: without_taps(blocks)["TransformerBlock"].forward,
    }
    code = {
        "tapped": {function: function.__code__ for function in functions},
        "bare": {function: other.__code__ for function, other in functions.items()},
    }

    def use(which: str) -> None:
        for function, its_code in code[which].items():
            function.__code__ = its_code

    rows = []
    for name in ("eager", "sdpa"):
        model = GPTModel(from_preset("nano", vocab_size=177, attn_implementation=name)).eval()
        for tokens in (1, 16, 64):
            ids = torch.randint(0, 177, (1, tokens))
            cache = make_cache(model, 1, 64)

            def one_pass(model=model, ids=ids, cache=cache, tokens=tokens) -> float:
                for layer in cache.layers:
                    layer.length = 32 if tokens == 1 else 0
                start = time.perf_counter()
                model(ids, None, cache)
                return time.perf_counter() - start

            with torch.no_grad():
                use("bare")
                expected = (one_pass(), model(ids))[1]
                use("tapped")
                if not torch.equal(model(ids), expected):
                    raise RuntimeError("with and without taps the logits differ")
                times = {"tapped": [], "bare": []}
                for _ in tqdm(range(rounds), desc=f"{name}, {tokens} tokens", leave=False):
                    for which in random.sample(["tapped", "bare"], 2):
                        use(which)
                        times[which].append(statistics.median(one_pass() for _ in range(5)))
            ratios = sorted(one / other for one, other in zip(times["tapped"], times["bare"], strict=True))
            rows.append(
                {
                    "attention": name,
                    "tokens": tokens,
                    "milliseconds": 1e3 * statistics.median(times["tapped"]),
                    "ratio": statistics.median(ratios),
                    "middle_half": [ratios[len(ratios) // 4], ratios[-len(ratios) // 4]],
                }
            )
    use("tapped")
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    print("time with taps / time without: median of the pairs, and their middle half; same bits in both")
    for row in rows:
        low, high = row["middle_half"]
        where = f"{row['attention']:6} {row['tokens']:3} tokens, {row['milliseconds']:6.2f} ms"
        print(f"{where}   {row['ratio']:.4f}   ({low:.3f} to {high:.3f})")


if __name__ == "__main__":
    main()
