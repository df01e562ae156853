"""What a run leaves for those who come after it: OUT/final, with the weights and the tokenizer, and how to open it."""

import json
from pathlib import Path

from GPT2Model.files import replace_text
from GPT2Model.gpt2 import GPTModel
from orchestrator.text.tokenizers import Tokenizer, tokenizer_facts, tokenizer_from
from orchestrator.training.checkpoint_folder import find

TOKENIZER_FILE = "tokenizer_facts.json"
STATE_FILE = "state.json"  # of a checkpoint


def save_final(model: GPTModel, tokenizer: Tokenizer, folder: Path) -> None:
    """Write what `save_pretrained` writes, with the files of GPT-2's tokenizer, and what makes any tokenizer again."""
    model.save_pretrained(folder, tokenizer if tokenizer.name == "gpt2" else None)
    replace_text(folder / TOKENIZER_FILE, json.dumps(tokenizer_facts(tokenizer), ensure_ascii=False, indent=1) + "\n")


def open_trained(folder: str | Path) -> tuple[GPTModel, Tokenizer]:
    """The model that a run left, and its tokenizer.

    Args:
        folder: of a run (OUT: its final model, or else its newest checkpoint), OUT/final, or a checkpoint.
    Returns:
        the model, on the CPU, in eval mode, and the tokenizer.
    Raises:
        FileNotFoundError: no trained model there. ValueError: a damaged file.
    """
    folder = Path(folder).expanduser()
    for place in (folder, folder / "final", find(folder / "checkpoints")):
        if place is not None and (tokenizer := tokenizer_in(place)) is not None:
            return GPTModel.from_pretrained(place), tokenizer
    raise FileNotFoundError(
        f"{folder} has no {TOKENIZER_FILE}: pass the folder of a run that came to its end, or RUN/checkpoints/step-N."
    )


def tokenizer_in(place: Path) -> Tokenizer | None:
    """The tokenizer of a trained model or a checkpoint; None: this project did not write that folder."""
    for name in (TOKENIZER_FILE, STATE_FILE):
        if (place / name).is_file():
            return tokenizer_from(tokenizer_of(place / name))
    return None


def tokenizer_of(file: Path) -> dict:
    try:
        facts = json.loads(file.read_text(encoding="utf-8"))
        return facts["facts"]["tokenizer"] if file.name == STATE_FILE else facts
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is damaged ({error!r}): copy it anew, or open another checkpoint.") from error
