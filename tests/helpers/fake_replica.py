"""Servers that a proxy stands in front of, in this event loop, which misbehave as they are told."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, NamedTuple

import httpx
import uvicorn
from servers import free_port

from cacheblend_rag.router import WarmRouter
from cacheblend_rag.server.proxy.app import proxy_app
from cacheblend_rag.server.proxy.options import ProxyOptions


class Got(NamedTuple):
    method: str
    target: str
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


Behave = Callable[[Got, asyncio.StreamWriter], Awaitable[None]]


class FakeReplica:
    """Attributes:
    got, checks: requests.
    behave: what it does with these.
    left: how often a client closed the connection before the answer was whole.
    """

    def __init__(self, name: str, models: tuple[str, ...] = ("m",)) -> None:
        self.name, self.models = name, models
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.got, self.checks = list[Got](), list[Got]()
        self.behave: Behave = self.answer
        self.is_healthy, self.left = True, 0
        self._server: asyncio.Server | None = None
        self._open = set[asyncio.StreamWriter]()

    async def start(self) -> None:
        self._server = await asyncio.start_server(
            self._serve, "127.0.0.1", self.port, limit=1 << 20
        )

    async def kill(self) -> None:
        """As ``kill -9``: no more connections, and the open ones are reset."""
        if self._server is None:
            return
        self._server.close()
        for writer in list(self._open):
            writer.transport.abort()
        await asyncio.sleep(0)
        self._server = None

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._open.add(writer)
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            while got := await read_request(reader):
                await self._handle(got, reader, writer)
        self._open.discard(writer)
        writer.close()

    async def _handle(
        self, got: Got, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        if got.target.endswith("/health"):
            self.checks.append(got)
            await respond(writer, 200 if self.is_healthy else 503)
        elif got.target.endswith("/v1/models"):
            data = [{"id": name, "object": "model"} for name in self.models]
            await respond(writer, 200, json.dumps({"object": "list", "data": data}).encode())
        else:
            self.got.append(got)
            answering = asyncio.ensure_future(self.behave(got, writer))
            leaving = asyncio.ensure_future(reader.read(1))  # clients send nothing meanwhile
            await asyncio.wait({answering, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if not answering.done():
                self.left += 1
            for task in (answering, leaving):
                task.cancel()
            for done in await asyncio.gather(answering, leaving, return_exceptions=True):
                if isinstance(done, Exception):
                    raise done

    async def answer(self, got: Got, writer: asyncio.StreamWriter) -> None:
        """As an OpenAI server would, briefly; names this replica."""
        if got.method == "POST" and got.body and got.json().get("stream"):
            await stream(writer, [chunk(self.name), chunk("!"), b"data: [DONE]\n\n"])
            return
        message = {"role": "assistant", "content": self.name}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        body = {"id": "c", "object": "chat.completion", "created": 0, "model": "m"}
        await respond(writer, 200, json.dumps({**body, "choices": [choice]}).encode())


async def read_request(reader: asyncio.StreamReader) -> Got | None:
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError:
        return None
    first, *lines = head.decode("latin-1").split("\r\n")
    method, target, _ = first.split(" ")
    headers = dict[str, str]()
    for line in filter(None, lines):
        name, _, value = line.partition(":")
        headers[name.lower()] = value.strip()
    body = await reader.readexactly(int(headers.get("content-length", "0")))
    return Got(method, target, headers, body)


async def respond(
    writer: asyncio.StreamWriter,
    status: int,
    body: bytes = b"",
    headers: dict[str, str] | None = None,
    length: int | None = None,
) -> None:
    """A whole answer, or one that says that it is longer (``length``)."""
    given = {"content-type": "application/json", "content-length": str(length or len(body))}
    lines = [f"{name}: {value}" for name, value in {**given, **(headers or {})}.items()]
    writer.write("\r\n".join([f"HTTP/1.1 {status} X", *lines, "", ""]).encode("latin-1") + body)
    await writer.drain()


async def begin_stream(writer: asyncio.StreamWriter) -> None:
    head = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
    writer.write(f"{head}transfer-encoding: chunked\r\n\r\n".encode())
    await writer.drain()


async def part(writer: asyncio.StreamWriter, data: bytes) -> None:
    writer.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
    await writer.drain()


async def stream(writer: asyncio.StreamWriter, parts: list[bytes]) -> None:
    await begin_stream(writer)
    for data in parts:
        await part(writer, data)
    await part(writer, b"")


def chunk(content: str) -> bytes:
    """An event of a streamed chat answer."""
    choice = {"index": 0, "delta": {"content": content}, "finish_reason": None}
    body = {"id": "c", "object": "chat.completion.chunk", "created": 0, "model": "m"}
    return b"data: " + json.dumps({**body, "choices": [choice]}).encode() + b"\n\n"


class Proxy(NamedTuple):
    url: str
    client: httpx.AsyncClient
    replicas: list[FakeReplica]
    router: WarmRouter

    async def ask(self, prompt: str = "", **options: Any) -> httpx.Response:
        body = {"model": "m", "messages": [{"role": "user", "content": prompt}], **options}
        return await self.client.post("/v1/chat/completions", json=body)

    async def state(self) -> dict[str, dict[str, Any]]:
        """By the names of the fakes."""
        found = (await self.client.get("/route", headers={"authorization": "Bearer root"})).json()
        names = {replica.url: replica.name for replica in self.replicas}
        return {names.get(r["url"], r["url"]): r for r in found["replicas"]}


@contextlib.asynccontextmanager
async def proxied(
    replicas: list[FakeReplica], *, started: bool = True, **options: Any
) -> AsyncIterator[Proxy]:
    """The real proxy over real sockets, in front of fakes."""
    if started:
        for replica in replicas:
            await replica.start()
    settings = {"check_s": 0.05, "check_timeout_s": 5.0, "admin_key": "root", **options}
    router, port = WarmRouter(), free_port()
    app = proxy_app([r.url for r in replicas], router, ProxyOptions(**settings))
    quiet: Any = {"log_level": "critical", "date_header": False, "proxy_headers": False}
    server = uvicorn.Server(uvicorn.Config(app, port=port, lifespan="on", **quiet))
    serving = asyncio.ensure_future(server.serve())
    while not server.started:
        await asyncio.sleep(0.005)
    url = f"http://127.0.0.1:{port}"
    try:
        async with httpx.AsyncClient(base_url=url, timeout=10, trust_env=False) as client:
            yield Proxy(url, client, replicas, router)
    finally:
        server.should_exit = True
        await serving
        for replica in replicas:
            await replica.kill()


async def until(condition: Callable[[], Awaitable[bool] | bool], timeout: float = 5.0) -> None:
    """Wait for it; fail where it does not come."""
    async with asyncio.timeout(timeout):
        while True:
            found = condition()
            if found if isinstance(found, bool) else await found:
                return
            await asyncio.sleep(0.01)
