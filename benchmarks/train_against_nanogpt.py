"""Two small GPTs learn the characters of one text, ours and nanoGPT's: equal steps, equal settings, side by side.

    python benchmarks/train_against_nanogpt.py PATH/TO/nanoGPT tinyshakespeare.txt --seeds 0 1 2 --steps 2000

The model.py in the folder that you name is imported, hence run. nanoGPT trains as its train.py does: its model without
biases, its own optimizer groups and AdamW, its schedule, batches at random offsets. Ours trains as `python train.py`
does: `orchestrator.training.loop` over `TokenWindows`, which reads every window once an epoch. Both have 4 layers, 4
heads, width 128, context 64, no dropout; batch 12, learning rate 1e-3 falling to 1e-4 by a cosine after 100 steps of
warmup, betas 0.9 and 0.99, weight decay 0.1, clipping at 1, float32. The first nine tenths of the text are learned, and
both are judged on *all* of the last tenth, window by window, by one function.

The two take turns, some steps each, and who begins changes from turn to turn, so that a busy moment of the machine hits
both alike. The ratio of a turn is nanoGPT's time over ours (above 1: ours is faster); the median over turns is what
counts.
"""

import argparse
import contextlib
import hashlib
import importlib.util
import io
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F
from tqdm import tqdm

from GPT2Model.config import from_preset
from GPT2Model.files import replace_text
from GPT2Model.gpt2 import GPTModel
from orchestrator.evaluation.machine import machine_facts
from orchestrator.text.corpora import IGNORED
from orchestrator.text.samples import Batch, TokenWindows
from orchestrator.text.tokenizers import CharTokenizer
from orchestrator.training.loop import start, train
from orchestrator.training.settings import TrainSettings

RESULTS = Path(__file__).resolve().parent / "results"
LAYERS, HEADS, WIDTH, CONTEXT, BATCH = 4, 4, 128, 64, 12
PEAK, LEAST, WARMUP, BETAS, WEIGHT_DECAY, CLIP = 1e-3, 1e-4, 100, (0.9, 0.99), 0.1, 1.0
WANTED = 0.02  # nats: the mean loss of ours may be so much above nanoGPT's


class Ours:
    """This project's model, trained by this project's loop."""

    def __init__(self, samples: TokenWindows, seed: int, steps: int, init_std: float | None):
        changes = {} if init_std is None else {"init_std": init_std}
        sizes = {"n_layers": LAYERS, "n_heads": HEADS, "emb_dim": WIDTH, "context_length": CONTEXT, "drop_rate": 0.0}
        torch.manual_seed(seed)
        self.model = GPTModel(from_preset("nano", **sizes, vocab_size=samples.tokenizer.vocab_size, **changes))
        self.settings = TrainSettings(
            max_steps=steps, batch_size=BATCH, learning_rate=PEAK, warmup_steps=WARMUP, min_lr_ratio=LEAST / PEAK,
            weight_decay=WEIGHT_DECAY, betas=BETAS, clip=CLIP, seed=seed, dtype="fp32", eval_on_start=False,
            eval_steps=steps, eval_tokens=CONTEXT,
        )  # fmt: skip
        self.samples, self.state = samples, start(self.model, self.settings)

    def train(self, until: int) -> None:
        """Go on to this step, and stop there as a run does that Ctrl-C ends."""

        def there() -> str | None:
            return "a turn is over" if self.state.counters.step >= until else None

        train(self.model, self.samples, self.settings, state=self.state, progress=False, stop=there)

    def logits(self, batch: Batch) -> torch.Tensor:
        return self.model(batch.inputs)


class NanoGPT:
    """nanoGPT's model and optimizer in a loop like that of its train.py.

    Args:
        module: its model.py, imported. ids: of the training text, 1-D int64.
    """

    def __init__(self, module, ids: torch.Tensor, vocab_size: int, seed: int, steps: int):
        torch.manual_seed(seed)
        sizes = {"n_layer": LAYERS, "n_head": HEADS, "n_embd": WIDTH, "block_size": CONTEXT}
        with contextlib.redirect_stdout(io.StringIO()):  # it prints how large it is
            self.model = module.GPT(module.GPTConfig(**sizes, vocab_size=vocab_size, dropout=0.0, bias=False))
            self.optimizer = self.model.configure_optimizers(WEIGHT_DECAY, PEAK, BETAS, "cpu")
        self.ids, self.steps, self.step = ids, steps, 0
        self.generator = torch.Generator().manual_seed(seed)

    def rate(self, step: int) -> float:
        """Its schedule: the warmup ends one step later than ours, the cosine ends at `steps`."""
        if step < WARMUP:
            return PEAK * (step + 1) / (WARMUP + 1)
        part = (step - WARMUP) / (self.steps - WARMUP)
        return LEAST + 0.5 * (1 + math.cos(math.pi * part)) * (PEAK - LEAST)

    def train(self, until: int) -> None:
        """Go on to this step."""
        self.model.train()
        for step in range(self.step, until):
            for group in self.optimizer.param_groups:
                group["lr"] = self.rate(step)
            offsets = torch.randint(len(self.ids) - CONTEXT, (BATCH,), generator=self.generator).tolist()
            windows = torch.stack([self.ids[at : at + CONTEXT + 1] for at in offsets])
            _, loss = self.model(windows[:, :-1], windows[:, 1:].contiguous())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            loss.item()  # as ours does at each step: a run is watched
        self.step = until

    def logits(self, batch: Batch) -> torch.Tensor:
        # The last window is filled up with our end-of-text, an id that it does not have: no real token sees that.
        inputs = batch.inputs.clamp(max=self.model.config.vocab_size - 1)
        return self.model(inputs, inputs)[0]  # without targets it gives the last position only


@torch.no_grad()
def whole_loss(model: torch.nn.Module, logits: Callable[[Batch], torch.Tensor], batches: list[Batch]) -> float:
    """Nats per token over every token of these batches: the same for both."""
    model.eval()
    total, tokens = 0.0, 0
    for batch in batches:
        found = logits(batch).double().flatten(0, 1)
        total += F.cross_entropy(found, batch.targets.flatten(), ignore_index=IGNORED, reduction="sum").item()
        tokens += int((batch.targets != IGNORED).sum())
    return total / tokens


def race(contenders: dict, steps: int, turn: int, label: str) -> dict[str, list[float]]:
    """Let them take turns of `turn` steps; seconds of each turn."""
    seconds = {name: [] for name in contenders}
    for number, until in enumerate(tqdm(range(turn, steps + turn, turn), desc=label, unit="turn")):
        for name in sorted(contenders, reverse=number % 2 == 1):
            began = time.perf_counter()
            contenders[name].train(min(until, steps))
            seconds[name].append(time.perf_counter() - began)
    return seconds


def load_nanogpt(place: Path):
    """The module in nanoGPT's model.py."""
    spec = importlib.util.spec_from_file_location("nanogpt_model", place)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("nanogpt", type=Path, help="the folder of nanoGPT, or its model.py")
    parser.add_argument("text", type=Path, help="a text; tiny Shakespeare for the published figure")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="one run of each for each seed")
    parser.add_argument("--steps", type=int, default=2000, help="of the optimizer (default: 2000)")
    parser.add_argument("--turn", type=int, default=50, help="steps in a turn (default: 50)")
    parser.add_argument(
        "--init_std", type=float, default=None, help="of our fresh weights; default: that of our narrow presets, 0.05"
    )
    parser.add_argument(
        "--out", type=Path, default=RESULTS / "cpu-train-against-nanogpt",
        help="the results, as .json and .txt (default: benchmarks/results/cpu-train-against-nanogpt)",
    )  # fmt: skip
    args = parser.parse_args()
    if args.nanogpt.is_dir():
        args.nanogpt = args.nanogpt / "model.py"
    for path, what in ((args.nanogpt, "nanoGPT's model.py"), (args.text, "a text file")):
        if not path.is_file():
            parser.error(f"{path} is not a file: pass the path of {what}.")
    for name in ("steps", "turn"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be 1 or more, got {getattr(args, name)}.")
    return args


def main() -> int:
    args = read_arguments()
    text = args.text.read_text(encoding="utf-8")
    tokenizer = CharTokenizer.of([text])
    ids, border = torch.tensor(tokenizer.encode(text)), int(len(text) * 0.9)
    learned, held_out = ids[:border], ids[border:]
    module, runs = load_nanogpt(args.nanogpt), []
    print(f"{len(learned):,} characters to learn, {len(held_out):,} to judge by; {torch.get_num_threads()} threads")
    for seed in args.seeds:
        samples = TokenWindows((learned, held_out, tokenizer), CONTEXT, seed, name=args.text.name)
        batches = samples.validation(len(held_out), batch_size=64)
        contenders = {
            "nanoGPT": NanoGPT(module, learned, tokenizer.vocab_size - 1, seed, args.steps),  # it has no end-of-text
            "ours": Ours(samples, seed, args.steps, args.init_std),
        }
        seconds = race(contenders, args.steps, args.turn, f"seed {seed}")
        losses = {name: whole_loss(one.model, one.logits, batches) for name, one in contenders.items()}
        runs.append({"seed": seed, "loss": losses, "seconds_of_turns": seconds})
        print(f"seed {seed}: nanoGPT {losses['nanoGPT']:.4f}, ours {losses['ours']:.4f} nats per character")
    ours = contenders["ours"]
    parameters = {name: sum(p.numel() for p in one.model.parameters()) for name, one in contenders.items()}
    facts = {
        "about": "validation loss after equal steps, over all of the last tenth of the text, in nats per character",
        "text": {"name": args.text.name, "sha256": hashlib.sha256(text.encode()).hexdigest(), "characters": len(text)},
        "nanogpt_model_py_sha256": hashlib.sha256(args.nanogpt.read_bytes()).hexdigest(),
        "parameters": parameters,
        "cfg_of_ours": ours.model.cfg,
        "settings_of_ours": asdict(ours.settings),
        "attention_of_ours": ours.model.attention_report()["chosen"],
        "machine": machine_facts("cpu"),
        **summary(runs, args),
        "runs": runs,
    }
    lines = in_words(facts, args)
    print("\n" + lines, end="")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    replace_text(args.out.with_name(args.out.name + ".json"), json.dumps(facts, indent=1) + "\n")
    replace_text(args.out.with_name(args.out.name + ".txt"), lines)
    return 0


def summary(runs: list[dict], args: argparse.Namespace) -> dict:
    """Means over seeds, and the ratio of speeds over all turns but each run's first, which sets up buffers."""
    mean = {name: statistics.mean(run["loss"][name] for run in runs) for name in ("nanoGPT", "ours")}
    pairs = [
        pair
        for run in runs
        for pair in list(zip(run["seconds_of_turns"]["nanoGPT"], run["seconds_of_turns"]["ours"], strict=True))[1:]
    ] or [(run["seconds_of_turns"]["nanoGPT"][0], run["seconds_of_turns"]["ours"][0]) for run in runs]
    ratios = sorted(theirs / ours for theirs, ours in pairs)
    seconds = {name: sum(sum(run["seconds_of_turns"][name]) for run in runs) / len(runs) for name in mean}
    tokens = args.steps * BATCH * CONTEXT
    return {
        "seeds": args.seeds,
        "steps": args.steps,
        "mean_loss": mean,
        "difference": mean["ours"] - mean["nanoGPT"],
        "difference_of_each_seed": [run["loss"]["ours"] - run["loss"]["nanoGPT"] for run in runs],
        "wanted": f"at most {WANTED}",
        "seconds_of_a_run": seconds,
        "tokens_per_second": {name: tokens / value for name, value in seconds.items()},
        "speed_ratio": {"median": statistics.median(ratios), "least": ratios[0], "most": ratios[-1]},
    }


def in_words(facts: dict, args: argparse.Namespace) -> str:
    mean, seconds, speed, ratio = (
        facts[name] for name in ("mean_loss", "seconds_of_a_run", "tokens_per_second", "speed_ratio")
    )
    each = ", ".join(f"{run['loss']['nanoGPT']:.4f} / {run['loss']['ours']:.4f}" for run in facts["runs"])
    verdict = "reached" if facts["difference"] <= WANTED else "MISSED"
    machine = facts["machine"]
    return "\n".join(
        [
            f"{args.text.name}, {args.steps} steps, seeds {' '.join(map(str, args.seeds))}; {machine['cpu']}, "
            f"{machine['threads']} threads, torch {torch.__version__}",
            f"parameters: nanoGPT {facts['parameters']['nanoGPT']:,} (no biases), ours {facts['parameters']['ours']:,}",
            f"validation loss of each seed, nanoGPT / ours: {each}",
            f"mean: nanoGPT {mean['nanoGPT']:.4f}, ours {mean['ours']:.4f}, difference {facts['difference']:+.4f} "
            f"(wanted: {WANTED} at most; {verdict})",
            f"seconds of a run: nanoGPT {seconds['nanoGPT']:.1f}, ours {seconds['ours']:.1f}; "
            f"tokens/s {speed['nanoGPT']:,.0f} and {speed['ours']:,.0f}",
            f"speed against nanoGPT, turn by turn: median {ratio['median']:.3f}x "
            f"({ratio['least']:.3f} to {ratio['most']:.3f})",
            "",
        ]
    )


if __name__ == "__main__":
    raise SystemExit(main())
