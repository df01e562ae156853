"""What the implementations are called: canonical names and their aliases."""

import difflib
from collections.abc import Iterable
from typing import NamedTuple

from CMHA.implementations import IMPLEMENTATIONS
from CMHA.request import Reason

AUTO = "auto"


class NotBuilt(NamedTuple):
    """A known name without a file: its aliases, what it will be, why it cannot be used, and what to do."""

    aliases: tuple[str, ...]
    summary: str
    message: str
    remedy: str


# Names for which this version has no file in implementations/: each says no to every request, with a reason, so that
# a setting copied from elsewhere still runs. A file in the registry takes the name over.
NOT_BUILT = {
    "paged_attention": NotBuilt(
        ("paged",),
        "attention over the pages of a paged cache, for generation",
        "the paged cache that it reads is not written yet, and it will serve generation only",
        "use sdpa, with the ordinary KV cache",
    ),
}


def known_names() -> dict[str, tuple[str, ...]]:
    """Every canonical name with its aliases, `auto` first."""
    built = {name: tuple(module.ALIASES) for name, module in IMPLEMENTATIONS.items()}
    return {AUTO: (), **built, **{name: later.aliases for name, later in NOT_BUILT.items() if name not in built}}


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
        lines.append(f"| `{name}`{called} | {summary(name)} |")
    return "\n".join(lines)


def summary(name: str) -> str:
    """What the implementation is, in a few words."""
    return IMPLEMENTATIONS[name].SUMMARY if name in IMPLEMENTATIONS else f"{NOT_BUILT[name].summary} (not built yet)"


def not_built(name: str) -> list[Reason]:
    """The one reason of a name that has no file here."""
    return [Reason("not_built", NOT_BUILT[name].message, NOT_BUILT[name].remedy)]
