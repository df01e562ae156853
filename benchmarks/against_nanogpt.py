"""One training step of GPT-2 124M, ours against nanoGPT's model, in interleaved pairs.

    python benchmarks/against_nanogpt.py PATH/TO/nanoGPT/model.py

The file that you name is imported, hence run. Both models get the same batch, the same fused AdamW and the same
clipping, fp32, no dropout. In each pair the order is swapped, so that a busy moment of the machine hits both alike; the
ratio of a pair is nanoGPT's time over ours (above 1: ours is faster), and the median over pairs is what counts.
"""

import argparse
import importlib.util
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from tqdm import tqdm

from GPT2Model.config import from_preset
from GPT2Model.gpt2 import GPTModel
from orchestrator.text.corpora import first_tokens, python_docs
from orchestrator.training.loop import next_token_loss
from orchestrator.training.optimizer import make_optimizer


def load_nanogpt(path: Path):
    """nanoGPT's GPT, 124M, bias on and dropout off."""
    spec = importlib.util.spec_from_file_location("nanogpt_model", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module.GPT(module.GPTConfig(vocab_size=50257, block_size=1024, dropout=0.0, bias=True))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="nanoGPT's model.py")
    parser.add_argument("--pairs", type=int, default=14, help="counted pairs of steps (default: 14)")
    parser.add_argument("--batch", type=int, default=4, help="sequences (default: 4)")
    parser.add_argument("--tokens", type=int, default=256, help="tokens in a sequence (default: 256)")
    args = parser.parse_args()
    if not args.model.is_file():
        print(f"error: {args.model} is not a file: pass the path of nanoGPT's model.py", file=sys.stderr)
        return 2

    inputs, targets = first_tokens(python_docs(), batch=args.batch, tokens=args.tokens)
    ours = GPTModel(from_preset("gpt2", drop_rate=0.0, attn_implementation="sdpa")).train()
    theirs = load_nanogpt(args.model).train()
    losses = {
        "ours": lambda: next_token_loss(ours(inputs), targets),
        "nanoGPT": lambda: theirs(inputs, targets)[1],
    }
    models = {"ours": ours, "nanoGPT": theirs}
    optimizers = {name: make_optimizer(model, 1e-4, 0.1, (0.9, 0.95)) for name, model in models.items()}

    def step(name: str) -> float:
        start = time.perf_counter()
        losses[name]().backward()
        torch.nn.utils.clip_grad_norm_(models[name].parameters(), 1.0)
        optimizers[name].step()
        optimizers[name].zero_grad(set_to_none=True)
        return time.perf_counter() - start

    for name in models:
        step(name)  # the first step sets up buffers
    seconds = {name: [] for name in models}
    for pair in tqdm(range(args.pairs), desc="pairs", unit="pair"):
        for name in sorted(models, reverse=pair % 2 == 1):
            seconds[name].append(step(name))
    ratios = sorted(theirs / ours for ours, theirs in zip(seconds["ours"], seconds["nanoGPT"], strict=True))
    for name, values in seconds.items():
        print(f"{name:8} median step {statistics.median(values):.3f} s ({min(values):.3f} to {max(values):.3f})")
    print(f"speed against nanoGPT: median {statistics.median(ratios):.3f}x ({ratios[0]:.3f} to {ratios[-1]:.3f})")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
