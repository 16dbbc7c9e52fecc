"""Clients that wait for the end of an ingestion."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from cacheblend_rag import BlendConfig, CacheBlend
from cacheblend_rag.errors import StoreError
from cacheblend_rag.server import front, routes
from cacheblend_rag.server.bodies import Given
from cacheblend_rag.server.calls import Calls
from cacheblend_rag.server.front import Front
from cacheblend_rag.server.jobs import Jobs
from cacheblend_rag.server.options import ServerOptions
from cacheblend_rag.server.routes import add_to

BODY = {"chunks": ["a text"], "wait": True}


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Any]:
    """Whose jobs nobody runs."""
    jobs = Jobs(tmp_path / "jobs.sqlite", 1000)
    of_all = SimpleNamespace(
        config=BlendConfig(),
        check_ids=lambda chunks: None,
        document=lambda name: name,
        registered_documents=lambda names: {"d"},
        forget_documents=lambda names, only=None: 1,
    )
    yield SimpleNamespace(
        options=ServerOptions(),
        jobs=jobs,
        found=lambda tenant: of_all,
        runner=SimpleNamespace(wake=lambda: None),
        engine=SimpleNamespace(is_dead=False),
    )
    jobs.close()


@pytest.fixture
def app(service: Any) -> FastAPI:
    made = FastAPI()
    add_to(made)
    made.state.cacheblend = service
    return made


async def test_the_end_of_the_server_is_not_held_up(app: FastAPI, service: Any) -> None:
    """The client gets the job, which goes on another time."""
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://s") as client:
        waiting = asyncio.ensure_future(client.post("/v1/cacheblend/ingestions", json=BODY))
        await asyncio.sleep(0.2)
        assert not waiting.done()
        service.engine.is_dead = True
        answer = await asyncio.wait_for(waiting, 5)
    assert answer.status_code == 202 and answer.json()["status"] == "queued"
    assert service.jobs.get("", answer.json()["id"]).id == answer.json()["id"]


async def test_a_job_that_was_made_is_not_answered_by_a_refusal(
    app: FastAPI, service: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or its client would make another one."""
    few = Calls("this server's own work", 1, 1)
    monkeypatch.setattr(routes, "OWN", few)
    over = threading.Event()
    service.runner.wake = lambda: few._begin(over.wait, 20)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://s") as client:
        path = "/v1/cacheblend/ingestions"
        answer = await client.post(path, json={**BODY, "wait": False})
        assert answer.status_code == 202 and answer.json()["status"] == "queued"
        assert (await client.get(path)).json()["error"]["code"] == "busy"
        over.set()
        while few._room._value < 1:
            await asyncio.sleep(0.01)
        over.clear()
        waiting = asyncio.ensure_future(client.post(path, json=BODY))
        await asyncio.sleep(0.3)
        assert not waiting.done()
        for _ in range(2):
            job, _ = service.jobs.begin()
            job.done.place = 1
            service.jobs.progress(job, ["key"], 0)
            service.jobs.end(job, "completed")
        over.set()
        answer = await asyncio.wait_for(waiting, 5)
    assert answer.status_code == 200 and answer.json()["keys"] == ["key"]
    assert len(service.jobs.page("", None, 9, "asc")) == 2


async def test_nothing_waits_for_a_client_that_left(app: FastAPI, service: Any) -> None:
    left = asyncio.Event()
    messages = [{"type": "http.request", "body": b'{"chunks": ["a text"], "wait": true}'}]

    async def receive() -> Any:
        if messages:
            return messages.pop()
        await left.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        pass

    path = "/v1/cacheblend/ingestions"
    scope = {"type": "http", "method": "POST", "path": path, "query_string": b"", "headers": []}
    waiting = asyncio.ensure_future(app({**scope, "app": app}, receive, send))
    await asyncio.sleep(0.2)
    assert not waiting.done()
    left.set()
    await asyncio.wait_for(waiting, 5)
    [job] = service.jobs.page("", None, 9, "asc")
    assert job.status == "queued", "it goes on without"


@pytest.mark.parametrize("all_at_once", [False, True], ids=["one", "several"])
async def test_a_deletion_waits_for_what_is_being_stored(
    app: FastAPI, service: Any, all_at_once: bool
) -> None:
    """Of other documents too: nobody knows whose the batch is that is under way."""
    chunks = [Given("a text", document="e"), Given("another", document="d")]
    service.jobs.create("", chunks)
    job, _ = service.jobs.begin()
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://s") as client:

        async def delete() -> httpx.Response:
            if all_at_once:
                body = {"documents": ["d"]}
                return await client.post("/v1/cacheblend/documents/delete", json=body)
            return await client.delete("/v1/cacheblend/documents/d")

        waiting = asyncio.ensure_future(delete())
        await asyncio.sleep(0.3)
        assert not waiting.done()
        assert service.jobs.deleted(job) == {"d"}
        job.done.place = 1
        service.jobs.progress(job, ["key"], 0)
        answer = await asyncio.wait_for(waiting, 5)
        assert answer.status_code == 200 and 1 in answer.json().values()
        few = {"documents": ["d"], "only": ["ab" * 32]}
        path = "/v1/cacheblend/documents/delete"
        assert (await client.post(path, json=few)).status_code == 200, "waits for nothing"


async def test_a_deletion_does_not_wait_for_ever(
    app: FastAPI, service: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(routes, "_MOST_WAIT_S", 0.1)
    service.jobs.create("", [Given("a text", document="d")])
    service.jobs.begin()
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://s") as client:
        answer = await client.delete("/v1/cacheblend/documents/d")
    assert answer.status_code == 503 and answer.headers["Retry-After"]
    assert answer.json()["error"]["code"] == "ingestion_in_progress"


def test_a_tenants_first_request_does_not_wait_for_a_large_store(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    begun, over, ended = (threading.Event() for _ in range(3))

    def listed(self: CacheBlend) -> None:
        begun.set()
        assert over.wait(10)
        ended.set()
        raise StoreError("it went away")

    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)  # vLLM turns it off
    caplog.set_level("WARNING", logger="vllm.cacheblend_rag")  # and tests have it log errors only
    monkeypatch.setattr(CacheBlend, "_list_stored", listed)
    monkeypatch.setattr(front, "_LISTS_S", 0.05)
    object.__new__(Front)._list_stored()
    assert begun.is_set() and not ended.is_set()
    over.set()
    assert ended.wait(10)
    monkeypatch.setattr(front, "_LISTS_S", 10.0)
    object.__new__(Front)._list_stored()  # no thread ends with an exception
    assert "it went away" in caplog.text
