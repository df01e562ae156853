"""What a checkpoint holds: everything that a run is, copied at one moment, and put back.

- `model.safetensors`, `config.json`: what `save_pretrained` writes; `GPTModel.from_pretrained` opens the folder;
- `optimizer.safetensors`: the optimizer's memory, `NAME OF THE WEIGHT/WHAT`;
- `random.safetensors`, `random.json`: the random states of torch, of Python and numpy;
- `state.json`: counters (the position in the data is one of them), the loss scaler, the settings with the schedule,
  cfg, tokenizer, versions.
"""

import json
import platform
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

import numpy as np
import safetensors
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from GPT2Model.pretrained import folder_form, misfits, write_form
from GPT2Model.weights.weight_formats import fit_heads, our_names
from orchestrator.training.rng import random_states, restore_random_states
from orchestrator.training.same_run import cfg_differences, other_run, phrase_of
from orchestrator.training.state import Counters, TrainState

MODEL, OPTIMIZER, STATE = "model.safetensors", "optimizer.safetensors", "state.json"
RANDOM, PLAIN_RANDOM = "random.safetensors", "random.json"


@dataclass
class Copy:
    """A run at one moment: nothing in it is shared with what goes on being trained."""

    step: int
    weights: dict[str, Tensor]
    config: dict
    optimizer: dict[str, Tensor]
    random: dict[str, Tensor | dict]
    record: dict

    def write(self, place: Path) -> None:
        """Fill an empty folder."""
        write_form(self.weights, self.config, place)
        save_file(self.optimizer, place / OPTIMIZER)
        tensors = {name: value for name, value in self.random.items() if isinstance(value, Tensor)}
        save_file(tensors, place / RANDOM)
        plain = {name: value for name, value in self.random.items() if name not in tensors}
        for name, content, indent in ((PLAIN_RANDOM, plain, None), (STATE, self.record, 1)):
            text = json.dumps(content, indent=indent, ensure_ascii=False)
            (place / name).write_text(text + "\n", encoding="utf-8", newline="\n")

    def bytes(self) -> int:
        """About what it takes on the disk."""
        return sum(tensor.nbytes for part in (self.weights, self.optimizer) for tensor in part.values())


def take_copy(state: TrainState, facts: Mapping) -> Copy:
    """Everything at the same moment, so that what is trained on meanwhile changes nothing of it."""
    record = {
        "counters": asdict(state.counters),
        "validation_loss": state.validation_loss,
        "scaler": state.scaler.state_dict(),
        "optimizer": kinds(state.optimizer),
        "facts": {**facts, "cfg": dict(state.model.cfg), "settings": asdict(state.settings)},
        "versions": versions(),
    }
    memory = {name: to_cpu(value) for name, value in optimizer_memory(state).items()}
    return Copy(state.counters.step, *folder_form(state.model), memory, random_states(), record)


def to_cpu(tensor: Tensor) -> Tensor:
    """A copy that shares nothing with what is trained, also where it was on the CPU already."""
    return tensor.detach().to("cpu", copy=True).contiguous()


def versions() -> dict[str, str]:
    """Of what computes. The same numbers to the last bit are promised for the same versions only."""
    try:
        project = metadata.version("gpt2-from-scratch")
    except metadata.PackageNotFoundError:  # run from its folder, without installing it
        project = "not installed"
    return {
        "gpt2-from-scratch": project,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "safetensors": safetensors.__version__,
    }


def parts_of(optimizer) -> tuple[torch.optim.Optimizer, ...]:
    """The optimizers behind one: see `MuonAndAdamW`."""
    return getattr(optimizer, "parts", (optimizer,))


def kinds(optimizer) -> list[str]:
    return [type(part).__name__ for part in parts_of(optimizer)]


def optimizer_memory(state: TrainState) -> dict[str, Tensor]:
    """ "NAME/WHAT" -> tensor, as in "blocks.0.norm_1.weight/exp_avg". By name: an order of weights may change."""
    memory = {}
    for part, names, _ in numbered(state):
        for number, values in part.state_dict()["state"].items():
            for what, value in values.items():
                assert isinstance(value, Tensor), f"{what} of {names[number]} is a {type(value).__name__}"
                memory[f"{names[number]}/{what}"] = value
    return memory


def numbered(state: TrainState) -> Iterator[tuple[torch.optim.Optimizer, dict[int, str], dict[int, Tensor]]]:
    """Each optimizer with the name and the weight behind each of its numbers, which is what its state dict goes by."""
    name_of = {id(weight): name for name, weight in state.model.named_parameters()}
    for part in parts_of(state.optimizer):
        groups = zip(part.param_groups, part.state_dict()["param_groups"], strict=True)
        pairs = [pair for group, saved in groups for pair in zip(saved["params"], group["params"], strict=True)]
        yield part, {i: name_of[id(weight)] for i, weight in pairs}, dict(pairs)


def restore(place: Path, state: TrainState) -> dict:
    """Make `state` what was saved: weights, optimizer, scaler, counters, and all random states of this process.

    Everything is compared before anything is changed.

    Args:
        place: a whole checkpoint, see `find` and `verify`.
        state: of a model and an optimizer made as they were for the run that was saved.
    Returns:
        the facts that were saved.
    Raises:
        ValueError: another architecture or optimizer, with every difference.
    """
    place = Path(place)
    record, plain, cfg = read_json(place / STATE), read_json(place / PLAIN_RANDOM), state.model.cfg
    try:
        weights, memory, random = (load_file(place / name) for name in (MODEL, OPTIMIZER, RANDOM))
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{place} cannot be read: {error}. verify() says which of its files are damaged.") from error
    problems = cfg_differences(record["facts"]["cfg"], cfg).refused
    if not problems:
        weights = our_names(weights, str(place))
        problems += fit_heads(weights, cfg)
        if cfg["tie_weights"]:
            weights["head.weight"] = weights["token_embedding.weight"]
        problems += misfits(state.model, weights) + other_types(state.model, weights)
    if record["optimizer"] != kinds(state.optimizer):
        problems.append(phrase_of("optimizer", record["optimizer"], kinds(state.optimizer)))
    elif not problems:
        problems += misplaced(memory, state)
    if problems:
        raise ValueError(other_run(place, problems))

    state.model.load_state_dict(weights)
    restore_optimizer(memory, state)
    if record["scaler"] and state.scaler.is_enabled():
        state.scaler.load_state_dict(record["scaler"])
    state.counters = Counters(**record["counters"])
    state.validation_loss = record["validation_loss"]
    restore_random_states({**plain, **random})
    return record["facts"]


def read_json(file: Path) -> dict:
    """What a file of a checkpoint holds.

    Raises:
        ValueError: it cannot be read.
    """
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file.parent} is no checkpoint, or a damaged one: {file.name}: {error}.") from error


def other_types(model: nn.Module, weights: dict[str, Tensor]) -> list[str]:
    """Weights that would be rounded, or look more precise than they are."""
    return [
        phrase_of(name, str(weights[name].dtype), str(tensor.dtype))
        for name, tensor in model.state_dict().items()
        if name in weights and weights[name].dtype != tensor.dtype
    ]


def misplaced(memory: Mapping[str, Tensor], state: TrainState) -> list[str]:
    """Parts of the optimizer's memory for which there is no weight, or one of another shape."""
    weights = {name: tensors[i] for _, names, tensors in numbered(state) for i, name in names.items()}
    problems = []
    for key, value in memory.items():
        name = key.rpartition("/")[0]
        if name not in weights:
            problems.append(f"the optimizer remembered {key}, and does not train {name} now")
        elif value.ndim and value.shape != weights[name].shape:
            shapes = f"{tuple(value.shape)}, and the weight {tuple(weights[name].shape)}"
            problems.append(f"the optimizer's {key} has shape {shapes}")
    return problems


def restore_optimizer(memory: Mapping[str, Tensor], state: TrainState) -> None:
    """Give each weight its memory back; rates and decay stay as the settings of this run say."""
    for part, names, _ in numbered(state):
        numbers, saved = {name: number for number, name in names.items()}, {}
        for key, value in memory.items():
            name, _, what = key.rpartition("/")
            if name in numbers:  # cloned: what is read from a file may be the file itself, mapped into memory
                saved.setdefault(numbers[name], {})[what] = value.clone()
        part.load_state_dict({**part.state_dict(), "state": saved})
