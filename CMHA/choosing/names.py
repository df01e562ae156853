"""What the implementations are called: canonical names and their aliases."""

import difflib
from collections.abc import Iterable

from CMHA.implementations import IMPLEMENTATIONS

AUTO = "auto"


def known_names() -> dict[str, tuple[str, ...]]:
    """Every canonical name with its aliases, `auto` first."""
    return {AUTO: (), **{name: tuple(module.ALIASES) for name, module in IMPLEMENTATIONS.items()}}


def canonical_name(name: object) -> str:
    """The canonical name behind `name`; None means auto.

    Raises:
        ValueError: an unknown name, with the known ones and the nearest.
    """
    if name is None:
        return AUTO
    names = known_names()
    canonical = {alias: canonical for canonical, aliases in names.items() for alias in (canonical, *aliases)}
    if isinstance(name, str) and name in canonical:
        return canonical[name]
    known = ", ".join(sorted(canonical))
    raise ValueError(f"unknown attn_implementation {name!r}.{did_you_mean(name, canonical)} Known names: {known}.")


def did_you_mean(word: object, known: Iterable[str]) -> str:
    """ " Did you mean 'the nearest'?", or nothing where nothing is near."""
    known = list(known)
    near = difflib.get_close_matches(str(word), known, n=1) or difflib.get_close_matches(str(word).lower(), known, n=1)
    return f" Did you mean {near[0]!r}?" if near else ""


def markdown_table() -> str:
    """The table of implementations that stands in the README."""
    lines = ["| name | what it is |", "| --- | --- |"]
    lines.append(
        "| `auto` | the best that passes its own checks here: sdpa, or flash-attn where it is installed; eager on "
        "Apple's MPS |"
    )
    for name, aliases in list(known_names().items())[1:]:
        called = f" ({', '.join(f'`{alias}`' for alias in aliases)})" if aliases else ""
        lines.append(f"| `{name}`{called} | {IMPLEMENTATIONS[name].SUMMARY} |")
    return "\n".join(lines)
