"""The parts of `benchmarks/generation_against_transformers.py`: one text, a queue, a common prefix, profiles of steps.

Each takes the models of both sides and a plan of sizes, and returns what it found, ready for JSON.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict

import torch
from tqdm import tqdm

from orchestrator.evaluation.generation_bench import (
    Served,
    Writer,
    Written,
    by_engine,
    check_lengths,
    differences,
    figures_of,
    in_static_batches,
    interleaved,
    our_writer,
    speed,
    spreads,
    turns,
)
from orchestrator.evaluation.generation_plan import OURS_TOO, Plan, Sides
from orchestrator.evaluation.generation_profile import StepCosts, StepWatch
from orchestrator.evaluation.generation_requests import (
    LENGTHS,
    Request,
    lengths_of,
    queued,
    with_common_prefix,
)


class Progress:
    """One bar for a part; the name of who is at work beside it."""

    def __init__(self, title: str, total: int):
        self.bar, self.begun = tqdm(total=total, desc=title, unit="turn"), False

    def __enter__(self) -> Callable[[str], None]:
        return self.tick

    def tick(self, name: str) -> None:
        """Said before a turn: the one before it is over."""
        self.bar.update(self.begun)
        self.bar.set_postfix_str(name)
        self.begun = True

    def __exit__(self, error, *_) -> None:
        self.bar.update(self.begun and error is None)
        self.bar.close()


def measure_one(sides: Sides, plan: Plan) -> dict:
    """One text, by side and dtype."""
    (request,) = fixed_requests(plan, 1, plan.new_tokens)
    contenders: dict[str, Writer] = {}
    against = {}
    for dtype in plan.dtypes:
        contenders[f"ours {dtype}"] = our_writer(sides.ours(dtype), plan.device)
        against[f"ours {dtype}"] = peer = f"transformers {OURS_TOO.get(dtype, dtype)}"
        contenders.setdefault(peer, sides.theirs(OURS_TOO.get(dtype, dtype)).write)
    ids = torch.tensor([request.prompt], device=plan.device)
    work, small = ((ids, None, new) for new in (plan.new_tokens, min(4, plan.new_tokens)))
    calls = {name: lambda work, write=write: write(*work) for name, write in contenders.items()}
    with Progress("one", turns(len(calls), plan.rounds["one"])) as tick:
        rounds = interleaved(calls, work, small, plan.rounds["one"], plan.seed, tick)
    for here in rounds:
        for name, written in here.items():
            check_lengths(Served(0, written.ids, [written.times], []), [request], name)
    seconds = {name: [seconds_of(here[name]) for here in rounds] for name in calls}
    found = {name: {"seconds": spreads(of)} | rates(spreads(of), plan) for name, of in seconds.items()}
    return {
        "settings": settings(plan, "prompt", "new_tokens", "dtypes") | {"rounds": len(rounds)},
        "transformers_attention": next(iter(sides.peers.values())).attention,
        "contenders": found,
        "speed": {
            name: {"against": peer}
            | {
                what: speed([of[what] for of in seconds[peer]], [of[what] for of in seconds[name]])
                for what in seconds[name][0]
            }
            for name, peer in against.items()
        },
        "tokens": {
            name: compared(sides, [request], [here[name].ids for here in rounds], rounds[0][peer].ids) | {"with": peer}
            for name, peer in against.items()
        },
        "distinct_tokens": len(set(rounds[0][f"ours {plan.dtypes[0]}"].ids[0])),
        "rounds": [{name: seconds_of(written) for name, written in here.items()} for here in rounds],
    }


def seconds_of(written: Written) -> dict[str, float]:
    """To the first new token, of the later ones, and of both."""
    first = written.times[0]
    return {"first_token": first, "later_tokens": written.times[-1] - first, "text": written.seconds}


def rates(spread: Mapping, plan: Plan) -> dict:
    """Tokens a second by the medians: of the whole text, and after the first token."""
    return {
        "tokens_per_second": plan.new_tokens / spread["text"]["median"],
        "later_tokens_per_second": (plan.new_tokens - 1) / spread["later_tokens"]["median"],
    }


def measure_queue(sides: Sides, plan: Plan) -> dict:
    """The queue, by dtype."""
    requests = queued(plan.requests, plan.shortest, plan.longest, plan.cfg["vocab_size"], plan.seed)
    lengths = lengths_of(requests)
    for what, of in lengths.items():
        print(f"{what}: mean {of['mean']:.1f}, {of['min']} to {of['max']}, total {of['total']:,}")
    print(f"lengths: {LENGTHS}")
    return {
        "settings": settings(plan, "requests", "shortest", "longest", "batch", "queue_dtypes")
        | {"rounds": plan.rounds["queue"], "formula": LENGTHS, "lengths": lengths},
        **{dtype: queue_in(dtype, sides, plan, requests) for dtype in plan.queue_dtypes},
    }


def queue_in(dtype: str, sides: Sides, plan: Plan, requests: Sequence[Request]) -> dict:
    model, peer = sides.ours(dtype), sides.theirs(dtype)

    def static(write: Writer) -> Callable[[Sequence[Request]], Served]:
        return lambda work: in_static_batches(write, work, plan.batch, plan.device)

    calls = {
        "engine": lambda work: by_engine(sides.engine(dtype), work, plan.device),
        "transformers, static": static(peer.write),
        "ours, static": static(our_writer(model, plan.device)),
    }
    small = [Request(each.prompt, min(3, each.new_tokens)) for each in requests[: plan.batch]]
    with Progress(f"queue, {dtype}", turns(len(calls), plan.rounds["queue"])) as tick:
        rounds = interleaved(calls, requests, small, plan.rounds["queue"], plan.seed, tick)
    for here in rounds:
        for name, served in here.items():
            check_lengths(served, requests, name)
    seconds = {name: [here[name].seconds for here in rounds] for name in calls}
    theirs = "transformers, static"
    return {
        "contenders": {name: spreads([figures_of(here[name]) for here in rounds]) for name in calls},
        "speed": {
            "engine against transformers, static": speed(seconds[theirs], seconds["engine"]),
            "ours, static against transformers, static": speed(seconds[theirs], seconds["ours, static"]),
            "engine against ours, static": speed(seconds["ours, static"], seconds["engine"]),
        },
        "rows": {name: {"computed": rounds[0][name].computed, "useful": useful_rows(requests)} for name in calls},
        "tokens": {
            name: compared(sides, requests, [here[name].tokens for here in rounds], rounds[0][theirs].tokens)
            | {"with": theirs}
            for name in calls
        },
        "engine_stats": rounds[0]["engine"].stats,
        "timeline": {name: timeline([here[name] for here in rounds]) for name in calls},
        "rounds": [{name: figures_of(served) for name, served in here.items()} for here in rounds],
    }


def useful_rows(requests: Sequence[Request]) -> int:
    """Rows that must go through the model: each prompt, and each new token but the last, which nobody reads."""
    return sum(len(request.prompt) + request.new_tokens - 1 for request in requests)


def timeline(rounds: Sequence[Served]) -> dict:
    """When each request had its first and last token, and until when a row was computed for it: the median round's."""
    middle = statistics.median_low(served.seconds for served in rounds)
    served = next(served for served in rounds if served.seconds == middle)
    found = {"first": [of[0] for of in served.times], "last": [of[-1] for of in served.times]}
    return {what: [round(second, 4) for second in of] for what, of in (found | {"held": served.held_until}).items()}


def measure_prefix(sides: Sides, plan: Plan) -> dict:
    """The same engine with prefix sharing and without."""
    sizes = (plan.prefix_requests, plan.prefix, plan.tails, plan.prefix_new_tokens)
    requests = with_common_prefix(*sizes, plan.cfg["vocab_size"], plan.seed)
    calls = {
        name: lambda work, on=on: by_engine(sides.engine("float32", prefix_sharing=on), work, plan.device)
        for name, on in (("sharing", True), ("no sharing", False))
    }
    small = [Request(each.prompt, 2) for each in requests[:2]]
    with Progress("prefix", turns(len(calls), plan.rounds["prefix"])) as tick:
        rounds = interleaved(calls, requests, small, plan.rounds["prefix"], plan.seed, tick)
    for here in rounds:
        for name, served in here.items():
            check_lengths(served, requests, name)
    seconds = {name: [figures_of(here[name]) for here in rounds] for name in calls}
    makespan = {name: [of["seconds"] for of in found] for name, found in seconds.items()}
    first = {name: [of["first_token"]["p50"] for of in found] for name, found in seconds.items()}
    return {
        "settings": settings(plan, "prefix_requests", "prefix", "tails", "prefix_new_tokens")
        | {"rounds": len(rounds), "lengths": lengths_of(requests)},
        "contenders": {name: spreads(of) for name, of in seconds.items()},
        "speed": {
            "seconds": speed(makespan["no sharing"], makespan["sharing"]),
            "first_token": speed(first["no sharing"], first["sharing"]),
        },
        "prefill": {name: rounds[0][name].stats["prefill_tokens"] for name in calls},
        "engine_stats": {name: rounds[0][name].stats for name in calls},
        "tokens": compared(
            sides, requests, [here["sharing"].tokens for here in rounds], rounds[0]["no sharing"].tokens
        ),
        "rounds": [{name: figures_of(served) for name, served in here.items()} for here in rounds],
    }


def measure_profile(sides: Sides, plan: Plan) -> dict:
    """Steps of one text, ours and transformers', and of the engine with several requests running; float32."""
    found, model, peer = {}, sides.ours("float32"), sides.theirs("float32")
    writers = {"ours": (model, our_writer(model, plan.device)), "transformers": (peer.model, peer.write)}
    with Progress("profile", len(writers) + len(plan.running)) as tick:
        for side, (module, write) in writers.items():
            tick(f"{side}, one text")
            watch = StepWatch(module, plan.steps, device=plan.device)
            (request,) = fixed_requests(plan, 1, watch.needed)
            write(torch.tensor([request.prompt], device=plan.device), None, watch.needed, watch.step)
            found[f"{side}, one text"] = asdict(watch.costs)
        for running in plan.running:
            tick(f"engine, {running} running")
            found[f"engine, {running} running"] = asdict(engine_steps(sides, plan, running))
    return {"settings": settings(plan, "prompt", "running", "steps"), "contenders": found}


def engine_steps(sides: Sides, plan: Plan, running: int) -> StepCosts:
    """Steps of the engine in which `running` requests each write a token, after their prompts were read.

    Raises:
        RuntimeError: they did not all run at once, so that the steps were others than the name says.
    """
    engine = sides.engine("float32", max_running=running)
    watch = StepWatch(sides.ours("float32"), plan.steps, tokens=running, device=plan.device)
    reading = running * plan.prompt // 64 + 8  # steps in which the first may write already while others are read
    written = [0] * running

    def count(row: int) -> Callable:
        def note(*_: object) -> None:
            written[row] += 1

        return note

    for row, request in enumerate(fixed_requests(plan, running, watch.needed + reading)):
        engine.add(request.prompt, request.new_tokens, on_token=count(row))
    steps = 0
    while min(written) == 0 and steps < reading:
        engine.step()
        steps += 1
    before = list(written)
    while not watch.done:
        engine.step()
        watch.step()
    if [after - earlier for earlier, after in zip(before, written, strict=True)] != [watch.needed] * running:
        raise RuntimeError(f"{running} requests did not all write a token in each step: {before} became {written}.")
    return watch.costs


# ------------------------------------------------------------------ what the parts share


def fixed_requests(plan: Plan, count: int, new_tokens: int) -> list[Request]:
    """Requests of equal lengths with random ids."""
    generator = torch.Generator().manual_seed(plan.seed)
    ids = torch.randint(plan.cfg["vocab_size"], (count, plan.prompt), generator=generator)
    return [Request(row, new_tokens) for row in ids.tolist()]


def compared(sides: Sides, requests: Sequence[Request], tokens: Sequence, others: Sequence) -> dict:
    """How many requests got the others' tokens in every round, and where the rest part from them."""
    parted = {}
    for of_round in tokens:
        for one in differences(sides.base, requests, of_round, others):
            parted.setdefault(one["request"], one)
    return {"requests": len(requests), "equal": len(requests) - len(parted), "differences": list(parted.values())}


def settings(plan: Plan, *names: str) -> dict:
    """JSON-ready: what a part was asked, and the model."""
    return {"cfg": dict(plan.cfg), "seed": plan.seed, "noise": plan.noise} | {
        name: getattr(plan, name) for name in names
    }


MEASURES = {"one": measure_one, "queue": measure_queue, "prefix": measure_prefix, "profile": measure_profile}
