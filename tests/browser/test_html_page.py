"""The exported page in a real browser, no network: its numbers are the trace's, and every control works by keys."""

import io
import itertools
import re

import matplotlib.image
import numpy as np
import pytest
import torch
from playwright.sync_api import expect

from GPT2Model.config import from_preset
from GPT2Model.gpt2 import GPTModel
from GPT2Model.tokenizer import get_tokenizer
from GPT2Model.tracing import trace
from orchestrator.views.html_export import export_html

LAYERS = HEADS = 12
TEXT = "The cat sat on the <b>mat</b>. </script> The dog saw the cat and the mat; then the cat ran and ran home\n"
CONTROLS = "a[href], button, input, select, textarea, summary, [tabindex]"


@pytest.fixture(scope="module")
def traced():
    """A random model of GPT-2's depth, heads and vocabulary, and narrow; 32 tokens."""
    torch.manual_seed(0)
    cfg = from_preset("gpt2", emb_dim=96, n_layers=LAYERS, n_heads=HEADS, init_std=0.25, context_length=32)
    model = GPTModel(cfg).eval()
    ids = get_tokenizer().encode(TEXT)[:32]
    assert len(ids) == 32
    return trace(model, ids, tokenizer=get_tokenizer(), recompute=True), model


@pytest.fixture(scope="module")
def exported(traced, tmp_path_factory):
    t, model = traced
    return export_html(t, tmp_path_factory.mktemp("page") / "trace.html", model)


@pytest.fixture
def open_page(browser, exported):
    """open_page(width, theme, file) -> the page; afterwards: nothing was asked for, nothing was complained of."""
    contexts, requests, complaints, files = [], [], [], []

    def opened(width: int = 1280, theme: str = "light", file=exported):
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=theme)
        contexts.append(context)
        context.set_offline(True)
        context.on("request", lambda request: requests.append(request.url))
        page = context.new_page()
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("dialog", lambda dialog: (complaints.append("a dialog"), dialog.dismiss()))
        files.append(file.as_uri())
        page.goto(file.as_uri())
        return page

    yield opened
    for context in contexts:
        context.close()
    assert set(requests) - {"data:,"} == set(files)
    assert complaints == []


def column(page, table: str, heading: str) -> list[str]:
    """The cells below a heading of a table, as shown."""
    headings = page.locator(f"#{table} thead tr > *").all_inner_texts()
    place = headings.index(heading) + 1
    return page.locator(f"#{table} tbody tr > :nth-child({place})").all_inner_texts()


def floats(texts: list[str]) -> np.ndarray:
    return np.array([float(text.replace("\N{MINUS SIGN}", "-")) for text in texts])


def test_it_is_under_one_megabyte_for_twelve_layers_of_twelve_heads_and_32_tokens(exported):
    assert 100_000 < exported.stat().st_size < 1_000_000


@pytest.mark.parametrize(("layer", "head", "token"), [(7, 3, 12), (0, 11, 31), (11, 0, 1)])
def test_scores_and_weights_of_a_chosen_token_are_the_traces(open_page, traced, layer, head, token):
    page, (t, _) = open_page(), traced
    page.get_by_label("Layer", exact=True).select_option(str(layer))
    page.get_by_label("Head", exact=True).select_option(str(head))
    page.locator("#strip label").nth(token).click()
    weights = t[f"blocks.{layer}.attention.weights"][0, head, token, : token + 1].double().numpy()
    scores = t[f"blocks.{layer}.attention.scores"][0, head, token, : token + 1].double().numpy()
    shown = floats(column(page, "row", "weight"))
    np.testing.assert_allclose(shown, weights, rtol=0, atol=5e-5 + 8e-6)  # four digits, 16 bits
    np.testing.assert_allclose(floats(column(page, "row", "score")), scores, rtol=0, atol=5e-5 + 1e-3)
    np.testing.assert_allclose(floats(column(page, "row", "exp")), np.exp(scores - scores.max()), rtol=0, atol=1e-3)
    status = page.locator("#status").inner_text()
    assert f"looks most at token {weights.argmax()}," in status


def test_the_map_as_numbers_is_the_whole_head(open_page, traced):
    page, (t, _) = open_page(), traced
    page.get_by_role("button", name="layer 5, head 9", exact=True).click()
    page.locator("summary").click()
    rows = [row.split("\t")[1:] for row in page.locator("#weights tbody").inner_text().splitlines()]
    exact = t["blocks.5.attention.weights"][0, 9].double().numpy()
    assert len(rows) == 32
    for i, row in enumerate(rows):
        assert row[i + 1 :] == ["\N{EN DASH}"] * (31 - i)
        np.testing.assert_allclose(floats(row[: i + 1]), exact[i, : i + 1], rtol=0, atol=5e-4 + 8e-6)


@pytest.mark.parametrize(("presses", "key"), [(6, "ArrowLeft"), (13, "ArrowRight"), (19, "ArrowLeft")])
def test_the_temperature_slider_moved_by_keys_shows_what_float64_gives(open_page, traced, presses, key):
    page, (t, _) = open_page(), traced
    page.locator("#strip label").nth(20).click()
    before = column(page, "next", "probability")
    page.get_by_label("Temperature").focus()
    for _ in range(presses):
        page.keyboard.press(key)
    temperature = 1 + 0.05 * presses * (-1 if key == "ArrowLeft" else 1)
    exact = torch.softmax(t.logits[0, 20].double() / temperature, dim=-1)
    ids = [int(text) for text in column(page, "next", "id")]
    assert ids == t.logits[0, 20].topk(12).indices.tolist()
    shown = column(page, "next", "probability")
    assert shown != before
    np.testing.assert_allclose(floats(shown), exact[ids], rtol=0, atol=5.1e-5)
    words = column(page, "next", "token")
    assert words == [shown_as(get_tokenizer().decode([i])) for i in ids]
    rest, going_on = re.search(
        r"All 50,245 others together: ([\d.]+)\. .* probability ([\d.e-]+)\.", page.locator("#rest").inner_text()
    ).groups()
    assert abs(float(rest) - (1 - exact[ids].sum())) < 6e-5
    np.testing.assert_allclose(float(going_on), exact[t.ids[0, 21]], rtol=1e-3)
    assert f"at temperature {temperature:.2f}" in page.locator("#status").inner_text()


def shown_as(text: str) -> str:
    """A token as the page shows it: spaces and line ends visible, control characters by their number."""
    shown = text.replace(" ", "\N{OPEN BOX}").replace("\n", "\u21b5")
    return "".join(c if c.isprintable() else f"\\u{{{ord(c):x}}}" for c in shown)


def test_lens_norms_and_tensors_are_the_traces(open_page, traced):
    page, (t, model) = open_page(), traced
    page.get_by_label("Layer", exact=True).select_option("4")
    page.locator("#strip label").nth(9).click()
    stages = column(page, "lens", "after")
    assert stages == ["embeddings", *(f"blocks.{i}.output" for i in range(LAYERS))]
    shown = column(page, "lens", "likeliest")
    for stage, cell in zip(stages, shown, strict=True):
        stream = t[stage][0, 9].double()
        centred = stream - stream.mean()
        normed = centred / (centred.square().mean() + 1e-5).sqrt()  # a fresh norm has weight 1 and bias 0
        best = torch.softmax(normed @ model.head.weight.detach().double().T, dim=-1).max(dim=-1)
        word, probability = cell.rsplit(" ", 1)
        assert word == shown_as(get_tokenizer().decode([int(best.indices)]))
        assert abs(float(probability) - best.values) < 6e-4
    names = column(page, "norms", "after")
    exact = [t[name][0, 9].double().norm().item() for name in names]
    assert len(names) == 1 + 2 * LAYERS
    np.testing.assert_allclose(floats(column(page, "norms", "norm")), exact, rtol=1e-3)
    assert column(page, "tensors", "name") == [name.removeprefix("blocks.4.") for name in t.names("blocks.4.*")]
    deviations = [t[name].double().std(correction=0).item() for name in t.names("blocks.4.*")]
    masked = [i for i, name in enumerate(t.names("blocks.4.*")) if "masked" in name]
    shown = floats(column(page, "tensors", "std"))
    np.testing.assert_allclose(np.delete(shown, masked), np.delete(deviations, masked), rtol=1e-3)
    page.get_by_label("Of", exact=True).select_option("all")
    assert column(page, "tensors", "name") == t.names()


class Wicked:
    """A tokenizer whose tokens are whole pieces of markup, and a character that turns the line around."""

    words = ("</script><script>alert(1)</script>", "<b>bold</b>", "<img src=x onerror=alert(1)>", "&lt;", "\u202eno")

    def decode(self, ids):
        return "".join(self.words[int(i)] for i in ids)


def test_text_that_looks_like_markup_is_text(open_page, traced, tmp_path):
    torch.manual_seed(0)
    model = GPTModel(from_preset("nano", vocab_size=5, emb_dim=24, n_heads=2, n_layers=1)).eval()
    t = trace(model, torch.arange(5), tokenizer=Wicked(), recompute=True)
    page = open_page(file=export_html(t, tmp_path / "wicked.html", model, Wicked()))
    shown = [shown_as(word) for word in Wicked.words]
    assert shown[-1] == "\\u{202e}no"
    assert [word.strip() for word in page.locator("#strip .token").all_inner_texts()] == shown
    page.locator("#strip label").nth(1).click()
    assert column(page, "row", "key") == shown[:2]
    assert sorted(column(page, "next", "token")) == sorted(shown)
    page.locator("summary").click()
    assert [row.split("\t")[0] for row in page.locator("#weights tbody").inner_text().splitlines()] == [
        f"{i} {word}" for i, word in enumerate(shown)
    ]
    assert all(word in page.locator("h1").inner_text() for word in Wicked.words[:4])
    assert page.locator("img, b:not(.token)").count() == 0
    assert page.locator("script").count() == 2

    real = open_page()
    strip = real.locator("#strip .token").all_inner_texts()
    assert [word.strip() for word in strip] == [shown_as(word) for word in traced[0].tokens[0]]


def test_each_head_of_the_sheet_is_drawn_from_its_own_weights(open_page, traced):
    page, (t, _) = open_page(), traced
    darkness = page.evaluate(
        """() => [...document.querySelectorAll("#sheet canvas")].map((canvas) => {
             const pixels = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
             return Array.from({length: pixels.length / 4}, (_, i) => 255 - pixels[4 * i]); })"""
    )
    assert len(darkness) == LAYERS * HEADS
    for place, (layer, head) in enumerate(itertools.product(range(LAYERS), range(HEADS))):
        weights = t[f"blocks.{layer}.attention.weights"][0, head].numpy()[np.tril_indices(32)]
        order = np.argsort(weights, kind="stable")  # the more weight, the darker, on a light page
        drawn = np.array(darkness[place]).reshape(32, 32)[np.tril_indices(32)]
        assert (np.diff(drawn[order]) >= 0).all()
        assert len(set(darkness[place])) > 20


# ------------------------------------------------------------------ hidden is not the same as 0

PADDING, SEEN = 3, (8, 4)  # tokens of padding on the left; a cell that is seen, and whose weight is made 0


@pytest.fixture(scope="module")
def padded(tmp_path_factory):
    """The page of a text with padding on the left, and which of its cells are hidden: counted here, from the rules."""
    torch.manual_seed(1)
    model = GPTModel(from_preset("nano", vocab_size=50257, init_std=0.2, attn_implementation="eager")).eval()
    ids = torch.tensor([[50256] * PADDING + get_tokenizer().encode("The cat sat on the mat")])

    def without_one(weights):
        weights[:, :, *SEEN] = 0
        return weights

    real = torch.arange(ids.shape[1])[None] >= PADDING
    t = trace(
        model, ids, tokenizer=get_tokenizer(), padding_mask=real, patch={"blocks.*.attention.weights": without_one}
    )
    rows, columns = np.indices((ids.shape[1], ids.shape[1]))
    return export_html(t, tmp_path_factory.mktemp("padded") / "padded.html", model), (columns > rows) | (columns < 3)


@pytest.mark.parametrize(("theme", "zero"), [("light", (255, 255, 255)), ("dark", (27, 33, 45))])
def test_what_the_mask_hides_looks_unlike_a_weight_of_0_in_both_themes(open_page, padded, theme, zero):
    file, hidden = padded
    page, count = open_page(theme=theme, file=file), len(hidden)
    margin, cell = page.evaluate("[geometry.margin, geometry.cell]")
    side = page.locator("#sheet canvas").first.bounding_box()["width"] / count
    for place, start, size in (("#map", margin, cell), ("#sheet canvas", 0, side)):
        picture = matplotlib.image.imread(io.BytesIO(page.locator(place).first.screenshot()))[..., :3] * 255
        for row, column in np.ndindex(hidden.shape):
            inside = picture[inner(start, row, size), inner(start, column, size)].reshape(-1, 3).round()
            colours = np.unique(inside, axis=0)
            if hidden[row, column]:
                assert len(colours) > 1, (place, row, column)  # a hatch
                assert np.abs(colours - zero).max(axis=-1).min() >= 15  # no pixel of it is the colour of 0
            else:
                assert len(colours) == 1, (place, row, column)
        seen = picture[inner(start, SEEN[0], size), inner(start, SEEN[1], size)]
        np.testing.assert_array_equal(seen[0, 0].round(), zero)


def inner(start: float, index: int, size: float) -> slice:
    """The pixels of a cell, away from its edges and from the frame around a row."""
    return slice(round(start + index * size) + 3, round(start + (index + 1) * size) - 3)


def test_what_the_mask_hides_is_named_in_the_tables_and_in_the_legend(open_page, padded):
    file, hidden = padded
    page = open_page(file=file)
    assert "hatched: hidden by the mask" in page.locator(".legend").inner_text()
    page.locator("summary").click()
    rows = [row.split("\t")[1:] for row in page.locator("#weights tbody").inner_text().splitlines()]
    np.testing.assert_array_equal(np.array(rows) == "\N{EN DASH}", hidden)
    assert rows[SEEN[0]][SEEN[1]] == "0.000"
    shown = column(page, "row", "exp")
    assert [text == "hidden" for text in shown] == hidden[-1].tolist()
    margin, cell = page.evaluate("[geometry.margin, geometry.cell]")
    for (row, place), text in (((2, 7), "hidden by the mask"), (SEEN, "0.0000")):
        page.locator("#map").hover(position={"x": margin + (place + 0.5) * cell, "y": margin + (row + 0.5) * cell})
        assert page.locator("#pointed").inner_text().endswith(f": {text}")
    page.locator("#strip label").nth(1).click()
    assert "sees no token: the mask hides all" in page.locator("#status").inner_text()


def walk(page) -> list[int]:
    """Press Tab until the page is left: each element that had the focus, by its place in the page."""
    places = []
    place = """() => document.activeElement === document.body ? -1
        : [...document.querySelectorAll("*")].indexOf(document.activeElement)"""
    for _ in range(200):
        page.keyboard.press("Tab")
        here = page.evaluate(place)
        if here == -1 or here in places:
            return places
        places.append(here)
    raise AssertionError("200 presses of Tab do not leave the page")


@pytest.mark.parametrize("width", [375, 1280])
def test_every_control_is_reached_by_tab_with_a_visible_focus(open_page, width):
    page = open_page(width)
    controls = page.evaluate(
        """(controls) => { const all = [...document.querySelectorAll("*")];
             return [...document.querySelectorAll(controls)]
               .filter((e) => e.checkVisibility() && !(e.type === "radio" && !e.checked) && !e.matches("#sheet button"))
               .map((e) => all.indexOf(e)); }""",
        CONTROLS,
    )
    inside = page.evaluate(
        """() => { const all = [...document.querySelectorAll("*")];
             return [...document.querySelectorAll("#sheet button")].map((e) => all.indexOf(e)); }"""
    )
    reached = walk(page)
    assert set(controls) == set(reached) - set(inside)
    assert len(set(inside) & set(reached)) == 1  # one stop for the sheet, arrows inside
    for name in ("Colours", "Layer", "Head", "Temperature", "Of"):
        label = page.get_by_label(name, exact=name != "Temperature")
        assert page.evaluate("(e) => [...document.querySelectorAll('*')].indexOf(e)", label.element_handle()) in reached
    page.goto(page.url)
    for _ in reached:
        page.keyboard.press("Tab")
        outline = page.evaluate(
            """() => { const e = document.activeElement, drawn = e.type === "radio" ? e.nextElementSibling : e;
                 const style = getComputedStyle(drawn);
                 return [style.outlineStyle, parseFloat(style.outlineWidth)]; }"""
        )
        assert outline[0] == "solid"
        assert outline[1] >= 2


def test_arrow_keys_go_to_every_head_and_every_token(open_page):
    page = open_page()

    def head_now() -> tuple[int, int]:
        shown = re.match(r"Layer (\d+), head (\d+)", page.locator("#status").inner_text()).groups()
        focused = page.evaluate("() => [document.activeElement.dataset.layer, document.activeElement.dataset.head]")
        assert list(shown) == focused
        return int(shown[0]), int(shown[1])

    page.get_by_role("button", name="layer 0, head 0", exact=True).focus()
    for key, steps in (("ArrowRight", (0, 1)), ("ArrowDown", (1, 0)), ("ArrowLeft", (0, -1)), ("ArrowUp", (-1, 0))):
        for _ in range(11):
            layer, head = head_now()
            page.keyboard.press(key)
            assert head_now() == (layer + steps[0], head + steps[1])
    page.keyboard.press("ArrowLeft")
    assert head_now() == (0, 0)  # at the edge it stays
    page.keyboard.press("End")
    assert head_now() == (0, 11)
    page.locator("#strip input:checked").focus()
    tokens = set()
    for _ in range(32):
        page.keyboard.press("ArrowRight")
        tokens.add(int(re.search(r"token (\d+),", page.locator("#status").inner_text())[1]))
    assert tokens == set(range(32))


@pytest.mark.parametrize(("theme", "width"), [("light", 1280), ("dark", 375)])
def test_axe_finds_no_violation(open_page, axe, theme, width):
    page = open_page(width, theme)
    if width == 375:
        page.locator("summary").click()  # a thousand numbers more
    page.evaluate(axe)
    found = page.evaluate("axe.run()")
    assert len(found["passes"]) > 20
    assert [(rule["id"], [node["html"] for node in rule["nodes"]]) for rule in found["violations"]] == []


@pytest.mark.parametrize("width", [320, 375, 800, 1280])
def test_nothing_sticks_out_of_the_window(open_page, width):
    page = open_page(width)
    page.locator("summary").click()
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_the_theme_follows_the_system_until_it_is_chosen(open_page):
    page = open_page(theme="dark")

    def brightness():
        return sum(int(n) for n in re.findall(r"\d+", page.evaluate("getComputedStyle(document.body).backgroundColor")))

    assert brightness() < 150
    page.emulate_media(color_scheme="light")
    expect(page.locator("html")).to_have_attribute("data-theme", "light")  # the browser tells the page a frame later
    assert brightness() > 600
    page.get_by_label("Colours", exact=True).select_option("dark")
    assert brightness() < 150
    cell = "() => [...document.querySelector('#sheet canvas').getContext('2d').getImageData(0, 31, 1, 1).data]"
    *colour, opaque = page.evaluate(cell)
    assert sum(colour) < 150  # a weight near 0: the page's dark, not white
    assert opaque == 255


def test_of_a_variant_the_page_says_what_is_not_as_in_gpt2(open_page, tmp_path):
    torch.manual_seed(0)
    changes = {"norm": "rmsnorm", "mlp": "swiglu", "positions": "rope", "n_kv_heads": 2}
    model = GPTModel(from_preset("nano", init_std=0.2, **changes)).eval()
    traced = trace(model, TEXT[:24], recompute=True)
    page = open_page(file=export_html(traced, tmp_path / "variant.html", model))
    expect(page.locator("#heading")).to_contain_text("Inside a variant of GPT-2: ")
    about = page.locator("#about")
    expect(about).to_contain_text("2 layers of 4 heads, 2 of keys and values, width 128")
    for phrase in ("norm='rmsnorm', where GPT-2 has 'layernorm'", "mlp='swiglu'", "positions='rope'"):
        expect(about).to_contain_text(phrase)


def test_of_gpt2_the_page_names_no_variant(open_page):
    page = open_page()
    expect(page.locator("#heading")).to_contain_text("Inside GPT-2: ")
    expect(page.locator("#about")).not_to_contain_text("Not GPT-2")
