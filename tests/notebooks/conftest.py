"""Each notebook is executed once, from its own folder; a test file names its own as NOTEBOOK = "llm.ipynb"."""

import os
import time
from pathlib import Path

import nbformat
import pytest
from filelock import FileLock
from nbclient import NotebookClient

FOLDER = Path(__file__).resolve().parents[2] / "notebooks"


@pytest.fixture(scope="module")
def committed(request):
    """The notebook as it stands in the repository."""
    return nbformat.read(FOLDER / request.module.NOTEBOOK, as_version=4)


@pytest.fixture(scope="session")
def execute(tmp_path_factory):
    """execute("llm.ipynb"): the notebook with its outputs; run once, also where pytest-xdist has several processes."""
    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder

    def run(name: str):
        result = folder / f"{name}.executed"
        with FileLock(f"{result}.lock"):
            if not result.exists():
                notebook, start = nbformat.read(FOLDER / name, as_version=4), time.perf_counter()
                where = {"metadata": {"path": str(FOLDER)}}
                # errors are allowed, so that one test can name the cell: each other test then misses its output
                client = NotebookClient(
                    notebook, timeout=600, kernel_name="python3", allow_errors=True, resources=where
                )
                client.execute()
                notebook.metadata["seconds"] = time.perf_counter() - start
                nbformat.write(notebook, result)
        return nbformat.read(result, as_version=4)

    return run


@pytest.fixture(scope="module")
def executed(request, execute):
    """The notebook that the test file names, with its outputs."""
    return execute(request.module.NOTEBOOK)
