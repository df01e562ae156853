"""Run the code blocks of a notebook's exercises, in a process of their own."""

import re
import subprocess
import sys

from tests.notebooks.conftest import FOLDER


def run_exercises(notebook, needs: tuple[str, ...]) -> str:
    """What the ```python blocks of the exercises print, after the cells that contain one of `needs`; errors raise.

    The cell that finds the repository runs first. What the needed cells print themselves is left out.
    """
    cells = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    needed = [cells[0], *(source for source in cells if any(marker in source for marker in needs))]
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    blocks = re.findall(r"^```python\n(.*?)^```", text.split("## Exercises\n")[1], re.MULTILINE | re.DOTALL)
    assert blocks, "the exercises hold no ```python block"
    source = "\n".join([*needed, "print('EXERCISES')", *blocks])
    source = re.sub(r"^[%!].*$", "", source, flags=re.MULTILINE)
    done = subprocess.run([sys.executable, "-"], input=source, text=True, capture_output=True, cwd=FOLDER, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.split("EXERCISES\n", 1)[1]
