"""GPT-2 here is GPT-2 as transformers computes it: logits, loss, every gradient, and the text it writes.

The oracle is a randomly initialised GPT2LMHeadModel with noise on every parameter. Its weights come in through its own
folder; gradients are mapped by a table written here anew.
"""

import pytest
import torch
import torch.nn.functional as F
import transformers

from GPT2Model.generation import generate
from GPT2Model.gpt2 import GPTModel

SHAPES = {
    "60 wide, 5 heads": {"n_embd": 60, "n_head": 5, "n_layer": 3, "vocab_size": 131, "n_positions": 67},
    "84 wide, 7 heads": {"n_embd": 84, "n_head": 7, "n_layer": 2, "vocab_size": 97, "n_positions": 53},
    "narrow inside": {"n_embd": 36, "n_head": 3, "n_layer": 2, "vocab_size": 61, "n_positions": 51, "n_inner": 50},
}
TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-11}
IMPLEMENTATIONS = ("eager", "sdpa", "flash_tiled")
TILES = {"flash_query_block_size": 16, "flash_kv_block_size": 11}  # several tiles, the last ones cut


@pytest.fixture(scope="module", params=TOLERANCE, ids=["fp32", "fp64"])
def dtype(request):
    return request.param


@pytest.fixture(scope="module", params=SHAPES)
def shape(request) -> dict:
    return SHAPES[request.param]


@pytest.fixture(scope="module")
def oracle(shape, dtype, perturb):
    torch.manual_seed(0)
    config = transformers.GPT2Config(**shape, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0)
    config._attn_implementation = "eager"
    return perturb(transformers.GPT2LMHeadModel(config), scale=0.2).to(dtype).eval()


@pytest.fixture(scope="module")
def folder(oracle, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hugging_face")
    oracle.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=IMPLEMENTATIONS)
def ours(request, folder, dtype) -> GPTModel:
    model = GPTModel.from_pretrained(folder, {"attn_implementation": request.param, **TILES})
    assert model.attention_report()["chosen"] == request.param
    assert model.head.weight.dtype == dtype
    return model


@pytest.fixture(scope="module")
def their_text(oracle, shape, random_ids) -> torch.Tensor:
    """A prompt of 9 tokens and 40 that transformers adds to it, twice."""
    ids = random_ids(2, 9, shape["vocab_size"], seed=1)
    return oracle.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False, pad_token_id=0)


def left_padded(shape: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """ids and mask (4, 29): one row whole, one with 5 places of padding, one with 20, one with a single token."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, shape["vocab_size"], (4, 29), generator=generator)
    padding = torch.tensor([0, 5, 20, 28])
    return ids, torch.arange(29) >= padding[:, None]


def real_positions(mask: torch.Tensor) -> torch.Tensor:
    """Position ids that count real tokens only; transformers takes them from nobody else."""
    return torch.stack([(row.long().cumsum(0) - 1).clamp(min=0) for row in mask])


def gradients_under_our_names(oracle) -> dict[str, torch.Tensor]:
    table = [
        ("transformer.", ""), ("wte.", "token_embedding."), ("wpe.", "position_embedding."), ("ln_f.", "final_norm."),
        ("ln_1.", "norm_1."), ("ln_2.", "norm_2."), ("attn.c_attn.", "attention.W_qkv."),
        ("attn.c_proj.", "attention.out_proj."), ("mlp.c_fc.", "feed_forward.up_proj."),
        ("mlp.c_proj.", "feed_forward.down_proj."), ("lm_head.", "head."),
    ]  # fmt: skip
    found = {}
    for name, parameter in oracle.named_parameters():
        stored_in_out = type(oracle.get_submodule(name.rpartition(".")[0])).__name__ == "Conv1D" and parameter.ndim == 2
        for theirs, own in table:
            name = name.replace(theirs, own)
        name = name.replace("h.", "blocks.", 1) if name.startswith("h.") else name
        found[name] = parameter.grad.T if stored_in_out else parameter.grad
    return found


def assert_same_loss_and_gradients(ours, oracle, our_logits, their_logits, targets, tolerance):
    ours.zero_grad()
    oracle.zero_grad()
    our_loss, their_loss = (F.cross_entropy(logits, targets) for logits in (our_logits, their_logits))
    assert abs(our_loss.item() - their_loss.item()) <= tolerance
    our_loss.backward()
    their_loss.backward()
    expected = gradients_under_our_names(oracle)
    found = {name: parameter.grad for name, parameter in ours.named_parameters()}
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0, f"{name} has no gradient to compare"
        torch.testing.assert_close(found[name], gradient, atol=tolerance, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


def test_logits_loss_and_every_gradient_are_those_of_transformers(ours, oracle, shape, dtype, random_ids):
    ids = random_ids(3, 41, shape["vocab_size"])
    our_logits, their_logits = ours(ids), oracle(ids).logits
    torch.testing.assert_close(our_logits, their_logits, atol=TOLERANCE[dtype], rtol=0)
    assert their_logits.std() > 0.5  # logits near 0 would agree whatever the weights
    targets = ids[:, 1:].flatten()
    flat = (logits[:, :-1].flatten(0, 1) for logits in (our_logits, their_logits))
    assert_same_loss_and_gradients(ours, oracle, *flat, targets, TOLERANCE[dtype])


def test_left_padded_rows_have_the_logits_loss_and_gradients_of_transformers(ours, oracle, shape, dtype):
    ids, mask = left_padded(shape)
    our_logits = ours(ids, mask)
    their_logits = oracle(ids, attention_mask=mask.long(), position_ids=real_positions(mask)).logits
    torch.testing.assert_close(our_logits[mask], their_logits[mask], atol=TOLERANCE[dtype], rtol=0)
    scored = mask[:, :-1]  # a real token, whose next token is then real too
    flat = (logits[:, :-1][scored] for logits in (our_logits, their_logits))
    assert_same_loss_and_gradients(ours, oracle, *flat, ids[:, 1:][scored], TOLERANCE[dtype])


def test_forty_greedy_tokens_are_those_of_transformers_with_and_without_a_cache(ours, their_text):
    assert their_text.shape == (2, 49)
    assert len(set(their_text[:, 9:].flatten().tolist())) > 3  # not one token over and over
    for use_cache in (True, False):
        assert torch.equal(generate(ours, their_text[:, :9], 40, use_cache=use_cache), their_text)


def test_greedy_tokens_after_left_padding_are_those_of_transformers(ours, oracle, shape):
    ids, mask = left_padded(shape)
    expected = oracle.generate(ids, attention_mask=mask.long(), max_new_tokens=20, do_sample=False, pad_token_id=0)
    assert torch.equal(generate(ours, ids, 20, padding_mask=mask), expected)


def test_an_untied_head_is_taken_as_it_is(perturb, tmp_path, random_ids):
    """Its weights are its own, also where they happen to equal the embedding's."""
    config = transformers.GPT2Config(**SHAPES["narrow inside"], tie_word_embeddings=False)
    config._attn_implementation = "eager"
    oracle = perturb(transformers.GPT2LMHeadModel(config)).eval()
    oracle.save_pretrained(tmp_path / "differs")
    model = GPTModel.from_pretrained(tmp_path / "differs")
    assert model.cfg["tie_weights"] is False
    ids = random_ids(2, 20)
    torch.testing.assert_close(model(ids), oracle(ids).logits, atol=2e-5, rtol=0)

    with torch.no_grad():
        oracle.lm_head.weight.copy_(oracle.transformer.wte.weight)
    oracle.save_pretrained(tmp_path / "equals")
    model = GPTModel.from_pretrained(tmp_path / "equals")
    assert model.head.weight is not model.token_embedding.weight
    torch.testing.assert_close(model(ids), oracle(ids).logits, atol=2e-5, rtol=0)


KINDS = {
    "tied": {},
    "untied": {"tie_weights": False},
    "without qkv bias": {"qkv_bias": False},
    "grouped heads": {"n_heads": 6, "n_kv_heads": 2},
    "grouped heads without bias, untied": {"n_heads": 6, "n_kv_heads": 3, "qkv_bias": False, "tie_weights": False},
    "one key-value head, narrow inside": {"n_kv_heads": 1, "ff_dim": 50},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=["fp32", "fp64", "bf16"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_we_save_opens_in_transformers_and_here_as_the_same_model(kind, dtype, build, tmp_path, random_ids):
    model = build(dtype, **KINDS[kind])
    model.save_pretrained(tmp_path)
    theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path, attn_implementation="eager").eval()
    assert theirs.dtype == dtype
    again = GPTModel.from_pretrained(tmp_path)
    assert again.cfg == model.cfg
    expected = model.state_dict()
    assert again.state_dict().keys() == expected.keys()
    for name, tensor in again.state_dict().items():
        assert tensor.dtype == dtype
        assert torch.equal(tensor, expected[name]), name

    ids = random_ids(2, 24)
    if dtype == torch.bfloat16:  # the weights are equal to the bit; sums are compared where rounding does not hide them
        model, theirs = model.float(), theirs.float()
    tolerance = 1e-11 if dtype == torch.float64 else 2e-5
    torch.testing.assert_close(model(ids), theirs(ids).logits, atol=tolerance, rtol=0)


def test_a_folder_written_again_by_transformers_still_opens_here(build, tmp_path, random_ids):
    model = build(torch.float64)
    model.save_pretrained(tmp_path / "ours")
    theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    ids = random_ids(1, 24)
    torch.testing.assert_close(GPTModel.from_pretrained(tmp_path / "theirs")(ids), model(ids), atol=0, rtol=0)
