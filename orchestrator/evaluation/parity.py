"""Do all implementations of attention compute the same thing? The bound on error, and the cases it is tried on.

Floating-point sums depend on their order, so "the same" needs a bound. Ours was fixed before any result was seen:
against attention in float64, an implementation may be about as wrong as the plain formula in its own dtype:

    max|out - exact| <= factor * max|plain - exact| + 4 * eps(dtype) * max(1, scale)

    factor   2 for the context, 3 for the gradients dQ, dK, dV
    scale    max|V| for the context, max|dO V^T| * softmax_scale * sqrt(max(query_len, key_len)) for the gradients

The second term is for rows with one live key, where the plain formula happens to be exactly right. A query that may see
nothing must give exactly 0. `grading.py` runs whole grids of cases, and `python -m orchestrator parity` prints them.
"""

import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from itertools import product
from types import SimpleNamespace

import torch
from torch import Tensor

from CMHA.implementations import IMPLEMENTATIONS
from orchestrator.evaluation.cases import Case, documents_of, mask_of, request_of, tensors
from orchestrator.evaluation.machine import wait_for

FACTORS = {"context": 2, "dQ": 3, "dK": 3, "dV": 3}


@dataclass(frozen=True)
class Measurement:
    """How far one implementation was from float64 in one case.

    Attributes:
        implementation: its name.
        case: what was computed.
        error, bound: {"context" | "dQ" | "dK" | "dV": value}; only "context" where it serves no backward pass.
        seconds: forward and backward together, once.
        failure: what went wrong besides the numbers, an error that it raised for example; None: nothing.
    """

    implementation: str
    case: Case
    error: dict[str, float]
    bound: dict[str, float]
    seconds: float
    failure: str | None = None

    @property
    def ratio(self) -> dict[str, float]:
        """error / bound of each quantity; above 1 is a miss."""
        return {key: self.error[key] / self.bound[key] for key in self.error}

    @property
    def missed(self) -> list[str]:
        """The quantities that are not within their bound; a NaN is not."""
        return [key for key in self.error if not self.error[key] <= self.bound[key]]

    @property
    def passed(self) -> bool:
        return not self.missed and self.failure is None

    def as_dict(self) -> dict:
        """JSON-ready."""
        case = asdict(self.case) | {"dtype": str(self.case.dtype).removeprefix("torch.")}
        return vars(self) | {"case": case, "ratio": self.ratio, "passed": self.passed}


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
    at_query = torch.arange(case.query_len, device=device)[:, None] + case.key_len - case.query_len
    if case.window is not None:
        allowed = allowed & ((at_query - torch.arange(case.key_len, device=device)).abs() < case.window)
    if case.documents:
        number = documents_of(case).to(device)
        allowed = allowed & (number[:, at_query] == number[:, None, :])[:, None]
    scores = (queries @ keys.mT * case.scale).masked_fill(~allowed, torch.finfo(dtype).min)
    context = softmax(scores, dim=-1).masked_fill(~allowed, 0.0) @ values
    if padding_mask is not None and case.padded_queries == "zero":
        context = context * padding_mask.to(device)[:, None, case.key_len - case.query_len :, None]
    context.backward(grad_context.to(device, dtype))
    return results(context, leaves)


def reference(case: Case) -> dict[str, Tensor]:
    """What is right: {"context", "dQ", "dK", "dV"} in float64, with the softmax written out too."""

    def softmax(scores: Tensor, dim: int) -> Tensor:
        exponentials = torch.exp(scores - scores.detach().amax(dim, keepdim=True))
        return exponentials / exponentials.sum(dim, keepdim=True)

    return plain(case, torch.float64, softmax)


def results(context: Tensor, leaves: list[Tensor]) -> dict[str, Tensor]:
    grads = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]  # None: it was not used
    return dict(zip(FACTORS, (context.detach(), *grads), strict=True))


def errors(found: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> dict[str, float]:
    return {key: float((found[key].to(exact[key].device).double() - exact[key]).abs().max()) for key in found}


def expectation(case: Case) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The exact results of a case, and the bound on the error of each: the same for any block size, and for poison."""
    return _expectation(replace(case, poison=False, query_block_size=None, kv_block_size=None))


@lru_cache(maxsize=2)
def _expectation(case: Case) -> tuple[dict[str, Tensor], dict[str, float]]:
    exact = reference(case)
    plain_error = errors(plain(case, case.dtype), exact)
    (_, _, values), grad_context, _ = tensors(case)
    values = values.detach().cpu().double().repeat_interleave(case.num_heads // case.num_kv_heads, dim=1)
    grad_weights = float((grad_context.cpu().double() @ values.mT).abs().max())
    grad_scale = grad_weights * case.scale * max(case.query_len, case.key_len) ** 0.5
    scales = dict.fromkeys(FACTORS, grad_scale) | {"context": float(values.abs().max())}
    eps = torch.finfo(case.dtype).eps
    return exact, {key: FACTORS[key] * plain_error[key] + 4 * eps * max(1.0, scales[key]) for key in FACTORS}


def measure(what: str | Callable | object, case: Case) -> Measurement:
    """Run one implementation, forward and backward, and hold it against the bound.

    Args:
        what: a name in the registry; a module of that form; or a function with the signature of `eager.attention`.
        case: what to compute. Where the implementation's own check accepts it without a backward pass only, the forward
            pass is measured.
    Raises:
        ValueError: what came back is not (context, weights) with a context of the shape and dtype of the queries.
    """
    name, module = named(what)
    if getattr(module, "PADDED_QUERIES_GIVE_ZERO", False) and case.padding != "none":
        case = replace(case, padded_queries="zero")
    exact, bound = expectation(case)
    gradients = serves(module, case)
    inputs, grad_context, padding_mask = tensors(case)
    mask = mask_of(case, padding_mask)
    options = {key: getattr(case, key) for key in getattr(module, "OPTIONS", ())}
    wait_for(case.device)
    start = time.perf_counter()
    with torch.set_grad_enabled(gradients):
        returned = module.attention(*inputs, mask, scale=case.scale, dropout=0.0, **options)
        context = checked(returned, inputs[0])
    if gradients and not context.requires_grad:
        raise ValueError("the context has no gradient: was it computed under torch.no_grad(), or detached?")
    if gradients:
        context.backward(grad_context)
    wait_for(case.device)
    seconds = time.perf_counter() - start
    found = results(context, inputs) if gradients else {"context": context.detach()}
    empty = (exact["context"] == 0).all(dim=-1)
    spoiled = int((found["context"].to(empty.device)[empty] != 0).any(dim=-1).sum())  # NaN is not 0 either
    what = "NaN" if found["context"].isnan().any() else "not exactly 0"
    failure = f"{spoiled} of {int(empty.sum())} rows that may see nothing are {what}" if spoiled else None
    return Measurement(name, case, errors(found, exact), {key: bound[key] for key in found}, seconds, failure)


def named(what: str | Callable | object) -> tuple[str, object]:
    """(name, module) of an implementation that is given by name, as a module, or as a function."""
    if isinstance(what, str):
        return what, IMPLEMENTATIONS[what]
    name = what.__name__.rpartition(".")[2]
    return name, what if hasattr(what, "attention") else SimpleNamespace(attention=what)


def checked(returned: object, queries: Tensor) -> Tensor:
    """The context of what an implementation returned, if it is what the registry's contract says."""
    if not (isinstance(returned, tuple) and len(returned) == 2 and isinstance(returned[0], Tensor)):
        raise ValueError(f"attention must return (context, weights or None), got {type(returned).__name__}.")
    context = returned[0]
    if context.shape != queries.shape or context.dtype != queries.dtype:
        raise ValueError(
            f"the context must be {queries.dtype} {tuple(queries.shape)}, as the queries; got {context.dtype} "
            f"{tuple(context.shape)}."
        )
    return context


def serves(module: object, case: Case) -> bool | None:
    """Whether its own check accepts the case: True with gradients, False forward only, None not at all."""
    check = getattr(module, "check", lambda request: [])
    accepted = [needs_grad for needs_grad in (True, False) if not check(request_of(case, needs_grad))]
    return accepted[0] if accepted else None


def usable(case: Case, names: Iterable[str] | None = None) -> list[str]:
    """The implementations, all or of those named, that serve the case with gradients by their own check."""
    return [name for name in names or IMPLEMENTATIONS if serves(IMPLEMENTATIONS[name], case)]


def compare_implementations(cases: Iterable[Case], names: Iterable[str] | None = None) -> list[Measurement]:
    """Measure every implementation, or those named, in every case that its own check accepts."""
    return [
        measure(name, case)
        for case in cases
        for name in names or IMPLEMENTATIONS
        if serves(IMPLEMENTATIONS[name], case) is not None
    ]


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
