"""export_html: a trace as one HTML file that opens with a double click, without a kernel and without a network.

The page is `explorer.html` with the data of `trace_format.py` put in. Its security policy allows that one script and
that one style sheet, by their hashes, and no request of any kind.

Two things are said on the page. Its colours follow the square root of a weight, so that small ones are seen; those of
`attention_sheet` are linear, so one map does not look the same in both. And what a mask hides is hatched, as there: its
weight is 0 because nobody asked that key, not because it did not fit.
"""

import base64
import hashlib
import html
import json
import os
import re
from importlib.resources import files
from pathlib import Path

from GPT2Model.files import replace_text
from GPT2Model.trace_values import Trace
from orchestrator.views.checks import check_trace, kind_of
from orchestrator.views.trace_format import trace_data


def export_html(trace, path, model=None, tokenizer=None, *, sequence: int = 0, bits: int = 16) -> Path:
    """Write the page of a trace: every head, scores to weights, the next token, logit lens, norms, tensors.

    Why one file: it can be mailed, put on a web page or opened on a machine without Python.

    Args:
        trace, model, tokenizer, sequence, bits: as in `trace_data`; without the model there is no logit lens.
        path: the file; its folder must be there. A file of that name is replaced, whole or not at all.
    Returns:
        the path. For 12 layers of 12 heads and 32 tokens the file has about 0.6 MB.
    Raises:
        TypeError: arguments in another order, or of another kind.
        ValueError: what `trace_data` raises. FileNotFoundError: no such folder.
    """
    if isinstance(path, Trace):
        raise TypeError("the trace comes first, then the file: export_html(trace, path); they are exchanged.")
    check_trace(trace)
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"the file comes second: export_html(trace, path, model, tokenizer); got {kind_of(path)}.")
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {path.parent} for {path.name}: make it first.")
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder: name a file in it, such as {path / 'trace.html'}.")
    page = page_of(trace_data(trace, model, tokenizer, sequence, bits=bits))
    replace_text(path, page)
    return path


def page_of(data: dict) -> str:
    """The whole page of `trace_data`, as text."""
    page = files("orchestrator.views").joinpath("explorer.html").read_text(encoding="utf-8")
    model = "a variant of GPT-2" if data["unlike_gpt2"] else "GPT-2"
    title = f"Inside {model}: {data['text'][:60]}".encode("utf-8", "replace").decode()  # half a character
    parts = {"@@POLICY@@": policy(page), "@@TITLE@@": html.escape(title), "@@DATA@@": in_script(data)}
    return re.sub("|".join(parts), lambda found: parts[found[0]], page)  # one pass: a text with @@DATA@@ in it is safe


def in_script(data: dict) -> str:
    """JSON that cannot end the script element it stands in, whatever a token's text is."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)  # ASCII only
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def policy(page: str) -> str:
    """Nothing may be loaded, and only this script and this style may run: named by their hashes."""
    script, style = (re.search(rf"<{tag}>(.*?)</{tag}>", page, flags=re.S)[1] for tag in ("script", "style"))
    hashes = [base64.b64encode(hashlib.sha256(part.encode()).digest()).decode() for part in (script, style)]
    return (
        f"default-src 'none'; script-src 'sha256-{hashes[0]}'; style-src 'sha256-{hashes[1]}'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
