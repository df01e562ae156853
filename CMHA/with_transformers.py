"""Our implementations under transformers' own models: `attn_implementation="gpt2_tiled"`.

transformers lets a model pick its attention by name, from two registries: `AttentionInterface` has the functions that
compute, `AttentionMaskInterface` the functions that build the mask. A name that is only in the first gets no mask, and
padding is then ignored without a word; so both are written, always. Our names begin with `gpt2_` and hold no "flash":
transformers takes a name with that word for a kernel to be fetched from its hub.

What a layer of theirs hands over, and where it goes:

    query (B, H, T, D), key and value (B, kv_heads, keys, D)    as ours: grouped heads come unrepeated
    attention_mask                                              `CMHA/transformers_masks.py`
    scaling, dropout                                            as ours; no dropout outside training
    whatever else changes the numbers                           an error that says so
"""

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor
from torch.compiler import is_compiling
from torch.nn.functional import pad

from CMHA import transformers_masks
from CMHA.choosing import AttentionChoice, AttentionSettings, choose
from CMHA.choosing.choose import Caller, reads_pages, warn_of_fallback
from CMHA.implementations import IMPLEMENTATIONS
from CMHA.masks import AttentionMask
from CMHA.request import AttentionRequest, Reason

PREFIX = "gpt2_"

# They read a mask through `dense` or `tile` alone, so that a table serves them; the others look at its rules.
TAKE_A_TABLE = frozenset({"eager", "sdpa", "flash_tiled"})

CHANGES_THE_NUMBERS = {
    "softcap": "the scores are squeezed by a tanh",
    "s_aux": "each head has a sink, a key without a value",
    "sinks": "each head has a sink, a key without a value",
    "position_bias": "a bias is added to the scores",
    "head_mask": "heads are switched off",
    "indices": "each query sees a selection of keys",
    "block_indices": "each query sees a selection of blocks of keys",
    "cache": "the keys lie in pages",
}
# What else may come along, and is none of attention's business.
HARMLESS = frozenset({
    "position_ids", "cache_position", "use_cache", "return_dict", "output_hidden_states", "output_router_logits",
    "num_items_in_batch", "logits_to_keep", "deterministic", "token_type_ids", "position_embeddings",
})  # fmt: skip
# Where packed sequences begin, for kernels that cannot see it in a mask; ours must.
PACKED = frozenset({"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"})

_registered: dict[str, tuple[Callable, Callable]] = {}
_strict = [False]  # the last `strict` that was given


def transformers_names() -> dict[str, str]:
    """{the name for transformers: our canonical name}, for every implementation of the registry."""
    ours = {name: module for name, module in IMPLEMENTATIONS.items() if not reads_pages(name)}  # whose cache is ours
    names = {PREFIX + short_name(name, module.ALIASES): name for name, module in ours.items()}
    assert len(names) == len(ours), f"two implementations share a name: {names}"
    assert not any("flash" in name or "flex_attention" in name for name in names), f"not for transformers: {names}"
    return names


def short_name(name: str, aliases: tuple[str, ...]) -> str:
    """flash_tiled -> tiled, flex_attention -> flex, flash_attention_2 -> fa2: short, and without "flash"."""
    if name.startswith("flash_"):
        return next((alias for alias in aliases if "flash" not in alias), name.removeprefix("flash_"))
    return name.removesuffix("_attention")


def caller() -> Caller:
    """What our messages tell users of transformers to change."""
    names = tuple((canonical, name) for name, canonical in transformers_names().items())
    return Caller(take='model.set_attn_implementation("{}")', strict="strict=True", names=names)


def register_with_transformers(strict: bool | None = None) -> dict[str, str]:
    """Make our implementations known to transformers, for this process.

    Why: any of its models that goes through AttentionInterface then runs on them, by
    `from_pretrained(..., attn_implementation="gpt2_tiled")` or `model.set_attn_implementation("gpt2_tiled")`.

    Args:
        strict: raise where the named implementation cannot serve a call; else another takes its place, with one
            WARNING that says why (as `attn_strict`). None: as it was, and False at first.
    Returns:
        {name for transformers: canonical name}. Calling it again is harmless: without `strict` it changes nothing.
    Raises:
        ImportError: transformers is not installed, or too old.
        ValueError: somebody else has registered one of the names; then none of ours is.
    """
    AttentionInterface, AttentionMaskInterface, masking_utils = registries()
    names = transformers_names()
    if taken := [name for name in names if is_somebody_elses(name, AttentionInterface(), AttentionMaskInterface())]:
        raise ValueError(
            f"transformers already has another attention implementation called {', '.join(taken)}, and we replace "
            "none. Take yours out first, or register it under another name."
        )
    if strict is not None:
        _strict[:] = [strict]
    make_mask = transformers_masks.mask_function_for(masking_utils)
    for name, canonical in names.items():
        _registered[name] = (attention_function(name, canonical, _strict[0]), make_mask)
        AttentionInterface.register(name, _registered[name][0])
        AttentionMaskInterface.register(name, make_mask)
    return names


def is_somebody_elses(name: str, *registries) -> bool:
    """Whether a function that is not ours stands under `name` in either registry."""
    ours = _registered.get(name, (None, None))
    return any(name in there and there[name] is not function for there, function in zip(registries, ours, strict=True))


def unregister_from_transformers() -> None:
    """Take our names out again, and forget `strict`.

    A model that is set to one of them stops working, with a KeyError of transformers': switch it back first, by
    `model.set_attn_implementation("sdpa")`; afterwards works too.
    """
    AttentionInterface, AttentionMaskInterface, _ = registries()
    for name, ours in _registered.items():
        for interface, function in zip((AttentionInterface, AttentionMaskInterface), ours, strict=True):
            if interface._global_mapping.get(name) is function:  # there is no public way out
                del interface._global_mapping[name]
    _registered.clear()
    _strict[:] = [False]


def registries():
    """transformers' two registries and its module of masks."""
    try:
        from transformers import AttentionInterface, AttentionMaskInterface, masking_utils
    except ImportError as error:
        raise ImportError(
            "register_with_transformers() needs transformers 5 with its AttentionInterface and "
            f'AttentionMaskInterface ({error}). Do: pip install "transformers>=5,<6"'
        ) from error
    return AttentionInterface, AttentionMaskInterface, masking_utils


def attention_function(name: str, canonical: str, strict: bool = False) -> Callable:
    """The function to register in AttentionInterface under `name`.

    Returns:
        (module, query, key, value, attention_mask, ...) -> (context (B, T, H, D), weights or None)
    """
    named, words = AttentionSettings(attn_implementation=canonical, attn_strict=strict), caller()

    def attend(
        module, query, key, value, attention_mask, scaling=None, dropout=0.0, is_causal=None, sliding_window=None,
        output_attentions=False, **others,
    ):  # fmt: skip
        is_causal = getattr(module, "is_causal", None) if is_causal is None else is_causal
        mask = transformers_masks.received(attention_mask, query, key, is_causal=is_causal, window=sliding_window)
        refuse(name, module, query, value, mask, others)
        key_len, handed_over = mask.key_len, key.shape[-2]
        key, value = key[:, :, :key_len], value[:, :, :key_len]  # without the empty room of a static cache

        settings, mask = settings_for_mask(named, mask)
        dropout = dropout if module.training else 0.0
        needs_weights = bool(output_attentions) or weights_are_collected()
        request = AttentionRequest.describe(query, key, mask, dropout=dropout, needs_weights=needs_weights)
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        choice = choose(settings, request, words)
        context, weights = choice.attention(query, key, value, mask, scale=scale, dropout=dropout)
        if weights is not None:
            weights = pad(weights, (0, handed_over - key_len))
        return context.transpose(1, 2).contiguous(), weights

    return attend


def weights_are_collected() -> bool:
    """`model(..., output_attentions=True)` seldom reaches the layer: transformers notes the wish for its hooks.

    Not looked up in a compiled model, where it would break the graph: there the weights are left out, unless they came.
    """
    if is_compiling():
        return False
    from transformers.utils import output_capturing

    collector = getattr(output_capturing, "_active_collector", None)
    collected = collector.get() if collector is not None else None
    return bool(collected) and any("attentions" in wish for wish in collected)


def refuse(name: str, module, query: Tensor, value: Tensor, mask: AttentionMask, others: dict) -> None:
    """Raise one ValueError with everything in this call that our implementations would get wrong."""
    given = {key for key, argument in others.items() if argument is not None and argument is not False}
    problems = [f"{key}: {CHANGES_THE_NUMBERS[key]}" for key in sorted(given & CHANGES_THE_NUMBERS.keys())]
    if given & PACKED and mask.documents is None:
        problems.append(
            f"{', '.join(sorted(given & PACKED))}: packed sequences, which the mask does not keep apart (pass "
            "position_ids that begin again at 0, no attention_mask, and use_cache=False)"
        )
    unknown = given - CHANGES_THE_NUMBERS.keys() - PACKED - HARMLESS
    problems += [f"{key}: not known to us, and it may change the numbers" for key in sorted(unknown)]
    if value.shape[-1] != query.shape[-1]:
        problems.append(f"values are {value.shape[-1]} wide and queries {query.shape[-1]}: ours take one width")
    if problems:
        raise ValueError(
            f'{name} cannot compute the attention of {type(module).__name__} (use attn_implementation="eager"):\n  '
            + "\n  ".join(problems)
        )


def settings_for_mask(settings: AttentionSettings, mask: AttentionMask) -> tuple[AttentionSettings, AttentionMask]:
    """The settings and the mask with which a call is served, where the named implementation cannot take this mask.

    Raises:
        ValueError: it cannot, and `attn_strict`.
    """
    name = settings.requested
    drops_padded_queries = getattr(IMPLEMENTATIONS[name], "PADDED_QUERIES_GIVE_ZERO", False)
    if isinstance(mask, transformers_masks.TableMask):
        if name in TAKE_A_TABLE:
            return settings, mask
        if mask.query_len == 1 and not drops_padded_queries:  # a table of one row is a padding mask
            row = mask.table[:, 0, 0]
            return settings, AttentionMask(1, mask.key_len, causal=False, padding_mask=row)
        reason = Reason("mask_table", "it takes no mask that is only a table", "use gpt2_sdpa for this model")
    elif drops_padded_queries and mask.padding_mask is not None and not mask.causal:
        # It takes query i for padding where key i is, and in cross attention they are of two texts.
        reason = Reason("full+padding", "it takes no padding where attention is not causal", "use gpt2_sdpa here")
    else:
        return settings, mask
    if settings.attn_strict:
        raise ValueError(
            f"{name} cannot serve this request: {reason.message}; {reason.remedy}. With strict=True nothing may take "
            "its place."
        )
    choice = AttentionChoice(name, "sdpa", ((name, (reason,)),), attention=IMPLEMENTATIONS["sdpa"].attention)
    warn_of_fallback(choice, caller())
    return replace(settings, attn_implementation="sdpa"), mask
