"""notebooks/inside.ipynb runs whole, and what it finds in the model is what Hugging Face's GPT-2 shows and does.

The oracle is transformers' model with the same weights: its attentions, its hidden states; a head is taken out of it
by zeros in its weights, and a stream is put in by a hook.
"""

import copy
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers

from orchestrator.learning.trained import tales_model
from orchestrator.text import tales
from orchestrator.text.corpora import TalesCorpus
from tests.notebooks.reading import numbers, pictures, printed, the_cell

NOTEBOOK = "inside.ipynb"
STORY = (
    "One Sunday a shy girl named Zoe and her friend the pilot took a red kite to the lake. But a noisy goose stole the "
    "kite. Zoe cried, but the pilot gave the goose some corn and got it back. Then the girl left the lake with the "
    "pilot, the goose and her red kite."
)
HERO, STOP = 7, 28  # where Zoe stands first, and the full stop before she comes again
NAMES = {name for kind in tales.NAMES.values() for name in kind}


@pytest.fixture(scope="module")
def tokenizer():
    return tales.TalesTokenizer()


@pytest.fixture(scope="module")
def oracle(tmp_path_factory):
    """The same weights in Hugging Face's model."""
    folder = tmp_path_factory.mktemp("oracle")
    tales_model(progress=False)[0].save_pretrained(folder)
    return transformers.GPT2LMHeadModel.from_pretrained(folder, attn_implementation="eager").eval()


@pytest.fixture(scope="module")
def row(tokenizer):
    row = torch.tensor([tokenizer.end_of_text, *tokenizer.encode(STORY)])
    words = [tokenizer.decode([i]) for i in row]
    assert (words[HERO], words[STOP], words[STOP + 1]) == ("Zoe", ".", "Zoe")
    return row


@pytest.fixture(scope="module")
def corpus():
    return TalesCorpus(seed=0)


@pytest.fixture(scope="module")
def seen(oracle, row):
    """What transformers shows of its pass over the story."""
    with torch.no_grad():
        return oracle(row[None, :-1], output_attentions=True, output_hidden_states=True)


@pytest.fixture(scope="module")
def copying(oracle, corpus, tokenizer) -> np.ndarray:
    """(layers, heads): the mean weight from before the second mention of a name to the first, over 40 stories."""
    tables = []
    for story in corpus.held_out[:40]:
        words = tales._split(story)
        first, second = [place + 1 for place, word in enumerate(words) if word in NAMES][:2]  # + 1: the start token
        ids = torch.tensor([[tokenizer.end_of_text, *tokenizer.encode(story)]])
        with torch.no_grad():
            attentions = oracle(ids, output_attentions=True).attentions
        tables.append([layer[0, :, second - 1, first].numpy() for layer in attentions])
    return np.mean(tables, axis=0)


def without(oracle, *heads: tuple[int, int]):
    """Hugging Face's model without some (layer, head): the rows of c_proj that read them are zero."""
    other = copy.deepcopy(oracle)
    width = other.config.n_embd // other.config.n_head
    with torch.no_grad():
        for layer, head in heads:
            other.transformer.h[layer].attn.c_proj.weight[head * width : (head + 1) * width] = 0
    return other


@torch.no_grad()
def losses(model, corpus) -> torch.Tensor:
    """(B, T) nats at each position of the first 50 held-out stories; NaN at padding."""
    inputs, targets = corpus.validation[0]
    found = F.cross_entropy(model(inputs).logits.transpose(1, 2), targets, ignore_index=-100, reduction="none")
    return found.masked_fill(targets == -100, float("nan"))


# ------------------------------------------------------------------ what it shows


def test_every_tensor_is_listed_with_its_axes(executed, row):
    text = printed(executed, "value.about")
    tokens, names = len(row) - 1, re.findall(r"^(\S+) +batch 1, (.*?)  ", text, flags=re.MULTILINE)
    assert f"{5 + 2 * 14} tensors of ids (1, {tokens}), attention by sdpa" in text
    assert len(names) == 5 + 14
    axes = dict(names)
    assert axes["blocks.0.attention.queries"] == f"n_heads 4, tokens {tokens}, head_dim 32"
    assert axes["blocks.0.feed_forward.hidden"] == f"tokens {tokens}, ff_dim 512"
    assert axes["logits"] == f"tokens {tokens}, vocab_size 177"
    assert not any("weights" in name for name in axes)  # sdpa forms none


def test_the_statistics_are_those_of_the_streams_that_transformers_shows(executed, seen):
    text = printed(executed, "statistics()")
    values = {"embeddings": seen.hidden_states[0], "blocks.0.output": seen.hidden_states[1], "logits": seen.logits}
    values["final_norm"] = seen.hidden_states[2]  # transformers norms the last one
    for name, tensor in values.items():
        found = numbers(rf"{name} +mean +NUMBER, std +NUMBER, rms +NUMBER, min +NUMBER, max +NUMBER", text)
        tensor = tensor.double()
        root = tensor.square().mean().sqrt()
        expected = [tensor.mean(), tensor.std(correction=0), root, tensor.min(), tensor.max()]
        assert found == pytest.approx([figure.item() for figure in expected], abs=6e-4)


def test_under_sdpa_there_are_no_weights_until_they_are_asked_for(executed):
    text = printed(executed, "recompute=True: {name}")
    assert "KeyError: blocks.0.attention.weights does not exist: attention ran by sdpa" in text
    assert "recompute=True" in text.split("\n\n")[0]
    assert "blocks.0.attention.weights (1, 4, 61, 61), recomputed: True" in text
    weights, logits = numbers(r"recomputed: False; from the .* at most NUMBER; logits at most NUMBER", text)
    assert weights < 1e-5
    assert 0 < logits < 1e-4
    assert len(pictures(executed, "recompute=True: {name}")) == 1


def test_the_parts_sum_up_to_the_lead_that_zoe_has_in_transformers(executed, oracle, seen, row, tokenizer):
    text = printed(executed, "backwards = ")
    zoe, maya = (tokenizer.encode(name)[0] for name in ("Zoe", "Maya"))
    lead = (seen.logits[0, STOP, zoe] - seen.logits[0, STOP, maya]).item()
    parts = re.findall(r"^(\S.*?) +(-?\d+\.\d\d) +(-?\d+\.\d\d)$", text, flags=re.MULTILINE)
    assert [name for name, _, _ in parts] == [
        "token embedding", "position embedding", "block 0, attention", "block 0, feed-forward", "block 1, attention",
        "block 1, feed-forward",
    ]  # fmt: skip
    bias, total, difference = numbers(r"bias NUMBER: NUMBER; the logits' difference: NUMBER", text)
    assert total == pytest.approx(lead, abs=2e-3)
    assert difference == pytest.approx(lead, abs=2e-3)
    assert sum(float(share) for _, _, share in parts) + bias == pytest.approx(lead, abs=0.04)

    added = {}
    modules = {"block 0, attention": oracle.transformer.h[0].attn, "block 1, feed-forward": oracle.transformer.h[1].mlp}
    for name, module in modules.items():
        hook = module.register_forward_hook(lambda _, __, output, name=name: added.__setitem__(name, output))
        with torch.no_grad():
            oracle(row[None, :-1])
        hook.remove()
        output = added[name][0] if isinstance(added[name], tuple) else added[name]
        size = next(float(size) for other, size, _ in parts if other == name)
        assert size == pytest.approx(output[0, STOP].square().mean().sqrt().item(), abs=6e-3)
    assert len(pictures(executed, "backwards = ")) == 1


def test_the_head_that_copies_names_is_found_by_its_score(executed, copying, corpus):
    text = printed(executed, "scores[i] += ")
    lines = re.findall(r"^layer \d: (.*)$", text, flags=re.MULTILINE)
    found = np.array([[float(score) for score in re.findall(r"head \d ([\d.]+)", line)] for line in lines])
    np.testing.assert_allclose(found, copying, atol=1e-3)
    assert found.max() > 0.5
    layer, head = np.unravel_index(copying.argmax(), copying.shape)
    assert f"looks at the name: layer {layer}, head {head}" in text
    seconds = [[i for i, word in enumerate(tales._split(story)) if word in NAMES][1] for story in corpus.held_out[:40]]
    even = np.mean([1 / (second + 1) for second in seconds])  # of the start token and the words before it
    assert numbers(r"even look would score NUMBER", text)[0] == pytest.approx(even, abs=6e-4)
    assert len(pictures(executed, "scores[i] += ")) == 2
    assert len(pictures(executed, "attention_sheet(short)")) == 1


def test_the_lens_reads_what_transformers_head_reads_from_its_streams(executed, oracle, seen, tokenizer):
    text = printed(executed, "guesses = []")
    zoe = tokenizer.encode("Zoe")[0]
    for name, stream in (("embeddings", seen.hidden_states[0]), ("blocks.0.output", seen.hidden_states[1])):
        with torch.no_grad():
            chances = oracle.lm_head(oracle.transformer.ln_f(stream))[0, STOP].softmax(dim=-1)
        line = next(line for line in text.splitlines() if line.startswith(name))
        assert float(line.split()[-1]) == pytest.approx(chances[zoe].item(), abs=2e-4)
        assert f"at the full stop: {tokenizer.decode([int(chances.argmax())])} " in line
    last = seen.logits[0, STOP].softmax(dim=-1)
    assert numbers(r"blocks.1.output +at the full stop: Zoe +Zoe's probability NUMBER", text)[0] == pytest.approx(
        last[zoe].item(), abs=2e-4
    )
    assert len(pictures(executed, "guesses = []")) == 1


def test_words_of_one_kind_lie_together(executed, oracle, tokenizer):
    text = printed(executed, "cosines.fill_diagonal_")
    table = oracle.transformer.wte.weight.detach().double().numpy()
    unit = table / np.linalg.norm(table, axis=1, keepdims=True)
    cosines = unit @ unit.T - 3 * np.eye(len(table))
    kinds = [
        tales.TIMES, tales.CHARACTERS, tales.NAMES["girl"], tales.NAMES["boy"], tales.FRIENDS, tales.COLOURS,
        tales.THINGS["one"], tales.THINGS["many"], tales.PLACES, tales.MOODS, tales.ANIMALS, tales.FOODS,
    ]  # fmt: skip
    hits = [
        tokenizer.decode([int(cosines[tokenizer.encode(word)[0]].argmax())]) in kind for kind in kinds for word in kind
    ]
    assert numbers(r"NUMBER of NUMBER; by chance it would be NUMBER", text)[:2] == [sum(hits), len(hits)]
    assert sum(hits) > 0.8 * len(hits)
    assert len(pictures(executed, "cosines.fill_diagonal_")) == 1


def test_taking_a_head_out_costs_what_it_costs_in_transformers(executed, oracle, corpus):
    text = printed(executed, "zeroed, averaged, by_word")
    whole = losses(oracle, corpus)
    loss, floor = numbers(r"whole model: NUMBER, floor NUMBER", text)
    assert loss == pytest.approx(whole.nanmean().item(), abs=1e-4)
    assert floor == pytest.approx(corpus.floor, abs=6e-5)
    assert loss < floor + 0.03
    rises = []
    for layer in range(2):
        for head in range(4):
            rise = (losses(without(oracle, (layer, head)), corpus) - whole).nanmean().item()
            zeroed, averaged = numbers(
                rf"head {layer}\.{head}: zeroed \+NUMBER, .* mean \+NUMBER", text.replace("+-", "+")
            )
            assert zeroed == pytest.approx(abs(rise), abs=3e-4)
            assert averaged != zeroed or zeroed < 0.01  # another experiment
            rises.append(rise)
    assert max(rises) > 0.01
    for layer in range(2):
        rise = (losses(without(oracle, *((layer, head) for head in range(4))), corpus) - whole).nanmean().item()
        assert numbers(rf"layer {layer} \+NUMBER", text)[0] == pytest.approx(rise, abs=2e-3)
    assert len(pictures(executed, "zeroed, averaged, by_word")) == 1


def test_patching_turns_the_name_where_it_does_in_transformers(executed, oracle, row, tokenizer):
    text = printed(executed, "lead[depth]")
    zoe, ivy = (tokenizer.encode(name)[0] for name in ("Zoe", "Ivy"))
    one = row[None, : STOP + 1]
    two = one.clone()
    two[0, HERO] = ivy
    with torch.no_grad():
        runs = [oracle(ids, output_hidden_states=True) for ids in (one, two)]
    leads = [(run.logits[0, -1, ivy] - run.logits[0, -1, zoe]).item() for run in runs]
    assert numbers(r"over Zoe: NUMBER in the one text, NUMBER in the other", text) == pytest.approx(leads, abs=0.06)
    assert leads[0] < 0 < leads[1]

    stages = {"embeddings": (oracle.transformer.drop, 0), "blocks.0.output": (oracle.transformer.h[0], 1)}
    for name, (module, depth) in stages.items():
        turned = []
        for position in range(STOP + 1):

            def put_in(_, __, output, position=position, depth=depth):
                stream = (output[0] if isinstance(output, tuple) else output).clone()
                stream[:, position] = runs[1].hidden_states[depth][:, position]
                return (stream, *output[1:]) if isinstance(output, tuple) else stream

            hook = module.register_forward_hook(put_in)
            with torch.no_grad():
                answer = oracle(one).logits[0, -1]
            hook.remove()
            if answer[ivy] > answer[zoe]:
                turned.append(str(position))
        line = next(line for line in text.splitlines() if line.startswith(name))
        assert re.findall(r"position (\d+)", line) == turned
        assert turned
    assert "blocks.1.output            turned at: . (position 28)" in text
    assert len(pictures(executed, "lead[depth]")) == 1


def test_two_heads_that_stand_in_for_each_other(executed, oracle, copying, corpus, row, tokenizer):
    text = printed(executed, '"both": (copier, second)')
    order = np.argsort(copying, axis=None)[::-1]
    best, second = ([int(i) for i in np.unravel_index(place, copying.shape)] for place in order[:2])
    inputs, targets = corpus.validation[0]
    returning = torch.zeros_like(targets, dtype=torch.bool)
    for story, position in (targets != -100).nonzero().tolist():
        word = int(targets[story, position])
        returning[story, position] = tokenizer.decode([word]) in NAMES and word in inputs[story, : position + 1]
    whole = losses(oracle, corpus)
    for title, heads in {
        "nothing": [],
        "the best looker": [best],
        "the second best": [second],
        "both": [best, second],
    }.items():
        other = without(oracle, *heads)
        with torch.no_grad():
            chances = other(row[None, : STOP + 1]).logits[0, -1].softmax(dim=-1)
        word, chance = re.search(rf"^{title} +(\S+) ([\d.]+),", text, flags=re.MULTILINE).groups()
        assert word == tokenizer.decode([int(chances.argmax())])
        assert float(chance) == pytest.approx(chances.max().item(), abs=2e-3)
        rise = (losses(other, corpus) - whole)[returning].mean().item()
        assert numbers(rf"{title} .* NUMBER nats", text)[0] == pytest.approx(rise, abs=0.02)


def test_diff_names_the_place_of_each_change(executed):
    text = printed(executed, "one_weight, gelu")
    first = dict(re.findall(r"^(\S.*?) +first: (\S+) ", text, flags=re.MULTILINE))
    assert first == {
        "eager instead of sdpa": "None",
        "one weight": "blocks.1.feed_forward.hidden",
        "exact GELU": "blocks.0.feed_forward.activated",
    }
    amounts = {name: numbers(rf"{name} .*logits off by NUMBER", text)[0] for name in first}
    assert amounts["eager instead of sdpa"] < 1e-4 < amounts["exact GELU"]
    assert "They part at blocks.1.feed_forward.hidden" in text


def test_the_page_is_small(executed):
    size = numbers(r"zoe\.html: NUMBER kB; its own policy forbids every request: True", printed(executed, "zoe.html"))
    assert 50 < size[0] < 1000


def test_the_stepper_reads_the_story_as_it_was_trained_with_the_start_in_front(executed, seen, tokenizer):
    outputs = the_cell(executed, "StepThrough(model, ").outputs
    shown = [out.data for out in outputs if "application/vnd.jupyter.widget-view+json" in out.get("data", {})]
    assert len(shown) == 1
    text = shown[0]["text/plain"]
    at = int(re.search(r"token (\d+), 'But'", text)[1])
    chances = seen.logits[0, at].softmax(dim=-1)  # of the story with its start token: "But" stands at the same position
    best = chances.topk(2)
    for chance, word in zip(best.values.tolist(), best.indices.tolist(), strict=True):
        found = numbers(rf"probability of '{re.escape(tokenizer.decode([word]))}': NUMBER", text)
        assert found[0] == pytest.approx(chance, abs=2e-4)
