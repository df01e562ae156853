"""Weights in and out: Hugging Face's GPT-2, LLMs-from-scratch, nanoGPT, and this project's own state dicts.

Files are safetensors, or torch files read with weights_only=True, and are written beside their place and renamed, so
that a crash leaves the old ones whole. The names of the formats are in `GPT2Model/weight_formats.py`.
"""

import json
import logging
import os
import pickle
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from CMHA.cmha import fuse_separate_projections
from GPT2Model.config import PRESETS, complete, rename
from GPT2Model.files import replace_files
from GPT2Model.gpt2 import GPTModel
from GPT2Model.weight_formats import (
    HF_DROPOUTS,
    HF_FIXED,
    HF_SIZES,
    HUGGING_FACE,
    OUR_CFG,
    TRANSPOSED,
    cfg_of,
    fit_heads,
    our_names,
    own_config,
    regroup,
    translate,
    unlike_gpt2,
    unlike_stored,
)

logger = logging.getLogger("GPT2Model")

# What the two readers of weights raise for a damaged or foreign file.
UNREADABLE = (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError)


def load(source: object, cfg: Mapping | None = None) -> GPTModel:
    """A GPTModel with the weights of `source`.

    Args:
        source: a folder with config.json and model.safetensors (Hugging Face's, or ours); a name on the hub such as
            "gpt2"; a .safetensors, .pt or .pth file, or a state dict in memory, whose names are Hugging Face's,
            LLMs-from-scratch's, nanoGPT's or ours.
        cfg: the cfg dict, needed for a file or a state dict; for a folder, keys that should differ (the attention
            keys and drop_rate, say).
    Returns:
        the model, in eval mode.
    Raises:
        FileNotFoundError: no such folder, file or name.
        ValueError: a damaged or foreign checkpoint, a cfg that does not fit it, a field we would have to ignore.
    """
    if isinstance(source, Mapping):
        return from_state_dict(source, cfg, "the state dict")
    if not isinstance(source, str | os.PathLike):
        raise TypeError(
            f"from_pretrained() takes a folder, a file, a name or a state dict, got {type(source).__name__}."
        )
    path = Path(source)
    if path.is_dir():
        return from_folder(path, cfg)
    if path.is_file():
        return from_state_dict(read_weights(path), cfg, str(path))
    if str(source) in PRESETS or (re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)) and not path.parent.is_dir()):
        return from_folder(download(str(source)), cfg)
    raise FileNotFoundError(f"{source}: no such folder or file. Names on the hub: {', '.join(hub_names())}.")


def from_folder(folder: Path, changes: Mapping | None) -> GPTModel:
    config_file = folder / "config.json"
    if not config_file.is_file():
        raise FileNotFoundError(f"{folder} has no config.json: pass the folder that save_pretrained() wrote.")
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{config_file} is not valid JSON ({error}): it may be cut short; copy it anew.") from error
    if not isinstance(config, dict):
        raise ValueError(f"{config_file} must hold a JSON object, got {type(config).__name__}.")
    weights = [folder / name for name in ("model.safetensors", "pytorch_model.bin") if (folder / name).is_file()]
    if not weights:
        split = " Its weights are split over several files: load it with transformers and save it in one."
        several = any(folder.glob("*.index.json"))
        raise FileNotFoundError(f"{folder} has no model.safetensors (or pytorch_model.bin).{split * several}")
    renamed, problems = rename(changes or {})
    if problems:
        raise ValueError("the cfg dict is wrong:\n" + "\n".join(f"  - {problem}" for problem in problems))
    stored = cfg_of(config, renamed, config_file)
    different = unlike_stored(stored, renamed)
    both = f"{config_file} says {'; '.join(different)}: leave {'them' if len(different) > 1 else 'it'} out of cfg. "
    both += "Weights fit only the model that they were trained in; for another, train a GPTModel(cfg)."
    if renamed.get("n_heads", stored["n_heads"]) != stored["n_heads"]:  # the one size that no tensor's shape shows
        raise ValueError(both)
    state_dict = read_weights(weights[0])
    try:
        return from_state_dict(state_dict, {**stored, **renamed}, str(weights[0]))
    except ValueError as error:
        raise ValueError(f"{both}\n{error}" if different else str(error)) from error


def from_state_dict(state_dict: object, cfg: Mapping | None, where: str) -> GPTModel:
    """A GPTModel that fits `cfg`, filled with a state dict in any of the known namings."""
    if cfg is None:
        raise ValueError(
            f"{where} holds weights only, and the number of heads cannot be seen in them: pass the cfg dict too, as in "
            'GPTModel.from_pretrained(FILE, from_preset("gpt2")).'
        )
    full = complete(cfg)
    weights = our_names(unwrap(state_dict, where), where)
    head, embedding = weights.get("head.weight"), weights.get("token_embedding.weight")
    if head is None and not full["tie_weights"]:
        raise ValueError(f"{where} has no head of its own, and cfg says tie_weights=False: use tie_weights=True.")
    if head is not None and embedding is not None and full["tie_weights"] and not torch.equal(head, embedding):
        if "tie_weights" in cfg:
            raise ValueError(
                f"{where} has a head that differs from its embedding, and cfg says tie_weights=True: use False."
            )
        full["tie_weights"] = False  # the cfg did not say: the weights do
    problems = []
    try:
        fit_heads(weights, full)
    except ValueError as error:
        problems.append(str(error))
    if full["tie_weights"] and embedding is not None:
        weights["head.weight"] = embedding  # the model lists the shared tensor under both names

    floats = {tensor.dtype for tensor in weights.values() if tensor.is_floating_point()}
    model = GPTModel(full)
    if len(floats) == 1:
        model = model.to(floats.pop())
    heads = bool(problems)  # what is said about them is not said again about their shapes
    problems += [problem for problem in misfits(model, weights) if not (heads and ".W_qkv." in problem)]
    if problems:
        shown = "\n".join(f"  - {problem}" for problem in problems[:12])
        more = f"\n  and {len(problems) - 12} more" if len(problems) > 12 else ""
        raise ValueError(f"{where} does not fit the cfg dict:\n{shown}{more}")
    model.load_state_dict(weights)
    return model.eval()


def unwrap(state_dict: object, where: str) -> dict[str, Tensor]:
    """The weights themselves, out of a training checkpoint and without the prefixes of torch.compile and DDP."""
    for name in ("model_state_dict", "model", "state_dict"):
        if isinstance(state_dict, Mapping) and isinstance(state_dict.get(name), Mapping):
            state_dict = state_dict[name]
    entries = state_dict.items() if isinstance(state_dict, Mapping) else ()
    weights = {re.sub(r"^((_orig_mod|module)\.)+", "", str(key)): value for key, value in entries}
    if not weights or not all(isinstance(value, Tensor) for value in weights.values()):
        raise ValueError(f"{where} is no state dict: names with tensors were expected.")
    return weights


def misfits(model: GPTModel, weights: dict[str, Tensor]) -> list[str]:
    """Missing, unexpected and wrongly shaped tensors, one sentence each."""
    expected = model.state_dict()
    fused = dict(weights)
    for i, block in enumerate(model.blocks):
        fuse_separate_projections(block.attention, fused, f"blocks.{i}.attention.")
    problems = [f"{name} is missing" for name in expected if name not in fused]
    problems += [f"{name} is not part of this model" for name in fused if name not in expected]
    problems += [
        f"{name} has shape {tuple(fused[name].shape)}, and {tuple(tensor.shape)} was expected"
        for name, tensor in expected.items()
        if name in fused and fused[name].shape != tensor.shape
    ]
    return problems


def read_weights(path: Path) -> object:
    """What a file holds, state dict or not, without running anything that it holds.

    Raises:
        ValueError: a truncated or foreign file.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except UNREADABLE as error:
        if "weights_only" in str(error):  # torch's refusal to run what a pickle holds
            raise ValueError(
                f"{path} cannot be read as weights: it is cut short, or holds Python objects besides tensors (nothing "
                "in it was run). Copy it anew, or save model.state_dict() in its place."
            ) from error
        reason = str(error).strip().splitlines()[0][:160] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"{path} cannot be read as weights: it is cut short, or something else ({type(error).__name__}: {reason}). "
            "Copy it anew, or pass the .safetensors file."
        ) from error


def save(model: GPTModel, folder: str | os.PathLike) -> None:
    """Write config.json and model.safetensors, which this project and transformers' GPT2LMHeadModel open.

    What Hugging Face's format lacks is written so that it computes the same: no qkv bias becomes a bias of zero, shared
    key-value heads are repeated. Loaded here again, the model is as it was, cfg included.

    A model with a `norm`, `mlp` or `positions` that GPT-2 does not have is written under our own names: this project
    opens the folder, bit for bit; transformers refuses it, and a warning says so.

    Raises:
        OSError: the folder cannot be written, with the reason; what was there stays as it was.
    """
    write_form(*folder_form(model), folder)
    if reasons := unlike_gpt2(model.cfg):
        logger.warning(
            "%s is in this project's own format, which transformers does not open: %s. GPTModel.from_pretrained does.",
            folder, "; ".join(reasons),
        )  # fmt: skip


def folder_form(model: GPTModel) -> tuple[dict[str, Tensor], dict]:
    """A copy of the weights on the CPU and the config beside them: as Hugging Face has them, if that can be said there.

    A tied head is stored once.
    """
    if not unlike_gpt2(model.cfg):
        return hugging_face_form(model)
    tied = ("head.weight",) if model.cfg["tie_weights"] else ()
    weights = {
        name: tensor.detach().to("cpu", copy=True).contiguous()
        for name, tensor in model.state_dict().items()
        if name not in tied
    }
    return weights, own_config(model.cfg)


def hugging_face_form(model: GPTModel) -> tuple[dict[str, Tensor], dict]:
    """A copy of the weights on the CPU under Hugging Face's names and in its layout, and the config beside them."""
    cfg, weights = model.cfg, {}
    table = {ours: theirs for theirs, ours in HUGGING_FACE.items()}
    for name, tensor in model.state_dict().items():
        if name == "head.weight" and cfg["tie_weights"]:
            continue
        if ".W_qkv." in name and cfg["n_kv_heads"] not in (None, cfg["n_heads"]):
            tensor = regroup(tensor, cfg)
        tensor = tensor.T if name.endswith(TRANSPOSED) else tensor
        weights[translate(name, table)] = tensor.detach().to("cpu").contiguous().clone()
    if not cfg["qkv_bias"]:
        for i in range(cfg["n_layers"]):
            like = weights[f"transformer.h.{i}.attn.c_attn.weight"]
            weights[f"transformer.h.{i}.attn.c_attn.bias"] = like.new_zeros(like.shape[1])
    config = {
        "architectures": ["GPT2LMHeadModel"],
        **HF_FIXED,
        **{theirs: cfg[ours] for theirs, ours in HF_SIZES.items()},
        **dict.fromkeys(HF_DROPOUTS, cfg["drop_rate"]),
        "bos_token_id": 50256 if cfg["vocab_size"] > 50256 else None,
        "eos_token_id": 50256 if cfg["vocab_size"] > 50256 else None,
        OUR_CFG: cfg,
    }
    del config["quantization_config"]
    return weights, config


def write_form(weights: dict[str, Tensor], config: dict, folder: str | os.PathLike) -> None:
    """Write what `folder_form` gave. Raises OSError as `save` does."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        replace_files({
            folder / "model.safetensors": lambda path: save_file(weights, path, metadata={"format": "pt"}),
            folder / "config.json": lambda path: path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8"),
        })  # fmt: skip
    except (OSError, SafetensorError) as error:
        raise OSError(f"cannot write the model to {folder}: {error}. Choose a folder that you may write to.") from error


def hub_names() -> list[str]:
    return [name for name in PRESETS if name.startswith("gpt2")]


def download(name: str) -> Path:
    """A model's folder from the hub, or from the hub's cache on this machine.

    Raises:
        FileNotFoundError: not a name there, no network, or huggingface_hub is not installed; with what to do.
    """
    hub_name = f"openai-community/{name}" if name in hub_names() else name
    if "/" not in hub_name:
        raise FileNotFoundError(f"{name!r} is a preset without published weights. Names: {', '.join(hub_names())}.")
    advice = f"pass a local folder with config.json and model.safetensors instead of {name!r}"
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise FileNotFoundError(f"fetching {name!r} needs: pip install huggingface_hub. Or {advice}.") from error
    try:
        return Path(snapshot_download(hub_name, allow_patterns=["config.json", "model.safetensors"]))
    except Exception as error:  # whatever its network stack raises
        raise FileNotFoundError(
            f"{name!r} could not be fetched ({type(error).__name__}): without a network, {advice}."
        ) from error
