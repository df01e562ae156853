"""A small model that has learned the tales: trained once on this machine, then opened from `runs/`.

The notebooks look inside a model that can do something, and nothing is downloaded. So the model is made here, by a
shorter recipe than the main job's, and kept under a name with a hash of the recipe: another recipe, another folder.
"""

import hashlib
import json
import logging
import os
import shutil
import tempfile
from dataclasses import asdict, replace
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from GPT2Model.config import from_preset
from GPT2Model.gpt2 import GPTModel
from orchestrator.text.corpora import TalesCorpus
from orchestrator.text.tales import TalesTokenizer
from orchestrator.training.loop import TrainSettings, train

RUNS = Path(__file__).parents[2] / "runs"
# Half the main job's batch, and fewer steps: all of the copying in half of the time.
RECIPE = TrainSettings(
    max_steps=700,
    batch_size=16,
    learning_rate=6e-3,
    warmup_steps=40,
    min_lr_ratio=0.01,
    weight_decay=0.0,
    eval_steps=100,
)
HELD_OUT = 50  # stories behind the loss that the bar shows; they decide nothing
SECONDS = 600  # how long one process waits for another that trains the same model

NOT_KEPT = "%s cannot be written (%s): the model is trained for this time only. Pass a folder that can be written."

logger = logging.getLogger("orchestrator")


def tales_model(
    *, seed: int = 0, progress: bool = True, folder: str | os.PathLike | None = None
) -> tuple[GPTModel, TalesTokenizer]:
    """The `nano` model, trained on `tales` until it copies: some 0.002 nats per token above the floor.

    Why: a trained model is what there is to look into, and training one in every notebook would take their time. The
    first call trains, under a minute on two cores; later ones open what it kept. The numbers are the same either way,
    and the random numbers that are drawn afterwards too.

    Args:
        seed: of weights and batches; each seed is a model of its own.
        progress: show a bar while it trains.
        folder: where models are kept; None: the repository's `runs/`.
    Returns:
        the model, on the CPU, in eval mode, and its tokenizer.
    """
    recipe = recipe_of(seed)
    place = Path(folder if folder is not None else RUNS) / f"tales-model-{hash_of(recipe)}"
    # Whether it was trained or opened must not show in the next draw; and who only looks has turned gradients off.
    with torch.random.fork_rng(devices=[]), torch.inference_mode(False), torch.enable_grad():
        model = kept(place, recipe)
        if model is None:
            try:
                place.parent.mkdir(parents=True, exist_ok=True)
                model = with_lock(place, recipe, seed, progress)
            except OSError as error:
                logger.warning(NOT_KEPT, place, error)
                model = trained(seed, progress)
    return model.eval(), TalesTokenizer()


def with_lock(place: Path, recipe: dict, seed: int, progress: bool) -> GPTModel:
    """Train and keep, one process at a time: another that wants the same model waits and opens it."""
    lock = FileLock(place.with_name(f".{place.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        logger.warning("another process is making %s: waiting for it.", place.name)
        try:
            lock.acquire(timeout=SECONDS)
        except Timeout as error:
            raise OSError(f"another process has held {lock.lock_file} for {SECONDS} s") from error
    try:
        model = kept(place, recipe)  # made while this process waited?
        if model is None:
            model = trained(seed, progress)
            try:
                keep(model, place, recipe)
            except OSError as error:
                logger.warning(NOT_KEPT, place, error)
        return model
    finally:
        lock.release()


def trained(seed: int, progress: bool) -> GPTModel:
    """Train the model, on one thread: then the bits do not depend on how many cores there are."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        corpus = TalesCorpus(seed, HELD_OUT)
        torch.manual_seed(seed)
        model = GPTModel(cfg_of(corpus.tokenizer))
        train(model, corpus, replace(RECIPE, seed=seed), progress=progress)
    finally:
        torch.set_num_threads(threads)
    return model


def kept(place: Path, recipe: dict) -> GPTModel | None:
    """The model in this folder, if it is whole and was made by this recipe; else None."""
    try:
        note = json.loads((place / "recipe.json").read_text(encoding="utf-8"))
        whole = note == {"recipe": recipe, "sha256": checksum(place)}
        return GPTModel.from_pretrained(place) if whole else None
    except (OSError, ValueError):  # not there, cut short, or something else under that name: it is made anew
        return None


def keep(model: GPTModel, place: Path, recipe: dict) -> None:
    """Write the model beside its place and rename it there: a reader finds all of it or nothing."""
    beside = Path(tempfile.mkdtemp(prefix=f".{place.name}.", dir=place.parent))
    try:
        model.save_pretrained(beside / "new")
        note = {"recipe": recipe, "sha256": checksum(beside / "new")}
        (beside / "new" / "recipe.json").write_text(json.dumps(note, indent=2) + "\n", encoding="utf-8")
        if place.exists() or place.is_symlink():  # broken, or of another recipe: a folder cannot be renamed onto it
            os.replace(place, beside / "old")
        os.replace(beside / "new", place)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def recipe_of(seed: int) -> dict:
    """Everything that decides the numbers, as plain data; the corpus by its words and the first story it holds out."""
    corpus = TalesCorpus(seed, held_out=1)
    recipe = {
        "corpus": {"words": corpus.tokenizer.decode(range(corpus.tokenizer.vocab_size)), "story": corpus.held_out[0]},
        "cfg": cfg_of(corpus.tokenizer),
        "settings": asdict(replace(RECIPE, seed=seed)),
    }
    return json.loads(json.dumps(recipe))  # as it reads when it comes back from a file: tuples become lists


def cfg_of(tokenizer: TalesTokenizer) -> dict:
    return from_preset("nano", vocab_size=tokenizer.vocab_size, drop_rate=0.0)


def hash_of(recipe: dict) -> str:
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:8]


def checksum(place: Path) -> str:
    """SHA-256 over the two files of a saved model."""
    parts = (place / "config.json", place / "model.safetensors")
    return hashlib.sha256(b"".join(part.read_bytes() for part in parts)).hexdigest()
