"""Settings + request -> AttentionChoice, by asking each implementation in turn for its reasons against.

The choice depends on nothing else: nothing is remembered in the cfg or the model, so a model moved to another
device, or called with a mask, is simply asked about again.
"""

import logging
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache, partial

from torch.compiler import is_compiling

from CMHA.choosing.names import AUTO, canonical_name
from CMHA.implementations import IMPLEMENTATIONS
from CMHA.request import AttentionRequest, Reason

logger = logging.getLogger("CMHA")

# What follows a name that cannot be used: whatever stands behind it here, or else the last two. It is also what `auto`
# tries on CUDA, and its last two what it tries elsewhere: flex_attention and our own tiles are used when named.
FALLBACK_ORDER = ("flash_attention_3", "flash_attention_2", "sdpa", "eager")


@dataclass(frozen=True)
class AttentionSettings:
    """What the user asked for: the attention keys of the cfg dict, under the same names.

    Attributes:
        use_flash: False means eager, always and on every device.
        attn_implementation: what True means: a name, an alias, or "auto".
        attn_strict: raise instead of falling back.
        disable_mps_fix: allow sdpa on MPS.
        flash_query_block_size, flash_kv_block_size: tiles of the tiled implementations; None: chosen.
    Raises:
        ValueError: an unknown implementation.
    """

    use_flash: bool = True
    attn_implementation: str | None = AUTO
    attn_strict: bool = False
    disable_mps_fix: bool = False
    flash_query_block_size: int | None = None
    flash_kv_block_size: int | None = None

    def __post_init__(self):
        canonical_name(self.attn_implementation)
        for size in (self.flash_query_block_size, self.flash_kv_block_size):
            if size is not None and size < 1:
                raise ValueError(f"a tile holds 1 or more queries and keys, got a block size of {size} (None: chosen).")

    @classmethod
    def from_cfg(cls, cfg: Mapping) -> "AttentionSettings":
        """The settings in a cfg dict; what it leaves out keeps its default, other keys are not ours."""
        return cls().merged(cfg)

    def as_used(self, request: AttentionRequest, training: bool) -> AttentionRequest:
        """A request as these settings are used: what reads pages is for generation, where a paged cache comes along."""
        pages = reads_pages(self.requested) and not training
        return replace(request, paged=True, needs_grad=False) if pages else request

    def merged(self, cfg: Mapping) -> "AttentionSettings":
        """These settings with those that `cfg` gives; what it leaves out stays as it is."""
        return replace(self, **{key.name: cfg[key.name] for key in fields(self) if key.name in cfg})

    @property
    def requested(self) -> str:
        """The canonical name that these settings ask for."""
        return canonical_name(self.attn_implementation) if self.use_flash else "eager"


@dataclass(frozen=True)
class AttentionChoice:
    """Which implementation runs, and why not the ones before it.

    Attributes:
        requested, chosen: canonical names; requested may be "auto".
        rejected: (name, its reasons) in the order in which they were asked.
        attention: the function to call: (queries, keys, values, mask, *, scale, dropout) -> (context, weights).
    """

    requested: str
    chosen: str
    rejected: tuple[tuple[str, tuple[Reason, ...]], ...]
    attention: Callable = field(compare=False, repr=False)

    def explain(self) -> str:
        """One sentence that says why."""
        no = "; ".join(f"{name}: {' and '.join(r.message for r in reasons)}" for name, reasons in self.rejected)
        if self.requested == AUTO:
            return "auto: " + (f"the first that can serve ({no})" if no else "the first in its order, and usable here")
        return no or "as asked"


@dataclass(frozen=True)
class Caller:
    """How whoever asks has set attention up: the words in which messages say what to change there.

    Attributes:
        take: how to name another implementation, with {} for its name.
        strict: the option under which nothing else may take a name's place.
        names: {canonical name: its name there}, as pairs; what is missing keeps its name.
    """

    take: str = '--attn_implementation {0}, or cfg["attn_implementation"] = "{0}"'
    strict: str = "attn_strict=True"
    names: tuple[tuple[str, str], ...] = ()

    def how_to_take(self, name: str) -> str:
        return self.take.format(dict(self.names).get(name, name))


OUR_MODELS = Caller()


def choose(settings: AttentionSettings, request: AttentionRequest, caller: Caller = OUR_MODELS) -> AttentionChoice:
    """The implementation that serves `request` under `settings`.

    Why: one place decides, by asking; a named implementation that cannot serve is replaced with one WARNING
    that gives the reason and the remedy.

    Args:
        settings, request: what is wanted, and for which call.
        caller: the words for it in messages; our own models' cfg, or somebody else's.
    Raises:
        ValueError: `attn_strict` and the named one cannot serve; the message holds every reason.
    """
    # torch.compile traces a call once and for all, and warns where it meets a cache
    return (chosen_anew if is_compiling() else chosen_once)(settings, request, caller)


def chosen_anew(settings: AttentionSettings, request: AttentionRequest, caller: Caller = OUR_MODELS) -> AttentionChoice:
    choice = decide(settings, request, caller)
    warn_of_fallback(choice, caller)
    return choice


chosen_once = lru_cache(maxsize=4096)(chosen_anew)


def decide(settings: AttentionSettings, request: AttentionRequest, caller: Caller = OUR_MODELS) -> AttentionChoice:
    """As `choose`, and says nothing: for reports about a request that nobody makes."""
    # Whoever brings a paged cache has named what reads pages; the settings are about all other calls.
    requested = AUTO if request.paged and not reads_pages(settings.requested) else settings.requested
    request = replace(request, mps_guard=not settings.disable_mps_fix)
    rejected = []
    for name in candidates(requested, request):
        reasons = reasons_against(name, request)
        if not reasons:
            return AttentionChoice(requested, name, tuple(rejected), bind(name, settings))
        rejected.append((name, tuple(reasons)))
        if settings.attn_strict and requested != AUTO:
            break
    lines = [f"  {name}: {reason.message}; {reason.remedy}" for name, reasons in rejected for reason in reasons]
    how = f"with {caller.strict} nothing may take its place" if settings.attn_strict else "and nothing else can"
    raise ValueError(f"{requested} cannot serve this request, {how}:\n" + "\n".join(lines))


def candidates(requested: str, request: AttentionRequest) -> tuple[str, ...]:
    """The names to ask, in order."""
    if request.paged:
        return tuple(name for name in IMPLEMENTATIONS if reads_pages(name))
    if requested == AUTO:
        return FALLBACK_ORDER if request.device == "cuda" else FALLBACK_ORDER[-2:]
    behind = FALLBACK_ORDER.index(requested) + 1 if requested in FALLBACK_ORDER else FALLBACK_ORDER.index("sdpa")
    return requested, *FALLBACK_ORDER[behind:]


def reasons_against(name: str, request: AttentionRequest) -> list[Reason]:
    """Why the implementation `name` cannot serve `request`; empty when it can."""
    reasons = IMPLEMENTATIONS[name].check(request)
    if request.paged and not reads_pages(name):
        message = "the keys and values lie in the pages of a paged cache, and it reads them in one piece"
        reasons = [*reasons, Reason("paged", message, "use paged_attention, or a plain KV cache")]
    return reasons


def reads_pages(name: str) -> bool:
    """Whether the implementation reads keys and values out of the pages of a paged cache, and nothing else."""
    return getattr(IMPLEMENTATIONS.get(name), "READS_PAGES", False)


def bind(name: str, settings: AttentionSettings) -> Callable:
    """The implementation's function, with those of its own options that the settings give."""
    module = IMPLEMENTATIONS[name]
    given = {
        "query_block_size": settings.flash_query_block_size,
        "kv_block_size": settings.flash_kv_block_size,
    }
    options = {key: given[key] for key in getattr(module, "OPTIONS", ())}
    return partial(module.attention, **options) if options else module.attention


def announce(choice: AttentionChoice) -> None:
    """Say which backend a model that was just built will use."""
    visible_logger().info("Attention backend: %s (%s)", choice.chosen, choice.explain())


_warned: set[tuple[AttentionChoice, Caller]] = set()


def warn_of_fallback(choice: AttentionChoice, caller: Caller = OUR_MODELS) -> None:
    """One WARNING for each (requested, chosen, reasons) in a process; silence where nothing was replaced."""
    reasons = [reason for _, reasons in choice.rejected for reason in reasons]
    lost_on_mps = any(reason.code == "mps_nan" for reason in reasons)  # there auto is less than one would expect
    unasked = choice.requested == AUTO and not lost_on_mps
    if choice.requested == choice.chosen or unasked or (choice, caller) in _warned:
        return
    _warned.add((choice, caller))
    visible_logger().warning(
        "%s cannot be used here: %s. Using %s instead. What to do: %s. To be rid of this message: %s.",
        choice.rejected[0][0] if choice.requested == AUTO else choice.requested,
        "; ".join(dict.fromkeys(reason.message for reason in reasons)),
        choice.chosen,
        "; ".join(dict.fromkeys(reason.remedy for reason in reasons)),
        caller.how_to_take(choice.chosen),
    )


class CurrentStderr(logging.StreamHandler):
    """Writes to whatever sys.stderr is at the moment: notebooks and tests replace it."""

    def __init__(self):
        logging.Handler.__init__(self)

    @property
    def stream(self):
        return sys.stderr


def visible_logger() -> logging.Logger:
    """The logger "CMHA", heard even where nobody set logging up (Python hides INFO by default).

    To silence it: `logging.getLogger("CMHA").setLevel("ERROR")`.
    """
    if not logger.handlers and not logging.getLogger().handlers:
        handler = CurrentStderr()
        handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
        logger.addHandler(handler)
        logger.propagate = False
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.INFO)
    return logger
