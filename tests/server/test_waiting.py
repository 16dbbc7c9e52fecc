"""Clients that wait for the end of an ingestion."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from cacheblend_rag import BlendConfig
from cacheblend_rag.server.jobs import Jobs
from cacheblend_rag.server.options import ServerOptions
from cacheblend_rag.server.routes import add_to

BODY = {"chunks": ["a text"], "wait": True}


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Any]:
    """Whose jobs nobody runs."""
    jobs = Jobs(tmp_path / "jobs.sqlite", 1000)
    front = SimpleNamespace(config=BlendConfig())
    yield SimpleNamespace(
        options=ServerOptions(),
        jobs=jobs,
        front_of=lambda tenant: front,
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
