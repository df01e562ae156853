"""A real Chromium for the tests of pages and notebooks. Where there is none, they are skipped; on CI they fail."""

import os
import shutil
from pathlib import Path

import axe_core_python
import pytest
from playwright.sync_api import sync_playwright

ARGUMENTS = (
    "--no-sandbox", "--headless", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update",
)  # fmt: skip


def find_chromium() -> str | None:
    """Where Chromium or Chrome is, by the names under which systems install them."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
    return next((found for name in names if (found := shutil.which(name))), None)


@pytest.fixture(scope="module")  # closed after each file: its event loop would get in the way of other tests' own
def browser():
    path = find_chromium()
    if path is None:
        missing = "Chromium is not installed (apt-get install chromium, or any Chrome): pages were not opened."
        (pytest.fail if os.environ.get("CI") else pytest.skip)(missing)
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=list(ARGUMENTS))
        yield chromium
        chromium.close()


@pytest.fixture(scope="session")
def axe() -> str:
    """The source of axe-core, which checks a page against the rules of accessibility."""
    return (Path(axe_core_python.__file__).parent / "axe.min.js").read_text(encoding="utf-8")
