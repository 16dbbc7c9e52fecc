"""Whose a request is: API keys, or a header of a trusted proxy, to namespaces.

A tenant's requests carry the name of a space that only the server knows, and a salt of vLLM's
prefix cache. Both stand in the body before vLLM reads it. What can't carry them is refused.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import secrets
import tomllib
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cacheblend_rag.errors import ConfigError
from cacheblend_rag.plan import PARAMS_KEY
from cacheblend_rag.salts import tenant_salt
from cacheblend_rag.server.bodies import parsed
from cacheblend_rag.server.errors import HttpError, or_answer
from cacheblend_rag.server.page import PAGE
from cacheblend_rag.server.reading import read

PREFIX = "/v1/cacheblend"
OPEN = {"/health", "/ping", "/metrics", "/version", "/load", "/docs", "/openapi.json", *PAGE}
_PLAIN = {("GET", "/v1/models"), ("POST", "/tokenize"), ("POST", "/detokenize")}
MESSAGES = "/v1/messages"
ANSWERS = frozenset({"/v1/chat/completions", "/v1/completions", "/v1/responses", MESSAGES})
# Answers that vLLM keeps, for whoever asks; and what a connector fetches, from whoever has it.
_REFUSED = ("previous_response_id", "background", "ec_transfer_params")
_SERVERS = ("space", "request_id", "handed_over")  # in our part of kv_transfer_params

Ensure = Callable[[str], Awaitable[str]]  # opens a namespace's space and returns its secret name


class KeyFile:
    """TOML: a namespace for each API key, or for ``sha256:`` and the key's digest."""

    def __init__(self, path: str) -> None:
        try:
            given = tomllib.loads(Path(path).expanduser().read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"the file of tenants {path!r} can't be read: {error}") from error
        self._namespaces = _digests(given, path)

    def of(self, key: str) -> str | None:
        """The namespace of an API key; None where it has none."""
        asked, found = hashlib.sha256(key.encode()).digest(), None
        for digest, namespace in self._namespaces.items():
            if secrets.compare_digest(asked, digest):
                found = namespace
        return found


def _digests(given: Mapping[str, Any], path: str) -> dict[bytes, str]:
    found = dict[bytes, str]()
    for key, namespace in given.items():
        if not isinstance(namespace, str) or not (namespace and key.strip()):
            raise ConfigError(f'{path!r}: a line is "API key" = "namespace", both not empty')
        digest = _digest(key, path)
        if digest in found:
            raise ConfigError(f"{path!r}: two lines have the same API key, one as its sha256")
        found[digest] = namespace
    if not found:
        raise ConfigError(f'{path!r} has no line "API key" = "namespace"')
    return found


def _digest(key: str, path: str) -> bytes:
    if not key.startswith("sha256:"):
        return hashlib.sha256(key.encode()).digest()
    try:
        digest = bytes.fromhex(key.removeprefix("sha256:"))
    except ValueError:
        digest = b""
    if len(digest) != 32:
        raise ConfigError(f"{path!r}: write 64 hexadecimal digits after sha256:")
    return digest


class Who:
    """Tells whose a request is, by its headers."""

    def __init__(self, keys: KeyFile | None, header: str | None) -> None:
        self._keys, self._header = keys, header

    def of(self, headers: Headers) -> str:
        """The namespace.

        Raises:
            HttpError: 401: it isn't known.
        """
        if self._keys is None:
            given = [value.strip() for value in headers.getlist(str(self._header))]
            if len(given) > 1:  # a proxy that adds its own behind that of a client
                raise HttpError(401, f"{self._header} came more than once; the proxy must set it")
            if not given or not given[0]:
                raise HttpError(401, f"the proxy gave no {self._header} header")
            return given[0]
        scheme, _, key = headers.get("Authorization", "").partition(" ")
        found = self._keys.of(key.strip()) if scheme.lower() == "bearer" else None
        if found is None:
            raise HttpError(401, "give one of this server's API keys: Authorization: Bearer ...")
        return found


class TenantMiddleware:
    """ASGI. What follows finds the namespace in ``scope["state"]["cacheblend_namespace"]``.

    Args:
        ensure: see ``Ensure``.
        max_body: bytes of a body that is read here.
        answers: paths that answer prompts, and keep the prefix caches of salts apart.
    """

    def __init__(
        self,
        app: ASGIApp,
        who: Who,
        ensure: Ensure,
        max_body: int,
        answers: frozenset[str] = ANSWERS,
    ) -> None:
        self._app, self._who, self._ensure, self._max_body = app, who, ensure, max_body
        self._answers = answers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or _is_open(scope):
            return await self._app(scope, receive, send)
        if scope["type"] == "websocket":
            return await send({"type": "websocket.close", "code": 1008})
        entered = await or_answer(self._entered(scope, receive))
        if isinstance(entered, Response):
            return await entered(scope, receive, send)
        return await self._app(scope, entered, send)

    async def _entered(self, scope: Scope, receive: Receive) -> Receive:
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        namespace = self._who.of(Headers(scope=scope))
        scope.setdefault("state", {})["cacheblend_namespace"] = namespace
        if path == PREFIX or path.startswith(f"{PREFIX}/") or (scope["method"], path) in _PLAIN:
            return receive
        if scope["method"] != "POST" or path not in self._answers:
            raise HttpError(403, f"{scope['method']} {path} is not served to tenants")
        given = await read(receive, Headers(scope=scope), self._max_body)
        body = await asyncio.to_thread(parsed, given)
        space = await self._ensure(namespace)
        raw = await asyncio.to_thread(lambda: json.dumps(entered(body, namespace, space)).encode())
        _set_length(scope, len(raw))
        return _replayed(raw, receive)


def entered(body: dict[str, Any], namespace: str, space: str) -> dict[str, Any]:
    """The body of a tenant's request for an answer.

    Raises:
        HttpError: 400: it says itself what the server has to say.
    """
    for name in _REFUSED:
        if body.get(name):
            raise HttpError(400, f"{name} is not served to tenants; leave it out", param=name)
    params = _table(body.get("kv_transfer_params"), "kv_transfer_params")
    ours = _table(params.get(PARAMS_KEY), f"kv_transfer_params.{PARAMS_KEY}")
    for name in sorted(params.keys() - {PARAMS_KEY}):
        at = f"kv_transfer_params.{name}"
        raise HttpError(
            400,
            f"{at} is not served to tenants: to another connector it can name KV of others. Leave "
            f"all but kv_transfer_params.{PARAMS_KEY} out",
            param=at,
        )
    for name in _SERVERS:
        if name in ours:
            at = f"kv_transfer_params.{PARAMS_KEY}.{name}"
            raise HttpError(400, f"{at} is not for clients; leave it out", param=at)
    return {
        **body,
        "kv_transfer_params": {PARAMS_KEY: {**ours, "space": space}},
        "cache_salt": salt(space, body.get("cache_salt")),
    }


def salt(space: str, own: object) -> str:
    """Of vLLM's prefix cache: a tenant's, and within it the client's own.

    Raises:
        HttpError: 400: the client's is no text.
    """
    if own is not None and not (isinstance(own, str) and own):
        raise HttpError(400, "cache_salt must be a text that is not empty", param="cache_salt")
    return tenant_salt(space, own)


def _table(value: object, where: str) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise HttpError(400, f"{where} must be an object", param=where)
    return value


def _is_open(scope: Scope) -> bool:
    """Whether anybody may ask: what says nothing of any tenant, and what browsers ask ahead."""
    if scope["type"] != "http":
        return False
    path = scope["path"].removeprefix(scope.get("root_path", ""))
    return scope["method"] == "OPTIONS" or (scope["method"] in ("GET", "HEAD") and path in OPEN)


def _set_length(scope: Scope, length: int) -> None:
    kept = [pair for pair in scope["headers"] if pair[0] not in _FRAMING]
    scope["headers"] = [*kept, (b"content-length", str(length).encode())]


_FRAMING = (b"content-length", b"transfer-encoding")


def _replayed(raw: bytes, receive: Receive) -> Receive:
    """Gives the body once; then what the client does."""
    first: list[Message] = [{"type": "http.request", "body": raw, "more_body": False}]

    async def again() -> Message:
        return first.pop() if first else await receive()

    return again
