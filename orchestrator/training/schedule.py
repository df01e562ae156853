"""The learning rate at each step: a short linear warmup, then half a cosine down to a small rest.

Why warmup: AdamW's estimates of the gradient's size are poor in the first steps, and full steps would waste them.
"""

import math


def learning_rate(step: int, *, peak: float, warmup_steps: int, max_steps: int, min_ratio: float) -> float:
    """The learning rate for `step`, counted from 0.

    Args:
        step: 0 .. max_steps - 1.
        peak: the highest rate, reached at the end of the warmup.
        warmup_steps: steps of linear rise; 0: none.
        max_steps: steps of the whole run.
        min_ratio: the last step's rate, as a part of the peak.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, max_steps - 1 - warmup_steps)  # 0 after the warmup, 1 at the last step
    return peak * (min_ratio + (1 - min_ratio) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))
