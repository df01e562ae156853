"""The loop: bad steps leave no trace, looks and samples disturb nothing, one seed gives one run."""

import contextlib
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from GPT2Model.generation import generate
from GPT2Model.gpt2 import GPTModel
from orchestrator.text.corpora import IGNORED
from orchestrator.text.samples import TalesSamples, TokenWindows
from orchestrator.text.tokenizers import BytesTokenizer
from orchestrator.training.loop import evaluate, start, train
from tests.orchestrator.training.small import (
    Notes,
    UnequalRows,
    memories_of,
    recipe,
    same,
    small_model,
    weights_of,
)

ROOT = Path(__file__).resolve().parents[3]
TEXT = "The cat sat on the mat, and the dog lay on the rug; who of them was the happier, nobody knows to this day. "


def windows(context_length: int = 12, **settings) -> TokenWindows:
    tokenizer = BytesTokenizer()
    ids = [tokenizer.end_of_text, *tokenizer.encode(TEXT * 12)]
    return TokenWindows((ids[:1000], ids[1000:], tokenizer), context_length, **settings)


class Kept:
    """Stands where checkpoints are kept, and notes what it is given, when."""

    def __init__(self, every: int = 10**9):
        self.every, self.saved = every, []

    def due(self, step):
        return step % self.every == 0

    def save(self, state):
        self.saved.append((state.counters.step, weights_of(state.model), memories_of(state.optimizer)))


def break_steps(model, steps, how) -> None:
    """Spoil the logits of these forward passes (counted from 0, in training), or the gradient that comes to them."""
    count = iter(range(10**9))

    def spoil(_, __, logits):
        if model.training and next(count) in steps:
            if how == "loss":
                return logits * math.nan
            logits.register_hook(lambda gradient: gradient * math.inf)
        return logits

    model.head.register_forward_hook(spoil)


# --- steps whose loss or gradient is no number ----------------------------------------------------------------------


@pytest.mark.parametrize("how", ["loss", "gradient"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_bad_step_is_skipped_and_leaves_no_trace(how, optimizer, dtype):
    model, settings = small_model(), recipe(max_steps=8, optimizer=optimizer, dtype=dtype, max_bad_steps=2)
    break_steps(model, {3}, how)
    state = start(model, settings)
    notes = Notes(state)
    history = train(model, UnequalRows(), settings, state=state, watch=notes)
    assert same(notes.weights[3], notes.weights[2])
    assert same(notes.memories[3], notes.memories[2])
    assert not same(notes.weights[4], notes.weights[3])  # it went on
    assert state.counters.skipped == 1
    assert state.counters.step == 8
    assert state.counters.sample == 8 * 4  # the samples of the bad step are behind it
    reasons = [record.skipped for record in notes.steps]
    assert [reason is None for reason in reasons] == [True] * 3 + [False] + [True] * 4
    assert how in reasons[3]
    assert all(torch.isfinite(weight).all() for weight in weights_of(model))
    assert math.isnan(history.train[3][1]) == (how == "loss")


@pytest.mark.parametrize("how", ["loss", "gradient"])
def test_several_bad_steps_in_a_row_end_the_run_with_what_was_good_saved(how):
    model, settings = small_model(), recipe(max_steps=20, max_bad_steps=3)
    break_steps(model, {2, 5, 6, 7}, how)
    state, kept = start(model, settings), Kept()
    notes = Notes(state)
    with pytest.raises(FloatingPointError, match=rf"{how}.*step 7.*3 such steps.*lower the learning rate") as caught:
        train(model, UnequalRows(), settings, state=state, watch=notes, checkpoints=kept)
    assert str(settings.learning_rate) in str(caught.value)
    ((step, weights, memories),) = kept.saved  # saved, and before the error
    assert step == 8
    assert same(weights, notes.weights[4])
    assert same(memories, notes.memories[4])
    assert (state.counters.skipped, state.counters.bad_in_a_row) == (4, 3)
    assert not model.training


def test_bad_steps_apart_from_each_other_do_not_end_the_run():
    model, settings = small_model(), recipe(max_steps=12, max_bad_steps=2)
    break_steps(model, {1, 3, 5, 7, 9}, "loss")
    state = start(model, settings)
    train(model, UnequalRows(), settings, state=state, progress=False)
    assert (state.counters.step, state.counters.skipped, state.counters.bad_in_a_row) == (12, 5, 0)


def test_one_bad_batch_of_an_accumulated_step_spoils_that_step_only():
    model, settings = small_model(), recipe(max_steps=4, gradient_accumulation_steps=2)
    break_steps(model, {3}, "loss")  # the second half of step 1
    state = start(model, settings)
    notes = Notes(state)
    train(model, UnequalRows(), settings, state=state, watch=notes)
    assert [record.skipped is None for record in notes.steps] == [True, False, True, True]
    assert same(notes.weights[1], notes.weights[0])


@pytest.mark.parametrize("how", ["loss", "gradient"])
def test_under_fp16_what_stays_bad_ends_the_run_too(how):
    """Lowering the scale cures an overflow; a model that is broken it does not cure, and the run must say so."""
    model, settings = small_model(), recipe(dtype="fp16", max_steps=400)
    break_steps(model, set(range(400)), how)
    with pytest.raises(FloatingPointError, match="lower the learning rate"):
        train(model, UnequalRows(), settings, progress=False)


# --- what watches does not disturb ----------------------------------------------------------------------------------


def write(model: GPTModel) -> str:
    return str(generate(model, torch.zeros(1, 3, dtype=torch.long), 5, 0.8, seed=0).tolist())


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_looks_and_samples_change_no_bit_of_the_weights(dtype):
    quiet, watched = small_model(drop_rate=0.2), small_model(drop_rate=0.2)
    train(quiet, UnequalRows(), recipe(dtype=dtype), progress=False)
    notes = Notes()
    settings = recipe(dtype=dtype, eval_steps=1, eval_on_start=True)
    train(watched, UnequalRows(), settings, watch=notes, write=write, sample_steps=1, checkpoints=Kept(every=1))
    assert [step for step, *_ in notes.looks] == list(range(7))
    assert [step for step, _ in notes.texts] == list(range(1, 7))
    assert same(weights_of(quiet), weights_of(watched))


def test_with_no_steps_between_samples_there_is_one_at_the_end():
    notes = Notes()
    train(small_model(), UnequalRows(), recipe(), watch=notes, write=write, sample_steps=0)
    assert [step for step, _ in notes.texts] == [6]


def test_a_sample_that_fails_costs_no_step():
    """What the model writes is decoration: the run, or at least its state, must outlive an error in it."""
    kept = Kept()

    def fail(model):
        raise ValueError("this prompt cannot be encoded")

    with contextlib.suppress(ValueError):
        train(small_model(), UnequalRows(), recipe(), progress=False, write=fail, sample_steps=6, checkpoints=kept)
    assert [step for step, *_ in kept.saved] == [6]


@pytest.mark.parametrize("samples", [UnequalRows, windows, TalesSamples])
def test_one_seed_gives_one_run_and_another_seed_another(samples):
    runs = []
    for seed in (0, 0, 1):
        vocabulary = {"vocab_size": 260, "context_length": 80}
        model = small_model(drop_rate=0.2, **vocabulary)
        history = train(model, samples(), recipe(seed=seed), progress=False)
        runs.append((history.train, weights_of(model)))
    assert runs[0][0] == runs[1][0]
    assert same(runs[0][1], runs[1][1])
    assert runs[0][0][0] != runs[2][0][0]  # from the first step on: the seed reaches dropout
    assert not same(runs[0][1], runs[2][1])


def test_a_batch_of_eight_and_twice_a_batch_of_four_are_the_same_run():
    whole, halves = small_model().double(), small_model().double()
    at_once, in_parts = UnequalRows(), UnequalRows()
    one = train(whole, at_once, recipe(batch_size=8), progress=False)
    other = train(halves, in_parts, recipe(batch_size=4, gradient_accumulation_steps=2), progress=False)
    assert at_once.read == in_parts.read == list(range(6 * 8))
    assert one.tokens == other.tokens
    for (_, a), (_, b) in zip(one.train, other.train, strict=True):
        assert a == pytest.approx(b, rel=1e-12)
    for a, b in zip(weights_of(whole), weights_of(halves), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("changes", [{}, {"optimizer": "muon"}, {"dtype": "fp16"}, {"activation_checkpointing": True}])
def test_a_run_that_goes_on_from_its_state_is_the_run_that_never_stopped(changes):
    settings = recipe(**changes)
    through, parts = small_model(drop_rate=0.2), small_model(drop_rate=0.2)
    wanted = train(through, UnequalRows(), settings, progress=False)
    state = start(parts, settings)
    reasons = iter([None, None, "enough", None, None, None, None])
    first = train(parts, UnequalRows(), settings, state=state, progress=False, stop=lambda: next(reasons))
    assert (first.stopped, state.counters.step) == ("enough", 2)
    second = train(parts, UnequalRows(), settings, state=state, progress=False)
    assert first.train + second.train == wanted.train
    assert same(weights_of(parts), weights_of(through))


def test_a_stop_saves_where_it_stands_and_makes_no_further_step():
    kept, state = Kept(), None
    model, settings = small_model(), recipe(max_steps=50)
    state = start(model, settings)
    history = train(
        model, UnequalRows(), settings, state=state, progress=False, checkpoints=kept,
        stop=lambda: "SIGTERM" if state.counters.step == 4 else None,
    )  # fmt: skip
    assert history.stopped == "SIGTERM"
    assert [step for step, *_ in kept.saved] == [4]
    assert same(kept.saved[0][1], weights_of(model))


def test_what_is_saved_when():
    kept, settings = Kept(every=4), recipe(max_steps=10)
    train(small_model(), UnequalRows(), settings, progress=False, checkpoints=kept)
    assert [step for step, *_ in kept.saved] == [4, 8, 10]


# --- evaluation -----------------------------------------------------------------------------------------------------


def test_a_look_is_about_as_long_as_it_is_told_to_be():
    samples = windows()
    held_out = 12 * 107 - 1000
    for asked in (12, 60, 120, 10**6):
        notes = Notes()
        model = small_model(vocab_size=257)
        train(model, samples, recipe(max_steps=1, eval_tokens=asked), watch=notes)
        ((step, loss, tokens),) = notes.looks
        assert step == 1
        assert tokens == (asked if asked < 10**6 else held_out)
        batches = samples.validation(asked)
        assert tokens == sum((batch.targets != IGNORED).sum() for batch in batches)
        with torch.no_grad():
            log_p = [model(batch.inputs).log_softmax(-1) for batch in batches]
        by_hand = -sum(
            scores[row, column, batch.targets[row, column]].item()
            for scores, batch in zip(log_p, batches, strict=True)
            for row, column in (batch.targets != IGNORED).nonzero().tolist()
        )
        assert loss == pytest.approx(by_hand / tokens, rel=1e-5)


def test_evaluation_reads_packed_texts_as_training_does():
    packed = TokenWindows((*[[256, 5, 6, 7, 256, 8, 9] * 40] * 2, BytesTokenizer()), 12, pack_documents=True)
    model = small_model(vocab_size=257).eval()
    batches = packed.validation(200)
    apart = evaluate(model, batches)
    mixed = evaluate(model, [batch._replace(documents=None) for batch in batches])
    assert abs(apart - mixed) > 1e-3
    by_hand, tokens = 0.0, 0
    with torch.no_grad():
        for inputs, targets, documents in batches:
            for row in range(len(inputs)):
                for number in documents[row].unique():
                    places = (documents[row] == number) & (targets[row] != IGNORED)
                    log_p = model(inputs[row, documents[row] == number][None])[0].log_softmax(-1)
                    kept = places[documents[row] == number]
                    by_hand -= log_p[kept, targets[row, places]].sum().item()
                    tokens += int(places.sum())
    assert apart == pytest.approx(by_hand / tokens, rel=1e-5)


def test_with_the_loss_in_chunks_the_logits_of_a_look_do_not_stand_whole_in_memory_either():
    model, largest = small_model(), []
    model.head.register_forward_hook(lambda _, __, out: largest.append(out.numel() // out.shape[-1]))
    train(model, UnequalRows(), recipe(max_steps=1, loss_chunk_tokens=5), progress=False)
    assert max(largest) <= 5


# --- weight tying, compile ------------------------------------------------------------------------------------------


def test_weight_tying_survives_training_saving_and_loading(tmp_path):
    model = small_model()
    train(model, UnequalRows(), recipe(), progress=False)
    model.save_pretrained(tmp_path / "model")
    loaded = GPTModel.from_pretrained(tmp_path / "model")
    for again in (model, loaded):
        assert again.head.weight is again.token_embedding.weight
        train(again, UnequalRows(), recipe(max_steps=1), progress=False)
        assert again.head.weight is again.token_embedding.weight
        assert sum(name.endswith("embedding.weight") or "head" in name for name, _ in again.named_parameters()) == 2
    assert same(weights_of(model), weights_of(loaded))
    # the gradients of both uses are added: the embedding of a token that never comes still learns, from the head
    rows = UnequalRows().batch(0, 1)
    never = next(i for i in range(23) if i not in rows.inputs)
    loaded.train()
    torch.nn.functional.cross_entropy(loaded(rows.inputs)[0], rows.inputs[0]).backward()
    assert loaded.token_embedding.weight.grad[never].abs().sum() > 0


COMPILED = """
import functools, json, sys
sys.path.insert(0, sys.argv[1])
import torch
if sys.argv[3] != "inductor":  # the same tracing and the same guards, without a C++ compiler's half a minute
    torch.nn.Module.compile = functools.partialmethod(torch.nn.Module.compile, backend=sys.argv[3])
from orchestrator.training.loop import train
from tests.orchestrator.training.small import UnequalRows, recipe, small_model

found = []
for changes in ({}, json.loads(sys.argv[2])):
    model = small_model(n_layers=1)
    history = train(model, UnequalRows(), recipe(max_steps=3, **changes), progress=False)
    found.append([history.train, history.validation, list(model.state_dict()), model._compiled_call_impl is not None])
print(json.dumps(found))
"""


@pytest.mark.parametrize(
    ("backend", "changes"),
    [
        ("aot_eager", {"loss_chunk_tokens": 20, "activation_checkpointing": True}),
        pytest.param("inductor", {}, marks=pytest.mark.slow),
        pytest.param("inductor", {"loss_chunk_tokens": 20, "activation_checkpointing": True}, marks=pytest.mark.slow),
    ],
)
def test_a_compiled_model_learns_the_same_and_keeps_its_names(backend, changes):
    """In a process of its own: torch.compile and the type checks of these tests do not mix."""
    command = [sys.executable, "-c", COMPILED, str(ROOT), json.dumps({"compile": True, **changes}), backend]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    (losses, looks, names, compiled), (found, found_looks, names_again, compiled_again) = json.loads(
        done.stdout.splitlines()[-1]
    )
    assert (compiled, compiled_again) == (False, True)
    assert names_again == names
    for (step, one), (same_step, other) in zip(found + found_looks, losses + looks, strict=True):
        assert step == same_step
        assert one == pytest.approx(other, abs=2e-5)
