"""What a saved model looks like: its weights and config in Hugging Face's form, or in ours where that cannot say it.

Files are written beside their place and renamed, so that a crash leaves the old ones whole.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from GPT2Model.files import replace_files
from GPT2Model.gpt2 import GPTModel
from GPT2Model.weights.foreign_configs import hugging_face_config, own_config
from GPT2Model.weights.weight_formats import HUGGING_FACE, TRANSPOSED, regroup, translate, unlike_gpt2


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
    return weights, hugging_face_config(cfg)


def write_form(
    weights: dict[str, Tensor], config: dict, folder: str | os.PathLike, texts: Mapping[str, str] | None = None
) -> None:
    """Write what `folder_form` gave, and further files of text by name. Raises OSError as `save` does."""
    folder = Path(folder)
    texts = {**(texts or {}), "config.json": json.dumps(config, indent=2) + "\n"}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        replace_files({
            folder / "model.safetensors": lambda path: save_file(weights, path, metadata={"format": "pt"}),
            **{folder / name: lambda path, text=text: path.write_text(text, encoding="utf-8")
               for name, text in texts.items()},
        })  # fmt: skip
    except (OSError, SafetensorError) as error:
        raise OSError(f"cannot write the model to {folder}: {error}. Choose a folder that you may write to.") from error
