"""The table of symptoms: what each check must see and must not see, on models small enough for a test."""

import math
import pickle
from dataclasses import replace

import pytest
import torch
import transformers

from GPT2Model.gpt2 import GPTModel
from orchestrator.learning import looks, symptoms
from orchestrator.learning.looks import Settings, apart, corpus_of
from orchestrator.learning.planted import MISTAKES, Mistake, planted
from orchestrator.learning.reference import reference_logits
from orchestrator.learning.symptoms import CHECKS, NOT_MET, TOO_GOOD, Finding, Symptoms, judge, right_model
from orchestrator.training import loop

SMALL = Settings(steps=60, emb_dim=32, n_heads=4, right_seeds=2, stories=20, held_out=50, batch_size=8)

# What has to be seen, whatever the training: by the checks that look at numbers, with right weights.
MUST_SEE = {
    "scale_forgotten": {"reference"},
    "scale_by_emb_dim": {"reference"},
    "mask_forgotten": {"reference", "causality", "cache"},
    "mask_shifted": {"reference", "causality", "cache"},
    "mask_too_strict": {"reference"},
    "mask_after_softmax": {"reference", "implementations", "causality", "cache"},
    "mask_upper_left_with_cache": {"cache"},
    "softmax_over_queries": {"reference", "implementations", "causality", "cache"},
    "view_without_transpose": {"reference", "causality", "cache"},
    "merge_without_transpose": {"reference", "causality", "cache"},
    "projection_not_transposed": {"reference"},
    "exact_gelu": {"reference"},
    "unbiased_variance": {"reference"},
    "epsilon_wrong": {"reference"},
    "norm_forgotten": {"reference"},
    "post_norm": {"reference"},
    "residual_forgotten": {"reference"},
    "positions_forgotten": {"reference"},
    "head_untied": {"reference", "right_loss"},
    "dropout_left_on": {"reference", "implementations", "causality", "cache", "repeat"},
    "targets_not_shifted": {"right_loss"},
    "gradients_not_cleared": set(),  # it acts in training alone: see below
    "positions_restart_with_cache": {"cache"},
    "logits_from_first_position": {"cache"},
    "sampling_without_softmax": {"right_text"},
}
NUMBERS = {"reference", "implementations", "causality", "cache", "repeat"}


@pytest.fixture(scope="module")
def right():
    return right_model(SMALL)


def seen(mistake: Mistake, right) -> set[str]:
    return set(symptoms.symptoms(mistake, right).seen)


def test_every_mistake_has_an_expectation():
    assert MUST_SEE.keys() == MISTAKES.keys()


@pytest.mark.parametrize("name", MISTAKES)
def test_right_weights_run_with_it_the_checks_on_numbers_see_what_they_must_and_nothing_else(name, right):
    found = symptoms.symptoms(replace(MISTAKES[name], in_training=False), right)
    assert set(found.findings) == set(CHECKS)
    assert set(found.seen) & NUMBERS == MUST_SEE[name] & NUMBERS
    assert MUST_SEE[name] <= set(found.seen)
    assert found.findings["trained_loss"] == Finding(None, False, NOT_MET)


def test_nothing_planted_is_silent_in_everything_trained_again_or_not(right):
    """A table that can never say "silent" says nothing."""
    nothing = Mistake("nothing", "", "", "", "", "model", ())
    for in_training in (True, False):
        row = symptoms.symptoms(replace(nothing, in_training=in_training), right)
        assert row.seen == []
        assert row.verdict == "silent in everything"
    again = symptoms.symptoms(nothing, right)
    assert again.findings["trained_loss"].value == right.gap[0]  # one seed gives one result
    assert again.findings["start"].value == right.start[0]
    assert again.findings["trained_text"].value == again.findings["right_text"].value == right.text[0]
    assert set(again.silent) == set(CHECKS)


def test_targets_that_are_not_shifted_are_too_good_to_be_true(right):
    row = symptoms.symptoms("targets_not_shifted", right)
    assert row.findings["trained_loss"].value < 0
    assert row.findings["trained_loss"].note == TOO_GOOD
    assert row.verdict.startswith(TOO_GOOD)
    assert set(row.seen) & NUMBERS == set()


def test_gradients_that_are_not_cleared_change_training_alone(right):
    row = symptoms.symptoms("gradients_not_cleared", right)
    assert set(row.seen) <= {"trained_loss", "trained_text"}
    assert row.findings["trained_loss"].value != right.gap[0]  # with nothing planted it is the same to the last bit
    assert row.findings["right_loss"].value == right.gap[0]


def test_a_training_that_ends_in_nan_is_seen_as_an_error(right, monkeypatch):
    def nan(make_optimizer):
        def wrong(model, *args):
            with torch.no_grad():
                model.final_norm.weight.fill_(math.nan)
            return make_optimizer(model, *args)

        return wrong

    patch = replace(MISTAKES["gradients_not_cleared"].patches[0], make=nan)
    row = symptoms.symptoms(Mistake("nan", "", "", "", "", "training", (patch,)), right)
    assert row.findings["trained_loss"].value is None
    assert row.findings["trained_loss"].seen
    assert row.findings["trained_loss"].note.startswith("FloatingPointError: the loss is nan")
    assert row.verdict.endswith("it stops with an error")


def test_a_faulty_right_model_cannot_hide_behind_its_own_rounding():
    with planted("scale_forgotten"):
        faulty = right_model(replace(SMALL, steps=2))
        row = symptoms.symptoms(symptoms.NOTHING, faulty)
    assert row.seen == ["reference"]


def test_processes_give_the_numbers_that_one_gives(right):
    settings = replace(SMALL, steps=3, stories=2)
    names = ["exact_gelu", "dropout_left_on"]
    one, two = (symptoms.table(names, settings, jobs=jobs, progress=False) for jobs in (1, 2))
    assert [row.as_dict() for row in one[1]] == [row.as_dict() for row in two[1]]
    assert one[0].gap == two[0].gap
    assert [row.name for row in one[1]] == ["nothing", *names]


def test_noise_is_what_seeds_differ_by(right):
    one, two = right.gap
    deviation = abs(one - two) / math.sqrt(2)  # of two values, divided by n - 1
    assert right.normal("trained_loss") == pytest.approx(((one + two) / 2, max(4 * deviation, 0.005)))
    assert right.normal("right_loss") == pytest.approx((one, max(4 * deviation, 0.005)))
    assert right.normal("causality") == (0, pytest.approx(10 * right.rounding))
    assert one != two


@pytest.mark.parametrize(
    ("check", "measured", "is_seen"),
    [
        ("reference", 0.0, False),
        ("reference", math.nan, True),
        ("reference", math.inf, True),
        ("trained_loss", 0.104, False),
        ("trained_loss", 0.106, True),
        ("trained_loss", 0.094, True),
        ("trained_loss", -0.004, True),
        ("trained_text", 1.0, False),
        ("trained_text", 0.31, False),
        ("trained_text", 0.29, True),
        ("cache", (0.0, "other text"), True),
        ("cache", (0.0, ""), False),
        ("right_text", ValueError("no\nmore"), True),
    ],
)
def test_what_counts_as_seen(check, measured, is_seen):
    spread = 0.05 / math.sqrt(2)  # two values this far from their mean have the deviation 0.05
    right = symptoms.Right(SMALL, {}, [5.0, 5.0], [0.1, 0.1], [0.5 - spread, 0.5 + spread], 1e-6, 10.0)
    assert judge(check, measured, right).seen is is_seen


def test_the_verdict_says_who_sees_it():
    def row(*seen, trained=None):
        findings = {check: Finding(0.0, check in seen) for check in CHECKS}
        return Symptoms("x", findings | ({"trained_loss": trained} if trained else {})).verdict

    assert row() == "silent in everything"
    assert row("reference") == "silent in loss and text; seen by against float64"
    assert row("right_loss", "reference") == "learned around; seen by right weights: loss, against float64"
    assert row("right_text", trained=Finding(None, False, NOT_MET)).startswith(NOT_MET)
    assert row(trained=Finding(-0.4, True, TOO_GOOD)) == "too good to be true; seen by trained: loss"


@pytest.mark.parametrize("settings", [{"steps": 0}, {"right_seeds": 1}])
def test_settings_that_make_no_sense_are_refused(settings):
    with pytest.raises(ValueError, match="symptoms need 1 step or more and 2 seeds or more"):
        Settings(**settings)


def test_an_unknown_name_is_told_before_anything_is_trained(monkeypatch):
    monkeypatch.setattr(symptoms, "right_model", None)
    with pytest.raises(ValueError, match="Did you mean 'exact_gelu'"):
        symptoms.table(["exact_gelou"], SMALL, progress=False)


def test_what_is_looked_at_can_be_sent_to_another_process(right):
    assert pickle.loads(pickle.dumps(right)).gap == right.gap


# ------------------------------------------------------------------ what the checks lean on


def test_the_reference_is_gpt2_as_transformers_computes_it(tmp_path):
    torch.manual_seed(0)
    shape = {"n_embd": 60, "n_head": 5, "n_layer": 3, "vocab_size": 131, "n_positions": 67}
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape)).double().eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    theirs.save_pretrained(tmp_path)
    ours = GPTModel.from_pretrained(tmp_path)
    ids = torch.randint(0, 131, (2, 50))
    with planted("exact_gelu"), planted("mask_shifted"), torch.no_grad():  # it takes nothing from the model's code
        logits = reference_logits(ours.state_dict(), ours.cfg, ids)
        torch.testing.assert_close(logits, theirs(ids).logits, rtol=0, atol=1e-10)


def test_the_reference_takes_an_untied_head_and_refuses_grouped_ones():
    torch.manual_seed(0)
    cfg = {"vocab_size": 31, "context_length": 12, "emb_dim": 16, "n_heads": 4, "n_layers": 1, "tie_weights": False}
    model, ids = GPTModel(cfg).double().eval(), torch.arange(12)[None]
    torch.testing.assert_close(
        reference_logits(model.state_dict(), model.cfg, ids), model(ids).detach(), rtol=0, atol=1e-12
    )
    with pytest.raises(ValueError, match="n_kv_heads must be None"):
        reference_logits({}, {**cfg, "n_kv_heads": 2}, ids)


def test_apart_takes_nan_for_a_difference():
    assert apart(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.5])) == 0.5
    assert apart(torch.tensor([1.0, math.nan]), torch.tensor([1.0, 2.5])) == math.inf


def test_what_is_measured_leaves_threads_log_level_and_random_numbers_as_they_were(right):
    torch.manual_seed(7)
    expected, threads = torch.rand(3), torch.get_num_threads()
    torch.manual_seed(7)
    symptoms.symptoms(replace(MISTAKES["dropout_left_on"], in_training=False), right)
    assert torch.equal(torch.rand(3), expected)
    assert torch.get_num_threads() == threads


def test_the_same_batches_come_again_and_the_stories_are_longer_than_what_is_looked_at():
    corpus = corpus_of(SMALL)
    assert corpus.batch(3, 8) is corpus.batch(3, 8)
    assert (corpus.validation[0][1][:8, :40] != loop.IGNORED).all()
    assert looks.IMPLEMENTATIONS == ("eager", "sdpa", "flash_tiled")
