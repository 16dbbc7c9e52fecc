"""A real ``cacheblend serve``, its clients as the documentation shows them, and its page."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import io
import itertools
import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from browser import DESK, ask, chromium, counts, drop
from live_server import LiveServer, live_server
from pair import FACTS

from cacheblend_rag import CacheBlend, PromptTooLongError, ServerError
from cacheblend_rag.server.tenants import KeyFile

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(400)]

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "clients.md").read_text()
SERVING = (ROOT / "docs" / "serving.md").read_text()
THERE = "http://localhost:8000"
NAMES = ("curl", "OpenAI's package", "LangChain's own class", "LlamaIndex's own class", "Haystack")
SETTING = "In Python"  # what the sections behind it use
OURS = ("Python", "Our classes for LlamaIndex and LangChain")
CHUNKS = [fact.format(1874 + i) * 5 for i, fact in enumerate(FACTS)]
PROMPT = "\n\n".join([*CHUNKS, "When was the bell cast?"])
MESSAGES = [{"role": "user", "content": PROMPT}]
EXACT = {"max_tokens": 8, "temperature": 0.0, "blend_if": "always"}


@pytest.fixture(scope="module")
def server(embedded: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """SmolLM2-135M-Instruct on the CPU; the document's chunks are ingested."""
    folder = tmp_path_factory.mktemp("live")
    options = ["--dtype", "float32", "--max-model-len", "2048", "--page"]
    options += ["--store", str(folder / "kv"), "--served-model-name", "smollm2"]
    threads = str(max(1, min(4, os.cpu_count() or 1)))
    environment = {"OMP_NUM_THREADS": threads, "VLLM_WORKER_MULTIPROC_METHOD": "fork"}
    with live_server(embedded, folder, options, environment) as found:
        yield found


@pytest.fixture(scope="module")
def remote(server: LiveServer) -> Iterator[CacheBlend]:
    with CacheBlend.connect(server.url) as blend:
        report = blend.ingest(CHUNKS, documents=[f"fact {i}" for i in range(6)], progress=False)
        assert report.computed == 6
        yield blend


# ---- the front door ------------------------------------------------------------------------------


def test_blended_answers(remote: CacheBlend) -> None:
    chunks = sum(len(remote.tokenizer.encode(c.strip(), add_special_tokens=False)) for c in CHUNKS)
    off = remote.generate(MESSAGES, mode="off", **EXACT)
    blended = remote.generate(MESSAGES, **EXACT)
    again_off = remote.generate(MESSAGES, mode="off", **EXACT)
    exact = remote.generate(MESSAGES, recompute_ratio=1.0, **EXACT)
    assert off.token_ids == again_off.token_ids == exact.token_ids
    assert (off.report.reason, blended.report.blended) == ("mode", True)
    parts = ("reused", "recomputed", "fresh", "prefix_cached")
    for result in (off, blended, exact):
        report = result.report
        assert sum(getattr(report, f"tokens_{p}") for p in parts) == report.tokens_total
        assert report.tokens_total == len(result.prompt_token_ids)
        assert 0 < report.ttft_s <= report.total_s
    got = blended.report
    assert got.tokens_reused + got.tokens_recomputed >= 0.99 * chunks
    assert got.segments[-1].end == got.tokens_total


async def test_streams_and_log_probabilities(remote: CacheBlend) -> None:
    options = {**EXACT, "mode": "off", "logprobs": 2}
    whole = remote.generate(PROMPT, **options)
    stream = remote.astream(PROMPT, **options)
    text = "".join([piece async for piece in stream])
    assert (text, stream.result.token_ids) == (whole.text, whole.token_ids)
    assert whole.logprobs is not None
    for token, row in zip(whole.token_ids, whole.logprobs, strict=True):
        assert row[token] == max(row.values())
        assert len(row) == 2
    stopped = remote.generate(PROMPT, stop=[whole.text.split()[1]], **options)
    assert (stopped.finish_reason, stopped.stop_reason) == ("stop", whole.text.split()[1])
    with pytest.raises(PromptTooLongError):
        remote.generate("word " * 3000)


def running(server: LiveServer) -> float:
    text = httpx.get(server.url + "/metrics").text
    found = re.findall(r"^vllm:num_requests_(?:running|waiting)\{.*\} (\S+)$", text, re.MULTILINE)
    return sum(map(float, found))


def test_leaving_an_answer_ends_the_request(remote: CacheBlend, server: LiveServer) -> None:
    with remote.stream(PROMPT, max_tokens=1500, ignore_eos=True) as stream:
        next(stream)
        assert running(server) == 1

    async def leave() -> None:
        async with remote.astream(PROMPT, max_tokens=1500, ignore_eos=True) as stream:
            await anext(stream)

    asyncio.run(leave())
    until = time.monotonic() + 10
    while running(server) and time.monotonic() < until:
        time.sleep(0.05)
    assert running(server) == 0


def test_chunks_come_and_go(remote: CacheBlend) -> None:
    text = "The harbour master keeps a list of all boats, and of those who owe him money. " * 4
    before = remote.stored()
    report = remote.ingest([text, text, "short"], documents=["list"] * 3, progress=False)
    assert (report.computed, report.repeated, report.too_short) == (1, 1, 1)
    assert remote.stored() - before == {remote.key(text)}
    assert remote.registered_documents(["list", "no such"]) == {"list"}
    remote.prefetch([text])
    assert remote.forget_documents(["list"]) == 1
    assert remote.stored() == before
    assert remote.stats()[0]["chunks"] >= 6


def test_a_plain_clients_errors(remote: CacheBlend, server: LiveServer) -> None:
    with pytest.raises(ServerError, match="no server answers"):
        CacheBlend.connect("http://127.0.0.1:9")
    with pytest.raises(Exception, match="temperature"):
        remote.generate(PROMPT, temperature=-1.0)


# ---- as documented -------------------------------------------------------------------------------


def section(name: str) -> str:
    found = re.search(rf"^## {re.escape(name)}\n(.*?)(?=^## |\Z)", PAGE, re.S | re.M)
    assert found
    return found[1]


def blocks(name: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", section(name), re.S | re.M)


def test_every_section_with_code_is_run() -> None:
    titles = re.findall(r"^## (.*)$", PAGE, re.MULTILINE)
    assert {t for t in titles if "```" in section(t)} == {*NAMES, *OURS, SETTING}


def test_curl(server: LiveServer) -> None:
    if shutil.which("curl") is None:
        pytest.skip("no curl")
    [lines] = blocks("curl", "bash")
    script = "set -e\n" + lines.replace("localhost:8000", server.url.removeprefix("http://"))
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    assert '"status":"completed"' in done.stdout
    assert '"object":"cacheblend.report"' in done.stdout
    assert re.search(r'"tokens_reused":[1-9]', done.stdout)


def test_the_serving_page(server: LiveServer, remote: CacheBlend, tmp_path: Path) -> None:
    """Its blocks but for those that start a server, which tests/unit/test_docs.py looks at."""
    openai = pytest.importorskip("openai")
    found = re.findall(r"(needs a hub -->\n)?^```(\w+)\n(.*?)^```", SERVING, re.S | re.M)
    own = [(kind, text) for hub, kind, text in found if not hub and "cacheblend serve" not in text]
    assert sorted(kind for kind, _ in own) == ["bash", "json", "python", "toml"]
    block = dict(own)
    if shutil.which("curl") is not None:
        lines = block["bash"].replace("localhost:8000", server.url.removeprefix("http://"))
        script = ["bash", "-ec", lines]
        done = subprocess.run(script, capture_output=True, text=True, check=True)
        for part in ('"status":"completed"', '"choices"', '"blending"'):
            assert part in done.stdout
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
        scope = {"client": client, "model": "smollm2", "messages": MESSAGES}
        exec(compile(block["python"], "serving.md", "exec"), scope)
    body = {"chunks": [CHUNKS[0]], "wait": True}
    job = httpx.post(f"{server.url}/v1/cacheblend/ingestions", json=body, timeout=60).json()
    shown = json.loads(block["json"])
    assert shown.keys() <= job.keys() and shown["counts"].keys() == job["counts"].keys()
    keys = tmp_path / "keys.toml"
    keys.write_text(block["toml"])
    assert KeyFile(str(keys)).of("sk-of-the-red-team") == "red"


MODULES = {
    "OpenAI's package": "openai",
    "LangChain's own class": "langchain_openai",
    "LlamaIndex's own class": "llama_index.llms.openai_like",
    "Haystack": "haystack",
}


def unasked() -> str:
    """A prompt with chunks in another order: one that was asked is in vLLM's prefix cache."""
    order = next(_orders)
    return "\n\n".join([*(CHUNKS[i] for i in order), "When was the bell cast?"])


_orders = itertools.islice(itertools.permutations(range(6)), 1, None)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", [*MODULES, *OURS])
def test_examples(
    name: str, server: LiveServer, remote: CacheBlend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HAYSTACK_TELEMETRY_ENABLED", "False")
    if name in MODULES:
        if importlib.util.find_spec(MODULES[name].partition(".")[0]) is None:
            pytest.skip(f"needs the dependency group clients: {MODULES[name]}")
        pytest.importorskip(MODULES[name], reason="needs the dependency group clients")
    scope: dict[str, Any] = {}
    [setting] = blocks(SETTING, "python")
    exec(setting, scope)
    assert scope["model"] == "smollm2-135m-instruct", "what the command calls the embedded model"
    assert all(chunk in scope["prompt"] for chunk in scope["chunks"])
    scope |= {"chunks": CHUNKS, "model": "smollm2"}
    shown = io.StringIO()
    for code in blocks(name, "python"):
        scope["prompt"] = unasked()
        with contextlib.redirect_stdout(shown):
            exec(compile(code.replace(THERE, server.url), f"clients.md, {name}", "exec"), scope)
    assert len(shown.getvalue().split()) > 1
    if name == "OpenAI's package":
        found = re.search(r"^(\d+) of (\d+) prompt tokens", shown.getvalue(), re.MULTILINE)
        assert found and int(found[1]) >= 0.9 * int(found[2])
    if name in OURS:
        counts = re.findall(r"(\d+) tokens reused", shown.getvalue())
        assert counts and "0" not in counts


def test_the_dashboard_asks_for_metrics_that_are_there(server: LiveServer) -> None:
    exposed = set(re.findall(r"^([a-z][\w:]*)", httpx.get(server.url + "/metrics").text, re.M))
    board = json.loads((ROOT / "examples/grafana.json").read_text())
    queries = [t["expr"] for panel in board["panels"] for t in panel.get("targets", ())]
    asked = {name for query in queries for name in re.findall(r"[a-z_]+:[a-z_]+", query)}
    assert len(queries) >= 8 and len(asked) >= 8
    assert asked - exposed == set()


# ---- the page ------------------------------------------------------------------------------------


def test_the_page_over_a_real_model(server: LiveServer) -> None:
    with chromium() as found:
        page = found.new_context(viewport=DESK).new_page()
        page.set_default_timeout(60_000)
        page.goto(server.url)
        drop(page, "island.txt", "\n\n".join(CHUNKS))
        page.fill("#tokens", "8")
        ask(page, "When was the bell cast?")
        assert page.inner_text("#full-answer").strip()
        assert page.inner_text("#blend-answer").strip()
        of_kind = counts(page)
        assert of_kind["reused"] > of_kind["recomputed"] > 0
        assert sum(of_kind.values()) == int(page.inner_text("#total"))
        assert "times" in page.inner_text("#verdict")
        if folder := os.environ.get("SCREENSHOTS"):
            page.screenshot(path=f"{folder}/page_1280.png", full_page=True)
            page.set_viewport_size({"width": 390, "height": 844})
            page.screenshot(path=f"{folder}/page_390.png", full_page=True)
