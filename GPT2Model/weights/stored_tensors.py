"""Tensors that lie in a file and are not read yet: name, shape, dtype, and a function that reads one of them.

Why: all that can be wrong with weights, but for their numbers, shows in names and shapes. So everything is checked, the
free memory too, before one number is read; and then they are read one by one, so that loading takes little more memory
than the model itself.

A safetensors file is a length (8 bytes, little-endian), a JSON header of that length, and then the numbers, one tensor
after the other. Nothing in it can be run. Source: https://github.com/huggingface/safetensors, "Format".
"""

import json
import math
import pickle
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from GPT2Model.free_memory import free_memory, gib

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
LONGEST_HEADER = 100_000_000  # bytes; the safetensors library reads no longer one either
UNREADABLE = (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError)  # by torch.load


class ModelTooLargeError(MemoryError, ValueError):
    """A model that would not fit into the memory that is free. A ValueError too: another model, or dtype, would."""


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a file.

    Attributes:
        shape, dtype: as it is stored.
        read: gives the tensor, on the CPU, in memory that nobody else holds.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]

    @classmethod
    def of(cls, tensor: Tensor) -> "StoredTensor":
        """A tensor that is in memory already, or mapped into it."""
        return cls(tuple(tensor.shape), tensor.dtype, lambda: tensor.detach().to("cpu", copy=True))

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def T(self) -> "StoredTensor":  # noqa: N802 (as a Tensor calls it)
        return StoredTensor(self.shape[::-1], self.dtype, lambda: self.read().T)

    def nbytes(self, dtype: torch.dtype | None = None) -> int:
        """Bytes that it takes, once its floating-point numbers are of another dtype."""
        kept = dtype is None or not self.dtype.is_floating_point
        return math.prod(self.shape) * (self.dtype if kept else dtype).itemsize


def check_memory(tensors: Mapping[str, StoredTensor], dtype: torch.dtype | None, where: str) -> None:
    """Raise ModelTooLargeError, with the figures and what to do, where the tensors would not fit into free memory."""

    def needed(dtype: torch.dtype | None) -> int:
        sizes = [tensor.nbytes(dtype) for tensor in tensors.values()]
        return sum(sizes) + max(sizes, default=0)  # one of them is there twice for as long as it is converted

    total, free = needed(dtype), free_memory()
    if total <= free:
        return
    smaller = needed(torch.bfloat16)
    advice = f"in {gib(smaller)} it opens with dtype=torch.bfloat16; else c" if smaller <= free else "C"
    raise ModelTooLargeError(
        f"{where} is a model of {gib(total)}, and {gib(free)} of memory are free here: nothing of it was read. "
        f"{advice[0].upper() + advice[1:]}lose what else takes memory, or choose a smaller model."
    )


def open_safetensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file, none of them read.

    Raises:
        ValueError: a truncated or foreign file, or a dtype that torch does not have.
    """
    try:
        header, start = read_header(path)
        size = path.stat().st_size - start
        return located(header, path, start, size)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(unreadable(path, error)) from error


def read_header(path: Path) -> tuple[dict, int]:
    """The header of a safetensors file, and where the numbers begin."""
    with path.open("rb") as file:
        length = int.from_bytes(first := file.read(8), "little")
        if len(first) < 8 or not 2 <= length <= LONGEST_HEADER:
            raise ValueError("no header")
        text = file.read(length)
    if len(text) < length:
        raise ValueError(f"a header of {length:,} bytes, of which {len(text):,} are there")
    header = json.loads(text)
    header.pop("__metadata__", None)
    return header, 8 + length


def located(header: dict, path: Path, start: int, size: int) -> dict[str, StoredTensor]:
    """The tensors of a header, once their places are the whole rest of the file, without a gap or an overlap."""
    tensors, reached = {}, 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        if entry["dtype"] not in DTYPES:
            raise ValueError(f"{name} is stored as {entry['dtype']}; known are {', '.join(DTYPES)}")
        shape, dtype, (begin, end) = tuple(entry["shape"]), DTYPES[entry["dtype"]], entry["data_offsets"]
        if begin != reached or not all(isinstance(n, int) and n >= 0 for n in shape):
            raise ValueError(f"the place of {name} is not behind the tensor before it")
        if end - begin != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{name}, {shape} in {entry['dtype']}, does not take {end - begin:,} bytes")
        tensors[name] = StoredTensor(shape, dtype, reader(path, start + begin, shape, dtype))
        reached = end
    if reached != size:
        raise ValueError(f"its header tells of {reached:,} bytes of numbers, and {size:,} are there")
    return tensors


def reader(path: Path, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> Callable[[], Tensor]:
    def read() -> Tensor:
        tensor = torch.empty(shape, dtype=dtype, device="cpu")
        numbers = tensor.view(-1).view(torch.uint8).numpy()  # the same memory, as bytes
        try:
            with path.open("rb") as file:
                file.seek(offset)
                if file.readinto(numbers) != numbers.nbytes:
                    raise OSError("it became shorter")
        except OSError as error:
            raise ValueError(unreadable(path, error)) from error
        return tensor

    return read


def open_torch_file(path: Path) -> object:
    """What a file of torch.save holds, state dict or not, without running anything that it holds.

    Its tensors are mapped into memory where the file is of today's kind (a zip file), and so are read when used.

    Raises:
        ValueError: a truncated or foreign file. ModelTooLargeError: one of the older kind, larger than free memory.
    """
    try:
        mapped = zipfile.is_zipfile(path)
        if not mapped and path.stat().st_size > free_memory():
            raise ModelTooLargeError(
                f"{path} has {gib(path.stat().st_size)}, and {gib(free_memory())} of memory are free here: nothing of "
                "it was read. Pass a safetensors file, or choose a smaller model."
            )
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except ModelTooLargeError:
        raise
    except UNREADABLE as error:
        if "weights_only" in str(error):  # torch's refusal to run what a pickle holds
            raise ValueError(
                f"{path} cannot be read as weights: it is cut short, or holds Python objects besides tensors (nothing "
                "in it was run). Copy it anew, or save model.state_dict() in its place."
            ) from error
        raise ValueError(unreadable(path, error)) from error


def unreadable(path: Path, error: Exception) -> str:
    reason = str(error).strip().splitlines()[0][:160] if str(error).strip() else type(error).__name__
    return (
        f"{path} cannot be read as weights: it is cut short, or something else ({type(error).__name__}: {reason}). "
        "Copy it anew, or pass the .safetensors file."
    )
