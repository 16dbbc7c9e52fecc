"""What the endpoints do holds up no answer."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from hypothesis import given
from hypothesis import strategies as st

from cacheblend_rag.server import calls, pieces, plugin, routes
from cacheblend_rag.server.calls import Calls
from cacheblend_rag.server.options import ServerOptions
from cacheblend_rag.server.plugin import CacheBlendEndpoints
from cacheblend_rag.server.routes import add_to
from cacheblend_rag.server.tenants import TenantMiddleware, Who

TENANT = {"X-Tenant": "one"}


class Service:
    """Its front is one for all, and does what a test has it do."""

    def __init__(self) -> None:
        self.options = ServerOptions(tenant_header="X-Tenant")
        self.front: Any = SimpleNamespace()
        self.opens = threading.Event()
        self.opens.set()
        self.opened = set[str]()

    def found(self, namespace: str) -> Any:
        return self.front if namespace in self.opened else None

    def front_of(self, namespace: str) -> Any:
        assert self.opens.wait(20)
        self.opened.add(namespace)
        return self.front

    def space_of(self, namespace: str) -> str:
        return f"space of {namespace}"


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Service:
    for module in (routes, plugin):
        monkeypatch.setattr(module, "STORE", Calls("the store", 3, 32))
    return Service()


@pytest.fixture
async def ask(service: Service) -> AsyncIterator[httpx.AsyncClient]:
    """A server with tenants; few threads are shared by all."""
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(2))
    app, endpoints = FastAPI(), CacheBlendEndpoints()
    app.state.cacheblend = endpoints._service = service  # type: ignore[assignment]
    add_to(app)

    async def answers(request: Request) -> Any:
        return (await request.json())["cache_salt"]

    app.add_api_route("/v1/completions", answers, methods=["POST"])
    app.add_middleware(
        TenantMiddleware,
        who=Who(None, "X-Tenant"),
        ensure=endpoints._ensure,
        max_body=1 << 30,
    )
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://s") as client:
        yield client


def test_there_are_more_calls_than_threads() -> None:
    assert calls.STORE is not calls.OWN
    for own in (calls.STORE, calls.OWN):
        assert own._pool._count < own._room._value


@pytest.mark.parametrize("hangs", ["state", "opening"])
async def test_a_store_that_hangs_holds_up_no_answer(
    ask: httpx.AsyncClient, service: Service, hangs: str
) -> None:
    over = threading.Event()

    def state() -> dict[str, Any]:
        assert over.wait(20)
        return {"object": "cacheblend.state"}

    service.front.state = state
    service.opened.add("one")
    if hangs == "opening":
        service.opens, over = over, threading.Event()
        over.set()
    names = ["one" if hangs == "state" else f"new {i}" for i in range(40)]
    waiting = [
        asyncio.ensure_future(ask.get("/v1/cacheblend", headers={"X-Tenant": name}))
        for name in names
    ]
    await asyncio.sleep(0.2)
    body = {"prompt": "p"}
    answer = await asyncio.wait_for(ask.post("/v1/completions", json=body, headers=TENANT), 5)
    assert answer.status_code == 200 and answer.json()
    refused = [call.result() for call in waiting if call.done()]
    assert len(refused) == 40 - 32
    for call in refused:
        assert call.status_code == 503 and call.headers["Retry-After"] == "1"
        assert call.json()["error"]["code"] == "busy"
    over.set()
    service.opens.set()
    done = await asyncio.wait_for(asyncio.gather(*waiting), 20)
    assert [call.status_code for call in done].count(200) == 32
    assert (await ask.get("/v1/cacheblend", headers=TENANT)).status_code == 200, "there is room"


async def test_a_tenant_that_is_being_opened_takes_one_thread(
    ask: httpx.AsyncClient, service: Service
) -> None:
    """However many of its requests wait, and though the first of them left."""
    service.front.state = lambda: {"object": "cacheblend.state"}
    service.opened.add("one")
    service.opens.clear()
    headers, body = {"X-Tenant": "new"}, {"prompt": "p"}
    first, *waiting = (
        asyncio.ensure_future(call)
        for _ in range(20)  # two calls each, of 3 threads and 32 places
        for call in (
            ask.get("/v1/cacheblend", headers=headers),
            ask.post("/v1/completions", json=body, headers=headers),
        )
    )
    await asyncio.sleep(0.2)
    first.cancel()
    answer = await asyncio.wait_for(ask.get("/v1/cacheblend", headers=TENANT), 5)
    assert answer.status_code == 200 and not any(call.done() for call in waiting)
    service.opens.set()
    done = await asyncio.wait_for(asyncio.gather(*waiting), 20)
    assert {call.status_code for call in done} == {200}


async def test_one_call_for_all_fails_for_all_and_is_then_done_anew() -> None:
    over, few, asked = threading.Event(), Calls("the store", 1, 1), list[str]()

    def opens(name: str) -> str:
        asked.append(name)
        assert over.wait(20)
        if len(asked) == 1:
            raise OSError("away")
        return name

    both = [asyncio.ensure_future(few.do_once(opens, "a")) for _ in range(2)]
    await asyncio.sleep(0.05)
    over.set()
    failed = await asyncio.gather(*both, return_exceptions=True)
    assert [str(error) for error in failed] == ["away"] * 2
    assert await few.do_once(opens, "a") == "a" and asked == ["a", "a"]


async def test_who_leaves_makes_room() -> None:
    over, few = threading.Event(), Calls("the store", 1, 2)
    both = [asyncio.ensure_future(few.do(over.wait, 20)) for _ in range(2)]
    await asyncio.sleep(0.05)
    both[1].cancel()
    await asyncio.sleep(0)
    third = asyncio.ensure_future(few.do(over.wait, 20))
    await asyncio.sleep(0.05)
    assert not third.done()
    over.set()
    assert await both[0] and await third


# ---- large answers -------------------------------------------------------------------------------

SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
SCALARS = SCALARS.filter(lambda value: value not in (float("inf"), float("-inf")))
VALUES = st.recursive(
    SCALARS, lambda some: st.lists(some) | st.dictionaries(st.text(), some), max_leaves=30
)


@given(body=st.dictionaries(st.text(), VALUES), rows=st.integers(1, 4))
def test_an_answer_is_written_as_starlette_writes_it(body: dict[str, Any], rows: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "_ROWS", rows)
        assert asyncio.run(pieces.written(body)) == JSONResponse(body).body


async def test_a_large_answer_leaves_turns_to_streams(
    ask: httpx.AsyncClient, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    count, longest, beats = 50_000, 0, 0
    rows = [{"object": "cacheblend.chunk", "id": f"{i:064x}", "stored": True} for i in range(count)]
    encode = json.JSONEncoder.encode

    def noted(self: json.JSONEncoder, value: object) -> str:
        nonlocal longest
        longest = max(longest, len(text := encode(self, value)))
        return text

    async def stream() -> None:
        nonlocal beats
        while True:
            await asyncio.sleep(0)
            beats += written_from is not None

    written_from: float | None = None

    def described(texts: object) -> list[dict[str, Any]]:
        nonlocal written_from
        written_from = time.monotonic()
        return rows

    service.front.described = described
    service.opened.add("one")
    beside = asyncio.ensure_future(stream())
    body = {"texts": ["a"]}
    with monkeypatch.context() as patch:
        patch.setattr(json.JSONEncoder, "encode", noted)
        answer = await ask.post("/v1/cacheblend/chunks/keys", json=body, headers=TENANT)
    beside.cancel()
    assert answer.json()["data"] == rows
    assert beats >= count / 1000 and longest < 200_000, "of some megabytes"
