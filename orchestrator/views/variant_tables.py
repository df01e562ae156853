"""The results of `benchmarks/variants_on_tales.py` in words: the tables and sentences of the pages in docs/variants.

A difference to GPT-2 counts only where the seeds of the two models do not overlap.
"""

import math
import statistics
from collections.abc import Mapping, Sequence

from orchestrator.training.first_model import GAP, STORIES

LABELS = {
    "gpt2": "GPT-2",
    "grouped": "grouped heads, in pairs",
    "one_kv_head": "one key-value head",
    "rope": "rotary positions",
    "rmsnorm": "RMSNorm",
    "swiglu": "SwiGLU",
    "all_four": "all four",
}
PAGES = {
    "README.md": tuple(LABELS),
    "grouped_heads.md": ("gpt2", "grouped", "one_kv_head"),
    "rotary_positions.md": ("gpt2", "rope"),
    "rmsnorm.md": ("gpt2", "rmsnorm"),
    "swiglu.md": ("gpt2", "swiglu"),
}
SIZES = ("nano", "one GPT-2 layer")  # of the timed models
TASKS = ("training", "generation")
SPEED_COMMAND = "python benchmarks/variants_on_tales.py --only speed"
LENGTH_LINES = (  # model, how it read windows longer than it learned, in words
    ("gpt2", "cut", "GPT-2, read in windows of 64"),
    ("gpt2", "whole", "GPT-2, read in windows of 128"),
    ("rope", "cut", "rotary positions, read in windows of 64"),
    ("rope", "whole", "rotary positions, read in windows of 128"),
)


def gaps(results: Mapping, name: str) -> list[float]:
    """Nats per token above the floor at the end, a number for each seed."""
    return [run["above_floor"] for run in results["losses"]["runs"] if run["model"] == name]


def markdown_table(results: Mapping, names: Sequence[str] = tuple(LABELS)) -> str:
    """What was learned and what it costs; and, once it was measured, the time it takes."""
    runs = results["losses"]["runs"]
    lines = [
        f"| model | loss above the floor, nats per token (least to most) | thousand tokens until {GAP} above | "
        f"stories right, of {STORIES} | parameters | FLOPs per token | cache, bytes per token |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name in names:
        own = [run for run in runs if run["model"] == name]
        if own:
            until = span([tokens_until(run["curve"]) for run in own])
            right = span([run["grammatical"] for run in own])
            costs = [f"{cost:,}" for cost in results["costs"][name].values()]
            lines.append(row(LABELS[name], mean_and_range(gaps(results, name)), until, right, *costs))
    if "speed" not in results:
        return "\n".join([*lines, "", f"Times: not measured yet (`{SPEED_COMMAND}`)."])
    speed = results["speed"]
    heads = [f"{size}: {task}" for size in SIZES for task in TASKS]
    lines += ["", f"| time, GPT-2 = 1 (middle half) | {' | '.join(heads)} |", "| --- |" + " --- |" * len(heads)]
    for name in names:
        if name in speed["nano"]["training"]:
            cells = [time_of(speed[size][task][name], name) for size in SIZES for task in TASKS]
            lines.append(row(LABELS[name], *cells))
    return "\n".join(lines)


def row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def mean_and_range(values: list[float]) -> str:
    return f"{statistics.mean(values):.4f} ({min(values):.4f} to {max(values):.4f})"


def span(values: list) -> str:
    if None in values:
        return "not reached" if not any(values) else "not by all seeds"
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def tokens_until(curve: list) -> int | None:
    """Thousands of tokens at the first look that found the loss as near to the floor as the main job asks."""
    return next((round(tokens / 1000) for tokens, gap in curve if gap <= GAP), None)


def time_of(cell: dict, name: str) -> str:
    if name == "gpt2":
        return f"1 ({cell['milliseconds']:.2f} ms)"
    median, low, high = cell["ratio"]
    return f"{median:.2f} ({low:.2f} to {high:.2f})"


STEP = (
    0.03  # nats above the floor: between a run that learned to copy all that stories repeat, and one on the way there
)


def verdict(results: Mapping, name: str) -> str:
    """Is the difference to GPT-2 more than that between seeds?"""
    own, base = gaps(results, name), gaps(results, "gpt2")
    difference = statistics.mean(own) - statistics.mean(base)
    how = f"{LABELS[name]}, {results['losses']['steps']} steps, {len(own)} seed{'s' * (len(own) > 1)}"
    start = f"{how}: {difference:+.4f} nats per token against GPT-2 in the mean. "
    if min(len(own), len(base)) < 2:
        return start + "One seed says nothing about how far apart seeds lie."
    if max(own) > STEP >= min(own) and max(base) <= STEP:  # a mean of both kinds of run is neither
        return f"{how}: {sum(gap <= STEP for gap in own)} come within {STEP} nats of the floor, GPT-2 with every seed."
    if min(own) <= max(base) and min(base) <= max(own):
        return start + "That is within the spread between seeds: this run shows no difference."
    chance = math.comb(len(own) + len(base), len(own)) // 2
    where = "above" if difference > 0 else "below"
    return start + f"Each of its seeds ends {where} each of GPT-2's, which chance alone does once in {chance} times."


def length_table(results: Mapping) -> str:
    """Nats per token by position in windows of 128: read whole, and cut in two of the trained length."""
    length = results["losses"]["windows"]
    starts = range(0, length["read"], length["bin"])
    lines = [row("positions", *(f"{at} to {at + length['bin'] - 1}" for at in starts))]
    lines.append("| --- |" + " --- |" * len(starts))
    for name, how, label in LENGTH_LINES:
        runs = [run[how] for run in length["runs"] if run["model"] == name]
        if runs:
            lines.append(row(label, *(f"{statistics.mean(each):.2f}" for each in zip(*runs, strict=True))))
    return "\n".join(lines)


def block(results: Mapping, page: str) -> str:
    """What stands between the two marks of a page of docs/variants."""
    parts = [markdown_table(results, PAGES[page])]
    parts.append(
        "\n".join(f"- {verdict(results, name)}" for name in PAGES[page] if name != "gpt2" and gaps(results, name))
    )
    if page == "rotary_positions.md":
        parts.append(length_table(results))
    if results["losses"].get("unfinished"):
        parts.append("The run is not finished: trainings are missing.")
    machine = results["losses"]["machine"]
    parts.append(f"Trained on {machine['cpu']}, torch {machine['versions']['torch']}, one thread a model.")
    return "\n\n".join(parts) + "\n"
