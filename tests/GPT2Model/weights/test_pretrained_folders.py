"""Every kind of folder that transformers writes of a GPT-2 opens here with its logits, or is refused by name."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from GPT2Model.gpt2 import GPTModel
from GPT2Model.pretrained import load

SIZES = {"vocab_size": 61, "n_positions": 24, "n_embd": 30, "n_head": 5, "n_layer": 3, "bos_token_id": 0,
         "eos_token_id": 0, "attn_implementation": "eager"}  # fmt: skip
# Of config.json of distilgpt2 and of gpt2-medium, as they lie on the hub: fields that newer versions do not write.
PUBLISHED = {
    "distilgpt2": {"_num_labels": 1, "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}, "n_ctx": 24,
                   "gradient_checkpointing": False,
                   "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}}},
    "gpt2-medium": {"n_special": 0, "predict_special_tokens": True, "n_ctx": 24},
    "gpt2-xl": {"output_past": True, "n_ctx": 24},
}  # fmt: skip


def make(perturb, kind=transformers.GPT2LMHeadModel, **changes):
    torch.manual_seed(0)
    return perturb(kind(transformers.GPT2Config(**{**SIZES, **changes}))).eval()


def refused(source, kind=ValueError) -> str:
    with pytest.raises(kind) as caught:
        GPTModel.from_pretrained(source)
    return str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_folder_of_any_dtype_keeps_it_and_its_weights_to_the_bit(dtype, tied, perturb, tmp_path, random_ids):
    oracle = make(perturb, tie_word_embeddings=tied).to(dtype)
    oracle.save_pretrained(tmp_path)
    model = GPTModel.from_pretrained(tmp_path)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert model.cfg["tie_weights"] is tied
    assert (model.head.weight is model.token_embedding.weight) is tied
    assert torch.equal(model.head.weight, oracle.lm_head.weight)
    ids = random_ids(2, 24)
    expected = oracle.double()(ids).logits  # of the very same numbers, computed without rounding
    torch.testing.assert_close(model.double()(ids), expected, atol=1e-11, rtol=0)


@pytest.mark.parametrize("to", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_a_dtype_that_is_asked_for_is_what_to_gives(to, perturb, tmp_path):
    make(perturb).save_pretrained(tmp_path)
    expected, model = GPTModel.from_pretrained(tmp_path).to(to).state_dict(), load(tmp_path, dtype=to)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    assert {tensor.dtype for tensor in model.state_dict().values()} == {to}
    assert load(model.state_dict(), model.cfg, to).head.weight.dtype == to


@pytest.mark.parametrize("wrong", [torch.int8, torch.complex64, torch.float8_e5m2], ids=str)
def test_a_dtype_that_nothing_is_computed_in_is_refused(wrong, perturb, tmp_path):
    make(perturb).save_pretrained(tmp_path)
    with pytest.raises(TypeError, match=r"dtype must be one of torch\.float32, torch\.bfloat16"):
        load(tmp_path, dtype=wrong)


def test_numbers_beyond_float16_are_not_made_infinite_in_silence(build, tmp_path):
    model = build(torch.float32)
    with torch.no_grad():
        model.blocks[1].norm_1.weight[3] = 70_000.0
    with pytest.raises(ValueError, match=r"blocks\.1\.norm_1\.weight holds 70,000, and float16 ends at 65,504"):
        load(model.state_dict(), model.cfg, torch.float16)
    assert load(model.state_dict(), model.cfg, torch.bfloat16).blocks[1].norm_1.weight.isfinite().all()


def test_weights_of_several_dtypes_become_the_smallest_that_holds_them_all(build):
    weights = build(torch.float16).state_dict()
    weights["final_norm.bias"] = weights["final_norm.bias"].bfloat16()
    model = load(weights, build().cfg)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("weights_in", ["model.safetensors", "pytorch_model.bin"])
def test_a_bare_gpt2model_without_head_and_prefix_opens_with_its_tied_head(weights_in, perturb, tmp_path, random_ids):
    body = make(perturb, transformers.GPT2Model)
    body.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    assert "wte.weight" in weights
    if weights_in == "pytorch_model.bin":
        torch.save(weights, tmp_path / weights_in)
        (tmp_path / "model.safetensors").unlink()
    ids = random_ids(2, 24)
    expected = body(ids).last_hidden_state @ body.wte.weight.T
    torch.testing.assert_close(GPTModel.from_pretrained(tmp_path)(ids), expected, atol=2e-5, rtol=0)


def test_a_bare_body_whose_config_unties_the_head_has_none_and_says_so(perturb, tmp_path):
    make(perturb, transformers.GPT2Model, tie_word_embeddings=False).save_pretrained(tmp_path)
    assert "has no head of its own, and cfg says tie_weights=False: use tie_weights=True" in refused(tmp_path)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_fields_of_the_published_configs_are_understood(name, perturb, tmp_path, random_ids):
    oracle, ids = make(perturb), random_ids(2, 24)
    oracle.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **PUBLISHED[name]}))
    torch.testing.assert_close(GPTModel.from_pretrained(tmp_path)(ids), oracle(ids).logits, atol=2e-5, rtol=0)


HEADS = {
    "GPT2ForSequenceClassification": "score.weight",
    "GPT2ForTokenClassification": "classifier.weight",
    "GPT2ForQuestionAnswering": "qa_outputs.weight",
    "GPT2DoubleHeadsModel": "multiple_choice_head.summary.weight",
}


@pytest.mark.parametrize("kind", HEADS)
def test_another_head_is_refused_by_name_and_what_is_advised_works(kind, perturb, tmp_path, random_ids):
    other = make(perturb, getattr(transformers, kind), num_labels=3, summary_use_proj=True)
    other.save_pretrained(tmp_path / "other")
    message = refused(tmp_path / "other")
    assert f"{HEADS[kind]} is a head of transformers' {kind}" in message
    assert "transformers.GPT2LMHeadModel.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)" in message
    words = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "other", attn_implementation="eager").eval()
    words.save_pretrained(tmp_path / "words")
    ids = random_ids(1, 24)
    torch.testing.assert_close(GPTModel.from_pretrained(tmp_path / "words")(ids), words(ids).logits, atol=2e-5, rtol=0)


def test_an_adapter_that_was_not_merged_is_refused_with_what_to_do(perturb, tmp_path):
    make(perturb).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    for i in range(3):
        weights[f"transformer.h.{i}.attn.c_attn.lora_A.default.weight"] = torch.zeros(4, 30)
    save_file(weights, tmp_path / "model.safetensors")
    message = refused(tmp_path)
    assert (
        "blocks 0 to 2: attention.W_qkv.lora_A" in message or "h 0 to 2: attn.c_attn.lora_A.default.weight" in message
    )
    assert "merge it in peft with merge_and_unload()" in message


@pytest.mark.parametrize("kind", [torch.int8, torch.uint8, torch.bool], ids=str)
def test_quantised_weights_are_refused_by_name(kind, build):
    weights = build().state_dict()
    for i in range(2):
        weights[f"blocks.{i}.attention.out_proj.weight"] = torch.zeros(30, 30).to(kind)
    with pytest.raises(ValueError, match=r"blocks 0 and 1: attention\.out_proj\.weight holds \w+ numbers: quantised"):
        load(weights, build().cfg)


def test_fp8_weights_open_only_where_a_dtype_is_asked_for(build):
    weights = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in build().state_dict().items()}
    with pytest.raises(ValueError, match=r"is stored in float8_e4m3fn: pass dtype=torch\.bfloat16, say, to convert"):
        load(weights, build().cfg)
    model = load(weights, build().cfg, torch.float32)
    assert torch.equal(model.final_norm.weight, weights["final_norm.weight"].float())


def test_sparse_and_empty_tensors_are_refused_by_name(build):
    weights = build().state_dict()
    weights["final_norm.weight"] = weights["final_norm.weight"].to_sparse()
    weights["final_norm.bias"] = weights["final_norm.bias"].to("meta")
    with pytest.raises(ValueError, match=r"sparse.*final_norm\.weight, final_norm\.bias"):
        load(weights, build().cfg)


def test_every_mismatch_of_many_is_said_and_none_is_left_out(perturb, tmp_path):
    """12 blocks, each with three things wrong: three lines."""
    make(perturb, n_layer=12).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    for i in range(12):
        del weights[f"transformer.h.{i}.ln_1.bias"]
        weights[f"transformer.h.{i}.mlp.c_fc.bias"] = torch.zeros(121)
        if i not in (3, 7, 8):
            weights[f"transformer.h.{i}.attn.rotary"] = torch.zeros(2)
    weights["transformer.extra"] = torch.zeros(1)
    save_file(weights, tmp_path / "model.safetensors")
    assert refused(tmp_path).splitlines()[1:] == [
        "  - blocks 0 to 11: norm_1.bias is missing",
        "  - transformer.extra is not part of this model",
        "  - transformer.h 0 to 2, 4 to 6 and 9 to 11: attn.rotary is not part of this model",
        "  - blocks 0 to 11: feed_forward.up_proj.bias has shape (121,), and (120,) was expected",
    ]


def test_a_depth_that_the_weights_do_not_have_is_said_by_the_blocks(perturb, tmp_path):
    make(perturb).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    beyond = "blocks 1 and 2 are not part of this model, whose n_layers is 1 (24 tensors)"
    missing = {6: "blocks 3 to 5 are missing (36 tensors)", 4: "block 3 is missing (12 tensors)"}
    for layers, said in {**missing, 5: "blocks 3 and 4 are missing (24 tensors)", 1: beyond}.items():
        (tmp_path / "config.json").write_text(json.dumps({**config, "n_layer": layers}))
        lines = refused(tmp_path).splitlines()
        assert lines[1:] == [f"  - {said}"]


def test_the_attention_that_is_said_is_the_one_that_will_run_and_it_is_said_once(build, tmp_path, caplog):
    build(torch.float32).save_pretrained(tmp_path)
    caplog.clear()
    with caplog.at_level("INFO", "CMHA"):
        model = load(tmp_path, {"attn_implementation": "flash_tiled", "use_flash": True})
    assert [record.message for record in caplog.records] == ["Attention backend: flash_tiled (as asked)"]
    assert model.attention_report()["chosen"] == "flash_tiled"
    assert model.cfg["attn_implementation"] == "flash_tiled"
    with pytest.raises(ValueError, match="flash_attention_2"):
        load(tmp_path, {"attn_implementation": "flash_attention_2", "attn_strict": True})
