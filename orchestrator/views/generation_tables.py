"""What `benchmarks/generation_against_transformers.py` found, in Markdown: a table for each part."""

from collections.abc import Mapping, Sequence

from orchestrator.evaluation.generation_profile import OUTSIDE, PARTS
from orchestrator.views.bench_tables import short, with_spread

WANTED = 2.0  # times as fast as transformers in static batches: the engine, at the queue


def markdown_tables(results: Mapping, parts: Sequence[str]) -> str:
    """The tables of these parts, each under a line that says what was measured, where and how."""
    tables = {"one": one_table, "queue": queue_tables, "prefix": prefix_table, "profile": profile_table}
    blocks = [results["not_a_measurement"]] if "not_a_measurement" in results else []
    for part in parts:
        blocks += [f"{title(results[part], part)} {where(results[part])}", *tables[part](results[part])]
    return "\n\n".join(blocks) + "\n"


def where(section: Mapping) -> str:
    """Machine, threads, versions, rounds."""
    machine, rounds = section["machine"], section["settings"].get("rounds")
    versions = machine["versions"]
    device = machine["cpu"] if machine["device"].startswith("cpu") else machine["device"]
    said = f"{device}, {machine['threads']} threads, torch {versions['torch']}, transformers {versions['transformers']}"
    return f"({said}{f'; {rounds} interleaved rounds; medians, quartiles in brackets' if rounds else ''}.)"


def title(section: Mapping, part: str) -> str:
    asked = section["settings"]
    if part == "one":
        return f"**One text**: {asked['prompt']} tokens read, {asked['new_tokens']} written, greedy."
    if part == "queue":
        prompts, texts = (asked["lengths"][what] for what in ("prompt", "new_tokens"))
        return (
            f"**{asked['requests']} requests at second 0**, lengths log-uniform in {asked['shortest']} to "
            f"{asked['longest']}, seed {asked['seed']}: prompts of {prompts['mean']:.1f} tokens on average "
            f"({prompts['total']:,} in all), texts of {texts['mean']:.1f} ({texts['total']:,}); static batches of "
            f"{asked['batch']}."
        )
    if part == "prefix":
        return (
            f"**A common prefix**: {asked['prefix_requests']} requests at second 0, the same first {asked['prefix']} "
            f"tokens, own tails of {asked['tails'][0]} to {asked['tails'][1]}, {asked['prefix_new_tokens']} written, "
            "float32."
        )
    return f"**A step, in parts**: mean of {asked['steps']} steps, float32, prompts of {asked['prompt']} tokens."


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    line = lambda cells: f"| {' | '.join(cells)} |"  # noqa: E731
    return "\n".join([line(head), line(["---"] * len(head)), *map(line, rows)])


def one_table(section: Mapping) -> list[str]:
    head = ("", "tokens/s", "first token, ms", "a later token, ms", "x transformers: text", "first token",
            "later tokens", "ratio of medians: text", "same tokens")  # fmt: skip
    later = section["settings"]["new_tokens"] - 1
    rows = []
    for name, found in section["contenders"].items():
        seconds, speeds = found["seconds"], section["speed"].get(name)
        cells = [name, short(found["tokens_per_second"]), with_spread(seconds["first_token"], 1e3)]
        cells.append(with_spread(seconds["later_tokens"], 1e3 / later))
        if speeds is None:
            rows.append([*cells, *["1"] * 4, "-"])
            continue
        cells += [with_spread(speeds[what]["paired"]) for what in ("text", "first_token", "later_tokens")]
        rows.append([*cells, short(speeds["text"]["ratio_of_medians"]), same(section["tokens"][name], True)])
    others = [name for name, of in section["speed"].items() if of["against"].split()[1] != name.split()[1]]
    note = ""
    if others:
        note = f" {', '.join(others)}: other weights than transformers', which is held in the dtype of the rest."
    alive = f"The text has {section['distinct_tokens']} different tokens of {later + 1}."
    return [table(head, rows), f"x transformers: its time over ours, in the same round and dtype.{note} {alive}"]


def same(tokens: Mapping, one: bool = False) -> str:
    """ "all", or how many differ and what the worst was."""
    if not tokens["differences"]:
        return "all"
    if one:
        (parted,) = tokens["differences"]
        return f"{parted['position']}, then a gap of {parted['gap']:+.2g} in the logits"
    widest = max(tokens["differences"], key=lambda of: abs(of["gap"]))
    said = f"{tokens['equal']} of {tokens['requests']}; widest gap of the two logits {widest['gap']:+.2g} "
    return said + f"(request {widest['request']}, token {widest['position']})"


def queue_tables(section: Mapping) -> list[str]:
    head = ("", "makespan, s", "tokens/s", "first token p50, s", "p90, s", "last token p50, s", "p90, s",
            "rows computed / needed", "requests with transformers' tokens")  # fmt: skip
    blocks = []
    for dtype in section["settings"]["queue_dtypes"]:
        here, rows = section[dtype], []
        for name, found in here["contenders"].items():
            times = [with_spread(found[what][at]) for what in ("first_token", "latency") for at in ("p50", "p90")]
            work = here["rows"][name]
            share = f"{work['computed'] / work['useful']:.2f}" if work["computed"] else "-"
            cells = (name, with_spread(found["seconds"]), with_spread(found["tokens_per_second"]), *times, share)
            rows.append([*cells, same(here["tokens"][name])])
        lines = [f"{dtype}:", table(head, rows)]
        for name, found in here["speed"].items():
            lines.append(
                f"- {name}: {with_spread(found['paired'])}x; ratio of medians {found['ratio_of_medians']:.2f}x"
            )
        reached = here["speed"]["engine against transformers, static"]["paired"]["median"] >= WANTED
        lines[-3] += f" (wanted: {WANTED:g}x; {'reached' if reached else 'MISSED'})"
        blocks.append("\n".join([lines[0], "", lines[1], "", *lines[2:]]))
    return blocks


def prefix_table(section: Mapping) -> list[str]:
    head = ("", "tokens of prompts computed", "first token p50, s", "p90, s", "makespan, s")
    rows = []
    for name, found in section["contenders"].items():
        first = [with_spread(found["first_token"][at]) for at in ("p50", "p90")]
        computed = section["prefill"][name]
        rows.append([name, "-" if computed is None else f"{computed:,}", *first, with_spread(found["seconds"])])
    speeds = section["speed"]
    said = f"With sharing {with_spread(speeds['seconds']['paired'])}x as fast in all, the median first token "
    said += f"{with_spread(speeds['first_token']['paired'])}x. Same tokens with and without: {same(section['tokens'])}."
    return [table(head, rows), said]


def profile_table(section: Mapping) -> list[str]:
    names = list(section["contenders"])
    steps = {name: section["contenders"][name] for name in names}
    rows = []
    for part in PARTS:
        shares = [(steps[name]["parts"][part], steps[name]["bare"]) for name in names]
        rows.append([part, *[f"{short(1e3 * seconds)} ({seconds / whole:.0%})" for seconds, whole in shares]])
    for what, key in (("a step", "bare"), ("a step under the profiler", "watched")):
        rows.append([what, *[short(1e3 * steps[name][key]) for name in names]])
    rows.append(["a token", *[short(1e3 * steps[name]["bare"] / steps[name]["tokens"]) for name in names]])
    note = (
        f"ms of a step (part of it). {OUTSIDE}: what the operators' own times leave of a step without the profiler. "
        "They are taken under it, in steps just after, so together they may be a little more than that step."
    )
    return [table(("ms", *names), rows), note]
