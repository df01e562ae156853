"""How others name and lay out the weights of a GPT-2: tables from their names to ours, and what differs exactly.

Each format is a table; an entry is the whole name of a tensor, or the stem of a weight and its bias. What a format
cannot express is converted exactly or refused by name; nothing is ignored in silence. A model with `norm`, `mlp` or
`positions` of its own is no GPT-2 in anybody's format: its folder is in ours. `GPT2Model/pretrained.py` does the files.
"""

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from GPT2Model.config import KEYS, complete

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
}
TRANSPOSED = ("W_qkv.weight", "out_proj.weight", "up_proj.weight", "down_proj.weight")

# Fields of a Hugging Face config that change what GPT-2 computes, with the only value that ours computes.
HF_FIXED = {
    "model_type": "gpt2",
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
    "is_encoder_decoder": False,
    "quantization_config": None,
}
HF_SIZES = {
    "vocab_size": "vocab_size", "n_positions": "context_length", "n_embd": "emb_dim", "n_head": "n_heads",
    "n_layer": "n_layers", "n_inner": "ff_dim", "tie_word_embeddings": "tie_weights", "initializer_range": "init_std",
}  # fmt: skip
HF_DROPOUTS = ("embd_pdrop", "attn_pdrop", "resid_pdrop")
# Fields that change nothing about a forward pass of the language model, or only how transformers runs it.
HF_HARMLESS = {
    "architectures", "transformers_version", "dtype", "torch_dtype", "use_cache", "n_ctx",
    "bos_token_id", "eos_token_id", "pad_token_id", "task_specific_params", "summary_activation",
    "cross_attention_hidden_size",
    "summary_first_dropout", "summary_proj_to_labels", "summary_type", "summary_use_proj", "_name_or_path", "id2label",
    "label2id", "chunk_size_feed_forward", "output_attentions", "output_hidden_states", "return_dict", "problem_type",
    "reorder_and_upcast_attn", "is_decoder", "gpt2_from_scratch_cfg", "_attn_implementation_autoset", "finetuning_task",
}  # fmt: skip
OUR_CFG = "gpt2_from_scratch_cfg"  # our own dict, kept in config.json beside Hugging Face's fields
OUR_TYPE = "gpt2-from-scratch"  # the model_type of a folder that only this project opens
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
VARIANTS = ("norm", "mlp", "positions")  # the keys that Hugging Face's GPT-2 cannot express, unless they are its own


def cfg_of(config: dict, changes: Mapping, where: Path) -> dict:
    """Our cfg dict from a Hugging Face config.

    Raises:
        ValueError: every field whose value we cannot honour, by name.
    """
    if config.get("model_type") == OUR_TYPE:
        return own_cfg(config, where)
    problems = [
        f"{field} = {config[field]!r}, where only {value!r} is computed here"
        for field, value in HF_FIXED.items()
        if field in config and config[field] != value
    ]
    if "model_type" not in config:
        problems.append("model_type is missing, where 'gpt2' was expected")
    known = {*HF_FIXED, *HF_SIZES, *HF_DROPOUTS, *HF_HARMLESS}
    problems += [
        f"{field} = {value!r} is unknown here" for field, value in config.items() if field not in known and value
    ]
    rates = {config.get(field, 0.1) for field in HF_DROPOUTS}  # GPT2Config's own default
    if len(rates) > 1 and "drop_rate" not in changes:
        problems.append(
            f"{', '.join(HF_DROPOUTS)} differ, and there is one drop_rate here: pass cfg={{'drop_rate': ...}}"
        )
    if problems:
        raise ValueError(f"{where} cannot be honoured:\n" + "\n".join(f"  - {problem}" for problem in problems))
    if OUR_CFG in config:
        return complete(config[OUR_CFG])
    # GPT2Config's own
    defaults = {"vocab_size": 50257, "n_positions": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12}
    defaults |= {"initializer_range": 0.02, "tie_word_embeddings": True}
    sizes = {ours: config.get(theirs, defaults.get(theirs)) for theirs, ours in HF_SIZES.items()}
    return {**sizes, "drop_rate": max(rates), "qkv_bias": True}


def unlike_gpt2(cfg: Mapping) -> list[str]:
    """What a cfg has and GPT-2 has not, one phrase each, and no format of others can express; empty: nothing."""
    return [
        f"{name}={cfg[name]!r}, where GPT-2 has {KEYS[name].default!r}"
        for name in VARIANTS
        if cfg.get(name, KEYS[name].default) != KEYS[name].default
    ]


def unlike_stored(stored: Mapping, changes: Mapping) -> list[str]:
    """The keys of `changes` that ask for other weights than the stored ones, a phrase each; drop_rate, say, does not.

    Args:
        stored: a cfg dict. changes: some keys of one.
    """
    stored = {name: stored.get(name, key.default) for name, key in KEYS.items()}
    shaping = [name for name in SHAPING if name in changes]
    if stored["positions"] == "rope" and changes.get("positions", "rope") == "rope":  # no weight has the length
        shaping = [name for name in shaping if name != "context_length"]
    same = {"n_kv_heads": stored["n_heads"]}  # what None means
    if stored["mlp"] == "gelu":
        same["ff_dim"] = 4 * stored["emb_dim"]

    def value(cfg: Mapping, name: str):
        return same.get(name) if cfg[name] is None else cfg[name]

    return [
        f"{name}={stored[name]!r}, and cfg {changes[name]!r}"
        for name in shaping
        if value(stored, name) != value(changes, name)
    ]


def own_config(cfg: Mapping) -> dict:
    """The config.json of a folder that only this project opens.

    transformers refuses its model_type, except where somebody names a class of its own: GPT2LMHeadModel would go on,
    with weights that are not there drawn at random. So a field that it must read says in words that it cannot.
    """
    reason = f"this is no GPT-2: {'; '.join(unlike_gpt2(cfg))}. Open it with GPTModel.from_pretrained(FOLDER)"
    return {"architectures": ["GPTModel"], "model_type": OUR_TYPE, "n_layer": reason, OUR_CFG: dict(cfg)}


def own_cfg(config: dict, where: Path) -> dict:
    """The cfg dict out of such a config.

    Raises:
        ValueError: it holds none, a wrong one, or fields that we would have to ignore.
    """
    foreign = sorted(config.keys() - {"architectures", "model_type", "n_layer", OUR_CFG})
    if foreign or not isinstance(config.get(OUR_CFG), Mapping):
        found = f"unknown here: {', '.join(foreign)}" if foreign else f"{OUR_CFG} is missing"
        raise ValueError(f"{where} cannot be honoured: {found}. Copy it anew from where save_pretrained() wrote it.")
    return complete(config[OUR_CFG])


def our_names(weights: dict[str, Tensor], where: str) -> dict[str, Tensor]:
    """The same weights under our names and in our layout."""
    if "token_embedding.weight" in weights:
        return dict(weights)
    if "tok_emb.weight" in weights:
        return {translate(name, LLMS_FROM_SCRATCH): value for name, value in weights.items()}
    if "wte.weight" in weights:  # OpenAI's own files on the hub lack the prefix
        weights = {
            name if name.startswith("lm_head") else f"transformer.{name}": value for name, value in weights.items()
        }
    if "transformer.wte.weight" not in weights:
        known = "Hugging Face's GPT-2, LLMs-from-scratch, nanoGPT, or this project's"
        raise ValueError(f"{where} is none of {known}: its first names are {', '.join(list(weights)[:4])}.")
    masks = re.compile(r"\.attn\.(masked_)?bias$")  # old files store the causal mask as a "bias"
    renamed = {translate(name, HUGGING_FACE): value for name, value in weights.items() if not masks.search(name)}
    first = renamed.get("blocks.0.attention.W_qkv.weight")
    stored_in_out = first is not None and first.ndim == 2 and first.shape[1] == 3 * first.shape[0]  # nanoGPT: (out, in)
    if not stored_in_out:
        return renamed
    return {name: value.T.contiguous() if name.endswith(TRANSPOSED) else value for name, value in renamed.items()}


def translate(name: str, table: dict[str, str]) -> str:
    """One name through a table whose entries are whole names or the stems of a weight and a bias."""
    number = re.search(r"\.(\d+)\.", name)
    index = number.group(1) if number else ""
    general = name.replace(f".{index}.", ".{i}.", 1) if number else name
    stem, _, kind = general.rpartition(".")
    if general in table:
        return table[general].replace("{i}", index)
    return f"{table[stem]}.{kind}".replace("{i}", index) if stem in table else name


def fit_heads(weights: dict[str, Tensor], cfg: dict) -> None:
    """Undo what `save` did for Hugging Face: take biases of zero out, and repeated key-value heads back."""
    groups = cfg["n_heads"] // (cfg["n_kv_heads"] or cfg["n_heads"])
    for i in range(cfg["n_layers"]):
        stem = f"blocks.{i}.attention.W_qkv"
        bias, weight = weights.get(f"{stem}.bias"), weights.get(f"{stem}.weight")
        if not cfg["qkv_bias"] and bias is not None and not bias.any():
            del weights[f"{stem}.bias"]
        if groups > 1 and weight is not None and weight.shape[0] == 3 * cfg["emb_dim"]:
            for name in (f"{stem}.weight", f"{stem}.bias"):
                if name in weights:
                    weights[name] = ungroup(weights[name], cfg, name)


def ungroup(rows: Tensor, cfg: dict, name: str) -> Tensor:
    """Rows (3 * emb_dim, ...) with repeated key-value heads -> each of them once."""
    queries, keys, values = rows.chunk(3)
    groups = cfg["n_heads"] // cfg["n_kv_heads"]
    once = [part.unflatten(0, (cfg["n_kv_heads"], groups, -1))[:, 0].flatten(0, 1) for part in (keys, values)]
    whole = torch.cat([queries, *once])
    if not torch.equal(regroup(whole, cfg), rows):
        raise ValueError(
            f"{name} has {cfg['n_heads']} different key-value heads, and cfg says n_kv_heads={cfg['n_kv_heads']}: "
            "leave it out of cfg, or say None."
        )
    return whole


def regroup(rows: Tensor, cfg: dict) -> Tensor:
    """The opposite of `ungroup`: each key-value head repeated for every query head it serves."""
    groups, head_dim = cfg["n_heads"] // cfg["n_kv_heads"], cfg["emb_dim"] // cfg["n_heads"]
    queries, keys, values = rows.split([cfg["emb_dim"], cfg["n_kv_heads"] * head_dim, cfg["n_kv_heads"] * head_dim])
    repeated = [part.unflatten(0, (-1, head_dim)).repeat_interleave(groups, 0).flatten(0, 1) for part in (keys, values)]
    return torch.cat([queries, *repeated])
