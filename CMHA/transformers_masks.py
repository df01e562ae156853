"""transformers' masks in our words: what its models say about who may attend to whom -> an AttentionMask.

transformers builds a mask once a forward pass, by calling a mask function that is registered beside the attention
function, with the lengths, the padding, and a *pattern*: a function (sequence, head, query, key) -> may it see. Its own
mask functions ask the pattern about every pair, T x T of them. Ours looks at what the pattern is made of:

    causal, everything, a sliding window, packed sequences    the rules of an AttentionMask: no table   (RuleMask)
    anything else (chunks, image blocks, a pattern of yours)  transformers' own table                   (TableMask)

So no mask is ever ignored, and the usual ones cost no T x T memory. Written against transformers 5.23,
`masking_utils.py`; the patterns are recognised by the code object that made them, never by a name.
"""

from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor
from torch.compiler import is_compiling

from CMHA.masks import AttentionMask


class RuleMask(AttentionMask):
    """An AttentionMask that travels through a model of transformers in the place of a (B, 1, T, T) tensor.

    Why: models hand the mask on from layer to layer without looking inside, so it need not be a table. It has the
    shape and dtype of one, and becomes one where a model cuts a piece out of it. Arithmetic with it is an error: a
    model that adds its mask to the scores does not call the registered function.

    Args:
        batch_size: B.
        kv_length: the keys that the layer will hand over. A static cache has empty room behind its filled keys:
            `key_len` counts the filled ones, and the others are seen by nobody.
        query_len, key_len, rules: as AttentionMask's.
    """

    ndim = 4
    dtype = torch.bool

    def __init__(self, batch_size: int, kv_length: int, query_len: int, key_len: int, **rules):
        super().__init__(query_len, key_len, **rules)
        self.kv_length = kv_length
        self.shape = torch.Size((batch_size, 1, query_len, kv_length))

    def contiguous(self) -> "RuleMask":
        """Itself: `generate()` asks this of every mask that it makes ahead of a forward pass."""
        return self

    def __getitem__(self, index) -> Tensor:
        table = torch.nn.functional.pad(self.dense(), (0, self.kv_length - self.key_len))
        return table.expand(self.shape)[index]

    def on(self, device) -> "RuleMask":
        """The same mask with its tensors on another device, for a model whose layers lie on several."""

        def move() -> RuleMask:
            padding_mask, documents = (
                None if given is None else given.to(device) for given in (self.padding_mask, self.documents)
            )
            rules = {"causal": self.causal, "window": self.window, "padding_mask": padding_mask, "documents": documents}
            lengths = (self.query_len, self.key_len)
            return RuleMask(self.shape[0], self.kv_length, *lengths, **rules, device=device)

        return self.once(f"on {device}", move)

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        raise ValueError(  # a TypeError would be swallowed: Python takes it for "ask the other operand"
            f"this model computes with its attention mask ({getattr(function, '__name__', function)}), and expects a "
            "tensor: its attention does not go through transformers' AttentionInterface alone. Our implementations "
            'cannot serve it: use attn_implementation="eager".'
        )


class TableMask(AttentionMask):
    """A mask that only its table can say, True = may attend: for implementations that ask for `dense` or `tile` alone.

    Args:
        table: (B, 1, query_len or 1, key_len) bool.
        query_len: in tokens.
    """

    def __init__(self, table: Tensor, query_len: int):
        super().__init__(query_len, table.shape[-1], causal=False, device=table.device)
        self.table = table.expand(-1, -1, query_len, -1)

    @property
    def kind(self) -> str:
        return "full+table"

    def tile(self, query_start: int, query_end: int, key_start: int, key_end: int) -> Tensor:
        return self.table[:, :, query_start:query_end, key_start:key_end]


def mask_function_for(masking_utils: ModuleType) -> Callable:
    """The function to register in AttentionMaskInterface.

    Args:
        masking_utils: `transformers.masking_utils`.
    """
    makers = makers_of(masking_utils)

    def make_mask(
        batch_size: int,
        q_length: int,
        kv_length: int,
        q_offset=0,
        kv_offset: int = 0,
        mask_function: Callable = masking_utils.causal_mask_function,
        attention_mask=None,
        use_vmap: bool = False,
        device="cpu",
        **others,
    ):
        """Query i stands at position i + q_offset of the text, key j at j + kv_offset; attention_mask is 2D padding."""
        if isinstance(attention_mask, RuleMask):  # generate() with a static cache had it made before the forward pass
            return attention_mask
        if attention_mask is not None and attention_mask.ndim != 2:
            raise ValueError(
                "attention_mask must be (B, tokens) with 1 = a real token, or a ready (B, 1, queries, keys) table; got "
                f"{tuple(attention_mask.shape)}."
            )
        if attention_mask is not None:
            refuse_padding(attention_mask.shape, batch_size, q_length, kv_length, q_offset, kv_offset)
        lengths = {"q_length": q_length, "kv_length": kv_length, "q_offset": q_offset, "kv_offset": kv_offset}

        def as_table() -> Tensor:
            # never skipped: without a mask nobody would know what it was
            return masking_utils.sdpa_mask(
                batch_size=batch_size, **lengths, mask_function=mask_function, attention_mask=attention_mask,
                allow_is_causal_skip=False, allow_is_bidirectional_skip=False, use_vmap=use_vmap, device=device,
            )  # fmt: skip

        if isinstance(q_offset, Tensor):  # a static cache counts on the device
            # One query's row is no T x T table, and its shape stays the same while a compiled model decodes.
            if q_length == 1 or is_compiling():
                return as_table()
            q_offset = int(q_offset)
        rules = rules_of(mask_function, makers)
        if rules is None:
            return as_table()
        # AttentionMask puts the last query at the last key: keys behind it are left out, which only causal ones allow.
        key_len, last = kv_length, q_offset + q_length - kv_offset
        if rules["causal"]:
            key_len = last
        if key_len > kv_length or ("window" in rules and key_len != last):
            return as_table()
        padding_mask = masking_utils.prepare_padding_mask(attention_mask, kv_length, kv_offset)
        if padding_mask is not None:
            padding_mask = padding_mask[:, kv_offset : kv_offset + key_len]
            # One look at the values, as transformers takes it too, keeps the fast path for batches without padding.
            if not is_compiling() and bool(padding_mask.all()):
                padding_mask = None
        return RuleMask(batch_size, kv_length, q_length, key_len, **rules, padding_mask=padding_mask, device=device)

    return make_mask


def refuse_padding(shape, batch_size: int, q_length: int, kv_length: int, q_offset, kv_offset: int) -> None:
    """Raise one ValueError about an attention_mask of another batch or length than the tokens.

    Why: what is missing would be hidden, what is too much left out, and one row would serve all sequences, in silence.
    A static cache counts its tokens on the device: then the length is not looked at, which would wait for it.
    """
    problems = []
    if shape[0] != batch_size:
        problems.append(
            f"it has {shape[0]} row{'s' * (shape[0] != 1)} for {batch_size} sequences: give each its own row"
            + ", mask.expand(B, -1) if they are padded alike" * (shape[0] == 1)
        )
    if not isinstance(q_offset, Tensor):
        given = q_offset + q_length
        fewest, most = min(given, kv_offset + kv_length), max(given, kv_offset + kv_length)
        if not fewest <= shape[1] <= most:
            problems.append(
                f"it has {shape[1]} columns for {fewest} tokens: give it one for each"
                + f", the {q_offset} in the cache included" * bool(q_offset)
            )
    if problems:
        tokens = "tokens" if isinstance(q_offset, Tensor) else q_offset + q_length
        raise ValueError(
            f"attention_mask has shape {tuple(shape)}, and ({batch_size}, {tokens}) was expected: "
            f"{'; '.join(problems)}."
        )


def makers_of(masking_utils: ModuleType) -> dict[object, str]:
    """What we know patterns by: the two that are plain functions, and the code of those that are made by another."""
    plain, nothing = masking_utils.causal_mask_function, torch.zeros(1, 1, dtype=torch.long)
    return {
        plain: "causal",
        masking_utils.bidirectional_mask_function: "everything",
        masking_utils.and_masks(plain).__code__: "all of",
        masking_utils.sliding_window_overlay(1).__code__: "window behind",
        masking_utils.sliding_window_bidirectional_overlay(1).__code__: "window around",
        masking_utils.packed_sequence_mask_function(nothing).__code__: "packed",
        masking_utils.remap_positions_for_packed_sequence(plain, nothing).__code__: "within each",
    }


def rules_of(pattern: Callable, makers: dict[object, str]) -> dict | None:
    """The rules of an AttentionMask that say the same as `pattern`; None: they cannot.

    Returns:
        {"causal": bool}, and where there are any "window" (int) and "documents" ((B, T) int).
    """
    parts = list(parts_of(pattern, makers))
    kinds = [kind for kind, _ in parts]
    causal = "causal" in kinds
    # A window behind each query limits nothing ahead of it. Positions within each packed sequence are positions in the
    # row less a constant: the same order and distances, as long as the sequences are kept apart too.
    if None in kinds or ("window behind" in kinds and not causal) or ("within each" in kinds) != ("packed" in kinds):
        return None
    windows = [values["sliding_window"] + (kind == "window around") for kind, values in parts if "window" in kind]
    documents = [values["packed_sequence_mask"] for kind, values in parts if kind == "packed"]
    if len(documents) > 1:
        return None
    rules = {"causal": causal}
    if windows:
        rules["window"] = min(windows)
    if documents:
        rules["documents"] = documents[0]
    return rules


def parts_of(pattern: Callable, makers: dict[object, str]):
    """(kind, what it closes over) of every simple pattern in it; the kind is None where we do not know it."""
    kind = makers.get(pattern)
    if kind is not None:
        yield kind, {}
        return
    kind = None if is_compiling() else makers.get(getattr(pattern, "__code__", None))
    if kind is None:  # torch.compile does not show what a function that it has traced closes over
        yield None, {}
        return
    contents = (cell.cell_contents for cell in pattern.__closure__)
    values = dict(zip(pattern.__code__.co_freevars, contents, strict=True))
    if kind != "all of":
        yield kind, values
    inner = {"all of": values.get("mask_functions", ()), "within each": (values.get("mask_function"),)}
    for part in inner.get(kind, ()):
        yield from parts_of(part, makers)


def received(given, query: Tensor, key: Tensor, *, is_causal: bool | None, window: int | None) -> AttentionMask:
    """The AttentionMask of one call, from whatever reached the attention function.

    Args:
        given: a RuleMask of ours; a (B or 1, 1, queries, keys) table, bool or additive; or None: the model made none.
        query, key: (B, H, queries, D) and (B, kv_heads, keys, D).
        is_causal, window: what the model says beside the mask. A mask that is there says it all, as it does for
            transformers' own eager attention.
    Raises:
        ValueError: a mask that does not fit, or that cannot be said.
    """
    lengths = (query.shape[-2], key.shape[-2])
    if isinstance(given, RuleMask):
        if tuple(given.shape[-2:]) != lengths:
            raise ValueError(
                f"the mask is for {tuple(given.shape[-2:])} queries and keys, not for {lengths}: an attention_mask has "
                "one column for each token, those in the cache included."
            )
        # One row may stand for all where transformers itself has made it so; without rows of its own it fits any batch.
        has_rows = given.padding_mask is not None or given.documents is not None
        if has_rows and given.shape[0] not in (1, len(query)):
            raise ValueError(
                f"the mask has shape {tuple(given.shape)}, and {(len(query), 1, *lengths)} was expected: an "
                "attention_mask has one row for each sequence."
            )
        return given if torch.device(given.device) == query.device else given.on(query.device)
    if given is None:
        return without_mask(lengths, is_causal=is_causal, window=window, device=query.device)
    if not isinstance(given, Tensor) or given.ndim != 4:
        what = f"a tensor of shape {tuple(given.shape)}" if isinstance(given, Tensor) else f"a {type(given).__name__}"
        raise ValueError(f"attention_mask must be a (B, 1, {lengths[0]}, {lengths[1]}) table here, got {what}.")
    batch, heads, queries, keys = given.shape
    if batch not in (1, len(query)) or heads != 1 or queries not in (1, lengths[0]) or keys != lengths[1]:
        raise ValueError(
            f"attention_mask must have shape {(len(query), 1, *lengths)}, one table for all heads; got "
            f"{tuple(given.shape)}. One of (B, tokens) has a column for each key, those in the cache included."
        )
    allowed = given if given.dtype == torch.bool else allowed_by(given)
    return TableMask(allowed.expand(len(query), -1, -1, -1), lengths[0])


def without_mask(lengths: tuple[int, int], *, is_causal: bool | None, window: int | None, device) -> AttentionMask:
    """The model made no mask: then `is_causal` decides, where it leaves no doubt."""
    if is_causal is None:
        raise ValueError(
            "no attention_mask reached the layer, and its module does not say is_causal: whether a token may see later "
            'ones is unknown. Use attn_implementation="eager".'
        )
    if is_causal and lengths[0] != lengths[1]:
        raise ValueError(
            f"no attention_mask reached the layer, for {lengths[0]} queries and {lengths[1]} keys: which keys are "
            'filled, and which are earlier, is unknown. Pass an attention_mask, or use attn_implementation="eager".'
        )
    return AttentionMask(*lengths, causal=is_causal, window=window, device=device)


def allowed_by(additive: Tensor) -> Tensor:
    """An additive mask as True = may attend: 0 shows a key, -10000 or lower hides it, as its weight is then 0.

    Raises:
        ValueError: other numbers in it, which would be a bias.
    """
    shown, hidden = additive == 0, additive <= -1e4
    if is_compiling() or not bool((shown | hidden).all()):
        raise ValueError(
            f"attention_mask is a {str(additive.dtype).removeprefix('torch.')} tensor that is added to the scores. "
            "Our implementations only show or hide keys: pass it as torch.bool with True = may attend"
            + ("." if is_compiling() else "; a bias, a number between, they do not have.")
        )
    return shown
