"""notebooks/break_it.ipynb: what it shows is true, held against numbers computed here, another way; its exercises run.

The notebook is executed with the code of its exercises behind it.
"""

import math
import re

import nbformat
import pytest
from nbclient import NotebookClient

from orchestrator.learning.planted import MISTAKES
from orchestrator.text import tales
from orchestrator.text.corpora import TalesCorpus
from tests.notebooks.conftest import FOLDER
from tests.notebooks.reading import numbers, pictures, printed

NOTEBOOK = "break_it.ipynb"


@pytest.fixture(scope="module")
def executed(committed):
    """The notebook with its outputs, and one more cell for each block of code in the exercises."""
    notebook = nbformat.from_dict(committed)
    exercises = re.findall(r"^```python\n(.*?)^```", notebook.cells[-1].source, flags=re.MULTILINE | re.DOTALL)
    assert len(exercises) == 5
    notebook.cells += [nbformat.v4.new_code_cell(block) for block in exercises]
    where = {"metadata": {"path": str(FOLDER)}}
    NotebookClient(notebook, timeout=600, kernel_name="python3", allow_errors=True, resources=where).execute()
    return notebook


@pytest.fixture(scope="module")
def rows(executed) -> dict[str, list[str]]:
    """The table of the last section: name -> its six cells."""
    lines = printed(executed, "NINE = (").splitlines()
    return {line.split()[0]: line.split()[1:] for line in lines[1:-1]}


def test_it_takes_30_minutes_and_covers_at_least_six_mistakes(committed):
    text = "\n".join(cell.source for cell in committed.cells)
    minutes = re.findall(r"^## \d\. .*\((\d+) minutes\)$", text, flags=re.MULTILINE)
    assert sum(map(int, minutes)) == 30
    code = "\n".join(cell.source for cell in committed.cells if cell.cell_type == "code")
    shown = {name for name in MISTAKES if f'"{name}"' in code}
    needed = {
        "exact_gelu",
        "dropout_left_on",
        "view_without_transpose",
        "mask_shifted",
        "scale_forgotten",
        "head_untied",
    }
    assert needed <= shown


def test_the_right_model_passes_all_checks(executed, rows):
    gap, obey = numbers(
        r"above the floor: NUMBER nats per token; stories that obey: NUMBER%", printed(executed, "def obey")
    )
    assert -0.005 < gap < 0.03
    assert obey >= 80
    text = printed(executed, "def off_float64")
    (limit,) = numbers(r"rounding may be NUMBER", text)
    off, moved, cached, twice = numbers(
        r"off float64 NUMBER, moved before a change NUMBER, cached NUMBER, twice NUMBER", text
    )
    assert 0 < off < limit < 1e-3
    assert 0 < cached < limit
    assert moved == twice == 0
    assert not any(cell.endswith("*") for cell in rows["(right)"])


def test_what_is_planted_is_taken_back(executed):
    text = printed(executed, "logits moved by")
    assert text.count("afterwards the same bits: True") == 2
    assert all(
        moved > 1e-3
        for moved in (numbers(rf"(?s){name}:.*?moved by NUMBER", text)[0] for name in MISTAKES if f"{name}:" in text)
    )
    assert "Did you mean 'exact_gelu'?" in text


def test_the_exact_gelu_is_fluent_and_wrong(executed):
    text = printed(executed, "by_erf")

    def gap(x):
        inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
        return abs(0.5 * x * (math.tanh(inner) - math.erf(x / math.sqrt(2))))

    assert numbers(r"at most NUMBER", text)[0] == pytest.approx(max(gap(i / 500) for i in range(-3000, 3001)), rel=0.03)
    before, after = numbers(r"above the floor: NUMBER -> NUMBER", text)
    assert after == pytest.approx(before, abs=2e-4)
    assert "greedy text the same: True" in text
    off, times = numbers(r"off by NUMBER, that is NUMBER times", text)
    assert off > 1e-3
    assert times > 10


def test_a_trace_names_the_place_of_the_line(executed):
    text = printed(executed, "first differs")
    assert re.search(r"exact_gelu +first differs: blocks\.0\.feed_forward\.activated ", text)
    assert re.search(r"unbiased_variance +first differs: blocks\.0\.norm_1 ", text)
    assert re.search(r"epsilon_wrong +first differs: blocks\.0\.norm_1 ", text)


def test_a_shifted_mask_is_too_good_to_be_true_and_reaches_two_positions_back(executed):
    text = printed(executed, "leaky_history")
    (right,) = numbers(r"right: \+NUMBER nats from the floor", text)
    (leaky,) = numbers(r"mask_shifted: NUMBER", text)
    assert right > 0.1
    assert -TalesCorpus(0).floor < leaky < -0.3  # a loss cannot fall below 0
    assert "expected 'One'" in text or "expected" in text
    assert numbers(r"up to NUMBER positions before it; the model has NUMBER layers", printed(executed, "reach = ")) == [
        2,
        2,
    ]
    assert len(pictures(executed, "leaky_history")) == len(pictures(executed, "reach = ")) == 1


def test_the_wrong_view_lets_the_future_in_and_cached_text_hides_it(executed):
    text = printed(executed, "wrong_heads")
    assert "wrong, head 0: [[0.0, 0.0], [0.0, 0.0], [1.0, 1.0], [1.0, 1.0]]" in text
    assert "wrong, head 1: [[2.0, 2.0], [2.0, 2.0], [3.0, 3.0], [3.0, 3.0]]" in text
    moved, gap, obey = numbers(r"(?s)moves by NUMBER.*floor: NUMBER; stories that obey: NUMBER%", text)
    assert moved > 1
    assert gap > 0.5
    assert obey >= 80


def test_right_weights_in_wrong_code(executed):
    text = printed(executed, "dropping = ")
    found = {
        name: numbers(
            rf"{name} +loss above the floor +NUMBER, stories that obey +NUMBER%, two calls differ by NUMBER", text
        )
        for name in ("scale_forgotten", "head_untied", "dropout_left_on")
    }
    assert found["scale_forgotten"][0] > 0.03
    floor, classes = TalesCorpus(0).floor, tales.TalesTokenizer().vocab_size
    assert found["head_untied"][0] + floor == pytest.approx(math.log(classes), abs=0.6)
    assert [name for name in found if found[name][2] > 0] == ["dropout_left_on"]
    assert all(obey < 60 for _, obey, _ in found.values())
    assert f"parameters: tied {435_840:,}, untied {435_840 + 177 * 128:,}: one table more" in printed(
        executed, "untied = "
    )


def test_the_table_says_who_sees_what(rows):
    seen = {name: [cell.endswith("*") for cell in cells] for name, cells in rows.items()}
    loss_and_text = {name: tuple(marks[:2]) for name, marks in seen.items()}
    numbers_only = {name: tuple(marks[2:]) for name, marks in seen.items()}  # float64, causality, cached, twice
    assert loss_and_text["exact_gelu"] == (False, False)
    assert loss_and_text["view_without_transpose"] == loss_and_text["mask_shifted"] == (True, False)
    assert loss_and_text["mask_upper_left_with_cache"] == (False, True)
    assert numbers_only == {
        "(right)": (False,) * 4,
        "exact_gelu": (True, False, False, False),
        "scale_forgotten": (True, False, False, False),
        "mask_shifted": (True, True, True, False),
        "mask_too_strict": (True, False, False, False),
        "view_without_transpose": (True, True, True, False),
        "head_untied": (True, False, False, False),
        "dropout_left_on": (True,) * 4,
        "mask_upper_left_with_cache": (False, False, True, False),
        "positions_restart_with_cache": (False, False, True, False),
    }
    del seen["(right)"]
    assert all(marks[2] or marks[4] for marks in seen.values())  # "the two together leave none of these"


def test_the_exercises_show_what_their_hints_say(executed):
    first, second, third, fourth, fifth = executed.cells[-5:]
    said = [
        "".join(out.text for out in cell.outputs if out.get("name") == "stdout")
        for cell in (first, second, third, fourth, fifth)
    ]
    sdpa, eager = (line for line in said[0].splitlines() if line.startswith(("sdpa", "eager")))
    assert "*" not in sdpa
    assert eager.count("*") >= 3
    assert said[1].strip() == "blocks.0.norm_1"
    gap, moved = numbers(r"(?s)NUMBER nats.*moves by NUMBER", said[2].replace("+", ""))
    assert gap < 0.3
    assert moved > 0.1
    assert said[3].startswith("greedy: One ")
    assert "RuntimeError: probability tensor contains" in said[3]
    relu = re.findall(r"'([^']*)'", said[4])
    assert [text.endswith("*") for text in relu[2:]] == [True, False, False, False]
    assert float(relu[2].rstrip("*")) > 0.1
