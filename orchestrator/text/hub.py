"""Hugging Face data sets by name: from a copy in the data folder, from the hub's cache, or from the network.

Only parquet files are ever fetched, so that no code of the hub can run here, and one path reads a copy of yours and a
download alike. `huggingface_hub` (extra `hub`) does the fetching, `datasets` is not needed: a data set that is not
parquet has a parquet twin on the hub's own branch refs/convert/parquet.

Its files say by their names which split they belong to: train-00000-of-00002.parquet, default/train/0000.parquet,
TinyStories-valid.txt. The folder around them is the configuration: wikitext-103-raw-v1/train-00000-of-00002.parquet.
"""

import errno
import glob
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from orchestrator.text.reading import EXTRA, FILES, JSON_LINES, PARQUET, TEXT

NOT_DATA = ("readme", "license", "licence", "dataset_info", "dataset_infos", "dataset_dict", "state")  # beside the data
SPLITS = {"train": "train", "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation"}
SPLITS |= {"test": "test", "eval": "test"}
REVISIONS = ("main", "refs/convert/parquet")
NONE = "no file has this name"
TIMEOUT = 10  # seconds for the first answer of the hub


class HubDataset(NamedTuple):
    """A data set of the hub.

    Attributes:
        name: as the user says it, and its folder in the data folder.
        hub_id: owner/name on the hub.
        config: the part of it to read (the folder of its files); None: it has one part.
        field: the column that holds the text.
        articles: its rows are lines of articles, which are joined again.
        asked: whether the user named the config, who then gets this one or an error.
    """

    name: str
    hub_id: str
    config: str | None = None
    field: str = "text"
    articles: bool = False
    asked: bool = False


DATASETS = {
    data.name: data
    for data in (
        # 103 million words of Wikipedia, one row for each line of an article: https://arxiv.org/abs/1609.07843
        HubDataset("wikitext", "Salesforce/wikitext", "wikitext-103-raw-v1", articles=True),
        # an open copy of WebText, which GPT-2 was trained on: 8 million pages, 24 GB; no validation split
        HubDataset("openwebtext", "Skylion007/openwebtext", "plain_text"),
        # stories that a small model can learn to tell: https://arxiv.org/abs/2305.07759
        HubDataset("tinystories", "roneneldan/TinyStories"),
        # 10 billion tokens of web pages chosen for what they teach, 28 GB; no validation split
        HubDataset("fineweb-edu", "HuggingFaceFW/fineweb-edu", "sample-10BT"),
    )
}


class Splits(NamedTuple):
    """The files of a data set; those of its test split are left out, nothing is ever trained on them."""

    train: tuple[Path, ...]
    validation: tuple[Path, ...]


def hub_dataset(name: str) -> HubDataset | None:
    """The data set that a name means: a name of `DATASETS` or owner/name, either with ":config" behind; else None."""
    match = re.fullmatch(r"([\w.-]+(?:/[\w.-]+)?)(?::([\w./-]+))?", name)
    if not match:
        return None
    said, config = match.groups()
    known = {key.lower(): data for data in DATASETS.values() for key in (data.name, data.hub_id)}
    data = known.get(said.lower()) or (HubDataset(said, said) if "/" in said else None)
    return data._replace(config=config, asked=True) if data and config else data


def split_of(name: str) -> str | None:
    """The split that a file belongs to by its own name, or else by its folders' names; None where neither says.

    The first or the last word of the name counts, so that "crash-test-reports.txt" is no test split.
    """
    for part in reversed(Path(name.lower()).parts):
        suffix = max((suffix for suffix in FILES if part.endswith(suffix)), key=len, default="")
        words = re.findall("[a-z]+", part.removesuffix(suffix)) or [""]
        for word in (words[0], words[-1]):
            if word in SPLITS:
                return SPLITS[word]
    return None


def local_copy(data: HubDataset, folder: Path) -> Splits | None:
    """The files of a copy of the data set in this folder: as on the hub, or JSONL or text files named like them.

    Raises:
        FileNotFoundError: files, but none to train on.
        ValueError: several configurations and none of them meant.
    """
    if not folder.is_dir():
        return None
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    names = [name for name in names if not any(part.startswith(".") for part in name.split("/"))]
    for suffixes in (PARQUET, JSON_LINES, TEXT):
        usable = [
            n for n in names if n.lower().endswith(suffixes) and Path(n).name.split(".")[0].lower() not in NOT_DATA
        ]
        if usable:
            parts = _parts(usable)
            chosen = _choose(parts, data)
            if chosen is None:
                raise ValueError(_which(data, parts, str(folder)))
            return _splits(folder, parts[chosen], str(folder))
    return None


def download(
    data: HubDataset, folder: Path, endpoint: str | None = None, cache_dir: str | Path | None = None
) -> Splits:
    """The files of a data set from the hub; those that the hub's cache has are not fetched again.

    Args:
        data: which.
        folder: where a copy of the user's own would lie, for the messages.
        endpoint, cache_dir: of `huggingface_hub`; None: its own (HF_ENDPOINT, HF_HUB_CACHE).

    Raises:
        ImportError: no huggingface_hub.
        ConnectionError: it is not in the cache and the hub cannot be reached, or the download broke off.
        FileNotFoundError, ValueError: the hub has no such data set, no such configuration, or no parquet of it.
    """
    try:
        import huggingface_hub as hub
    except ImportError as error:
        raise ImportError(
            f"{data.name} comes from the Hugging Face hub, which needs huggingface_hub: {EXTRA}."
        ) from error
    where = {"repo_id": data.hub_id, "repo_type": "dataset", "endpoint": endpoint, "cache_dir": cache_dir}
    api, parts = hub.HfApi(endpoint=endpoint), {}
    for revision in REVISIONS:
        try:
            listed = api.dataset_info(data.hub_id, revision=revision, timeout=TIMEOUT).siblings or []
        except hub.errors.RevisionNotFoundError:
            continue
        except hub.errors.GatedRepoError as error:
            raise ConnectionError(
                f"{_page(data)} asks who you are: accept its terms there and log in with `hf auth login`."
            ) from error
        except hub.errors.RepositoryNotFoundError as error:
            raise FileNotFoundError(
                f"the Hugging Face hub has no public data set {data.hub_id}. Look at its spelling on {_page(data)}; "
                "for a private one log in with `hf auth login`."
            ) from error
        except hub.errors.HFValidationError as error:
            raise ValueError(f"{data.hub_id!r} cannot be a data set of the Hugging Face hub: {error}") from error
        except Exception as error:  # whatever the network stack raises: the classes differ from version to version
            return _in_the_cache(data, hub, where, _unreachable(data, folder, error), error)
        found = _parts([file.rfilename for file in listed if file.rfilename.endswith(PARQUET)])
        chosen = _choose(found, data)
        if chosen is not None:
            patterns = [glob.escape(name) for name in found[chosen]]
            try:
                snapshot = Path(hub.snapshot_download(**where, revision=revision, allow_patterns=patterns))
            except Exception as error:
                raise _broken_off(data, error) from error
            return _splits(snapshot, found[chosen], _page(data))
        parts |= found
    if parts:
        raise ValueError(_which(data, parts, _page(data)))
    raise ValueError(
        f"{_page(data)} has no parquet files, and only those are read here (a script of the hub is never run). "
        f"Write them yourself, one column {data.field!r}, and put them into {folder}/: "
        f'datasets.load_dataset("{data.hub_id}", split="train").to_parquet("{folder}/train.parquet").'
    )


def _in_the_cache(data: HubDataset, hub, where: dict, message: str, cause: Exception) -> Splits:
    """The files of an earlier download, where it was a whole one; else ConnectionError with this message."""
    for revision in REVISIONS:
        at_hand = {**where, "revision": revision, "local_files_only": True}
        try:
            snapshot = Path(hub.snapshot_download(**at_hand, allow_patterns=[NONE]))  # only where it lies
            parts = _parts([path.relative_to(snapshot).as_posix() for path in snapshot.rglob("*.parquet")])
            chosen = _choose(parts, data)
            if chosen is None:
                continue
            # Newer versions know from their listing whether files of it are missing, and raise then.
            hub.snapshot_download(**at_hand, allow_patterns=[glob.escape(f"{chosen}/" if chosen else "") + "*.parquet"])
        except FileNotFoundError:
            continue
        return _splits(snapshot, parts[chosen], f"the cached {_page(data)}")
    raise ConnectionError(message) from cause


def _unreachable(data: HubDataset, folder: Path, error: Exception) -> str:
    files = f"{data.config}/*.parquet" if data.config else "*.parquet"
    return (
        f"{data.name} is not in {folder}/ nor (whole) in the Hugging Face cache, and the hub cannot be reached "
        f"({_said(error)}). Do one of these:\n"
        "  connect this machine to the internet (and unset HF_HUB_OFFLINE), or\n"
        f"  download {files} from {_page(data)} on another machine and put the files into {folder}/, or\n"
        "  train on something that is here: --dataset FILE, --dataset python-docs or --dataset tales."
    )


def _broken_off(data: HubDataset, error: Exception) -> Exception:
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return OSError(
            errno.ENOSPC, f"the disk is full: no room for {data.name}. Set HF_HOME to a folder that has room"
        )
    return ConnectionError(
        f"the download of {_page(data)} broke off ({_said(error)}). What came is kept: run it again."
    )


def _said(error: Exception) -> str:
    lines = str(error).splitlines() or ["no answer"]
    return f"{type(error).__name__}: {lines[0]}"


def _parts(names: Iterable[str]) -> dict[str, list[str]]:
    """Files by configuration: by the folders around them, without those that only say the split."""
    parts = {}
    for name in sorted(names):
        folders = [folder for folder in name.split("/")[:-1] if split_of(folder) is None]
        parts.setdefault("/".join(folders), []).append(name)
    return parts


def _choose(parts: dict[str, list[str]], data: HubDataset) -> str | None:
    """The part that is meant: that of the config (fineweb-edu's sample-10BT lies in sample/10BT), or the only one."""
    meant = [part for part in parts if data.config and data.config in (part, part.replace("/", "-"))]
    if meant:
        return meant[0]
    return next(iter(parts)) if len(parts) == 1 and not data.asked else None


def _which(data: HubDataset, parts: dict[str, list[str]], where: str) -> str:
    names = sorted(part or "(no folder)" for part in parts)
    more = f" and {len(names) - 20} more" if len(names) > 20 else ""
    wanted = f"no part {data.config!r}" if data.config else "several parts"
    return f"{where} has {wanted}. It has: {', '.join(names[:20])}{more}. Name one: --dataset {data.name}:{names[0]}."


def _splits(folder: Path, names: Iterable[str], where: str) -> Splits:
    by_split = {"train": [], "validation": [], "test": []}
    for name in sorted(names):
        by_split[split_of(name) or "train"].append(folder / name)
    if not by_split["train"]:
        there = ", ".join(sorted(names)[:5])
        raise FileNotFoundError(
            f"{where} has no file of a train split, only {there}: add train-*.parquet (or train.txt)."
        )
    return Splits(tuple(by_split["train"]), tuple(by_split["validation"]))


def _page(data: HubDataset) -> str:
    return f"https://huggingface.co/datasets/{data.hub_id}"
