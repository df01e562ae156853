"""Many sentences about tensors in few lines: what is the same in several blocks is said once, and nothing is left out.

("blocks.0.norm_1.bias", "is missing"), and so on for 12 blocks -> "blocks 0 to 11: norm_1.bias is missing".
"""

import re
from collections.abc import Iterable


def grouped(sentences: Iterable[tuple[str, str]]) -> list[str]:
    """One line for what is said alike of the same tensor in several blocks, in the order in which it first comes.

    Args:
        sentences: pairs of a tensor's name and what is said about it.
    """
    together: dict[tuple[str, str, str], list[int]] = {}
    for name, phrase in sentences:
        parts = re.fullmatch(r"(.*?)\.(\d+)\.(.*)", name)
        before, number, behind = parts.groups() if parts else (name, None, "")
        together.setdefault((before, behind, phrase), []).extend([] if number is None else [int(number)])
    lines = []
    for (before, behind, phrase), numbers in together.items():
        if len(numbers) > 1:
            lines.append(f"{before} {ranges(numbers)}: {behind} {phrase}")
        else:
            lines.append(f"{'.'.join([before, *map(str, numbers), *([behind] if numbers else [])])} {phrase}")
    return lines


def ranges(numbers: Iterable[int]) -> str:
    """[0, 1, 2, 5, 7, 8] -> "0 to 2, 5, 7 and 8"."""
    numbers = sorted(set(numbers))
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    said = []
    for run in runs:
        said += [f"{run[0]} to {run[-1]}"] if len(run) > 2 else [str(number) for number in run]
    return said[0] if len(said) == 1 else f"{', '.join(said[:-1])} and {said[-1]}"
