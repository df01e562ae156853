"""The plain data of a trace says what the trace says, as well as it promises, and refuses what it could not show."""

import json
import math

import numpy as np
import pytest
import torch

from GPT2Model.config import from_preset
from GPT2Model.gpt2 import GPTModel
from GPT2Model.tracing import trace, zero_heads
from orchestrator.views.trace_format import (
    LIMIT,
    TEMPERATURES,
    head_hidden,
    head_scores,
    head_weights,
    looked_at,
    next_tokens,
    tensors_of_layer,
    trace_data,
)

LAYERS, HEADS, TOKENS, WORDS = 2, 3, 9, 200
NAMES = [f"blocks.{i}.attention.weights" for i in range(LAYERS)]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    cfg = from_preset(
        "nano", vocab_size=WORDS, context_length=16, emb_dim=24, n_heads=HEADS, n_layers=LAYERS, init_std=0.3
    )
    return GPTModel(cfg).eval()


@pytest.fixture(scope="module")
def ids():
    return torch.randint(0, WORDS, (2, TOKENS), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def traced(model, ids):
    with model.using_attention("eager"):
        return trace(model, ids)


@pytest.fixture(scope="module")
def data(traced, model):
    """Of the second row, written to JSON and read again, as a page does."""
    return json.loads(json.dumps(trace_data(traced, model, sequence=1), allow_nan=False))


@pytest.mark.parametrize(("bits", "error"), [(16, 7.7e-6), (8, 2.0e-3)])
def test_weights_of_every_head_come_back_within_the_error_that_is_stated(traced, bits, error):
    data = trace_data(traced, sequence=1, bits=bits)
    assert data["attention"]["error"] <= error
    for layer in range(LAYERS):
        for head in range(HEADS):
            exact = traced[NAMES[layer]][1, head].double().numpy()
            off = np.abs(head_weights(data, layer, head) - exact).max()
            assert 0 < off <= data["attention"]["error"]  # 0 would mean that nothing was compared


def test_scores_come_back_to_half_a_step_and_hidden_ones_are_not_kept(traced, data):
    for layer in range(LAYERS):
        for head in range(HEADS):
            exact = traced[f"blocks.{layer}.attention.scores"][1, head].double().numpy()
            kept = head_scores(data, layer, head)
            lower = np.tril_indices(TOKENS)
            step = data["attention"]["score_step"][layer][head]
            assert step < 1e-3
            np.testing.assert_allclose(kept[lower], exact[lower], rtol=0, atol=0.51 * step)
            assert np.isnan(kept[np.triu_indices(TOKENS, 1)]).all()


def test_the_softmax_of_the_kept_scores_is_the_kept_weights(data):
    scores = np.where(np.isnan(scores := head_scores(data, 1, 2)), -np.inf, scores)
    powers = np.exp(scores - scores.max(axis=-1, keepdims=True))
    expected = powers / powers.sum(axis=-1, keepdims=True)
    # a score is off by half a step at most, and a weight p moves by no more than p (1 - p) times twice that
    atol = data["attention"]["error"] + data["attention"]["score_step"][1][2] / 4
    np.testing.assert_allclose(head_weights(data, 1, 2), expected, rtol=0, atol=atol)


def test_probabilities_are_right_at_every_temperature_whatever_the_vocabulary(traced, data):
    logits = traced.logits[1].double()
    for temperature in TEMPERATURES:
        expected = torch.softmax(logits / temperature, dim=-1)
        for position in range(TOKENS):
            for i, text, _, probability in next_tokens(data, position, temperature, count=40):
                assert math.isclose(probability, expected[position, i], rel_tol=4e-6, abs_tol=1e-300)
                assert text == str(i)
    assert [token.id for token in next_tokens(data, 4, count=40)] == logits[4].topk(40).indices.tolist()


def test_a_temperature_that_is_not_stored_is_refused(data):
    with pytest.raises(ValueError, match=r"0\.05 to 2\.00"):
        next_tokens(data, 0, 0.123)


def test_what_the_text_really_goes_on_with_has_its_rank_and_logit(traced, data, ids):
    logits = traced.logits[1].double()
    for position, (token, below, rank) in enumerate(data["next"]["actual"][:-1]):
        assert token == ids[1, position + 1]
        assert math.isclose(below, logits[position, token] - logits[position].max(), abs_tol=1e-6)
        assert rank == sorted(logits[position].tolist(), reverse=True).index(logits[position, token].item()) + 1
    assert data["next"]["actual"][-1] is None


def test_the_lens_is_norm_and_head_on_the_stream_and_ends_in_the_model_s_own_answer(traced, model, data):
    assert data["lens"]["names"] == ["embeddings", "blocks.0.output", "blocks.1.output"]
    weight, bias, table = (p.detach().double() for p in (*model.final_norm.parameters(), model.head.weight))
    for name, rows in zip(data["lens"]["names"], data["lens"]["top"], strict=True):
        stream = traced[name][1].double()
        centred = stream - stream.mean(-1, keepdim=True)
        normed = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight + bias
        expected = torch.softmax(normed @ table.T, dim=-1)
        for position, best in enumerate(rows):
            assert [i for i, _ in best] == expected[position].topk(5).indices.tolist()
            np.testing.assert_allclose([p for _, p in best], expected[position].topk(5).values, rtol=0, atol=2e-6)
    last = [best[0][0] for best in data["lens"]["top"][-1]]
    assert last == traced.logits[1].argmax(-1).tolist()


def test_norms_and_statistics_are_those_of_the_tensors(traced, data):
    for name, values in zip(data["norms"]["names"], data["norms"]["values"], strict=True):
        np.testing.assert_allclose(values, traced[name][1].double().square().sum(-1).sqrt(), rtol=1e-5)
    assert len(data["norms"]["names"]) == 1 + 2 * LAYERS
    for tensor in data["tensors"]:
        exact = traced[tensor["name"]]
        assert tensor["shape"] == list(exact.shape)
        assert len(tensor["axes"]) == exact.ndim
        if "masked" not in tensor["name"]:
            assert math.isclose(tensor["mean"], exact.double().mean(), rel_tol=1e-5, abs_tol=1e-9)
    assert [tensor["name"] for tensor in data["tensors"]] == traced.names()
    names = [tensor["name"] for tensor in tensors_of_layer(data, 1)]
    assert names == traced.names("blocks.1.*")


def test_what_a_token_looks_at_is_sorted_by_weight(traced, data):
    row = traced[NAMES[0]][1, 2, 7]
    expected = row.topk(4)
    got = looked_at(data, 0, 2, 7, count=4)
    assert [position for position, _ in got] == expected.indices.tolist()
    np.testing.assert_allclose([weight for _, weight in got], expected.values, rtol=0, atol=1e-5)


def test_weights_above_the_diagonal_are_kept_where_there_are_any(model, ids):
    with model.using_attention("eager"):  # every key alike, the future too
        seeing = trace(model, ids, patch={NAMES[0]: lambda weights: torch.full_like(weights, 1 / TOKENS)})
    data = trace_data(seeing)
    assert not data["attention"]["triangle"]
    np.testing.assert_allclose(head_weights(data, 0, 0), 1 / TOKENS, rtol=0, atol=data["attention"]["error"])
    exact = seeing["blocks.0.attention.scores"][0, 1].numpy()
    np.testing.assert_allclose(head_scores(data, 0, 1), exact, rtol=0, atol=data["attention"]["score_step"][0][1])


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_hidden_are_the_future_and_the_padding_and_a_seen_weight_of_0_is_not(implementation, model, ids):
    real = torch.ones(2, TOKENS, dtype=torch.bool)
    real[1, :4] = False
    rows, columns = np.indices((TOKENS, TOKENS))
    with model.using_attention(implementation):
        t = trace(model, ids, padding_mask=real, recompute=True)
    for row, expected in enumerate([columns > rows, (columns > rows) | (columns < 4)]):
        data = json.loads(json.dumps(trace_data(t, sequence=row)))
        assert data["attention"]["masks"] == 1  # the same for all heads: kept once
        for layer, head in np.ndindex(LAYERS, HEADS):
            np.testing.assert_array_equal(head_hidden(data, layer, head), expected)


def test_what_each_head_hides_is_kept_where_they_differ_and_a_weight_is_never_hidden(model, ids):
    def hide_one(scores):
        scores[:, 2, 6, 3] = torch.finfo(scores.dtype).min
        return scores

    with model.using_attention("eager"):
        one = trace_data(trace(model, ids, patch={"blocks.1.attention.masked_scores": hide_one}))
        seeing = trace_data(trace(model, ids, patch={NAMES[0]: lambda weights: torch.full_like(weights, 1 / TOKENS)}))
    future = np.triu(np.ones((TOKENS, TOKENS), bool), 1)
    for layer, head in np.ndindex(LAYERS, HEADS):
        expected = future.copy()
        expected[6, 3] = (layer, head) == (1, 2)
        np.testing.assert_array_equal(head_hidden(one, layer, head), expected)
        np.testing.assert_array_equal(head_hidden(seeing, layer, head), future if layer else False)


def test_without_masked_scores_the_future_of_weight_0_is_hidden(model, ids):
    with model.using_attention("eager"):
        t = trace(model, ids, names=["*.weights"])
    np.testing.assert_array_equal(head_hidden(trace_data(t), 1, 1), np.triu(np.ones((TOKENS, TOKENS), bool), 1))


def test_a_fused_implementation_has_no_weights_until_they_are_computed_again(model, ids, traced):
    with model.using_attention("sdpa"):
        with pytest.raises(ValueError, match=r"sdpa forms none.*recompute=True"):
            trace_data(trace(model, ids))
        data = trace_data(trace(model, ids, recompute=True), sequence=1)
    assert (data["implementation"], data["recomputed"]) == ("sdpa", True)
    assert trace_data(traced)["recomputed"] is False
    # another order of sums: a few roundings of numbers up to 1
    np.testing.assert_allclose(head_weights(data, 1, 1), traced[NAMES[1]][1, 1], rtol=0, atol=2e-5)


def test_what_was_patched_is_marked(model, ids):
    with model.using_attention("eager"):
        without = trace(model, ids, patch={"blocks.1.attention.context": zero_heads(0)})
    patched = [tensor["name"] for tensor in trace_data(without)["tensors"] if tensor["patched"]]
    assert patched == ["blocks.1.attention.context"]


def test_without_a_model_there_is_no_lens_and_without_a_tokenizer_ids_are_the_text(traced, ids):
    data = trace_data(traced)
    assert data["lens"] is None
    assert data["tokens"] == [str(i) for i in ids[0].tolist()]
    assert all(text == i for i, text in data["vocabulary"].items())
    assert data["text"] == " ".join(str(i) for i in ids[0].tolist())


# ------------------------------------------------------------------ the model of the trace


def other_model(model, **changes):
    torch.manual_seed(7)
    return GPTModel({**model.cfg, **changes}).eval()


def test_a_model_of_the_same_sizes_that_does_not_give_the_traces_logits_is_refused(model, traced):
    with pytest.raises(ValueError, match=r"does not give the trace's logits: .* off by up to \d.*no logit lens"):
        trace_data(traced, other_model(model))
    trained = other_model(model)
    trained.load_state_dict(model.state_dict())
    assert trace_data(traced, trained)["lens"] is not None  # the same weights: the same model
    with torch.no_grad():
        trained.final_norm.weight[3] += 0.01
    with pytest.raises(ValueError, match="one that was trained since"):
        trace_data(traced, trained)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_in_every_dtype_the_model_of_the_trace_is_its_own(dtype, model, ids):
    copy = other_model(model)
    copy.load_state_dict(model.state_dict())
    copy = copy.to(dtype)
    assert trace_data(trace(copy, ids, recompute=True), copy, sequence=1)["lens"] is not None
    with pytest.raises(ValueError, match="does not give"):
        trace_data(trace(copy, ids, recompute=True), other_model(model).to(dtype))


@pytest.mark.parametrize("name", ["blocks.1.output", "final_norm", "logits", "blocks.0.attention.context"])
def test_a_patched_trace_is_still_its_models(name, model, ids):
    with model.using_attention("eager"):
        patched = trace(model, ids, patch={name: lambda tensor: tensor + 0.5})
    assert not torch.equal(patched.logits, model(ids))
    assert trace_data(patched, model)["lens"] is not None
    if name != "logits":
        with pytest.raises(ValueError, match="does not give"):
            trace_data(patched, other_model(model))


def test_a_model_of_other_sizes_is_refused_with_the_sizes(model, traced):
    with pytest.raises(
        ValueError, match=r"emb_dim 24 \(this model: 48\), n_layers 2 \(this model: 1\): pass the model"
    ):
        trace_data(traced, other_model(model, emb_dim=48, n_layers=1))


class Letters:
    def decode(self, ids):
        return "".join(chr(65 + i % 26) for i in ids)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (lambda t, model: ("page.html", t), "the trace comes first: .* got str"),
        (lambda t, model: (model,), "the trace comes first: .* got GPTModel"),
        (lambda t, model: (t, Letters(), model), "got GPTModel|got Letters"),
        (lambda t, model: (t, torch.nn.Linear(2, 2)), "model is the GPTModel that was traced; got Linear"),
        (lambda t, model: (t, GPTModel), "got the class GPTModel"),
        (lambda t, model: (t, model, Letters), r"tokenizer is the class Letters: make one, Letters\(\)"),
        (lambda t, model: (t, model, "gpt2"), "tokenizer has decode.* got str"),
    ],
)
def test_arguments_in_another_order_or_of_another_kind_are_told_in_words(arguments, message, traced, model):
    with pytest.raises(TypeError, match=message):
        trace_data(*arguments(traced, model))


def test_nan_is_refused_with_where_to_look(model, ids):
    with model.using_attention("eager"):
        broken = trace(model, ids, patch={"blocks.1.output": lambda x: x * torch.nan})
    with pytest.raises(ValueError, match="logits of the trace holds NaN"):
        trace_data(broken)


def test_impossible_weights_rows_bits_and_lengths_are_refused(model, ids, traced):
    with pytest.raises(ValueError, match="2 rows"):
        trace_data(traced, sequence=2)
    with pytest.raises(ValueError, match="8 or 16"):
        trace_data(traced, bits=4)
    with model.using_attention("eager"):
        wild = trace(model, ids, patch={NAMES[0]: lambda weights: 3 * weights})
    with pytest.raises(ValueError, match="between 0 and 1"):
        trace_data(wild)
    with pytest.raises(ValueError, match="layers 0 to 1 and heads 0 to 2"):
        head_weights(trace_data(traced), 0, 3)


def test_more_than_a_page_can_show_is_refused():
    torch.manual_seed(0)
    cfg = from_preset("nano", vocab_size=5, context_length=1024, emb_dim=24, n_heads=12, n_layers=1)
    model = GPTModel(cfg).eval()
    tokens = math.isqrt(LIMIT // 12) + 1
    with model.using_attention("eager"):
        long = trace(model, torch.zeros(1, tokens, dtype=torch.long), names=["*.weights"])
    with pytest.raises(ValueError, match="Trace a shorter text"):
        trace_data(long)
