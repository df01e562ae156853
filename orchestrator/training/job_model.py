"""The model of a run: a preset with fresh weights, or the weights of a folder, and what does not fit them."""

from pathlib import Path

import torch

from GPT2Model.config import from_preset
from GPT2Model.gpt2 import GPTModel
from orchestrator.attention_option import requested_attention
from orchestrator.text.tokenizers import Tokenizer, fingerprint
from orchestrator.training.final import tokenizer_in
from orchestrator.training.options import SETTINGS_FILE, SHAPE, Options


def weights_folder(model: str) -> str:
    """The final model of a run, if that is what was given; else what was given: a preset, or a folder with weights."""
    folder = Path(model)
    return str(folder / "final" if (folder / SETTINGS_FILE).is_file() and (folder / "final").is_dir() else folder)


def cfg_of(options: Options) -> dict:
    """The cfg of the model, but for its vocabulary.

    Raises:
        ValueError: a preset or folder that does not exist, or sizes that contradict it.
    """
    attention = {
        "attn_implementation": requested_attention(options),
        "attn_strict": options.attn_strict,
        "disable_mps_fix": options.disable_mps_fix,
    }
    changes = {"context_length": options.max_length, "drop_rate": options.drop_rate}
    changes |= {name: getattr(options, name) for name in SHAPE}
    changes = {name: value for name, value in changes.items() if value is not None}
    if changes.get("context_length", 1) < 1:
        raise ValueError(f"--max_length must be 1 token or more, got {options.max_length}.")
    if not Path(options.model).is_dir():
        return from_preset(options.model, **{"drop_rate": 0.0} | changes, **attention)
    fixed = sorted(changes.keys() & set(SHAPE))
    if fixed:
        raise ValueError(
            f"--model {options.model} is a folder with weights: {', '.join(fixed)} are theirs, leave them out."
        )
    cfg = GPTModel.from_pretrained(options.model).cfg
    if changes.get("context_length", 0) > cfg["context_length"]:
        raise ValueError(
            f"--max_length {options.max_length} is more than the {cfg['context_length']} positions of {options.model}."
        )
    return {**cfg, **attention, "drop_rate": changes.get("drop_rate", cfg["drop_rate"])}


def make_model(options: Options, sizes: dict, tokenizer: Tokenizer, device: str) -> GPTModel:
    """Fresh weights from the seed, or those of a folder."""
    if Path(options.model).is_dir():
        if sizes["vocab_size"] < tokenizer.vocab_size:
            raise ValueError(
                f"{options.model} has a vocabulary of {sizes['vocab_size']}, the tokenizer {tokenizer.name} one of "
                f"{tokenizer.vocab_size}: choose the tokenizer that it was trained with."
            )
        check_vocabulary(options.model, tokenizer)
        attention = {
            name: sizes[name] for name in ("attn_implementation", "attn_strict", "disable_mps_fix", "drop_rate")
        }
        return GPTModel.from_pretrained(options.model, attention).to(device)
    torch.manual_seed(options.seed)
    return GPTModel({**sizes, "vocab_size": tokenizer.vocab_size}).to(device)


def check_vocabulary(folder: str, tokenizer: Tokenizer) -> None:
    """Raise where a model that this project trained would read other tokens than it learned; others cannot be asked."""
    known = tokenizer_in(Path(folder))
    if known is not None and fingerprint(known) != fingerprint(tokenizer):
        raise ValueError(
            f"{folder} learned the tokens of {known.name} (a vocabulary of {known.vocab_size}), and those of this text "
            f"are others: {tokenizer.name}, {tokenizer.vocab_size}. The letters of `char` are those of the text that "
            "it was made from: go on with the same text, or train the first model with --tokenizer bytes or gpt2."
        )
