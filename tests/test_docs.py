"""The pages for learners name files, symbols, lines of code, notebook sections and commands: each is looked up."""

import ast
import json
import re
import xml.etree.ElementTree as ElementTree
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = ("README", "code_map", "glossary", "from_paper_to_line", "teaching", "questions")
CODE = ("CMHA", "TransformerBlock", "GPT2Model", "orchestrator")
FLOOR_OF = {room: f"floor{number}" for number, room in enumerate(CODE, start=1)}
WHERE_WE_DIFFER = (
    "## What `flash_tiled` does otherwise",
    "**What we do otherwise.**",
    "**What GPT-2 does otherwise.**",
)


def page(name: str) -> str:
    return (DOCS / f"{name}.md").read_text(encoding="utf-8")


# ------------------------------------------------------------------ looking things up


def file_of(path: str) -> Path | None:
    """A file by its path from the root; or by its name alone, where only one file of the packages has it."""
    if (ROOT / path).is_file():
        return ROOT / path
    found = [file for room in CODE for file in (ROOT / room).rglob("*.py") if file.name == path]
    return found[0] if len(found) == 1 else None


def defined_in(node: ast.AST, name: str) -> ast.AST | None:
    """Where a module or class defines a name: a class, a function, a variable, or an attribute that a method sets."""
    inside_class = isinstance(node, ast.ClassDef)
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef) and child.name == name:
            return child
        targets = child.targets if isinstance(child, ast.Assign) else [getattr(child, "target", None)]
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            return child
    for child in ast.walk(node) if inside_class else ():  # self.name = ...
        is_set = isinstance(child, ast.Attribute) and isinstance(child.ctx, ast.Store) and child.attr == name
        if is_set and isinstance(child.value, ast.Name) and child.value.id == "self":
            return child
    return None


@cache
def parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def look_up(reference: str) -> tuple[Path, ast.AST] | str:
    """What `path::Class.method` names; a sentence if there is no such thing."""
    path, _, symbol = reference.partition("::")
    file = file_of(path)
    if file is None:
        return f"there is no file {path}"
    node = parsed(file)
    for name in symbol.split("."):
        node = defined_in(node, name)
        if node is None:
            return f"{path} defines no {symbol}"
    return file, node


def references(text: str) -> list[str]:
    return re.findall(r"`([\w/.-]+\.py::[\w.]+)`", text)


@cache
def sections(notebook: str) -> dict[str, list[str]]:
    """Headings of a notebook, without their minutes, each with the code cells below it."""
    found: dict[str, list[str]] = {}
    for cell in json.loads((ROOT / "notebooks" / f"{notebook}.ipynb").read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            for heading in re.findall(r"^## (.*)$", source, flags=re.MULTILINE):
                found[re.sub(r" \(\d+ minutes\)$", "", heading)] = []
        elif found:
            found[list(found)[-1]].append(source)
    return found


def anchors(text: str) -> list[str]:
    """The names under which a page's headings can be linked to, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]


# ------------------------------------------------------------------ all pages


@pytest.mark.parametrize("name", PAGES)
def test_every_file_and_symbol_that_a_page_names_exists(name):
    named = references(page(name))
    wrong = {reference: found for reference in named if isinstance(found := look_up(reference), str)}
    assert wrong == {}
    assert len(named) >= {"code_map": 50, "glossary": 60, "from_paper_to_line": 70}.get(name, 0)


def test_a_renamed_symbol_would_be_seen():
    for reference in (
        "CMHA/cmha.py::MultiHeadAttention.split_head",  # a method
        "CMHA/cmha.py::MultiHeadAttention.W_qk",  # an attribute
        "CMHA/implementations/eager.py::attend",  # a function
        "GPT2Model/config.py::GPT3",  # a variable
        "CMHA/mask.py::AttentionMask",  # a file
        "__init__.py::anything",  # a name that many files have
    ):
        assert isinstance(look_up(reference), str), reference
    for reference in ("CMHA/cmha.py::MultiHeadAttention.W_qkv", "GPT2Model/config.py::GPT2", "flash_tiled.py::spans"):
        assert not isinstance(look_up(reference), str), reference


@pytest.mark.parametrize("name", PAGES)
def test_every_link_of_a_page_leads_somewhere(name):
    text = page(name)
    for target in re.findall(r"\]\(([^)]+)\)", text):
        assert not target.startswith("http"), "these pages can be read without a network"
        path, _, anchor = target.partition("#")
        file = (DOCS / path).resolve() if path else DOCS / f"{name}.md"
        assert file.exists(), f"{name}.md links to {target}"
        if anchor:
            assert anchor in anchors(file.read_text(encoding="utf-8")), f"{name}.md links to {target}"


@pytest.mark.parametrize("name", PAGES)
def test_every_notebook_section_and_cell_that_a_page_names_is_there(name):
    text = page(name)
    links = re.findall(
        r"\[(\w+): ([^\]]+)\]\(\.\./notebooks/(\w+)\.ipynb\)(?:, the cell with `([^\n]*?)`(?= \||$))?",
        text,
        flags=re.MULTILINE,
    )
    for notebook, heading, file, marker in links:
        assert notebook == file
        assert heading in sections(notebook), f"{name}.md: {notebook}.ipynb has no section {heading!r}"
        if marker:
            cells = [code for code in sections(notebook)[heading] if marker in code]
            assert len(cells) == 1, f"{name}.md: {len(cells)} cells of {notebook}: {heading} contain {marker!r}"
    assert text.count("../notebooks/") == len(links)  # none that the pattern above does not understand
    assert text.count("the cell with `") == sum(bool(marker) for *_, marker in links)
    for notebook in re.findall(r"`(?:notebooks/)?(\w+\.ipynb)`", text):
        assert (ROOT / "notebooks" / notebook).is_file(), f"{name}.md names {notebook}"


@pytest.mark.parametrize("name", PAGES)
def test_every_command_that_a_page_names_can_be_given(name):
    from orchestrator.commands import COMMANDS
    from orchestrator.learning.checks.registry import EXERCISES, GROUPS

    text = page(name)
    for command, rest in re.findall(r"`python -m orchestrator ([\w-]+)([^`]*)`", text):
        assert command in COMMANDS, f"{name}.md names the command {command}"
        for exercise in rest.split() if command == "check" else ():
            assert exercise in {*EXERCISES, *GROUPS, "NAME"}, f"{name}.md checks {exercise}"
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    for target in re.findall(r"`make ([\w-]+)`", text):
        assert target in targets, f"{name}.md names make {target}"


def test_the_index_names_every_page():
    listed = re.findall(r"\]\((\w+\.md)\)", page("README"))
    assert sorted(listed) == sorted(file.name for file in DOCS.glob("*.md") if file.name != "README.md")


# ------------------------------------------------------------------ the map


def test_the_figure_s_boxes_name_what_exists_on_the_floor_of_their_colour():
    svg = ElementTree.parse(DOCS / "figures" / "gpt2-map.svg").getroot()
    boxes = [group for group in svg.iter() if group.get("class") == "box"]
    assert len(boxes) >= 20
    in_table = references(page("code_map"))
    for box in boxes:
        words = [part.text for part in box if part.tag.endswith("text")]
        colour = next(part.get("class") for part in box if part.tag.endswith("rect"))
        named = box.get("data-refs").split()
        for reference in named:
            assert not isinstance(found := look_up(reference), str), found
            path, _, symbol = reference.partition("::")
            assert path in words, f"the box {words[0]!r} does not show {path}"
            assert symbol in words, f"the box {words[0]!r} does not show {symbol}"
            assert reference in in_table, f"{reference} is not in the table"
        assert colour == FLOOR_OF[named[-1].partition("/")[0]], f"the box {words[0]!r} has the colour of another floor"
    text = ElementTree.tostring(svg, encoding="unicode")
    assert "prefers-color-scheme: dark" in text
    assert not re.search(r"https?://(?!www\.w3\.org)", text)  # nothing is fetched


def test_the_map_has_every_parameter_and_module_of_the_model():
    from GPT2Model.config import from_preset
    from GPT2Model.gpt2 import GPTModel

    model = GPTModel(from_preset("nano", n_layers=1, vocab_size=10))
    shown = " ".join(references(page("code_map")))
    for module in {name.rpartition(".")[2] for name, module in model.named_modules() if list(module.parameters(False))}:
        assert re.search(rf"\.{module}\b", shown), f"{module} has weights, and is not on the map"


# ------------------------------------------------------------------ from the paper to the line


def quoted_lines() -> list[tuple[str, str, str]]:
    """(the paper's words, reference, our line) of every row."""
    rows = re.findall(r"^\| (.*) \| `([^`|]+)` \| `(.*)` \|$", page("from_paper_to_line"), flags=re.MULTILINE)
    tables = page("from_paper_to_line").count("| the paper | where | our line |")
    lines = [line for line in page("from_paper_to_line").splitlines() if line.startswith("| ")]
    assert len(rows) == len(lines) - 2 * tables  # a heading and a rule for each table; every other line is understood
    return rows


def test_every_quoted_line_stands_in_the_function_that_is_named():
    rows = quoted_lines()
    assert len(rows) >= 70
    for statement, reference, line in rows:
        found = look_up(reference)
        assert not isinstance(found, str), found
        file, node = found
        body = file.read_text(encoding="utf-8").splitlines()[node.lineno - 1 : node.end_lineno]
        assert line in [code.strip() for code in body], f"{statement!r}: {reference} has no line {line!r}"


def test_the_papers_algorithms_are_there_line_by_line():
    text = page("from_paper_to_line")
    # Lines of each algorithm that do something; the others divide matrices into blocks, or end a loop.
    wanted = {
        "## FlashAttention (Dao": [*range(1, 14), 16],
        "## FlashAttention-2 (Dao": [3, 4, 5, 6, 7, 8, 9, 10, 12, 13, 14, 15, 17],
        "## FlashAttention-2, algorithm 2": [3, 4, 5, 8, 9, 10, 11, 12, 13, 14, 15, 16],
    }
    for heading, lines in wanted.items():
        part = text[text.index(heading) :].split("\n## ", 1)[0]
        named = [
            int(number) for start in re.findall(r"^\| ([\d, ]+):", part, flags=re.M) for number in start.split(",")
        ]
        assert sorted(set(named)) == lines, heading
    assert all(words in text for words in WHERE_WE_DIFFER)


# ------------------------------------------------------------------ the glossary


def entries() -> list[tuple[str, str, str]]:
    """(term, explanation, places) of every entry."""
    return re.findall(r"^### (.+)\n(.+)\n(Code: .+)$", page("glossary"), flags=re.MULTILINE)


def test_the_glossary_is_in_alphabetical_order_and_each_entry_says_what_where_and_shows_it():
    terms = [term for term, *_ in entries()]
    assert len(terms) >= 60
    assert terms == sorted(terms, key=str.casefold)
    assert len(set(map(str.casefold, terms))) == len(terms) == page("glossary").count("\n### ")
    for term, explanation, places in entries():
        assert 20 < len(explanation) < 400, term
        assert references(places), f"{term}: where in the code?"
        assert "../notebooks/" in places, f"{term}: which notebook section shows it?"
    listed = re.findall(r"^\[.*", page("glossary"), flags=re.MULTILINE)
    assert re.findall(r"\[([^\]]+)\]\(#", "\n".join(listed)) == terms


def test_the_words_of_the_tracer_are_in_the_glossary():
    terms = " ".join(term.lower() for term, *_ in entries())
    for word in ("queries", "keys", "values", "scores", "attention weights", "context", "logits", "stream", "offset",
                 "prefill", "nat", "floor", "causal", "log-sum-exp", "running maximum", "head_dim"):  # fmt: skip
        assert word in terms


# ------------------------------------------------------------------ teaching


def test_the_lab_takes_90_minutes():
    lab = page("teaching").split("## A lab of 90 minutes")[1].split("\n## ")[0]
    minutes = [int(number) for number in re.findall(r"^\| (\d+) \|", lab, flags=re.MULTILINE)]
    assert sum(minutes) == 90
    assert len(minutes) >= 8


def test_the_exercises_and_their_points_are_those_of_the_checks_and_each_has_its_week():
    from orchestrator.learning.checks.registry import EXERCISES

    points = {name: exercise.points for name, exercise in EXERCISES.items()}
    table = page("teaching").split("## The exercises")[1].split("\n## ")[0]
    assert {name: int(number) for name, number in re.findall(r"^\| `(\w+)` \| (\d+) \|", table, flags=re.M)} == points
    weeks = page("teaching").split("## Four weeks")[1].split("\n## ")[0]
    planned = re.findall(r"`(\w+)` \((\d+)\)", weeks)
    assert sorted(name for name, _ in planned) == sorted(points)
    assert all(points[name] == int(number) for name, number in planned)


def test_the_four_weeks_read_the_six_files_in_their_order():
    weeks = page("teaching").split("## Four weeks")[1].split("\n## ")[0]
    six = re.findall(r"^\d\. `([\w/.]+)`", page("code_map"), flags=re.MULTILINE)
    assert len(six) == 6
    places = [weeks.index(f"`{path}`") for path in six]
    assert places == sorted(places)


def test_the_answers_of_the_assessment_are_right():
    import math

    from CMHA.cmha import MultiHeadAttention
    from CMHA.masks import AttentionMask
    from GPT2Model.config import from_preset
    from orchestrator.evaluation.estimates import memory_bytes

    answers = re.findall(
        r"<details>\n<summary>Answer</summary>\n\n(.*?)\n</details>", page("teaching"), flags=re.DOTALL
    )
    assert len(answers) == 10 == page("teaching").count("<details>")
    for heads in (12, 6):
        layer = MultiHeadAttention(768, 768, 1024, 0.0, heads, qkv_bias=True)
        assert f"{sum(parameter.numel() for parameter in layer.parameters()):,}" in answers[0]
    table = AttentionMask(100, 150).dense()
    assert str(tuple(table.shape)) in answers[1]
    assert f"{int(table[0, 0, 0].sum())} of them" in answers[1]
    assert f"{math.log(50257):.2f}" in answers[4]
    size = memory_bytes(from_preset("gpt2"), batch=8, tokens=1024)["eager_table"]
    assert f"{size / 2**20:.0f} MiB" in answers[7]
    assert f"{8 * 12 * 1024 * 4 / 2**10:.0f} KiB" in answers[7]


# ------------------------------------------------------------------ the questions


def test_each_of_the_fifteen_questions_has_a_short_answer_and_something_to_run():
    parts = re.split(r"^## (\d+)\. ", page("questions"), flags=re.MULTILINE)[1:]
    assert [int(number) for number in parts[::2]] == list(range(1, 16))
    for number, part in zip(parts[::2], parts[1::2], strict=True):
        question, answer, places = part.split("\n", 1)[0], *part.split("\n", 1)[1].split("\n\n")[:2]
        assert question.endswith("?"), number
        assert 80 < len(answer) < 600, number
        assert ", the cell with `" in places, f"question {number}: nothing to run"
        assert "../notebooks/llm.ipynb" in places, f"question {number} arises in llm.ipynb: where?"
