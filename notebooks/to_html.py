"""Execute the notebooks and write them as HTML pages into docs/executed/: what a stripped notebook cannot show.

    python notebooks/to_html.py                 all of them
    python notebooks/to_html.py llm attention   these

Each page is one file, asks nothing of any other machine, and is at most 1 MB. A notebook that fails leaves the page of
before as it was, and the exit code is 1.
"""

import argparse
import base64
import hashlib
import io
import re
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbconvert import HTMLExporter
from PIL import Image
from tqdm.auto import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from GPT2Model.files import replace_text

HERE = Path(__file__).resolve().parent
PAGES = HERE.parent / "docs" / "executed"
LIMIT = 1_000_000  # bytes of a page
STYLE = (  # room for lines of 120 characters, and none of them broken in the middle of a word
    "<style>#notebook-container, .container {width: auto !important; max-width: 1240px !important}"
    "div.output_area pre, div.input_area pre {white-space: pre !important; overflow-x: auto}</style>"
)
COLOURS = 192  # of a picture: enough for figures, and half of the bytes


def page(notebook: Path) -> str:
    """The notebook, executed here and now, as one HTML page.

    Raises:
        CellExecutionError: a cell ended in an error.
    """
    content = nbformat.read(notebook, as_version=4)
    NotebookClient(content, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(HERE)}}).execute()
    for cell in content.cells:  # progress bars: only how they ended; and no word of the folder this machine has it in
        for output in cell.get("outputs", []):
            if output.output_type == "stream":
                text = re.sub(r"[^\n\r]*\r(?=[^\n])", "", output.text)
                output.text = text.replace(str(HERE.parent), "gpt2-from-scratch")
            if "image/png" in output.get("data", {}):
                output.data["image/png"] = smaller(output.data["image/png"])
    content.metadata.pop("widgets", None)  # a page without a kernel cannot run them
    exporter = HTMLExporter(template_name="classic", embed_images=True)
    exporter.mathjax_url = exporter.require_js_url = exporter.jupyter_widgets_base_url = ""
    html, _ = exporter.from_notebook_node(content)
    html = re.sub(r"<script\b.*?</script>", "", html, flags=re.DOTALL)  # for widgets and diagrams, from elsewhere
    html = html.replace("<title>Notebook</title>", f"<title>{notebook.stem}</title>", 1)
    about = f'<meta name="description" content="{notebook.name}, executed; {fingerprint(notebook)}">'
    return html.replace("<head>", f"<head>{about}", 1).replace("</head>", f"{STYLE}</head>", 1)


def fingerprint(notebook: Path) -> str:
    """Of the cells' sources: a page that has another one is of an older notebook."""
    cells = nbformat.read(notebook, as_version=4).cells
    return hashlib.sha256("\0".join(f"{cell.cell_type} {cell.source}" for cell in cells).encode()).hexdigest()[:16]


def smaller(png: str) -> str:
    """A picture, base64, with a palette of few colours."""
    picture = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
    file = io.BytesIO()
    picture.quantize(COLOURS, dither=Image.Dither.NONE).save(file, format="PNG", optimize=True)
    return base64.b64encode(file.getvalue()).decode()


def main(names: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = sorted(path.stem for path in HERE.glob("*.ipynb"))
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"which ones: {', '.join(known)} (default: all)")
    asked = parser.parse_args(names).names or known
    unknown = [name for name in asked if name not in known]
    if unknown:
        parser.error(f"no notebook is called {', '.join(unknown)}; there are {', '.join(known)}")
    PAGES.mkdir(parents=True, exist_ok=True)
    failed = 0
    for name in tqdm(asked, unit="notebook"):
        try:
            html = page(HERE / f"{name}.ipynb")
        except CellExecutionError as error:
            tqdm.write(f"{name}: FAILED\n{error}", file=sys.stderr)
            failed += 1
            continue
        size = len(html.encode())
        replace_text(PAGES / f"{name}.html", html)
        tqdm.write(f"{name}: {size / 1e6:.2f} MB{f', over the limit of {LIMIT / 1e6:.0f} MB' if size > LIMIT else ''}")
        failed += size > LIMIT
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
