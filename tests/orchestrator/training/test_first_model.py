"""The judgement of the first trained model: it must be able to fail, and to pass."""

import json

import pytest
import torch

from GPT2Model.config import from_preset
from GPT2Model.gpt2 import GPTModel
from orchestrator.report import Run
from orchestrator.text import tales
from orchestrator.text.corpora import TalesCorpus
from orchestrator.training import first_model
from orchestrator.training.first_model import attention_weights, train_first_model, write_stories


def test_a_model_that_learned_too_little_fails_and_all_is_left_to_look_at(tmp_path):
    run = Run(tmp_path)
    model = train_first_model(run, max_steps=4)
    steps = {step["name"]: step for step in run.steps}
    learned, wrote = steps["the model learned all there is"], steps["the model writes"]
    assert not learned["passed"]
    assert learned["gap"] == pytest.approx(learned["loss"] - learned["floor"])
    assert learned["gap"] > first_model.GAP
    assert not wrote["passed"]
    assert len(wrote["faults"]) > 10
    assert steps["saved and opened again"]["passed"]
    for name in ("loss.png", "attention_map.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert not run.passed
    again = GPTModel.from_pretrained(tmp_path / "model")
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))


class KnowsTheGrammar(torch.nn.Module):
    """A perfect model: its logits are the exact log-probabilities. What the judgement must let pass."""

    def __init__(self, corpus):
        super().__init__()
        self.cfg, self.corpus = {"context_length": 128, "vocab_size": corpus.tokenizer.vocab_size}, corpus
        self.parameter = torch.nn.Parameter(torch.zeros(1))

    def forward(self, ids, *_):
        logits = torch.full((*ids.shape, self.cfg["vocab_size"]), -1e9)
        for b, row in enumerate(ids.tolist()):
            words = [self.corpus.tokenizer.decode([i]) for i in row[1:]]
            for t in range(len(row)):
                if tales.END_OF_TEXT in words[:t]:
                    continue  # padding behind the end: nothing is predicted there
                for word, p in tales.next_word_probabilities(words[:t]).items():
                    logits[b, t, self.corpus.tokenizer.encode(word)[0]] = torch.tensor(p).log()
        return logits


def test_a_model_that_knows_the_grammar_has_exactly_the_floor_as_its_loss():
    from orchestrator.training.loop import evaluate

    corpus = TalesCorpus(seed=4, held_out=6)
    assert evaluate(KnowsTheGrammar(corpus), corpus.validation) == pytest.approx(corpus.floor, abs=1e-6)


@pytest.mark.parametrize(
    ("above", "passes"), [(0.02, True), (-0.001, True), (0.04, False), (-0.4, False), (float("nan"), False)]
)
def test_a_loss_far_below_the_floor_fails_as_one_far_above_does(above, passes, monkeypatch):
    """No model can be better than the floor by more than luck: one that is has seen the answers."""
    from orchestrator.training.loop import History

    corpus = TalesCorpus(seed=4, held_out=50)
    monkeypatch.setattr(first_model, "write_stories", lambda *args: corpus.held_out[:3])
    model = GPTModel(from_preset("nano", vocab_size=corpus.tokenizer.vocab_size))
    run = Run()
    history = History(train=[(0, 5.0)], validation=[(0, 5.0), (9, corpus.floor + above)])
    first_model.judge_tales(run, model, corpus, history, seed=0)
    assert run.steps[0]["passed"] is passes


def test_a_text_is_learned_when_the_loss_is_below_that_of_word_frequencies(monkeypatch):
    from orchestrator.text.corpora import TextCorpus
    from orchestrator.training.loop import History

    corpus = TextCorpus("a b c d " * 2000, "letters", 16)
    for loss, passes in ((corpus.unigram_loss() - 0.01, True), (corpus.unigram_loss() + 0.01, False)):
        run = Run()
        first_model.judge_text(run, loss, corpus, History(train=[(0, 9.0)], validation=[(0, 9.0), (1, loss)]))
        assert run.steps[0]["passed"] is passes


def test_a_model_that_is_not_the_one_saved_is_seen(tmp_path, monkeypatch):
    model = GPTModel(from_preset("nano", vocab_size=30))
    other = GPTModel(from_preset("nano", vocab_size=30))
    run = Run(tmp_path)
    monkeypatch.setattr(GPTModel, "save_pretrained", lambda self, folder: None)
    monkeypatch.setattr(GPTModel, "from_pretrained", classmethod(lambda cls, folder: other))
    first_model.save(run, model)
    assert not run.passed


def test_stories_are_cut_at_their_end_and_judged_one_by_one(monkeypatch):
    corpus = TalesCorpus(seed=4, held_out=50)
    end = corpus.tokenizer.end_of_text
    story = corpus.tokenizer.encode(corpus.held_out[0])
    rows = torch.tensor([[end, *story, end, end], [end, *story, story[0], end], [end, *story, *story[:2]]])
    monkeypatch.setattr(first_model, "generate", lambda *args, **kwargs: rows)
    model = GPTModel(from_preset("nano", vocab_size=corpus.tokenizer.vocab_size))
    verdicts = [tales.check(text) for text in write_stories(model, corpus, 3, seed=0)]
    assert verdicts[0] is None
    assert verdicts[1] is not None
    assert verdicts[2] is not None


def test_the_copying_head_is_the_one_that_looks_at_where_the_next_word_stood():
    ids = torch.tensor([0, 5, 6, 7, 5, 6, 8])  # 5 and 6 come again: from 3 one should look at 1, from 4 at 2
    assert first_model.returns(ids).nonzero().tolist() == [[3, 1], [4, 2]]
    maps = torch.zeros(1, 3, 7, 7)
    maps[0, 0] = maps[0, 1] = torch.eye(7)  # looks at itself
    maps[0, 1, 3], maps[0, 1, 4] = torch.eye(7)[1], torch.eye(7)[2] * 0.5 + torch.eye(7)[4] * 0.5
    maps[0, 2] = torch.ones(7, 7).tril() / torch.arange(1, 8)[:, None]
    expected = [0.0, (1 + 0.5) / 2, (1 / 4 + 1 / 5) / 2]
    torch.testing.assert_close(first_model.copying_scores(maps, ids)[0], torch.tensor(expected))


def test_the_attention_maps_are_those_of_the_running_model():
    torch.manual_seed(0)
    model = GPTModel(from_preset("nano", vocab_size=50)).eval()
    ids = torch.randint(50, (1, 9))
    maps = attention_weights(model, ids)
    assert maps.shape == (2, 4, 9, 9)
    torch.testing.assert_close(maps.sum(-1), torch.ones(2, 4, 9))
    assert maps.triu(1).abs().max() == 0
    # layer 0 by hand, from the embeddings
    x = model.token_embedding(ids) + model.position_embedding(torch.arange(9))
    block = model.blocks[0]
    queries, keys, _ = block.attention.W_qkv(block.norm_1(x)).split(128, dim=-1)
    queries, keys = (part.view(9, 4, 32).transpose(0, 1) for part in (queries[0], keys[0]))
    scores = (queries @ keys.mT / 32**0.5).masked_fill(torch.ones(9, 9).triu(1).bool(), float("-inf"))
    torch.testing.assert_close(maps[0], scores.softmax(-1).detach())
    assert model.blocks[0].attention.settings.requested == "auto"  # put back


@pytest.mark.slow
def test_a_nano_model_learns_the_tales_to_their_floor(tmp_path):
    run = Run(tmp_path)
    train_first_model(run)
    run.close()
    assert json.loads((tmp_path / "report.json").read_text())["passed"]
