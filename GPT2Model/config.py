"""The model keys of the cfg dict: what each means, its default, what it may hold; presets; synonyms; validation.

This table is the one place where they stand. The README's table is generated from it
(`python -m GPT2Model.config` prints it) and a test holds the two equal.
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from CMHA.choosing import AttentionSettings, canonical_name, did_you_mean
from CMHA.implementations import IMPLEMENTATIONS

REQUIRED = object()


@dataclass(frozen=True)
class Key:
    """One key of the cfg dict.

    Attributes:
        kind: what it holds: "count" (int >= 1), "rate" (0 <= float < 1), "bool", "name" (of an implementation),
            "choice".
        default: what a missing key means; REQUIRED where there is none.
        meaning: one line for the README.
        optional: None is allowed too, and means what `meaning` says.
        choices: what a "choice" may hold.
    """

    kind: str
    default: Any
    meaning: str
    optional: bool = False
    choices: tuple[str, ...] = ()


KEYS: dict[str, Key] = {
    "vocab_size": Key("count", REQUIRED, "tokens in the vocabulary"),
    "context_length": Key("count", REQUIRED, "longest sequence, in tokens"),
    "emb_dim": Key("count", REQUIRED, "width of the stream that runs through the model"),
    "n_heads": Key("count", REQUIRED, "attention heads in a block; must divide emb_dim"),
    "n_layers": Key("count", REQUIRED, "transformer blocks"),
    "drop_rate": Key(
        "rate", 0.1, "dropout on embeddings, attention weights and what is added to the stream; training only"
    ),
    "qkv_bias": Key("bool", True, "bias in the query, key and value projections"),
    "tie_weights": Key("bool", True, "the head uses the token embedding's weights"),
    "init_std": Key("rate", 0.02, "standard deviation of fresh weights; narrow models need more, 0.05 at width 128"),
    "ff_dim": Key(
        "count", None, "width inside the feed-forward layer; None: 4 * emb_dim, for swiglu 2/3 of that", optional=True
    ),
    "n_kv_heads": Key("count", None, "key-value heads, each shared by a group of heads; None: n_heads", optional=True),
    "norm": Key(
        "choice", "layernorm", "what normalises: layernorm (GPT-2) or rmsnorm", choices=("layernorm", "rmsnorm")
    ),
    "mlp": Key(
        "choice",
        "gelu",
        "the feed-forward layer: gelu (GPT-2, by tanh), gelu_exact (by erf; the same weights) or swiglu",
        choices=("gelu", "gelu_exact", "swiglu"),
    ),
    "positions": Key(
        "choice",
        "learned",
        "learned (GPT-2: a vector is added to the embedding) or rope (queries and keys are turned)",
        choices=("learned", "rope"),
    ),
    "use_flash": Key("bool", True, "False: the manual path (eager), always and on every device"),
    "attn_implementation": Key("name", "auto", "what use_flash=True means: a name or alias; None: auto", optional=True),
    "attn_strict": Key("bool", False, "raise, instead of falling back, when the named implementation cannot serve"),
    "disable_mps_fix": Key("bool", False, "allow sdpa on Apple's MPS, where it gave NaN with left padding"),
    "flash_query_block_size": Key(
        "count", None, "queries in a tile of flash_tiled and flash_triton; None: chosen", optional=True
    ),
    "flash_kv_block_size": Key(
        "count", None, "keys in a tile of flash_tiled and flash_triton; None: chosen", optional=True
    ),
}

# Other names of our keys. The first are taken as they are; the second are other projects', and only suggested,
# since their values may mean something else.
ACCEPTED = {
    "attention_backend": "attn_implementation",
    "use_flash_attention": "use_flash",
    "flash_attention_query_block_size": "flash_query_block_size",
    "flash_attention_kv_block_size": "flash_kv_block_size",
}
SYNONYMS = {
    "n_embd": "emb_dim", "d_model": "emb_dim", "hidden_size": "emb_dim", "embed_dim": "emb_dim",
    "embedding_dim": "emb_dim",
    "block_size": "context_length", "max_len": "context_length", "n_positions": "context_length",
    "n_ctx": "context_length",
    "max_position_embeddings": "context_length", "max_seq_len": "context_length", "seq_len": "context_length",
    "n_head": "n_heads", "num_heads": "n_heads", "num_attention_heads": "n_heads",
    "n_layer": "n_layers", "num_layers": "n_layers", "num_hidden_layers": "n_layers", "depth": "n_layers",
    "d_ff": "ff_dim", "n_inner": "ff_dim", "intermediate_size": "ff_dim", "hidden_dim": "ff_dim",
    "dropout": "drop_rate", "dropout_rate": "drop_rate", "resid_pdrop": "drop_rate", "attn_pdrop": "drop_rate",
    "n_vocab": "vocab_size", "num_tokens": "vocab_size", "bias": "qkv_bias", "attention_bias": "qkv_bias",
    "tie_word_embeddings": "tie_weights", "weight_tying": "tie_weights",
    "num_kv_heads": "n_kv_heads", "num_key_value_heads": "n_kv_heads", "n_kv_groups": "n_kv_heads",
    "flash": "use_flash", "implementation": "attn_implementation", "_attn_implementation": "attn_implementation",
    "strict": "attn_strict", "initializer_range": "init_std",
    "norm_type": "norm", "normalization": "norm",
    "activation": "mlp", "activation_function": "mlp", "hidden_act": "mlp",
    "position_embedding_type": "positions", "rope": "positions", "rotary": "positions",
}  # fmt: skip

GPT2 = {"vocab_size": 50257, "context_length": 1024, "drop_rate": 0.1, "qkv_bias": True, "tie_weights": True}
# 0.02 is about 0.6 / sqrt(768): the same at a width of 128 is 0.05, and with 0.02 some seeds never learn to copy.
NARROW = {**GPT2, "drop_rate": 0.0, "init_std": 0.05}
PRESETS: dict[str, dict] = {
    "nano": {**NARROW, "context_length": 128, "emb_dim": 128, "n_heads": 4, "n_layers": 2},
    "tiny": {**NARROW, "context_length": 256, "emb_dim": 192, "n_heads": 6, "n_layers": 6},
    "gpt2": {**GPT2, "emb_dim": 768, "n_heads": 12, "n_layers": 12},
    "gpt2-medium": {**GPT2, "emb_dim": 1024, "n_heads": 16, "n_layers": 24},
    "gpt2-large": {**GPT2, "emb_dim": 1280, "n_heads": 20, "n_layers": 36},
    "gpt2-xl": {**GPT2, "emb_dim": 1600, "n_heads": 25, "n_layers": 48},
}
PRESET_ALIASES = {"small": "gpt2", "medium": "gpt2-medium", "large": "gpt2-large", "xl": "gpt2-xl"}


def from_preset(name: str, **overrides) -> dict:
    """A complete cfg dict: a preset with some keys changed, as in `from_preset("tiny", vocab_size=8000)`.

    Raises:
        ValueError: an unknown preset, or an override that is wrong.
    """
    canonical = PRESET_ALIASES.get(name, name)
    if canonical not in PRESETS:
        names = [*PRESETS, *PRESET_ALIASES]
        folder = " There is no such folder here either." if "/" in name or "\\" in name else ""
        raise ValueError(f"unknown preset {name!r}.{did_you_mean(name, names)}{folder} Presets: {', '.join(names)}.")
    return complete({**PRESETS[canonical], **overrides})


def complete(cfg: Mapping) -> dict:
    """A copy of `cfg` with every key present and checked.

    Raises:
        TypeError: not a dict.
        ValueError: every problem of the dict at once, each with what was expected and the key it may have meant.
    """
    if not isinstance(cfg, Mapping):
        raise TypeError(f'cfg must be a dict such as from_preset("nano"), got {type(cfg).__name__}.')
    given, problems = rename(cfg)
    full = {name: given.get(name, key.default) for name, key in KEYS.items()}
    for name, key in KEYS.items():
        if full[name] is REQUIRED:
            problems.append(f"{name!r} is missing: {key.meaning}.")
        elif problem := wrong_value(name, key, full[name]):
            problems.append(problem)
    problems += contradictions(full)
    if problems:
        many = f"{len(problems)} problems" if len(problems) > 1 else "one problem"
        raise ValueError(f"the cfg dict has {many}:\n" + "\n".join(f"  - {problem}" for problem in problems))
    return full


def attention_cfg(cfg: Mapping | str) -> dict | str:
    """The attention keys of `cfg` under their own names; other keys are left out, unknown ones raise. A name stays.

    Raises:
        ValueError: an unknown key, or an attention key with a wrong value.
    """
    if not isinstance(cfg, Mapping):
        return cfg  # the name of an implementation: MultiHeadAttention looks at it
    given, problems = rename(cfg)
    names = [field.name for field in fields(AttentionSettings)]
    settings = {name: given[name] for name in names if name in given}
    problems += [problem for name, value in settings.items() if (problem := wrong_value(name, KEYS[name], value))]
    if not settings and not problems:
        problems.append(f"none of the attention keys is in it: {', '.join(names)}.")
    if problems:
        raise ValueError("cannot set attention from this cfg:\n" + "\n".join(f"  - {problem}" for problem in problems))
    return settings


def rename(cfg: Mapping) -> tuple[dict, list[str]]:
    """`cfg` under our own key names, and a problem for each key that is unknown or given twice."""
    given, problems = {}, []
    for key, value in cfg.items():
        name = ACCEPTED.get(key, key)
        if name not in KEYS:
            problems.append(f"unknown key {key!r}: {suggest(key)}")
        elif name in given and given[name] != value:
            alias = next(alias for alias in cfg if ACCEPTED.get(alias) == name)
            problems.append(
                f"{alias!r} is another name of {name!r}, and the two differ: {value!r} and {given[name]!r}."
            )
        else:
            given[name] = value
    return given, problems


def suggest(key: Any) -> str:
    """What an unknown key may have meant: the table of synonyms first, then the nearest spelling."""
    if key in SYNONYMS:
        return f"here it is called {SYNONYMS[key]!r}."
    near = difflib.get_close_matches(str(key), [*KEYS, *SYNONYMS], n=1, cutoff=0.7)
    if near:
        return f"did you mean {SYNONYMS.get(near[0], near[0])!r}?"
    return f"known keys are {', '.join(KEYS)}."


def wrong_value(name: str, key: Key, value: Any) -> str | None:
    """What is wrong with one value, or None."""
    if value is None and key.optional:
        return None
    is_int = isinstance(value, int) and not isinstance(value, bool)
    if key.kind == "count" and not (is_int and value >= 1):
        return f"{name!r} must be a whole number, 1 or more{' (or None)' * key.optional}, got {value!r}."
    if key.kind == "rate" and not ((is_int or isinstance(value, float)) and 0 <= value < 1):
        return f"{name!r} must be a number from 0 to below 1, got {value!r}."
    if key.kind == "bool" and not isinstance(value, bool):
        return f"{name!r} must be True or False, got {value!r}."
    if key.kind == "choice" and value not in key.choices:
        expected = " or ".join(map(repr, key.choices))
        return f"{name!r} must be {expected}, got {value!r}.{did_you_mean(value, key.choices)}"
    if key.kind == "name":
        try:
            canonical_name(value)
        except ValueError as error:
            return f"{name!r}: {error}"
    return None


def contradictions(cfg: dict) -> list[str]:
    """Values that are right one by one and wrong together."""
    problems = []
    sizes = ("emb_dim", "n_heads", "n_kv_heads")
    valid = {name for name in sizes if cfg[name] is not None and not wrong_value(name, KEYS[name], cfg[name])}
    if {"emb_dim", "n_heads"} <= valid and cfg["emb_dim"] % cfg["n_heads"]:
        nearest = next(n for n in range(min(cfg["n_heads"], cfg["emb_dim"]), 0, -1) if cfg["emb_dim"] % n == 0)
        problems.append(
            f"'n_heads' must divide 'emb_dim': {cfg['emb_dim']} / {cfg['n_heads']} is not whole; {nearest} would do."
        )
    if {"n_heads", "n_kv_heads"} <= valid and cfg["n_heads"] % cfg["n_kv_heads"]:
        problems.append(f"'n_kv_heads' must divide 'n_heads': {cfg['n_heads']} / {cfg['n_kv_heads']} is not whole.")
    head_dim = cfg["emb_dim"] / cfg["n_heads"] if {"emb_dim", "n_heads"} <= valid else 0
    if cfg["positions"] == "rope" and head_dim % 2 == 1:  # one that is not whole was named above
        problems.append(
            f"'positions': 'rope' turns pairs of numbers, so emb_dim / n_heads must be even, got {head_dim:.0f}."
        )
    asked = ("attn_implementation", "flash_query_block_size", "flash_kv_block_size")
    if not any(wrong_value(name, KEYS[name], cfg[name]) for name in asked):
        implementation = IMPLEMENTATIONS.get(canonical_name(cfg["attn_implementation"]))
        wrong_tiles = getattr(implementation, "wrong_tiles", None)  # one that does not take tiles of every size has it
        if wrong_tiles and (problem := wrong_tiles(*(cfg[name] for name in asked[1:]))):
            problems.append(problem)
    return problems


def markdown_table() -> str:
    """The table of keys that stands in the README."""
    lines = ["| key | default | meaning |", "| --- | --- | --- |"]
    for name, key in KEYS.items():
        default = "*required*" if key.default is REQUIRED else f"`{key.default!r}`"
        lines.append(f"| `{name}` | {default} | {key.meaning} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(markdown_table())
