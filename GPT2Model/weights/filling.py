"""A model filled with stored weights: everything compared by name and shape first, then read one by one.

The model is laid out without memory behind it, and each weight is put into its place as it is read. So opening a model
takes its own memory and that of one weight more; and it draws no random numbers.
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from GPT2Model.gpt2 import GPTModel
from GPT2Model.weights.grouping import grouped, ranges
from GPT2Model.weights.stored_tensors import StoredTensor, check_memory
from GPT2Model.weights.weight_formats import Weight

COMPUTED_IN = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Heads of other models on the body of a GPT-2, by the first word of their weights.
OTHER_HEADS = {
    "score": "transformers' GPT2ForSequenceClassification",
    "classifier": "transformers' GPT2ForTokenClassification",
    "qa_outputs": "transformers' GPT2ForQuestionAnswering",
    "multiple_choice_head": "transformers' GPT2DoubleHeadsModel",
    "v_head": "a model trained with a value head (TRL)",
}


def filled(
    weights: dict[str, StoredTensor], cfg: Mapping, dtype: torch.dtype | None, where: str, heads: list[str]
) -> GPTModel:
    """A GPTModel of a complete cfg with these weights.

    Args:
        weights: under our names, the head too; the dict is emptied on the way.
        dtype: of the model; None: that of the weights.
        heads: what is wrong with their key-value heads: it is not said again about their shapes.
    Raises:
        ValueError: weights that do not fit the cfg, all of them by name. ModelTooLargeError: more than free memory.
    """
    model = laid_out(cfg)
    unfit = [line for line in misfits(model, weights) if not (heads and "W_qkv" in line)]
    problems = [*wrong_numbers(weights, dtype), *heads, *unfit]
    if problems:
        raise ValueError(f"{where} does not fit the cfg dict:\n" + "\n".join(f"  - {problem}" for problem in problems))
    dtype = dtype or common_dtype(weights)
    tied = cfg["tie_weights"]
    if tied:
        del weights["head.weight"]
    check_memory(weights, dtype, where)
    read = {name: own(name, weights.pop(name), dtype, where) for name in list(weights)}
    if tied:
        read["head.weight"] = read["token_embedding.weight"]
    model.load_state_dict(read, assign=True)
    if tied:
        model.head.weight = model.token_embedding.weight  # one Parameter, not two of one tensor
    model.set_attention(cfg)  # as it is on this device; says which it is
    return model.eval()


def own(name: str, weight: StoredTensor, dtype: torch.dtype, where: str) -> Tensor:
    """One weight, read, in memory of its own, on the device that new tensors go to."""
    try:
        stored = weight.read()
        tensor = stored.to(torch.get_default_device(), dtype).contiguous()
    except RuntimeError as error:  # torch's word for memory that it does not get
        raise ValueError(f"{where}: {name} could not be read: {str(error).splitlines()[0]}") from error
    if dtype == torch.float16 and stored.isfinite().all() and not tensor.isfinite().all():
        raise ValueError(
            f"{where}: {name} holds {stored.abs().max():,.0f}, and float16 ends at 65,504: use torch.bfloat16."
        )
    return tensor


def laid_out(cfg: Mapping) -> GPTModel:
    """The model of a complete cfg, its weights without memory, and without a word about its attention."""
    with no_drawing(), torch.device("meta"):
        model = GPTModel({**cfg, "use_flash": False, "attn_strict": False})
    model.cfg = dict(cfg)
    return model


class NoDrawing(TorchFunctionMode):
    """Weights that are read from a file are not drawn at random before."""

    DRAWS = (Tensor.normal_, Tensor.uniform_, torch.nn.init.normal_, torch.nn.init.kaiming_uniform_)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in self.DRAWS:
            return kwargs["tensor"] if kwargs and "tensor" in kwargs else args[0]
        return function(*args, **(kwargs or {}))


@contextmanager
def no_drawing() -> Iterator[None]:
    """Nothing is drawn, and nothing said: on a device without memory no attention is chosen for good."""
    says = logging.getLogger("CMHA")
    before, says.disabled = says.disabled, True
    try:
        with NoDrawing():
            yield
    finally:
        says.disabled = before


def common_dtype(weights: Mapping[str, StoredTensor]) -> torch.dtype:
    """The dtype of the weights; of several, the smallest that holds them all."""
    dtypes = {weight.dtype for weight in weights.values()}
    common = dtypes.pop()
    for dtype in dtypes:
        common = torch.promote_types(common, dtype)
    return common


def wrong_numbers(weights: Mapping[str, StoredTensor], dtype: torch.dtype | None) -> list[str]:
    """Weights that are stored as what nothing is computed in: quantised ones, and fp8 unless it is to be converted."""
    problems = []
    for name, weight in weights.items():
        kind = str(weight.dtype).removeprefix("torch.")
        if not weight.dtype.is_floating_point:
            problems.append((name, f"holds {kind} numbers: quantised weights are not opened here"))
        elif weight.dtype not in COMPUTED_IN and dtype is None:
            problems.append((name, f"is stored in {kind}: pass dtype=torch.bfloat16, say, to convert it"))
    return grouped(problems)


def misfits(model: GPTModel, weights: Mapping[str, Weight]) -> list[str]:
    """Missing, unexpected and wrongly shaped tensors, all of them; what several blocks share is one line.

    Args:
        model: whose names and shapes count. weights: under our names.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    wanted, found = blocks_of(expected), blocks_of(weights)
    absent = wanted.keys() - found.keys()
    beyond = {i for i in found.keys() - wanted.keys() if len(found[i]) > 1}
    lines = []
    for blocks, phrase in ((absent, "missing"), (beyond, f"not part of this model, whose n_layers is {len(wanted)}")):
        if blocks:
            named = found if blocks is beyond else wanted
            tensors = sum(len(named[i]) for i in blocks)
            several = len(blocks) > 1
            lines.append(
                f"block{'s' * several} {ranges(blocks)} {'are' if several else 'is'} {phrase} ({tensors} tensors)"
            )
    told = {name for blocks, named in ((absent, wanted), (beyond, found)) for i in blocks for name in named[i]}
    single = [(name, "is missing") for name in expected if name not in weights and name not in told]
    single += [(name, foreign(name)) for name in weights if name not in expected and name not in told]
    single += [
        (name, f"has shape {tuple(weights[name].shape)}, and {shape} was expected")
        for name, shape in expected.items()
        if name in weights and tuple(weights[name].shape) != shape
    ]
    return lines + grouped(single)


def blocks_of(names) -> dict[int, list[str]]:
    """The names of the tensors in each block."""
    blocks: dict[int, list[str]] = {}
    for name in names:
        first, _, rest = name.partition(".")
        number = rest.partition(".")[0]
        if first == "blocks" and number.isdecimal():
            blocks.setdefault(int(number), []).append(name)
    return blocks


def foreign(name: str) -> str:
    """What is said of a tensor that has no place in the model."""
    head = OTHER_HEADS.get(name.split(".")[0])
    if head is not None:
        return (
            f"is a head of {head}, and this model gives words only. To open its body: "
            "transformers.GPT2LMHeadModel.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER), and pass NEW_FOLDER"
        )
    if ".lora_" in name or ".base_layer." in name:
        return "is part of a LoRA adapter: merge it in peft with merge_and_unload(), save that, and pass its folder"
    return "is not part of this model"
