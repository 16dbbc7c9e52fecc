"""What can be asked of a server that does not blend: its store is open, or it says that it is not.

"Nothing is there" would be wrong: a later start that blends finds it again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from cacheblend_rag import BlendConfig
from cacheblend_rag.engine import ModelCheck
from cacheblend_rag.engine.base import NO_PARSERS
from cacheblend_rag.front.documents import Documents
from cacheblend_rag.keys import KeySpace
from cacheblend_rag.planner import Space
from cacheblend_rag.process import Home
from cacheblend_rag.reason import Reason
from cacheblend_rag.server.front import Front
from cacheblend_rag.server.jobs import Jobs
from cacheblend_rag.server.options import ServerOptions
from cacheblend_rag.server.routes import add_to
from cacheblend_rag.server.runner import Runner
from cacheblend_rag.store.base import document_id
from cacheblend_rag.store.registry import DocumentRegistry

KEY, OTHER = "ab" * 32, "cd" * 32
OFF = ModelCheck(passed=False, reason=Reason.NOT_READY, detail="the reason")
DELETE_ALL = [
    ("DELETE", "/documents/d", None),
    ("POST", "/documents/delete", {"documents": ["d"]}),
    ("DELETE", f"/chunks/{KEY}", None),
    ("POST", "/chunks/delete", {"ids": [KEY]}),
    ("POST", "/chunks/delete", {"texts": [[1, 2]]}),
    ("POST", "/chunks/delete", {"except_texts": []}),
]
ASK_ALL = [
    ("GET", "/documents/d", None),
    ("POST", "/documents", {"documents": {"d": [KEY]}}),
    ("POST", "/documents/registered", {"documents": ["d"]}),
    ("GET", "/chunks", None),
    ("POST", "/chunks/keys", {"texts": [[1, 2]]}),
]


class Engine:
    """Its store has the chunks of a document, and it does not blend."""

    tokenizer = chat = None
    parsers = NO_PARSERS
    is_dead = False

    def __init__(self, is_open: bool) -> None:
        self.state = {"is_open": is_open, "has_scheduler": True, "proving": False}
        keys = KeySpace("weights", (), "")
        self.space = Space(name="default", keys=keys, default=True) if is_open else None
        self.info = SimpleNamespace(
            fingerprint="weights", vocab_size=10, vllm_version="0", model="m", block_size=16
        )
        self.info.max_model_len = self.info.max_num_batched_tokens = 64
        self.stored, self.notes = {KEY, keys.key((1, 2))}, DocumentRegistry()
        self.notes.register("d", [KEY])

    def model_check(self) -> ModelCheck:
        return OFF

    def rpc(self, method: str, *args: Any) -> list[Any]:
        assert self.state["is_open"], "the worker has no store"
        return [self._asked(method.removeprefix("cacheblend_"), *args)]

    def _asked(self, method: str, *args: Any) -> Any:
        match method, args:
            case "missing", [keys]:
                return [key for key in keys if key not in self.stored]
            case "forget", [keys]:
                self.stored.difference_update(keys)
                return None
            case "register", [rows]:
                for name, keys in rows:
                    self.notes.register(name, keys)
                return None
            case "registered", [names]:
                return [n for n in names if document_id(n) in self.notes.documents()]
            case "unregister", [names, only, forgotten]:
                return self.notes.unregister(map(document_id, names), only, forgotten)
            case "document_keys", [name]:
                return self.notes.document_keys(name)
            case "page", _:
                return sorted(self.stored)
            case "count", _:
                return len(self.stored)
            case "store_stats", _:
                return {"chunks": len(self.stored)}
        raise AssertionError(method)


class Server:
    """Its endpoints over such an engine."""

    def __init__(self, jobs: Jobs, lock: Path, is_open: bool) -> None:
        self.engine = engine = Engine(is_open)
        front = Front.of(engine, BlendConfig())  # type: ignore[arg-type]
        self.runner = Runner(jobs, lambda tenant: front, lock)
        self.app = FastAPI()
        self.app.state.cacheblend = SimpleNamespace(
            options=ServerOptions(),
            jobs=jobs,
            front=front,
            found=lambda tenant: front,
            runner=self.runner,
            engine=engine,
        )
        add_to(self.app)

    async def ask(self, method: str, path: str, body: Any = None) -> httpx.Response:
        transport = httpx.ASGITransport(self.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://s") as client:
            return await client.request(method, f"/v1/cacheblend{path}", json=body)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[bool], Server]]:
    jobs, started = Jobs(tmp_path / "jobs.sqlite", 1000), list[Server]()

    def start(is_open: bool) -> Server:
        started.append(Server(jobs, tmp_path / "lock", is_open))
        return started[-1]

    yield start
    for server in started:
        server.runner.stop()
    jobs.close()


@pytest.mark.parametrize("request_", DELETE_ALL, ids=str)
async def test_what_is_deleted_goes(start: Callable[[bool], Server], request_: Any) -> None:
    server = start(True)
    before = len(server.engine.stored)
    answer = await server.ask(*request_)
    assert answer.status_code == 200 and answer.json()["deleted"] in (True, 1, 2)
    assert len(server.engine.stored) < before


async def test_what_is_stored_is_listed(start: Callable[[bool], Server]) -> None:
    server = start(True)
    listed = (await server.ask("GET", "/chunks")).json()
    assert {row["id"] for row in listed["data"]} == server.engine.stored
    assert (await server.ask("GET", "/documents/d")).json()["registered"]
    assert (await server.ask("POST", "/documents", {"documents": {"e": [KEY]}})).status_code == 200
    found = await server.ask("POST", "/documents/registered", {"documents": ["e", "f"]})
    assert found.json()["data"] == ["e"]
    [row] = (await server.ask("POST", "/chunks/keys", {"texts": [[1, 2]]})).json()["data"]
    assert row["stored"]


async def test_an_empty_document_replaces_the_one_that_was(start: Callable[[bool], Server]) -> None:
    server = start(True)
    answer = await server.ask("PUT", "/documents/d", {"chunks": [], "wait": True})
    assert answer.json()["status"] == "completed"
    assert KEY not in server.engine.stored and not server.engine.notes.documents()


@pytest.mark.parametrize("request_", [*DELETE_ALL, *ASK_ALL], ids=str)
async def test_a_store_that_is_not_open_is_told(
    start: Callable[[bool], Server], request_: Any
) -> None:
    answer = await start(False).ask(*request_)
    assert answer.status_code == 503 and "Retry-After" not in answer.headers
    error = answer.json()["error"]
    assert error["code"] == "not_available" and "the reason" in error["message"]


async def test_a_document_that_can_not_be_replaced_is_told(start: Callable[[bool], Server]) -> None:
    server = start(False)
    job = (await server.ask("PUT", "/documents/d", {"chunks": [], "wait": True})).json()
    assert job["status"] == "failed" and job["error"]["code"] == "not_available"
    assert "the reason" in job["error"]["message"]


def test_an_embedded_engine_warns_that_nothing_was_forgotten(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its store is closed where it does not blend, and applications go on with plain answers."""
    front, told = object.__new__(Documents), list[str]()
    front.model_check, front._closed, front._home = OFF, False, Home()
    monkeypatch.setattr(
        "cacheblend_rag.front.documents.logger.warning",
        lambda message, *args: told.append(message % args),
    )
    assert front.forget_keys([KEY]) == front.forget_documents(["d"]) == 0
    assert len(told) == 2 and "the reason" in told[0]
    assert front.stored() == front.registered_documents(["d"]) == set()
