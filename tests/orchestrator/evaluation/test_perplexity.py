"""Perplexity equals the sliding windows of transformers' documentation, on the same weights, and its own definition."""

import math

import pytest
import torch
import torch.nn.functional as F
from transformers import GPT2LMHeadModel

from GPT2Model.config import from_preset
from GPT2Model.gpt2 import GPTModel
from orchestrator.evaluation.perplexity import batches, perplexity, windows, windows_of
from orchestrator.training.loss import without_head

SIZES = {"vocab_size": 61, "context_length": 24, "emb_dim": 30, "n_heads": 5, "n_layers": 2, "drop_rate": 0.1}


def random_model(seed=0, **changes) -> GPTModel:
    torch.manual_seed(seed)
    model = GPTModel({**SIZES, **changes}).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> tuple[GPTModel, GPT2LMHeadModel]:
    """One model in float64, ours and as transformers opens it."""
    folder = tmp_path_factory.mktemp("model")
    ours = random_model()
    ours.save_pretrained(folder)
    return ours, GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float64).eval()


def random_text(tokens: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, SIZES["vocab_size"], (tokens,), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def their_loop(model, ids, max_length, stride, loss_of=None) -> dict:
    """The documented loop: begin, end, how many targets, labels of -100; means weighted by the tokens in the loss.

    "as_printed" weighs with what the page calls num_loss_tokens: the labels of a window less one.
    """
    loss_of = loss_of or (lambda rows, labels: F.cross_entropy(model(rows).logits[0, :-1], labels[0, 1:]))
    total = count = printed_total = printed_count = previous_end = 0
    for begin in range(0, len(ids), stride):
        end = min(begin + max_length, len(ids))
        rows = ids[None, begin:end]
        labels = rows.clone()
        labels[:, : -(end - previous_end)] = -100
        in_the_loss = int((labels[:, 1:] != -100).sum())
        as_counted = int((labels != -100).sum()) - 1
        if in_the_loss:
            loss = loss_of(rows, labels).item()
            total, count = total + loss * in_the_loss, count + in_the_loss
            printed_total, printed_count = printed_total + loss * as_counted, printed_count + as_counted
        previous_end = end
        if end == len(ids):
            break
    return {
        "perplexity": math.exp(total / count),
        "count": count,
        "as_printed": math.exp(printed_total / printed_count) if printed_count else math.nan,
    }


LENGTHS = [2, 10, 24, 25, 48, 49, 60]  # shorter than a window, one window exactly, several, a ragged last one


@pytest.mark.parametrize("tokens", LENGTHS)
@pytest.mark.parametrize(("max_length", "stride"), [(24, 24), (24, 23), (24, 12), (24, 7), (24, 1), (10, 10), (10, 3)])
def test_it_is_what_transformers_windows_give(pair, tokens, max_length, stride):
    ours, theirs = pair
    ids = random_text(tokens, seed=tokens)
    found = perplexity(ours, ids, stride=stride, max_length=max_length, batch_size=3)
    expected = their_loop(theirs, ids, max_length, stride)
    assert found.predicted == expected["count"]
    assert found.perplexity == pytest.approx(expected["perplexity"], rel=1e-10)
    assert found.by_transformers_loop == pytest.approx(expected["as_printed"], rel=1e-10, nan_ok=True)


@pytest.mark.parametrize("stride", [24, 12, 1])
def test_in_float32_it_is_what_their_own_loss_gives(pair, stride):
    ours, theirs = (random_model().float(), pair[1])
    their_loss = theirs.float()
    ids = random_text(70)
    expected = their_loop(theirs, ids, 24, stride, lambda rows, labels: their_loss(rows, labels=labels).loss)
    theirs.double()
    assert perplexity(ours, ids, stride=stride).perplexity == pytest.approx(expected["perplexity"], rel=2e-5)


def test_where_windows_do_not_overlap_it_is_also_what_their_page_prints(pair):
    found = perplexity(pair[0], random_text(100), stride=24)
    assert found.by_transformers_loop == pytest.approx(found.perplexity, rel=1e-12)
    found = perplexity(pair[0], random_text(100), stride=12)
    assert abs(found.by_transformers_loop / found.perplexity - 1) > 1e-6


@pytest.mark.parametrize("stride", [24, 10, 1])
def test_the_figure_does_not_depend_on_how_many_windows_are_computed_together(pair, stride):
    ids = random_text(90)
    alone = perplexity(pair[0], ids, stride=stride, batch_size=1)
    for batch_size in (2, 5, 100):
        together = perplexity(pair[0], ids, stride=stride, batch_size=batch_size)
        assert together.nats == pytest.approx(alone.nats, rel=1e-12)
        assert together.predicted == alone.predicted


def test_with_stride_1_every_token_has_all_the_context_that_there_is(pair):
    """Held against the model read one prefix at a time: no windows at all."""
    ids = random_text(40)
    with torch.no_grad():
        costs = [
            -pair[0](ids[None, max(0, i - 23) : i])[0, -1].log_softmax(-1)[ids[i]].item() for i in range(1, len(ids))
        ]
    found = perplexity(pair[0], ids, stride=1)
    assert found.nats == pytest.approx(math.fsum(costs), rel=1e-11)
    assert found.nats_per_token == pytest.approx(math.fsum(costs) / 39, rel=1e-11)
    assert found.least_context == 23


@pytest.mark.parametrize("tokens", LENGTHS)
@pytest.mark.parametrize("stride", [1, 5, 9, 10])
def test_each_token_is_predicted_once_and_with_the_context_that_is_promised(tokens, stride):
    made = windows(tokens, stride, 10)
    targets = [i for window in made for i in range(window.first_target, window.end)]
    first_of_windows = set(range(0, tokens, stride)) if stride == 10 else {0}
    assert targets == [i for i in range(tokens) if i not in first_of_windows]
    for window in made:
        assert window.end - window.begin <= 10
        assert window.begin == 0 or window.first_target - window.begin >= max(1, 10 - stride)


def test_what_is_said_of_context_and_cost_is_counted_from_the_windows(pair):
    found = perplexity(pair[0], random_text(60), stride=12)
    # windows 0-23, 12-35, 24-47, 36-59: contexts 1..23 once, 12..23 three times
    assert (found.windows, found.tokens_read, found.predicted, found.least_context) == (4, 96, 59, 12)
    assert found.mean_context == pytest.approx((sum(range(1, 24)) + 3 * sum(range(12, 24))) / 59)
    assert perplexity(pair[0], random_text(20)).least_context == 1


def test_documents_are_read_each_as_if_it_came_alone(pair):
    texts = [random_text(length, seed=length) for length in (30, 5, 24, 30, 2)]
    together = perplexity(pair[0], torch.cat(texts), stride=12, documents=[len(text) for text in texts])
    alone = [perplexity(pair[0], text, stride=12) for text in texts]
    assert together.nats == pytest.approx(math.fsum(one.nats for one in alone), rel=1e-12)
    assert together.predicted == sum(one.predicted for one in alone)
    assert together.documents == 5
    as_one = perplexity(pair[0], torch.cat(texts), stride=12)
    assert abs(as_one.nats - together.nats) > 1.0


def test_the_marks_that_open_documents_cost_no_bits_and_belong_to_no_word(pair):
    """Where the windows overlap, every token but the marks is predicted: nothing has to be estimated."""
    lengths = [30, 5, 24, 2]
    found = perplexity(pair[0], random_text(61), stride=12, documents=lengths)
    assert found.predicted == 61 - 4
    assert found.bits_per_byte(150) == pytest.approx(found.nats / math.log(2) / 150, rel=1e-12)
    assert found.per_word(20) == pytest.approx(math.exp(found.nats / 20), rel=1e-12)


def test_costs_are_not_rounded_to_the_digits_of_a_short_dtype():
    """bfloat16 logits have 8 bits; what a token costs by them is computed in more, or a whole text's figure is off."""
    model = random_model().bfloat16()
    for seed in range(5):
        ids = random_text(2, seed)
        with without_head(model) as head, torch.no_grad():
            logits = head(model(ids[None])[0, :1])
        assert logits.dtype == torch.bfloat16
        exact = -logits[0].double().log_softmax(-1)[ids[1]].item()
        assert perplexity(model, ids).nats == pytest.approx(exact, rel=1e-6)


def test_windows_that_are_computed_together_are_alike_and_none_is_lost():
    slid = windows_of([30, 5, 24, 30, 2], 12, 24)
    groups = batches(slid, 2)
    assert sorted((w.begin, w.end) for group in groups for w in group) == sorted((w.begin, w.end) for w in slid)
    assert all(len({(w.end - w.begin, w.predicted) for w in group}) == 1 and len(group) <= 2 for group in groups)


def test_bits_and_words_follow_from_the_mean(pair):
    found = perplexity(pair[0], random_text(60), stride=12)
    assert found.bits_per_byte(200) == pytest.approx(math.log2(found.perplexity) * 60 / 200)
    assert found.per_word(40) == pytest.approx(found.perplexity ** (60 / 40))
    # a model that gives each of V tokens the same chance has perplexity V
    even = GPTModel(from_preset("nano", vocab_size=61, context_length=16, tie_weights=False))
    torch.nn.init.zeros_(even.head.weight)
    assert perplexity(even, random_text(50)).perplexity == pytest.approx(61, rel=1e-6)


def test_a_model_in_training_is_read_without_dropout_and_given_back_as_it_was(pair):
    model = random_model()
    expected = perplexity(model, random_text(60)).nats
    model.train()
    model.blocks[1].eval()
    assert perplexity(model, random_text(60)).nats == expected
    assert model.training
    assert model.blocks[0].training
    assert not model.blocks[1].training


def test_progress_is_told_in_tokens(pair):
    told = []
    found = perplexity(pair[0], random_text(60), stride=12, batch_size=2, tick=told.append)
    assert sum(told) == found.tokens_read
    assert len(told) == 3  # the first window predicts more than the others: it comes alone


@pytest.mark.parametrize(
    ("ids", "arguments", "message"),
    [
        ([], {}, "the text has 0 tokens"),
        ([3], {}, "the text has 1 token, and the first of a text is not predicted"),
        ([3, 61], {}, r"token ids must be in 0..60, got 3..61: another tokenizer"),
        ([-1, 5], {}, r"got -1..5"),
        ([3, 4], {"stride": 0}, "stride must be 1 token or more, got 0"),
        ([3, 4], {"stride": 13, "max_length": 12}, "between two windows would never be predicted"),
        ([3, 4], {"max_length": 25}, "max_length must be from 2 to the model's context_length, 24, got 25"),
        ([3, 4], {"max_length": 1}, "at least one before it"),
        ([3, 4], {"batch_size": 0}, "batch_size must be 1 window or more"),
        ([3, 4, 5], {"documents": [2]}, "documents must be of 2 tokens or more each, 3 together"),
        ([[3, 4]], {}, "in one row"),
        ([3.0, 4.0], {}, "token ids of one text"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_words(pair, ids, arguments, message):
    with pytest.raises(ValueError, match=message):
        perplexity(pair[0], ids, **arguments)


def test_everything_that_is_wrong_is_said_at_once(pair):
    with pytest.raises(ValueError, match=r"(?s)1 token.*max_length.*stride.*batch_size"):
        perplexity(pair[0], [3], max_length=99, stride=0, batch_size=0)


def test_a_broken_model_is_named_instead_of_a_figure():
    model = random_model()
    with torch.no_grad():
        model.position_embedding.weight[20] = math.nan
    with pytest.raises(ValueError, match="logits for tokens 0 to 23 are NaN"):
        perplexity(model, random_text(60))
