"""docs/from_tile_to_kernel.md: every quoted line stands where the page says, in its order; its programs run."""

import json
import os
import re
import subprocess
import sys

import pytest

from tests.test_docs import DOCS, ROOT, anchors, look_up, sections

TEXT = (DOCS / "from_tile_to_kernel.md").read_text(encoding="utf-8")
CODE = re.compile(r"`([^`]+)`")
ORDER_CHANGES = "flash_triton_kernels.py::backward_dkdv"  # there the two loops change places
BLOCKS = re.findall(r"^```python\n(.*?)^```", TEXT, flags=re.MULTILINE | re.DOTALL)
# The page's programs, each with the change that is to be tried: all in one process, which interprets.
DRIVER = """
import importlib.util, json
from unittest.mock import patch
import CMHA.implementations as package

for name, program in json.load(open("programs.json")):
    print("RUN", name)
    spec = importlib.util.spec_from_file_location(name, f"{name}.py")
    kernels = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(kernels)
    with patch.object(package, "flash_triton_kernels", kernels, create=True):
        exec(compile(program, "try_it.py", "exec"), {})
"""


def tables() -> list[tuple[list[str], list[list[str]]]]:
    """(names of the columns, rows) of every table."""
    found = re.findall(r"^(\| .+ \|)\n\| [-| ]+ \|\n((?:\| .+ \|\n)+)", TEXT, flags=re.MULTILINE)
    return [(cells(head), [cells(row) for row in body.splitlines()]) for head, body in found]


def cells(row: str) -> list[str]:
    return row.removeprefix("| ").removesuffix(" |").split(" | ")


def lines_of(reference: str) -> list[str]:
    found = look_up(reference)
    assert not isinstance(found, str), found
    file, node = found
    return [line.strip() for line in file.read_text(encoding="utf-8").splitlines()[node.lineno - 1 : node.end_lineno]]


def side_by_side() -> list[tuple[str, str, list[list[str]]]]:
    """(reference on the left, on the right, rows) of the tables that put two functions beside each other."""
    return [
        (head[1].strip("`"), head[2].strip("`"), rows)
        for head, rows in tables()
        if head[0] == "step" and "::" in head[1]
    ]


def test_every_table_is_understood():
    assert TEXT.count("\n| --- |") == len(tables())
    assert len(side_by_side()) == 6
    for head, rows in tables():
        assert all(len(row) == len(head) for row in rows), head


@pytest.mark.parametrize("side", [0, 1], ids=["flash_tiled", "kernel"])
def test_every_line_stands_in_the_function_of_its_column_and_in_its_order(side):
    quoted = 0
    for *both, rows in side_by_side():
        lines, at = lines_of(both[side]), 0
        for row in rows:
            parts = row[1 + side].split("<br>")
            if not all(part.startswith("`") and part.endswith("`") for part in parts):
                assert side == 0, f"no line of the kernel: {row[0]}"  # words say where the left one has it
                continue
            for part in parts:
                line = part.strip("`")
                free = side == 0 and both[1] == ORDER_CHANGES
                assert line in lines[0 if free else at :], f"{both[side]}, after its line {at}: no {line!r}"
                at = lines.index(line, 0 if free else at) + 1
                quoted += 1
    assert quoted >= 45


def test_no_step_of_the_forward_loop_is_left_out():
    quoted = {line for _, right, rows in side_by_side() if right.endswith("::forward") for row in rows
              for line in CODE.findall(row[2])}  # fmt: skip
    body = lines_of("flash_triton_kernels.py::forward")
    loop = body[body.index("new_max = tl.maximum(running_max, tl.max(scores, 1))") :]
    steps = [line for line in loop if line and not line.startswith("#")]
    assert [line for line in steps if line not in quoted] == []


def test_every_line_of_what_is_added_stands_in_its_function():
    rows = next(rows for head, rows in tables() if head[0] == "what, and why")
    assert len(rows) >= 15
    for what, where, line in rows:
        assert line.strip("`") in lines_of(where.strip("`")), what


def test_every_link_and_section_is_there():
    for heading, notebook in re.findall(r"\[\w+: ([^\]]+)\]\(\.\./notebooks/(\w+)\.ipynb\)", TEXT):
        assert heading in sections(notebook)
    targets = re.findall(r"\]\(([^)]+)\)", CODE.sub("", TEXT))
    assert len(targets) >= 10
    for target in targets:
        path, _, anchor = target.partition("#")
        assert (DOCS / path).exists()
        assert not anchor or anchor in anchors(TEXT)


@pytest.fixture(scope="module")
def outputs(tmp_path_factory) -> dict[str, str]:
    """What the page's programs print: "first", "as it stands", and "1", "2", "3" with that change."""
    folder = tmp_path_factory.mktemp("from_tile_to_kernel")
    first, try_it = BLOCKS
    kernels = (ROOT / "CMHA/implementations/flash_triton_kernels.py").read_text(encoding="utf-8")
    programs = [("as it stands", try_it)]
    (folder / "as it stands.py").write_text(kernels)
    for change, old, new, _ in changes():
        assert kernels.count(old) == 1, f"{old!r} is to be changed, and stands {kernels.count(old)} times in the file"
        (folder / f"{change}.py").write_text(kernels.replace(old, new))
        programs.append((change, try_it))
    (folder / "first.py").write_text(first)  # it runs as it is loaded: triton reads a kernel's source from its file
    programs.append(("first", ""))
    (folder / "programs.json").write_text(json.dumps(programs))
    (folder / "driver.py").write_text(DRIVER)
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "driver.py"], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    parts = done.stdout.split("RUN ")[1:]
    return {part.partition("\n")[0]: part.partition("\n")[2].strip() for part in parts}


def changes() -> list[tuple[str, str, str, str]]:
    """(number, the line, what it becomes, rows wrong) of "Try it"."""
    rows = next(rows for head, rows in tables() if head[0] == "change")
    return [(row[0].partition(".")[0], *(cell.strip("`") for cell in row[1:])) for row in rows]


def test_the_first_kernel_prints_what_the_page_says(outputs):
    shown = re.search(r"^```text\n(.*?)^```", TEXT, flags=re.MULTILINE | re.DOTALL)[1].strip()
    assert outputs["first"] == shown


def test_the_changes_to_try_have_the_symptoms_that_the_page_says(outputs):
    assert outputs["as it stands"] == "[0, 0, 0]"
    found = changes()
    assert len(found) == 3
    for number, _, _, symptom in found:
        assert outputs[number] == symptom, f"change {number}"
        assert outputs[number].startswith("[0, "), "one plain call with one tile sees none of them"


def test_the_figure_is_there():
    assert (DOCS / "figures" / "tiles_of_programs.png").stat().st_size > 20_000
