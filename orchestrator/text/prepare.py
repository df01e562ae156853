"""From a text to a folder of token shards: in parallel, and restartable.

    OUT/preparing.json          what is being made of which text; there while it is unfinished
    OUT/train-00000.tokens ...  the shards (see shards.py)
    OUT/validation-00000.tokens ...
    OUT/manifest.json           written last: settings, tokenizer, shards with counts and hashes

Every document is *opened* by the end-of-text token: there a model sees "a new text begins", as in generation, and the
number of a token's document is the cumulative sum of `ids == end_of_text`.

The text is read twice: once to count it (and to collect the characters for `char`), once to be encoded. What goes
into which shard depends on the text alone, each shard is renamed into place when it is whole, and no shard needs
another. So the number of processes changes nothing, and after an interruption only the missing shards are made.
"""

import contextlib
import difflib
import hashlib
import json
import math
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import filelock

from GPT2Model.files import replace_text
from orchestrator.text.encoding import encode_pieces
from orchestrator.text.pieces import SPLITS, Text, cut_in_pieces, divide, look_over
from orchestrator.text.shards import open_shard, read_header
from orchestrator.text.tokenizers import NAMES, Tokenizer, fingerprint, tokenizer_facts, tokenizer_from

if TYPE_CHECKING:  # what a worker imports stays small
    from orchestrator.text.documents import Source

FORMAT = 1
MANIFEST, UNFINISHED = "manifest.json", "preparing.json"
SHARD_CHARACTERS = 2**24  # some 4 million GPT-2 tokens: seconds of work that an interruption may cost
VALIDATION_PART = 0.1


@dataclass(frozen=True)
class Prepared:
    """A text as token shards.

    Attributes:
        folder: where they are.
        name: of the text.
        tokenizer: what made the ids.
        train, validation: the shards, in order.
        train_tokens, validation_tokens: counts, the end-of-text tokens that open the documents among them.
        documents: of the whole text.
        manifest: what manifest.json says.
    """

    folder: Path
    name: str
    tokenizer: Tokenizer
    train: list[Path]
    validation: list[Path]
    train_tokens: int
    validation_tokens: int
    documents: int
    manifest: dict


def prepare(
    source: "Source",
    tokenizer_name: str,
    out: str | os.PathLike,
    *,
    workers: int | None = None,
    shard_characters: int = SHARD_CHARACTERS,
    validation_part: float = VALIDATION_PART,
    progress: bool = True,
) -> Prepared:
    """Make token shards of a text, or go on where an interrupted call stopped.

    Args:
        source: the text.
        tokenizer_name: "gpt2", "char" or "bytes".
        out: the folder; made where it is missing.
        workers: processes; None: one for each core. The result does not depend on it.
        shard_characters: text in a shard, about; a shard also ends a process's piece of work.
        validation_part: how much is held out, where the source has no validation split of its own: whole documents,
            evenly spread; of few documents the last part of the text, as nanoGPT does.
        progress: show bars.
    Returns:
        what was made, or was there already.
    Raises:
        ValueError: settings that make no sense, a text that is empty or too short, a folder that holds another text
            or other settings, a source that changes while it is read.
        OSError: the folder cannot be written. Finished shards stay, and the same call goes on from them.
    """
    _check(tokenizer_name, workers, shard_characters, validation_part)
    out = Path(out)
    settings = _settings(source, tokenizer_name, validation_part, shard_characters)
    prepared = _open_if_whole(out, settings)
    if prepared is None:
        with _alone_in(out):
            if _open_if_whole(out, settings) is None:  # another process may have made it while this one waited
                _make(source, out, settings, workers, progress)
        prepared = open_prepared(out)
    return prepared


def open_prepared(folder: str | os.PathLike) -> Prepared:
    """A folder that `prepare` made.

    Raises:
        FileNotFoundError: no such folder, not a prepared or not a finished one, or a shard is missing.
        ValueError: a manifest or a shard that cannot be used.
    """
    folder = Path(folder)
    manifest = _read_json(folder / MANIFEST)
    if manifest is None:
        if (folder / UNFINISHED).is_file():
            raise FileNotFoundError(
                f"{folder} is not finished: preparing it was interrupted. Run the same prepare command again: it goes "
                "on from the shards that are there."
            )
        raise FileNotFoundError(
            f"{folder} is no prepared data set: it has no {MANIFEST}. Make one: python -m orchestrator prepare "
            f"DATASET --out {folder}"
        )
    _check_manifest(folder, manifest)
    tokenizer = tokenizer_from(manifest["tokenizer"])
    try:
        counts = {split: {folder / shard["file"]: shard["tokens"] for shard in manifest[split]} for split in SPLITS}
        hashes = {folder / shard["file"]: shard["sha256"] for split in SPLITS for shard in manifest[split]}
        documents = manifest["text"]["documents"]
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{folder / MANIFEST} is not as prepare wrote it ({error!r}): delete the folder, and prepare the text "
            "again."
        ) from error
    for path, count in (counts["train"] | counts["validation"]).items():
        there = len(open_shard(path, fingerprint(tokenizer)))
        if there != count:
            raise ValueError(f"{path} has {there:,} tokens, {count:,} by {MANIFEST}. Prepare the text again.")
        found = read_header(path).sha256
        if found != hashes[path]:
            raise ValueError(
                f"{path} is another shard than the one that {MANIFEST} lists: the SHA-256 in its header is "
                f"{found[:16]}..., {str(hashes[path])[:16]}... by {MANIFEST}. It holds other text. Put the right file "
                "back, or run the same prepare command again: it makes that shard again."
            )
    train, validation = counts.values()
    return Prepared(
        folder, manifest["name"], tokenizer, list(train), list(validation), sum(train.values()),
        sum(validation.values()), documents, manifest,
    )  # fmt: skip


def is_prepared(folder: str | os.PathLike) -> bool:
    """Whether `prepare` made this folder, or began to."""
    return (Path(folder) / MANIFEST).is_file() or (Path(folder) / UNFINISHED).is_file()


def settings_name(source: "Source", tokenizer_name: str, validation_part: float = VALIDATION_PART) -> str:
    """12 hex digits that change with the text and with everything that decides its shards: for a cache's folder."""
    settings = _settings(source, tokenizer_name, validation_part, SHARD_CHARACTERS)
    return hashlib.sha256(json.dumps([FORMAT, settings], sort_keys=True).encode()).hexdigest()[:12]


def _settings(source: "Source", tokenizer_name: str, validation_part: float, shard_characters: int) -> dict:
    """What decides every byte of the shards."""
    return {
        "source_fingerprint": source.fingerprint,
        "tokenizer": tokenizer_name,
        "validation_part": None if source.validation_parts else validation_part,
        "shard_characters": shard_characters,
    }


def check_tokenizer(name: str) -> None:
    """Raise ValueError for a name that is no tokenizer's; the nearest is suggested."""
    if name not in NAMES:
        near = difflib.get_close_matches(str(name).lower(), NAMES, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"tokenizer must be one of {', '.join(NAMES)}, got {name!r}.{hint}")


def _check(tokenizer_name: str, workers: int | None, shard_characters: int, validation_part: float) -> None:
    """Raise ValueError for all settings that make no sense."""
    problems = []
    try:
        check_tokenizer(tokenizer_name)
    except ValueError as error:
        problems.append(str(error))
    if workers is not None and workers < 1:
        problems.append(f"workers must be 1 or more, got {workers}.")
    if shard_characters < 1:
        problems.append(f"shard_characters must be 1 or more, got {shard_characters}.")
    if not 0 < validation_part <= 0.5:
        problems.append(f"validation_part must be above 0 and at most 0.5, got {validation_part}.")
    if problems:
        raise ValueError("\n".join(problems))


def _open_if_whole(out: Path, settings: dict) -> Prepared | None:
    """The folder, if it is finished and no shard is missing. Raises ValueError where it holds something else."""
    manifest = _read_json(out / MANIFEST)
    if manifest is None:
        return None
    _check_manifest(out, manifest)
    _same_settings(out, manifest["settings"], settings)
    try:
        return open_prepared(out)
    except (FileNotFoundError, ValueError):  # a shard was deleted or cut off: it is made again
        return None


def _make(source: "Source", out: Path, settings: dict, workers: int | None, progress: bool) -> None:
    """The work itself, with the folder to itself."""
    for stale in out.glob(".*.partial"):  # of a call that was killed: nobody else is here
        stale.unlink()
    manifest = _read_json(out / MANIFEST)
    _drop_foreign(out, manifest or {})
    begun = _read_json(out / UNFINISHED) or manifest
    if begun is not None:
        _check_manifest(out, begun)
        _same_settings(out, begun["settings"], settings)
        text, tokenizer = Text(**begun["text"]), tokenizer_from(begun["tokenizer"])
    else:
        text, tokenizer = look_over(source, settings["tokenizer"], settings["validation_part"], progress)
        for shard in out.glob("*-[0-9][0-9][0-9][0-9][0-9].tokens"):  # nobody knows of which text any more
            shard.unlink()
    facts = tokenizer_facts(tokenizer)
    begun = {"format": FORMAT, "name": source.name, "settings": settings, "text": text._asdict(), "tokenizer": facts}
    _write_json(out / UNFINISHED, begun)

    size = settings["shard_characters"]
    records = encode_pieces(
        cut_in_pieces(divide(source, text, settings["validation_part"]), size),
        out,
        facts,
        characters=text.characters,
        at_most=math.ceil(text.characters / size),
        workers=workers,
        progress=progress,
    )
    encoded = sum(record.pop("characters") for record in records)
    if encoded != text.characters or source.fingerprint != settings["source_fingerprint"]:
        (out / UNFINISHED).unlink()  # with it goes the meaning of the shards: the next call begins anew
        raise ValueError(
            f"{source.name} changed while it was prepared: {text.characters:,} characters at first, then {encoded:,}. "
            "Run the command again when nothing writes to it any more."
        )
    shards = {split: [record for record in records if record["file"].startswith(f"{split}-")] for split in SPLITS}
    totals = {f"{split}_tokens": sum(record["tokens"] for record in shards[split]) for split in SPLITS}
    bytes_per_token = round(text.utf_8_bytes / sum(totals.values()), 4)
    _write_json(out / MANIFEST, {**begun, "totals": {**totals, "bytes_per_token": bytes_per_token}, **shards})
    (out / UNFINISHED).unlink()


def _drop_foreign(out: Path, manifest: dict) -> None:
    """Delete shards that a finished manifest does not know: whole in themselves, they would be taken for its own."""
    try:
        hashes = {out / shard["file"]: shard["sha256"] for split in SPLITS for shard in manifest.get(split) or ()}
    except (KeyError, TypeError):  # a manifest that says nothing of use
        return
    for path, known in hashes.items():
        with contextlib.suppress(FileNotFoundError, ValueError):  # lost or cut off: it is made again in any case
            if read_header(path).sha256 != known:
                path.unlink()


@contextlib.contextmanager
def _alone_in(out: Path) -> Iterator[None]:
    """Make the folder and hold its lock: of two processes that prepare one text, the second waits, and finds it made.

    Raises:
        OSError: it cannot be made or written.
    """
    lock = filelock.FileLock(out / ".lock")
    try:
        out.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            print(f"another process prepares {out}: waiting for it", file=sys.stderr)
            lock.acquire()
    except OSError as error:
        raise OSError(f"{out} cannot be written: {error.strerror or error}. Choose another folder.") from error
    try:
        yield
    finally:
        lock.release()


def _check_manifest(folder: Path, manifest: dict) -> None:
    """Raise ValueError for a manifest, or the beginning of one, that this version does not read."""
    if manifest.get("format") != FORMAT:
        raise ValueError(
            f"{folder} was prepared in format {manifest.get('format')!r}, and this project reads format {FORMAT}. "
            "Prepare the text again, into another folder."
        )
    missing = [key for key in ("name", "settings", "text", "tokenizer") if key not in manifest]
    if missing:
        raise ValueError(
            f"{folder}: its manifest is not as prepare wrote it, {', '.join(missing)} missing. Delete the folder, and "
            "prepare the text again."
        )


def _same_settings(out: Path, there: dict, asked: dict) -> None:
    other = [
        f"  {key}: {there.get(key)!r} there, {asked[key]!r} asked for" for key in asked if there.get(key) != asked[key]
    ]
    if other:
        raise ValueError(
            f"{out} holds tokens that were made from another text or with other settings:\n" + "\n".join(other) +
            "\nChoose another folder (--out DIR), or delete this one."
        )  # fmt: skip


def _read_json(path: Path) -> dict | None:
    """A file of ours; None where there is none. Raises ValueError for one that is no JSON object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, OSError) as error:
        raise ValueError(f"{path} cannot be read ({error}): delete it, and prepare the text again.") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} is not as prepare wrote it: delete it, and prepare the text again.")
    return value


def _write_json(path: Path, value: dict) -> None:
    try:
        replace_text(path, json.dumps(value, indent=2, ensure_ascii=True) + "\n")
    except OSError as error:
        raise OSError(
            f"{path} cannot be written: {error.strerror}. Free some space, or choose another folder."
        ) from error
