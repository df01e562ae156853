"""The notebooks and the stepper in JupyterLab in a real browser: they run whole, show pictures, and a slider works."""

import json
import os
import re
import secrets
import shutil
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
import torch
from playwright.sync_api import TimeoutError as NotShown

from GPT2Model.config import from_preset
from GPT2Model.gpt2 import GPTModel
from orchestrator.text.tales import TalesTokenizer

ROOT = Path(__file__).resolve().parents[2]
TEXT = "One morning a kind boy named Hugo"
SECONDS = 170  # for a notebook, on a machine that does other things too

MODEL = """
torch.manual_seed(3)
model = GPTModel(from_preset("nano", vocab_size=TalesTokenizer().vocab_size, init_std=0.2)).eval()
"""
STEPPER = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import torch
from playwright.sync_api import TimeoutError as NotShown
from GPT2Model.config import from_preset
from GPT2Model.gpt2 import GPTModel
from orchestrator.text.tales import TalesTokenizer
from orchestrator.views.stepper import StepThrough
torch.set_num_threads(1)
{MODEL}
StepThrough(model, {TEXT!r}, TalesTokenizer())
"""

# The cells of the notebook in front, and whether its kernel rests: from JupyterLab's own model of it.
STATE = """() => {
    const panel = window.jupyterapp?.shell.currentWidget;
    const kernel = panel?.sessionContext?.session?.kernel;
    if (!kernel || !panel.context.isReady) return null;
    const cells = panel.content.model.sharedModel.cells.map((cell) => cell.toJSON());
    return {path: panel.context.path, status: kernel.status, cells: cells.filter((cell) => cell.cell_type === "code")};
}"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A copy of the notebooks where they find the packages; nothing that is done there touches the repository."""
    place = tmp_path_factory.mktemp("lab")
    for package in ROOT.glob("*/__init__.py"):
        (place / package.parent.name).symlink_to(package.parent)
    (ROOT / "runs").mkdir(exist_ok=True)
    (place / "runs").symlink_to(ROOT / "runs")  # what is trained once is kept there
    shutil.copytree(ROOT / "notebooks", place / "notebooks", ignore=shutil.ignore_patterns(".*"))
    cells = [nbformat.v4.new_code_cell(STEPPER)]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), place / "notebooks" / "stepper.ipynb")
    return place


@pytest.fixture  # one for each test: a used one brings back, and to the front, what was open before
def lab(folder, tmp_path_factory):
    """A JupyterLab of its own, with nobody's settings: its address with a token."""
    home = tmp_path_factory.mktemp("jupyter")
    settings = home / "settings" / "@jupyterlab" / "notebook-extension"
    settings.mkdir(parents=True)
    # every cell is in the page, not only those in sight
    (settings / "tracker.jupyterlab-settings").write_text(json.dumps({"windowingMode": "none"}))
    rooms = {name: str(home / name.lower()) for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "IPYTHONDIR")}
    rooms |= {"JUPYTER_RUNTIME_DIR": str(home / "runtime"), "JUPYTERLAB_SETTINGS_DIR": str(home / "settings")}
    rooms |= {"JUPYTERLAB_WORKSPACES_DIR": str(home / "workspaces"), "OMP_NUM_THREADS": "1"}
    token = secrets.token_hex(16)
    command = [
        sys.executable, "-m", "jupyterlab", "--no-browser", "--ip=127.0.0.1", "--port=18888",
        "--ServerApp.port_retries=500", "--ServerApp.allow_root=True", f"--ServerApp.root_dir={folder}",
        f"--IdentityProvider.token={token}",
        "--LabApp.expose_app_in_browser=True", "--LabApp.extension_manager=readonly",
        "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
    ]  # fmt: skip
    with (home / "log").open("w") as log:
        server = subprocess.Popen(command, env=os.environ | rooms, stdout=log, stderr=subprocess.STDOUT, cwd=folder)
        try:
            yield address(server, home) + "lab/tree/notebooks/{name}?token=" + token
        finally:
            server.terminate()  # it ends its kernels too
            server.wait(30)


def address(server: subprocess.Popen, home: Path) -> str:
    """Where the server says that it listens, once it does."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and server.poll() is None:
        for file in (home / "runtime").glob("jpserver-*.json"):
            if file.stat().st_size:
                return json.loads(file.read_text())["url"]
        time.sleep(0.1)
    raise AssertionError(f"JupyterLab did not start:\n{(home / 'log').read_text()}")


@pytest.fixture
def open_notebook(browser, lab):
    """open_notebook(name) -> a page with the notebook opened and its kernel at rest. No other server is spoken to."""
    context = browser.new_context(viewport={"width": 1400, "height": 1000})
    here = lab.split("/lab/")[0]
    context.route(lambda url: not url.startswith((here, "data:", "blob:")), lambda route: route.abort())

    def opened(name: str):
        page = context.new_page()
        page.goto(lab.format(name=name))
        wait_for(page, lambda state: state["path"].endswith(name) and state["status"] == "idle", seconds=60)
        return page

    yield opened
    context.close()


def wait_for(page, done, seconds: float) -> dict:
    """Ask for the notebook's state until `done` says so."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        state = page.evaluate(STATE)
        if state is not None and done(state):  # None: no notebook is in front at this moment, or its kernel is starting
            return state
        page.wait_for_timeout(200)  # playwright's own wait: the page goes on meanwhile
    raise AssertionError(f"not within {seconds} s; the state is {str(state)[-3000:]}")


def run_all(page) -> dict:
    """Run > Run All Cells, as a user does, until every code cell has its number and the kernel rests."""
    for _ in range(5):  # the menu is there before what it does is: then a user clicks again
        page.get_by_role("menubar").get_by_text("Run", exact=True).click()
        page.get_by_text("Run All Cells", exact=True).click()
        try:
            wait_for(page, lambda state: state["status"] == "busy" or numbered(state["cells"][0]), seconds=5)
            break
        except AssertionError:
            continue

    def done(state):
        return errors(state) or (all(map(numbered, state["cells"])) and state["status"] == "idle")

    return wait_for(page, done, SECONDS)


def numbered(cell: dict) -> bool:
    return cell["execution_count"] is not None


def errors(state: dict) -> list[str]:
    return [
        f"{cell['source'][:80]!r}: {output['ename']}: {output['evalue']}"
        for cell in state["cells"]
        for output in cell["outputs"]
        if output["output_type"] == "error"
    ]


def pictures(state: dict) -> int:
    return sum("image/png" in output.get("data", {}) for cell in state["cells"] for output in cell["outputs"])


@pytest.mark.parametrize(("name", "at_least"), [("llm.ipynb", 3), ("attention.ipynb", 3)])
def test_a_notebook_runs_whole_and_shows_its_pictures(open_notebook, name, at_least):
    page = open_notebook(name)
    state = run_all(page)
    assert errors(state) == []
    counts = [cell["execution_count"] for cell in state["cells"]]
    assert counts == list(range(1, len(counts) + 1))
    shown = page.locator(".jp-OutputArea-output img")
    sizes = shown.evaluate_all("(all) => all.map((image) => [image.naturalWidth, image.naturalHeight])")
    assert len(sizes) == pictures(state) >= at_least
    assert all(width > 100 and height > 100 for width, height in sizes)


def exact(layer_tokens: int, temperature: float) -> tuple[str, float]:
    """The likeliest word after the text and its probability, in float64, worked out in this process."""
    scope = {"torch": torch, "GPTModel": GPTModel, "from_preset": from_preset, "TalesTokenizer": TalesTokenizer}
    exec(MODEL, scope)
    model = scope["model"].double()
    model.set_attention("eager")
    with torch.no_grad():
        logits = model(torch.tensor([TalesTokenizer().encode(TEXT)[:layer_tokens]]))[0, -1]
    best = torch.softmax(logits / temperature, dim=-1).max(dim=-1)
    return TalesTokenizer().decode([int(best.indices)]), best.values.item()


def handle(page, label: str):
    return page.locator(".widget-slider", has=page.get_by_text(label, exact=True)).locator(".noUi-handle")


def shown_text(page, until: str) -> str:
    """The stepper's text, once it contains `until` and the kernel rests: what is changed next meets no older change."""
    shown = page.locator(".jp-OutputArea-output .widget-html-content")
    text = shown.filter(has_text=until)
    try:
        text.wait_for(timeout=60_000)
    except NotShown as error:
        raise AssertionError(f"{until!r} did not come; shown is: {shown.all_inner_texts()}") from error
    wait_for(page, lambda state: state["status"] == "idle", seconds=60)
    return text.inner_text()


def first_probability(text: str) -> tuple[str, float]:
    found = re.search(r"probability of '(.+?)': (\d\.\d{4}) at temperature", text)
    return found[1], float(found[2])


def test_the_stepper_s_sliders_show_numbers_that_were_computed_elsewhere(open_notebook):
    page = open_notebook("stepper.ipynb")
    assert errors(run_all(page)) == []
    before = first_probability(shown_text(page, "at temperature 1.00"))
    picture = page.locator(".jp-OutputArea-output img.widget-image")
    assert picture.evaluate("(image) => image.naturalWidth") > 300

    handle(page, "temperature").focus()
    for _ in range(6):
        page.keyboard.press("ArrowLeft")
    cooler = first_probability(shown_text(page, "at temperature 0.70"))
    # shown to 4 digits; float32 logits of size 10 are good for 1e-5
    for shown, temperature in ((before, 1.0), (cooler, 0.7)):
        word, probability = exact(7, temperature)
        assert shown[0] == word
        assert abs(shown[1] - probability) < 1e-4
    assert cooler[1] > before[1] + 0.01  # not the old number once more

    handle(page, "token").focus()
    page.keyboard.press("ArrowLeft")
    earlier = first_probability(shown_text(page, "after token 5,"))
    assert earlier[0] == exact(6, 0.7)[0]
    assert abs(earlier[1] - exact(6, 0.7)[1]) < 1e-4
    assert earlier != cooler

    old = picture.get_attribute("src")
    handle(page, "layer").focus()
    page.keyboard.press("ArrowRight")
    assert "layer 1, head 0" in shown_text(page, "Tensors of blocks.1")
    page.wait_for_function("([image, old]) => image.src !== old", arg=[picture.element_handle(), old])

    assert "asked for auto, ran sdpa" in shown_text(page, "Which implementation ran")
    page.get_by_label("use_flash").uncheck()
    shown_text(page, "asked for eager, ran eager")
    page.get_by_label("use_flash").check()
    shown_text(page, "asked for auto, ran sdpa")
    page.get_by_label("implementation").select_option("flash_tiled")
    assert "flash_tiled never forms the weights" in shown_text(page, "asked for flash_tiled, ran flash_tiled")
