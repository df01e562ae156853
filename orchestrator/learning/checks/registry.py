"""The exercises in the order in which they build on each other, and their groups."""

import difflib
from collections.abc import Iterable

from orchestrator.learning.checks.accounting import ATTENTION_SHARE, COUNT_PARAMETERS, FORWARD_FLOPS
from orchestrator.learning.checks.attention import CAUSAL_MASK, MULTI_HEAD_ATTENTION, ONE_HEAD
from orchestrator.learning.checks.cache import GPT2_WITH_CACHE, KV_CACHE_ATTENTION
from orchestrator.learning.checks.exercise import Exercise
from orchestrator.learning.checks.layers import GELU, LAYER_NORM
from orchestrator.learning.checks.model import GPT2, TRANSFORMER_BLOCK
from orchestrator.learning.checks.sampling import SAMPLE, SAMPLING_PROBABILITIES
from orchestrator.learning.checks.tiles import TILED_ATTENTION

EXERCISES: dict[str, Exercise] = {
    exercise.name: exercise
    for exercise in (
        LAYER_NORM, GELU,
        CAUSAL_MASK, ONE_HEAD, MULTI_HEAD_ATTENTION, TILED_ATTENTION,
        TRANSFORMER_BLOCK, GPT2,
        SAMPLING_PROBABILITIES, SAMPLE,
        KV_CACHE_ATTENTION, GPT2_WITH_CACHE,
        COUNT_PARAMETERS, FORWARD_FLOPS, ATTENTION_SHARE,
    )
}  # fmt: skip
GROUPS: dict[str, list[str]] = {}
for _exercise in EXERCISES.values():
    GROUPS.setdefault(_exercise.group, []).append(_exercise.name)


def chosen(names: Iterable[str]) -> list[Exercise]:
    """The exercises of these names and groups, each once, in the order of the table; all, if there are no names.

    Raises:
        ValueError: names that nothing has, all of them at once.
    """
    names = list(names)
    unknown = [name for name in names if name not in EXERCISES and name not in GROUPS]
    if unknown:
        hints = []
        for name in unknown:
            near = difflib.get_close_matches(name, [*GROUPS, *EXERCISES], n=1)
            hints.append(f"{name!r}" + (f" (did you mean {near[0]!r}?)" if near else ""))
        raise ValueError(
            f"no exercise and no group is called {', '.join(hints)}. Groups: {', '.join(GROUPS)}. "
            f"Exercises: {', '.join(EXERCISES)}."
        )
    wanted = {function for name in names for function in GROUPS.get(name, [name])} or set(EXERCISES)
    return [exercise for name, exercise in EXERCISES.items() if name in wanted]
