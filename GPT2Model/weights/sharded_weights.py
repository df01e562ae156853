"""Weights split over several files: an index says in which of them each tensor lies.

Hugging Face writes `model.safetensors.index.json` (or `pytorch_model.bin.index.json`): {"weight_map": {NAME: FILE}}.
The index and the files are held against each other before anything is read, and everything that is wrong is said at
once.
"""

import json
from collections.abc import Callable
from pathlib import Path, PurePosixPath, PureWindowsPath

from GPT2Model.weights.grouping import grouped
from GPT2Model.weights.stored_tensors import StoredTensor


def open_sharded(index: Path, open_file: Callable[[Path], dict[str, StoredTensor]]) -> dict[str, StoredTensor]:
    """The tensors of all files that an index names, none of them read.

    Args:
        index: the .index.json file. open_file: what opens one of the files.
    Raises:
        ValueError: an index that is none, or that leaves its folder, or that the files do not agree with; damaged
            files. FileNotFoundError: files that are not there, all of them by name.
    """
    place = places(index)
    shards = sorted(set(place.values()))
    missing = [shard for shard in shards if not (index.parent / shard).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{index.parent} has {len(shards) - len(missing)} of the {len(shards)} files that {index.name} names. "
            f"Missing: {', '.join(missing)}. Put them there too, from where the others came."
        )
    tensors, problems, damaged = {}, [], []
    for shard in shards:
        try:
            found = open_file(index.parent / shard)
        except ValueError as error:
            damaged.append(str(error))
            continue
        problems += [
            (name, f"is not in {shard}, where the index has it") for name in place if place[name] == shard
            and name not in found
        ]  # fmt: skip
        for name, tensor in found.items():
            if place.get(name) == shard:
                tensors[name] = tensor
            else:
                meant = f"the index has it in {place[name]}" if name in place else "the index does not name it"
                problems.append((name, f"is in {shard}, and {meant}"))
    if damaged:
        raise ValueError("\n".join(damaged))
    if problems:
        lines = "\n".join(f"  - {line}" for line in grouped(problems))
        raise ValueError(f"{index} and its files do not agree: copy them anew, all of one model.\n{lines}")
    return tensors


def places(index: Path) -> dict[str, str]:
    """The file in which the index has each tensor."""
    try:
        place = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        assert isinstance(place, dict)
        assert place
        assert all(isinstance(file, str) for file in place.values())
    except (OSError, ValueError, KeyError, TypeError, AssertionError, RecursionError) as error:
        raise ValueError(
            f"{index} is no index of weights ({type(error).__name__}: {error}): it may be cut short; copy it anew. "
            'It must hold {"weight_map": {NAME: FILE}}.'
        ) from error
    outside = sorted({file for file in place.values() if leaves_its_folder(file)})
    if outside:
        raise ValueError(
            f"{index} names files outside its folder: {', '.join(outside)}. Nothing was opened: it is not an index "
            "that Hugging Face wrote."
        )
    return place


def leaves_its_folder(file: str) -> bool:
    """Whether a path is absolute, or climbs, on any system. (Links are followed: the hub's cache is made of them.)"""
    both = (PurePosixPath(file), PureWindowsPath(file))
    return not file or any(path.is_absolute() or path.drive or path.root or ".." in path.parts for path in both)
