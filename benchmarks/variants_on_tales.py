"""GPT-2 on `tales`, and the same model with each part that later models changed: what it learns, costs and takes.

    python benchmarks/variants_on_tales.py                     everything: about twelve minutes on two cores
    python benchmarks/variants_on_tales.py --only losses       the trainings: whatever else the machine does, the same
    python benchmarks/variants_on_tales.py --only speed        the times: on a quiet machine
    python benchmarks/variants_on_tales.py --only pages        tables and figures of docs/variants, from the results
    python benchmarks/variants_on_tales.py --quick --only losses --variants rope --out rope.json       a first look

losses  The main job's recipe with half its steps: same seeds, data and settings for every model, at the learning rate
        that was chosen for GPT-2. Losses are on 200 held-out stories, above their exact floor.
        Then GPT-2 and rope learn an endless row of stories in windows of 64 tokens, and read windows of 128: what do
        positions do that no training has seen? Beside it stand the same tokens, read in windows of 64.
speed   A step of training and a new token with a cache, model after model in an order drawn anew for each round, on one
        thread. A ratio is a model's time over GPT-2's in the same round; the median and the middle half are kept.

Each part writes its own section of one JSON file and leaves the others as they are.
"""

import argparse
import json
import logging
import os
import random
import re
import shlex
import statistics
import sys
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import asdict, replace
from datetime import datetime
from multiprocessing import get_context
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from GPT2Model.config import PRESETS, from_preset
from GPT2Model.files import replace_file, replace_text
from GPT2Model.generation import make_cache
from GPT2Model.gpt2 import GPTModel
from orchestrator.evaluation.machine import machine_facts
from orchestrator.evaluation.workloads import Generation, Training, Workload
from orchestrator.report import plain
from orchestrator.text import tales
from orchestrator.text.corpora import TalesCorpus
from orchestrator.text.windows import TokenWindows
from orchestrator.training.first_model import STORIES, TALES, write_stories
from orchestrator.training.loop import train
from orchestrator.training.watch import Watch
from orchestrator.views import variant_figures
from orchestrator.views.variant_tables import LABELS, PAGES, block, markdown_table

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "cpu-variants-on-tales.json"
FOLDER = ROOT / "docs" / "variants"
BLOCK = re.compile(r"(<!-- numbers: made by .*? -->\n).*?(<!-- end of numbers -->)", re.DOTALL)
WINDOW, LONGER, BIN = 64, 128, 16  # tokens: learned, read, and averaged over
HELD_OUT = 1600  # stories, to tell the loss at each position
VOCABULARY = tales.TalesTokenizer().vocab_size
SIZES = {  # of the timed models: the one that was trained, and one layer at GPT-2's own width and context
    "nano": Workload("nano", batch=32, tokens=62, prompt=64, new_tokens=64, vocab_size=VOCABULARY),
    "one GPT-2 layer": Workload(
        "gpt2", batch=2, tokens=256, prompt=960, new_tokens=64, vocab_size=VOCABULARY, changes={"n_layers": 1}
    ),
}
TASKS = {"training": (Training, "step", 1), "generation": (Generation, "later_tokens", 63)}  # seconds of how many


def changes(name: str, n_heads: int) -> dict:
    """The cfg keys in which a variant differs from GPT-2."""
    pairs = {"n_kv_heads": n_heads // 2}
    rope, rmsnorm = {"positions": "rope"}, {"norm": "rmsnorm"}
    # Two small numbers multiplied: with nano's 0.05 it adds half as much to the stream, and seed 0 stays 0.07 above.
    swiglu = {"mlp": "swiglu", "init_std": 0.08}
    every = {"gpt2": {}, "grouped": pairs, "one_kv_head": {"n_kv_heads": 1}, "rope": rope, "rmsnorm": rmsnorm}
    return (every | {"swiglu": swiglu, "all_four": pairs | rope | rmsnorm | swiglu})[name]


def fresh(name: str, seed: int) -> GPTModel:
    torch.manual_seed(seed)
    cfg = changes(name, PRESETS["nano"]["n_heads"])
    return GPTModel(from_preset("nano", vocab_size=VOCABULARY, drop_rate=0.0, **cfg))


# ------------------------------------------------------------------ losses


class Curve(Watch):
    """The validation loss by tokens seen."""

    def __init__(self, note):
        self.tokens, self.points, self.note = 0, [], note

    def step(self, record):
        self.tokens += record.tokens
        self.note()

    def evaluation(self, step, loss, tokens, seconds):
        self.points.append([self.tokens, loss])


def recipe(steps: int, seed: int):
    return replace(TALES, max_steps=steps, warmup_steps=min(TALES.warmup_steps, steps), eval_steps=-(-steps // 20),
                   seed=seed)  # fmt: skip


def learn_tales(name: str, seed: int, steps: int, note=lambda: None) -> dict:
    """One model learns whole stories, as the main job's does."""
    corpus, model, curve = TalesCorpus(seed), fresh(name, seed), Curve(note)
    train(model, corpus, recipe(steps, seed), watch=curve)
    right = sum(tales.check(story) is None for story in write_stories(model, corpus, STORIES, seed))
    loss, points = curve.points[-1][1], [[tokens, loss - corpus.floor] for tokens, loss in curve.points]
    found = {"loss": loss, "floor": corpus.floor, "above_floor": loss - corpus.floor, "grammatical": right}
    return {"recipe": "learn_tales", "model": name, "seed": seed} | found | {"curve": points}


def learn_windows(name: str, seed: int, steps: int, note=lambda: None) -> dict:
    """One model learns windows of 64 tokens from a row of stories; its loss by position in windows of 128."""
    stories = (recipe(steps, seed).batch_size * steps * WINDOW) // 60
    learned, held_out = (row_of_stories(count, 2**40 + 2 * seed + i) for i, count in enumerate((stories, HELD_OUT)))
    samples, model = TokenWindows((learned, held_out, tales.TalesTokenizer()), WINDOW, seed), fresh(name, seed)
    settings = replace(recipe(steps, seed), eval_steps=steps, eval_tokens=WINDOW, eval_on_start=False)
    train(model, samples, settings, watch=Curve(note))
    windows = torch.tensor(held_out).unfold(0, LONGER + 1, LONGER)
    inputs, targets = windows[:, :-1], windows[:, 1:]
    whole = losses_of(model, inputs, targets)
    cut = losses_of(model, inputs.reshape(-1, WINDOW), targets.reshape(-1, WINDOW)).reshape(-1, LONGER)
    return {"recipe": "learn_windows", "model": name, "seed": seed, "whole": in_bins(whole), "cut": in_bins(cut)}


def row_of_stories(count: int, seed: int) -> list[int]:
    tokenizer = tales.TalesTokenizer()
    return tokenizer.encode("".join(tales.END_OF_TEXT + story for story in tales.stories(count, seed)))


@torch.no_grad()
def losses_of(model: GPTModel, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Nats of each target, in float32: the shape of `targets`."""
    parts = zip(inputs.split(64), targets.split(64), strict=True)
    return torch.cat([F.cross_entropy(model(ids).mT, wanted, reduction="none") for ids, wanted in parts])


def in_bins(losses: torch.Tensor) -> list[float]:
    """The mean over all windows of each 16 positions."""
    return losses.mean(0).reshape(-1, BIN).mean(1).tolist()


def measure_losses(facts: dict, names: list[str], seeds: list[int], steps: int, jobs: int, out: Path) -> None:
    """Fill the section "losses"; each finished training is in the file at once.

    A run that was broken off is gone on with by the same command; one that ended begins anew.
    """
    settings = {"models": names, "seeds": seeds, "steps": steps, "settings": asdict(recipe(steps, 0))}
    begun = read(out).get("losses", {})
    goes_on = begun.get("unfinished") and all(begun[key] == value for key, value in plain(settings).items())
    done = begun["runs"] + begun["windows"]["runs"] if goes_on else []
    tasks = []
    for seed in seeds:
        tasks += [(learn_tales, name, seed, steps) for name in names]
        tasks += [(learn_windows, name, seed, steps) for name in names if name in ("gpt2", "rope")]
    known = {(run["recipe"], run["model"], run["seed"]) for run in done}
    tasks = [task for task in tasks if (task[0].__name__, *task[1:3]) not in known]

    def keep(found: list[dict], unfinished: bool = True) -> None:
        runs = sorted(done + found, key=lambda run: (names.index(run["model"]), run["seed"]))
        stories, windows = ([run for run in runs if run["recipe"] == f"learn_{what}"] for what in ("tales", "windows"))
        length = {"learned": WINDOW, "read": LONGER, "bin": BIN, "runs": windows}
        mark = {"unfinished": True} if unfinished else {}
        write(out, {"losses": facts | settings | mark | {"runs": stories, "windows": length}})

    keep(work_off(tasks, steps, jobs, keep), unfinished=False)


def work_off(tasks: list[tuple], steps: int, jobs: int, keep) -> list[dict]:
    """The results of `function(*arguments, note)`, shown to `keep` as they come; one bar counts the steps of all."""
    found = []
    with tqdm(total=steps * len(tasks), desc=f"{len(tasks)} trainings", unit="step", smoothing=0.05) as bar:
        if jobs == 1:
            prepare_process()
            for function, *arguments in tasks:
                found.append(function(*arguments, bar.update))
                keep(found)
            return found
        context = get_context("spawn")
        done = context.Value("q", 0)
        with ProcessPoolExecutor(jobs, mp_context=context, initializer=prepare_process, initargs=(done,)) as pool:
            pending = {pool.submit(in_process, *task) for task in tasks}
            while pending:
                finished, pending = wait(pending, timeout=1, return_when=FIRST_COMPLETED)
                bar.update(done.value - bar.n)
                try:
                    found += [future.result() for future in finished]
                except BaseException:
                    pool.shutdown(cancel_futures=True)
                    raise
                if finished:
                    keep(found)
    return found


counter = None  # of a worker process: the steps that all of them have done


def prepare_process(steps_done=None) -> None:
    global counter
    counter = steps_done
    torch.set_num_threads(1)
    logging.getLogger("CMHA").setLevel(logging.WARNING)


def in_process(function, *arguments) -> dict:
    def note() -> None:
        with counter.get_lock():
            counter.value += 1

    return function(*arguments, note)


# ------------------------------------------------------------------ costs and speed


def costs(name: str) -> dict:
    """What a model takes by its shape. FLOPs: a forward pass over a whole context, as `estimates.py` counts them."""
    model = fresh(name, 0)
    tokens, cfg = model.cfg["context_length"], model.cfg
    matrices = sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear))
    attention = 2 * tokens * cfg["emb_dim"] * cfg["n_layers"]  # Q K^T and weights x values: multiply-adds of a token
    return {"parameters": model.num_parameters(), "flops_per_token": 2 * (matrices + attention),
            "cache_bytes_per_token": make_cache(model, 1, 1).nbytes}  # fmt: skip


def measure_speed(names: list[str], rounds: int, seed: int = 0) -> dict:
    threads = torch.get_num_threads()
    prepare_process()
    try:
        found = {size: {task: race(size, task, names, rounds, seed) for task in TASKS} for size in SIZES}
    finally:
        torch.set_num_threads(threads)
    return {"rounds": rounds, "threads": 1, "sizes": {size: asdict(load) for size, load in SIZES.items()}} | found


def race(size: str, task: str, names: list[str], rounds: int, seed: int) -> dict:
    """Model -> milliseconds of a step or a token (median), and its ratio to GPT-2: [median, quartile, quartile]."""
    make, key, per = TASKS[task]
    load, order = SIZES[size], random.Random(seed)
    n_heads = load.cfg["n_heads"]
    models = {
        name: make(replace(load, changes={**load.changes, **changes(name, n_heads)}), "fp32", "cpu", seed)
        for name in names
    }
    times = {name: [] for name in names}
    for number in tqdm(range(rounds + 1), desc=f"{size}, {task}", unit="round"):
        for name in order.sample(names, len(names)):
            seconds = models[name].turn()[key] / per
            if number:  # the first round warms up
                times[name].append(1e3 * seconds)
    return {name: {"milliseconds": statistics.median(own), "ratio": middle(own, times["gpt2"])}
            for name, own in times.items()}  # fmt: skip


def middle(times: list[float], others: list[float]) -> list[float]:
    """Median and quartiles of the ratios, pair by pair."""
    ratios = sorted(one / other for one, other in zip(times, others, strict=True))
    low, _, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else 3 * ratios
    return [statistics.median(ratios), low, high]


# ------------------------------------------------------------------ pages


def write_pages(results: dict, folder: Path = FOLDER) -> None:
    """Put tables into the pages, and draw their figures."""
    for page in PAGES:
        text = (folder / page).read_text(encoding="utf-8")
        replace_text(folder / page, BLOCK.sub(lambda m, page=page: m[1] + block(results, page) + m[2], text))
    for name, drawn in variant_figures.all_figures(results).items():
        replace_file(folder / f"{name}.png", lambda beside, drawn=drawn: drawn.savefig(beside, format="png", dpi=95))


# ------------------------------------------------------------------ the command


def read_arguments(arguments=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("losses", "speed", "pages"), help="one part (default: all three)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="(default: 0 1 2)")
    parser.add_argument("--steps", type=int, default=500, help="of each training (default: 500)")
    parser.add_argument("--rounds", type=int, default=15, help="turns of each timed model (default: 15)")
    parser.add_argument(
        "--variants", nargs="+", choices=tuple(LABELS), default=list(LABELS), metavar="NAME",
        help=f"only these, beside gpt2, which is always there: {', '.join(LABELS)}",
    )  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="one seed, 60 steps, 3 rounds: does it run?")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="trainings at a time (default: cores)")
    parser.add_argument(
        "--out", type=Path, default=RESULTS, metavar="FILE.json",
        help="the results (default: benchmarks/results/cpu-variants-on-tales.json, which the pages are made from)",
    )  # fmt: skip
    args = parser.parse_args(arguments)
    if args.quick:
        args.seeds, args.steps, args.rounds = args.seeds[:1], min(args.steps, 60), min(args.rounds, 3)
    for name in ("steps", "rounds", "jobs"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be 1 or more, got {getattr(args, name)}.")
    if min(args.seeds) < 0:
        parser.error(f"--seeds must be 0 or more, got {min(args.seeds)}.")
    part = args.quick or {"gpt2", *args.variants} < set(LABELS)
    if args.only != "pages" and args.out == RESULTS and part:
        parser.error("a part of the models, or a quick look, would overwrite the published results: give --out FILE.")
    return args


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def write(path: Path, sections: dict) -> None:
    """Put sections into the file of the results; the others stay."""
    path.parent.mkdir(parents=True, exist_ok=True)
    results = read(path) | {"costs": {name: costs(name) for name in LABELS}} | sections
    replace_text(path, json.dumps(results, indent=1) + "\n")


def main(arguments=None) -> int:
    args = read_arguments(arguments)
    logging.getLogger("CMHA").setLevel(logging.WARNING)  # which backend: the same for all
    names = [name for name in LABELS if name in {"gpt2", *args.variants}]
    facts = {
        "command": shlex.join(["python", "benchmarks/variants_on_tales.py", *(arguments or sys.argv[1:])]),
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "machine": machine_facts("cpu"),
    }
    if args.only in (None, "losses"):
        measure_losses(facts, names, args.seeds, args.steps, args.jobs, args.out)
    if args.only in (None, "speed"):
        write(args.out, {"speed": facts | measure_speed(names, args.rounds)})
    results = read(args.out)
    print(f"results: {args.out}")
    if "losses" in results:
        print(markdown_table(results, tuple(names)))
    if args.only == "pages" or (args.only is None and args.out == RESULTS):
        write_pages(results)
        print(f"written: the tables and figures of {FOLDER}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
