"""The trained model of the notebooks: good, the same every time, and never broken by what lies in its folder."""

import json
import logging
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from orchestrator.learning import trained
from orchestrator.learning.trained import tales_model
from orchestrator.text import tales
from orchestrator.text.corpora import TalesCorpus
from orchestrator.training.first_model import attention_weights, copying_scores, write_stories

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def real():
    """The model that the notebooks get: trained if this machine has none yet."""
    return tales_model(progress=False)


@pytest.fixture
def short(monkeypatch):
    """A recipe of three steps, where the quality does not matter."""
    monkeypatch.setattr(trained, "RECIPE", replace(trained.RECIPE, max_steps=3, batch_size=2, warmup_steps=1))
    monkeypatch.setattr(trained, "HELD_OUT", 1)


def weights(model) -> list[torch.Tensor]:
    return list(model.state_dict().values())


def same(a, b) -> bool:
    return all(torch.equal(one, other) for one, other in zip(weights(a), weights(b), strict=True))


def folders(place: Path) -> list[Path]:
    return sorted(path for path in place.iterdir() if path.is_dir())


def test_its_loss_is_within_three_hundredths_of_the_floor_on_stories_it_never_saw(real):
    """The loss by hand in float64, on stories of another seed, against their own exact log-probability."""
    model, tokenizer = real
    stories = tales.stories(60, seed=987_654)
    nats, tokens = 0.0, 0
    for story in stories:
        ids = torch.tensor([tokenizer.end_of_text, *tokenizer.encode(story), tokenizer.end_of_text])
        with torch.no_grad():
            logits = model(ids[None, :-1])[0].double()
        chances = logits.exp() / logits.exp().sum(-1, keepdim=True)
        nats -= chances[torch.arange(len(ids) - 1), ids[1:]].log().sum().item()
        tokens += len(ids) - 1
    floor = -sum(map(tales.log_probability, stories)) / tokens
    assert -0.005 < nats / tokens - floor < 0.03
    assert not model.training


def test_it_copies_and_writes_by_the_grammar(real):
    model, tokenizer = real
    corpus = TalesCorpus(seed=5, held_out=50)
    ids = torch.tensor([tokenizer.end_of_text, *tokenizer.encode(corpus.held_out[0])])
    assert copying_scores(attention_weights(model, ids[None]), ids).max() > 0.3
    written = write_stories(model, corpus, 20, seed=3)
    assert sum(tales.check(story) is None for story in written) >= 15


def test_made_or_opened_the_weights_and_the_random_numbers_after_it_are_the_same(short, tmp_path, caplog):
    torch.manual_seed(7)
    made, tokenizer = tales_model(progress=False, folder=tmp_path)
    after_making = torch.rand(3)
    torch.manual_seed(7)
    opened, _ = tales_model(progress=False, folder=tmp_path)
    after_opening = torch.rand(3)
    torch.manual_seed(7)
    untouched = torch.rand(3)
    assert same(made, opened)
    assert torch.equal(after_making, after_opening)
    assert torch.equal(after_making, untouched)
    assert opened.cfg == made.cfg
    assert not made.training
    assert not opened.training
    assert tokenizer.vocab_size == made.cfg["vocab_size"]
    (folder,) = folders(tmp_path)
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors", "recipe.json"]


@pytest.mark.parametrize("without_gradients", [torch.no_grad, torch.inference_mode])
def test_it_is_trained_also_where_gradients_are_off(without_gradients, short, tmp_path):
    """A notebook that only looks says torch.set_grad_enabled(False) first: on a new machine it trains all the same."""
    expected, _ = tales_model(progress=False, folder=tmp_path / "one")
    with without_gradients():
        model, _ = tales_model(progress=False, folder=tmp_path / "two")
        assert not torch.is_grad_enabled()
    assert same(model, expected)
    assert all(weight.requires_grad and not weight.is_inference() for weight in model.parameters())


def test_the_second_time_it_is_opened_not_trained(short, tmp_path, monkeypatch):
    first, _ = tales_model(progress=False, folder=tmp_path)
    monkeypatch.setattr(trained, "train", lambda *args, **kwargs: pytest.fail("trained again"))
    assert same(first, tales_model(progress=False, folder=tmp_path)[0])


def test_two_seeds_are_two_models_and_one_seed_is_one(short, tmp_path):
    zero, one = (tales_model(seed=seed, progress=False, folder=tmp_path / "a")[0] for seed in (0, 1))
    again, _ = tales_model(seed=1, progress=False, folder=tmp_path / "b")
    assert not same(zero, one)
    assert same(one, again)
    assert len(folders(tmp_path / "a")) == 2


def test_another_recipe_or_another_grammar_is_another_folder(short, tmp_path, monkeypatch):
    tales_model(progress=False, folder=tmp_path)
    monkeypatch.setattr(trained, "RECIPE", replace(trained.RECIPE, learning_rate=1e-3))
    tales_model(progress=False, folder=tmp_path)
    assert len(folders(tmp_path)) == 2
    before = trained.hash_of(trained.recipe_of(0))
    monkeypatch.setattr(tales, "FOODS", tuple(reversed(tales.FOODS)))  # the same words, other stories
    assert trained.hash_of(trained.recipe_of(0)) != before


def cut_short(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])


def other_weights(folder):
    from GPT2Model.gpt2 import GPTModel

    model = GPTModel.from_pretrained(folder)
    with torch.no_grad():
        model.final_norm.bias += 1
    model.save_pretrained(folder)


def a_file_instead(folder):
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()
    folder.write_text("not a folder")


@pytest.mark.parametrize(
    "harm",
    [
        cut_short,
        other_weights,
        a_file_instead,
        lambda folder: (folder / "config.json").unlink(),
        lambda folder: (folder / "recipe.json").unlink(),
        lambda folder: (folder / "recipe.json").write_text("{"),
        lambda folder: (folder / "recipe.json").write_text("[1]"),
        lambda folder: (folder / "recipe.json").write_bytes(b"\xff\xfe"),
    ],
    ids=["weights cut short", "other weights", "a file", "no config", "no recipe", "half a recipe", "a list", "bytes"],
)
def test_a_broken_folder_is_made_again(harm, short, tmp_path):
    first, _ = tales_model(progress=False, folder=tmp_path)
    (folder,) = folders(tmp_path)
    harm(folder)
    assert same(first, tales_model(progress=False, folder=tmp_path)[0])
    note = json.loads((folder / "recipe.json").read_text())
    assert note["sha256"] == trained.checksum(folder)
    assert folders(tmp_path) == [folder]  # nothing is left beside it


def test_where_nothing_can_be_written_it_is_trained_in_memory_and_said(short, tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")
    with caplog.at_level(logging.WARNING, logger="orchestrator"):
        model, _ = tales_model(progress=False, folder=tmp_path / "file" / "runs")
    assert "cannot be written" in caplog.text
    assert same(model, tales_model(progress=False, folder=tmp_path / "good")[0])


def test_a_disk_that_is_full_at_the_end_costs_no_second_training(short, tmp_path, monkeypatch, caplog):
    from GPT2Model.gpt2 import GPTModel

    def full(self, folder):
        raise OSError("No space left on device")

    trainings = []
    really = trained.train
    monkeypatch.setattr(trained, "train", lambda *args, **kwargs: trainings.append(1) or really(*args, **kwargs))
    monkeypatch.setattr(GPTModel, "save_pretrained", full)
    with caplog.at_level(logging.WARNING, logger="orchestrator"):
        tales_model(progress=False, folder=tmp_path)
    assert "No space left on device" in caplog.text
    assert trainings == [1]
    assert folders(tmp_path) == []


def test_two_processes_at_once_get_the_same_model_and_train_it_once(tmp_path):
    code = (
        "import sys; from dataclasses import replace\n"
        "from orchestrator.learning import trained\n"
        "trained.RECIPE = replace(trained.RECIPE, max_steps=30, batch_size=4)\n"
        "trained.HELD_OUT, really = 1, trained.train\n"
        "trained.train = lambda *a, **k: (print('training'), really(*a, **k))[1]\n"
        "model, _ = trained.tales_model(progress=False, folder=sys.argv[1])\n"
        "print(sum(p.double().sum().item() for p in model.parameters()))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    both = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=environment, cwd=tmp_path,
        )
        for _ in range(2)
    ]  # fmt: skip
    out = [process.communicate(timeout=300) for process in both]
    assert [process.returncode for process in both] == [0, 0], out
    assert len({text.split()[-1] for text, _ in out}) == 1
    assert "".join(text for text, _ in out).count("training") == 1
    assert len(folders(tmp_path)) == 1


def test_the_number_of_threads_does_not_change_the_numbers_and_is_put_back(short, tmp_path):
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        two, _ = tales_model(progress=False, folder=tmp_path / "two")
        assert torch.get_num_threads() == 2
        torch.set_num_threads(1)
        one, _ = tales_model(progress=False, folder=tmp_path / "one")
    finally:
        torch.set_num_threads(threads)
    assert same(one, two)
