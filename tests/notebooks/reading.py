"""Read an executed notebook: the cell that contains a marker, what it printed, its pictures."""

import re

import numpy as np

NUMBER = r"(-?\d+(?:\.\d+)?(?:e[+-]\d+)?)"


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
    """The PNG pictures below the one cell that contains `marker`, base64."""
    return [out.data["image/png"] for out in the_cell(notebook, marker).outputs if "image/png" in out.get("data", {})]
