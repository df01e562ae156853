"""Which differences make it another run, and which are only said; each of them."""

import pytest

from GPT2Model.config import from_preset
from orchestrator.training.same_run import differences
from tests.orchestrator.training.small_runs import settings


def facts(cfg=None, tokenizer=None, options=None, data="shakespeare, 1,003,854 tokens", **changes) -> dict:
    return {
        "cfg": from_preset("nano", **(cfg or {})),
        "tokenizer": tokenizer or {"name": "char", "characters": "abc"},
        "options": {
            "dataset": "a.txt",
            "max_length": 16,
            "device": "cpu",
            "resume": None,
            "out": "x",
            **(options or {}),
        },
        "settings": vars(settings(**changes)),
        "data": data,
    }


def test_the_same_run_has_no_differences():
    assert differences(facts(), facts(options={"resume": "auto", "config": "a.toml", "out": "y"})) == ([], [])


@pytest.mark.parametrize(
    ("change", "phrase"),
    [
        ({"cfg": {"n_layers": 3}}, "cfg: n_layers: 2 was saved, 3 is asked for"),
        ({"cfg": {"drop_rate": 0.3}}, "cfg: drop_rate: 0.0 was saved, 0.3 is asked for"),
        ({"cfg": {"n_heads": 2}}, "cfg: n_heads: 4 was saved, 2 is asked for"),
        ({"seed": 1}, "seed: 0 was saved, 1 is asked for"),
        ({"batch_size": 8}, "batch_size: 4 was saved, 8 is asked for"),
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps: 1 was saved, 2 is asked for"),
        ({"optimizer": "muon"}, "optimizer: 'adamw' was saved, 'muon' is asked for"),
        ({"options": {"pack_documents": True}}, "pack_documents: None was saved, True is asked for"),
        ({"options": {"max_length": 8}}, "max_length: 16 was saved, 8 is asked for"),
        ({"data": "another"}, "data: 'shakespeare, 1,003,854 tokens' was saved, 'another' is asked for"),
    ],
)
def test_what_makes_it_another_run_is_refused(change, phrase):
    assert differences(facts(), facts(**change)) == ([phrase], [])


@pytest.mark.parametrize(
    ("change", "phrase"),
    [
        ({"max_steps": 99}, "max_steps: 12 was saved, 99 is asked for (the learning rate follows the new schedule"),
        ({"learning_rate": 1e-3}, "learning_rate: 0.003 was saved, 0.001 is asked for (it counts from here on"),
        ({"eval_steps": 7}, "eval_steps: 4 was saved, 7 is asked for"),
        ({"compile": True}, "compile: False was saved, True is asked for (the numbers may differ in their last digits"),
        ({"options": {"device": "cuda"}}, "device: 'cpu' was saved, 'cuda' is asked for (the numbers may differ"),
        ({"options": {"save_steps": 3}}, "save_steps: None was saved, 3 is asked for"),
        ({"cfg": {"attn_implementation": "eager"}}, "cfg: attn_implementation: 'auto' was saved, 'eager' is asked for"),
    ],
)
def test_what_a_run_can_go_on_with_is_said(change, phrase):
    refused, allowed = differences(facts(), facts(**change))
    assert refused == []
    assert len(allowed) == 1
    assert allowed[0].startswith(phrase)


def test_every_difference_is_listed_at_once():
    asked = facts(
        {"n_layers": 3, "emb_dim": 64}, {"name": "bytes"}, {"dataset": "b.txt"}, "b, 5 tokens", seed=3, eval_steps=9,
        betas=(0.8, 0.9),
    )  # fmt: skip
    refused, allowed = differences(facts(), asked)
    assert [phrase.partition(": ")[0] for phrase in refused] == [
        "cfg", "cfg", "tokenizer", "dataset", "seed", "data",
    ]  # fmt: skip
    assert [phrase.partition(":")[0] for phrase in allowed] == ["betas", "eval_steps"]


def test_the_same_data_under_another_path_is_the_same_run():
    phrase = "dataset: 'a.txt' was saved, '/elsewhere/a.txt' is asked for (the same content)"
    assert differences(facts(), facts(options={"dataset": "/elsewhere/a.txt"})) == ([], [phrase])


def test_of_other_files_it_is_said_how_many_are_the_same():
    refused, _ = differences(facts(data=["1a", "2b", "3c"]), facts(data=["1a", "9f"]))
    assert refused == ["data: 1 of 3 files that were saved are among the 2 asked for (by SHA-256)"]


def test_of_a_tokenizer_its_name_and_size_are_said_once():
    chars = {"name": "char", "vocab_size": 3, "fingerprint": "00ff", "characters": "ab"}
    other = facts(tokenizer={"name": "bytes", "vocab_size": 257, "fingerprint": "11aa"}, options={"tokenizer": "bytes"})
    saved = facts(tokenizer=chars, options={"tokenizer": "char"})
    refused, _ = differences(saved | {"tokenizer_fingerprint": "00ff"}, other | {"tokenizer_fingerprint": "11aa"})
    assert refused == ["tokenizer: 'char 3 00ff' was saved, 'bytes 257 11aa' is asked for"]


def test_an_option_that_the_settings_or_the_cfg_resolve_is_not_listed_twice():
    saved, asked = facts(options={"learning_rate": None, "n_layers": None}), facts(
        options={"learning_rate": 1e-3, "n_layers": 3}, cfg={"n_layers": 3}, learning_rate=1e-3
    )  # fmt: skip
    refused, allowed = differences(saved, asked)
    assert len(refused) == len(allowed) == 1


def test_a_key_that_is_newer_than_the_checkpoint_means_its_default():
    saved = facts()
    del saved["cfg"]["init_std"], saved["cfg"]["n_kv_heads"]
    assert differences(saved, facts(cfg={"init_std": 0.02})) == ([], [])
    assert len(differences(saved, facts(cfg={"init_std": 0.02, "n_kv_heads": 2})).refused) == 1


def test_an_option_that_is_newer_than_the_checkpoint_is_no_difference():
    """What it decides is in the cfg, where a missing key means its default."""
    saved, asked = facts(options={"n_layers": 2}), facts(options={"n_layers": 2, "norm": "layernorm"})
    del saved["cfg"]["norm"]
    assert differences(saved, asked) == ([], [])


def test_a_long_vocabulary_is_no_long_line():
    saved = facts(tokenizer={"name": "char", "characters": "abc" * 4000})
    assert len(differences(saved, facts()).refused[0]) < 250
