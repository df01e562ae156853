"""Weights in and out: Hugging Face's GPT-2, LLMs-from-scratch, nanoGPT, and this project's own folders.

In: a source is found, its config becomes a cfg dict (foreign_configs.py; all files named here are in `weights/`), the
names of its tensors become ours (weight_formats.py), everything is compared, and then read (filling.py). Files are
safetensors, or torch files read with weights_only=True (stored_tensors.py).
Out: written beside their place and renamed, so that a crash leaves the old files whole.
"""

import json
import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from GPT2Model.config import PRESETS, complete, rename
from GPT2Model.gpt2 import GPTModel
from GPT2Model.tokenizer_files import tokenizer_texts
from GPT2Model.weights.filling import COMPUTED_IN, filled, misfits
from GPT2Model.weights.foreign_configs import cfg_of, nanogpt_cfg
from GPT2Model.weights.hub import WEIGHTS, download, hub_id, hub_names, weights_of
from GPT2Model.weights.saved_form import folder_form, write_form
from GPT2Model.weights.sharded_weights import open_sharded
from GPT2Model.weights.stored_tensors import StoredTensor, check_memory, open_safetensors, open_torch_file
from GPT2Model.weights.weight_formats import (
    fit_heads,
    our_names,
    stored_out_in,
    unlike_gpt2,
    unlike_stored,
    without_biases,
    zero_biases,
)

__all__ = ["folder_form", "hub_names", "load", "misfits", "save", "write_form"]
logger = logging.getLogger("GPT2Model")
OTHER_GELU = {"gelu": "gelu_exact", "gelu_exact": "gelu"}


def load(source: object, cfg: Mapping | None = None, dtype: torch.dtype | None = None) -> GPTModel:
    """A GPTModel with the weights of `source`.

    Args:
        source: a folder with config.json and weights, in one file or in several (Hugging Face's, or ours); the folder
            of a run of train.py, whose final model is opened, or else its newest checkpoint; a name on the
            hub, such as "gpt2", "distilgpt2" or "OWNER/NAME"; a .safetensors, .pt, .pth or .bin file, or a state dict
            in memory, whose names are Hugging Face's, LLMs-from-scratch's, nanoGPT's or ours.
        cfg: the cfg dict, needed for a file or a state dict (but for nanoGPT's ckpt.pt, which holds its own); for a
            folder, keys that should differ (the attention keys and drop_rate, say).
        dtype: of the model, such as torch.bfloat16; None: the one in which the weights are stored.
    Returns:
        the model, in eval mode.
    Raises:
        FileNotFoundError: no such folder, file or name; no network.
        ValueError: a damaged or foreign checkpoint, a cfg that does not fit it, a field we would have to ignore; or
            (ModelTooLargeError, a MemoryError too) a model larger than the memory that is free, before it is read.
    """
    if dtype is not None and dtype not in COMPUTED_IN:
        names = ", ".join(str(known) for known in COMPUTED_IN)
        raise TypeError(f"dtype must be one of {names}, or None for the dtype of the weights; got {dtype!r}.")
    if isinstance(source, Mapping):
        return from_checkpoint(source, cfg, dtype, "the state dict")
    if not isinstance(source, str | os.PathLike):
        raise TypeError(
            f"from_pretrained() takes a folder, a file, a name or a state dict, got {type(source).__name__}."
        )
    path = Path(source)
    if path.is_dir():
        return from_folder(path, cfg, dtype)
    if path.is_file():
        return from_file(path, cfg, dtype)
    name = str(source)
    if name in PRESETS or name in hub_names() or (hub_id(name) and not path.parent.is_dir()):
        return from_folder(download(name), cfg, dtype)
    raise FileNotFoundError(f"{source}: no such folder or file. Names on the hub: {', '.join(hub_names())}.")


def from_folder(folder: Path, changes: Mapping | None, dtype: torch.dtype | None) -> GPTModel:
    if not (folder / "config.json").is_file():
        folder = of_a_run(folder) or folder
    config_file, weights_file = folder / "config.json", weights_of(folder)
    if not config_file.is_file():
        if (folder / "ckpt.pt").is_file():  # the folder that nanoGPT's train.py leaves
            return from_file(folder / "ckpt.pt", changes, dtype)
        adapter = " It holds a LoRA adapter: merge it in peft with merge_and_unload(), and save that."
        adapter = adapter if (folder / "adapter_config.json").is_file() else ""
        raise FileNotFoundError(f"{folder} has no config.json: pass the folder that save_pretrained() wrote.{adapter}")
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{config_file} is not valid JSON ({error}): it may be cut short; copy it anew.") from error
    if not isinstance(config, dict):
        raise ValueError(f"{config_file} must hold a JSON object, got {type(config).__name__}.")
    if weights_file is None:
        there = ", ".join(sorted(path.name for path in folder.iterdir()))
        raise FileNotFoundError(
            f"{folder} has no {WEIGHTS[0]} (nor {', '.join(WEIGHTS[1:])}); it has {there}. Weights that are split need "
            "their index too; those of TensorFlow or Flax are converted by transformers: open and save them there."
        )
    changes = renamed(changes)
    said = cfg_of(config, changes, config_file)
    cfg, different = settled(said, changes, config_file)
    try:
        model = from_weights(opened(weights_file), cfg, dtype, str(weights_file))
    except ValueError as error:
        if not different or isinstance(error, MemoryError):
            raise
        raise ValueError(f"{different}\n{error}") from error
    if model.cfg["mlp"] != said["mlp"]:  # the other form of GELU, since the weights fit
        logger.warning(
            "%s says mlp=%r, and cfg %r: the same weights with another GELU, whose logits differ in the fourth digit.",
            config_file, said["mlp"], model.cfg["mlp"],
        )  # fmt: skip
    return model


def of_a_run(folder: Path) -> Path | None:
    """Where a run of train.py, or of the main job, left its model: the final one, else the newest checkpoint."""
    steps = [place for place in folder.glob("checkpoints/step-*") if place.name.removeprefix("step-").isdigit()]
    newest = sorted(steps, key=lambda place: int(place.name.removeprefix("step-")), reverse=True)
    places = [folder / "final", folder / "model", *newest]
    return next((place for place in places if (place / "config.json").is_file()), None)


def from_file(path: Path, cfg: Mapping | None, dtype: torch.dtype | None) -> GPTModel:
    if path.name.endswith((".safetensors", ".index.json")):
        return from_weights(opened(path), cfg, dtype, str(path))
    return from_checkpoint(open_torch_file(path), cfg, dtype, str(path))


def from_checkpoint(content: object, cfg: Mapping | None, dtype: torch.dtype | None, where: str) -> GPTModel:
    """Of a state dict, or of a training checkpoint around it: nanoGPT's knows its own cfg."""
    if not isinstance(content, Mapping) or not isinstance(content.get("model_args"), Mapping):
        return from_weights(stored(content, where), cfg, dtype, where)
    changes = renamed(cfg)
    cfg, different = settled(nanogpt_cfg(content["model_args"], where), changes, where)
    try:
        return from_weights(stored(content, where), cfg, dtype, where)
    except ValueError as error:
        raise ValueError(f"{different}\n{error}") if different else error from error


def renamed(changes: Mapping | None) -> dict:
    changes, problems = rename(changes or {})
    if problems:
        raise ValueError("the cfg dict is wrong:\n" + "\n".join(f"  - {problem}" for problem in problems))
    return changes


def settled(said: dict, changes: dict, said_by: object) -> tuple[dict, str]:
    """The cfg of a source that has its own, with some keys changed, and a warning for the keys that would not fit it.

    Raises:
        ValueError: another number of heads, the one size that no tensor's shape shows.
    """
    said = {**changes, **said}  # what it does not say, the changes may
    different = unlike_stored(complete(said), changes)
    both = f"{said_by} says {'; '.join(different)}: leave {'them' if len(different) > 1 else 'it'} out of cfg. "
    both += "Weights fit only the model that they were trained in; for another, train a GPTModel(cfg)."
    if changes.get("n_heads", said["n_heads"]) != said["n_heads"]:
        raise ValueError(both)
    return {**said, **changes}, both if different else ""


def opened(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a file, or of all files of an index, none of them read."""
    if path.name.endswith(".index.json"):
        return open_sharded(path, opened)
    if path.suffix == ".safetensors":
        return {unprefixed(name): tensor for name, tensor in open_safetensors(path).items()}
    return stored(open_torch_file(path), str(path))


def stored(content: object, where: str) -> dict[str, StoredTensor]:
    """The weights themselves, out of a training checkpoint and without the prefixes of torch.compile and DDP."""
    for name in ("model_state_dict", "model", "state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(name), Mapping):
            content = content[name]
    weights = dict(content) if isinstance(content, Mapping) else {}
    if not weights or not all(isinstance(value, Tensor) for value in weights.values()):
        raise ValueError(f"{where} is no state dict: names with tensors were expected.")
    odd = [n for n, t in weights.items() if t.layout != torch.strided or t.is_quantized or t.is_meta or t.is_nested]
    if odd:
        raise ValueError(
            f"{where}: sparse, quantised, nested or without numbers, which is not opened: {', '.join(odd)}."
        )
    return {unprefixed(str(name)): StoredTensor.of(tensor) for name, tensor in weights.items()}


def unprefixed(name: str) -> str:
    return re.sub(r"^((_orig_mod|module)\.)+", "", name)


def from_weights(
    weights: Mapping[str, StoredTensor], cfg: Mapping | None, dtype: torch.dtype | None, where: str
) -> GPTModel:
    """A GPTModel that fits `cfg`, filled with weights in any of the known namings."""
    if cfg is None:
        raise ValueError(
            f"{where} holds weights only, and the number of heads cannot be seen in them: pass the cfg dict too, as in "
            'GPTModel.from_pretrained(FILE, from_preset("gpt2")).'
        )
    full = complete(cfg)
    of_nanogpt, bare = stored_out_in(weights), without_biases(weights)
    weights = our_names(weights, where)
    check_memory(weights, dtype, where)
    if bare:
        weights = zero_biases(weights, full) | weights
    head, embedding = weights.get("head.weight"), weights.get("token_embedding.weight")
    if head is None and not full["tie_weights"]:
        raise ValueError(f"{where} has no head of its own, and cfg says tie_weights=False: use tie_weights=True.")
    if head is not None and embedding is not None and full["tie_weights"] and not equal(head, embedding):
        if "tie_weights" in cfg:
            raise ValueError(
                f"{where} has a head that differs from its embedding, and cfg says tie_weights=True: use False."
            )
        full["tie_weights"] = False  # the cfg did not say: the weights do
    heads = fit_heads(weights, full)
    weights = {n: t if isinstance(t, StoredTensor) else StoredTensor.of(t) for n, t in weights.items()}
    if full["tie_weights"] and embedding is not None:
        weights["head.weight"] = embedding  # the model lists the shared tensor under both names
    model = filled(weights, full, dtype, where, heads)
    if of_nanogpt:  # no such file says which GELU it was trained with: a ckpt.pt is taken for one of today's
        logger.info(
            "%s has the layout of nanoGPT, whose GELU is by erf since May 2023 (mlp='gelu_exact') and was GPT-2's, "
            "by tanh, before (mlp='gelu'). This model computes mlp=%r; cfg={'mlp': %r} opens it as the other.",
            where, full["mlp"], OTHER_GELU[full["mlp"]],
        )  # fmt: skip
    return model


def save(model: GPTModel, folder: str | os.PathLike, tokenizer: object = None) -> None:
    """Write config.json and model.safetensors, which this project and transformers' GPT2LMHeadModel open.

    What Hugging Face's format lacks is written so that it computes the same: no qkv bias becomes a bias of zero, shared
    key-value heads are repeated. Loaded here again, the model is as it was, cfg included.

    A model with a `norm`, `mlp` or `positions` that its GPT-2 cannot have is written under our own names: this project
    opens the folder, bit for bit; transformers refuses it, and a warning says so. It can have the GELU through erf.

    Args:
        folder: made if it is not there.
        tokenizer: GPT-2's, or one that `tokenizer_from_folder` gave; its files are written too, and
            transformers.AutoTokenizer opens them. None: no tokenizer files.
    Raises:
        OSError: the folder cannot be written, with the reason; what was there stays as it was.
        ValueError: a quantised model, or a tokenizer that does not fit: one without such files, or of more tokens.
    """
    quantised = sorted({str(t.dtype) for t in model.state_dict().values() if not t.is_floating_point()})
    if quantised:
        raise ValueError(
            f"this model has weights in {', '.join(quantised)}, which no format here holds: save the model that it was "
            "made from."
        )
    texts = {}
    if tokenizer is not None:
        texts = tokenizer_texts(tokenizer, model.cfg["context_length"])
        if tokenizer.vocab_size > model.cfg["vocab_size"]:
            raise ValueError(
                f"the tokenizer has {tokenizer.vocab_size} tokens, and the model {model.cfg['vocab_size']}: it is not "
                "the one that the model was trained with."
            )
    write_form(*folder_form(model), folder, texts)
    if reasons := unlike_gpt2(model.cfg):
        logger.warning(
            "%s is in this project's own format, which transformers does not open: %s. GPTModel.from_pretrained does.",
            folder, "; ".join(reasons),
        )  # fmt: skip


def equal(one: StoredTensor, other: StoredTensor) -> bool:
    """Whether two tensors hold the same numbers, whatever they are stored in."""
    if one.shape != other.shape:
        return False
    wide = torch.promote_types(one.dtype, other.dtype)
    return torch.equal(one.read().to(wide), other.read().to(wide))
