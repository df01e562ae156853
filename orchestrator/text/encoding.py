"""From pieces of text to token shards, in this process or in several side by side.

Each worker turns one piece into one shard and renames it into place. A worker ends when its parent does, also when the
parent is killed.
"""

import contextlib
import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from functools import lru_cache
from multiprocessing.connection import wait as wait_for
from pathlib import Path

import numpy as np

from orchestrator.text.pieces import Piece, progress_bar
from orchestrator.text.shards import open_shard, verify_shard, write_shard
from orchestrator.text.tokenizers import Tokenizer, fingerprint, tokenizer_from


def make_shard(path: Path, texts: Sequence[tuple[bool, str]], facts: str) -> dict:
    """Encode one piece and write its shard: what a worker does. Returns the shard's record for the manifest."""
    tokenizer = _tokenizer(facts)
    ids = [np.array([tokenizer.end_of_text] * opens + tokenizer.encode(text), np.uint32) for opens, text in texts]
    write_shard(path, np.concatenate(ids), fingerprint(tokenizer), tokenizer.vocab_size)
    return record_of(path, tokenizer)


def record_of(path: Path, tokenizer: Tokenizer) -> dict:
    """A shard's record, after its ids were held against its hash."""
    header = verify_shard(path)
    documents = int((open_shard(path, fingerprint(tokenizer)) == tokenizer.end_of_text).sum())
    return {"file": path.name, "tokens": header.count, "documents": documents, "sha256": header.sha256}


def encode_pieces(
    pieces: Iterable[Piece],
    folder: Path,
    tokenizer_facts: dict,
    *,
    characters: int,
    at_most: int,
    workers: int | None,
    progress: bool,
) -> list[dict]:
    """Make the shards that are missing in a folder.

    Args:
        pieces: of the text, in order; they are read as they are needed.
        folder: of the shards.
        tokenizer_facts: from which each worker builds the tokenizer.
        characters: of the text. at_most: so many processes have work.
        workers: processes; None: one for each core.
        progress: show a bar.
    Returns:
        the record of each shard in the order of the text, with the characters it holds: file, tokens, documents (how
        many end-of-text tokens it has), sha256, characters.
    Raises:
        ValueError, OSError: text that cannot be encoded, shards that cannot be written.
        RuntimeError: a worker ended unexpectedly.
    """
    facts = json.dumps(tokenizer_facts, sort_keys=True)
    tokenizer = _tokenizer(facts)
    workers = max(1, min(workers or cores(), at_most))
    records: dict[str, dict | None] = {}  # in the order of the text; None: in work
    in_work: dict[Future, Piece] = {}
    with progress_bar(progress, desc="encoding", total=characters, unit="character") as bar, _pool(workers) as pool:

        def finished(piece: Piece, record: dict) -> None:
            records[piece.file] = {**record, "characters": piece.characters}
            bar.update(piece.characters)

        for piece in pieces:
            records[piece.file] = None
            path = folder / piece.file
            with contextlib.suppress(FileNotFoundError, ValueError):  # missing or damaged: made again
                finished(piece, record_of(path, tokenizer))
                continue
            if pool is None:
                finished(piece, make_shard(path, piece.texts, facts))
                continue
            in_work[_submit(pool, path, piece.texts, facts)] = piece
            while len(in_work) > workers:  # one waits, so that no process does
                for future in wait(in_work, return_when=FIRST_COMPLETED).done:
                    finished(in_work.pop(future), _result(future))
        for future, piece in in_work.items():
            finished(piece, _result(future))
    return list(records.values())


@lru_cache(maxsize=1)
def _tokenizer(facts: str) -> Tokenizer:
    return tokenizer_from(json.loads(facts))


@contextlib.contextmanager
def _pool(workers: int) -> Iterator[ProcessPoolExecutor | None]:
    """Processes that start clean (no fork of a process with threads); None for one worker: this process does it."""
    if workers == 1:
        yield None
        return
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context(method), initializer=_end_with_parent)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)  # what is in work is finished: a shard is seconds, and is kept


def _end_with_parent() -> None:
    """In a worker: end when the parent is gone. A worker of a killed parent would wait for work for ever."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the parent, which tells the workers
    parent = multiprocessing.parent_process()

    def watch() -> None:
        wait_for([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _submit(pool: ProcessPoolExecutor, *piece) -> Future:
    try:
        return pool.submit(make_shard, *piece)
    except BrokenProcessPool as error:
        raise _broken() from error


def _result(future: Future) -> dict:
    """What a worker returned. Its errors are raised again by a line of ours, as errors for a user are."""
    try:
        return future.result()
    except BrokenProcessPool as error:
        raise _broken() from error
    except ValueError as error:
        raise ValueError(str(error)) from error
    except OSError as error:
        raise OSError(str(error)) from error


def _broken() -> RuntimeError:
    return RuntimeError(
        "a process that encodes text ended unexpectedly. If memory ran out, use fewer: --workers 1. In a script of "
        'yours, put the calls under `if __name__ == "__main__":`, since each process imports the script. What is '
        "finished is kept."
    )


def cores() -> int:
    """How many processes can run side by side here."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
