"""One implementation of attention at one length, ready to be run, checked and timed; for `attention_bench.py`."""

import time
from dataclasses import replace

import torch
from torch import Tensor

from orchestrator.evaluation.cases import Case
from orchestrator.evaluation.device_timing import device_timed, peak_memory
from orchestrator.evaluation.grading import failed
from orchestrator.evaluation.machine import wait_for
from orchestrator.evaluation.parity import FACTORS, checked, measure

PASSES = ("forward", "forward_backward")
CHECKED = 1024  # tokens, at most, of the call whose errors are looked at: the exact answer needs tables in float64
WARM_UPS = 10  # at most, on a GPU


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
        """Seconds of the warm-up, in which things are compiled and the mask's tables made; checks what comes back.

        Raises:
            ValueError: no context of the right shape and dtype; NaN or infinity in it or in a gradient.
        """
        start = time.perf_counter()
        found = [checked(self.forward(mask), self.inputs[0])]
        if gradients:
            found += self.forward_backward(mask)
        wait_for(self.case.device)
        seconds = time.perf_counter() - start
        named = zip(FACTORS, found, strict=False)  # context, dQ, dK, dV, or the first of them
        spoiled = [name for name, tensor in named if not tensor.isfinite().all()]
        if spoiled:
            raise ValueError(f"there is NaN or infinity in {', '.join(spoiled)}, so it is not timed.")
        return seconds

    def warm_up(self, mask, gradients: bool) -> None:
        """On a GPU some turns more, until one is hardly faster than the last: all is compiled, tuned and clocked up."""
        before = float("inf")
        for _ in range(WARM_UPS if self.case.device == "cuda" else 0):
            now = sum(self.seconds(mask, gradients).values())
            if now > 0.9 * before:
                return
            before = now

    def errors(self) -> dict[str, float]:
        """{quantity: error / bound} of a smaller call, by the kernels that the warm-up has chosen.

        Raises:
            ValueError: it is not within its bound.
        """
        length = min(self.case.query_len, CHECKED)
        found = measure(self.module, replace(self.case, batch_size=1, query_len=length, key_len=length))
        if failed(found):
            what = ", ".join(f"{key} {found.error[key]:.1e} (bound {found.bound[key]:.1e})" for key in found.missed)
            raise ValueError(f"it is wrong, so it is not timed: {found.failure or what}.")
        return found.ratio

    def seconds(self, mask, gradients: bool) -> dict[str, float]:
        """One turn in a round: each pass once, the device waited for before and after."""
        device = self.case.device
        return {name: device_timed(lambda name=name: getattr(self, name)(mask), device) for name in passes(gradients)}

    def peak_bytes(self, mask, gradients: bool) -> dict[str, int | None]:
        """Each pass once more, not timed."""
        device, wanted = self.case.device, passes(gradients)
        peaks = {name: peak_memory(lambda name=name: getattr(self, name)(mask), device) for name in wanted}
        return dict.fromkeys(PASSES) | peaks


def passes(gradients: bool) -> tuple[str, ...]:
    """The passes that are measured, with a backward pass or without."""
    return PASSES if gradients else PASSES[:1]
