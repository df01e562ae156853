"""The form of every notebook: goals, minutes, predict then run, pieces by hand that are checked, exercises at the end.

`test_NAME.py` beside this file holds what a notebook shows; this one how it is made.
"""

import ast
import importlib.util
import re
import subprocess
import sys

import nbformat
import pytest

from tests.notebooks.conftest import FOLDER

NAMES = sorted(path.name for path in FOLDER.glob("*.ipynb"))
EXERCISE = re.compile(r"^(?:\*\*)?(\d+)\. ", re.MULTILINE)  # "1. " or "**1. "
TO_RUN = re.compile(r"^```|`(?:make |python -m )|`[^`\n]*[(=][^`]*`|\b[Rr]un it\b", re.MULTILINE)  # code, or a command


@pytest.fixture(params=NAMES)
def name(request):
    return request.param


@pytest.fixture
def notebook(name):
    return nbformat.read(FOLDER / name, as_version=4)


def texts(notebook) -> list[str]:
    return [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]


def code(notebook) -> str:
    return "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")


def sections(notebook) -> list[tuple[int, str, int]]:
    """(number, title, minutes) of each heading."""
    found = re.findall(r"^## (\d+)\. (.*) \((\d+) minutes\)$", "\n".join(texts(notebook)), flags=re.MULTILINE)
    return [(int(number), title, int(minutes)) for number, title, minutes in found]


def exercise_cells(notebook) -> list:
    """The cell with the heading "## Exercises", from that heading on, and all cells after it."""
    first = [i for i, cell in enumerate(notebook.cells) if re.search("^## Exercises$", cell.source, re.MULTILINE)]
    assert len(first) == 1, f"{len(first)} headings '## Exercises', one was expected"
    return notebook.cells[first[0] :]


def test_there_are_notebooks():
    seven = ("llm", "attention", "training", "generation", "inside", "pretrained", "break_it")
    assert {f"{name}.ipynb" for name in seven} == set(NAMES)


def test_it_runs_from_top_to_bottom_without_an_error(name, execute):
    executed = execute(name)
    print(f"{executed.metadata['seconds']:.0f} s; two minutes are the aim, on two quiet cores")  # pytest -rP shows it
    for number, cell in enumerate(executed.cells):
        for output in cell.get("outputs", []):
            assert output.output_type != "error", f"cell {number}: {output.ename}: {output.evalue}\n{cell.source}"
        assert cell.cell_type != "code" or cell.execution_count, f"cell {number} did not run"


def test_its_executed_page_is_of_this_very_notebook_and_asks_nothing_of_other_machines(name):
    spec = importlib.util.spec_from_file_location("to_html", FOLDER / "to_html.py")
    to_html = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(to_html)
    page = to_html.PAGES / f"{name.removesuffix('.ipynb')}.html"
    text = page.read_text(encoding="utf-8")
    assert f"executed; {to_html.fingerprint(FOLDER / name)}" in text, "run: make notebooks"
    assert page.stat().st_size <= 1_000_000
    assert "<script" not in text
    assert not re.findall(r"""(?:src|href)=["'](?:https?:)?//[^"']+|@import|url\(["']?https?:""", text)
    assert text.count("data:image/png;base64,") >= 2
    assert str(FOLDER.parent) not in text


def test_its_first_cell_says_minutes_goals_and_how_to_run(notebook):
    first = notebook.cells[0]
    assert first.cell_type == "markdown"
    assert re.match(r"# \S", first.source)
    total, count = map(int, re.search(r"\A# .*\n\n(\d+) minutes, (\d+) sections\.", first.source).groups())
    found = sections(notebook)
    assert [number for number, _, _ in found] == list(range(1, count + 1))
    assert sum(minutes for _, _, minutes in found) == total
    rows = re.findall(r"^\| (\d+)\. (.*?) \| (\d+) \| (.+) \|$", first.source, flags=re.MULTILINE)
    assert [(int(number), title, int(minutes)) for number, title, minutes, _ in rows] == found
    assert all(goal.strip() for *_, goal in rows)
    assert "you can say" in first.source
    assert "How to run" in first.source


def test_every_other_heading_has_its_minutes_but_the_exercises(notebook):
    headings = re.findall(r"^## .*$", "\n".join(texts(notebook)), flags=re.MULTILINE)
    without = [heading for heading in headings if not re.fullmatch(r"## \d+\. .* \(\d+ minutes\)", heading)]
    assert without == ["## Exercises"]
    assert headings[-1] == "## Exercises"


def test_it_has_at_most_45_cells(notebook):
    assert len(notebook.cells) <= 45


def test_it_asks_before_it_answers(notebook):
    found = texts(notebook)
    asked = [i for i, text in enumerate(found) if "**Predict:**" in text]
    answered = [i for i, text in enumerate(found) if re.match(r"\*\*Answer\.\*\*", text)]
    assert answered == [i + 1 for i in asked]  # at the start of the next text, below the cell
    assert "\n".join(found).count("**Answer.**") == len(answered)
    assert len(asked) >= 8
    for cell, after in zip(notebook.cells, notebook.cells[1:], strict=False):
        if cell.cell_type == "markdown" and "**Predict:**" in cell.source:
            assert after.cell_type == "code", f"nothing to run after: {cell.source[-200:]}"


def test_each_piece_by_hand_has_at_most_12_lines_and_is_checked(notebook):
    pieces = 0
    for cell in notebook.cells:
        if cell.cell_type != "code" or "# By hand" not in cell.source:
            continue
        parts = re.fullmatch(r".*?# By hand[^\n]*\n(.*?)\n\s*# Check[^\n]*\n(.*)", cell.source, re.DOTALL)
        assert parts, f"by hand, and no '# Check' after it:\n{cell.source}"
        lines = [line for line in parts[1].splitlines() if line.strip()]
        assert 1 <= len(lines) <= 12, f"{len(lines)} lines:\n{parts[1]}"
        assert re.search(r"^\s*assert", parts[2], re.MULTILINE), f"never compared:\n{cell.source}"
        pieces += 1
    assert pieces >= 4


def test_a_tolerance_is_stated_in_eps_never_left_to_a_default(notebook):
    for node in ast.walk(ast.parse(re.sub(r"^%.*$", "", code(notebook), flags=re.MULTILINE))):
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("assert_close", "allclose", "isclose")):
            words = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            if "isclose" in ast.unparse(node.func) and {"rel_tol", "abs_tol"} & set(words):
                continue  # Python floats
            assert words.get("rtol") == "0", ast.unparse(node)
            assert re.search(r"EPS|eps", words.get("atol", "")), ast.unparse(node)


def test_it_ends_with_exercises_that_have_a_hint_and_something_to_run(notebook):
    cells = exercise_cells(notebook)
    parts = []
    for cell in cells:
        if cell.cell_type == "markdown":
            text = cell.source.split("## Exercises\n")[-1].split("**Where next.**")[0]
            starts = [match.start() for match in EXERCISE.finditer(text)]
            for start, end in zip(starts, [*starts[1:], len(text)], strict=True):
                parts.append((int(EXERCISE.match(text[start:])[1]), text[start:end]))
        else:
            number, text = parts[-1]
            parts[-1] = number, f"{text}\n```python\n{cell.source}\n```\n"
    assert [number for number, _ in parts] == list(range(1, len(parts) + 1))
    assert 3 <= len(parts) <= 6
    for number, text in parts:
        assert TO_RUN.search(text), f"exercise {number} has nothing to run:\n{text}"
        assert re.search(r"\*Hint:", text), f"exercise {number} has no hint:\n{text}"
        for block in re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
            ast.parse(re.sub(r"^[!%].*$", "", block, flags=re.MULTILINE))  # shell lines and magics are no Python


def test_it_is_committed_without_outputs(notebook, name):
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in cells)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    assert [cell.id for cell in notebook.cells] == [str(number) for number in range(len(notebook.cells))]
    assert notebook.metadata.kernelspec.name == "python3"
    command = [sys.executable, "-m", "nbstripout", "--verify", str(FOLDER / name)]
    subprocess.run(command, check=True, capture_output=True)


def test_it_finds_the_repository_from_inside_and_from_the_folder_above(notebook, name, monkeypatch, tmp_path, capsys):
    source, root = notebook.cells[1].source, FOLDER.parent
    (tmp_path / "clone" / "CMHA").mkdir(parents=True)
    (tmp_path / "clone" / "CMHA" / "cmha.py").touch()
    for start, expected in ((FOLDER, root), (root, root), (tmp_path, tmp_path / "clone")):
        monkeypatch.chdir(start)
        monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry != str(root)])
        exec(compile(source, name, "exec"), {})
        assert str(expected) in sys.path
        assert capsys.readouterr().out == f"repository: {expected.name}\n"
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match=r"No folder CMHA in .*elsewhere"):
        exec(compile(source, name, "exec"), {})


def test_it_downloads_nothing_and_runs_on_one_thread(notebook):
    source = code(notebook)
    assert not re.search(r"https?://|!pip|!wget|urlopen|snapshot_download", source)
    assert "torch.set_num_threads(1)" in source


def test_nothing_in_it_belongs_to_one_machine(notebook):
    everything = "\n".join(cell.source for cell in notebook.cells)
    assert not re.search(r"/(?:work|root|home|tmp)/", everything)
