"""What the implementations are called: canonical names and their aliases."""

import difflib
from collections.abc import Iterable

from CMHA.implementations import IMPLEMENTATIONS
from CMHA.request import Reason

AUTO = "auto"

# Names the field uses for which this version has no file in implementations/: each says no to every request,
# with a reason, so that a setting copied from elsewhere still runs. A file in the registry takes the name over.
NOT_BUILT = {
    "flash_attention_3": ("flash_attn_3", "fa3"),
    "flash_attention_2": ("flash_attn_2", "fa2"),
    "flash_triton": (),
    "flex_attention": ("flex",),
    "paged_attention": ("paged",),
}


def known_names() -> dict[str, tuple[str, ...]]:
    """Every canonical name with its aliases, `auto` first."""
    built = {name: tuple(module.ALIASES) for name, module in IMPLEMENTATIONS.items()}
    return {AUTO: (), **built, **{name: aliases for name, aliases in NOT_BUILT.items() if name not in built}}


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
    near = difflib.get_close_matches(str(word), list(known), n=1)
    return f" Did you mean {near[0]!r}?" if near else ""


def markdown_table() -> str:
    """The table of implementations that stands in the README."""
    lines = ["| name | what it is |", "| --- | --- |"]
    lines.append("| `auto` | the best that passes its own checks here (CPU and CUDA: sdpa; Apple's MPS: eager) |")
    for name, module in IMPLEMENTATIONS.items():
        aliases = f" ({', '.join(f'`{alias}`' for alias in module.ALIASES)})" if module.ALIASES else ""
        lines.append(f"| `{name}`{aliases} | {module.SUMMARY} |")
    return "\n".join(lines)


def not_built(name: str) -> list[Reason]:
    """The one reason of a name that has no file here."""
    message = f"this version of the project has no {name} yet"
    return [Reason("not_built", message, "use sdpa, whose own CUDA kernel is FlashAttention-2")]
