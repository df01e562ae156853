"""Weights in and out: a damaged or foreign checkpoint says what is wrong, and a save never breaks what was there."""

import json
import logging
import os
import pickle

import pytest
import torch
import transformers
from safetensors.torch import load_file

from GPT2Model.gpt2 import GPTModel
from GPT2Model.tokenizer import get_tokenizer
from GPT2Model.tokenizer_files import tokenizer_from_folder
from GPT2Model.weights import saved_form
from orchestrator.text.tokenizers import make_tokenizer


@pytest.fixture
def folder(build, tmp_path):
    build().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def refused(source, cfg=None, kind=ValueError) -> str:
    with pytest.raises(kind) as caught:
        GPTModel.from_pretrained(source, cfg)
    return str(caught.value)


def same_weights(one: GPTModel, other: GPTModel) -> bool:
    theirs = other.state_dict()
    return all(torch.equal(tensor, theirs[name]) for name, tensor in one.state_dict().items())


# --- in ----------------------------------------------------------------------------------------------


def test_a_folder_takes_changed_attention_keys_and_keeps_the_rest(folder, build):
    model = GPTModel.from_pretrained(folder, {"use_flash_attention": False, "drop_rate": 0.3})
    assert model.cfg == {**build().cfg, "use_flash": False, "drop_rate": 0.3}
    assert model.attention_report()["chosen"] == "eager"
    assert same_weights(model, build())
    assert "did you mean 'use_flash'" in refused(folder, {"use_flush": False})


def test_a_folder_s_number_of_heads_cannot_be_overruled(folder, build):
    """Every other size shows in the shapes of the weights; with other heads the model would run and be wrong."""
    assert "says n_heads=5, and cfg 3" in refused(folder, {"n_heads": 3})
    assert "position_embedding.weight has shape (24, 30)" in refused(folder, {"context_length": 12})
    assert GPTModel.from_pretrained(folder, build().cfg).cfg == build().cfg


@pytest.mark.parametrize("wrap", [None, "model_state_dict", "model", "state_dict"])
def test_our_own_state_dict_loads_from_a_file_with_its_cfg(wrap, build, tmp_path):
    model = build()
    weights = model.state_dict()
    torch.save(weights if wrap is None else {wrap: weights, "step": 3}, tmp_path / "model.pt")
    assert same_weights(GPTModel.from_pretrained(tmp_path / "model.pt", model.cfg), model)


def test_weights_without_a_cfg_are_refused(build, tmp_path):
    torch.save(build().state_dict(), tmp_path / "model.pt")
    assert "pass the cfg dict too" in refused(tmp_path / "model.pt")
    assert "pass the cfg dict too" in refused(build().state_dict())


@pytest.mark.parametrize("keep", [0, 3, 8, 100, 0.5, -1], ids=str)
@pytest.mark.parametrize("name", ["model.safetensors", "model.pth", "model.pt"])
def test_a_truncated_file_is_refused_with_its_name(name, keep, folder, build, tmp_path):
    file = tmp_path / name
    torch.save(build().state_dict(), tmp_path / "whole.pth")
    whole = (folder / name if name.endswith("safetensors") else tmp_path / "whole.pth").read_bytes()
    file.write_bytes(whole[: int(len(whole) * keep) if isinstance(keep, float) else keep])
    message = refused(file, build().cfg)
    assert str(file) in message
    assert "cut short" in message


@pytest.mark.parametrize("name", ["model.safetensors", "model.pth", "model.bin"])
@pytest.mark.parametrize("content", [b"Once upon a time\n" * 40, b"", b"\x80\x02K\x01.", b"\x00" * 64], ids=range(4))
def test_a_file_that_is_something_else_is_refused(name, content, build, tmp_path):
    (tmp_path / name).write_bytes(content)
    assert str(tmp_path / name) in refused(tmp_path / name, build().cfg)


@pytest.mark.parametrize("name", ["model.pt", "pytorch_model.bin"])
def test_a_pickle_with_code_in_it_does_not_run(name, build, tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "it ran"),)

    (tmp_path / name).write_bytes(pickle.dumps({"tok_emb.weight": Trap()}, protocol=2))
    refused(tmp_path / name, build().cfg)
    torch.save({"token_embedding.weight": Trap()}, tmp_path / name)
    refused(tmp_path / name, build().cfg)
    assert not (tmp_path / "it ran").exists()


@pytest.mark.parametrize("content", [torch.zeros(3), [1, 2], {"a": 1}, {}, {"epoch": 3, "lr": 0.1}], ids=range(5))
def test_a_file_without_weights_is_refused(content, build, tmp_path):
    torch.save(content, tmp_path / "model.pt")
    assert "no state dict" in refused(tmp_path / "model.pt", build().cfg)


def test_the_weights_of_another_architecture_are_refused_with_their_first_names(build):
    message = refused({"model.layers.0.self_attn.q_proj.weight": torch.zeros(2, 2)}, build().cfg)
    assert "model.layers.0.self_attn.q_proj.weight" in message
    assert "Hugging Face's GPT-2, LLMs-from-scratch, nanoGPT" in message


def test_every_tensor_that_does_not_fit_is_named(build):
    weights = build().state_dict()
    del weights["blocks.1.norm_2.bias"]
    weights["blocks.0.attention.out_proj.weight"] = torch.zeros(30, 31)
    weights["blocks.7.norm_1.weight"] = torch.zeros(30)
    message = refused(weights, build().cfg)
    assert len(message.splitlines()) == 4
    assert "blocks.1.norm_2.bias is missing" in message
    assert "blocks.7.norm_1.weight is not part of this model" in message
    assert "blocks.0.attention.out_proj.weight has shape (30, 31), and (30, 30) was expected" in message


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"vocab_size": 62}, "token_embedding.weight"),
        ({"context_length": 25}, "position_embedding.weight"),
        ({"n_layers": 3}, "block 2 is missing (12 tensors)"),
        ({"n_layers": 1}, "block 1 is not part of this model, whose n_layers is 1 (12 tensors)"),
        ({"ff_dim": 100}, "blocks 0 and 1: feed_forward.up_proj.weight has shape (120, 30), and (100, 30) was"),
        ({"emb_dim": 60}, "final_norm.weight has shape (30,), and (60,) was expected"),
        ({"qkv_bias": False}, "blocks 0 and 1: attention.W_qkv.bias is not part"),
        ({"tie_weights": False}, None),
        ({"n_kv_heads": 1}, "n_kv_heads=1"),
    ],
    ids=str,
)
def test_a_cfg_that_does_not_fit_the_weights_is_refused_by_what_differs(changes, named, build):
    model = build()
    weights = model.state_dict()
    if named is None:  # a head stored under both names may be untied
        assert same_weights(GPTModel.from_pretrained(weights, {**model.cfg, **changes}), model)
    else:
        assert named in refused(weights, {**model.cfg, **changes})


def test_a_missing_head_is_made_up_for_only_where_it_is_tied(build):
    model = build()
    weights = {name: tensor for name, tensor in model.state_dict().items() if name != "head.weight"}
    assert same_weights(GPTModel.from_pretrained(weights, model.cfg), model)
    assert "has no head of its own" in refused(weights, {**model.cfg, "tie_weights": False})


def test_a_folder_with_something_missing_or_broken_says_what(folder, tmp_path):
    config = (folder / "config.json").read_text()
    for text, expected in ((config[:-40], "not valid JSON"), ("[1, 2]", "JSON object"), ("", "not valid JSON")):
        (folder / "config.json").write_text(text)
        assert expected in refused(folder)
    (folder / "config.json").unlink()
    assert "has no config.json" in refused(folder, kind=FileNotFoundError)
    (folder / "config.json").write_text(config)
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    message = refused(folder, kind=FileNotFoundError)
    assert "has no model.safetensors (nor model.safetensors.index.json, pytorch_model.bin, " in message
    assert "it has config.json, model-00001-of-00002.safetensors. Weights that are split need their index" in message
    (folder / "config.json").unlink()
    (folder / "adapter_config.json").write_text("{}")
    assert "merge_and_unload" in refused(folder, kind=FileNotFoundError)
    assert "no such folder or file" in refused(tmp_path / "nowhere" / "at all", kind=FileNotFoundError)
    assert "no such folder or file" in refused(tmp_path / "model.pth", kind=FileNotFoundError)


# --- out ---------------------------------------------------------------------------------------------


def test_a_saved_folder_holds_two_files_and_opens_as_the_same_model(folder, build):
    assert sorted(file.name for file in folder.iterdir()) == ["config.json", "model.safetensors"]
    again = GPTModel.from_pretrained(folder)
    assert again.cfg == build().cfg
    assert again.state_dict().keys() == build().state_dict().keys()
    assert same_weights(again, build())


def test_attention_set_on_a_live_model_is_not_written_into_its_cfg(build, tmp_path):
    model = build()
    model.set_attention("eager")
    model.save_pretrained(tmp_path)
    assert GPTModel.from_pretrained(tmp_path).cfg == model.cfg


def test_saving_twice_replaces_the_model(folder, build):
    other = build(seed=9)
    other.save_pretrained(str(folder))
    assert same_weights(GPTModel.from_pretrained(folder), other)
    assert len(list(folder.iterdir())) == 2


def test_a_model_in_training_is_saved_as_it_is_and_goes_on(build, tmp_path):
    model = build(drop_rate=0.1).train()
    model.save_pretrained(tmp_path)
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert same_weights(GPTModel.from_pretrained(tmp_path), model)


def test_a_folder_that_cannot_be_written_is_refused_and_nothing_is_lost(build, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    for folder in (tmp_path / "notes.txt", tmp_path / "notes.txt" / "model"):
        with pytest.raises(OSError, match="cannot write the model to"):
            build().save_pretrained(folder)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()], ids=["disk full", "ctrl-c"])
@pytest.mark.parametrize("fails", ["model.safetensors", "config.json"])
def test_an_interrupted_save_leaves_the_old_model_whole_and_no_partial_files(fails, error, folder, build, monkeypatch):
    def half_written(_weights, path, **_):
        with open(path, "wb") as file:
            file.write(b"half of the weights")
        raise error

    def half_a_text(self, text, **_):
        self.write_bytes(text[: len(text) // 2].encode())
        raise error

    if fails == "model.safetensors":
        monkeypatch.setattr(saved_form, "save_file", half_written)
    else:
        monkeypatch.setattr(type(folder), "write_text", half_a_text)
    with pytest.raises(type(error)):
        build(seed=9, n_heads=3).save_pretrained(folder)  # the same shapes: a mixture of the two would open
    monkeypatch.undo()
    assert sorted(file.name for file in folder.iterdir()) == ["config.json", "model.safetensors"]
    again = GPTModel.from_pretrained(folder)
    assert again.cfg == build().cfg
    assert same_weights(again, build())


def test_files_appear_under_their_names_only_when_they_are_whole(build, tmp_path, monkeypatch):
    """A reader never meets a half-written file: the weights go to another name first."""
    written = []
    real = saved_form.save_file

    def watch(weights, path, **options):
        written.append(os.path.basename(path))
        real(weights, path, **options)

    monkeypatch.setattr(saved_form, "save_file", watch)
    build().save_pretrained(tmp_path)
    assert len(written) == 1
    assert written[0] != "model.safetensors"


def test_config_json_tells_transformers_the_whole_shape(build, tmp_path):
    build(ff_dim=50, drop_rate=0.2).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    expected = {
        "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "vocab_size": 61, "n_positions": 24, "n_embd": 30,
        "n_head": 5, "n_layer": 2, "n_inner": 50, "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5,
        "embd_pdrop": 0.2, "attn_pdrop": 0.2, "resid_pdrop": 0.2, "tie_word_embeddings": True,
    }  # fmt: skip
    assert {field: config[field] for field in expected} == expected
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")


def spoken(build, **changes) -> GPTModel:
    """A model with a vocabulary that GPT-2's tokenizer fits."""
    return build(torch.float32, vocab_size=50257, emb_dim=10, n_layers=1, **changes)


def test_a_model_saved_with_its_tokenizer_opens_whole_in_transformers_and_here(build, tmp_path):
    model = spoken(build)
    model.save_pretrained(tmp_path, get_tokenizer())
    assert {path.name for path in tmp_path.iterdir()} == {
        "config.json", "model.safetensors", "vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json",
        "special_tokens_map.json",
    }  # fmt: skip
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = "Grüße<|endoftext|>Hello, 世界 🙂"
    ids = theirs(text, return_tensors="pt")["input_ids"]
    assert theirs.model_max_length == 24
    assert tokenizer_from_folder(tmp_path).encode(text) == get_tokenizer().encode(text) == ids[0].tolist()
    expected = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()(ids).logits
    torch.testing.assert_close(GPTModel.from_pretrained(tmp_path)(ids), expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("fails", ["vocab.json", "tokenizer.json", "config.json"])
def test_a_save_that_breaks_at_a_tokenizer_file_leaves_the_old_folder_whole(fails, build, tmp_path, monkeypatch):
    spoken(build).save_pretrained(tmp_path, get_tokenizer())
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    real = type(tmp_path).write_text

    def breaks(self, text, **options):
        if f".{fails}." in self.name:
            self.write_bytes(text[: len(text) // 2].encode())
            raise OSError("disk full")
        return real(self, text, **options)

    monkeypatch.setattr(type(tmp_path), "write_text", breaks)
    with pytest.raises(OSError, match=r"cannot write the model to .*disk full"):
        spoken(build, seed=9).save_pretrained(tmp_path, get_tokenizer())
    monkeypatch.undo()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_tokenizer_of_more_tokens_than_the_model_is_refused_before_anything_is_written(build, tmp_path):
    with pytest.raises(ValueError, match="the tokenizer has 50257 tokens, and the model 61"):
        build().save_pretrained(tmp_path / "model", get_tokenizer())
    with pytest.raises(ValueError, match="the tokenizer 'tales' has no files of this kind"):
        spoken(build).save_pretrained(tmp_path / "model", make_tokenizer("tales"))
    assert not (tmp_path / "model").exists()
    spoken(build).save_pretrained(tmp_path / "model", make_tokenizer("gpt2"))  # under the name that training gives it
    assert tokenizer_from_folder(tmp_path / "model") is get_tokenizer()


def test_a_quantised_model_is_not_saved_as_if_it_were_not(build, tmp_path):
    model = build()
    model.blocks[0].register_buffer("W_int8", torch.zeros(3, 3, dtype=torch.int8))
    with pytest.raises(ValueError, match=r"this model has weights in torch\.int8, which no format here holds"):
        model.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()


# --- the GELU through erf: a GPT-2 to Hugging Face, of another activation_function ---------------------


def perturbed_of_transformers(perturb, activation: str, **changes) -> transformers.GPT2LMHeadModel:
    """A GPT-2 as transformers builds it, in float64, in which every weight matters."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 61, "n_positions": 24, "n_embd": 30, "n_head": 5, "n_layer": 2, "bos_token_id": 0}
    config = transformers.GPT2Config(**sizes, eos_token_id=0, activation_function=activation, **changes)
    return perturb(transformers.GPT2LMHeadModel(config)).double().eval()


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    return (one - other).abs().max().item()


@pytest.mark.parametrize("untied", [False, True], ids=["tied", "untied"])
@pytest.mark.parametrize(
    ("activation", "mlp", "other"),
    [("gelu_new", "gelu", "gelu_exact"), ("gelu_pytorch_tanh", "gelu", "gelu_exact"), ("gelu", "gelu_exact", "gelu")],
)
@torch.no_grad()
def test_a_folder_of_transformers_opens_with_the_gelu_that_its_config_names(
    activation, mlp, other, untied, perturb, tmp_path, random_ids, caplog
):
    theirs, ids = perturbed_of_transformers(perturb, activation, tie_word_embeddings=not untied), random_ids(2, 24)
    theirs.save_pretrained(tmp_path)
    expected = theirs(ids).logits
    with caplog.at_level(logging.WARNING, "GPT2Model"):
        ours = GPTModel.from_pretrained(tmp_path)
        GPTModel.from_pretrained(tmp_path, {"mlp": mlp})  # said again
    assert caplog.text == ""
    assert ours.cfg["mlp"] == mlp
    assert apart(ours(ids), expected) < 1e-11
    asked = GPTModel.from_pretrained(tmp_path, {"mlp": other})  # an explicit wish, as nanoGPT has of OpenAI's weights
    assert f"says mlp={mlp!r}, and cfg {other!r}: the same weights with another GELU" in caplog.text
    assert asked.cfg["mlp"] == other
    assert 1e-6 < apart(asked(ids), expected) < 1e-2 * expected.abs().max()


@pytest.mark.parametrize("changes", [{}, {"n_kv_heads": 1, "qkv_bias": False}, {"ff_dim": 50, "tie_weights": False}],
                         ids=str)  # fmt: skip
@torch.no_grad()
def test_a_model_with_the_exact_gelu_is_saved_as_a_gpt2_that_transformers_computes_alike(
    changes, build, tmp_path, random_ids, caplog
):
    model, ids = build(mlp="gelu_exact", **changes), random_ids(2, 24)
    with caplog.at_level(logging.WARNING):
        model.save_pretrained(tmp_path)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64).eval()
        again = GPTModel.from_pretrained(tmp_path)
    assert "GPT2Model" not in {record.name for record in caplog.records}
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["model_type"], config["activation_function"]) == ("gpt2", "gelu")
    assert apart(theirs(ids).logits, model(ids)) < 1e-11
    assert apart(build(**changes)(ids), model(ids)) > 1e-6
    assert again.cfg == model.cfg
    assert same_weights(again, model)
    theirs.save_pretrained(tmp_path / "back")  # which keeps our dict in its config
    assert apart(GPTModel.from_pretrained(tmp_path / "back")(ids), model(ids)) < 1e-11


def test_a_folder_may_be_opened_with_the_other_gelu_and_a_warning_says_what_that_changes(build, tmp_path, caplog):
    """The cfg of a preset is complete: passed for a folder, it would change the mathematics unseen."""
    model = build(mlp="gelu_exact")
    model.save_pretrained(tmp_path)
    asked = GPTModel.from_pretrained(tmp_path, build().cfg)
    assert asked.cfg == build().cfg
    assert same_weights(asked, model)
    assert caplog.text.count("the same weights with another GELU, whose logits differ in the fourth digit") == 1
    message = refused(tmp_path, {"mlp": "gelu", "ff_dim": 50})  # what does not fit is said without it
    assert "says ff_dim=None, and cfg 50: leave it out of cfg" in message
    assert "mlp=" not in message
    assert "ff_dim" not in refused(tmp_path, {"ff_dim": 120, "context_length": 12})  # 4 * emb_dim, as stored
    assert GPTModel.from_pretrained(tmp_path, {"mlp": "gelu", "ff_dim": 120}).cfg["ff_dim"] == 120
    assert "says mlp='gelu_exact', and cfg 'swiglu': leave it out" in refused(tmp_path, {"mlp": "swiglu"})
    assert "'mlp' must be 'gelu' or 'gelu_exact' or 'swiglu'" in refused(tmp_path, {"mlp": "relu"})


# --- what is no GPT-2 --------------------------------------------------------------------------------

VARIANTS = {
    "rmsnorm": {"norm": "rmsnorm"},
    "swiglu": {"mlp": "swiglu"},
    "rope": {"positions": "rope"},
    "rope and the exact gelu": {"positions": "rope", "mlp": "gelu_exact"},
    "all": {"norm": "rmsnorm", "mlp": "swiglu", "positions": "rope", "n_kv_heads": 1},
    "all, untied, without biases": {"norm": "rmsnorm", "mlp": "swiglu", "positions": "rope", "n_kv_heads": 1,
                                    "tie_weights": False, "qkv_bias": False, "ff_dim": 44},
}  # fmt: skip
GPT2S = {"norm": "layernorm", "mlp": "gelu", "positions": "learned"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=["fp32", "fp64", "bf16"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_is_saved_under_our_own_names_and_opens_bit_for_bit(
    variant, dtype, build, tmp_path, random_ids, caplog
):
    model, ids = build(dtype, **VARIANTS[variant]), random_ids(2, 24)
    with caplog.at_level(logging.WARNING, "GPT2Model"):
        model.save_pretrained(tmp_path)
    others = {name: value for name, value in VARIANTS[variant].items() if name in GPT2S and value != "gelu_exact"}
    for name, value in others.items():  # every key that is why, in the log and in the file
        phrase = f"{name}={value!r}, where GPT-2 has {GPT2S[name]!r}"
        assert phrase in caplog.text
        assert phrase in json.loads((tmp_path / "config.json").read_text())["n_layer"]
    assert caplog.text.count("where GPT-2 has") == len(others)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "gpt2-from-scratch"
    assert "transformers does not open" in caplog.text
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    assert set(load_file(tmp_path / "model.safetensors")) == {
        name for name in model.state_dict() if name != "head.weight" or not model.cfg["tie_weights"]
    }
    again = GPTModel.from_pretrained(tmp_path)
    assert again.cfg == model.cfg
    assert again.state_dict().keys() == model.state_dict().keys()
    assert {tensor.dtype for tensor in again.state_dict().values()} == {dtype}
    assert same_weights(again, model)
    with torch.no_grad():
        assert torch.equal(again(ids), model(ids))


def test_a_gpt2_is_saved_in_silence_as_before(build, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "GPT2Model"):
        build(n_kv_heads=1, tie_weights=False).save_pretrained(tmp_path)
    assert caplog.text == ""
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "gpt2"


@pytest.mark.parametrize("opener", ["AutoModelForCausalLM", "GPT2LMHeadModel", "AutoConfig"])
@pytest.mark.parametrize("variant", ["rmsnorm", "all"])
def test_transformers_refuses_a_variant_and_never_draws_weights_at_random(variant, opener, build, tmp_path):
    build(torch.float32, **VARIANTS[variant]).save_pretrained(tmp_path)
    with pytest.raises(Exception, match=r"gpt2-from-scratch|this is no GPT-2: norm='rmsnorm'"):
        getattr(transformers, opener).from_pretrained(tmp_path)


@pytest.mark.parametrize("changes", [
    {"norm": "layernorm"}, {"mlp": "gelu"}, {"positions": "learned"}, {"n_kv_heads": 5}, {"n_heads": 3}, {"ff_dim": 81},
], ids=str)  # fmt: skip
def test_a_variant_s_folder_is_not_opened_as_another_model(changes, build, tmp_path):
    build(**VARIANTS["all"]).save_pretrained(tmp_path)
    assert "does not fit the cfg dict" in refused(tmp_path, changes) or "says n_heads=5" in refused(tmp_path, changes)
    assert GPTModel.from_pretrained(tmp_path, {"use_flash": False}).attention_report()["chosen"] == "eager"


@pytest.mark.parametrize("changes", [VARIANTS["rmsnorm"], VARIANTS["swiglu"], VARIANTS["rope"]], ids=str)
def test_the_weights_of_a_gpt2_are_not_opened_as_a_variant(changes, folder, build):
    assert "does not fit the cfg dict" in refused(folder, changes)
    assert "does not fit the cfg dict" in refused(build().state_dict(), build().cfg | changes)


def test_everything_that_makes_a_folder_another_model_is_said_at_once_with_what_to_do(folder, build):
    changes = {"norm": "rmsnorm", "mlp": "swiglu", "positions": "rope", "n_kv_heads": 1}
    message = refused(folder, changes)
    assert message.startswith(f"{folder / 'config.json'} says ")
    for key, stored in {"norm": "layernorm", "mlp": "gelu", "positions": "learned", "n_kv_heads": None}.items():
        assert f"{key}={stored!r}, and cfg {changes[key]!r}" in message
    assert "leave them out of cfg" in message
    assert f"{folder / 'model.safetensors'} does not fit the cfg dict:" in message
    different = "has 5 different key-value heads, and cfg says n_kv_heads=1"
    assert f"blocks 0 and 1: attention.W_qkv.weight {different}" in message
    assert f"blocks 0 and 1: attention.W_qkv.bias {different}" in message
    assert "blocks 0 and 1: feed_forward.gate_proj.weight is missing" in message
    assert message.count("W_qkv") == 2  # their shapes are not named beside it
    both = refused(folder, {**changes, "n_heads": 3, "drop_rate": 0.5})
    assert all(f"{key}=" in both for key in ("n_heads", *changes))
    assert "drop_rate" not in both
    assert "leave it out of cfg" in refused(folder, {"mlp": "swiglu", "n_kv_heads": 5})


def test_the_folder_of_a_rope_model_opens_with_a_longer_context(build, tmp_path, random_ids):
    """No weight knows how long a text may be: the same numbers where both can read it."""
    model, ids = build(**VARIANTS["rope"]), random_ids(2, 24)
    model.save_pretrained(tmp_path)
    longer = GPTModel.from_pretrained(tmp_path, {"context_length": 48})
    with torch.no_grad():
        assert torch.equal(longer(ids), model(ids))
        assert longer(random_ids(1, 48)).isfinite().all()


def test_a_config_of_ours_with_something_else_in_it_is_refused_by_name(build, tmp_path):
    build(**VARIANTS["all"]).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "rope_scaling": {"factor": 8}, "window": 4}))
    assert "unknown here: rope_scaling, window" in refused(tmp_path)
    file.write_text(json.dumps({key: value for key, value in config.items() if key != "gpt2_from_scratch_cfg"}))
    assert "gpt2_from_scratch_cfg is missing" in refused(tmp_path)
    file.write_text(json.dumps({**config, "gpt2_from_scratch_cfg": {**build().cfg, "norm": "batchnorm"}}))
    assert "'norm' must be 'layernorm' or 'rmsnorm'" in refused(tmp_path)


def test_a_llama_is_refused_by_the_name_of_its_type(tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=61, **sizes)).save_pretrained(tmp_path)
    message = refused(tmp_path)
    assert "model_type = 'llama', where only 'gpt2' is computed here" in message
    assert "hidden_size = 32 is unknown here" in message


def test_the_folder_of_a_run_opens_as_its_final_model_or_else_its_newest_checkpoint(build, tmp_path):
    old, new, final = (build(seed=seed) for seed in (1, 2, 3))
    old.save_pretrained(tmp_path / "checkpoints" / "step-9")
    new.save_pretrained(tmp_path / "checkpoints" / "step-10")
    (tmp_path / "checkpoints" / "step-11").mkdir()  # nothing in it yet
    ids = torch.arange(6)[None]
    for expected in (new, final):
        opened = GPTModel.from_pretrained(tmp_path)
        with torch.no_grad():
            assert torch.equal(opened(ids), expected.eval()(ids))
        final.save_pretrained(tmp_path / "final")


def test_a_tokenizer_without_files_is_refused_with_where_its_model_lies(build, tmp_path):
    tokenizer = make_tokenizer("char", ["abc"])
    with pytest.raises(ValueError, match=r"'char' has no files of this kind.*RUN/final"):
        build().save_pretrained(tmp_path / "model", tokenizer)
