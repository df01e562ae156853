"""How others name and lay out the weights of a GPT-2: tables from their names to ours, and what differs exactly.

Each format is a table; an entry is the whole name of a tensor, or the stem of a weight and its bias. What a format
cannot express is converted exactly or refused by name; nothing is ignored in silence. A model with `norm`, `mlp` or
`positions` of its own is no GPT-2 in anybody's format: its folder is in ours. What others' configs say is in
`GPT2Model/weights/foreign_configs.py`; `GPT2Model/pretrained.py` does the files.
"""

import re
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from GPT2Model.config import KEYS
from GPT2Model.weights.grouping import grouped
from GPT2Model.weights.stored_tensors import StoredTensor

# Hugging Face stores the four projections of a block as (in, out): torch's Linear is (out, in).
HUGGING_FACE = {
    "transformer.wte.weight": "token_embedding.weight",
    "transformer.wpe.weight": "position_embedding.weight",
    "transformer.ln_f.weight": "final_norm.weight",
    "transformer.ln_f.bias": "final_norm.bias",
    "lm_head.weight": "head.weight",
    "transformer.h.{i}.ln_1": "blocks.{i}.norm_1",
    "transformer.h.{i}.ln_2": "blocks.{i}.norm_2",
    "transformer.h.{i}.attn.c_attn": "blocks.{i}.attention.W_qkv",
    "transformer.h.{i}.attn.c_proj": "blocks.{i}.attention.out_proj",
    "transformer.h.{i}.mlp.c_fc": "blocks.{i}.feed_forward.up_proj",
    "transformer.h.{i}.mlp.c_proj": "blocks.{i}.feed_forward.down_proj",
}
LLMS_FROM_SCRATCH = {
    "tok_emb.weight": "token_embedding.weight",
    "pos_emb.weight": "position_embedding.weight",
    "final_norm.scale": "final_norm.weight",
    "final_norm.shift": "final_norm.bias",
    "out_head.weight": "head.weight",
    "trf_blocks.{i}.norm1.scale": "blocks.{i}.norm_1.weight",
    "trf_blocks.{i}.norm1.shift": "blocks.{i}.norm_1.bias",
    "trf_blocks.{i}.norm2.scale": "blocks.{i}.norm_2.weight",
    "trf_blocks.{i}.norm2.shift": "blocks.{i}.norm_2.bias",
    "trf_blocks.{i}.att.W_query": "blocks.{i}.attention.W_query",  # MultiHeadAttention fuses the three
    "trf_blocks.{i}.att.W_key": "blocks.{i}.attention.W_key",
    "trf_blocks.{i}.att.W_value": "blocks.{i}.attention.W_value",
    "trf_blocks.{i}.att.mask": "blocks.{i}.attention.mask",  # and drops a stored mask
    "trf_blocks.{i}.att.out_proj": "blocks.{i}.attention.out_proj",
    "trf_blocks.{i}.ff.layers.0": "blocks.{i}.feed_forward.up_proj",
    "trf_blocks.{i}.ff.layers.2": "blocks.{i}.feed_forward.down_proj",
    "trf_blocks.{i}.att.qkv": "blocks.{i}.attention.W_qkv",  # from here: the names of its GPTModelFast
    "trf_blocks.{i}.att.proj": "blocks.{i}.attention.out_proj",
    "trf_blocks.{i}.norm1": "blocks.{i}.norm_1",
    "trf_blocks.{i}.norm2": "blocks.{i}.norm_2",
    "final_norm": "final_norm",
}
TRANSPOSED = ("W_qkv.weight", "out_proj.weight", "up_proj.weight", "down_proj.weight")

SHAPING = (
    "vocab_size",
    "context_length",
    "emb_dim",
    "n_heads",
    "n_layers",
    "qkv_bias",
    "tie_weights",
    "ff_dim",
    "n_kv_heads",
    "norm",
    "mlp",
    "positions",
)  # the keys that decide which weights there are
MASKS = re.compile(r"\.attn\.(masked_)?bias$")  # old files store the causal mask as a "bias"
Weight = Tensor | StoredTensor
# The keys that Hugging Face's GPT-2 cannot express, with the values that it can: GPT-2's own, and the GELU through erf.
VARIANTS = {"norm": ("layernorm",), "mlp": ("gelu", "gelu_exact"), "positions": ("learned",)}


def unlike_gpt2(cfg: Mapping) -> list[str]:
    """What a cfg has and GPT-2 has not, one phrase each, and no format of others can express; empty: nothing.

    The GELU through erf is not among it: to Hugging Face that is a GPT-2 of another activation_function.
    """
    return [
        f"{name}={cfg[name]!r}, where GPT-2 has {KEYS[name].default!r}"
        for name, expressible in VARIANTS.items()
        if cfg.get(name, KEYS[name].default) not in expressible
    ]


def unlike_stored(stored: Mapping, changes: Mapping) -> list[str]:
    """The keys of `changes` that ask for other weights than the stored ones, a phrase each.

    drop_rate, say, does not; nor does the other form of GELU: both are the caller's choice.

    Args:
        stored: a cfg dict. changes: some keys of one.
    """
    stored = {name: stored.get(name, key.default) for name, key in KEYS.items()}
    shaping = [name for name in SHAPING if name in changes]
    if stored["positions"] == "rope" and changes.get("positions", "rope") == "rope":  # no weight has the length
        shaping = [name for name in shaping if name != "context_length"]
    same = {"n_kv_heads": stored["n_heads"]}  # what None means
    if stored["mlp"] != "swiglu":
        same["ff_dim"] = 4 * stored["emb_dim"]

    def value(cfg: Mapping, name: str):
        if name == "mlp" and cfg[name] == "gelu_exact":
            return "gelu"  # the same weights
        return same.get(name) if cfg[name] is None else cfg[name]

    return [
        f"{name}={stored[name]!r}, and cfg {changes[name]!r}"
        for name in shaping
        if value(stored, name) != value(changes, name)
    ]


def our_names(weights: Mapping[str, Weight], where: str) -> dict[str, Weight]:
    """The same weights under our names and in our layout; tensors, or stored ones, of which none is read.

    Raises:
        ValueError: names of none of the known projects.
    """
    if "token_embedding.weight" in weights:
        return fuse_separate(dict(weights))
    if "tok_emb.weight" in weights:
        return fuse_separate({translate(name, LLMS_FROM_SCRATCH): value for name, value in weights.items()})
    weights = with_prefix(weights)
    if "transformer.wte.weight" not in weights:
        known = "Hugging Face's GPT-2, LLMs-from-scratch, nanoGPT, or this project's"
        raise ValueError(f"{where} is none of {known}: its first names are {', '.join(list(weights)[:4])}.")
    turned = not stored_out_in(weights)
    renamed = {translate(name, HUGGING_FACE): value for name, value in weights.items() if not MASKS.search(name)}
    return {
        name: value.T if turned and value.ndim == 2 and name.endswith(TRANSPOSED) else value
        for name, value in renamed.items()
    }


def with_prefix(weights: Mapping[str, Weight]) -> dict[str, Weight]:
    """Hugging Face's names with the prefix that OpenAI's own files on the hub, and a bare GPT2Model, lack."""
    if "wte.weight" not in weights:
        return dict(weights)
    bare = re.compile(r"(wte|wpe|h|ln_f)\.")
    return {f"transformer.{name}" if bare.match(name) else name: value for name, value in weights.items()}


def stored_out_in(weights: Mapping[str, Weight]) -> bool:
    """Whether the projections are (out, in), as torch's Linear has them: nanoGPT's are, Hugging Face's are not."""
    projections = [value for name, value in weights.items() if name.endswith(".attn.c_attn.weight") and value.ndim == 2]
    return any(projection.shape[0] == 3 * projection.shape[1] for projection in projections)


def without_biases(weights: Mapping[str, Weight]) -> bool:
    """Whether this is a nanoGPT of `bias=False`: it has no bias anywhere, in its LayerNorms neither."""
    return stored_out_in(weights) and not any(name.endswith(".bias") and not MASKS.search(name) for name in weights)


def fuse_separate(weights: dict[str, Weight]) -> dict[str, Weight]:
    """W_query, W_key and W_value stacked into W_qkv, and a stored causal mask left out."""
    for name in list(weights):
        stem, separate, kind = name.rpartition(".W_query.")
        parts = [weights.get(f"{stem}.{projection}.{kind}") for projection in ("W_query", "W_key", "W_value")]
        if separate and None not in parts and len({part.shape[1:] for part in parts}) == 1:
            for projection in ("W_query", "W_key", "W_value"):
                del weights[f"{stem}.{projection}.{kind}"]
            weights[f"{stem}.W_qkv.{kind}"] = stacked(parts)
        elif name.endswith(".attention.mask"):
            del weights[name]
    return weights


def stacked(parts: list[Weight]) -> Weight:
    """Rows of the parts, one after the other."""
    if isinstance(parts[0], Tensor):
        return torch.cat(parts)
    shape = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
    return replace(parts[0], shape=shape, read=lambda: torch.cat([part.read() for part in parts]))


def translate(name: str, table: dict[str, str]) -> str:
    """One name through a table whose entries are whole names or the stems of a weight and a bias."""
    number = re.search(r"\.(\d+)\.", name)
    index = number.group(1) if number else ""
    general = name.replace(f".{index}.", ".{i}.", 1) if number else name
    stem, _, kind = general.rpartition(".")
    if general in table:
        return table[general].replace("{i}", index)
    return f"{table[stem]}.{kind}".replace("{i}", index) if stem in table else name


def fit_heads(weights: dict[str, Weight], cfg: dict) -> list[str]:
    """Undo what `save` did for Hugging Face: take biases of zero out, and repeated key-value heads back.

    Returns:
        a sentence for each weight whose key-value heads differ, where cfg says that they are repeated.
    """
    groups, different = cfg["n_heads"] // (cfg["n_kv_heads"] or cfg["n_heads"]), []
    for i in range(cfg["n_layers"]):
        stem = f"blocks.{i}.attention.W_qkv"
        bias = weights.get(f"{stem}.bias")
        if not cfg["qkv_bias"] and bias is not None and not in_memory(bias).any():
            del weights[f"{stem}.bias"]
        for name in (f"{stem}.weight", f"{stem}.bias") if groups > 1 else ():
            if name in weights and weights[name].shape[:1] == (3 * cfg["emb_dim"],):
                once = ungroup(rows := in_memory(weights[name]), cfg)
                if torch.equal(regroup(once, cfg), rows):
                    weights[name] = once
                else:
                    different.append(name)
    phrase = f"has {cfg['n_heads']} different key-value heads, and cfg says n_kv_heads={cfg['n_kv_heads']}"
    return grouped((name, f"{phrase}: leave it out of cfg, or say None.") for name in different)


def zero_biases(weights: Mapping[str, Weight], cfg: dict) -> dict[str, StoredTensor]:
    """Biases of zero for every LayerNorm and projection of a model that has none."""
    biased = ("norm_1", "norm_2", "final_norm", "out_proj", "up_proj", "down_proj", *["W_qkv"] * cfg["qkv_bias"])
    biases = {}
    for name, weight in weights.items():
        stem, _, kind = name.rpartition(".")
        if kind == "weight" and stem.rpartition(".")[2] in biased:
            zeros = torch.zeros(weight.shape[:1], dtype=weight.dtype)
            biases[f"{stem}.bias"] = StoredTensor.of(zeros)
    return biases


def in_memory(weight: Weight) -> Tensor:
    return weight if isinstance(weight, Tensor) else weight.read()


def ungroup(rows: Tensor, cfg: dict) -> Tensor:
    """Rows (3 * emb_dim, ...) with repeated key-value heads -> each of them once."""
    queries, keys, values = rows.chunk(3)
    groups = cfg["n_heads"] // cfg["n_kv_heads"]
    once = [part.unflatten(0, (cfg["n_kv_heads"], groups, -1))[:, 0].flatten(0, 1) for part in (keys, values)]
    return torch.cat([queries, *once])


def regroup(rows: Tensor, cfg: dict) -> Tensor:
    """The opposite of `ungroup`: each key-value head repeated for every query head it serves."""
    groups, head_dim = cfg["n_heads"] // cfg["n_kv_heads"], cfg["emb_dim"] // cfg["n_heads"]
    queries, keys, values = rows.split([cfg["emb_dim"], cfg["n_kv_heads"] * head_dim, cfg["n_kv_heads"] * head_dim])
    repeated = [part.unflatten(0, (-1, head_dim)).repeat_interleave(groups, 0).flatten(0, 1) for part in (keys, values)]
    return torch.cat([queries, *repeated])
