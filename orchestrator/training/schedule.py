"""The learning rate at each step: a short linear warmup, then down to a small rest, by one of two ways.

Why warmup: AdamW's estimates of the gradient's size are poor in the first steps, and full steps would waste them.
Cosine falls all the way, so its length must be known beforehand; warmup-stable-decay stays at the peak and falls only
at the end, so that a run may be made longer by going on from before the fall.
"""

import math


def learning_rate(
    step: int,
    *,
    peak: float,
    warmup_steps: int,
    max_steps: int,
    min_ratio: float,
    schedule: str = "cosine",
    decay_part: float = 0.2,
) -> float:
    """The learning rate for `step`, counted from 0.

    Args:
        step: 0 .. max_steps - 1.
        peak: the highest rate, reached at the end of the warmup.
        warmup_steps: steps of linear rise; 0: none.
        max_steps: steps of the whole run.
        min_ratio: the last step's rate, as a part of the peak.
        schedule: "cosine"; "wsd": stable at the peak, then a straight line down; "constant".
        decay_part: of the whole run, how much is the fall of "wsd".
    Source: cosine: Loshchilov and Hutter, 2017; warmup-stable-decay: Hu et al., 2024 (MiniCPM).
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if schedule == "constant":
        return peak
    if schedule == "wsd":
        fall = max(1, min(round(decay_part * max_steps), max_steps - warmup_steps))
        fallen = max(0.0, (step - (max_steps - 1 - fall)) / fall)  # 0 before the fall, 1 at the last step
        return peak * (1 - (1 - min_ratio) * min(1.0, fallen))
    progress = (step - warmup_steps) / max(1, max_steps - 1 - warmup_steps)  # 0 after the warmup, 1 at the last step
    return peak * (min_ratio + (1 - min_ratio) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))
