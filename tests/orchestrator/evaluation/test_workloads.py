"""workloads: their sizes, their tokens, and that a step of an experiment is a step of the training loop."""

import pytest
import torch

from GPT2Model.generation import generate
from GPT2Model.gpt2 import GPTModel
from orchestrator.evaluation.workloads import Generation, RandomTokens, Training, Workload, full, quick, strictly
from orchestrator.training.loop import train
from orchestrator.training.settings import TrainSettings

SMALL = Workload("nano", 2, 24, prompt=8, new_tokens=3, vocab_size=31, changes={"n_layers": 1, "emb_dim": 32})


@pytest.mark.parametrize("workload", [*quick(), *full("cpu"), *full("cuda")], ids=str)
def test_every_workload_fits_its_model_and_has_no_dropout(workload):
    cfg = workload.cfg
    assert cfg["drop_rate"] == 0.0
    assert max(workload.tokens, workload.prompt + workload.new_tokens) <= cfg["context_length"]
    assert workload.prompt >= 1
    assert workload.cost("training") >= 1


def test_full_has_gpt2_at_both_shapes_and_a_small_model_at_several_lengths():
    named = [str(workload) for workload in full("cpu")]
    assert {"gpt2, 4 x 256", "gpt2, 1 x 1024"} <= set(named)
    small = [workload for workload in full("cpu") if workload.model == "tiny"]
    assert len({workload.tokens for workload in small}) == len(small) >= 3
    assert len({workload.batch * workload.tokens for workload in small}) == 1  # as many tokens in a step
    assert len(set(named)) == len(named)


def test_tokens_are_a_function_of_the_seed_and_the_sample():
    one, two = RandomTokens(SMALL, 3), RandomTokens(SMALL, 3)
    inputs, targets, documents = one.batch(4, 2)
    assert torch.equal(inputs, two.batch(4, 2).inputs)
    assert not torch.equal(inputs, one.batch(6, 2).inputs)
    assert not torch.equal(inputs, RandomTokens(SMALL, 4).batch(4, 2).inputs)
    assert inputs.shape == targets.shape == (2, 24)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    assert documents is None


def test_a_step_is_a_step_of_the_training_loop():
    training = Training(SMALL, "fp32", "cpu", seed=5)
    torch.manual_seed(5)
    model = GPTModel(SMALL.cfg)
    for _ in range(3):
        training.step()
    settings = TrainSettings(
        max_steps=3, batch_size=2, learning_rate=1e-4, warmup_steps=0, schedule="constant", seed=5, eval_on_start=False,
        eval_steps=100,
    )  # fmt: skip

    class Samples(RandomTokens):
        def validation(self, tokens, batch_size=8):
            return [self.batch(999, 1)]

    train(model, Samples(SMALL, 5), settings, progress=False)
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, training.model.state_dict()[name]), name


def test_a_text_is_greedy_with_all_its_tokens_and_the_seconds_add_up(monkeypatch):
    from orchestrator.evaluation import workloads

    written = []
    monkeypatch.setattr(workloads, "generate", lambda *args, **options: written.append(generate(*args, **options)))
    generation = Generation(SMALL, "fp32", "cpu", seed=1)
    seconds = generation.turn()
    assert seconds["first_token"] + seconds["later_tokens"] == pytest.approx(seconds["text"])
    assert written[0].shape == (1, 11)
    assert torch.equal(written[0], generate(generation.model, generation.prompt, 3, use_cache=False))


def test_strictly_named_attention_never_falls_back():
    model = GPTModel({**SMALL.cfg, **strictly("flash_tiled")})
    assert model.attention_report()["chosen"] == "flash_tiled"
    with pytest.raises(ValueError, match="flash_attention_2 cannot serve"):
        GPTModel({**SMALL.cfg, **strictly("flash_attention_2")})
