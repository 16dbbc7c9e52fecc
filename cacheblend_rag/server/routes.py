"""The endpoints under ``/v1/cacheblend``; what they do is done in threads."""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast
from urllib.parse import unquote_to_bytes

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import Response

from cacheblend_rag.errors import ConfigError
from cacheblend_rag.options import TOOL_OPTIONS, ToolOptions
from cacheblend_rag.server import bodies, pieces
from cacheblend_rag.server.bodies import Given, Page
from cacheblend_rag.server.calls import BUSY, OWN, STORE
from cacheblend_rag.server.errors import HttpError, answer, not_found, or_answer
from cacheblend_rag.server.front import Front
from cacheblend_rag.server.jobs import Job, shown
from cacheblend_rag.server.reading import read
from cacheblend_rag.server.service import Absent, Service
from cacheblend_rag.server.tenants import PREFIX

_WAITS_S = 0.05  # between two looks at a job
_MOST_WAIT_S = 60.0  # for a batch of an ingestion
_MOST_KEY = 255  # characters of an Idempotency-Key

router = APIRouter(prefix=PREFIX, tags=["cacheblend"])


class ServerRequest:
    """One request: whose it is, and what may be done for it."""

    def __init__(self, request: Request, service: Service) -> None:
        self.http, self.service = request, service
        self.tenant: str | None = request.scope.get("state", {}).get("cacheblend_namespace")
        if service.options.has_tenants and self.tenant is None:
            raise HttpError(401, "whose request this is isn't known")

    @property
    def owner(self) -> str:
        """Of its jobs."""
        return self.tenant or ""

    async def body(self) -> dict[str, Any]:
        """A JSON object."""
        request = self.http
        raw = await read(request.receive, request.headers, self.service.options.max_body)
        return await OWN.do(bodies.parsed, raw)

    async def front(self) -> Front:
        """That of its namespace."""
        if (found := self.service.found(self.tenant)) is not None:
            return found
        return await STORE.do_once(self.service.front_of, self.tenant)

    def page(self, *known: str) -> Page:
        """Which part of a list it asks for."""
        return Page(self.http.query_params.multi_items(), known)

    def id(self) -> str:
        """That in its path.

        Raises:
            HttpError: 400: it is not UTF-8, so two of them could look alike.
        """
        try:
            unquote_to_bytes(self.http.scope.get("raw_path") or b"").decode()
        except UnicodeDecodeError as error:
            message = "the path is not UTF-8: percent-encode the bytes of UTF-8"
            raise HttpError(400, message, param="id") from error
        return str(self.http.path_params["id"])


Answer = Mapping[str, Any] | tuple[int, Mapping[str, Any]]
Handler = Callable[[ServerRequest], Awaitable[Answer]]


async def _served(handler: Handler, request: Request) -> Answer:
    service = request.app.state.cacheblend
    if isinstance(service, Absent):
        raise service.answer()
    return await handler(ServerRequest(request, service))


def _endpoint(method: str, path: str) -> Callable[[Handler], Handler]:
    """Serve a path by a function; what it raises is answered as an error."""

    def add(handler: Handler) -> Handler:
        @functools.wraps(handler)
        async def serve(request: Request) -> Response:
            found = await or_answer(_served(handler, request))
            if isinstance(found, Response):
                return found
            status, body = found if isinstance(found, tuple) else (200, found)
            raw = await pieces.written(body)
            return Response(raw, status, media_type="application/json")

        del serve.__wrapped__  # FastAPI would read its signature
        serve.__annotations__ = {"request": Request, "return": Response}
        router.add_api_route(
            path, serve, methods=[method], response_model=None, summary=handler.__doc__
        )
        return handler

    return add


def add_to(app: FastAPI) -> None:
    """Serve all of them, and say of other paths below that there is no such endpoint."""
    every = ["GET", "POST", "PUT", "PATCH", "DELETE"]
    app.include_router(router)
    app.router.add_route(
        f"{PREFIX}/{{rest:path}}", _nothing, methods=every, include_in_schema=False
    )
    app.router.add_route(PREFIX, _nothing, methods=every, include_in_schema=False)


async def _nothing(request: Request) -> Response:
    return answer(not_found("endpoint", f"{request.method} {request.url.path}"))


# ---- state -------------------------------------------------------------------------------------


@_endpoint("GET", "")
async def state(request: ServerRequest) -> Answer:
    """What there is to know of the engine, the model and the store."""
    front = await request.front()
    return await STORE.do(front.state)


# ---- ingestions --------------------------------------------------------------------------------


@_endpoint("POST", "/ingestions")
async def ingest(request: ServerRequest) -> Answer:
    """Have chunks computed and stored."""
    body = await request.body()
    bodies.only(body, ("chunks", "wait"))
    return await _ingest(request, body, None)


@_endpoint("PUT", "/documents/{id:path}")
async def put_document(request: ServerRequest) -> Answer:
    """Have a document consist of these chunks, and of nothing else."""
    name = bodies.document(request.id(), "id")
    body = await request.body()
    bodies.only(body, ("chunks", "wait"))
    return await _ingest(request, body, name)


async def _ingest(request: ServerRequest, body: Mapping[str, Any], document: str | None) -> Answer:
    wait, given = bodies.flag(body, "wait"), functools.partial(bodies.chunks, body)
    replaces = document is not None
    chunks = await OWN.do(given, documents=not replaces, may_be_empty=replaces)
    front = await request.front()
    chunks = await OWN.do(_checked, chunks, front, document)
    create = functools.partial(
        request.service.jobs.create,
        request.owner,
        chunks,
        document=document,
        replaces=replaces,
        idempotency=_idempotency(request),
    )
    look = await _look(request, create)
    request.service.runner.wake()
    if wait:
        look = await _ended(request, look)
    return (200 if wait and look.job.has_ended else 202), shown(*look)


def _checked(chunks: list[Given], front: Front, document: str | None) -> list[Given]:
    """Those of an ingestion; ``document``: that all of them belong to."""
    for i, chunk in enumerate(chunks):
        if chunk.left_context is not None and front.config.ingest_prefix != "document":
            at = f"chunks[{i}].left_context"
            raise HttpError(
                400,
                f"{at} is of use with ingest_prefix=document only; this server has "
                f"{front.config.ingest_prefix!r}: leave it out",
                param=at,
            )
    front.check_ids(chunks)
    if document is None:
        return chunks
    return [Given(chunk.text, chunk.left_context, document) for chunk in chunks]


def _idempotency(request: ServerRequest) -> str | None:
    key = request.http.headers.get("Idempotency-Key")
    if key is not None and not 0 < len(key) <= _MOST_KEY:
        message = f"an Idempotency-Key has 1 to {_MOST_KEY} characters"
        raise HttpError(400, message, param="Idempotency-Key")
    return key


class _Look(NamedTuple):
    """A job as it is, and the keys of its chunks where they are known."""

    job: Job
    keys: Sequence[str] | None


async def _look(request: ServerRequest, find: Callable[[], Job]) -> _Look:
    """In one call: what was done is not to be answered by a refusal of a second one."""

    def look() -> _Look:
        job = find()
        return _Look(job, request.service.jobs.keys(job) if job.has_keys else None)

    return await OWN.do(look)


async def _ended(request: ServerRequest, look: _Look) -> _Look:
    """The job at its end; as it is where the server ends first, or the client has left."""
    get = functools.partial(request.service.jobs.get, request.owner, look.job.id)
    while not (
        look.job.has_ended or request.service.engine.is_dead or await request.http.is_disconnected()
    ):
        await asyncio.sleep(_WAITS_S)
        try:
            look = await _look(request, get)
        except HttpError as error:
            if error.code != BUSY:  # the job is there: who was refused would make another one
                raise
    return look


@_endpoint("GET", "/ingestions")
async def ingestions(request: ServerRequest) -> Answer:
    """Ingestions, the newest first."""
    page = request.page("order")
    find = request.service.jobs.page
    jobs = await OWN.do(find, request.owner, page.after, page.limit + 1, page.order)
    return page.of([shown(job) for job in jobs])


@_endpoint("GET", "/ingestions/{id}")
async def ingestion(request: ServerRequest) -> Answer:
    """One ingestion."""
    get = functools.partial(request.service.jobs.get, request.owner, request.id())
    return shown(*await _look(request, get))


@_endpoint("POST", "/ingestions/{id}/cancel")
async def cancel(request: ServerRequest) -> Answer:
    """End an ingestion; what was stored so far stays."""
    cancel = functools.partial(request.service.jobs.cancel, request.owner, request.id())
    return shown(*await _look(request, cancel))


# ---- chunks ------------------------------------------------------------------------------------


@_endpoint("GET", "/chunks")
async def chunks(request: ServerRequest) -> Answer:
    """Stored chunks, by their keys."""
    page = request.page("document")
    front = await request.front()
    after = bodies.keys([page.after], "after")[0] if page.after else ""
    keys = await STORE.do(front.page, after, page.limit + 1, page.document)
    return page.of([{"object": "cacheblend.chunk", "id": key} for key in keys])


@_endpoint("DELETE", "/chunks/{id}")
async def delete_chunk(request: ServerRequest) -> Answer:
    """Forget a chunk."""
    [key] = bodies.keys([request.id()], "id")
    front = await request.front()
    gone = await STORE.do(lambda: front.forget_keys(front.owned([key])))
    return {"id": key, "object": "cacheblend.chunk", "deleted": gone > 0}


@_endpoint("POST", "/chunks/delete")
async def delete_chunks(request: ServerRequest) -> Answer:
    """Forget chunks by their keys or texts, or all but those of some texts."""
    body = await request.body()
    which = ("ids", "texts", "except_texts")
    bodies.only(body, which)
    name, front = bodies.one_of(body, which), await request.front()

    def forget() -> int:
        if name == "except_texts":
            kept = bodies.texts(body, name) if body[name] != [] else []
            return front.delete_except(kept)
        if name == "texts":
            return front.forget_keys(front.keys_of(bodies.texts(body)))
        return front.forget_keys(front.owned(bodies.keys(body[name], name)))

    return _deletion(await STORE.do(forget))


def _deletion(count: int) -> Answer:
    return {"object": "cacheblend.deletion", "deleted": count}


@_endpoint("POST", "/chunks/keys")
async def keys(request: ServerRequest) -> Answer:
    """The keys of texts, and whether these are stored."""
    body = await request.body()
    bodies.only(body, ("texts",))
    front = await request.front()
    found = await STORE.do(lambda: front.described(bodies.texts(body)))
    return {"object": "list", "data": found}


@_endpoint("POST", "/chunks/prefetch")
async def prefetch(request: ServerRequest) -> Answer:
    """Bring chunks nearer that will be wanted soon."""
    body = await request.body()
    bodies.only(body, ("texts",))
    front = await request.front()
    await STORE.do(lambda: front.prefetch(bodies.texts(body)))
    return 202, {"object": "cacheblend.prefetch"}


# ---- documents ---------------------------------------------------------------------------------


@_endpoint("POST", "/documents")
async def register(request: ServerRequest) -> Answer:
    """Note which chunks documents consist of."""
    body = await request.body()
    bodies.only(body, ("documents",))
    given, front = await OWN.do(bodies.registrations, body), await request.front()

    def note() -> None:
        front.register_documents({n: front.owned(k) for n, k in given.items()})

    await STORE.do(note)
    return {"object": "cacheblend.registration", "documents": len(given)}


@_endpoint("POST", "/documents/registered")
async def registered(request: ServerRequest) -> Answer:
    """Those of some documents that chunks are registered for."""
    body = await request.body()
    bodies.only(body, ("documents",))
    given, front = await OWN.do(bodies.documents, body), await request.front()
    found = await STORE.do(front.registered_documents, given)
    return {"object": "list", "data": await OWN.do(lambda: [n for n in given if n in found])}


@_endpoint("POST", "/documents/delete")
async def delete_documents(request: ServerRequest) -> Answer:
    """Forget the chunks of documents, but for what other documents have."""
    body = await request.body()
    bodies.only(body, ("documents", "only"))
    given, front = await OWN.do(bodies.documents, body), await request.front()
    few = body.get("only")
    if few is not None:
        few = await OWN.do(bodies.keys, few, "only")
    else:
        await _left_out(request, given)
    return _deletion(await STORE.do(front.forget_documents, given, few))


@_endpoint("GET", "/documents/{id:path}")
async def document(request: ServerRequest) -> Answer:
    """Whether chunks are registered for a document."""
    name, front = bodies.document(request.id(), "id"), await request.front()
    if not await STORE.do(front.registered_documents, [name]):
        raise not_found("document", name)
    return {"id": name, "object": "cacheblend.document", "registered": True}


@_endpoint("DELETE", "/documents/{id:path}")
async def delete_document(request: ServerRequest) -> Answer:
    """Forget a document's chunks, but for what other documents have."""
    name, front = bodies.document(request.id(), "id"), await request.front()
    await _left_out(request, [name])

    def forget() -> tuple[bool, int]:
        there = bool(front.registered_documents([name]))
        return there, front.forget_documents([name])

    there, count = await STORE.do(forget)
    return {"id": name, "object": "cacheblend.document", "deleted": there, "chunks": count}


async def _left_out(request: ServerRequest, documents: Sequence[str]) -> None:
    """Have ingestions that were acknowledged leave out these documents. What they are at is stored
    when this returns, so that it can be forgotten.
    """
    jobs, until = request.service.jobs, time.monotonic() + _MOST_WAIT_S
    before = await OWN.do(jobs.delete_documents, request.owner, documents)
    while before is not None and before == await OWN.do(jobs.under_way, request.owner):
        if request.service.engine.is_dead or time.monotonic() > until:
            raise HttpError(
                503,
                "an ingestion is under way and does not get on; try again",
                code="ingestion_in_progress",
                retry_after_s=1,
            )
        await asyncio.sleep(_WAITS_S)


# ---- requests ----------------------------------------------------------------------------------


@_endpoint("GET", "/requests/{id:path}")
async def report(request: ServerRequest) -> Answer:
    """What was done for a request, by the id of its answer."""
    query = dict(request.http.query_params)
    bodies.only(query, ("index",), "the query")
    front, name = await request.front(), request.id()
    found = await STORE.do(front.reports, name)
    number = bodies.whole_number(query.get("index", "0"))
    if number is None or number >= max(1, len(found)):
        last = f"there are {len(found)} reports; index begins at 0"
        raise HttpError(400, f"index is {query['index']!r:.80}: {last}", param="index")
    if not found:
        raise HttpError(404, f"nothing is known of a request {name!r} (any more)", param="id")
    one = found[number]
    return {"object": "cacheblend.report", "id": name, "reports": len(found), **one}


@_endpoint("POST", "/tokenize")
async def tokenize(request: ServerRequest) -> Answer:
    """The token ids that a prompt is computed as."""
    body = await request.body()
    bodies.only(body, ("prompt", "chat_template_kwargs", *TOOL_OPTIONS))
    front, arguments = await request.front(), body.get("chat_template_kwargs")
    if "prompt" not in body:
        raise HttpError(400, "prompt is missing", param="prompt")
    if arguments is not None and not isinstance(arguments, dict):
        raise ConfigError("chat_template_kwargs must be an object")

    def ids() -> list[int]:
        tools = cast(ToolOptions, {name: body[name] for name in TOOL_OPTIONS if name in body})
        return list(front.tokenize(body["prompt"], chat_template_kwargs=arguments, **tools))

    return {"object": "cacheblend.prompt", "token_ids": await OWN.do(ids)}
