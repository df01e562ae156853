"""generate_text(): what a prompt is continued with does not depend on the batch, the streaming or the path taken."""

import string
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from GPT2Model.generation import problems_of
from GPT2Model.prompts import read_prompts
from GPT2Model.sampling import Sampling
from GPT2Model.text_generation import generate_text, problems_of_text
from orchestrator.text.tokenizers import BytesTokenizer, CharTokenizer

LETTERS = CharTokenizer("".join(sorted({*string.ascii_letters, *string.digits, ";"} - {*"QXZ"})))  # 61 ids with the end
PROMPTS = ["Hello", "a", "NoMoreThan9", "yes;no"]
DRAWN = Sampling(1.1, top_p=0.97, repetition_penalty=1.1, seed=3)


@pytest.fixture(scope="module")
def model(build):
    """Large weights and a head of its own, so that the greedy text varies; context_length 40."""
    return build(seed=1, init_std=0.6, tie_weights=False, context_length=40)


def plain_loop(model, prompt: str, new: int, tokenizer=LETTERS) -> list[int]:
    """Greedy, without a cache or a batch."""
    ids = torch.tensor([tokenizer.encode(prompt)])
    start = ids.shape[1]
    with torch.no_grad():
        while ids.shape[1] < start + new and (ids.shape[1] == start or ids[0, -1] != tokenizer.end_of_text):
            ids = torch.cat([ids, model(ids)[:, -1].argmax(-1, keepdim=True)], 1)
    return ids[0, start:].tolist()


@pytest.mark.parametrize("path", ["plain", "uncached", "paged", "draft"])
def test_greedy_text_is_the_plain_loop_s_on_every_path(path, model, build):
    settings = {"uncached": {"use_cache": False}, "draft": {"draft": build(seed=2, context_length=40)}}.get(path, {})
    with model.using_attention("paged_attention" if path == "paged" else "auto"):
        found = generate_text(model, LETTERS, PROMPTS, 20, **settings)
    for prompt, completion in zip(PROMPTS, found, strict=True):
        ids = plain_loop(model, prompt, 20)
        assert completion.ids == ids
        assert completion.prompt_ids == LETTERS.encode(prompt)
        assert completion.text == LETTERS.decode(ids).removesuffix("<|endoftext|>")
        assert completion.finish_reason == ("stop" if LETTERS.end_of_text in ids else "length")
        assert completion.logprobs is None
    assert min(len(set(one.ids)) for one in found) > 8  # the text varies


@settings(max_examples=5, deadline=None)
@given(
    prompts=st.lists(st.sampled_from(PROMPTS) | st.text("0123ABab", min_size=1, max_size=9), min_size=2, max_size=4),
    n=st.integers(1, 3),
    seed=st.integers(0, 1000),
)
def test_what_is_drawn_for_a_prompt_does_not_depend_on_the_batch(prompts, n, seed, model):
    """Sample j of prompt i has the seed of one alone with seed + i * n + j."""
    sampling = {"temperature": 1.2, "top_k": 50, "repetition_penalty": 1.1}
    found = generate_text(model, LETTERS, prompts, 12, Sampling(**sampling, seed=seed), n=n, logprobs=1)
    assert len(found) == n * len(prompts)
    for index, completion in enumerate(found):
        own = Sampling(**sampling, seed=seed + index)
        (alone,) = generate_text(model, LETTERS, prompts[index // n], 12, own, logprobs=1)
        assert (completion.ids, completion.text, completion.finish_reason) == (
            alone.ids,
            alone.text,
            alone.finish_reason,
        )
        for ours, theirs in zip(completion.logprobs, alone.logprobs, strict=True):
            assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-9)


def test_samples_with_a_draft_have_their_own_seeds_too(model, build):
    draft, sampling = build(seed=2, context_length=40), Sampling(1.1, seed=3)
    found = generate_text(model, LETTERS, ["Hello", "a"], 12, sampling, n=2, draft=draft)
    assert len({one.text for one in found}) == 4
    for index, one in enumerate(found):
        prompt = ("Hello", "a")[index // 2]
        assert [one] == generate_text(model, LETTERS, prompt, 12, replace(sampling, seed=3 + index), draft=draft)


def test_samples_of_one_prompt_differ_and_a_seed_gives_them_again(model):
    found = generate_text(model, LETTERS, "Hello", 15, DRAWN, n=6)
    assert len({one.text for one in found}) == 6
    assert generate_text(model, LETTERS, "Hello", 15, DRAWN, n=6) == found
    assert (
        generate_text(model, LETTERS, "Hello", 15, Sampling(1.1, top_p=0.97, repetition_penalty=1.1, seed=4))
        != found[:1]
    )


@pytest.mark.parametrize("sampling", [Sampling(), DRAWN], ids=["greedy", "drawn"])
def test_log_probabilities_are_log_softmax_of_one_pass_over_the_whole_text(sampling, model):
    """Of the model's own distribution: penalty, temperature and cuts do not show in them."""
    for completion in generate_text(model, LETTERS, PROMPTS, 15, sampling, logprobs=4):
        with torch.no_grad():
            logits = model(torch.tensor([completion.prompt_ids + completion.ids]))[0, len(completion.prompt_ids) - 1 :]
        expected = logits.log_softmax(-1)
        assert len(completion.logprobs) == len(completion.ids)
        for noted, id, row in zip(completion.logprobs, completion.ids, expected, strict=False):
            assert noted.logprob == pytest.approx(row[id].item(), abs=1e-10)
            assert list(noted.top) == row.topk(4).indices.tolist()
            assert list(noted.top.values()) == pytest.approx(row.topk(4).values.tolist(), abs=1e-10)


@pytest.mark.parametrize("draft", [False, True], ids=["alone", "with a draft"])
def test_a_text_ends_before_its_stop_string_and_its_tokens_end_with_it(draft, model):
    for prompt in PROMPTS:
        free = plain_loop(model, prompt, 20)
        text = LETTERS.decode(free).removesuffix("<|endoftext|>")
        stop = text[5:8]  # three tokens
        (found,) = generate_text(model, LETTERS, prompt, 20, stop=["zzzz", stop], draft=model if draft else None)
        assert found.text == text[: text.index(stop)]
        assert found.ids == free[: text.index(stop) + 3]
        assert found.finish_reason == "stop"


def test_a_stop_token_ends_a_text_and_is_not_shown(model):
    free = plain_loop(model, "Hello", 20)
    stop = free[6]
    end = free.index(stop) + 1
    for stop_tokens in (stop, {stop}, [stop, LETTERS.end_of_text]):
        (found,) = generate_text(model, LETTERS, "Hello", 20, stop_tokens=stop_tokens)
        assert (found.ids, found.finish_reason) == (free[:end], "stop")
        assert found.text == LETTERS.decode(free[: end - 1])


def test_the_tokenizers_end_of_text_ends_a_text_unless_other_stops_are_named(build):
    model = build(seed=1, init_std=0.6, tie_weights=False, context_length=40)
    tokenizer = CharTokenizer(LETTERS.characters)
    end = plain_loop(model, "Hello", 20)[6]
    tokenizer.end_of_text = end  # as if that one stood between documents
    (found,) = generate_text(model, tokenizer, "Hello", 20)
    assert found.ids == plain_loop(model, "Hello", 20)[:7]
    (free,) = generate_text(model, tokenizer, "Hello", 20, stop_tokens=())
    assert free.ids == plain_loop(model, "Hello", 20)


def test_pieces_are_shown_as_they_come_and_no_row_that_has_ended_is_heard_of_again(model):
    texts, tokens, order = ["", "", "", ""], [[], [], [], []], []
    stop = LETTERS.decode(plain_loop(model, PROMPTS[0], 20))[3:5]

    def on_text(index, piece):
        assert piece
        texts[index] += piece
        order.append(index)

    found = generate_text(
        model, LETTERS, PROMPTS, 20, stop=stop, on_text=on_text, on_token=lambda index, id: tokens[index].append(id)
    )
    assert texts == [one.text for one in found]
    assert tokens == [one.ids for one in found]
    assert order[:4] != [0, 0, 0, 0]  # all grow at once
    assert len(found[0].ids) == 5
    assert max(len(one.ids) for one in found) > 5


def test_a_batch_ends_when_every_text_has_and_not_later(model):
    read, stop = [], LETTERS.decode(plain_loop(model, "Hello", 20))[3:5]
    hook = model.token_embedding.register_forward_hook(lambda *_: read.append(1))
    (found,) = generate_text(model, LETTERS, "Hello", 20, stop=stop)
    hook.remove()
    assert len(read) == len(found.ids) == 5


def test_bytes_of_half_a_character_at_the_end_are_shown_as_broken(build):
    model, tokenizer = build(seed=1, vocab_size=257, init_std=0.6, tie_weights=False), BytesTokenizer()
    pieces = []
    found = generate_text(
        model, tokenizer, "é", 12, Sampling(1.5, seed=0), n=4, on_text=lambda *new: pieces.append(new)
    )
    for index, one in enumerate(found):
        kept = [id for id in one.ids if id != tokenizer.end_of_text]
        assert one.text == tokenizer.decode(kept) == "".join(piece for which, piece in pieces if which == index)
    assert any("\ufffd" in one.text for one in found)


def test_ids_go_in_and_come_out_without_a_tokenizer(model):
    rows = [LETTERS.encode(prompt) for prompt in PROMPTS]
    found = generate_text(model, None, rows, 6)
    assert [one.text for one in found] == [None] * 4
    assert [one.ids for one in found] == [plain_loop(model, prompt, 6) for prompt in PROMPTS]
    assert generate_text(model, None, rows[0], 6) == found[:1]
    assert generate_text(model, None, torch.tensor([rows[0]]), 6) == found[:1]


def test_no_new_token_is_no_text(model):
    (found,) = generate_text(model, LETTERS, "Hello", 0, logprobs=2)
    assert (found.ids, found.text, found.finish_reason, found.logprobs) == ([], "", "length", [])


def test_a_window_that_slides_goes_on_past_the_context(model):
    (found,) = generate_text(model, LETTERS, "Hello", 60, past_context="slide", stop_tokens=())
    ids = torch.tensor([LETTERS.encode("Hello")])
    with torch.no_grad():
        for _ in range(60):
            ids = torch.cat([ids, model(ids[:, -40:])[:, -1].argmax(-1, keepdim=True)], 1)
    assert found.ids == ids[0, 5:].tolist()


def test_a_model_in_training_writes_the_same_and_is_left_in_training(build):
    model = build(seed=1, drop_rate=0.4, init_std=0.6, tie_weights=False, context_length=40).train()
    (found,) = generate_text(model, LETTERS, "Hello", 20)
    assert model.training
    assert found.ids == plain_loop(model.eval(), "Hello", 20)


def test_everything_that_is_wrong_is_said_at_once_and_nothing_computed(model):
    read = []
    hook = model.register_forward_pre_hook(lambda *_: read.append(1))
    with pytest.raises(ValueError) as caught:
        generate_text(
            model, LETTERS, ["", "fine", "ä"], 9, Sampling(0.0, top_k=3), n=3, stop=["x", ""], stop_tokens=[61],
            logprobs=62, past_context="wrap", draft=model, use_cache=False,
        )  # fmt: skip
    hook.remove()
    assert read == []
    lines = str(caught.value).splitlines()[1:]
    expected = (
        "prompt 1 of 3 is empty", "prompt 3 of 3 cannot be read: 'ä'", "top_k would change nothing", "got 61",
        "'wrap'", "n=3 asks for 3", "at most 61, got 62", "a character at least", "not noted while a draft",
        "with use_cache=False",
    )  # fmt: skip
    for part in expected:
        assert any(part in line for line in lines), part
    assert len(lines) == len(expected)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"prompts": []}, "prompts are empty"),
        ({"prompts": [[3, 61]]}, "0..60, got 3..61"),
        ({"prompts": "Hello", "max_new_tokens": 36}, "at most 35 new tokens fit"),
        ({"prompts": "Hello", "past_context": "slide", "draft": True}, "a window that slides"),
        ({"prompts": "Hello", "tokenizer": None}, "no tokenizer"),
        ({"prompts": [3], "tokenizer": None, "stop": "x"}, "no tokenizer"),
        ({"prompts": [3], "tokenizer": None, "on_text": print}, "no tokenizer"),
        ({"prompts": "Hello", "n": 0}, "1 or more, got 0"),
        ({"prompts": "Hello", "logprobs": -1}, "got -1"),
        ({"prompts": ""}, "give what stands before a text: '<|endoftext|>'"),
    ],
    ids=str,
)
def test_one_wrong_argument_is_refused_by_itself(wrong, message, model):
    arguments = {"tokenizer": LETTERS, "max_new_tokens": 3} | wrong
    if arguments.get("draft"):
        arguments["draft"] = model
    with pytest.raises(ValueError) as caught:
        generate_text(model, **arguments)
    assert message in str(caught.value)
    assert len(str(caught.value).splitlines()) == 2


WRONG_CALLS = """
import traceback
import torch
from GPT2Model.config import from_preset
from GPT2Model.generation import generate
from GPT2Model.gpt2 import GPTModel
from GPT2Model.sampling import Sampling
from GPT2Model.speculative import generate_speculative
from GPT2Model.text_generation import generate_text
from orchestrator.text.tokenizers import BytesTokenizer

m = GPTModel(from_preset("nano", n_layers=1, emb_dim=16, n_heads=2, vocab_size=257, context_length=16))
t, ids = BytesTokenizer(), torch.tensor([[1, 2]])
calls = {
    "pass Sampling(temperature=0.8)": lambda: generate_text(m, t, "a", 2, 0.8),
    "pass Sampling(temperature=0.8).": lambda: generate_speculative(m, m, ids, 2, {"temperature": 1}),
    "the model comes first": lambda: generate_text(t, m, "a", 2),
    "the model comes first ": lambda: generate("gpt2", ids, 2),
    "the model comes first and": lambda: generate_speculative(m, t, ids, 2),
    "the tokenizer comes second": lambda: generate_text(m, "a", t, 2),
    "stop strings are texts, got 3": lambda: generate_text(m, t, "a", 2, stop=3),
    "got None": lambda: generate_text(m, t, None, 2),
    "prompt 2 of 2 cannot be read: it must be a text or ids, got None": lambda: generate_text(m, t, ["a", None], 2),
    "got 5": lambda: generate_text(m, t, 5, 2),
    "got 5.": lambda: generate_text(m, t, torch.tensor(5), 2),
    "whole numbers, got 2.5": lambda: generate_text(m, t, torch.tensor([[2.5]]), 2),
    "no vocabulary has the token id 1180591620717411303424": lambda: generate_text(m, t, [2**70], 2),
    "got 5.0": lambda: generate_text(m, t, "a", 2, stop_tokens=5.0),
    "got '[1]'": lambda: generate(m, ids, 2, stop_tokens=[[1]]),
    "torch.tensor([tokenizer.encode(text)])": lambda: generate(m, "The ", 2),
}
for expected, call in calls.items():
    try:
        call()
    except (TypeError, ValueError) as error:
        place = [frame.filename for frame in traceback.extract_tb(error.__traceback__)][-1]  # who raised it
        right = expected.strip() in str(error) and "GPT2Model" in place and "object is not" not in str(error)
        print("right" if right else f"{expected}: {error}")
    else:
        print(f"{expected}: nothing was raised")
zeros = [torch.tensor(97), torch.tensor(98)]
print(generate_text(m, t, zeros, 2)[0].ids == generate_text(m, t, "ab", 2)[0].ids)
"""


def test_no_mistake_ends_in_an_error_of_python_s_or_torch_s():
    """In a process of its own: in this one the types of the arguments are checked before our lines run."""
    done = subprocess.run([sys.executable, "-c", WRONG_CALLS], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["right"] * 16 + ["True"]


def test_stop_strings_may_come_from_a_generator(model):
    (free,) = generate_text(model, LETTERS, "Hello", 20)
    (found,) = generate_text(model, LETTERS, "Hello", 20, stop=(one for one in [free.text[7]]))
    assert found.text == free.text[: free.text.index(free.text[7])]


def test_an_end_of_text_that_the_model_does_not_have_stops_nothing(build):
    class Plain(BytesTokenizer):
        end_of_text = 61

    class NoEnd(BytesTokenizer):
        end_of_text = None

    model = build(seed=1, init_std=0.6, tie_weights=False)  # 61 ids: 0 to 60
    for tokenizer in (Plain(), NoEnd()):
        (found,) = generate_text(model, tokenizer, [1, 2], 6)
        assert found.finish_reason == "length"
    with pytest.raises(ValueError, match=r"the prompt is empty, and a model continues one token at least\.$"):
        generate_text(model, NoEnd(), "", 3)


def test_of_several_prompts_the_ones_that_are_too_long_are_named(model, build):
    for more in ({}, {"draft": build(seed=2, context_length=40)}):
        with pytest.raises(ValueError) as caught:
            generate_text(model, LETTERS, ["a", "Hello" * 8, "b"], 3, **more)
        assert "  - prompt 2 of 3: a prompt of 40 tokens and 3 new ones are more" in str(caught.value)
        assert len(str(caught.value).splitlines()) == 2


def test_the_worth_of_a_draft_s_guesses_is_told_also_of_texts_that_a_stop_string_ends(model):
    (free,) = generate_text(model, LETTERS, "Hello", 20)
    told = {}
    found = generate_text(
        model, LETTERS, ["Hello", "a"], 20, draft=model, draft_tokens=4, stop=free.text[6], on_draft=told.__setitem__
    )
    assert [*told] == [0, 1]
    for index, one in enumerate(found):
        length = len(one.prompt_ids)
        assert told[index].ids[0, length:].tolist() == one.ids
        assert told[index].rounds == -(-len(one.ids) // 5)
        assert told[index].accepted == len(one.ids) - len(one.ids) // 5
        assert told[index].rejected == 0


def test_things_of_a_wrong_type_are_refused_in_words(model):
    """Of the functions that look at types: in these tests the signature of generate_text() is checked before."""
    rows, problems = read_prompts([["a"], 3.5, [1]], LETTERS)
    assert rows == [[1]]
    assert [problem.split(" cannot")[0] for problem in problems] == ["prompt 1 of 3", "prompt 2 of 3"]
    assert "whole number" in problems_of_text(Sampling(1.0), 1.5, (), None)[0]
    assert "got 2.5" in problems_of_text(Sampling(1.0), 1, (), 2.5)[0]
    assert "stop strings are texts" in problems_of_text(Sampling(1.0), 1, (3,), None)[0]
    assert "got True" in problems_of(model, torch.zeros(1, 1).long(), True, Sampling(), set())[0]


def test_a_draft_that_does_not_fit_is_refused_before_the_first_text_is_written(model, build):
    shown, short = [], build(seed=2, context_length=6)
    with pytest.raises(ValueError) as caught:
        generate_text(model, LETTERS, ["Hello", "NoMoreThan9", "0123456789"], 32, draft=short, draft_tokens=0,
                      on_text=lambda *new: shown.append(new))  # fmt: skip
    assert shown == []
    lines = str(caught.value).splitlines()[1:]
    for expected in ("draft_tokens", "11 tokens and the draft reads 6", "10 tokens and the draft reads 6",
                     "11 tokens and 32 new", "10 tokens and 32 new"):  # fmt: skip
        assert any(expected in line for line in lines), expected
    assert len(lines) == 5
