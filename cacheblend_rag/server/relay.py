"""The endpoints of an engine whose HTTP somebody else speaks, such as Ray Serve's ingress.

There the request is read (``add_relay``), carried as plain data to a process with an engine, and
answered by the same endpoints as anywhere (``endpoints``, ``answered``).
"""

from __future__ import annotations

import asyncio
import logging
import re
from argparse import Namespace
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, NamedTuple, Protocol
from urllib.parse import unquote, unquote_to_bytes

from fastapi import FastAPI, Request
from fastapi.responses import Response
from starlette.types import Message, Scope
from xxhash import xxh64_intdigest

from cacheblend_rag.errors import EngineDeadError
from cacheblend_rag.server.errors import or_answer
from cacheblend_rag.server.plugin import CacheBlendEndpoints
from cacheblend_rag.server.reading import read
from cacheblend_rag.server.tenants import PREFIX

logger = logging.getLogger("vllm.cacheblend_rag")

# what one process of a fleet knows and the others don't: its jobs, and the requests it answered
_OF_ONE = re.compile(rf"{re.escape(PREFIX)}/(requests/[^/]+|ingestions/[^/]+(/cancel)?)")
_DOCUMENT = f"{PREFIX}/documents/".encode()
_HOPS = {"connection", "content-length", "host", "keep-alive", "te", "transfer-encoding", "upgrade"}
_METHODS = ["GET", "POST", "PUT", "PATCH", "DELETE"]


class Asked(NamedTuple):
    """A request to an endpoint; ``target`` is its path with the query."""

    method: str
    target: str
    headers: list[tuple[str, str]]
    body: bytes

    @property
    def is_of_one(self) -> bool:
        """Whether only the process that began it can answer."""
        return bool(_OF_ONE.fullmatch(self.target.partition("?")[0]))

    @property
    def meets(self) -> bytes | None:
        """What it has in common with requests that must reach the same jobs: a document, or an
        ``Idempotency-Key``. None: any process will do.
        """
        path = unquote_to_bytes(self.target.partition("?")[0].encode("latin-1"))
        if self.method in ("PUT", "DELETE") and path.startswith(_DOCUMENT):
            return path
        if self.method in ("GET", "DELETE"):
            return None
        keys = [value for name, value in self.headers if name.lower() == "idempotency-key"]
        return ", ".join(keys).encode("latin-1") if keys else None


class Replica(NamedTuple):
    """A process with an engine. Those of one machine share the file of their jobs."""

    machine: str
    name: str


class Fleet(Protocol):
    """Processes with engines, as whoever started them reaches them."""

    async def replicas(self) -> list[Replica]:
        """All that are known, in any order."""

    async def ask_any(self, asked: Asked) -> Answered:
        """Have one that is free answer."""

    async def ask(self, replica: Replica, asked: Asked) -> Answered:
        """Have this one answer.

        Raises:
            EngineDeadError: it can't be reached.
        """


class Answered(NamedTuple):
    """What an endpoint answered."""

    status: int
    headers: list[tuple[str, str]]
    body: bytes


async def endpoints(client: Any, state: Any, args: Namespace) -> Any:
    """An ASGI app of our endpoints only.

    Args:
        client: vLLM's engine client, of this event loop.
        state: of vLLM's own app.
        args: of vLLM's server.
    """
    app = FastAPI()
    app.state.args = args
    plugin = CacheBlendEndpoints()
    plugin.attach_router(app)
    app.state.online_renderer = getattr(state, "online_renderer", None)
    await plugin.init_state(client, app.state, args)
    return app


async def answered(app: Any, asked: Asked) -> Answered:
    """Have the endpoints answer a request that came another way than HTTP.

    Called as a server would, with the path as it was written: a client's library resolves dots and
    encodes anew, and then another document is meant.
    """
    call = _Call(asked.body)
    await app(_scope(asked), call.receive, call.send)
    return Answered(call.status, _kept(_texts(call.headers)), b"".join(call.body))


class _Call:
    """One request to an ASGI app, whose client stays to the end."""

    def __init__(self, body: bytes) -> None:
        self._given: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]
        self.status, self.headers, self.body = 500, list[tuple[bytes, bytes]](), list[bytes]()

    async def receive(self) -> Message:
        if self._given:
            return self._given.pop()
        await asyncio.Event().wait()  # until the app stops asking whether the client left
        raise AssertionError("nobody sets it")

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status, self.headers = message["status"], list(message.get("headers", ()))
        elif message["type"] == "http.response.body":
            self.body.append(message.get("body", b""))


def _scope(asked: Asked) -> Scope:
    path, _, query = asked.target.encode("latin-1").partition(b"?")
    headers = [
        (name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in asked.headers
    ]
    length = str(len(asked.body)).encode()
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": asked.method,
        "scheme": "http",
        "path": unquote(path.decode(errors="replace")),
        "raw_path": path,
        "query_string": query,
        "root_path": "",
        "headers": [*headers, (b"host", b"engine"), (b"content-length", length)],
        "client": None,
        "server": ("engine", 80),
        "state": {},
    }


def add_relay(app: FastAPI, ask: Callable[[Asked], Awaitable[Answered]], max_body: int) -> None:
    """Have ``ask`` answer all below ``/v1/cacheblend``.

    Args:
        max_body: bytes of a body; larger ones are refused here.
    """

    async def relay(request: Request) -> Response:
        reply = await or_answer(asked(request))
        if isinstance(reply, Response):
            return reply
        response = Response(reply.body, reply.status)
        for name, value in reply.headers:
            response.headers.append(name, value)
        return response

    async def asked(request: Request) -> Answered:
        body = await read(request.receive, request.headers, max_body)
        return await ask(Asked(request.method, _target(request), _given(request), body))

    for path in (PREFIX, PREFIX + "/{rest:path}"):
        app.router.add_route(path, relay, methods=_METHODS, include_in_schema=False)


async def first_found(asked: Asked, fleet: Fleet) -> Answered:
    """What a fleet answers: any process, or of all the one that knows what is asked for, or the one
    that repeats of this request reach too.

    Raises:
        EngineDeadError: no process that may answer can be reached.
    """
    if asked.meets is not None and (known := await fleet.replicas()):
        return await _at_home(asked, _by_homes(asked.meets, known), fleet)
    reply = await fleet.ask_any(asked)
    if reply.status != 404 or not asked.is_of_one:
        return reply
    known = await fleet.replicas()
    replies = await asyncio.gather(*(_or_none(fleet.ask(other, asked)) for other in known))
    return next((other for other in replies if other and other.status != 404), reply)


async def _at_home(asked: Asked, known: Iterable[Replica], fleet: Fleet) -> Answered:
    for replica in known:
        if reply := await _or_none(fleet.ask(replica, asked)):
            return reply
    raise EngineDeadError("no replica can be reached now; ask again")


async def _or_none(work: Awaitable[Answered]) -> Answered | None:
    try:
        return await work
    except EngineDeadError as error:
        logger.warning("a replica can't be reached: %s", error)
        return None


def _by_homes(what: bytes, known: Iterable[Replica]) -> list[Replica]:
    """The replicas in the order in which they may be asked: the same for everybody who knows them,
    and for those that stay where one goes. Those of a machine follow each other.
    """

    def order(replica: Replica) -> tuple[int, str, int, str]:
        machine, name = (xxh64_intdigest(part.encode() + b"\0" + what) for part in replica)
        return machine, replica.machine, name, replica.name

    return sorted(known, key=order)


def _target(request: Request) -> str:
    """Still percent-encoded: names of documents may hold a slash."""
    path: bytes = request.scope.get("raw_path") or request.scope["path"].encode()
    root: bytes = request.scope.get("root_path", "").encode()
    query: bytes = request.scope.get("query_string", b"")
    target = path.partition(b"?")[0].removeprefix(root)
    return (target + b"?" + query if query else target).decode("latin-1")


def _given(request: Request) -> list[tuple[str, str]]:
    return _kept(request.headers.items())


def _texts(headers: Iterable[tuple[bytes, bytes]]) -> list[tuple[str, str]]:
    return [(name.decode("latin-1"), value.decode("latin-1")) for name, value in headers]


def _kept(headers: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """Without those of one connection."""
    return [(name, value) for name, value in headers if name.lower() not in _HOPS]
