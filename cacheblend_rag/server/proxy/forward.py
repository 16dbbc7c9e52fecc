"""Hands a request on to a replica, and its answer back, as it comes."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

import httpx
from starlette.datastructures import Headers
from starlette.types import Receive, Scope, Send

from cacheblend_rag.errors import CacheBlendError
from cacheblend_rag.router import Sketch, request_sketch
from cacheblend_rag.server import pieces
from cacheblend_rag.server.errors import HttpError, answer, not_found
from cacheblend_rag.server.proxy.events import WholeEvents, error_event
from cacheblend_rag.server.proxy.fleet import Fleet, Replica
from cacheblend_rag.server.proxy.headers import REPLICA, Pairs, request_headers, response_headers
from cacheblend_rag.server.proxy.health import HealthChecks
from cacheblend_rag.server.proxy.options import ProxyOptions
from cacheblend_rag.server.reading import read

logger = logging.getLogger("cacheblend_rag.route")

OURS = "/v1/cacheblend"  # ingestions, documents and lists: jobs belong to one server
# What one replica knows and the others don't: the answers that it gave, and its jobs.
_OF_ONE = re.compile(rf"{re.escape(OURS)}/(requests/[^/]+|ingestions/[^/]+(/cancel)?)")
_SMALL = 1 << 16  # bytes of a body that is read at once; a longer one takes a thread
# Nothing was sent yet: the request may go elsewhere.
_NOT_SENT = (httpx.ConnectError, httpx.ConnectTimeout)


class Asked(NamedTuple):
    """A request as it came."""

    method: str
    target: bytes  # path and query, as they were written
    path: str
    headers: Pairs
    body: bytes
    sketch: Sketch
    model: str | None
    pinned: str | None  # id of the replica that is to answer


class Forward:
    """An ASGI application without a lifespan: every request goes to one replica.

    Another one is tried only where nothing was sent. A replica that is lost later ends the answer:
    with an error, with an event that says so in a stream of events, or by cutting the connection.

    Args:
        health: is hurried where a replica is lost.
    """

    def __init__(
        self, fleet: Fleet, client: httpx.AsyncClient, health: HealthChecks, options: ProxyOptions
    ) -> None:
        self._fleet, self._client, self._health, self._options = fleet, client, health, options

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1003, "reason": "HTTP only"})
            return
        started = Started(send)
        try:
            asked = await _asked(scope, receive, self._options.max_body)
            await until_gone(receive, self._serve(asked, started))
        except CacheBlendError as error:
            assert not started.yes
            await answer(error)(scope, receive, send)

    async def _serve(self, asked: Asked, send: Started) -> None:
        if asked.method in ("GET", "POST") and _OF_ONE.fullmatch(asked.path):
            await self._ask_around(asked, send)
            return
        tried = list[Replica]()
        while True:
            able = self._able(asked, tried)
            some = able[:1] if asked.path.startswith(OURS) else able
            replica = self._fleet.take(asked.sketch, some)
            if replica is None:
                raise _nobody(tried)
            try:
                await self._relay(asked, replica, send)
                return
            except _NOT_SENT as error:
                tried.append(replica)
                self._lost(replica, error, surely=True)
            finally:
                self._fleet.done(replica)

    def _able(self, asked: Asked, tried: Collection[Replica] = ()) -> list[str]:
        """Names of the replicas that may be asked.

        Raises:
            HttpError: 404: there is none of the id that the client named.
        """
        names = [replica.name for replica in tried]
        if asked.pinned is None:
            return self._fleet.fit(asked.model, names)
        replica = self._fleet.pinned(asked.pinned)
        if replica is None:
            raise not_found("replica", asked.pinned)
        return [replica.name] if replica.up and replica.name not in names else []

    async def _ask_around(self, asked: Asked, send: Started) -> None:
        """The first answer that is not 404: who says that did nothing."""
        tried, is_absent = list[Replica](), False
        for name in self._able(asked):
            if (replica := self._fleet.replicas.get(name)) is None:
                continue
            tried.append(replica)
            try:
                async with self._response(asked, replica) as response:
                    if response.status_code != 404:
                        await self._hand_back(response, replica, send)
                        return
                    is_absent = True
            except httpx.HTTPError as error:
                self._lost(replica, error, surely=isinstance(error, _NOT_SENT))
                if asked.method != "GET" and not isinstance(error, _NOT_SENT):
                    raise _lost_error(replica, error) from error
        if not is_absent:
            raise _nobody(tried)
        raise not_found("request or job", asked.path.removeprefix(f"{OURS}/"))

    async def _relay(self, asked: Asked, replica: Replica, send: Started) -> None:
        """One request to one replica, to its end.

        Raises:
            httpx.ConnectError, httpx.ConnectTimeout: nothing was sent.
            HttpError: there is no answer, for sure or not.
        """
        try:
            async with self._response(asked, replica) as response:
                await self._hand_back(response, replica, send)
        except _NOT_SENT:
            raise
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            replica.broken += 1
            self._lost(replica, error)
            raise _lost_error(replica, error) from error

    @asynccontextmanager
    async def _response(self, asked: Asked, replica: Replica) -> AsyncIterator[httpx.Response]:
        url = httpx.URL(replica.url)
        target = url.raw_path.rstrip(b"/") + asked.target
        request = httpx.Request(
            asked.method,
            url,
            headers=asked.headers,
            content=asked.body,
            # As it was written: in a URL, dots would be resolved.
            extensions={"timeout": self._client.timeout.as_dict(), "target": target},
        )
        response = await self._client.send(request, stream=True)
        try:
            yield response
        finally:
            await response.aclose()

    async def _hand_back(self, response: httpx.Response, replica: Replica, send: Started) -> None:
        """The answer, as its bytes come. One that breaks off behind its head is not raised: the
        client was answered.
        """
        headers = response_headers(response.headers.raw, replica.id)
        plain = "content-encoding" not in response.headers
        kind = response.headers.get("content-type", "").partition(";")[0].strip().lower()
        events = WholeEvents() if plain and kind == "text/event-stream" else None
        try:
            await send.head(response.status_code, headers)
            async for data in response.aiter_raw():
                await send.body(data if events is None else events.take(data))
        except httpx.HTTPError as error:
            replica.broken += 1
            self._lost(replica, error)
            if events is not None:
                await send.body(error_event(_lost_error(replica, error).body()))
                await send.end()
            # Without an end, the server cuts the connection: no client takes it for the whole.
            return
        await send.body(b"" if events is None else events.rest())
        await send.end()

    def _lost(self, replica: Replica, error: Exception, *, surely: bool = False) -> None:
        logger.warning("replica %s: %s: %s", replica.name, type(error).__name__, error)
        if surely:
            self._fleet.failed(replica, f"{type(error).__name__}: {error}", surely=True)
        self._health.hurry(replica)


class Started:
    """What is sent to a client.

    Attributes:
        yes: whether anything was.
    """

    def __init__(self, send: Send) -> None:
        self._send, self.yes = send, False

    async def head(self, status: int, headers: Pairs) -> None:
        self.yes = True
        await self._send({"type": "http.response.start", "status": status, "headers": headers})

    async def body(self, data: bytes) -> None:
        if data:
            await self._send({"type": "http.response.body", "body": data, "more_body": True})

    async def end(self) -> None:
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})


async def until_gone(receive: Receive, work: Any) -> None:
    """Await ``work``, a coroutine; where the client leaves before, end it: its replica then ends
    the answer too.
    """
    doing = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait({doing, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if doing.done():
            doing.result()
    finally:
        for task in (doing, leaving):
            task.cancel()
        await asyncio.gather(doing, leaving, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _asked(scope: Scope, receive: Receive, most: int) -> Asked:
    """Raises:
    HttpError: 413: it is too large; 400: it is none.
    """
    body = await read(receive, Headers(scope=scope), most)
    is_json = "json" in Headers(scope=scope).get("content-type", "")
    sketch, model = Sketch(), None
    if scope["method"] == "POST" and is_json:
        if len(body) > _SMALL:
            sketch, model = await asyncio.to_thread(_looked_at, body)
        else:
            sketch, model = _looked_at(body)
    client = scope.get("client")
    path = scope.get("raw_path") or scope["path"].encode()
    if not path.startswith(b"/"):
        raise HttpError(400, "the path of a request begins with /")
    query = scope.get("query_string", b"")
    return Asked(
        scope["method"],
        path + (b"?" + query if query else b""),
        scope["path"],
        request_headers(scope["headers"], client[0] if client else None),
        body,
        sketch,
        model,
        Headers(scope=scope).get(REPLICA.decode()),
    )


def _looked_at(body: bytes) -> tuple[Sketch, str | None]:
    """What a request is routed by. One that is no JSON gets its answer from a replica."""
    try:
        found = pieces.loads(body)
    except (ValueError, RecursionError):
        return Sketch(), None
    model = found.get("model") if isinstance(found, dict) else None
    return request_sketch(found), model if isinstance(model, str) else None


def _nobody(tried: Collection[Replica]) -> HttpError:
    asked = f" ({', '.join(replica.id for replica in tried)} did not take it)" if tried else ""
    message = f"no replica can be asked now{asked}; GET /route has the reasons"
    return HttpError(503, message, code="no_replica", retry_after_s=1)


def _lost_error(replica: Replica, error: Exception) -> HttpError:
    message = (
        f"the replica {replica.id} did not answer to the end ({type(error).__name__}); it may "
        "have done what was asked"
    )
    return HttpError(502, message, code="replica_lost")
