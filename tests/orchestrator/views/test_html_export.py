"""The exported page: one small file that loads nothing, whatever the text of the tokens. The page itself is opened in a
real browser in `tests/browser/`.
"""

import base64
import hashlib
import json
import re
from html.parser import HTMLParser

import pytest
import torch

from GPT2Model.config import from_preset
from GPT2Model.gpt2 import GPTModel
from GPT2Model.tracing import trace
from orchestrator.views.html_export import export_html
from orchestrator.views.trace_format import trace_data

WICKED = ["</script><script>alert(1)</script>", "<!--", "&amp;", "@@DATA@@", "\u2028", "\ud800", "<b>", "@@TITLE@@"]


class Letters:
    """A tokenizer whose tokens are what no page may take at its word."""

    def encode(self, text):
        return [WICKED.index(text)]

    def decode(self, ids):
        return "".join(WICKED[int(i)] for i in ids)


class Page(HTMLParser):
    """The elements of a page with their attributes, and the text in each script and style."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.inside, self.last = [], [], None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self.last = tag
        if tag in ("script", "style", "title"):
            self.inside.append([tag, dict(attrs), ""])

    def handle_endtag(self, tag):
        self.last = None

    def handle_data(self, data):
        if self.last in ("script", "style", "title"):
            self.inside[-1][2] += data


@pytest.fixture(scope="module")
def traced():
    torch.manual_seed(0)
    model = GPTModel(from_preset("nano", vocab_size=8, context_length=16, emb_dim=24, n_heads=3, n_layers=2)).eval()
    return trace(model, torch.arange(8)[None], tokenizer=Letters(), recompute=True), model


@pytest.fixture
def exported(traced, tmp_path):
    t, model = traced
    return export_html(t, tmp_path / "trace.html", model, Letters())


def test_the_data_on_the_page_is_the_plain_data_of_the_trace_and_no_token_ends_the_script(exported, traced):
    page = Page(exported.read_text(encoding="utf-8"))
    t, model = traced
    scripts = [part for part in page.inside if part[0] == "script"]
    assert [part[1].get("id") for part in scripts] == ["data", None]
    assert json.loads(scripts[0][2]) == json.loads(json.dumps(trace_data(t, model, Letters())))
    assert json.loads(scripts[0][2])["tokens"] == WICKED
    assert sum(tag == "b" for tag, _ in page.elements) == 0
    assert re.findall(r"[<>&\u2028\ud800]", scripts[0][2]) == []


def test_the_title_is_text(exported):
    page = Page(exported.read_text(encoding="utf-8"))
    (title,) = [part[2] for part in page.inside if part[0] == "title"]
    assert title.startswith("Inside GPT-2: </script><script>alert(1)</script><!--&amp;@@DATA@@")


def test_the_policy_allows_this_script_and_this_style_and_nothing_else(exported):
    page = Page(exported.read_text(encoding="utf-8"))
    (policy,) = [a["content"] for tag, a in page.elements if a.get("http-equiv") == "Content-Security-Policy"]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'"
    for kind in ("script", "style"):
        (text,) = [text for tag, attributes, text in page.inside if tag == kind and not attributes]
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert rules[f"{kind}-src"] == f"'sha256-{digest}'"
    assert set(rules) == {"default-src", "script-src", "style-src", "img-src", "base-uri", "form-action"}
    assert rules["img-src"] == "data:"


def test_nothing_on_the_page_names_another_address(exported):
    page = Page(exported.read_text(encoding="utf-8"))
    addresses = [a[key] for _, a in page.elements for key in ("src", "href", "srcset", "action", "data") if key in a]
    assert addresses == ["data:,"]
    assert "://" not in exported.read_text(encoding="utf-8")
    assert not [a for _, a in page.elements if any(key.startswith("on") or key == "style" for key in a)]


def test_a_file_is_replaced_whole_and_nothing_is_left_beside_it(traced, tmp_path):
    place = tmp_path / "trace.html"
    place.write_text("old")
    export_html(traced[0], place)
    assert place.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert [file.name for file in tmp_path.iterdir()] == ["trace.html"]


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        (
            lambda t, path, model: (path, t),
            TypeError,
            r"trace comes first.*export_html\(trace, path\); they are exchanged",
        ),
        (lambda t, path, model: (str(path), t, model), TypeError, "they are exchanged"),
        (lambda t, path, model: (model, path), TypeError, "the trace comes first: .* got GPTModel"),
        (lambda t, path, model: (t, model, path), TypeError, "the file comes second: .* got GPTModel"),
        (lambda t, path, model: (t, path, Letters(), model), TypeError, "got GPTModel"),
        (lambda t, path, model: (t, path, model, Letters), TypeError, r"make one, Letters\(\)"),
        (lambda t, path, model: (t, path, changed(model, n_layers=3)), ValueError, r"n_layers 2 \(this model: 3\)"),
        (lambda t, path, model: (t, path, changed(model)), ValueError, "does not give the trace's logits"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_in_words_and_nothing_is_written(
    arguments, kind, message, traced, tmp_path
):
    with pytest.raises(kind, match=message):
        export_html(*arguments(traced[0], tmp_path / "trace.html", traced[1]))
    assert list(tmp_path.iterdir()) == []


def changed(model, **changes):
    torch.manual_seed(7)
    return GPTModel({**model.cfg, **changes}).eval()


def test_where_nothing_can_be_written_it_says_so(traced, tmp_path):
    with pytest.raises(FileNotFoundError, match="make it first"):
        export_html(traced[0], tmp_path / "nowhere" / "trace.html")
    with pytest.raises(IsADirectoryError, match="name a file in it"):
        export_html(traced[0], tmp_path)
