"""open_model: every kind of source gives a model and the tokenizer that it was trained with, in the asked precision."""

import pytest
import torch

from GPT2Model.config import from_preset
from GPT2Model.gpt2 import GPTModel
from GPT2Model.quantization import Int8Linear, quantize_int8
from orchestrator import opened
from orchestrator.opened import open_model, resolve_dtype
from orchestrator.text.tokenizers import BytesTokenizer
from orchestrator.training.final import save_final


def small(vocab_size: int) -> GPTModel:
    torch.manual_seed(0)
    return GPTModel(from_preset("nano", n_layers=1, context_length=16, emb_dim=16, vocab_size=vocab_size)).eval()


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    save_final(small(257), BytesTokenizer(), folder / "final")
    return folder


def test_a_run_opens_by_its_folder_or_its_final_model(run_folder):
    for source in (run_folder, str(run_folder), run_folder / "final"):
        model, tokenizer = open_model(source, device="cpu")
        assert (model.cfg["vocab_size"], tokenizer.vocab_size) == (257, 257)
        assert tokenizer.decode(tokenizer.encode("é")) == "é"
        assert not model.training
        assert next(model.parameters()).dtype == torch.float32


def test_a_folder_without_tokenizer_files_gets_gpt2s_if_the_vocabulary_is_gpt2s(tmp_path):
    small(50257).save_pretrained(tmp_path / "gpt2")
    _, tokenizer = open_model(tmp_path / "gpt2", device="cpu")
    assert tokenizer.encode("Hello world") == [15496, 995]
    small(300).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"(?s)tokenizer.*300"):
        open_model(tmp_path / "other", device="cpu")


def test_the_main_jobs_run_opens_too(tmp_path):
    small(177).save_pretrained(tmp_path / "run" / "model")
    _, tokenizer = open_model(tmp_path / "run", device="cpu")
    assert tokenizer.decode(tokenizer.encode("One morning")) == "One morning"


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path):
    save_final(small(200), BytesTokenizer(), tmp_path / "final")
    with pytest.raises(ValueError, match="200 tokens, and its tokenizer has 257"):
        open_model(tmp_path, device="cpu")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_precision_is_the_one_that_was_asked_for(run_folder, dtype):
    model, _ = open_model(run_folder, device="cpu", dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {getattr(torch, dtype)}
    with torch.no_grad():
        assert model(torch.tensor([[1, 2, 3]])).dtype == getattr(torch, dtype)


def test_int8_is_rounded_from_the_stored_weights_and_then_changes_its_dtype(run_folder):
    model, _ = open_model(run_folder, device="cpu", dtype="bfloat16", int8=True)
    stored = quantize_int8(GPTModel.from_pretrained(run_folder / "final"))
    assert isinstance(model.head, Int8Linear)
    assert torch.equal(model.head.quantized, stored.head.quantized)
    assert torch.equal(model.head.scale, stored.head.scale)
    assert model.final_norm.weight.dtype == torch.bfloat16


def test_auto_is_bfloat16_where_the_processor_has_it(monkeypatch):
    for has, expected in ((True, "bfloat16"), (False, "float32")):
        monkeypatch.setattr(opened, "native_bf16", lambda device, has=has: has)
        assert resolve_dtype("auto", "cpu") == expected
    assert resolve_dtype("float16", "cpu") == "float16"
    short = [resolve_dtype(name, "cpu") for name in ("fp32", "bf16", "fp16")]
    assert short == ["float32", "bfloat16", "float16"]


def test_attention_is_computed_as_asked(run_folder):
    model, _ = open_model(run_folder, device="cpu", attn_implementation="eager")
    assert model.attention_report()["chosen"] == "eager"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dtype": "bf17"}, r"dtype must be one of float32, bfloat16, float16, auto, got 'bf17'"),
        ({"device": "cuda:77"}, "cannot be used here"),
        ({"attn_implementation": "sdap"}, "Did you mean 'sdpa'"),
    ],
)
def test_wrong_arguments_are_refused_in_words(run_folder, arguments, message):
    with pytest.raises(ValueError, match=message):
        open_model(run_folder, **{"device": "cpu", **arguments})


def test_a_source_that_is_not_there_is_told_what_there_could_be(tmp_path):
    with pytest.raises(FileNotFoundError, match="--model takes a run's folder"):
        open_model(tmp_path / "gone", device="cpu")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        open_model(tmp_path / "empty", device="cpu")
