"""Token shards: a text as token ids in a file that says what it holds.

A shard is a header of 256 bytes and then the ids, little-endian, 2 bytes each where the vocabulary allows, else 4. It
is read through `np.memmap`, so that a corpus may be larger than the memory. Headerless shards (as in nanoGPT) are
read without a word when they are cut off or come from another tokenizer: then a model learns noise. The header is
there so that this is an error.

    offset  bytes  what
         0      8  magic, b"GPT2TOKS"
         8      4  version, 1
        12      4  bytes per id, 2 or 4
        16      8  count of ids
        24     16  fingerprint of the tokenizer, hexadecimal digits
        40     32  SHA-256 of the ids' bytes
        72    184  zeros
"""

import hashlib
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from GPT2Model.files import replace_file

MAGIC, VERSION = b"GPT2TOKS", 1
HEADER_BYTES = 256
_HEADER = struct.Struct("<8sIIQ16s32s")
_AGAIN = "Delete it and prepare the text again."


class Header(NamedTuple):
    """What a shard says of itself.

    Attributes:
        bytes_per_id: 2 or 4.
        count: ids in the shard.
        fingerprint: of the tokenizer that made them, 16 hex digits.
        sha256: of the ids' bytes, in hex digits.
    """

    bytes_per_id: int
    count: int
    fingerprint: str
    sha256: str

    @property
    def dtype(self) -> str:
        return f"<u{self.bytes_per_id}"


def write_shard(path: Path, ids: np.ndarray | Iterable[int], tokenizer_fingerprint: str, vocab_size: int) -> None:
    """Write a shard beside its place and rename it: it is there whole, or not at all.

    Args:
        path: of the shard.
        ids: (count,) token ids, whole numbers.
        tokenizer_fingerprint: 16 hex digits, of the tokenizer that made them.
        vocab_size: every id is below it; up to 65536 an id takes 2 bytes, else 4.
    Raises:
        ValueError: no ids, an id outside the vocabulary, or what is no fingerprint.
        TypeError: ids that are not whole numbers.
        OSError: the file cannot be written; nothing of it is left.
    """
    ids = np.asarray(ids if isinstance(ids, np.ndarray) else list(ids))
    if ids.size == 0:
        raise ValueError(f"{path}: a shard without a token would be empty. Give it some ids, or leave it out.")
    if ids.dtype.kind not in "iu" or ids.ndim != 1:
        raise TypeError(f"{path}: a shard takes one row of whole numbers, got {ids.dtype} of shape {ids.shape}.")
    if not 1 <= vocab_size <= 2**32:
        raise ValueError(f"{path}: a vocabulary has 1 to 2**32 tokens, got vocab_size={vocab_size}.")
    if len(tokenizer_fingerprint) != 16 or not tokenizer_fingerprint.isascii():
        raise ValueError(f"{path}: a tokenizer's fingerprint is 16 hex digits, got {tokenizer_fingerprint!r}.")
    if ids.min() < 0 or ids.max() >= vocab_size:
        place = int(np.argmax((ids < 0) | (ids >= vocab_size)))
        raise ValueError(
            f"{path}: id {ids[place]} at place {place} is outside the vocabulary, 0..{vocab_size - 1}. Were these ids "
            "made with another tokenizer?"
        )
    data = np.ascontiguousarray(ids, dtype="<u2" if vocab_size <= 2**16 else "<u4")
    digest = hashlib.sha256(data).digest()
    header = _HEADER.pack(MAGIC, VERSION, data.itemsize, data.size, tokenizer_fingerprint.encode(), digest)

    def write(beside: Path) -> None:
        with open(beside, "wb") as file:
            file.write(header.ljust(HEADER_BYTES, b"\0"))
            file.write(memoryview(data).cast("B"))

    try:
        replace_file(Path(path), write)
    except OSError as error:
        raise OSError(
            f"{path} cannot be written: {error.strerror} (it takes {HEADER_BYTES + data.nbytes:,} bytes). Free some "
            "space, or choose another folder."
        ) from error


def read_header(path: Path) -> Header:
    """What a shard says of itself, held against the size of the file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a shard, one of another version, or one that is cut off.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            start = file.read(HEADER_BYTES)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such token shard.") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}.") from error
    if not start.startswith(MAGIC):
        if not start:
            raise ValueError(f"{path} is empty: no token shard, which is {HEADER_BYTES} bytes at least. {_AGAIN}")
        raise ValueError(
            f"{path} is not a token shard: it begins with {start[:8]!r}, and a shard with {MAGIC!r}. To learn from a "
            "text, pass the text itself; shards are made by: python -m orchestrator prepare."
        )
    if size < HEADER_BYTES:
        raise ValueError(f"{path} is cut off inside its header: {HEADER_BYTES} bytes expected, {size} there. {_AGAIN}")
    _, version, bytes_per_id, count, fingerprint, digest = _HEADER.unpack(start[: _HEADER.size])
    if version != VERSION:
        raise ValueError(
            f"{path} is a token shard of version {version}, and this project reads version {VERSION}: it was made by "
            "another version of the project. Prepare the text again with this one."
        )
    if bytes_per_id not in (2, 4) or count == 0:
        raise ValueError(f"{path} has a broken header: {bytes_per_id} bytes per id, {count} ids. {_AGAIN}")
    expected = HEADER_BYTES + count * bytes_per_id
    if size != expected:
        what = "is cut off" if size < expected else "is longer than its header says"
        raise ValueError(f"{path} {what}: {expected:,} bytes expected for {count:,} ids, {size:,} there. {_AGAIN}")
    return Header(bytes_per_id, count, fingerprint.decode("ascii", errors="replace"), digest.hex())


def open_shard(path: Path, tokenizer_fingerprint: str | None = None) -> np.memmap:
    """The ids of a shard, (count,) uint16 or uint32, read from the disk when they are looked at.

    Args:
        path: of the shard.
        tokenizer_fingerprint: of the tokenizer that will read them; None: any.
    Raises:
        FileNotFoundError, ValueError: as `read_header`, or a shard that another tokenizer made.
    """
    header = read_header(path)
    if tokenizer_fingerprint is not None and header.fingerprint != tokenizer_fingerprint:
        raise ValueError(
            f"{path} was made with another tokenizer: its fingerprint is {header.fingerprint}, and that of the "
            f"tokenizer in use {tokenizer_fingerprint}. The same ids mean other text there: use the tokenizer that "
            "made it, or prepare the text again with this one, into another folder."
        )
    return np.memmap(path, dtype=header.dtype, mode="r", offset=HEADER_BYTES, shape=(header.count,))


def verify_shard(path: Path) -> Header:
    """Read all of a shard, and hold its ids against the hash in its header.

    Raises:
        FileNotFoundError, ValueError: as `read_header`, or ids that are not those that were written.
    """
    header = read_header(path)
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        file.seek(HEADER_BYTES)
        while block := file.read(2**22):
            digest.update(block)
    if digest.hexdigest() != header.sha256:
        raise ValueError(
            f"{path} is damaged: the SHA-256 of its ids is {digest.hexdigest()[:16]}..., and its header says "
            f"{header.sha256[:16]}... . {_AGAIN}"
        )
    return header
