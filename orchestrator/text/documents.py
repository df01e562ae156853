"""Where training text comes from: a name, a file, a folder or a glob becomes a `Source`, read document by document."""

import difflib
import glob
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from GPT2Model.tokenizer import END_OF_TEXT
from orchestrator.text import hub, tales
from orchestrator.text.reading import FILES, has_text, read_documents

HOUSE = ("tales", "python-docs")
NAMES = (*HOUSE, *hub.DATASETS)
TALES = 10_000  # stories in the text of "tales"
TALES_SEED = 2**64  # far from every seed that batches and held-out stories are told from while a model trains on tales


@dataclass(frozen=True)
class Source:
    """Text to train on, found but not yet read. It can be pickled, so that processes can share the work by files.

    A loop over everything, also over a text that no file holds:
        for part in source.parts:              # or source.validation_parts
            for document in source.documents(part):
                ...

    Attributes:
        name: for messages and reports.
        files: text, JSONL or parquet files to train on, in order.
        validation_files: those of a validation split of its own, where the data set has one; else ().
        text: the whole text where no file holds it (tales, python-docs; then `files` is ()), with
            "<|endoftext|>" between documents; else None.
        field: of JSONL lines, the column of parquet files.
        articles: rows or lines are lines of Wikipedia articles, as in WikiText, and are joined into articles.
    """

    name: str
    files: tuple[Path, ...] = ()
    validation_files: tuple[Path, ...] = ()
    text: str | None = None
    field: str = "text"
    articles: bool = False

    @property
    def parts(self) -> tuple[Path | None, ...]:
        """What can be read side by side: the training files, or (None,) for a text that no file holds."""
        return (None,) if self.text is not None else self.files

    @property
    def validation_parts(self) -> tuple[Path, ...]:
        """The same for the validation split; () where a part of the training text has to be held out."""
        return self.validation_files

    @property
    def fingerprint(self) -> str:
        """16 hex digits that change when a file changes (its path, size or time), for caches of what was made of it."""
        facts = [self.field, self.articles, self.text]
        for files in (self.files, self.validation_files):
            times = [(file.absolute().as_posix(), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
            facts.append(times)
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]

    def documents(self, part: Path | None = None) -> Iterator[str]:
        """One document after another, of one of `parts` or `validation_parts`. Empty documents are left out.

        Raises:
            ValueError: a file that holds no readable text (see `read_documents`).
        """
        if part is not None:
            return read_documents(part, self.field, self.articles)
        if self.text is None:
            raise ValueError(f"{self.name} is read file by file: pass one of its parts to documents().")
        return filter(str.strip, self.text.split(END_OF_TEXT))


def find_source(dataset: str | Path, data_dir: str | Path = "data") -> Source:
    """A source by name, file, folder or glob.

    Args:
        dataset: "tales" or "python-docs", which are always here; a Hugging Face data set by its name in `hub.DATASETS`
            or as owner/name, either with ":config" behind; a file (text, JSONL, parquet; the first two also .gz); a
            folder, of which all such files are taken, hidden ones left out; or a glob such as "corpus/**/*.txt".
        data_dir: where copies of Hugging Face data sets lie: data_dir/wikitext/. They go before the hub.

    Returns:
        The source. It has validation files of its own where the data set, or every file of a folder, is named by
        splits (train-*, validation-*, test-*); a test split is never trained on.

    Raises:
        FileNotFoundError: no such name, file or folder, or nothing usable in it.
        ValueError: no text in it, or none that can be read.
        ImportError: a package that reads it is not installed.
        ConnectionError: a Hugging Face data set that is not here, and no network to fetch it by.
    """
    name = str(dataset)
    path, data = Path(name).expanduser(), hub.hub_dataset(name)
    if name == "tales":
        return Source(name, text=END_OF_TEXT.join(tales.stories(TALES, seed=TALES_SEED)))
    if name == "python-docs":
        from orchestrator.text.corpora import python_docs  # imports torch, which readers of files can do without

        return Source(name, text=python_docs())
    if data and data.name in hub.DATASETS:
        return _with_text(_hub_source(name, data, Path(data_dir)))
    if name and path.is_file():
        return _with_text(Source(name, (path,)))
    if name and path.is_dir():
        return _with_text(_folder(name, path))
    if glob.has_magic(name):
        found = tuple(Path(file) for file in sorted(glob.glob(str(path), recursive=True)) if Path(file).is_file())
        if not found:
            raise FileNotFoundError(f"{name}: no file matches this pattern (in {Path.cwd()}).")
        return _with_text(Source(name, found))
    looks_like_a_file = name.lower().endswith(FILES) or Path(path.parts[0] if path.parts else "/").exists()
    if data and not looks_like_a_file:
        return _with_text(_hub_source(name, data, Path(data_dir)))
    near = difflib.get_close_matches(name.lower().split(":")[0], NAMES, n=1)
    raise FileNotFoundError(
        f"{name!r}: no such file, folder or data set.{f' Did you mean {near[0]!r}?' if near else ''} Data sets: "
        f"{', '.join(NAMES)}, or owner/name of the Hugging Face hub; or the path of a text, JSONL or parquet file."
    )


def _hub_source(name: str, data: hub.HubDataset, data_dir: Path) -> Source:
    folder = data_dir / data.name
    splits = hub.local_copy(data, folder) or hub.download(data, folder)
    return Source(name, splits.train, splits.validation, field=data.field, articles=data.articles)


def _folder(name: str, folder: Path) -> Source:
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    names = [n for n in names if n.lower().endswith(FILES) and not any(part.startswith(".") for part in n.split("/"))]
    if not names:
        raise FileNotFoundError(f"{folder} holds no text, JSONL or parquet files ({', '.join(FILES)}).")
    by_split = {
        split: tuple(folder / n for n in names if hub.split_of(n) == split) for split in set(hub.SPLITS.values())
    }
    if by_split["train"] and sum(map(len, by_split.values())) == len(names):
        return Source(name, by_split["train"], by_split["validation"])
    return Source(name, tuple(folder / n for n in names))


def _with_text(source: Source) -> Source:
    """The source itself, if there is anything in it to learn from: better said now than after an hour of preparing."""
    if any(has_text(file, source.field) for file in source.files):
        return source
    raise ValueError(f"{source.name} is empty: there is no text in it to learn from.")
