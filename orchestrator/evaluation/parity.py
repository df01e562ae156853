"""Do all implementations of attention compute the same thing? The bound on error, and the cases it is tried on.

Floating-point sums depend on their order, so "the same" needs a bound. Ours was fixed before any result was seen:
against attention in float64, an implementation may be about as wrong as the plain formula in its own dtype:

    max|out - exact| <= factor * max|plain - exact| + 4 * eps(dtype) * max(1, scale)

    factor   2 for the context, 3 for the gradients dQ, dK, dV
    scale    max|V| for the context, max|dO V^T| * softmax_scale * sqrt(max(query_len, key_len)) for the gradients

The second term is for rows with one live key, where the plain formula happens to be exactly right.
"""

import random
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from itertools import chain, combinations, product

import torch
from torch import Tensor

from CMHA.implementations import IMPLEMENTATIONS
from CMHA.masks import AttentionMask
from CMHA.request import AttentionRequest
from orchestrator.evaluation.machine import wait_for

FACTORS = {"context": 2, "dQ": 3, "dK": 3, "dV": 3}

LENGTHS = ((1, 1), (1, 239), (3, 799), (17, 50), (50, 17), (97, 97), (113, 203), (128, 128), (239, 1), (257, 257),
           (1023, 1024))  # fmt: skip
AXES = {  # fields of a Case -> the values they take together
    ("dtype",): ((torch.float32,), (torch.bfloat16,), (torch.float16,)),
    ("head_dim",): ((16,), (32,), (64,), (80,), (96,), (128,)),
    ("query_len", "key_len"): LENGTHS,
    ("causal",): ((True,), (False,)),
    ("padding",): (("none",), ("right",), ("left",), ("row",)),
    ("num_heads", "num_kv_heads"): ((4, 4), (4, 2), (4, 1)),
    ("query_block_size", "kv_block_size"): ((16, 16), (32, 64), (64, 32), (128, 128)),
    ("strided",): ((False,), (True,)),
}


@dataclass(frozen=True)
class Case:
    """One attention call to be tried.

    Attributes:
        dtype, head_dim, query_len, key_len, causal, batch_size: of the call; lengths in tokens.
        padding: "none", a third of the last sequence's keys on the "right" or on the "left", or its whole "row".
        num_heads, num_kv_heads: equal, or grouped.
        query_block_size, kv_block_size: for the implementations that take them.
        strided: tensors laid out as in the layer, a slice of a wider projection with tokens before heads.
        seed: of the numbers.
        device: torch's device type.
    """

    dtype: torch.dtype = torch.float32
    head_dim: int = 64
    query_len: int = 128
    key_len: int = 128
    causal: bool = True
    padding: str = "none"
    num_heads: int = 4
    num_kv_heads: int = 4
    query_block_size: int | None = None
    kv_block_size: int | None = None
    strided: bool = False
    seed: int = 0
    batch_size: int = 2
    device: str = "cpu"

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5

    def __str__(self) -> str:
        mask = f"{'causal' if self.causal else 'full'}-pad_{self.padding}-{'strided' if self.strided else 'contiguous'}"
        sizes = f"d{self.head_dim}-{self.query_len}x{self.key_len}-h{self.num_heads}/{self.num_kv_heads}"
        return f"{self.dtype}-{sizes}-b{self.query_block_size}/{self.kv_block_size}-{mask}".removeprefix("torch.")


@dataclass(frozen=True)
class Measurement:
    """How far one implementation was from float64 in one case.

    Attributes:
        implementation: its name.
        case: what was computed.
        error, bound: {"context" | "dQ" | "dK" | "dV": value}.
        seconds: forward and backward together, once.
    """

    implementation: str
    case: Case
    error: dict[str, float]
    bound: dict[str, float]
    seconds: float

    @property
    def ratio(self) -> dict[str, float]:
        """error / bound of each quantity; above 1 is a miss."""
        return {key: self.error[key] / self.bound[key] for key in FACTORS}

    @property
    def passed(self) -> bool:
        return all(self.error[key] <= self.bound[key] for key in FACTORS)  # False for NaN too

    def as_dict(self) -> dict:
        """JSON-ready."""
        case = asdict(self.case) | {"dtype": str(self.case.dtype).removeprefix("torch.")}
        return vars(self) | {"case": case, "ratio": self.ratio, "passed": self.passed}


def tensors(case: Case) -> tuple[list[Tensor], Tensor, Tensor | None]:
    """The numbers of a case: [queries, keys, values], the gradient of the context, the padding mask or None."""
    generator = torch.Generator().manual_seed(case.seed)

    def normal(heads: int, length: int) -> Tensor:
        if not case.strided:
            shape = (case.batch_size, heads, length, case.head_dim)
            return torch.randn(shape, generator=generator).to(case.device, case.dtype)
        wide = torch.randn(case.batch_size, length, 3, heads, case.head_dim, generator=generator)
        return wide.to(case.device, case.dtype)[:, :, 1].transpose(1, 2)

    queries = normal(case.num_heads, case.query_len).requires_grad_()
    keys, values = (normal(case.num_kv_heads, case.key_len).requires_grad_() for _ in range(2))
    padding_mask = None
    if case.padding != "none":
        third = -(-case.key_len // 3)
        hidden = {"right": slice(case.key_len - third, None), "left": slice(third), "row": slice(None)}[case.padding]
        padding_mask = torch.ones(case.batch_size, case.key_len, dtype=torch.bool, device=case.device)
        padding_mask[-1, hidden] = False
    return [queries, keys, values], normal(case.num_heads, case.query_len), padding_mask


def plain(case: Case, dtype: torch.dtype, softmax: Callable = torch.softmax) -> dict[str, Tensor]:
    """Attention and its gradients in `dtype`, from the definition alone: nothing here is shared with CMHA."""
    inputs, grad_context, padding_mask = tensors(case)
    device = "cpu" if case.device == "mps" else case.device  # MPS has no float64
    leaves = [tensor.detach().to(device, dtype).requires_grad_() for tensor in inputs]
    kv_head = torch.arange(case.num_heads, device=device) // (case.num_heads // case.num_kv_heads)
    queries, keys, values = leaves[0], leaves[1][:, kv_head], leaves[2][:, kv_head]

    allowed = torch.ones(case.batch_size, 1, case.query_len, case.key_len, dtype=torch.bool, device=device)
    if case.causal:  # the last query stands at the last key
        allowed = allowed.tril(case.key_len - case.query_len)
    if padding_mask is not None:
        allowed = allowed & padding_mask.to(device)[:, None, None, :]
    scores = (queries @ keys.mT * case.scale).masked_fill(~allowed, torch.finfo(dtype).min)
    context = softmax(scores, dim=-1).masked_fill(~allowed, 0.0) @ values
    context.backward(grad_context.to(device, dtype))
    return results(context, leaves)


def reference(case: Case) -> dict[str, Tensor]:
    """What is right: {"context", "dQ", "dK", "dV"} in float64, with the softmax written out too."""

    def softmax(scores: Tensor, dim: int) -> Tensor:
        exponentials = torch.exp(scores - scores.detach().amax(dim, keepdim=True))
        return exponentials / exponentials.sum(dim, keepdim=True)

    return plain(case, torch.float64, softmax)


def results(context: Tensor, leaves: list[Tensor]) -> dict[str, Tensor]:
    return dict(zip(FACTORS, (context.detach(), *(leaf.grad for leaf in leaves)), strict=True))


def errors(found: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> dict[str, float]:
    return {key: float((found[key].to(exact[key].device).double() - exact[key]).abs().max()) for key in FACTORS}


@lru_cache(maxsize=2)
def expectation(case: Case) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The exact results of a case, and the bound on the error of each."""
    exact = reference(case)
    plain_error = errors(plain(case, case.dtype), exact)
    (_, _, values), grad_context, _ = tensors(case)
    values = values.detach().cpu().double().repeat_interleave(case.num_heads // case.num_kv_heads, dim=1)
    grad_weights = float((grad_context.cpu().double() @ values.mT).abs().max())
    grad_scale = grad_weights * case.scale * max(case.query_len, case.key_len) ** 0.5
    scales = dict.fromkeys(FACTORS, grad_scale) | {"context": float(values.abs().max())}
    eps = torch.finfo(case.dtype).eps
    return exact, {key: FACTORS[key] * plain_error[key] + 4 * eps * max(1.0, scales[key]) for key in FACTORS}


def measure(name_or_function: str | Callable, case: Case) -> Measurement:
    """Run one implementation, forward and backward, and hold it against the bound.

    Args:
        name_or_function: a name in the registry, or a function with the signature of `eager.attention`.
        case: what to compute.
    """
    name, attention = getattr(name_or_function, "__name__", str(name_or_function)), name_or_function
    if isinstance(name_or_function, str):
        module = IMPLEMENTATIONS[name]
        attention = partial(module.attention, **{key: getattr(case, key) for key in getattr(module, "OPTIONS", ())})
    exact, bound = expectation(case)
    inputs, grad_context, padding_mask = tensors(case)
    mask = mask_of(case, padding_mask)
    wait_for(case.device)
    start = time.perf_counter()
    context, _ = attention(*inputs, mask, scale=case.scale, dropout=0.0)
    context.backward(grad_context)
    wait_for(case.device)
    seconds = time.perf_counter() - start
    return Measurement(name, case, errors(results(context, inputs), exact), bound, seconds)


def mask_of(case: Case, padding_mask: Tensor | None) -> AttentionMask:
    lengths = (case.query_len, case.key_len)
    return AttentionMask(*lengths, causal=case.causal, padding_mask=padding_mask, device=case.device)


def usable(case: Case, names: Iterable[str] | None = None) -> list[str]:
    """The implementations, all or of those named, whose own check has nothing against the case."""
    (queries, keys, _), _, padding_mask = tensors(case)
    request = AttentionRequest.describe(queries, keys, mask_of(case, padding_mask))
    return [name for name in names or IMPLEMENTATIONS if not IMPLEMENTATIONS[name].check(request)]


def compare_implementations(cases: Iterable[Case], names: Iterable[str] | None = None) -> list[Measurement]:
    """Measure every implementation, or those named, in every case that its own check accepts."""
    return [measure(name, case) for case in cases for name in usable(case, names)]


def toggle_table(
    model_cfg: Mapping, batch: int = 2, tokens: int = 256, repeats: int = 7, device: str = "cpu"
) -> list[dict]:
    """What the toggle changes on this machine: the time, and how little else.

    Args:
        model_cfg: `emb_dim`, `n_heads` and, if there, `n_kv_heads` are read.
        batch, tokens: size of the call; causal, fp32, forward and backward.
        repeats: rounds; in each every implementation runs once, so that a busy moment hits all.
        device: torch's device type.
    Returns:
        For each usable implementation `Measurement.as_dict()` with the median `seconds` and `seconds_over_eager`.
    """
    heads = model_cfg["n_heads"]
    case = Case(
        head_dim=model_cfg["emb_dim"] // heads, query_len=tokens, key_len=tokens, num_heads=heads,
        num_kv_heads=model_cfg.get("n_kv_heads") or heads, batch_size=batch, strided=True,
        device=device,
    )  # fmt: skip
    names = usable(case)
    runs = {name: [] for name in names}
    for _, name in product(range(repeats), names):
        runs[name].append(measure(name, case))
    median = {name: statistics.median(run.seconds for run in runs[name]) for name in names}
    times = {name: {"seconds": median[name], "seconds_over_eager": median[name] / median["eager"]} for name in names}
    return [runs[name][0].as_dict() | times[name] for name in names]


def grid(pairwise: bool = True) -> Iterator[Case]:
    """The cases to try: a few in which every two values of any two axes meet, or all 38,016 of AXES' product."""
    sizes = [len(values) for values in AXES.values()]
    rows = all_pairs(sizes) if pairwise else product(*map(range, sizes))
    for seed, row in enumerate(rows):
        chosen = [zip(fields, AXES[fields][index], strict=True) for fields, index in zip(AXES, row, strict=True)]
        yield Case(**dict(chain(*chosen)), seed=seed)


def all_pairs(sizes: list[int], seed: int = 0, tries: int = 20) -> list[tuple[int, ...]]:
    """Rows of indices in which every pair of values of every two axes occurs: greedy, so small but not the smallest.

    Each row starts from a pair not yet seen and is filled up at random; the best of `tries` such rows is kept.
    """
    rng, axes = random.Random(seed), list(combinations(range(len(sizes)), 2))
    missing = {(a, b): set(product(range(sizes[a]), range(sizes[b]))) for a, b in axes}
    rows = []
    while any(missing.values()):
        a, b = max(axes, key=lambda pair: len(missing[pair]))
        start = dict(zip((a, b), min(missing[a, b]), strict=True))
        drawn = [tuple(start.get(x, rng.randrange(size)) for x, size in enumerate(sizes)) for _ in range(tries)]
        rows.append(max(drawn, key=lambda row: sum((row[x], row[y]) in missing[x, y] for x, y in axes)))
        for x, y in axes:
            missing[x, y].discard((rows[-1][x], rows[-1][y]))
    return rows
