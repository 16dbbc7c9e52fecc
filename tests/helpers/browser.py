"""A real headless Chromium for tests of the page: an installed one, driven by Playwright."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

PHONE, DESK = {"width": 390, "height": 844}, {"width": 1280, "height": 900}
_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def chromium_binary() -> str:
    """Where it is; CHROMIUM may say so."""
    for name in (os.environ.get("CHROMIUM", ""), *_NAMES):
        if name and (found := shutil.which(name)) is not None:
            return found
    pytest.skip("no Chromium: install Debian's package chromium, or set CHROMIUM")


@contextmanager
def chromium() -> Iterator[Any]:
    """A browser of Playwright's, which brings none of its own here."""
    api = pytest.importorskip("playwright.sync_api")
    binary = chromium_binary()
    with api.sync_playwright() as playwright:
        # root has no sandbox in a container, and containers have a small /dev/shm
        args = ["--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"]
        browser = playwright.chromium.launch(executable_path=binary, args=args)
        try:
            yield browser
        finally:
            browser.close()


# ---- what a user does with our page --------------------------------------------------------------


def choose(page: Any, name: str, text: str) -> None:
    file = {"name": name, "mimeType": "text/plain", "buffer": text.encode()}
    page.set_input_files("#files", file)


def drop(page: Any, name: str, text: str) -> None:
    page.set_input_files(
        "#files", {"name": name, "mimeType": "text/plain", "buffer": text.encode()}
    )
    page.wait_for_selector(f"#documents li:has-text('{name}')")


def ask(page: Any, question: str) -> None:
    page.fill("#question", question)
    page.click("#send")
    page.wait_for_selector("#progress-of-answers:has-text('Both answers are here')")


def counts(page: Any) -> dict[str, int]:
    """The legend's numbers by kind."""
    rows = page.query_selector_all("#legend tr")
    return {
        row.get_attribute("data-kind"): int(row.query_selector("td").inner_text()) for row in rows
    }
