"""notebooks/llm.ipynb runs whole, and what it prints is right: held against numbers computed here, another way."""

import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
from filelock import FileLock
from nbclient import NotebookClient

from orchestrator.text import tales

NOTEBOOK = Path(__file__).resolve().parents[2] / "notebooks" / "llm.ipynb"
MINUTES = [10, 20, 10, 10, 10, 15, 15]
NUMBER = r"(-?\d+(?:\.\d+)?(?:e[+-]\d+)?)"
EPS = np.finfo(np.float32).eps


@pytest.fixture(scope="module")
def committed():
    return nbformat.read(NOTEBOOK, as_version=4)


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """The notebook, run from its own folder; once, also where pytest-xdist runs these tests in several processes."""
    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
    result = folder / "llm.executed.ipynb"
    with FileLock(f"{result}.lock"):
        if not result.exists():
            notebook, start = nbformat.read(NOTEBOOK, as_version=4), time.perf_counter()
            where = {"metadata": {"path": str(NOTEBOOK.parent)}}
            # errors are allowed, so that the first test can name the cell: each other test then misses its output
            NotebookClient(notebook, timeout=240, kernel_name="python3", allow_errors=True, resources=where).execute()
            notebook.metadata["seconds"] = time.perf_counter() - start
            nbformat.write(notebook, result)
    return nbformat.read(result, as_version=4)


def the_cell(notebook, marker: str):
    cells = [cell for cell in notebook.cells if cell.cell_type == "code" and marker in cell.source]
    assert len(cells) == 1, f"{len(cells)} cells contain {marker!r}, one was expected"
    return cells[0]


def printed(notebook, marker: str) -> str:
    """What the one cell that contains `marker` printed."""
    outputs = the_cell(notebook, marker).outputs
    return "".join(out.text for out in outputs if out.output_type == "stream" and out.name == "stdout")


def numbers(pattern: str, text: str) -> list[float]:
    """The numbers where `pattern` says NUMBER."""
    found = re.search(pattern.replace("NUMBER", NUMBER), text)
    assert found, f"{pattern!r} is not in:\n{text}"
    return [float(group) for group in found.groups()]


def matrix(heading: str, text: str) -> np.ndarray:
    """The tensor that was printed below a heading."""
    body = text.split(f"{heading}\n", 1)[1].split("])", 1)[0].split("]]", 1)[0]
    rows = re.findall(r"\[+([^\[\]]+)", body)
    return np.array([[float(number.strip(" .")) for number in row.split(",")] for row in rows])


def pictures(notebook, marker: str) -> list[bytes]:
    return [out.data["image/png"] for out in the_cell(notebook, marker).outputs if "image/png" in out.get("data", {})]


# ------------------------------------------------------------------ the form


def test_it_runs_from_top_to_bottom_without_an_error(executed):
    print(f"{executed.metadata['seconds']:.0f} s; two minutes are the aim, on two quiet cores")  # pytest -rP shows it
    for number, cell in enumerate(executed.cells):
        for output in cell.get("outputs", []):
            assert output.output_type != "error", f"cell {number}: {output.ename}: {output.evalue}\n{cell.source}"
        assert cell.cell_type != "code" or cell.execution_count, f"cell {number} did not run"


def test_it_is_a_path_of_90_minutes_in_at_most_45_cells(committed):
    assert len(committed.cells) <= 45
    text = "\n".join(cell.source for cell in committed.cells if cell.cell_type == "markdown")
    headings = re.findall(r"^## (\d)\. .*\((\d+) minutes\)$", text, flags=re.MULTILINE)
    assert [int(number) for number, _ in headings] == [1, 2, 3, 4, 5, 6, 7]
    assert [int(minutes) for _, minutes in headings] == MINUTES
    assert sum(MINUTES) == 90
    table = re.findall(r"^\| \d\. [^|]*\| (\d+) \|", committed.cells[0].source, flags=re.MULTILINE)
    assert [int(minutes) for minutes in table] == MINUTES


def test_each_section_asks_before_it_answers(committed):
    texts = [cell.source for cell in committed.cells if cell.cell_type == "markdown"]
    asked = [i for i, text in enumerate(texts) if "**Predict:**" in text]
    answered = [i for i, text in enumerate(texts) if "**Answer.**" in text]
    assert answered == [i + 1 for i in asked]  # each question is answered in the next text, below the cell
    assert len(asked) >= 15


def test_each_piece_by_hand_has_at_most_12_lines_and_is_checked(committed):
    pieces = 0
    for cell in committed.cells:
        if cell.cell_type != "code" or "# By hand" not in cell.source:
            continue
        by_hand, check = re.fullmatch(
            r".*?# By hand[^\n]*\n(.*?)\n# Check[^\n]*\n(.*)", cell.source, re.DOTALL
        ).groups()
        lines = [line for line in by_hand.splitlines() if line.strip()]
        assert len(lines) <= 12, f"{len(lines)} lines:\n{by_hand}"
        assert re.search(r"^\s*assert", check, re.MULTILINE), f"never compared:\n{cell.source}"
        pieces += 1
    assert pieces >= 12


def test_tolerances_are_stated_in_eps_never_left_to_a_default(committed):
    source = "\n".join(cell.source for cell in committed.cells if cell.cell_type == "code")
    calls = re.findall(r"assert_close\(.*\)", source)
    assert len(calls) >= 8
    assert all("rtol=0, atol=" in call and "EPS)" in call for call in calls)


def test_it_is_committed_without_outputs(committed):
    code = [cell for cell in committed.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in code)
    assert (committed.nbformat, committed.nbformat_minor) == (4, 5)
    assert len({cell.id for cell in committed.cells}) == len(committed.cells)
    assert committed.metadata.kernelspec.name == "python3"
    subprocess.run([sys.executable, "-m", "nbstripout", "--verify", str(NOTEBOOK)], check=True, capture_output=True)


def test_it_finds_the_repository_from_inside_and_from_the_folder_above(committed, monkeypatch, tmp_path, capsys):
    source, root = committed.cells[1].source, NOTEBOOK.parent.parent
    (tmp_path / "clone" / "CMHA").mkdir(parents=True)
    (tmp_path / "clone" / "CMHA" / "cmha.py").touch()
    for start, expected in ((NOTEBOOK.parent, root), (root, root), (tmp_path, tmp_path / "clone")):
        monkeypatch.chdir(start)
        monkeypatch.setattr(sys, "path", list(sys.path))
        exec(compile(source, "llm.ipynb", "exec"), {})
        assert sys.path.index(str(expected)) < len(sys.path)
        assert capsys.readouterr().out == f"repository: {expected.name}\n"
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match=r"No folder CMHA in .*elsewhere"):
        exec(compile(source, "llm.ipynb", "exec"), {})


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


def test_cached_writing_and_the_corner_of_the_triangle(executed):
    text = printed(executed, "use_cache=False")
    assert re.search(r"cached_keys +\(1, 4, 51, 32\)", text)
    assert "old keys after 31 more tokens are as they were: True" in text
    text = printed(executed, "upper_left = ")
    np.testing.assert_array_equal(matrix("upper left:", text), np.tri(2, 5))
    np.testing.assert_array_equal(matrix("lower right:", text), np.tri(2, 5, 3))
    right, wrong = numbers(r"mask NUMBER from the truth, with is_causal=True NUMBER", text)
    assert right < 1e-6 < 0.1 < wrong


def test_the_trained_model_writes_by_the_grammar_and_the_exact_gelu_shows_in_numbers_only(executed):
    text = printed(executed, "by_gelu")
    good, asked = numbers(r"NUMBER of NUMBER stories obey the grammar", text)
    assert asked == 20
    assert good >= 12
    story = " ".join(text.split("\n\n")[0].split())
    first_fault = re.search(r"the first fault: (.*)", text)[1]
    assert tales.check(story) in (None, first_fault)  # its own checker, asked again here
    assert "same seed, same stories: True" in text
    toggle, gelu = numbers(r"by NUMBER with the toggle, by NUMBER with the exact GELU", text)
    assert toggle < 1e-4
    assert gelu > 20 * toggle
    assert len(pictures(executed, "by_gelu")) == 1
