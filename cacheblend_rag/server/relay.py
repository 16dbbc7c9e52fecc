"""The endpoints of an engine whose HTTP somebody else speaks, such as Ray Serve's ingress.

There the request is read (``add_relay``), carried as plain data to a process with an engine, and
answered by the same endpoints as anywhere (``endpoints``, ``answered``).
"""

from __future__ import annotations

import asyncio
import re
from argparse import Namespace
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, NamedTuple
from urllib.parse import unquote

from fastapi import FastAPI, Request
from fastapi.responses import Response
from starlette.types import Message, Scope

from cacheblend_rag.server.errors import or_answer
from cacheblend_rag.server.plugin import CacheBlendEndpoints
from cacheblend_rag.server.reading import read
from cacheblend_rag.server.tenants import PREFIX

# what one process of a fleet knows and the others don't: its jobs, and the requests it answered
_OF_ONE = re.compile(rf"{re.escape(PREFIX)}/(requests/[^/]+|ingestions/[^/]+(/cancel)?)")
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


async def first_found(
    asked: Asked,
    ask_any: Callable[[Asked], Awaitable[Answered]],
    ask_all: Callable[[Asked], list[Answered]],
) -> Answered:
    """What a fleet answers: any process, or of all the one that knows what is asked for.

    Args:
        ask_any: one that is free.
        ask_all: every one; is called in a thread.
    """
    reply = await ask_any(asked)
    if reply.status != 404 or not asked.is_of_one:
        return reply
    replies = await asyncio.to_thread(ask_all, asked)
    return next((other for other in replies if other.status != 404), reply)


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
