"""Models with RMSNorm, SwiGLU, rope and shared heads are trained, kept and opened as a GPT-2 is."""

import json
import re
import tomllib
from pathlib import Path

import pytest
import torch

from GPT2Model.generation import generate
from GPT2Model.gpt2 import GPTModel
from orchestrator.commands.train import main
from orchestrator.evaluation.estimates import count_parameters
from orchestrator.training import mfu
from orchestrator.training.checkpoint import Checkpoints, find, restore
from orchestrator.training.final import open_trained
from orchestrator.training.loop import batch_loss, train
from orchestrator.training.loss import chunked_next_token_loss, next_token_loss, without_head
from orchestrator.training.memory_savers import checkpoint_activations
from orchestrator.training.optimizer import decay_groups, make_optimizer
from orchestrator.training.options import SETTINGS_FILE
from tests.orchestrator.training import small_runs
from tests.orchestrator.training.small import UnequalRows, recipe, same, small_model

ALL = {"norm": "rmsnorm", "mlp": "swiglu", "positions": "rope", "n_kv_heads": 1}
CHANGES = {**{name: {name: value} for name, value in ALL.items()}, "exact gelu": {"mlp": "gelu_exact"}, "all": ALL}
SENTENCES = "It was a dark and stormy night; the rain fell in torrents, except at occasional intervals. " * 60
SMALL = {"n_layers": 1, "n_heads": 2, "emb_dim": 16, "max_length": 16, "device": "cpu", "dtype": "fp32",
         "batch_size": 4, "max_steps": 6, "eval_steps": 3, "save_steps": 2, "dataset": "night.txt", "tokenizer": "char",
         "out": "run"}  # fmt: skip


def words(**options) -> list[str]:
    """Options as a command line."""
    given = {name: value for name, value in (SMALL | options).items() if value is not None}
    return [word for name, value in given.items()
            for word in ([f"--{name}"] if value is True else [f"--{name}", str(value)])]  # fmt: skip


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "night.txt").write_text(SENTENCES)
    return tmp_path


def events(run: Path, kind: str) -> list[dict]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [event for event in lines if event["event"] == kind]


# --- from the command line ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES)
def test_a_variant_is_trained_on_a_text_from_the_command_line(here, capsys, changes):
    assert main(words(**changes, sample_steps=3, prompt="the rain", eval_tokens=10**6)) == 0
    printed = capsys.readouterr().out
    named = ", ".join(f"n_kv_heads {value}" if name == "n_kv_heads" else value for name, value in changes.items())
    assert f"model: nano with {named}, " in printed
    assert printed.count("[the rain]") == 2
    settings = tomllib.loads((here / "run" / SETTINGS_FILE).read_text())
    assert changes.items() <= settings.items()

    model, tokenizer = open_trained(here / "run")
    assert changes.items() <= model.cfg.items()
    assert f"{model.num_parameters():,} parameters" in printed
    assert model.num_parameters() == count_parameters(model.cfg)
    losses = [event["loss"] for event in events(here / "run", "evaluation")]
    assert losses[-1] < losses[0]
    ids, total = held_out_ids(here, tokenizer), 0.0
    for start in range(0, len(ids) - 1, 16):
        window = torch.tensor([ids[start : start + 17]])
        with torch.no_grad():
            scores = model(window[:, :-1]).double().log_softmax(-1)
        total -= scores[0].gather(1, window[0, 1:, None]).sum().item()
    assert losses[-1] == pytest.approx(total / (len(ids) - 1), rel=1e-5)
    speed = [event for event in events(here / "run", "step") if event.get("mfu")][-1]
    peak = mfu.peak_flops("cpu", "fp32")
    assert speed["mfu"] == pytest.approx(mfu.mfu(model.cfg, 16, speed["tokens_per_second"], peak), rel=0.01)


def held_out_ids(here, tokenizer) -> list[int]:
    (manifest,) = here.glob("data/prepared/*/manifest.json")
    count = json.loads(manifest.read_text())["totals"]["validation_tokens"]
    return [tokenizer.end_of_text, *tokenizer.encode(SENTENCES[-(count - 1) :])]


def test_every_memory_saver_and_muon_serve_a_variant_and_the_losses_are_the_same(here):
    """What saves memory changes no loss by more than rounding."""
    assert main(words(**ALL, optimizer="muon", out="plain")) == 0
    assert main(words(**ALL, optimizer="muon", out="saving", activation_checkpointing=True, loss_chunk_tokens=24)) == 0
    plain, saving = ([e["loss"] for e in events(here / out, "evaluation")] for out in ("plain", "saving"))
    assert saving == pytest.approx(plain, rel=1e-4)


def test_a_variant_is_gone_on_with_from_its_final_folder_and_from_its_checkpoint(here, capsys):
    assert main(words(**ALL, max_steps=4)) == 0
    last = events(here / "run", "evaluation")[-1]["loss"]
    again = dict.fromkeys(("n_layers", "n_heads", "emb_dim"))
    assert main(words(**again, model="run", out="more", eval_on_start=True, max_steps=1)) == 0
    assert events(here / "more", "evaluation")[0]["loss"] == pytest.approx(last, rel=1e-6)
    assert "run/final with rmsnorm, swiglu, rope, n_kv_heads 1, " in capsys.readouterr().out
    assert main(["--resume", "run", "--max_steps", "6"]) == 0
    assert not re.search(r"- (norm|mlp|positions|n_kv_heads):", capsys.readouterr().err)
    for folder in ("run", "run/checkpoints/step-6"):
        model, _ = open_trained(here / folder)
        assert ALL.items() <= model.cfg.items()
    other = "--norm", "layernorm"
    assert main(["--resume", "run", "--max_steps", "7", *other]) == 2
    assert "cfg: norm: 'rmsnorm' was saved, 'layernorm' is asked for" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"norm": "batchnorm"}, r"'norm' must be 'layernorm' or 'rmsnorm', got 'batchnorm'"),
        ({"mlp": "swigl"}, r"Did you mean 'swiglu'"),
        ({"positions": "alibi"}, r"'positions' must be 'learned' or 'rope'"),
        ({"n_kv_heads": 3, "n_heads": 2}, r"'n_kv_heads' must divide 'n_heads'"),
        ({"positions": "rope", "n_heads": 16}, r"emb_dim / n_heads must be even, got 1"),
        ({"norm": "batchnorm", "mlp": "relu", "positions": "alibi"}, r"(?s)'norm'.*'mlp'.*'positions'"),
    ],
    ids=str,
)
def test_a_variant_that_does_not_exist_is_answered_with_what_there_is(here, capsys, options, said):
    assert main(words(**options)) == 2
    err = capsys.readouterr().err
    assert re.search(said, err)
    assert "Traceback" not in err
    assert not (here / "run").exists()


def test_the_variants_of_a_folder_are_its_own(here, capsys):
    GPTModel({**small_runs.CFG, **ALL}).save_pretrained(here / "model")
    asked = words(model="model", tokenizer="bytes", norm="rmsnorm", n_kv_heads=1, n_layers=None, n_heads=None,
                  emb_dim=None)  # fmt: skip
    assert main(asked) == 2
    assert "model is a folder with weights: n_kv_heads, norm are theirs, leave them out" in capsys.readouterr().err


# --- which weights decay, and who sees to them ----------------------------------------------------------------------


def names_in(model, parameters) -> set[str]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(parameter)] for parameter in parameters}


def test_the_weights_of_rmsnorm_do_not_decay_and_muon_takes_the_three_matrices_of_swiglu():
    model = small_model(**ALL, tie_weights=False)
    matrices = {f"blocks.{i}.{name}.weight" for i in range(2) for name in (
        "attention.W_qkv", "attention.out_proj", "feed_forward.gate_proj", "feed_forward.up_proj",
        "feed_forward.down_proj")}  # fmt: skip
    biases = {f"blocks.{i}.attention.{name}.bias" for i in range(2) for name in ("W_qkv", "out_proj")}
    norms = {"final_norm.weight", *(f"blocks.{i}.norm_{n}.weight" for i in range(2) for n in (1, 2))}
    tables = {"token_embedding.weight", "head.weight"}
    assert {name for name, _ in model.named_parameters()} == matrices | biases | norms | tables
    decayed, kept = decay_groups(model, 0.1)
    assert names_in(model, decayed["params"]) == matrices | tables
    assert names_in(model, kept["params"]) == norms | biases
    muon, adamw = make_optimizer(model, 0.01, 0.1, (0.9, 0.95), "muon").parts
    assert names_in(model, [p for group in muon.param_groups for p in group["params"]]) == matrices
    assert [names_in(model, group["params"]) for group in adamw.param_groups] == [tables, norms | biases]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES)
def test_every_variant_learns(changes, optimizer):
    settings = recipe(optimizer=optimizer, max_steps=60, learning_rate=1e-2, eval_on_start=True)
    (_, first), (_, last) = train(small_model(**changes), UnequalRows(), settings, progress=False).validation
    assert first > 3
    assert last < 1


# --- memory savers --------------------------------------------------------------------------------------------------


def step(model, rows) -> tuple[torch.Tensor, list[torch.Tensor]]:
    torch.manual_seed(5)
    loss = batch_loss(model.train(), rows)
    loss.backward()
    return loss.detach(), [parameter.grad for parameter in model.parameters()]


@pytest.mark.parametrize("implementation", ["eager", "sdpa", "flash_tiled"])
@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES)
def test_checkpointing_changes_no_bit_of_a_gradient(changes, implementation):
    rows = UnequalRows().batch(0, 4)
    plain, saved = (small_model(drop_rate=0.3, attn_implementation=implementation, **changes) for _ in range(2))
    checkpoint_activations(saved)
    (loss, wanted), (loss_again, found) = step(plain.double(), rows), step(saved.double(), rows)
    assert torch.equal(loss, loss_again)
    assert same(found, wanted)
    assert all(gradient.abs().max() > 0 for gradient in found)


def test_the_loss_in_chunks_is_the_loss():
    model, rows = small_model(**ALL).double(), UnequalRows().batch(0, 4)
    whole = next_token_loss(model(rows.inputs), rows.targets)
    wanted = torch.autograd.grad(whole, list(model.parameters()))
    with without_head(model) as head:
        chunked = chunked_next_token_loss(model(rows.inputs), head, rows.targets, 7)
    found = torch.autograd.grad(chunked, list(model.parameters()))
    torch.testing.assert_close(chunked, whole, rtol=1e-12, atol=0)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


# --- checkpoints ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("more", [{}, {"tie_weights": False, "qkv_bias": False}], ids=["tied", "untied"])
def test_a_checkpoint_goes_on_bit_by_bit_and_is_a_folder_that_opens(tmp_path, changes, more):
    cfg = changes | more
    state = small_runs.fresh(small_runs.settings(), **cfg)
    with Checkpoints(tmp_path, every=4, keep_last=9) as checkpoints:
        whole = small_runs.go_on(state, checkpoints)
    again = small_runs.fresh(small_runs.settings(), seed=1, **cfg)
    restore(tmp_path / "step-8", again)
    assert small_runs.go_on(again).of == {step: whole.of[step] for step in range(9, 13)}
    opened = GPTModel.from_pretrained(find(tmp_path))
    kind = json.loads((find(tmp_path) / "config.json").read_text())["model_type"]
    assert kind == ("gpt2" if changes in ({"n_kv_heads": 1}, {"mlp": "gelu_exact"}) else "gpt2-from-scratch")
    assert opened.cfg == state.model.cfg
    ids = torch.arange(16)[None]
    with torch.no_grad():
        assert torch.equal(opened(ids), state.model.eval()(ids))


@pytest.mark.parametrize("name", ALL)
def test_another_variant_is_another_run(tmp_path, name):
    state = small_runs.fresh(small_runs.settings(max_steps=1), **ALL)
    with Checkpoints(tmp_path, every=1) as checkpoints:
        small_runs.go_on(state, checkpoints)
    other = small_runs.fresh(small_runs.settings(max_steps=1), **{k: v for k, v in ALL.items() if k != name})
    with pytest.raises(ValueError, match=f"cfg: {name}: {ALL[name]!r} was saved"):
        restore(tmp_path / "step-1", other)


def test_a_trained_variant_writes_the_same_with_a_cache_and_without():
    model = small_model(**ALL)
    train(model, UnequalRows(), recipe(max_steps=30, learning_rate=1e-2), progress=False)
    prompt = torch.tensor([[3, 4, 5]])
    cached, plain = (generate(model, prompt, 30, use_cache=used, past_context="slide") for used in (True, False))
    assert torch.equal(cached, plain)  # 33 tokens, and a context of 12
