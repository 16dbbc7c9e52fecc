"""Endpoints whose HTTP somebody else speaks: what goes there and what comes back."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote

import httpx
import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from cacheblend_rag.errors import EngineDeadError
from cacheblend_rag.server.relay import (
    Answered,
    Asked,
    Replica,
    add_relay,
    answered,
    endpoints,
    first_found,
)

BASE = "/v1/cacheblend"
MAX_BODY = 100


def engine_app() -> FastAPI:
    """Says what it was asked."""
    made = FastAPI()

    async def say(request: Request) -> Response:
        body = await request.body()
        shown = {
            "method": request.method,
            "path": request.scope["raw_path"].decode("latin-1"),
            "query": request.scope["query_string"].decode("latin-1"),
            "key": request.headers.get("idempotency-key"),
            "host": request.headers["host"],
            "body": body.decode(),
        }
        reply = JSONResponse(shown, 202, {"Retry-After": "3"})
        reply.set_cookie("a", "1", path=None, samesite=None)
        reply.set_cookie("b", "2", path=None, samesite=None)
        return reply

    made.router.add_route("/{rest:path}", say, methods=["GET", "POST", "PUT", "DELETE"])
    return made


def front(ask: Any = None) -> FastAPI:
    """A server that has no engine: each request crosses over as plain data."""
    app, engine = FastAPI(), engine_app()

    async def there(asked: Asked) -> Answered:
        plain = json.loads(json.dumps([*asked[:3], asked.body.decode()]))
        return await answered(engine, Asked(*plain[:3], plain[3].encode()))

    add_relay(app, ask or there, MAX_BODY)
    return app


def client(ask: Any = None) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(front(ask)), base_url="http://front")


async def ask_raw(
    method: str, target: bytes, headers: list[tuple[bytes, bytes]]
) -> tuple[int, list[tuple[bytes, bytes]], Any]:
    """What the front answers; httpx would write another path."""
    path, _, query = target.partition(b"?")
    scope = {
        "type": "http",
        "method": method,
        "path": unquote(path.decode()),
        "raw_path": path,
        "query_string": query,
        "headers": headers,
    }
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "http.request", "body": b"body"}

    async def send(message: Any) -> None:
        sent.append(message)

    await front()(scope, receive, send)
    body = b"".join(message.get("body", b"") for message in sent[1:])
    return sent[0]["status"], sent[0]["headers"], json.loads(body)


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", ""),
        ("GET", "/chunks?after=a%2Fb&limit=3"),
        ("PUT", "/documents/a%2Fb%20c"),
        ("DELETE", "/chunks/k"),
        ("POST", "/ingestions"),
        # documents of these names: a client's library would ask for others
        ("PUT", "/documents/a/../b"),
        ("DELETE", "/documents/.."),
        ("PUT", "/documents/./x"),
        ("PUT", "/documents//x"),
        ("PUT", "/documents/ü"),
        ("PUT", "/documents/%c3%bc?x=ü&y=%2F"),
        ("PUT", '/documents/a"<{|'),
    ],
)
async def test_a_request_arrives_as_it_was_sent(method: str, path: str) -> None:
    target = (BASE + path).encode()
    status, headers, shown = await ask_raw(method, target, [(b"idempotency-key", b"i\xe9")])
    assert status == 202 and (b"retry-after", b"3") in headers
    assert [value for name, value in headers if name == b"set-cookie"] == [b"a=1", b"b=2"]
    name, _, query = target.decode("latin-1").partition("?")
    assert shown == {
        "method": method,
        "path": name,
        "query": query,
        "key": "i\xe9",
        "host": "engine",
        "body": "body",
    }


async def test_a_body_that_is_too_large_is_refused_before_it_travels() -> None:
    async def never(asked: Asked) -> Answered:
        raise AssertionError

    reply = await client(never).post(f"{BASE}/ingestions", content="x" * (MAX_BODY + 1))
    assert reply.status_code == 413


async def test_what_the_way_there_raises_is_an_error_of_ours() -> None:
    async def fails(asked: Asked) -> Answered:
        raise RuntimeError("the replica died")

    reply = await client(fails).get(BASE)
    assert reply.status_code == 500 and "error" in reply.json()


async def test_endpoints_without_the_worker_extension_say_why() -> None:
    config = SimpleNamespace(
        parallel_config=SimpleNamespace(worker_extension_cls=""),
        kv_transfer_config=SimpleNamespace(kv_connector_extra_config={}),
        model_config=SimpleNamespace(runner_type="generate"),
    )
    args = Namespace(kv_transfer_config=config.kv_transfer_config)
    app = await endpoints(SimpleNamespace(vllm_config=config), SimpleNamespace(), args)
    reply = await answered(app, Asked("GET", BASE, [], b""))
    assert reply.status == 503 and b"--worker-extension-cls" in reply.body


# ---- of several -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "of_one"),
    [
        ("/requests/r", True),
        ("/requests/r?index=1", True),
        ("/ingestions/i", True),
        ("/ingestions/i/cancel", True),
        ("/ingestions", False),
        ("/documents/ingestions", False),
        ("/chunks/requests", False),
        ("", False),
    ],
)
def test_what_only_one_process_knows(path: str, of_one: bool) -> None:
    assert Asked("GET", BASE + path, [], b"").is_of_one is of_one


@dataclass
class FakeFleet:
    """Replicas that answer with a status; None: one that can't be reached."""

    statuses: dict[Replica, int | None]
    asked: list[Replica | None] = field(default_factory=list)

    async def replicas(self) -> list[Replica]:
        return list(self.statuses)

    async def ask_any(self, asked: Asked) -> Answered:
        self.asked.append(None)
        status = next(iter(self.statuses.values()))
        assert status is not None
        return Answered(status, [], b"")

    async def ask(self, replica: Replica, asked: Asked) -> Answered:
        self.asked.append(replica)
        if (status := self.statuses[replica]) is None:
            raise EngineDeadError("it is gone")
        return Answered(status, [], b"")


REPLICAS = [Replica(f"machine {n % 3}", f"replica {n}") for n in range(6)]  # two on each


def keyed(key: str, method: str = "POST", path: str = "/ingestions") -> Asked:
    return Asked(method, BASE + path, [("Idempotency-Key", key)], b"")


@pytest.mark.parametrize(
    ("path", "statuses", "found"),
    [
        ("/requests/r", [404, 404, 200], 200),
        ("/requests/r", [404, 404, 404], 404),
        ("/requests/r", [404, 503, 404], 503),
        ("/requests/r", [404, None, 200], 200),  # one died, which is no reason
        ("/requests/r", [200], 200),
        ("/chunks/k", [404], 404),
    ],
)
async def test_the_one_that_knows_answers(
    path: str, statuses: list[int | None], found: int
) -> None:
    fleet = FakeFleet(dict(zip(REPLICAS, statuses, strict=False)))
    asked = Asked("GET", BASE + path, [], b"")
    assert (await first_found(asked, fleet)).status == found
    assert len(fleet.asked) == (1 if len(statuses) == 1 else 1 + len(statuses))


async def home(asked: Asked, known: Iterable[Replica], away: Collection[Replica] = ()) -> Any:
    fleet = FakeFleet({replica: None if replica in away else 200 for replica in known})
    assert (await first_found(asked, fleet)).status == 200
    return fleet.asked


async def test_a_repeated_request_reaches_the_jobs_of_the_first() -> None:
    """A file of jobs is one machine's: elsewhere its key is not known."""
    homes = set()
    for number in range(40):
        asked = keyed(f"key {number}")
        [first] = await home(asked, REPLICAS)
        assert await home(asked, reversed(REPLICAS)) == [first]
        homes.add(first)
        first_, second = await home(asked, REPLICAS, away=[first])
        assert first_ == first and second.machine == first.machine
        left = [replica for replica in REPLICAS if replica != first]
        assert await home(asked, left) == [second], "so it is where Ray no longer names the first"
        others = [replica for replica in REPLICAS if replica.machine != first.machine]
        *_, third = await home(asked, REPLICAS, away=[first, second])
        assert third in others
        assert await home(asked, [*others, first]) == [first]
    assert len(homes) == len(REPLICAS), "keys are spread"
    with pytest.raises(EngineDeadError, match="ask again"):
        await home(keyed("k"), REPLICAS, away=REPLICAS)


async def test_what_changes_one_document_meets() -> None:
    [put] = await home(keyed("a", "PUT", "/documents/%c3%bc"), REPLICAS)
    assert put in REPLICAS
    for asked in (
        keyed("b", "PUT", "/documents/%C3%BC?x=1"),
        keyed("c", "DELETE", "/documents/\xc3\xbc"),
    ):
        assert await home(asked, REPLICAS) == [put]


@pytest.mark.parametrize(("method", "path"), [("GET", ""), ("POST", "/chunks/keys")])
async def test_any_replica_does_for_other_requests(method: str, path: str) -> None:
    assert await home(Asked(method, BASE + path, [], b""), REPLICAS) == [None]
