"""A real headless Chromium for tests of the page: an installed one, driven by Playwright."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

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
