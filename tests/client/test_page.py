"""The page at ``/``, in a real browser and in Node: a document is ingested, a question asked, both
answers arrive, and the colours add up to the report.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import pytest
from browser import DESK, PHONE, ask, choose, chromium, counts, drop
from fake_server import FakeServer, Fault
from fastapi import FastAPI
from fastapi.testclient import TestClient

from cacheblend_rag import CacheBlend
from cacheblend_rag.server.page import page_router
from cacheblend_rag.server.tenants import KeyFile, TenantMiddleware, Who

HERE = Path(__file__).parent
PATHS = ("/page/page.css", "/page/page.js")
PAGE = HERE.parents[1] / "cacheblend_rag/server/page"
SHIPS = "\n\n".join(
    f"Report {i}. " + f"The ship of number {i} sailed to harbour {i} in winter. " * 12
    for i in range(5)
)

# of all visible texts: the least contrast with the colour behind them
CONTRAST = """() => {
  const linear = (c) => c <= .04045 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4;
  const channel = (c) => linear(c / 255);
  const rgb = (color) => color.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => .2126 * channel(r) + .7152 * channel(g) + .0722 * channel(b);
  const behind = (node) => {
    for (let at = node; at; at = at.parentElement) {
      const color = rgb(getComputedStyle(at).backgroundColor);
      if (color.length < 4 || color[3] > 0) return color;
    }
    return [255, 255, 255];
  };
  const rows = [...document.querySelectorAll('body *')]
    .filter((node) => node.checkVisibility() && node.textContent.trim()
      && [...node.childNodes].some((child) => child.nodeType === 3 && child.data.trim()))
    .map((node) => {
      const [a, b] = [light(rgb(getComputedStyle(node).color)), light(behind(node))];
      return [(Math.max(a, b) + .05) / (Math.min(a, b) + .05), node.outerHTML.slice(0, 80)];
    });
  return rows.sort((a, b) => a[0] - b[0])[0];
}"""


def test_the_pages_decisions() -> None:
    """In Node, without a browser."""
    node = shutil.which("node") or shutil.which("nodejs")
    if node is None:
        pytest.skip("no Node: the page's script is tested in the browser only")
    done = subprocess.run(
        [node, "--test", HERE / "test_page.js"], capture_output=True, text=True, cwd=HERE
    )
    assert done.returncode == 0, done.stdout


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as found:
        yield found


@pytest.fixture(params=[DESK, PHONE], ids=["desk", "phone"])
def page(browser: Any, server: FakeServer, request: pytest.FixtureRequest) -> Iterator[Any]:
    """The page, whose script must say nothing to the console."""
    context = browser.new_context(viewport=request.param)
    page = context.new_page()
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    foreign: list[str] = []
    page.on("request", lambda r: r.url.startswith((server.url, "data:")) or foreign.append(r.url))
    page.set_default_timeout(15_000)
    page.goto(server.url)
    yield page
    context.close()
    assert foreign == []
    assert [text for text in said if "Failed to load resource" not in text] == []


def test_from_a_document_to_two_answers(
    page: Any, server: FakeServer, behind: CacheBlend, request: pytest.FixtureRequest
) -> None:
    drop(page, "ships.txt", SHIPS)
    assert len(behind.stored()) == 5
    assert behind.registered_documents(["ships.txt"]) == {"ships.txt"}
    page.fill("#count", "3")
    page.locator("#ratio").fill("0.3")
    assert page.inner_text("#ratio-shown") == "0.30"
    ask(page, "Where did the ship of number 2 sail?")

    full, blended = server.bodies
    assert full["prompt"] == blended["prompt"]
    assert full["kv_transfer_params"]["cacheblend"] == {"mode": "off"}
    assert full["cache_salt"]  # else vLLM's prefix cache would answer for it
    options = {"mode": "blend", "recompute_ratio": 0.3}
    assert blended["kv_transfer_params"]["cacheblend"] == options
    assert page.inner_text("#full-answer") == page.inner_text("#blend-answer") == "A short answer."
    assert page.inner_text("#full-ttft").endswith(" ms")
    assert "times" in page.inner_text("#verdict")

    [*_, report] = server.reports.values()
    found = counts(page)
    assert report["blended"]
    assert found["reused"] == report["tokens_reused"] > 0
    assert found["recomputed"] == report["tokens_recomputed"] > 0
    assert found["prefix"] == report["tokens_prefix_cached"]
    assert found["fresh"] + found["missing"] == report["tokens_fresh"]
    assert sum(found.values()) == report["tokens_total"] == int(page.inner_text("#total"))
    bar = page.eval_on_selector_all(
        "#bar span", "all => all.map(s => [s.className, +s.dataset.tokens])"
    )
    assert dict(bar) == {kind: number for kind, number in found.items() if number}
    widths = page.eval_on_selector_all("#bar span", "all => all.map(s => s.clientWidth)")
    shares = [number / report["tokens_total"] for _, number in bar]
    assert [w / sum(widths) for w in widths] == pytest.approx(shares, abs=0.02)

    kinds = page.eval_on_selector_all("#prompt li", "all => all.map(li => li.className)")
    assert [k for k in kinds if k != "fresh"] == ["reused"] * 4  # the chat's head, three chunks
    texts = page.eval_on_selector_all("#prompt .text", "all => all.map(s => s.textContent)")
    assert "".join(texts) == behind.tokenizer.decode(full["prompt"])


def test_what_is_left_is_stopped(page: Any, server: FakeServer) -> None:
    server.pause_s = 0.5
    page.fill("#question", "Where?")
    page.click("#send")
    page.wait_for_selector("#full-answer:has-text('A')")
    page.click("#stop")
    page.wait_for_selector("#send:enabled")
    assert len(server.bodies) == 1
    assert not page.is_visible("#alert")
    server.job_s = 30
    choose(page, "a.txt", SHIPS)
    page.click("#stop-ingestion")
    page.wait_for_selector("#files:enabled")
    assert len(server.jobs) == 1
    assert server.count("POST", "/cancel") == 1
    assert page.query_selector("#documents li") is None


def test_a_key_is_asked_for_and_sent(page: Any, server: FakeServer) -> None:
    server.api_key = "secret-1"
    page.click("#refresh")
    page.wait_for_selector("#alert:has-text('API key')")
    assert page.evaluate("document.activeElement.id") == "key"
    page.keyboard.type("secret-1")
    page.keyboard.press("Enter")
    page.wait_for_selector("#alert", state="hidden")
    ask(page, "Where?")
    assert "secret" not in page.url
    assert page.evaluate("document.cookie + JSON.stringify(localStorage)") == "{}"


def test_what_goes_wrong_is_said(page: Any, server: FakeServer) -> None:
    server.next("/completions", Fault(500, {"error": {"message": "the GPU is on fire"}}))
    page.fill("#question", "Where?")
    page.click("#send")
    page.wait_for_selector("#alert:has-text('on fire')")
    assert page.get_attribute("#alert", "role") == "alert"
    server.fail_job = {"code": "ingestion_failed", "message": "the disk is full"}
    choose(page, "a.txt", SHIPS)
    page.wait_for_selector("#alert:has-text('a.txt: the disk is full')")
    choose(page, "b.txt", " \n")
    page.wait_for_selector("#alert:has-text('b.txt has no text')")


def test_answers_and_names_are_text_and_no_markup(
    page: Any, server: FakeServer, behind: CacheBlend
) -> None:
    engine: Any = behind.engine
    bad = "<img src=x onerror=\"document.title='bad'\">"
    engine.answers += [bad, bad]
    drop(page, "<b>x</b>.txt", SHIPS + bad)
    ask(page, "Where?")
    assert page.inner_text("#full-answer") == bad
    assert page.query_selector("main img, main b") is None
    assert page.title() != "bad"


def test_everything_is_reached_by_keyboard_in_order(page: Any) -> None:
    wanted = ["question", "files", "question", "ratio", "count", "tokens", "send"]
    reached = []
    for _ in wanted:
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id || 'question'"))
    assert reached == wanted
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"
    page.focus("#ratio")
    page.keyboard.press("ArrowRight")
    assert page.inner_text("#ratio-shown") == "0.20"


def test_everything_has_a_name_and_news_are_announced(page: Any) -> None:
    unnamed = page.evaluate(
        """() => [...document.querySelectorAll('input, textarea, button, progress')]
          .filter((e) => !e.labels?.length && !e.ariaLabel && !e.textContent.trim())
          .map((e) => e.outerHTML)"""
    )
    assert unnamed == []
    for id in ("ingestion", "progress-of-answers", "verdict"):
        assert page.get_attribute(f"#{id}", "role") == "status"
    levels = page.eval_on_selector_all("h1,h2,h3", "all => all.map(h => +h.tagName[1])")
    assert levels[0] == 1
    assert all(b - a <= 1 for a, b in pairwise(levels))
    assert page.evaluate("document.documentElement.lang") == "en"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast_and_width(page: Any, server: FakeServer, scheme: str) -> None:
    page.emulate_media(color_scheme=scheme)
    drop(page, "ships.txt", SHIPS)
    ask(page, "Where did the ship of number 2 sail?")
    least, where = page.evaluate(CONTRAST)
    assert least >= 4.5, where
    too_wide = "document.documentElement.scrollWidth > document.documentElement.clientWidth"
    assert not page.evaluate(too_wide)


def test_colours_differ_and_text_on_each_can_be_read(page: Any) -> None:
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        page.evaluate(
            """() => document.getElementById('prompt').replaceChildren(...[
              'prefix', 'reused', 'recomputed', 'fresh', 'missing', 'other'].map((kind) => {
                const li = document.createElement('li');
                [li.className, li.textContent] = [kind, kind];
                return li;
            }))"""
        )
        least, where = page.evaluate(CONTRAST)
        assert least >= 4.5, (scheme, where)
        colours = page.eval_on_selector_all(
            "#prompt li", "all => all.map(li => getComputedStyle(li).backgroundColor)"
        )
        assert len(set(colours)) == 6


def test_the_page_runs_nothing_that_it_was_not_shipped_with(server: FakeServer) -> None:
    for path in ("/", *PATHS):
        response = httpx.get(server.url + path)
        assert response.status_code == 200
        assert "default-src 'none'" in response.headers["content-security-policy"]
        assert response.headers["x-content-type-options"] == "nosniff"
    assert httpx.get(server.url + "/page/__init__.py").status_code == 404
    for file in ("index.html", "page.css", "page.js"):
        text = (PAGE / file).read_text()
        assert "://" not in text
        assert "innerHTML" not in text


def test_where_there_are_tenants_the_page_is_still_there(tmp_path: Path) -> None:
    """It says nothing of anybody; what it asks for needs a key."""

    async def unasked(namespace: str) -> str:
        raise AssertionError(namespace)

    keys = tmp_path / "tenants.toml"
    keys.write_text('"sk-red" = "red"\n')
    app = FastAPI()
    app.include_router(page_router())
    app.get("/v1/cacheblend")(lambda: {})
    who = Who(KeyFile(str(keys)), None)
    app.add_middleware(TenantMiddleware, who=who, ensure=unasked, max_body=100)
    client = TestClient(app)
    assert [client.get(path).status_code for path in ("/", *PATHS)] == [200, 200, 200]
    assert client.get("/v1/cacheblend").status_code == 401
    assert client.get("/page/other.js").status_code == 401
