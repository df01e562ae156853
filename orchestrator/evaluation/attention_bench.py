"""Time and peak memory of every attention implementation by sequence length, measured side by side.

Times of a machine swing with what else it does, so only ratios from one interleaved run are worth comparing: in each
round every implementation runs once, in changing order, and its time is divided by eager's of the same round. The
call is the layer's own: plain causal mask, no dropout, tensors laid out as in the layer. Two times are taken: a forward
pass without a graph, as in evaluation, and forward + backward, as in training. The lines for CUDA (waiting for the
device, its allocator's peak) were written without a GPU and have not been run.
"""

import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from orchestrator.evaluation.cases import Case, mask_of, request_of, tensors
from orchestrator.evaluation.machine import wait_for
from orchestrator.evaluation.memory import peak_tensor_bytes
from orchestrator.evaluation.memory_guard import growth_exponent, inputs_too_large, too_large
from orchestrator.evaluation.parity import checked, serves

PASSES = ("forward", "forward_backward")


@dataclass(frozen=True)
class Bench:
    """What is measured.

    Attributes:
        implementations: {name: module of the registry's form}.
        lengths: in tokens, rising.
        batch, heads, kv_heads, head_dim, dtype, device: of each call; device is torch's type: "cpu", "cuda", "mps".
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
    forward_only: bool = False
    repeats: int = 5
    seed: int = 0

    def case(self, length: int) -> Case:
        """The call that is measured at one length."""
        return Case(
            dtype=self.dtype, head_dim=self.head_dim, query_len=length, key_len=length, causal=True,
            num_heads=self.heads, num_kv_heads=self.kv_heads, batch_size=self.batch, strided=True, seed=self.seed,
            device=self.device,
        )  # fmt: skip

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
        seconds, over_eager: {pass: spread}; over_eager is its time / eager's of the same round, None without eager.
        peak_bytes: {pass: bytes alive at the worst moment, above inputs and mask}; None: this device does not tell.
        first_peak_bytes: the same for a forward pass with a new mask, hence with what is made of the mask once.
    """

    implementation: str
    length: int
    not_measured: str | None = None
    failed: bool = False
    gradients: bool = False
    first_call_seconds: float | None = None
    seconds: dict[str, dict | None] | None = None
    over_eager: dict[str, dict | None] | None = None
    peak_bytes: dict[str, int | None] | None = None
    first_peak_bytes: int | None = None

    @property
    def worst_peak(self) -> int:
        """Bytes; 0: not measured."""
        peaks = [self.first_peak_bytes, *(self.peak_bytes or {}).values()]
        return max(peak or 0 for peak in peaks)


class Call:
    """One implementation at one length, ready to be run; the inputs are shared among implementations."""

    def __init__(self, module: object, case: Case, inputs: list[Tensor], grad_context: Tensor):
        self.module, self.case, self.inputs, self.grad_context = module, case, inputs, grad_context
        self.options = {key: getattr(case, key) for key in getattr(module, "OPTIONS", ())}

    def forward(self, mask) -> tuple:
        """(context, weights or None), without a graph."""
        with torch.no_grad():
            return self.module.attention(*self.inputs, mask, scale=self.case.scale, dropout=0.0, **self.options)

    def forward_backward(self, mask) -> tuple[Tensor, ...]:
        """The gradients of queries, keys and values. Weights are let go before the backward pass, as in the layer."""
        context, _ = self.module.attention(*self.inputs, mask, scale=self.case.scale, dropout=0.0, **self.options)
        del _
        return torch.autograd.grad(context, self.inputs, self.grad_context)

    def first(self, mask, gradients: bool) -> float:
        """Seconds of the warm-up, in which things are compiled and the mask's tables made; checks what comes back."""
        start = time.perf_counter()
        checked(self.forward(mask), self.inputs[0])
        if gradients:
            self.forward_backward(mask)
        wait_for(self.case.device)
        return time.perf_counter() - start

    def seconds(self, mask, gradients: bool) -> dict[str, float]:
        """One turn in a round: each pass once, the device waited for before and after."""
        device = self.case.device
        return {name: timed(lambda name=name: getattr(self, name)(mask), device) for name in passes(gradients)}

    def peak_bytes(self, mask, gradients: bool) -> dict[str, int | None]:
        """Each pass once more, not timed."""
        device, wanted = self.case.device, passes(gradients)
        peaks = {name: peak_memory(lambda name=name: getattr(self, name)(mask), device) for name in wanted}
        return dict.fromkeys(PASSES) | peaks


def run_bench(bench: Bench, tick: Callable[[str, int], None] = lambda doing, count: None) -> tuple[list[Row], list]:
    """Measure everything.

    Args:
        tick: told after each turn what was done, and how many of `turns(bench)` that was.
    Returns:
        A Row for each length and implementation; and the rounds: {"length", "round", "seconds": {name: {pass: s}}},
        names in the order in which they ran, None for one that failed there.
    """
    rows, rounds = [], []
    for length in bench.lengths:
        case = bench.case(length)
        here = [first_look(bench, name, case, rows) for name in bench.implementations]
        can_run = [row for row in here if row.not_measured is None]
        tick(f"T = {length}", (len(here) - len(can_run)) * (bench.repeats + 2))
        if can_run:
            rounds += run_length(bench, case, can_run, tick)
        rows += here
    return rows, rounds


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
        except Exception as error:  # a kernel may raise anything, and the others should still be measured
            line = next(iter(str(error).splitlines()), "")
            row.not_measured, row.failed = f"{type(error).__name__}: {line}", True
            return None
        finally:
            tick(f"{name}, T = {case.query_len}", 1)

    def still_in() -> list[str]:
        return [row.implementation for row in rows if not row.failed]

    for name in still_in():
        by_name[name].first_call_seconds = attempt(lambda call, row: call.first(mask, row.gradients), name)
    rounds = []
    for number, order in enumerate(orders(still_in(), bench.repeats, random.Random(f"{bench.seed} {case.query_len}"))):
        names = [name for name in order if name in still_in()]
        seconds = {name: attempt(lambda call, row: call.seconds(mask, row.gradients), name) for name in names}
        rounds.append({"length": case.query_len, "round": number, "seconds": seconds})
    for name in still_in():
        attempt(lambda call, row: measure_memory(call, row, mask), name)
    for name in still_in():
        summarise(by_name[name], rounds, with_eager="eager" in still_in())
    return rounds


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


def passes(gradients: bool) -> tuple[str, ...]:
    return PASSES if gradients else PASSES[:1]


def timed(function: Callable, device: str) -> float:
    """Seconds of one call, on a device that has nothing else of ours to do."""
    wait_for(device)
    start = time.perf_counter()
    function()
    wait_for(device)
    return time.perf_counter() - start


def peak_memory(function: Callable, device: str) -> int | None:
    """Bytes alive at the worst moment above what lived before; None where the device does not tell (MPS)."""
    if device == "cpu":
        return peak_tensor_bytes(function).peak
    if device != "cuda":
        return None
    wait_for(device)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    wait_for(device)
    return torch.cuda.max_memory_allocated() - before


def summarise(row: Row, rounds: Sequence[dict], with_eager: bool) -> None:
    """Fill in the row's spreads from its rounds; the ratio to eager is taken round by round, then its median."""
    row.seconds, row.over_eager = dict.fromkeys(PASSES), dict.fromkeys(PASSES)
    for name in passes(row.gradients):
        times = [taken["seconds"][row.implementation][name] for taken in rounds]
        row.seconds[name] = spread(times)
        if with_eager:
            eager = [taken["seconds"]["eager"][name] for taken in rounds]
            row.over_eager[name] = spread([mine / its for mine, its in zip(times, eager, strict=True)])


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
