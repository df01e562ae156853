"""notebooks/llm.ipynb runs whole, and what it prints is right: held against numbers computed here, another way."""

import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from orchestrator.text import tales
from tests.notebooks.reading import NUMBER, matrix, numbers, pictures, printed

NOTEBOOK = "llm.ipynb"
PATH = Path(__file__).resolve().parents[2] / "notebooks" / NOTEBOOK
EPS = np.finfo(np.float32).eps


# ------------------------------------------------------------------ the form (of all notebooks: test_form.py)


def test_its_minutes_are_those_of_the_plan(committed):
    text = "\n".join(cell.source for cell in committed.cells if cell.cell_type == "markdown")
    headings = re.findall(r"^## \d\. .*\((\d+) minutes\)$", text, flags=re.MULTILINE)
    assert [int(minutes) for minutes in headings] == [10, 20, 10, 10, 10, 15, 15]


# ------------------------------------------------------------------ what it shows


def test_tokens(executed):
    text = printed(executed, "one_hot")
    assert "8 tokens: [(464, 'The'), (3797, ' cat'), (3332, ' sat'), (13, '.'), (383, ' The')" in text
    assert re.search(r"vectors +\(1, 4, 8\)", text)


def test_the_head_by_hand_gives_the_numbers_on_paper(executed):
    queries = np.array([[2, 4, 0, 0], [0, 0, 6, 2], [0, 2, 4, 0]], dtype=float)
    keys = np.array([[1, 0, 0, 1], [0, 1, 0, 1], [0, 0, 1, 1]], dtype=float)
    values = np.array([[6, 0, 0, 3], [0, 6, 0, 3], [0, 0, 6, 3]], dtype=float)
    scaled = queries @ keys.T / 2
    np.testing.assert_allclose(matrix("scaled scores:", printed(executed, "assert scores[1, 2]")), scaled)

    exponentials = np.exp(np.where(np.tri(3) == 1, scaled, -np.inf))
    weights = exponentials / exponentials.sum(axis=1, keepdims=True)
    text = printed(executed, "too_late")
    np.testing.assert_allclose(matrix("attention weights:", text), weights, atol=6e-5)
    everything = np.exp(scaled) / np.exp(scaled).sum(axis=1, keepdims=True)
    sums = numbers(r"after the softmax: tensor\(\[NUMBER, NUMBER, NUMBER\]\)", text)
    np.testing.assert_allclose(sums, np.tril(everything).sum(axis=1), atol=6e-5)

    text = printed(executed, "def one_head")
    np.testing.assert_allclose(matrix("context:", text), weights @ values, atol=6e-5)
    assert re.search(r"eager +context \(1, 1, 3, 4\), weights: \(1, 1, 3, 3\)", text)
    assert re.search(r"sdpa +context \(1, 1, 3, 4\), weights: none returned", text)


def test_the_scale_keeps_the_softmax_from_being_sure(executed):
    text = printed(executed, "largest_scaled")
    for D in (4, 64, 1024):
        spread, raw, scaled = numbers(rf"D = +{D}: .*deviation +NUMBER; .*raw NUMBER, scaled NUMBER", text)
        assert spread == pytest.approx(math.sqrt(D), rel=0.03)
        assert scaled < 0.3
        assert raw > (0.3 if D == 4 else 0.8)


def test_the_wrong_view_mixes_tokens_and_the_right_one_does_not(executed):
    text = printed(executed, "wrong = x.view")
    np.testing.assert_array_equal(matrix("wrong, head 0:", text), np.repeat([[0], [0], [1]], 4, axis=1))
    np.testing.assert_array_equal(matrix("right, head 0:", text), np.repeat([[0], [1], [2]], 4, axis=1))


def test_the_number_of_heads_costs_no_parameters(executed):
    text = printed(executed, "for heads in")
    assert len(set(re.findall(r": (\d+) parameters", text))) == 1
    assert numbers(r"num_heads=8, each of width 1: NUMBER parameters", text) == [8 * 24 + 8 * 8 + 8]
    assert re.search(r"scores +\(1, 2, 3, 3\)", text)


ROW = rf" +{NUMBER} +{NUMBER} +{NUMBER} +{NUMBER}$"


def check_rows(text: str, names: list[str], largest: float) -> None:
    """Each row of `compare`: flash is within a bound that is itself a few eps and no more; and it did run."""
    differences = []
    for name in names:
        row = re.search(f"^{re.escape(name)}{ROW}", text, flags=re.MULTILINE)
        assert row, f"no row {name!r} in:\n{text}"
        apart, off, on, bound = (float(group) for group in row.groups())
        assert on <= bound
        assert apart <= (off + on) * 1.05  # the triangle inequality, with two digits printed
        assert 0 < off <= bound / 2.8
        assert bound <= 3.1 * off + 4 * EPS * largest
        differences.append(apart)
    assert max(differences) > 0, "on and off are equal in every bit: was anything toggled?"


def test_the_toggle_moves_outputs_and_gradients_in_their_last_digits_only(executed):
    text = printed(executed, "def compare")
    assert "use_flash=True: sdpa" in text
    assert "use_flash=False: eager" in text
    check_rows(text, ["output", "gradient of x", "gradient of W_qkv"], largest=100)


def test_with_flash_on_no_table_is_made(executed):
    text = printed(executed, "class TableSpy")
    (tables,) = numbers(r"use_flash=False: NUMBER tables of 100 x 100", text)
    assert tables >= 3
    assert "_softmax" in text
    assert "use_flash=True: 0 tables of 100 x 100, made by: none" in text
    assert "weights (2, 4, 100, 100), from eager" in text


def test_dropout_makes_implementations_differ_entirely_and_eval_does_not(executed):
    text = printed(executed, "train again")
    assert text.count("same seed, same result: True") == 3
    train, evaluation = numbers(r"flash_tiled .*train NUMBER, eval NUMBER", text)
    assert train > 0.1
    assert evaluation < 1e-5
    assert numbers(r"mean of 400 draws, from eval: NUMBER", text)[0] < train / 5


def test_layer_norm_and_gelu(executed):
    text = printed(executed, "unbiased=False")
    torch.manual_seed(0)
    x = (5 * torch.randn(2, 3, 8) + 2).double().numpy()
    centred = x - x.mean(axis=-1, keepdims=True)
    gap = np.abs(centred / x.std(axis=-1, ddof=1, keepdims=True) - centred / x.std(axis=-1, keepdims=True)).max()
    assert numbers(r"divided by n - 1 instead: NUMBER away", text)[0] == pytest.approx(gap, abs=6e-4)
    assert "[0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]" in text

    def exact(x):
        return 0.5 * x * (1 + math.erf(x / math.sqrt(2)))

    def with_tanh(x):
        return 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    gap = max(abs(with_tanh(x) - exact(x)) for x in np.linspace(-5, 5, 1001))
    assert numbers(r"exact form: at most NUMBER", text)[0] == pytest.approx(gap, rel=0.03)
    assert len(pictures(executed, "unbiased=False")) == 1


def test_the_block_leaves_the_stream_alone(executed):
    text = printed(executed, "widened = ")
    assert "pre-norm, nothing to add, gives x itself: True" in text
    assert "post-norm, nothing to add, gives x itself: False" in text
    assert re.search(r"widened +\(2, 10, 256\)", text)


def test_gpt2_has_124_439_808_parameters_and_the_books_dict_a_few_less(executed):
    text = printed(executed, "attn_implementation")
    width, layers = 768, 12
    biases = layers * 3 * width
    total = 50257 * width + 1024 * width + layers * (12 * width**2 + 13 * width) + 2 * width
    assert total == 124_439_808
    assert f"parameters: {total:,}\n" in text
    assert f"the book's dict, without qkv bias: {total - biases:,}; " in text
    assert f"with a head of its own: {total - biases + 50257 * width:,}" in text
    assert (total - biases, total - biases + 50257 * width) == (124_412_160, 163_009_536)
    assert "the head sees a change in the embedding: True" in text


def test_a_fresh_model_guesses(executed):
    loss, classes, uniform = numbers(r"loss NUMBER, ln NUMBER = NUMBER", printed(executed, "probabilities[0,"))
    assert classes == tales.TalesTokenizer().vocab_size
    assert uniform == pytest.approx(math.log(classes), abs=1e-4)
    assert loss == pytest.approx(uniform, abs=0.3)  # random opinions cost about 0.05**2 * 128 / 2 = 0.16


def test_the_cfg_toggle_takes_set_attention_and_then_only_last_digits_move(executed):
    text = printed(executed, "model.set_attention(cfg)")
    assert re.findall(r": +(sdpa|eager)$", text, flags=re.MULTILINE) == ["sdpa", "sdpa", "eager"]
    names = ["token_embedding.weight", "blocks.0.attention.W_qkv.weight", "blocks.1.norm_2.weight"]
    check_rows(text, ["logits", *names], largest=10)
    per_block = 2 * len(("W_qkv", "out_proj", "up_proj", "down_proj", "norm_1", "norm_2"))
    assert f"all {1 + 2 + 2 * per_block + 2} within their bounds" in text  # logits, embeddings, blocks, final norm
    assert "same seed, same weights, whatever the toggle: True" in text
    assert "use_flash=True on a Mac's GPU: eager; sdpa says: it gave NaN on MPS" in text


def test_nothing_before_a_changed_token_moves(executed):
    text = printed(executed, "causality_map(moved")
    assert numbers(r"before the changed token, at most: NUMBER", text) == [0.0]
    assert numbers(r"at it and after it, at least: +NUMBER", text)[0] > 1e-4
    assert "ValueError: 65 tokens are more than context_length=64" in text
    assert len(pictures(executed, "causality_map(moved")) == 1


def test_training_runs_to_the_floor(executed):
    text = printed(executed, "train(model, corpus, settings)")
    first, last, floor, gap = numbers(r"loss: NUMBER -> NUMBER, floor NUMBER: NUMBER above it", text)
    held_out = tales.stories(200, seed=0)
    tokens = sum(len(re.findall(r"\w+|[.,]", story)) + 1 for story in held_out)
    assert floor == pytest.approx(-math.fsum(map(tales.log_probability, held_out)) / tokens, abs=1e-4)
    assert first > 5
    assert floor - 0.002 <= last <= floor + 0.05  # no model beats the floor of these very stories by more than noise
    assert gap == pytest.approx(last - floor, abs=2e-4)
    assert len(pictures(executed, "train(model, corpus, settings)")) == 1


def test_the_story_shown_has_the_probability_that_is_printed(executed):
    text = printed(executed, "next_word_probabilities")
    story = " ".join(text.split("\n\n")[0].split())
    assert tales.check(story) is None
    tokens = len(re.findall(r"\w+|[.,]", story))
    assert numbers(r"this story: NUMBER nats", text)[0] == pytest.approx(
        -tales.log_probability(story) / (tokens + 1), abs=1e-4
    )
    assert "the grammar's checker: word " in text  # before training it writes nonsense


def test_cached_writing_and_what_the_trained_model_writes(executed):
    text = printed(executed, "use_cache=False")
    assert re.search(r"cached_keys +\(1, 4, 51, 32\)", text)
    assert "old keys after 31 more tokens are as they were: True" in text
    good, asked = numbers(r"NUMBER of NUMBER stories obey the grammar", text)
    assert asked == 20
    assert good >= 12
    story = " ".join(text.split("\n\n")[-2].split())  # the last but one piece: then come the figures
    first_fault = re.search(r"the first fault: (.*)", text)[1]
    assert tales.check(story) in (None, first_fault)  # its own checker, asked again here
    assert "same seed, same stories: True" in text
    assert len(pictures(executed, "use_cache=False")) == 1


def test_two_mistakes_without_an_error_the_wrong_corner_and_the_exact_gelu(executed):
    text = printed(executed, "upper_left = ")
    np.testing.assert_array_equal(matrix("upper left:", text), np.tri(2, 5))
    np.testing.assert_array_equal(matrix("lower right:", text), np.tri(2, 5, 3))
    right, wrong = numbers(r"mask NUMBER from the truth, with is_causal=True NUMBER", text)
    assert right < 1e-6 < 0.1 < wrong
    toggle, gelu = numbers(r"by NUMBER with the toggle, by NUMBER with the exact GELU", text)
    assert toggle < 1e-4
    assert gelu > 20 * toggle


# What a block of this model holds, counted by hand: 12 tokens, width 128, 4 heads of 32, feed-forward 512.
BLOCK = {
    "norm_1": (1, 12, 128),
    "attention.qkv": (1, 12, 3 * 128),
    "attention.queries": (1, 4, 12, 32),
    "attention.keys": (1, 4, 12, 32),
    "attention.values": (1, 4, 12, 32),
    "attention.context": (1, 4, 12, 32),
    "attention.merged": (1, 12, 128),
    "attention.output": (1, 12, 128),
    "after_attention": (1, 12, 128),
    "norm_2": (1, 12, 128),
    "feed_forward.hidden": (1, 12, 4 * 128),
    "feed_forward.activated": (1, 12, 4 * 128),
    "feed_forward.output": (1, 12, 128),
    "output": (1, 12, 128),
}


def test_the_trace_shows_every_tensor_of_a_block_and_says_why_the_weights_are_missing(executed):
    text = printed(executed, "watched = trace(")
    rows = re.findall(r"^blocks\.1\.(\S+) +\(([\d, ]+)\) +(.+)$", text, flags=re.MULTILINE)
    assert {name: tuple(map(int, shape.split(","))) for name, shape, _ in rows} == BLOCK
    assert all(len(axes.split(", ")) == len(BLOCK[name]) for name, _, axes in rows)
    assert text.count("tokens: <|endoftext|> One ") == 1
    assert "KeyError: blocks.1.attention.weights does not exist: attention ran by sdpa" in text
    assert "recomputed: weights (1, 4, 12, 12), rows that sum to 1: 48" in text


def test_the_answers_explain_each_tensor_that_the_trace_shows(committed):
    last = next(cell.source for cell in committed.cells if "<summary>every tensor" in cell.source)
    shapes = dict(re.findall(r"^\| `([\w.]+)` \| \(([^)]+)\) \|", last, flags=re.MULTILINE))
    sizes = {"B": 1, "T": 12, "C": 128, "3C": 384, "4C": 512, "H": 4, "D": 32}
    assert {name: tuple(sizes[letter] for letter in shape.split(", ")) for name, shape in shapes.items()} == BLOCK
    assert last.count("Fourteen") == 1
    assert len(BLOCK) == 14


# ------------------------------------------------------------------ where it leads


def test_it_names_the_other_notebooks_and_each_exists(committed):
    text = "\n".join(cell.source for cell in committed.cells if cell.cell_type == "markdown")
    others = {"attention", "training", "generation", "inside", "pretrained", "break_it"}
    for name in others:
        assert f"| `{name}.ipynb` |" in text
        assert (PATH.parent / f"{name}.ipynb").is_file(), name
    for path in re.findall(r"`([\w/]+\.(?:py|md))`", text):
        assert (PATH.parent.parent / path).is_file(), path


def exercises(notebook) -> list[str]:
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    return re.split(r"^\*\*\d\. ", text.split("## Exercises\n")[1], flags=re.MULTILINE)[1:]


def test_each_exercise_has_something_to_run_and_a_hint(committed):
    texts = exercises(committed)
    assert 3 <= len(texts) <= 6
    for text in texts:
        assert text.count("```python\n") == 1
        assert text.count("*Hint:*") == 1


@pytest.fixture(scope="module")
def exercised(committed):
    """What each exercise's code prints, after the cells it builds on; with untrained models for trained ones."""
    cells = [cell.source for cell in committed.cells if cell.cell_type == "code"]
    imports, head, by_hand = (
        next(source for source in cells if marker in source)
        for marker in ("import copy", "def one_head", "model.token_embedding.weight.T")
    )
    head = head[head.index("def one_head") : head.index("context, weights =")]
    models = """
model, other, text = GPTModel(cfg).eval(), GPTModel(cfg).eval(), torch.arange(12)[None]
other.load_state_dict(model.state_dict())
for block in other.blocks:
    block.feed_forward.gelu = torch.nn.GELU()
"""
    codes = [re.search(r"```python\n(.*?)```", text, flags=re.DOTALL)[1] for text in exercises(committed)]
    pieces = [imports.replace("%matplotlib inline", ""), head, by_hand, models, *codes[:4]]  # the others are commands
    script = "\nprint('=====')\n".join(pieces)
    run = subprocess.run([sys.executable, "-c", script], cwd=PATH.parent.parent, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout.split("=====\n")[-4:]


def test_exercise_1_gives_the_weights_that_paper_gives(exercised):
    keys = np.array([[1, 0, 0, 1], [0, 1, 0, 1], [0, 1, 1, 1]], dtype=float)
    scores = np.array([[2, 4, 0, 0], [0, 0, 6, 2], [0, 2, 4, 0]], dtype=float) @ keys.T / 2
    weights = np.exp(np.where(np.tri(3) == 1, scores, -np.inf))
    weights /= weights.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(matrix("", "\n" + exercised[0].split("tensor")[2]), weights, atol=6e-5)


def test_exercise_2_shows_equal_shapes_and_other_numbers(exercised):
    right, wrong = exercised[1].splitlines()
    assert right[:12] == wrong[:12] == "(1, 2, 3, 4)"
    assert max(numbers(r"\[NUMBER, NUMBER, NUMBER\]", right)) < 1e-4
    assert min(numbers(r"\[NUMBER, NUMBER, NUMBER\]", wrong)) > 1e-2


def test_exercise_3_does_not_show_the_future_in_a_fresh_model_s_loss(exercised):
    with_mask, without = map(float, exercised[2].split())
    assert 0 < abs(with_mask - without) < 0.2


def test_exercise_4_names_the_gelu(exercised):
    assert "blocks.0.feed_forward.activated" in exercised[3].splitlines()[0]


def test_the_commands_of_the_exercises_are_checks_that_exist(committed):
    from orchestrator.learning.checks.registry import EXERCISES, GROUPS

    commands = [found for text in exercises(committed) for found in re.findall(r"^!.* check (\w+)$", text, flags=re.M)]
    assert commands == ["attention", "gpt2"]
    assert {*commands} <= {*EXERCISES, *GROUPS}
    for name in re.findall(r"`(\w+)`", "".join(exercises(committed)[4:6]).replace("W_qkv", "")):
        assert name in EXERCISES
