"""The cfg dict out of what others write about a model: Hugging Face's config.json, nanoGPT's model_args, and our own.

A field that changes what GPT-2 computes is honoured, or refused by name; nothing is ignored in silence. The names of
the tensors are in `GPT2Model/weights/weight_formats.py`.
"""

from collections.abc import Mapping
from pathlib import Path

from GPT2Model.config import PRESETS, complete
from GPT2Model.weights.weight_formats import unlike_gpt2

# Fields of a Hugging Face config that change what GPT-2 computes, with the only value that ours computes.
HF_FIXED = {
    "model_type": "gpt2",
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
    "is_encoder_decoder": False,
    "quantization_config": None,
}
# Hugging Face's names of the two forms of GELU, and our `mlp` with it; of each form the first is the one we write.
ACTIVATIONS = {
    "gelu_new": "gelu", "gelu_pytorch_tanh": "gelu", "gelu_python_tanh": "gelu", "gelu_fast": "gelu",
    "gelu_accurate": "gelu",
    "gelu": "gelu_exact", "gelu_python": "gelu_exact",
}  # fmt: skip
HF_SIZES = {
    "vocab_size": "vocab_size", "n_positions": "context_length", "n_embd": "emb_dim", "n_head": "n_heads",
    "n_layer": "n_layers", "n_inner": "ff_dim", "tie_word_embeddings": "tie_weights", "initializer_range": "init_std",
}  # fmt: skip
HF_DROPOUTS = ("embd_pdrop", "attn_pdrop", "resid_pdrop")
OUR_CFG = "gpt2_from_scratch_cfg"  # our own dict, kept in config.json beside Hugging Face's fields
OUR_TYPE = "gpt2-from-scratch"  # the model_type of a folder that only this project opens
# Fields that change nothing about a forward pass of the language model, or only how transformers runs it.
HF_HARMLESS = {
    OUR_CFG, "architectures", "transformers_version", "dtype", "torch_dtype", "use_cache", "n_ctx",
    "bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id", "tokenizer_class",
    "prefix", "task_specific_params", "finetuning_task", "_name_or_path", "problem_type", "is_decoder",
    # heads of other models on the same body; such weights are refused where they lie
    "summary_activation", "summary_first_dropout", "summary_proj_to_labels", "summary_type", "summary_use_proj",
    "id2label", "label2id", "num_labels", "_num_labels", "classifier_dropout", "cross_attention_hidden_size",
    # how it is run: the same numbers but for rounding (a test compares the first), in another order, or given back too
    "reorder_and_upcast_attn", "chunk_size_feed_forward", "gradient_checkpointing", "_attn_implementation_autoset",
    "output_attentions", "output_hidden_states", "output_past", "return_dict", "torchscript", "use_bfloat16",
    "n_special", "predict_special_tokens",  # of the first versions; OpenAI's gpt2-medium still has them
    # how text is generated, which older versions keep here
    "max_length", "min_length", "do_sample", "early_stopping", "num_beams", "num_beam_groups", "diversity_penalty",
    "temperature", "top_k", "top_p", "typical_p", "repetition_penalty", "length_penalty", "no_repeat_ngram_size",
    "num_return_sequences", "output_scores", "return_dict_in_generate",
}  # fmt: skip
NANOGPT_SIZES = {
    "vocab_size": "vocab_size", "block_size": "context_length", "n_embd": "emb_dim", "n_head": "n_heads",
    "n_layer": "n_layers", "dropout": "drop_rate", "bias": "qkv_bias",
}  # fmt: skip


def cfg_of(config: dict, changes: Mapping, where: Path) -> dict:
    """Our cfg dict from a Hugging Face config.

    Args:
        config: what config.json holds. changes: keys of ours that will differ anyway. where: the file, for messages.
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
    activation = config.get("activation_function", "gelu_new")  # GPT2Config's own default
    if activation not in list(ACTIVATIONS):
        problems.append(f"activation_function = {activation!r}, where only {', '.join(ACTIVATIONS)} are computed here")
    if "model_type" not in config:
        problems.append("model_type is missing, where 'gpt2' was expected")
    known = {"activation_function", *HF_FIXED, *HF_SIZES, *HF_DROPOUTS, *HF_HARMLESS}
    problems += [
        f"{field} = {value!r} is unknown here" for field, value in config.items() if field not in known and value
    ]
    rates = [config.get(field, 0.1) for field in HF_DROPOUTS]  # GPT2Config's own default
    if rates.count(rates[0]) < len(rates) and "drop_rate" not in changes:
        problems.append(
            f"{', '.join(HF_DROPOUTS)} differ, and there is one drop_rate here: pass cfg={{'drop_rate': ...}}"
        )
    raise_all(problems, where)
    if OUR_CFG in config:
        cfg = complete(config[OUR_CFG])
        if cfg["mlp"] != ACTIVATIONS[activation]:  # no weight would show it
            raise_all([f"activation_function = {activation!r}, and {OUR_CFG} says mlp={cfg['mlp']!r}"], where)
        return cfg
    # GPT2Config's own
    defaults = {theirs: PRESETS["gpt2"].get(ours) for theirs, ours in HF_SIZES.items()}
    defaults |= {"initializer_range": 0.02, "tie_word_embeddings": True}
    sizes = {ours: config.get(theirs, defaults[theirs]) for theirs, ours in HF_SIZES.items()}
    return {**sizes, "drop_rate": rates[0], "qkv_bias": True, "mlp": ACTIVATIONS[activation]}


def nanogpt_cfg(model_args: Mapping, where: str) -> dict:
    """Our cfg dict from the model_args that nanoGPT's train.py keeps in ckpt.pt; keys that it lacks are left out.

    Without `bias` a nanoGPT has none anywhere; ours has those of zero, which is the same. No field says which GELU it
    was trained with; it is through erf since nanoGPT's commit 594068e of 17 May 2023, "Use nn.GELU".

    Raises:
        ValueError: fields that nanoGPT does not have, as its descendants do, by name.
    """
    raise_all(
        [f"model_args: {field} = {value!r} is unknown here" for field, value in model_args.items()
         if field not in NANOGPT_SIZES and value], where
    )  # fmt: skip
    sizes = {ours: model_args[theirs] for theirs, ours in NANOGPT_SIZES.items() if theirs in model_args}
    return {**sizes, "mlp": "gelu_exact"}


def raise_all(problems: list[str], where: object) -> None:
    if problems:
        raise ValueError(f"{where} cannot be honoured:\n" + "\n".join(f"  - {problem}" for problem in problems))


def hugging_face_config(cfg: dict) -> dict:
    """The config.json beside weights in Hugging Face's form."""
    config = {
        "architectures": ["GPT2LMHeadModel"],
        **HF_FIXED,
        "activation_function": next(theirs for theirs, ours in ACTIVATIONS.items() if ours == cfg["mlp"]),
        **{theirs: cfg[ours] for theirs, ours in HF_SIZES.items()},
        **dict.fromkeys(HF_DROPOUTS, cfg["drop_rate"]),
        "bos_token_id": 50256 if cfg["vocab_size"] > 50256 else None,
        "eos_token_id": 50256 if cfg["vocab_size"] > 50256 else None,
        OUR_CFG: cfg,
    }
    del config["quantization_config"]
    return config


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
