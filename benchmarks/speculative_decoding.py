"""What does a draft gain? Tokens per second with speculative decoding and without, and how many guesses are accepted.

    python benchmarks/speculative_decoding.py                                  two models that learn the tales here
    python benchmarks/speculative_decoding.py --model gpt2-large --draft gpt2  your own: folders, or names on the hub
    python benchmarks/speculative_decoding.py --quick                          a few steps and tokens: tries the script

A random model is of no use here: nobody can guess what it writes. So both learn the tales first, `--model` 8 layers 256
wide and `--draft` 1 layer 64 wide, unless folders are named. `--draft int8` takes the model itself with int8 weights.

Each prompt is continued by the model alone (`generate`, with its cache) and with the draft, in turn, in an order drawn
each time, greedily and at temperature 1. The ratio is the time alone over the time with the draft, in the same round:
above 1 the draft pays. Greedy, the tokens are compared. "accepted" is of the guesses that were judged. "expected" is
the gain that Leviathan et al., 2023, theorem 3.8 gives for guesses that are accepted independently:
(1 - a^(g + 1)) / ((1 - a) (g c + 1)), with a the acceptance rate, g the guesses of a round, and c the time of one token
in the draft over that in the model. It holds where reading g + 1 tokens costs what reading one does.
"""

import argparse
import json
import random
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from tqdm.auto import tqdm

from GPT2Model.config import from_preset
from GPT2Model.generation import generate, make_cache
from GPT2Model.gpt2 import GPTModel
from GPT2Model.quantization import quantize_int8
from GPT2Model.sampling import Sampling
from GPT2Model.speculative import generate_speculative
from GPT2Model.tokenizer import get_tokenizer
from orchestrator.evaluation.machine import machine_facts
from orchestrator.learning.trained import RECIPE
from orchestrator.text.corpora import TalesCorpus
from orchestrator.training.loop import train

RESULT = Path(__file__).resolve().parent / "results" / "cpu-speculative-decoding.json"
SHAPES = {"model": {"n_layers": 8, "emb_dim": 256, "n_heads": 8}, "draft": {"n_layers": 1, "emb_dim": 64, "n_heads": 2}}
GUESSES = (1, 2, 4, 8)
TEXT = "The history of the world is the history of"  # what models of English continue; those of tales have their own


def learned(shape: dict, steps: int) -> GPTModel:
    """A model of this shape that has learned the tales, by the recipe of the notebooks' model."""
    corpus = TalesCorpus(0, held_out=50)
    torch.manual_seed(0)
    model = GPTModel(from_preset("nano", vocab_size=corpus.tokenizer.vocab_size, drop_rate=0.0, **shape))
    # A wide model at the narrow one's rate would not learn: the rate falls with the width.
    rate = RECIPE.learning_rate * min(1.0, 128 / shape["emb_dim"])
    settings = replace(RECIPE, max_steps=steps, warmup_steps=min(steps, RECIPE.warmup_steps), learning_rate=rate)
    history = train(model, corpus, replace(settings, eval_steps=steps))
    print(f"{shape}: {history.validation[-1][1]:.4f} nats/token, exact floor {corpus.floor:.4f}")
    return model.eval()


def prompts_of(count: int, own: bool) -> list[torch.Tensor]:
    """The first words of stories that nobody has learned, or a line of English."""
    if not own:
        tokenizer = get_tokenizer()
        return [torch.tensor([tokenizer.encode(TEXT)])] * count
    corpus = TalesCorpus(0, held_out=count)
    end = corpus.tokenizer.end_of_text
    return [torch.tensor([[end, *corpus.tokenizer.encode(story)[:8]]]) for story in corpus.held_out]


@torch.no_grad()
def seconds_of_a_token(model: GPTModel, tokens: int = 1) -> float:
    """Reading `tokens` behind a prompt of 32, with a cache: the median of many."""
    cache, times = make_cache(model, 1, 64), []
    model(torch.zeros(1, 32, dtype=torch.long), cache=cache)
    for _ in range(60):
        cache.truncate(32)
        start = time.perf_counter()
        model(torch.zeros(1, tokens, dtype=torch.long), cache=cache)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def one_setting(model, draft, prompts, new_tokens: int, temperature: float, guesses: int) -> dict:
    """Every prompt both ways, in turn."""
    ratios, rates, counts = [], {"alone": [], "speculative": []}, {"accepted": 0, "rejected": 0, "rounds": 0}
    written, same = 0, 0
    for number, ids in enumerate(tqdm(prompts, desc=f"temperature {temperature:g}, {guesses} guesses", leave=False)):
        found, seconds = {}, {}
        for which in random.sample(["alone", "speculative"], 2):
            start = time.perf_counter()
            if which == "alone":
                found[which] = generate(model, ids, new_tokens, temperature, seed=number)
            else:
                sampling = Sampling(temperature, seed=number)
                result = generate_speculative(model, draft, ids, new_tokens, sampling, draft_tokens=guesses)
                found[which] = result.ids
            seconds[which] = time.perf_counter() - start
            rates[which].append(new_tokens / seconds[which])
        counts = {name: before + getattr(result, name) for name, before in counts.items()}
        ratios.append(seconds["alone"] / seconds["speculative"])
        written += new_tokens
        same += torch.equal(found["alone"], found["speculative"])
    return {
        "temperature": temperature,
        "guesses": guesses,
        "tokens_per_second": {which: statistics.median(all_of_them) for which, all_of_them in rates.items()},
        "ratio": statistics.median(ratios),
        "middle_half": statistics.quantiles(ratios, n=4)[::2],
        "acceptance_rate": counts["accepted"] / max(1, counts["accepted"] + counts["rejected"]),
        "tokens_per_pass": written / counts["rounds"],
        "same_texts": f"{same} of {len(prompts)}" if temperature == 0 else None,
    }


def expected_gain(rate: float, guesses: int, cost: float) -> float:
    """Leviathan et al., 2023, theorem 3.8."""
    tokens = guesses + 1 if rate == 1 else (1 - rate ** (guesses + 1)) / (1 - rate)
    return tokens / (guesses * cost + 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder or a name on the hub (default: one that learns the tales here)")
    parser.add_argument("--draft", help='a folder, a name, or "int8" (default: a small one that learns the tales here)')
    parser.add_argument("--prompts", type=int, default=12, help="texts to continue (default: 12)")
    parser.add_argument("--new-tokens", type=int, default=40, help="tokens to write behind each (default: 40)")
    parser.add_argument("--quick", action="store_true", help="a few steps and tokens: NOT A MEASUREMENT")
    asked = parser.parse_args()
    if asked.model and not asked.draft:
        parser.error("--model FOLDER needs --draft FOLDER too, or --draft int8: a model of tales cannot guess for it")
    if asked.draft not in (None, "int8") and not asked.model:
        parser.error("--draft FOLDER needs --model FOLDER too: it cannot guess tales")
    if asked.quick:
        asked.prompts, asked.new_tokens = 2, 8
    steps, shapes = (3, {name: {**shape, "n_layers": 1} for name, shape in SHAPES.items()}) if asked.quick else (
        RECIPE.max_steps, SHAPES
    )  # fmt: skip

    def opened(name: str | None, role: str) -> GPTModel:
        return GPTModel.from_pretrained(name).eval() if name else learned(shapes[role], steps)

    model = opened(asked.model, "model")
    draft = quantize_int8(model) if asked.draft == "int8" else opened(asked.draft, "draft")
    prompts = prompts_of(asked.prompts, own=not asked.model)
    random.seed(0)
    one_setting(model, draft, prompts[:2], asked.new_tokens, 0.0, 4)  # everybody warms up
    one = seconds_of_a_token(model)
    cost = seconds_of_a_token(draft) / one
    passes = {guesses: seconds_of_a_token(model, guesses + 1) / one for guesses in GUESSES}
    rows = []
    for temperature in (0.0, 1.0):
        for guesses in GUESSES:
            row = one_setting(model, draft, prompts, asked.new_tokens, temperature, guesses)
            rows.append({**row, "expected": expected_gain(row["acceptance_rate"], guesses, cost)})

    print(f"one token costs the draft {cost:.2f} of what it costs the model (c)")
    print("reading g + 1 tokens costs the model, in single ones: ", end="")
    print(", ".join(f"{guesses + 1}: {times:.2f}" for guesses, times in passes.items()))
    print(
        "temperature  guesses  accepted  tokens/pass  alone tokens/s  with draft  ratio (middle half)   expected  same"
    )
    for row in rows:
        speed, (low, high) = row["tokens_per_second"], row["middle_half"]
        cells = [
            f"{row['temperature']:11g}", f"{row['guesses']:7}", f"{row['acceptance_rate']:8.2f}",
            f"{row['tokens_per_pass']:11.2f}", f"{speed['alone']:14.1f}", f"{speed['speculative']:10.1f}",
            f"{row['ratio']:5.2f} ({low:.2f} to {high:.2f})", f"{row['expected']:8.2f}", row["same_texts"] or "",
        ]  # fmt: skip
        print("  ".join(cells).rstrip())
    if asked.quick:
        print("--quick: NOT A MEASUREMENT, nothing is kept")
        return
    names = {"model": asked.model or SHAPES["model"], "draft": asked.draft or SHAPES["draft"]}
    found = {"machine": machine_facts(), **names, "cost_of_draft": cost, "cost_of_reading_more": passes, "rows": rows}
    RESULT.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(f"kept in {RESULT}")


if __name__ == "__main__":
    main()
