"""One text's fault is no other's; a step that did not end loses nothing; mistakes of a beginner are said in words."""

import sys

import pytest
import torch

from GPT2Model.gpt2 import GPTModel
from GPT2Model.sampling import Sampling
from GPT2Model.text_generation import generate_text
from orchestrator.serving import engine as engine_module
from orchestrator.serving.engine import Engine
from orchestrator.text.tokenizers import BytesTokenizer
from tests.orchestrator.serving.bytes_model import PROMPTS, alone

# --- one text's fault is no other's; a step that did not end -----------------------------------------


def test_a_text_that_its_tokenizer_cannot_spell_ends_with_the_reason_and_no_other(model, make, caplog):
    class Short(BytesTokenizer):  # a vocabulary that was padded: the model writes ids that no text has
        def decode(self, ids):
            if 85 in list(ids):
                raise ValueError("85 is no id of mine")
            return super().decode(ids)

    prompts = [prompt for prompt in PROMPTS if 85 not in alone(model, prompt, 12, stop_tokens=())[0]]
    foreign = [prompt for prompt in PROMPTS if prompt not in prompts]
    assert prompts and foreign, "some texts must have the id, and some not"  # noqa: PT018
    engine, events = make(Short()), []
    bad = engine.add(foreign[0], 12, stop_tokens=(), on_token=events.append)
    good = engine.add(prompts[0], 12, stop_tokens=())
    done = engine.run()
    assert (done[bad][0].finish_reason, done[bad][0].error) == ("error", "ValueError: 85 is no id of mine")
    assert (events[-1].finish_reason, events[-1].id) == ("error", None)
    assert done[good][0].ids == alone(model, prompts[0], 12, stop_tokens=())[0]
    assert done[good][0].error is None
    assert (engine.stats.failed, engine.stats.finished) == (1, 1)
    assert engine.blocks.used_blocks == 0


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=1.0, seed=0)], ids=["greedy", "drawn"])
def test_logits_that_are_no_numbers_end_their_text_and_no_other(sampling, model, make, monkeypatch):
    real = engine_module.paged_forward

    def one_row_is_nan(*args):
        logits = real(*args)
        logits[0] = torch.nan
        return logits

    engine = make(BytesTokenizer())
    numbers = [engine.add(prompt, 4, sampling, stop_tokens=()) for prompt in PROMPTS[:2]]
    monkeypatch.setattr(engine_module, "paged_forward", one_row_is_nan)
    engine.step()
    monkeypatch.setattr(engine_module, "paged_forward", real)
    done = engine.run()
    first, second = (done[number][0] for number in numbers)
    assert first.finish_reason == "error"
    assert "NaN" in first.error
    assert second.ids == alone(model, PROMPTS[1], 4, sampling, stop_tokens=())[0]


def test_an_interrupt_anywhere_in_a_step_leaves_every_text_right(model, make):
    """KeyboardInterrupt at every 7th line that the engine runs: who was being written ends, all others are right."""
    wishes = {"n": 2, "stop_tokens": ()}
    sampling = Sampling(temperature=1.0, seed=3)
    expected = [alone(model, prompt, 6, sampling, **wishes) for prompt in PROMPTS]
    rooms = ("serving/engine.py", "serving/request.py", "serving/scheduler.py", "GPT2Model/text_generation.py")
    failed = 0
    for at in range(5, 900, 29):
        engine, lines = make(BytesTokenizer(), max_running=5, num_blocks=40, max_batch_tokens=16), 0
        numbers = [engine.add(prompt, 6, sampling, **wishes) for prompt in PROMPTS]

        def trace(frame, event, arg, at=at):
            nonlocal lines
            if not frame.f_code.co_filename.endswith(rooms):
                return None
            if event == "line":
                lines += 1
                if lines == at:
                    raise KeyboardInterrupt
            return trace

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            for _ in range(40):
                engine.step()
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(before)
        done = engine.run()
        engine.blocks.check()
        assert engine.blocks.used_blocks == 0
        assert engine.idle
        for number, texts in zip(numbers, expected, strict=True):
            for completion, ids in zip(done[number], texts, strict=True):
                failed += completion.finish_reason == "error"
                if completion.finish_reason != "error":
                    assert (completion.ids, completion.text) == (ids, BytesTokenizer().decode(ids))
    assert failed < 20


def test_an_interrupt_while_a_token_is_being_spelled_ends_that_text_and_no_other(model, make):
    class Interrupted(BytesTokenizer):
        calls = 0

        def decode(self, ids):
            Interrupted.calls += 1
            if Interrupted.calls == 5:
                raise KeyboardInterrupt
            return super().decode(ids)

    engine = make(Interrupted())
    numbers = [engine.add(prompt, 8, stop_tokens=()) for prompt in PROMPTS[:2]]
    with pytest.raises(KeyboardInterrupt):
        engine.run()
    done = engine.run()
    texts = [done[number][0] for number in numbers]
    assert sorted(text.finish_reason for text in texts) == ["error", "length"]
    for text, prompt in zip(texts, PROMPTS, strict=False):
        if text.finish_reason == "error":
            assert "interrupted" in text.error
        else:
            assert text.ids == alone(model, prompt, 8, stop_tokens=())[0]
            assert text.text == BytesTokenizer().decode(text.ids)


def test_a_step_within_a_step_is_refused(make):
    engine, said = make(), []

    def on_token(event):
        try:
            engine.step()
        except RuntimeError as error:
            said.append(str(error))

    number = engine.add([1, 2], 3, on_token=on_token)
    assert len(engine.run()[number][0].ids) == 3
    assert len(said) == 3
    assert "in a step already" in said[0]


def test_a_cancelled_text_says_so_to_who_listens_and_nothing_is_held_of_what_nobody_keeps(make):
    engine, events = make(BytesTokenizer()), []
    number = engine.add(PROMPTS[1], 30, stop_tokens=(), on_token=events.append, keep=False)
    for _ in range(4):
        engine.step()
    engine.cancel(number)
    assert engine.run() == {}
    assert [event.finish_reason for event in events] == [None] * 4 + ["cancelled"]
    assert events[-1].id is None
    assert engine.take(number) is None


def test_a_stream_is_looked_at_when_it_is_asked_for_and_not_at_its_first_token(make):
    engine = make(BytesTokenizer())
    with pytest.raises(ValueError, match="cannot be taken"):
        engine.stream("a", 0)
    with pytest.raises(TypeError):
        engine.stream("a", 3, on_token=print)


def test_stop_texts_may_come_from_a_generator(model, make):
    (text,) = [done.text for done in generate_text(model, BytesTokenizer(), PROMPTS[1], 20, stop_tokens=())]
    stop = text[3:5]
    engine = make(BytesTokenizer())
    number = engine.add(PROMPTS[1], 20, stop=(one for one in [stop]), stop_tokens=())
    (done,) = engine.run()[number]
    assert (done.finish_reason, done.text) == ("stop", text[: text.index(stop)])


def test_a_default_stop_token_that_the_model_does_not_know_is_none(model):
    small = GPTModel({**model.cfg, "vocab_size": 256})
    engine = Engine(small, BytesTokenizer(), num_blocks=8)  # whose end of text is 256
    number = engine.add("ab", 2)
    assert len(engine.run()[number][0].ids) == 2
    with pytest.raises(ValueError, match=r"0\.\.255"):
        engine.add("ab", 2, stop_tokens=256)


@pytest.mark.parametrize(
    ("wish", "said"),
    [
        ({"sampling": {"temperature": 1.0}}, r"Sampling\(temperature=0.8\)"),
        ({"on_token": 5}, "function of a TokenEvent"),
        ({"stop": 5}, "stop must be texts"),
        ({"stop_tokens": 5.0}, "ids"),
        ({"prompt": None}, "prompt"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": [2**70]}, "wrong tokenizer"),
        ({"prompt": [257]}, r"0\.\.256"),
        ({"max_new_tokens": 2.5}, "max_new_tokens"),
    ],
    ids=str,
)
def test_what_a_beginner_passes_by_mistake_is_said_in_words(wish, said, make):
    with pytest.raises(ValueError, match=said):
        make(BytesTokenizer()).add(**{"prompt": "ab", "max_new_tokens": 3} | wish)


@pytest.mark.parametrize(
    "sizes", [{"block_size": 0}, {"max_running": "8"}, {"num_blocks": 10**13}, {"num_blocks": 2.5}]
)
def test_sizes_are_looked_at_before_anything_is_made(sizes, model):
    with pytest.raises(ValueError, match="the engine cannot be made"):
        Engine(model, **sizes)
    with pytest.raises(ValueError, match="first argument is the model, a GPTModel, got BytesTokenizer"):
        Engine(BytesTokenizer(), model)
