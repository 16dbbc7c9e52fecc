"""A server with the endpoints of ``cacheblend serve``, over a ``CacheBlend`` in this process.

With a fake engine below, what comes over HTTP can be held against what comes without it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Iterator
from dataclasses import fields
from typing import Any, NamedTuple

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from servers import free_port

from cacheblend_rag import BlendConfig, CacheBlend, CacheBlendError
from cacheblend_rag.client.requests import _DEFAULTS, SAMPLING
from cacheblend_rag.engine.start import sampling_params
from cacheblend_rag.options import PER_CALL, TOOL_OPTIONS
from cacheblend_rag.server.errors import as_http
from cacheblend_rag.server.page import page_router
from cacheblend_rag.store.registry import DocumentRegistry
from cacheblend_rag.store.url import redacted


class Fault(NamedTuple):
    """What the next call of a path gets in place of an answer."""

    status: int = 503
    body: Any = None
    headers: dict[str, str] = {}  # noqa: RUF012
    delay_s: float = 0.0
    hangs_up: bool = False


class FakeServer:
    """Attributes: what tests set, and what they look at."""

    def __init__(self, blend: CacheBlend) -> None:
        self.blend = blend
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._number = 0
        self.reset()

    def reset(self) -> None:
        """As at the start; nothing is stored."""
        self.blend.forget_keys(self.blend.stored())
        engine: Any = self.blend.engine
        engine.notes = DocumentRegistry()
        self.api_key: str | None = None
        self.is_plain_vllm = False
        self.faults: dict[str, deque[Fault]] = {}  # by the end of a path
        self.slow: dict[str, float] = {}  # seconds, by a part of a path
        self.calls: list[tuple[str, str]] = []
        self.bodies: list[dict[str, Any]] = []  # of completions
        self.jobs: dict[str, dict[str, Any]] = {}
        self.by_idempotency: dict[str, str] = {}
        self.job_s = 0.0  # that a job takes
        self.fail_job: dict[str, Any] | None = None
        self.reports: dict[str, dict[str, Any]] = {}
        self.pause_s = 0.0  # between the tokens of an answer
        self.breaks_after: int | None = None  # pieces of an answer
        self.left_early = 0  # answers whose client went away

    def next(self, path: str, *faults: Fault) -> None:
        """The next calls whose path ends in ``path`` get these."""
        self.faults.setdefault(path, deque()).extend(faults)

    def count(self, method: str, path: str) -> int:
        return sum(m == method and p.endswith(path) for m, p in self.calls)

    def name(self, kind: str) -> str:
        self._number += 1
        return f"{kind}{self._number}"


def error(status: int, message: str, param: str | None = None, kind: str = "BadRequest") -> Any:
    body = {"message": message, "type": kind, "param": param, "code": status}
    return JSONResponse({"error": body}, status)


def app_of(server: FakeServer) -> FastAPI:
    """Its endpoints."""
    app = FastAPI(openapi_url=None)
    _add_refusals(app, server)
    _add_state(app, server)
    app.include_router(page_router())
    _add_ingestions(app, server)
    _add_chunks(app, server)
    _add_documents(app, server)
    _add_answers(app, server)
    _add_prompts(app, server)
    return app


def _add_refusals(app: FastAPI, server: FakeServer) -> None:
    """Keys, planned faults and errors, before any endpoint."""

    @app.middleware("http")
    async def before(request: Request, go_on: Any) -> Response:
        path = request.url.path
        server.calls.append((request.method, path))
        wanted = f"Bearer {server.api_key}"
        if (
            server.api_key
            and path.startswith("/v1")
            and request.headers.get("authorization") != wanted
        ):
            return JSONResponse({"error": "Unauthorized"}, 401)
        if server.is_plain_vllm and path.startswith("/v1/cacheblend"):
            return error(404, "Not Found", kind="NotFoundError")
        await asyncio.sleep(
            max((s for p, s in server.slow.items() if p in path.split("/")), default=0)
        )
        for end, faults in server.faults.items():
            if path.endswith(end) and faults:
                return await _fault(faults.popleft())
        return await go_on(request)  # type: ignore[no-any-return]

    @app.exception_handler(CacheBlendError)
    def refused(_: Request, failed: CacheBlendError) -> Response:
        known = as_http(failed)
        return JSONResponse(known.body(), known.status, known.headers())


def _add_state(app: FastAPI, server: FakeServer) -> None:
    """What the server says of itself."""
    blend = server.blend

    @app.get("/v1/cacheblend")
    def state() -> Any:
        config = {f.name: getattr(blend.config, f.name) for f in fields(BlendConfig)}
        config = {n: dict(v) if hasattr(v, "items") else v for n, v in config.items()}
        config["store"] = redacted(blend.config.store)
        model_check = blend.model_check
        blending = {
            "on": model_check.passed,
            "reason": model_check.reason,
            "detail": model_check.detail,
        }
        stats = blend.stats()
        return {
            "object": "cacheblend.state",
            "version": "0",
            "vllm_version": blend.info.vllm_version,
            "model": str(blend.info.model),
            "max_model_len": blend.info.max_model_len,
            "block_size": blend.info.block_size,
            "fingerprint": blend.info.fingerprint,
            "namespace": blend.config.namespace,
            "blending": {**blending, "proving": False},
            "parsers": blend.parsers._asdict(),
            "config": config,
            "chunks": len(blend.stored()),
            "store": stats[0] if stats else {},
            "store_error": None,
        }

    @app.get("/v1/models")
    def models() -> Any:
        own = {"id": "served-name", "parent": None}
        return {"data": [own, {"id": "an-adapter", "parent": "served-name"}]}

    @app.get("/openapi.json", include_in_schema=False)
    def schema() -> Any:
        return {
            "components": {"schemas": {"CompletionRequest": {"properties": {"watermarking": 1}}}}
        }


async def _fault(fault: Fault) -> Response:
    await asyncio.sleep(fault.delay_s)
    if fault.hangs_up:

        async def nothing() -> AsyncIterator[bytes]:
            yield b"{"
            raise OSError("hung up")

        return StreamingResponse(nothing(), headers={"content-length": "100"})
    if isinstance(fault.body, str):
        return Response(fault.body, fault.status, fault.headers)
    body = fault.body or {"error": {"message": "not now", "type": "x", "code": fault.status}}
    return JSONResponse(body, fault.status, fault.headers)


def _add_ingestions(app: FastAPI, server: FakeServer) -> None:
    blend = server.blend

    @app.post("/v1/cacheblend/ingestions")
    async def ingest(request: Request) -> Any:
        key = request.headers.get("idempotency-key", server.name("key"))
        if key not in server.by_idempotency:
            body = await request.json()
            rows = [c if isinstance(c, dict) else {"text": c} for c in body["chunks"]]
            before = [row.get("left_context") for row in rows]
            report = blend.ingest(
                [row["text"] for row in rows],
                left_context=before if any(before) else None,
                documents=[row.get("document") for row in rows],
                progress=False,
            )
            name = server.by_idempotency[key] = server.name("ing_")
            server.jobs[name] = {"report": report, "until": time.monotonic() + server.job_s}
        return JSONResponse(_job(server, server.by_idempotency[key]), 202)

    @app.get("/v1/cacheblend/ingestions/{name}")
    def job(name: str) -> Any:
        return _job(server, name)

    @app.post("/v1/cacheblend/ingestions/{name}/cancel")
    def cancel(name: str) -> Any:
        server.jobs[name]["cancelled"] = True
        return _job(server, name)


def _add_chunks(app: FastAPI, server: FakeServer) -> None:
    blend = server.blend

    @app.get("/v1/cacheblend/chunks")
    def listed(limit: int = 20, after: str = "") -> Any:
        keys = [key for key in sorted(blend.stored()) if key > after]
        data = [{"object": "cacheblend.chunk", "id": key} for key in keys[:limit]]
        last = data[-1]["id"] if data else None
        return {"object": "list", "data": data, "has_more": len(keys) > limit, "last_id": last}

    @app.post("/v1/cacheblend/chunks/delete")
    async def delete(request: Request) -> Any:
        [(kind, rows)] = (await request.json()).items()
        if kind == "ids":
            deleted = blend.forget_keys(rows)
        elif kind == "texts":
            deleted = blend.forget_keys(map(blend.key, rows))
        else:
            deleted = blend.delete_except(rows)
        return {"object": "cacheblend.deletion", "deleted": deleted}

    @app.post("/v1/cacheblend/chunks/keys")
    async def keys(request: Request) -> Any:
        there = blend.stored()
        names = [blend.key(text) for text in (await request.json())["texts"]]
        return {"data": [{"id": n, "tokens": 1, "stored": n in there} for n in names]}

    @app.post("/v1/cacheblend/chunks/prefetch", status_code=202)
    async def prefetch(request: Request) -> Any:
        blend.prefetch((await request.json())["texts"])
        return {"object": "cacheblend.prefetch"}


def _job(server: FakeServer, name: str) -> dict[str, Any]:
    job = server.jobs[name]
    report, left = job["report"], max(0.0, job["until"] - time.monotonic())
    status = "in_progress" if left else "completed"
    if server.fail_job and not left:
        status = "failed"
    status = "cancelled" if job.get("cancelled") else status
    names = ("computed", "present", "repeated", "too_short", "too_long")
    counts = {n: getattr(report, n) for n in names}
    remaining = round(report.chunks * left / server.job_s) if server.job_s else 0
    more = {"total": report.chunks, "remaining": remaining, "not_stored": len(report.not_stored)}
    return {
        "id": name,
        "object": "cacheblend.ingestion",
        "status": status,
        "counts": {**counts, **more},
        "tokens": report.tokens,
        "bytes": report.bytes,
        "keys": list(report.keys) if status == "completed" or report.not_stored else None,
        "error": server.fail_job,
        "reason": report.reason,
        "detail": report.detail,
    }


def _add_documents(app: FastAPI, server: FakeServer) -> None:
    blend = server.blend

    @app.post("/v1/cacheblend/documents")
    async def register(request: Request) -> Any:
        documents = (await request.json())["documents"]
        blend.register_documents(documents)
        return {"object": "cacheblend.registration", "documents": len(documents)}

    @app.post("/v1/cacheblend/documents/registered")
    async def registered(request: Request) -> Any:
        names = (await request.json())["documents"]
        return {"object": "list", "data": sorted(blend.registered_documents(names))}

    @app.post("/v1/cacheblend/documents/delete")
    async def delete(request: Request) -> Any:
        body = await request.json()
        deleted = blend.forget_documents(body["documents"], body.get("only"))
        return {"object": "cacheblend.deletion", "deleted": deleted}


def _add_prompts(app: FastAPI, server: FakeServer) -> None:
    blend = server.blend

    @app.post("/v1/cacheblend/tokenize")
    async def prompt(request: Request) -> Any:
        body = await request.json()
        given = body.get("chat_template_kwargs") or {}
        tools: Any = {name: body[name] for name in TOOL_OPTIONS if name in body}
        ids = blend.tokenize(body["prompt"], chat_template_kwargs=given, **tools)
        return {"object": "cacheblend.prompt", "token_ids": ids}

    @app.post("/tokenize")
    async def tokenize(request: Request) -> Any:
        body = await request.json()
        ids = blend.tokenizer.encode(body["prompt"], add_special_tokens=body["add_special_tokens"])
        return {"tokens": ids, "count": len(ids)}

    @app.post("/detokenize")
    async def detokenize(request: Request) -> Any:
        return {"prompt": blend.tokenizer.decode((await request.json())["tokens"])}


def _add_answers(app: FastAPI, server: FakeServer) -> None:
    blend = server.blend

    @app.get("/v1/cacheblend/requests/{name}")
    def report(name: str) -> Any:
        if name not in server.reports:
            return error(404, f"no request {name} is known", kind="NotFoundError")
        return {"object": "cacheblend.report", "id": name, **server.reports[name]}

    @app.post("/v1/completions")
    async def completions(request: Request) -> Any:
        body = await request.json()
        server.bodies.append(body)
        ours = (body.get("kv_transfer_params") or {}).get("cacheblend", {})
        assert ours.keys() <= set(PER_CALL)
        # our client names vLLM's defaults, which an engine without a server takes without a word
        sampling = {n: v for n, v in body.items() if n in SAMPLING and _DEFAULTS.get(n) != v}
        stream = blend.astream(body["prompt"], **ours, **sampling)
        sampling_params(sampling, None)  # vLLM refuses values before it streams
        name = server.name("cmpl-")
        return StreamingResponse(_answer(server, name, stream), media_type="text/event-stream")

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Any:
        """As vLLM has it: what a parser found is in the deltas, the first of which says only whose
        turn it is.
        """
        body = await request.json()
        server.bodies.append(body)
        ours = (body.get("kv_transfer_params") or {}).get("cacheblend", {})
        names = (*SAMPLING - {"logprobs"}, *TOOL_OPTIONS, "chat_template_kwargs")
        given = {n: v for n, v in body.items() if n in names and _DEFAULTS.get(n) != v}
        if body.get("logprobs"):
            given["logprobs"] = body["top_logprobs"]
        stream = blend.astream(body["messages"], **ours, **given)
        name = server.name("chatcmpl-")
        return StreamingResponse(_answer(server, name, stream, chat=True))


def _delta(piece: Any) -> dict[str, Any]:
    calls = [
        {
            "index": call.number,
            "id": call.id,
            "type": "function",
            "function": {"name": call.name, "arguments": call.arguments},
        }
        for call in piece.tool_calls
    ]
    delta = {"content": piece.text or None, "reasoning": piece.reasoning or None}
    return {n: v for n, v in {**delta, "tool_calls": calls}.items() if v}


def _chat_logprobs(piece: Any) -> dict[str, Any]:
    both = zip(piece.token_ids, piece.logprobs, strict=True)
    return {
        "content": [
            {
                "token": f"token_id:{token}",
                "logprob": row[token],
                "top_logprobs": [{"token": f"token_id:{t}", "logprob": v} for t, v in row.items()],
            }
            for token, row in both
        ]
    }


async def _answer(
    server: FakeServer, name: str, stream: Any, *, chat: bool = False
) -> AsyncIterator[str]:
    number = 0
    try:
        async for text in stream:
            if server.breaks_after == number:
                return
            piece, number = stream.pieces[-1], number + 1
            choice = {
                "index": 0,
                "text": text,
                "token_ids": list(piece.token_ids),
                "finish_reason": piece.finish_reason,
                "stop_reason": piece.stop_reason,
            }
            if chat:
                if number == 1:
                    first = {"index": 0, "delta": {"role": "assistant", "content": ""}}
                    ids = list(stream._begun.finish.args[0].request.token_ids)
                    event = {"id": name, "choices": [first], "prompt_token_ids": ids}
                    yield f"data: {json.dumps(event)}\n\n"
                choice = {**choice, "delta": _delta(piece)}
                del choice["text"]
                if piece.logprobs:
                    choice["logprobs"] = _chat_logprobs(piece)
            elif piece.logprobs:
                rows = [{f"token_id:{t}": v for t, v in row.items()} for row in piece.logprobs]
                choice["logprobs"] = {"top_logprobs": rows}
            if piece.finish_reason is not None:
                server.reports[name] = stream.result.report.to_dict()
            yield f"data: {json.dumps({'id': name, 'choices': [choice]}, ensure_ascii=False)}\n\n"
            await asyncio.sleep(server.pause_s)
        yield "data: [DONE]\n\n"
    except asyncio.CancelledError:
        server.left_early += 1
        raise
    except CacheBlendError as failed:
        yield f"data: {json.dumps({'error': {'message': str(failed), 'code': 500}})}\n\n"


@contextlib.contextmanager
def serving(blend: CacheBlend) -> Iterator[FakeServer]:
    """A fake server over ``blend`` for as long as the block runs."""
    server = FakeServer(blend)
    config = uvicorn.Config(app_of(server), port=server.port, log_level="critical", lifespan="off")
    runner = uvicorn.Server(config)
    thread = threading.Thread(target=runner.run, daemon=True)
    thread.start()
    while not runner.started:
        time.sleep(0.01)
    try:
        yield server
    finally:
        runner.should_exit = True
        thread.join(10)
