"""Models by name: from the Hugging Face hub, or from its cache on this machine; without both, what to do instead.

Only files are fetched, never code: weights as safetensors, or, where a model has none, as torch files that are read
with weights_only=True.
"""

import errno
import re
from pathlib import Path

from GPT2Model.config import PRESETS

HUB_IDS = {name: f"openai-community/{name}" for name in PRESETS if name.startswith("gpt2")}
HUB_IDS["distilgpt2"] = "distilbert/distilgpt2"
# In this order; the first that a folder has is opened.
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
TOKENIZER = (
    "vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json",
)  # fmt: skip
SAFETENSORS = ("config.json", *TOKENIZER, *WEIGHTS[:2], "model-*-of-*.safetensors")
TORCH_FILES = ("config.json", *WEIGHTS[2:], "pytorch_model-*-of-*.bin")


def hub_names() -> list[str]:
    """The short names of published models."""
    return list(HUB_IDS)


def hub_id(name: str) -> str | None:
    """OWNER/NAME on the hub; None: no such name is published."""
    if name in HUB_IDS:
        return HUB_IDS[name]
    return name if re.fullmatch(r"[\w.-]+/[\w.-]+", name) else None


def weights_of(folder: Path) -> Path | None:
    """The file of a folder from which its weights are opened; of split ones, the index."""
    return next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)


def download(name: str) -> Path:
    """A model's folder from the hub, or from the hub's cache on this machine.

    Raises:
        FileNotFoundError: not a name there, no network, or huggingface_hub is not installed; with what to do.
        OSError: the disk is full.
    """
    repository = hub_id(name)
    if repository is None:
        raise FileNotFoundError(f"{name!r} is a preset without published weights. Names: {', '.join(hub_names())}.")
    try:
        import huggingface_hub as hub
    except ImportError as error:
        raise FileNotFoundError(
            f"fetching {name!r} needs: pip install -r requirements-hub.txt (huggingface_hub). Or {by_hand(repository)}"
        ) from error
    found = None
    for patterns in (SAFETENSORS, TORCH_FILES):
        try:
            found = Path(hub.snapshot_download(repository, allow_patterns=list(patterns)))
        except Exception as error:  # whatever the network stack raises: the classes differ from version to version
            if found is None or patterns is SAFETENSORS:
                raise explained(hub, repository, error) from error
        if found is not None and weights_of(found) is not None:
            return found
    there = ", ".join(sorted(path.name for path in found.iterdir())) or "nothing"
    raise FileNotFoundError(
        f"{repository} has no weights that can be opened here, or was not fetched to its end ({found} has {there}). "
        f"Where it is only half fetched, connect this machine to the internet and call again, or {by_hand(repository)}"
    )


def explained(hub, repository: str, error: Exception) -> OSError:
    """What went wrong on the way to the hub, and what to do, as one error for the user."""
    page = f"https://huggingface.co/{repository}"
    if isinstance(error, hub.errors.GatedRepoError):
        return FileNotFoundError(
            f"{page} asks who you are: accept its terms there, log in with `hf auth login`, and call again."
        )
    if isinstance(error, hub.errors.RepositoryNotFoundError):
        return FileNotFoundError(
            f"the Hugging Face hub has no public model {repository!r}. Look at its spelling on {page}; for a private "
            "one log in with `hf auth login`."
        )
    if isinstance(error, hub.errors.HFValidationError):
        return FileNotFoundError(f"{repository!r} is no folder here, and cannot be a name on the hub: {error}")
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return OSError(
            errno.ENOSPC, f"the disk is full: no room for {repository}. Set HF_HOME to a folder that has room"
        )
    reason = f"{type(error).__name__}: {(str(error).splitlines() or ['no answer'])[0]}"
    return FileNotFoundError(
        f"{repository} is not (whole) in the Hugging Face cache, and the hub cannot be reached ({reason}). Connect "
        f"this machine to the internet (and unset HF_HUB_OFFLINE); or, without a network, pass a local folder: "
        f"{by_hand(repository)}"
    )


def by_hand(repository: str) -> str:
    """How to come by a model without a network: which files, into which folder, and what to call then."""
    folder = Path.cwd() / repository.partition("/")[2]
    return (
        f"on another machine download from https://huggingface.co/{repository}/tree/main the files\n"
        "  config.json, model.safetensors (where it is split: model.safetensors.index.json and every "
        "model-*-of-*.safetensors; where there is none: pytorch_model.bin), and for its words vocab.json, merges.txt\n"
        f"put them into the folder\n  {folder}\nand call\n  GPTModel.from_pretrained({str(folder)!r})"
    )
