"""Time and peak memory of every attention implementation by sequence length, measured side by side.

Times of a machine swing with what else it does, so only ratios from one interleaved run are worth comparing: in each
round every implementation runs once, in changing order, and its time is divided by eager's of the same round. The
call is the layer's own: plain causal mask, no dropout, tensors laid out as in the layer. Two times are taken: a forward
pass without a graph, as in evaluation, and forward + backward, as in training. What is not within the bound of
`parity.py` is not timed. The lines for CUDA were written without a GPU and have not been run.
"""

import random
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from orchestrator.evaluation.attention_call import PASSES, Call, passes
from orchestrator.evaluation.cases import Case, mask_of, request_of, tensors
from orchestrator.evaluation.device_timing import attention_flops, peak_memory
from orchestrator.evaluation.memory_guard import growth_exponent, inputs_too_large, too_large
from orchestrator.evaluation.parity import serves


@dataclass(frozen=True)
class Bench:
    """What is measured.

    Attributes:
        implementations: {name: module of the registry's form}.
        lengths: in tokens, rising.
        batch, heads, kv_heads, head_dim, dtype, device: of each call; device is torch's type: "cpu", "cuda", "mps".
        tokens: of all sequences of a call together, as many at each length, instead of `batch`; None: `batch` holds.
        causal: False: every query sees every key.
        baseline: the one of the implementations that the others' speed is given in; None: none.
        forward_only: leave the backward pass out.
        repeats: rounds for each length.
        seed: of the numbers and of the order in each round.
    """

    implementations: Mapping[str, object]
    lengths: Sequence[int]
    batch: int = 1
    heads: int = 4
    kv_heads: int = 4
    head_dim: int = 64
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    tokens: int | None = None
    causal: bool = True
    baseline: str | None = None
    forward_only: bool = False
    repeats: int = 5
    seed: int = 0

    def case(self, length: int) -> Case:
        """The call that is measured at one length."""
        return Case(
            dtype=self.dtype, head_dim=self.head_dim, query_len=length, key_len=length, causal=self.causal,
            num_heads=self.heads, num_kv_heads=self.kv_heads, batch_size=self.batch_at(length), strided=True,
            seed=self.seed, device=self.device,
        )  # fmt: skip

    def batch_at(self, length: int) -> int:
        """Sequences of a call at one length."""
        return self.batch if self.tokens is None else max(1, self.tokens // length)

    def settings(self) -> dict:
        """JSON-ready."""
        fields = {key: value for key, value in vars(self).items() if key != "implementations"}
        names = {"implementations": list(self.implementations), "lengths": list(self.lengths)}
        return fields | names | {"dtype": str(self.dtype).removeprefix("torch.")}


@dataclass
class Row:
    """One implementation at one length.

    Attributes:
        not_measured: why there are no figures; None: there are.
        failed: it raised an error, and `not_measured` holds it.
        gradients: forward + backward was measured too; without it the figures of that pass are None.
        first_call_seconds: the warm-up, with what is compiled or made once for this length.
        errors: {quantity: largest error / its bound}, in a call of at most 1,024 tokens; above 1 it is not timed.
        seconds, over_eager: {pass: spread}; over_eager is its time / eager's of the same round, None without eager.
        speed: {pass: spread}, the baseline's time / its own of the same round: 2 is twice as fast; None without one.
        tflops: {pass: 1e12 FLOPs a second}, by formula and the median time; None: that pass was not measured.
        peak_bytes: {pass: bytes alive at the worst moment, above inputs and mask}; None: this device does not tell.
        first_peak_bytes: the same for a forward pass with a new mask, hence with what is made of the mask once.
    """

    implementation: str
    length: int
    not_measured: str | None = None
    failed: bool = False
    gradients: bool = False
    first_call_seconds: float | None = None
    errors: dict[str, float] | None = None
    seconds: dict[str, dict | None] | None = None
    over_eager: dict[str, dict | None] | None = None
    speed: dict[str, dict | None] | None = None
    tflops: dict[str, float | None] | None = None
    peak_bytes: dict[str, int | None] | None = None
    first_peak_bytes: int | None = None

    @property
    def worst_peak(self) -> int:
        """Bytes; 0: not measured."""
        peaks = [self.first_peak_bytes, *(self.peak_bytes or {}).values()]
        return max(peak or 0 for peak in peaks)


def run_bench(bench: Bench, tick: Callable[[str, int], None] = lambda doing, count: None) -> tuple[list[Row], list]:
    """Measure everything.

    Args:
        tick: told after each turn what was done, and how many of `turns(bench)` that was.
    Returns:
        A Row for each length and implementation; and the rounds: {"length", "round", "seconds": {name: {pass: s}}},
        names in the order in which they ran, None for one that failed there.
    """
    rows, rounds = [], []
    tune(bench)
    for length in bench.lengths:
        case = bench.case(length)
        here = [first_look(bench, name, case, rows) for name in bench.implementations]
        can_run = [row for row in here if row.not_measured is None]
        tick(f"T = {length}", (len(here) - len(can_run)) * (bench.repeats + 2))
        if can_run:
            rounds += run_length(bench, case, can_run, tick)
        rows += here
    return rows, rounds


def tune(bench: Bench) -> None:
    """On a GPU: let what tunes itself at its first call do that at the longest length, where it matters most."""
    case = bench.case(bench.lengths[-1])
    for module in bench.implementations.values() if bench.device == "cuda" else ():
        if hasattr(module, "tuned") and serves(module, case) is not None and not inputs_too_large(case):
            inputs, grad_context, _ = tensors(case)
            gradients = bool(serves(module, case)) and not bench.forward_only
            try:
                Call(module, case, inputs, grad_context).first(mask_of(case, None), gradients)
            except Exception:  # it will be raised again where it is measured, and be said there
                torch.cuda.empty_cache()


def turns(bench: Bench) -> int:
    """How many turns there are: a warm-up, the rounds and a memory pass for each implementation and length."""
    return len(bench.lengths) * len(bench.implementations) * (bench.repeats + 2)


def first_look(bench: Bench, name: str, case: Case, earlier: Sequence[Row]) -> Row:
    """An empty row, which says so where the implementation cannot serve the case or would not fit."""
    module = bench.implementations[name]
    accepted = serves(module, case)
    row = Row(name, case.query_len, gradients=bool(accepted) and not bench.forward_only)
    if accepted is None:
        row.not_measured = refusal(module, case)
    else:
        shorter = [other for other in earlier if other.implementation == name]
        peaks = [(other.length, other.worst_peak) for other in shorter if other.worst_peak]
        row.not_measured = inputs_too_large(case) or too_large(name, case, peaks)
    return row


def run_length(bench: Bench, case: Case, rows: Sequence[Row], tick: Callable) -> list[dict]:
    """Fill in the rows of one length, and return its rounds. What raises an error is left out from there on."""
    inputs, grad_context, _ = tensors(case)
    mask = mask_of(case, None)  # one for all rounds, as all layers of a model share one
    by_name = {row.implementation: row for row in rows}
    calls = {name: Call(bench.implementations[name], case, inputs, grad_context) for name in by_name}

    def attempt(doing: Callable, name: str) -> object:
        """`doing(call, row)`, or None if it raised."""
        row = by_name[name]
        try:
            return doing(calls[name], row)
        except torch.OutOfMemoryError as error:  # no failure: a figure of its own
            row.not_measured = "out of memory: " + next(iter(str(error).splitlines()), "")
            return None
        except Exception as error:  # a kernel may raise anything, and the others should still be measured
            line = next(iter(str(error).splitlines()), "")
            row.not_measured, row.failed = f"{type(error).__name__}: {line}", True
            return None
        finally:
            tick(f"{name}, T = {case.query_len}", 1)

    def still_in() -> list[str]:
        return [row.implementation for row in rows if row.not_measured is None]

    for name in still_in():
        attempt(lambda call, row: prepare(call, row, mask), name)
    rounds = []
    for number, order in enumerate(orders(still_in(), bench.repeats, random.Random(f"{bench.seed} {case.query_len}"))):
        names = [name for name in order if name in still_in()]
        seconds = {name: attempt(lambda call, row: call.seconds(mask, row.gradients), name) for name in names}
        rounds.append({"length": case.query_len, "round": number, "seconds": seconds})
    for name in still_in():
        attempt(lambda call, row: measure_memory(call, row, mask), name)
    for name in still_in():
        summarise(by_name[name], rounds, still_in(), bench.baseline)
        medians = {key: found and found["median"] for key, found in by_name[name].seconds.items()}
        by_name[name].tflops = {
            key: median and attention_flops(case, key) / median / 1e12 for key, median in medians.items()
        }
    return rounds


def prepare(call: Call, row: Row, mask) -> None:
    """The warm-up at full size, then the errors: of the kernels that are going to be timed."""
    row.first_call_seconds = call.first(mask, row.gradients)
    row.errors = call.errors()
    call.warm_up(mask, row.gradients)


def orders(names: Sequence[str], repeats: int, draw: random.Random) -> Iterator[list[str]]:
    """One order for each round: as many rounds as names turn a drawn order round, so that each goes first once."""
    for number in range(repeats if names else 0):
        at = number % len(names)
        if at == 0:
            drawn = draw.sample(names, len(names))
        yield drawn[at:] + drawn[:at]


def measure_memory(call: Call, row: Row, mask) -> None:
    """Both passes with the mask of the rounds, and a forward pass with a new one."""
    row.peak_bytes = call.peak_bytes(mask, row.gradients)
    row.first_peak_bytes = peak_memory(lambda: call.forward(mask_of(call.case, None)), call.case.device)


def summarise(row: Row, rounds: Sequence[dict], measured: Sequence[str], baseline: str | None = None) -> None:
    """Fill in the row's spreads from its rounds; ratios are taken round by round, then their median.

    Args:
        measured: the names that ran in every round. baseline: one of them, or one that did not, or None.
    """
    row.seconds, row.over_eager, row.speed = (dict.fromkeys(PASSES) for _ in range(3))
    for name in passes(row.gradients):
        times = {other: [(taken["seconds"][other] or {}).get(name) for taken in rounds] for other in measured}
        mine = times[row.implementation]
        row.seconds[name] = spread(mine)
        if "eager" in times and None not in times["eager"]:
            row.over_eager[name] = spread([own / its for own, its in zip(mine, times["eager"], strict=True)])
        if baseline in times and None not in times[baseline]:  # None: a baseline without a backward pass
            row.speed[name] = spread([its / own for own, its in zip(mine, times[baseline], strict=True)])


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, quartiles and extremes."""
    quartiles = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    keys = ("min", "lower_quartile", "median", "upper_quartile", "max")
    return dict(zip(keys, (min(values), *quartiles, max(values)), strict=True))


def growth(rows: Sequence[Row]) -> list[dict]:
    """For each implementation how time and peak memory grow between the last two lengths that it was measured at.

    Returns:
        {"implementation", "from", "to", "time": {pass: exponent}, "memory": {pass: exponent}}; None: not measured.
    """
    found = []
    for name in dict.fromkeys(row.implementation for row in rows):
        last_two = [row for row in rows if row.implementation == name and row.not_measured is None][-2:]
        if len(last_two) == 2:
            lengths = [row.length for row in last_two]
            times = {key: [row.seconds[key] and row.seconds[key]["median"] for row in last_two] for key in PASSES}
            peaks = {key: [row.peak_bytes[key] for row in last_two] for key in PASSES}
            exponents = {
                what: {key: growth_exponent(lengths, values[key]) if all(values[key]) else None for key in PASSES}
                for what, values in (("time", times), ("memory", peaks))
            }
            found.append({"implementation": name, "from": lengths[0], "to": lengths[1], **exponents})
    return found


def refusal(module: object, case: Case, remedies: bool = False) -> str:
    """Why the implementation's own check says no even to a forward pass, and what to do about it if `remedies`."""
    reasons = module.check(request_of(case, needs_grad=False))
    return "; ".join(f"{reason.message}: {reason.remedy}" if remedies else reason.message for reason in reasons)
