"""Weights of other projects give here the logits that they give there, and what cannot be honoured is refused by name.

The other models are written out anew in this file, with their names and their arithmetic.
"""

import json
import logging
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from GPT2Model.config import complete
from GPT2Model.gpt2 import GPTModel
from GPT2Model.weights.foreign_configs import cfg_of

# --- LLMs-from-scratch -------------------------------------------------------------------------------

BOOK = {
    "vocab_size": 61, "context_length": 24, "emb_dim": 30, "n_heads": 5, "n_layers": 3, "drop_rate": 0.1,
    "qkv_bias": False,
}  # fmt: skip


class BookNorm(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x):
        mean = x.mean(-1, keepdim=True)
        variance = ((x - mean) ** 2).mean(-1, keepdim=True)
        return self.scale * (x - mean) / torch.sqrt(variance + 1e-5) + self.shift


class BookGELU(nn.Module):
    def forward(self, x):
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


class BookAttention(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        width = cfg["emb_dim"]
        self.heads = cfg["n_heads"]
        self.W_query, self.W_key, self.W_value = (nn.Linear(width, width, bias=cfg["qkv_bias"]) for _ in range(3))
        self.out_proj = nn.Linear(width, width)
        self.register_buffer("mask", torch.ones(cfg["context_length"], cfg["context_length"]).triu(1))

    def forward(self, x):
        B, T, width = x.shape
        q, k, v = (
            projection(x).view(B, T, self.heads, -1).transpose(1, 2)
            for projection in (self.W_query, self.W_key, self.W_value)
        )
        scores = (q @ k.mT).masked_fill(self.mask[:T, :T].bool(), -torch.inf)
        weights = torch.softmax(scores / (width // self.heads) ** 0.5, dim=-1)
        return self.out_proj((weights @ v).transpose(1, 2).reshape(B, T, width))


class BookBlock(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        width = cfg["emb_dim"]
        self.att = BookAttention(cfg)
        self.ff = nn.Module()
        self.ff.layers = nn.Sequential(nn.Linear(width, 4 * width), BookGELU(), nn.Linear(4 * width, width))
        self.norm1, self.norm2 = BookNorm(width), BookNorm(width)

    def forward(self, x):
        x = self.att(self.norm1(x)) + x
        return self.ff.layers(self.norm2(x)) + x


class BookModel(nn.Module):
    """The model of the book, without its dropouts (which eval mode turns off)."""

    def __init__(self, cfg):
        super().__init__()
        self.tok_emb = nn.Embedding(cfg["vocab_size"], cfg["emb_dim"])
        self.pos_emb = nn.Embedding(cfg["context_length"], cfg["emb_dim"])
        self.trf_blocks = nn.Sequential(*(BookBlock(cfg) for _ in range(cfg["n_layers"])))
        self.final_norm = BookNorm(cfg["emb_dim"])
        self.out_head = nn.Linear(cfg["emb_dim"], cfg["vocab_size"], bias=False)

    def forward(self, ids):
        x = self.tok_emb(ids) + self.pos_emb(torch.arange(ids.shape[1]))
        return self.out_head(self.final_norm(self.trf_blocks(x)))


@pytest.fixture(params=[False, True], ids=["no qkv bias", "qkv bias"])
def book_cfg(request) -> dict:
    return {**BOOK, "qkv_bias": request.param}


@pytest.fixture
def book(book_cfg, perturb) -> BookModel:
    torch.manual_seed(0)
    return perturb(BookModel(book_cfg)).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("way", ["in memory", "pth", "wrapped", "safetensors"])
def test_a_model_of_the_book_gives_its_own_logits_here(way, dtype, book, book_cfg, tmp_path, random_ids):
    book = book.to(dtype)
    weights, before = book.state_dict(), dict(book_cfg)
    source = weights
    if way == "pth":
        source = tmp_path / "model.pth"
        torch.save(weights, source)
    elif way == "wrapped":
        source = tmp_path / "model_and_optimizer.pth"
        torch.save({"model_state_dict": weights, "optimizer_state_dict": {"state": {}, "param_groups": []}}, source)
    elif way == "safetensors":
        source = str(tmp_path / "model.safetensors")
        save_file(weights, source)
    names = list(weights)
    model = GPTModel.from_pretrained(source, book_cfg)
    assert book_cfg == before
    assert list(weights) == names  # nor is the state dict changed
    assert model.cfg["tie_weights"] is False  # nobody said so but the weights
    assert model.cfg["qkv_bias"] is book_cfg["qkv_bias"]
    assert not model.training
    ids = random_ids(2, 24)
    torch.testing.assert_close(model(ids), book(ids), atol=1e-11 if dtype == torch.float64 else 2e-5, rtol=0)


def test_the_book_s_fast_model_gives_its_own_logits_here(book, book_cfg, random_ids):
    """The same network with torch's own layers: queries, keys and values are one projection, the norms have weights."""
    weights = {}
    for name, weight in book.state_dict().items():
        if ".W_query." in name:
            parts = [book.state_dict()[name.replace("W_query", kind)] for kind in ("W_query", "W_key", "W_value")]
            weights[name.replace("W_query", "qkv")] = torch.cat(parts)
        elif "W_key" not in name and "W_value" not in name and not name.endswith("mask"):
            plain = name.replace("scale", "weight").replace("shift", "bias").replace("att.out_proj", "att.proj")
            weights[plain] = weight
    ids = random_ids(2, 24)
    torch.testing.assert_close(GPTModel.from_pretrained(weights, book_cfg)(ids), book(ids), atol=2e-5, rtol=0)


def test_separate_projections_that_do_not_fit_together_are_named(book, book_cfg):
    weights = {**book.state_dict(), "trf_blocks.1.att.W_key.weight": torch.zeros(30, 31)}
    with pytest.raises(ValueError, match=r"blocks\.1\.attention\.W_key\.weight is not part") as caught:
        GPTModel.from_pretrained(weights, book_cfg)
    assert "blocks.1.attention.W_qkv.weight is missing" in str(caught.value)


def test_a_head_that_differs_is_never_tied_in_silence(book, book_cfg):
    with pytest.raises(ValueError, match="head that differs from its embedding, and cfg says tie_weights=True"):
        GPTModel.from_pretrained(book.state_dict(), {**book_cfg, "tie_weights": True})


def test_a_head_that_equals_the_embedding_is_tied(book, book_cfg, random_ids):
    """So it is in the book's own model once OpenAI's weights are in it."""
    with torch.no_grad():
        book.out_head.weight.copy_(book.tok_emb.weight)
    model = GPTModel.from_pretrained(book.state_dict(), book_cfg)
    assert model.head.weight is model.token_embedding.weight
    torch.testing.assert_close(model(random_ids(2, 24)), book(random_ids(2, 24)), atol=2e-5, rtol=0)


def test_a_cfg_with_the_other_bias_is_refused(book, book_cfg):
    with pytest.raises(ValueError, match=r"blocks 0 to 2: attention\.W_qkv\.bias is"):
        GPTModel.from_pretrained(book.state_dict(), {**book_cfg, "qkv_bias": not book_cfg["qkv_bias"]})


# --- nanoGPT, and OpenAI's files on the hub ----------------------------------------------------------


def nanogpt_weights(layers=2, width=30, vocabulary=61, context=24) -> dict[str, torch.Tensor]:
    """A state dict with nanoGPT's names: weights are (out, in), a block keeps its causal mask, the head is tied."""
    torch.manual_seed(0)
    weights = {
        "transformer.wte.weight": torch.randn(vocabulary, width), "transformer.wpe.weight": torch.randn(context, width),
        "transformer.ln_f.weight": torch.randn(width), "transformer.ln_f.bias": torch.randn(width),
    }  # fmt: skip
    for i in range(layers):
        block = f"transformer.h.{i}"
        for name, out, into in (
            ("attn.c_attn", 3 * width, width), ("attn.c_proj", width, width),
            ("mlp.c_fc", 4 * width, width), ("mlp.c_proj", width, 4 * width),
        ):  # fmt: skip
            weights[f"{block}.{name}.weight"] = torch.randn(out, into) / into**0.5
            weights[f"{block}.{name}.bias"] = torch.randn(out)
        for name in ("ln_1", "ln_2"):
            weights[f"{block}.{name}.weight"], weights[f"{block}.{name}.bias"] = torch.randn(2, width)
        weights[f"{block}.attn.bias"] = torch.ones(1, 1, context, context).tril()
    weights["lm_head.weight"] = weights["transformer.wte.weight"]
    return {name: weight.double() for name, weight in weights.items()}


def nanogpt_logits(w: dict[str, torch.Tensor], ids: torch.Tensor, heads=5, gelu="none") -> torch.Tensor:
    """gelu: "none", through erf, as since May 2023; "tanh", as before, and as in OpenAI's GPT-2."""
    B, T = ids.shape
    width = w["transformer.wte.weight"].shape[1]
    layers = sum(name.endswith("attn.c_attn.weight") for name in w)

    def norm(x, name):
        return F.layer_norm(x, (width,), w[f"{name}.weight"], w[f"{name}.bias"], 1e-5)

    def linear(x, name):
        return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

    x = w["transformer.wte.weight"][ids] + w["transformer.wpe.weight"][:T]
    for i in range(layers):
        block = f"transformer.h.{i}"
        q, k, v = (
            part.view(B, T, heads, -1).transpose(1, 2)
            for part in linear(norm(x, f"{block}.ln_1"), f"{block}.attn.c_attn").split(width, 2)
        )
        scores = q @ k.mT * (width // heads) ** -0.5
        scores = scores.masked_fill(w[f"{block}.attn.bias"][:, :, :T, :T] == 0, -torch.inf)
        mixed = (scores.softmax(-1) @ v).transpose(1, 2).reshape(B, T, width)
        x = x + linear(mixed, f"{block}.attn.c_proj")
        inner = F.gelu(linear(norm(x, f"{block}.ln_2"), f"{block}.mlp.c_fc"), approximate=gelu)
        x = x + linear(inner, f"{block}.mlp.c_proj")
    return norm(x, "transformer.ln_f") @ w["lm_head.weight"].T


NANO = {"vocab_size": 61, "context_length": 24, "emb_dim": 30, "n_heads": 5, "n_layers": 2}


@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module.", "module._orig_mod.", "_orig_mod.module."])
@pytest.mark.parametrize("wrapped", [False, True], ids=["bare", "wrapped"])
def test_a_model_of_nanogpt_gives_its_own_logits_here(prefix, wrapped, tmp_path, random_ids):
    weights = nanogpt_weights()
    stored = {f"{prefix}{name}": weight for name, weight in weights.items()}
    checkpoint = {"model": stored, "optimizer": {}, "iter_num": 5, "model_args": {"n_layer": 2}} if wrapped else stored
    torch.save(checkpoint, tmp_path / "ckpt.pt")
    for mlp, gelu in (("gelu_exact", "none"), ("gelu", "tanh")):  # the cfg decides
        model = GPTModel.from_pretrained(tmp_path / "ckpt.pt", {**NANO, "mlp": mlp})
        assert model.cfg["tie_weights"] is True
        assert model.cfg["mlp"] == mlp
        ids = random_ids(2, 24)
        torch.testing.assert_close(model(ids), nanogpt_logits(weights, ids, gelu=gelu), atol=1e-11, rtol=0)


ARGS = {"n_layer": 2, "n_head": 5, "n_embd": 30, "block_size": 24, "vocab_size": 61, "dropout": 0.1, "bias": True}


def checkpoint(weights, **changes) -> dict:
    """What nanoGPT's train.py saves in ckpt.pt."""
    return {
        "model": weights, "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 1e-3}]},
        "model_args": {**ARGS, **changes}, "iter_num": 5, "best_val_loss": torch.tensor(3.2),
        "config": {"dataset": "shakespeare_char", "compile": True, "learning_rate": 1e-3},
    }  # fmt: skip


@pytest.mark.parametrize("way", ["file", "folder", "in memory"])
def test_a_checkpoint_of_nanogpt_brings_its_own_cfg(way, tmp_path, random_ids):
    weights, ids = nanogpt_weights(), random_ids(2, 24)
    source = checkpoint({f"_orig_mod.{name}": weight for name, weight in weights.items()})
    if way != "in memory":
        torch.save(source, tmp_path / "ckpt.pt")
        source = tmp_path / "ckpt.pt" if way == "file" else tmp_path
    model = GPTModel.from_pretrained(source)
    sizes = {"vocab_size": 61, "context_length": 24, "emb_dim": 30, "n_heads": 5, "n_layers": 2, "drop_rate": 0.1}
    assert model.cfg == complete({**sizes, "mlp": "gelu_exact"})
    torch.testing.assert_close(model(ids), nanogpt_logits(weights, ids), atol=1e-11, rtol=0)
    assert GPTModel.from_pretrained(source, {"drop_rate": 0.0, "use_flash": False}).cfg["drop_rate"] == 0.0
    with pytest.raises(ValueError, match=r"says n_heads=5, and cfg 3: leave it out of cfg"):
        GPTModel.from_pretrained(source, {"n_heads": 3})
    with pytest.raises(
        ValueError, match=r"(?s)says context_length=24, and cfg 12: leave.*position_embedding\.weight has"
    ):
        GPTModel.from_pretrained(source, {"context_length": 12})


@pytest.mark.parametrize("said", ["by model_args", "by cfg", "not at all"])
def test_a_nanogpt_without_biases_opens_exactly_with_biases_of_zero(said, tmp_path, random_ids):
    weights, ids = nanogpt_weights(), random_ids(2, 24)
    zero = {n: torch.zeros_like(w) if n.endswith(".bias") and ".attn.bias" not in n else w for n, w in weights.items()}
    bare = {name: w for name, w in weights.items() if not name.endswith(".bias") or ".attn.bias" in name}
    exact = {**NANO, "mlp": "gelu_exact"}
    source, cfg = (checkpoint(bare, bias=False), None) if said == "by model_args" else (bare, exact)
    if said == "by cfg":
        cfg = {**exact, "qkv_bias": False}
    model = GPTModel.from_pretrained(source, cfg)
    assert model.cfg["qkv_bias"] is (said == "not at all")
    expected = nanogpt_logits(zero, ids)
    torch.testing.assert_close(model(ids), expected, atol=1e-11, rtol=0)
    model.save_pretrained(tmp_path)  # and goes out as a GPT-2 whose biases are zero
    torch.testing.assert_close(GPTModel.from_pretrained(tmp_path)(ids), expected, atol=1e-11, rtol=0)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64).eval()
    torch.testing.assert_close(theirs(ids).logits, expected, atol=1e-11, rtol=0)
    one = {**bare, "transformer.ln_f.bias": weights["transformer.ln_f.bias"]}  # some biases are no model of nanoGPT's
    with pytest.raises(ValueError, match=r"blocks 0 and 1: norm_1\.bias is missing"):
        GPTModel.from_pretrained(one, NANO)


def test_biases_that_a_hugging_face_file_lacks_are_never_made_up():
    weights = {name: weight.T if weight.ndim == 2 and ".h." in name else weight
               for name, weight in nanogpt_weights().items() if not name.endswith(".bias")}  # fmt: skip
    with pytest.raises(ValueError, match=r"blocks 0 and 1: norm_1\.bias is missing"):
        GPTModel.from_pretrained(weights, NANO)


def test_a_checkpoint_whose_model_args_are_not_whole_or_not_nanogpt_s_is_refused_by_name():
    weights = nanogpt_weights()
    with pytest.raises(ValueError, match=r"(?s)'vocab_size' is missing.*'emb_dim' is missing"):
        GPTModel.from_pretrained({"model": weights, "model_args": {"n_layer": 2, "n_head": 5, "block_size": 24}})
    with pytest.raises(ValueError, match="model_args: rotary = True is unknown here"):
        GPTModel.from_pretrained(checkpoint(weights, rotary=True))


LAYOUT = "has the layout of nanoGPT, whose GELU is by erf since May 2023 (mlp='gelu_exact') and was GPT-2's, by tanh"


def opened(source, cfg, caplog) -> tuple[GPTModel, str]:
    """The model, and the line about its GELU."""
    caplog.clear()
    with caplog.at_level(logging.INFO, "GPT2Model"):
        model = GPTModel.from_pretrained(source, cfg)
    (line,) = [record for record in caplog.records if record.name == "GPT2Model"]
    assert line.levelname == "INFO"
    assert LAYOUT in line.getMessage()
    return model, line.getMessage()


def test_a_checkpoint_of_nanogpt_has_the_exact_gelu_unless_the_cfg_asks_for_the_older(caplog, random_ids):
    """No checkpoint says which of the two it was trained with; one line does, and how to have the other."""
    weights, ids = nanogpt_weights(), random_ids(2, 24)
    today, older = nanogpt_logits(weights, ids), nanogpt_logits(weights, ids, gelu="tanh")
    assert (today - older).abs().max() > 1e-5
    model, line = opened(checkpoint(weights), None, caplog)
    assert line.endswith("This model computes mlp='gelu_exact'; cfg={'mlp': 'gelu'} opens it as the other.")
    torch.testing.assert_close(model(ids), today, atol=1e-11, rtol=0)
    model, line = opened(checkpoint(weights), {"mlp": "gelu"}, caplog)
    assert line.endswith("This model computes mlp='gelu'; cfg={'mlp': 'gelu_exact'} opens it as the other.")
    torch.testing.assert_close(model(ids), older, atol=1e-11, rtol=0)


def test_of_nanogpt_s_weights_alone_the_cfg_decides_and_one_that_says_nothing_means_gpt2_s(caplog, random_ids):
    """They may be of another project with the same names; what a missing key means is in the table of keys."""
    weights, ids = nanogpt_weights(), random_ids(2, 24)
    for cfg, gelu in ((NANO, "tanh"), (NANO | {"mlp": "gelu"}, "tanh"), (NANO | {"mlp": "gelu_exact"}, "none")):
        model, line = opened(weights, cfg, caplog)
        assert f"This model computes mlp={model.cfg['mlp']!r};" in line
        torch.testing.assert_close(model(ids), nanogpt_logits(weights, ids, gelu=gelu), atol=1e-11, rtol=0)


def test_nothing_is_said_of_nanogpt_where_the_weights_have_another_layout(caplog, build, tmp_path):
    build(mlp="gelu_exact").save_pretrained(tmp_path)
    with caplog.at_level(logging.INFO, "GPT2Model"):
        GPTModel.from_pretrained(tmp_path)
        GPTModel.from_pretrained(build().state_dict(), build().cfg)
    assert "nanoGPT" not in caplog.text
    with pytest.raises(ValueError, match=r"says mlp='gelu_exact', and cfg 'swiglu': leave it out of cfg"):
        GPTModel.from_pretrained(checkpoint(nanogpt_weights()), {"mlp": "swiglu"})


@pytest.mark.parametrize("masks", [(), ("attn.bias",), ("attn.bias", "attn.masked_bias")], ids=str)
@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_openai_s_own_files_without_the_prefix_and_with_mask_buffers_open(masks, file, tmp_path, random_ids):
    weights = nanogpt_weights()
    stored = {}
    for name, weight in weights.items():
        name = name.removeprefix("transformer.")
        if name == "lm_head.weight" or name.endswith(".attn.bias"):
            continue
        stored_in_out = weight.ndim == 2 and name.startswith("h.")
        stored[name] = (weight.T if stored_in_out else weight).clone().contiguous()
    for i in range(2):
        for mask in masks:
            stored[f"h.{i}.{mask}"] = torch.tensor(-1e4) if "masked" in mask else torch.ones(1, 1, 24, 24).tril()
    save_file(stored, tmp_path / file) if file.endswith("safetensors") else torch.save(stored, tmp_path / file)
    config = {"model_type": "gpt2", "vocab_size": 61, "n_positions": 24, "n_ctx": 24, "n_embd": 30, "n_head": 5,
              "n_layer": 2}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    ids = random_ids(2, 24)
    torch.testing.assert_close(
        GPTModel.from_pretrained(tmp_path)(ids),
        nanogpt_logits(weights, ids, gelu="tanh"),
        atol=2e-5 if masks else 1e-11,
        rtol=0,
    )


# --- fields of a Hugging Face config -----------------------------------------------------------------

PUBLISHED = {  # config.json of gpt2 on the hub
    "activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.1, "bos_token_id": 50256,
    "embd_pdrop": 0.1, "eos_token_id": 50256, "initializer_range": 0.02, "layer_norm_epsilon": 1e-05,
    "model_type": "gpt2", "n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12, "n_positions": 1024,
    "resid_pdrop": 0.1, "summary_activation": None, "summary_first_dropout": 0.1, "summary_proj_to_labels": True,
    "summary_type": "cls_index", "summary_use_proj": True,
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}}, "vocab_size": 50257,
}  # fmt: skip
GPT2 = complete({"vocab_size": 50257, "context_length": 1024, "emb_dim": 768, "n_heads": 12, "n_layers": 12})
IGNORED = {
    "activation_function": "relu", "layer_norm_epsilon": 1e-6, "scale_attn_by_inverse_layer_idx": True,
    "scale_attn_weights": False, "add_cross_attention": True, "model_type": "llama", "rope_theta": 10000.0,
    "is_encoder_decoder": True, "quantization_config": {"bits": 4},
}  # fmt: skip


def read(config: dict, **changes) -> dict:
    return complete(cfg_of(config, changes, Path("config.json")))


def test_the_published_config_of_gpt2_is_the_preset():
    assert read(PUBLISHED) == GPT2


def test_every_field_that_transformers_writes_today_is_understood():
    for config in (transformers.GPT2Config().to_dict(), transformers.GPT2Config().to_diff_dict()):
        assert read(config) == GPT2
    config = transformers.GPT2Config(
        vocab_size=11, n_positions=7, n_embd=12, n_head=3, n_layer=1, n_inner=20, attn_pdrop=0.0, embd_pdrop=0.0,
        resid_pdrop=0.0, tie_word_embeddings=False,
    )  # fmt: skip
    sizes = {"vocab_size": 11, "context_length": 7, "emb_dim": 12, "n_heads": 3, "n_layers": 1, "ff_dim": 20}
    assert read(config.to_dict()) == complete({**sizes, "drop_rate": 0.0, "tie_weights": False})


@pytest.mark.parametrize("field", IGNORED)
def test_a_field_that_would_be_ignored_is_refused_by_name(field):
    with pytest.raises(ValueError, match=rf"{field} = {IGNORED[field]!r}".replace("{", r"\{")):
        read({**PUBLISHED, field: IGNORED[field]})


def test_all_such_fields_are_named_in_one_message():
    with pytest.raises(ValueError) as caught:
        read({**PUBLISHED, **IGNORED, "resid_pdrop": 0.2})
    message = str(caught.value)
    assert len(message.splitlines()) == 1 + len(IGNORED) + 1
    assert all(f"{field} = {value!r}" in message for field, value in IGNORED.items())
    assert "resid_pdrop differ" in message


def test_a_config_without_a_model_type_is_refused():
    with pytest.raises(ValueError, match="model_type is missing"):
        read({field: value for field, value in PUBLISHED.items() if field != "model_type"})


def test_unknown_fields_that_are_off_do_no_harm_and_differing_dropouts_can_be_decided():
    assert read({**PUBLISHED, "some_new_feature": False, "another": None}) == GPT2
    assert cfg_of({**PUBLISHED, "attn_pdrop": 0.3}, {"drop_rate": 0.2}, Path("c"))["emb_dim"] == 768


def test_our_own_folder_is_refused_too_once_its_config_asks_for_something_else(build, tmp_path):
    build().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "activation_function": "relu"}))
    with pytest.raises(ValueError, match="activation_function = 'relu'"):
        GPTModel.from_pretrained(tmp_path)


def test_key_value_heads_that_differ_are_not_taken_for_shared_ones(build, tmp_path):
    model = build(n_heads=6, n_kv_heads=2)
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["transformer.h.1.attn.c_attn.weight"][0, 30] += 1  # one number of one copy of a key head
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"blocks\.1\.attention\.W_qkv\.weight has 6 different key-value heads"):
        GPTModel.from_pretrained(tmp_path)
