"""What goes wrong between client and server: each error says what to do, and tries are bounded."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from typing import Any

import httpx
import pytest
from fake_server import FakeServer, Fault
from servers import answering, free_port

from cacheblend_rag import (
    CacheBlend,
    CacheBlendError,
    ConfigError,
    EmptyTextError,
    PromptError,
    PromptTooLongError,
    ServerError,
    StoreError,
)
from cacheblend_rag.client.events import EventDecoder
from cacheblend_rag.client.failures import (
    LONGEST_WAIT_S,
    RETRIES,
    pause,
    refusal,
    reported_error,
    retry_after,
)
from cacheblend_rag.client.http import base_url
from cacheblend_rag.errors import UnavailableError

URL = "http://host:8000"
FAILURES = {
    "refused": httpx.ConnectError("refused"),
    "slow to connect": httpx.ConnectTimeout("slow"),
    "broken": httpx.RemoteProtocolError("hung up"),
    "reset": httpx.ReadError("reset"),
    "silent": httpx.ReadTimeout("silent"),
    **{str(n): httpx.Response(n) for n in (400, 401, 404, 409, 429, 500, 502, 503, 504)},
}
NEVER_DONE = {"refused", "slow to connect", "429"}
MAYBE_DONE = {"broken", "reset", "502", "503", "504"}


# ---- decisions -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAILURES)
def test_what_is_tried_again(name: str) -> None:
    """What was not done always is; what may have been done, where doing it twice does no harm."""
    failed: Any = FAILURES[name]
    assert (pause(0, failed, safe=False) is not None) == (name in NEVER_DONE)
    assert (pause(0, failed, safe=True) is not None) == (name in NEVER_DONE | MAYBE_DONE)
    assert pause(RETRIES, failed, safe=True) is None


def test_waits_grow_and_a_servers_wish_is_honoured() -> None:
    broken = httpx.ReadError("reset")
    first, second = pause(0, broken, True), pause(1, broken, True)
    assert first is not None
    assert second is not None
    assert 0.1 < first < second < 2
    asked = httpx.Response(429, headers={"retry-after": "7"})
    assert pause(0, asked, False) == 7
    asked = httpx.Response(429, headers={"retry-after": str(int(LONGEST_WAIT_S) + 1)})
    assert pause(0, asked, False) is None  # the caller hears of it at once


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        (None, None),
        ("3", 3),
        ("Thu, 01 Jan 1970 00:01:40 GMT", 40),
        ("Thu, 01 Jan 1970 00:00:00 GMT", 0),
        ("soon", None),
        ("-1", None),
    ],
)
def test_retry_after(header: str | None, seconds: float | None) -> None:
    assert retry_after(header, now=60) == seconds


def said(status: int, body: Any, path: str = "/v1/completions") -> CacheBlendError:
    text = body if isinstance(body, str) else json.dumps(body)
    return refusal(httpx.Response(status, text=text), URL, path, has_key=False)


def openai(message: str = "no", param: str | None = None, code: str | int = 400) -> Any:
    return {"error": {"message": message, "param": param, "type": "APIError", "code": code}}


@pytest.mark.parametrize(
    ("status", "body", "kind", "words"),
    [
        (400, openai("a bad value", "temperature"), ConfigError, "a bad value"),
        (400, openai("empty", "prompt"), PromptError, "empty"),
        (400, openai("empty", "chunks[2].text"), PromptError, "empty"),
        (
            400,
            openai("This model's maximum context length is 8"),
            PromptTooLongError,
            "length is 8",
        ),
        (400, openai("no words", code="empty_text"), EmptyTextError, "no words"),
        (400, openai("odd", code="of_another_version"), ConfigError, "odd"),
        (400, {"detail": "fastapi's"}, ConfigError, "fastapi's"),
        (401, {"error": "Unauthorized"}, ConfigError, "Pass one of its keys as api_key"),
        (403, openai("not served to tenants"), ConfigError, "not served to tenants"),
        (404, openai("no model x"), ServerError, "no model x"),
        (409, openai("it has ended"), ServerError, "it has ended"),
        (413, "", PromptError, "Entity Too Large"),
        (429, openai("queue full"), ServerError, "busy.*queue full"),
        (500, "<html>oops</html>", ServerError, "oops"),
        (503, "", ServerError, "Service Unavailable"),
        (307, "", ServerError, "redirects"),
        (400, "[]", ConfigError, r"\[\]"),
    ],
)
def test_refusals(status: int, body: Any, kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words) as raised:
        raise said(status, body)
    assert type(raised.value) is kind


def test_refusals_of_our_endpoints() -> None:
    plain = said(404, {"detail": "Not Found"}, "/v1/cacheblend")
    assert isinstance(plain, ServerError)
    assert "cacheblend serve MODEL" in str(plain)
    assert type(said(503, openai("the disk is gone"), "/v1/cacheblend/chunks")) is UnavailableError


def test_errors_within_a_stream() -> None:
    assert type(reported_error({"message": "x", "code": 400}, URL)) is ConfigError
    assert type(reported_error({"message": "x", "code": 500}, URL)) is ServerError
    assert type(reported_error({"message": "x", "code": "ingestion_failed"}, URL)) is StoreError
    assert "no reason" in str(reported_error({}, URL))


@pytest.mark.parametrize("given", ["http://h:1", "http://h:1/", "http://h:1/v1", "http://h:1/v1/"])
def test_urls_with_and_without_v1_are_the_same(given: str) -> None:
    assert base_url(given) == "http://h:1"
    assert base_url(given.replace(":1", ":1/behind/a/proxy")) == "http://h:1/behind/a/proxy"


@pytest.mark.parametrize(
    "given",
    ["localhost:8000", "", "ftp://h", "http://", "http://a:b@h", "http://h?x=1", 7, "http://h:x"],
)
def test_what_is_no_url_of_a_server(given: Any) -> None:
    with pytest.raises(ConfigError, match=r"http://localhost:8000|api_key"):
        CacheBlend.connect(given)


@pytest.mark.parametrize("timeout", [0, -1, "1", None, True, float("inf"), float("nan")])
def test_what_is_no_timeout(timeout: Any) -> None:
    with pytest.raises(ConfigError, match="timeout"):
        CacheBlend.connect(URL, timeout=timeout)


def test_events_come_whole_wherever_bytes_are_cut() -> None:
    events = [{"id": "1", "text": "é\u2028\x85\n"}, {"id": "2"}]
    lines = [f"data: {json.dumps(e, ensure_ascii=False)}\r\n\r\n" for e in events]
    data = (": a comment\n\n" + "".join(lines) + "data: [DONE]\n\n").encode()
    for size in range(1, 30):
        decoder = EventDecoder()
        parts = [data[i : i + size] for i in range(0, len(data), size)]
        assert [event for part in parts for event in decoder.feed(part)] == events


# ---- against a server ----------------------------------------------------------------------------


def test_nobody_answers() -> None:
    with pytest.raises(ServerError, match=r"no server answers.*cacheblend serve MODEL"):
        CacheBlend.connect(f"http://127.0.0.1:{free_port()}")


def test_a_plain_vllm(server: FakeServer) -> None:
    server.is_plain_vllm = True
    with pytest.raises(ServerError, match=r"plain vLLM.*cacheblend serve MODEL"):
        CacheBlend.connect(server.url)


def test_something_else_answers() -> None:
    page = b"HTTP/1.1 200 OK\r\ncontent-length: 6\r\n\r\n<html>"
    with answering(page) as port, pytest.raises(ServerError, match="no JSON"):
        CacheBlend.connect(f"http://127.0.0.1:{port}")


def test_keys(server: FakeServer) -> None:
    server.api_key = "secret-1"
    with pytest.raises(ConfigError, match="without an API key"):
        CacheBlend.connect(server.url)
    with pytest.raises(ConfigError, match="the API key that was given") as raised:
        CacheBlend.connect(server.url, api_key="secret-2")
    assert "secret" not in str(raised.value)
    with CacheBlend.connect(server.url, api_key="secret-1") as remote:
        assert remote.generate("a").text
        assert asyncio.run(remote.agenerate("a")).text


@pytest.mark.parametrize("path", ["/v1/cacheblend", "/tokenize", "/completions"])
def test_a_busy_server_is_asked_again(remote: CacheBlend, server: FakeServer, path: str) -> None:
    busy = Fault(429, headers={"retry-after": "1"})
    server.next(path, busy)
    start = time.monotonic()
    remote.stats()
    remote.generate("a")
    assert 1 <= time.monotonic() - start < 3


async def test_a_busy_server_is_asked_again_by_an_event_loop(
    remote: CacheBlend, server: FakeServer
) -> None:
    server.next("/completions", Fault(429), Fault(429))
    assert (await remote.agenerate("a")).text
    server.next("/completions", *[Fault(429)] * 3)
    with pytest.raises(ServerError, match="busy"):
        await remote.agenerate("a")


def test_tries_are_bounded(remote: CacheBlend, server: FakeServer) -> None:
    server.next("/v1/cacheblend", *[Fault(503)] * 9)
    with pytest.raises(UnavailableError):
        remote.stats()
    assert server.count("GET", "/v1/cacheblend") == 1 + RETRIES


def test_an_answer_that_failed_is_not_asked_for_again(
    remote: CacheBlend, server: FakeServer
) -> None:
    server.next("/completions", Fault(503))
    with pytest.raises(ServerError):
        remote.generate("a")
    assert server.count("POST", "/completions") == 1


def test_what_was_forgotten_is_not_forgotten_twice(remote: CacheBlend, server: FakeServer) -> None:
    """The count of the second time would be wrong."""
    server.next("/chunks/delete", Fault(503))
    with pytest.raises(UnavailableError):
        remote.forget_keys(["f" * 64])
    assert server.count("POST", "/chunks/delete") == 1


def test_a_connection_that_breaks(remote: CacheBlend, server: FakeServer) -> None:
    server.next("/v1/cacheblend", Fault(hangs_up=True))
    assert remote.stats()  # asked for again
    server.next("/completions", Fault(200, hangs_up=True))
    with pytest.raises(ServerError, match=r"broke|without saying why"):
        remote.generate("a")


def test_a_server_that_says_nothing(server: FakeServer) -> None:
    with CacheBlend.connect(server.url, timeout=0.3) as remote:
        server.next("/completions", Fault(delay_s=1), Fault(delay_s=1))
        with pytest.raises(ServerError, match=r"said nothing for 0.3 s.*longer timeout"):
            remote.generate("a")
        with pytest.raises(ServerError, match=r"said nothing for 0.3 s"):
            asyncio.run(remote.agenerate("a"))


def test_an_error_within_a_stream(
    remote: CacheBlend, server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def failing(*_: Any) -> Any:
        yield f"data: {json.dumps({'error': {'message': 'the GPU is on fire', 'code': 500}})}\n\n"

    monkeypatch.setattr("fake_server._answer", failing)
    with pytest.raises(ServerError, match="on fire"):
        remote.generate("a")


def test_neither_vllm_nor_torch_is_needed(server: FakeServer) -> None:
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['vllm', 'torch', 'transformers']))\n"
        "from cacheblend_rag import CacheBlend\n"
        "with CacheBlend.connect(sys.argv[1]) as blend:\n"
        "    print(blend.generate([{'role': 'user', 'content': 'Hi'}]).text)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, server.url], capture_output=True, text=True, check=True
    )
    assert done.stdout == "A short answer.\n"
