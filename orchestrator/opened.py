"""open_model(): a model and its tokenizer, from whatever a command's --model names, in the precision that is asked for.

Commands that write or read text with a trained model share it, so that all of them take the same names and folders.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from CMHA.choosing import announce, did_you_mean
from GPT2Model.gpt2 import GPTModel
from GPT2Model.quantization import quantize_int8
from GPT2Model.tokenizer import get_tokenizer
from GPT2Model.tokenizer_files import tokenizer_from_folder
from GPT2Model.weights.hub import download, hub_id
from orchestrator.evaluation.machine import check_device
from orchestrator.learning.trained import tales_model
from orchestrator.text.tales import TalesTokenizer
from orchestrator.training.final import open_trained
from orchestrator.training.precision import TORCH_DTYPES, native_bf16

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DTYPE_NAMES = (*DTYPES, "auto")
SHORT_NAMES = {short: str(dtype).removeprefix("torch.") for short, dtype in TORCH_DTYPES.items()}  # train.py's
GPT2_VOCABULARIES = (50257, 50304)  # the second is nanoGPT's: padded to a multiple of 64
SOURCES = "a run's folder, a checkpoint, a folder with config.json, gpt2 (or -medium, -large, -xl), or tales"


def open_model(
    source: str | Path,
    *,
    device: str = "auto",
    dtype: str = "float32",
    int8: bool = False,
    attn_implementation: str | None = None,
    announced: bool = True,
):
    """The model behind a name or a folder, ready to read text, and the tokenizer that it was trained with.

    Args:
        source: the folder of a run (its final model, or else its newest checkpoint) or a checkpoint; a folder that
            `save_pretrained` or transformers wrote; a name on the hub such as "gpt2"; "tales": the small model that
            this project trains by itself, the first time it is asked for.
        device: cpu, cuda, mps, or "auto": the best here.
        dtype: float32, bfloat16, float16 (or fp32, bf16, fp16), or "auto": bfloat16 where the processor multiplies it
            itself, else float32.
        int8: weights of the linear layers in 8 bits (`GPT2Model/quantization.py`), rounded from those that are stored.
        attn_implementation: how attention is computed; None: as the model's cfg says.
        announced: say on the log, once, how it is computed. False: for a second model beside another.
    Returns:
        the model, in eval mode on the device, and its tokenizer: `encode`, `decode`, `vocab_size`, `end_of_text`.
    Raises:
        FileNotFoundError: no such folder, file or name.
        ValueError: a damaged model; a device or dtype that cannot be used here; no tokenizer that fits the model.
    """
    device, dtype = check_device(device), resolve_dtype(dtype, device)
    with unannounced():
        model, tokenizer = read_model(source)
    if tokenizer.vocab_size > model.cfg["vocab_size"]:
        raise ValueError(
            f"{source} has a vocabulary of {model.cfg['vocab_size']} tokens, and its tokenizer has "
            f"{tokenizer.vocab_size}: they do not belong together. Put the right tokenizer beside the weights."
        )
    with unannounced():
        model = as_asked(model, device=device, dtype=dtype, int8=int8, attn_implementation=attn_implementation)
    if announced:
        announce(model.blocks[0].attention.choice())
    return model, tokenizer


@contextmanager
def unannounced() -> Iterator[None]:
    """While a model is built, moved and changed, its attention is not what it will be: the INFO line comes later."""

    def but_info(record: logging.LogRecord) -> bool:
        return record.levelno != logging.INFO

    logger = logging.getLogger("CMHA")
    logger.addFilter(but_info)
    try:
        yield
    finally:
        logger.removeFilter(but_info)


def as_asked(
    model: GPTModel, *, device: str = "cpu", dtype: str = "float32", int8: bool = False, attn_implementation=None
) -> GPTModel:
    """A model in this precision, on this device; arguments as `open_model`'s, resolved.

    The model itself is changed, unless int8 makes a copy. Weights are rounded to 8 bits from what they were, not from
    what the shorter dtype leaves of them.
    """
    model = quantize_int8(model) if int8 else model
    model = model.to(device=device, dtype=DTYPES[dtype]).eval()
    if attn_implementation is not None:
        model.set_attention(attn_implementation)  # as it is used: in eval, on this device, in this dtype
    return model


def resolve_dtype(name: str, device: str = "auto") -> str:
    """A name of `DTYPES`, also for its short name; "auto" is bfloat16 where the processor has it, else float32.

    Raises:
        ValueError: no such dtype, or one that this device does not compute in.
    """
    device, name = check_device(device), SHORT_NAMES.get(name, name)
    if name == "auto":
        return "bfloat16" if native_bf16(device) else "float32"
    if name not in DTYPES:
        raise ValueError(
            f"dtype must be one of {', '.join(DTYPE_NAMES)}, got {name!r}.{did_you_mean(name, DTYPE_NAMES)}"
        )
    return name


def read_model(source: str | Path):
    """The weights as they are stored, on the CPU, and the tokenizer; see `open_model`."""
    folder = Path(source).expanduser()
    if not folder.exists():
        if str(source) == "tales":
            return tales_model()
        if hub_id(str(source)) is None or (folder.parent.is_dir() and folder.parent != Path()):
            raise FileNotFoundError(f"{source}: no such model. --model takes {SOURCES}.")
        folder = download(str(source))
    try:
        return open_trained(folder)
    except FileNotFoundError:  # not a run's: whatever else it may be
        pass
    if not (folder / "config.json").is_file() and (folder / "model" / "config.json").is_file():
        folder = folder / "model"  # of the main job's run
    model = GPTModel.from_pretrained(folder)
    return model, tokenizer_of(folder, model.cfg["vocab_size"])


def tokenizer_of(folder: Path, vocab_size: int):
    """The tokenizer of a folder or file that is not a run's: from its files, or by the size of its vocabulary.

    Raises:
        ValueError: no tokenizer files, and a vocabulary of another size than those that are known here.
    """
    try:
        return tokenizer_from_folder(folder)
    except FileNotFoundError:
        pass
    if vocab_size in GPT2_VOCABULARIES:
        return get_tokenizer()
    if vocab_size == (tales := TalesTokenizer()).vocab_size:
        return tales
    raise ValueError(
        f"{folder} has no tokenizer files, and its vocabulary of {vocab_size} tokens is not GPT-2's "
        f"({GPT2_VOCABULARIES[0]}): put the tokenizer's files (tokenizer.json, or vocab.json and merges.txt) beside "
        "the weights, or pass the folder of the run that trained it."
    )
