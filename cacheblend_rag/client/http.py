"""One connection to a server, for all threads and event loops: keys, retries, errors of ours."""

from __future__ import annotations

import asyncio
import json
import math
import os
import ssl
import threading
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from functools import cache
from typing import Any

import httpx

from cacheblend_rag._version import __version__
from cacheblend_rag.client.failures import RETRIES, pause, refusal, unreachable
from cacheblend_rag.errors import ClosedError, ConfigError, ServerError

BASE = "/v1/cacheblend"
COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
_JSON = {"content-type": "application/json"}
_CONNECT_S = 10.0
# vLLM closes a connection that was idle for 5 s: ours end before, and none is used while it closes
_IDLE_S = 2.0


class Connection:
    """Safe to use from several threads, event loops and forked processes.

    Args:
        url: of the server, with or without ``/v1``.
        api_key: sent as a bearer token.
        timeout: seconds without a word from the server until a call fails.
        retries: how often a call is tried again at most.
    """

    def __init__(
        self, url: str, api_key: str | None, timeout: float, retries: int = RETRIES
    ) -> None:
        self.url, self.timeout = base_url(url), checked_timeout(timeout)
        self.api_key, self.retries = api_key, checked_retries(retries)
        self._closed, self._lock = False, threading.Lock()
        self._client: httpx.Client | None = None
        self._pid = 0

    def call(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        params: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
        safe: bool | None = None,
        absent: bool = False,
    ) -> Any:
        """One call; the response's JSON.

        Args:
            method, path: of HTTP.
            body: JSON.
            params: of the query.
            headers: in addition to the usual ones.
            safe: whether it may be done twice; None: by the method, as HTTP has it.
            absent: None is returned for what is not there (404).

        Raises:
            CacheBlendError: it failed; see ``failures``.
        """
        safe = method in ("GET", "PUT", "DELETE") if safe is None else safe
        request = self._http().build_request(
            method,
            path,
            params=params,
            content=_content(body),
            headers={**_JSON, **(headers or {})},
        )
        response = self._send(request, safe=safe, stream=False)
        if absent and response.status_code == 404:
            return None
        if not response.is_success:
            raise refusal(response, self.url, path, self.api_key is not None)
        return _json(response, self.url)

    def open(self, body: Mapping[str, Any]) -> httpx.Response:
        """Ask for a streamed answer; close what comes."""
        path = _endpoint(body)
        request = self._http().build_request("POST", path, content=_content(body), headers=_JSON)
        response = self._send(request, safe=False, stream=True)
        if not response.is_success:
            try:
                response.read()
            finally:
                response.close()
            raise refusal(response, self.url, path, self.api_key is not None)
        return response

    @asynccontextmanager
    async def aopen(self, body: Mapping[str, Any]) -> AsyncIterator[httpx.Response]:
        """``open`` for an event loop, over a connection of its own: pools belong to one loop."""
        self.check_open()
        async with httpx.AsyncClient(**self._settings(), verify=_tls(self.url)) as client:
            path = _endpoint(body)
            request = client.build_request("POST", path, content=_content(body), headers=_JSON)
            response = await self._asend(client, request)
            try:
                if not response.is_success:
                    await response.aread()
                    raise refusal(response, self.url, path, self.api_key is not None)
                yield response
            finally:
                await response.aclose()

    def broke(self, error: httpx.TransportError) -> ServerError:
        """The error for a response that ended early."""
        return unreachable(self.url, error, self.timeout)

    def close(self) -> None:
        """Close what is open; does nothing on the second call."""
        with self._lock:
            self._closed = True
            client, self._client = self._client, None
        if client is not None and self._pid == os.getpid():
            client.close()

    # ---- inside --------------------------------------------------------------------------------

    def _http(self) -> httpx.Client:
        """The pool of this process: a forked child must not use its parent's connections."""
        self.check_open()
        with self._lock:
            if self._client is None or self._pid != os.getpid():
                limits = httpx.Limits(keepalive_expiry=_IDLE_S)
                self._client = httpx.Client(
                    **self._settings(), limits=limits, verify=_tls(self.url)
                )
                self._pid = os.getpid()
            return self._client

    def check_open(self) -> None:
        """Raise ClosedError after ``close``."""
        if self._closed:
            raise ClosedError("this CacheBlend was closed; connect anew")

    def _settings(self) -> dict[str, Any]:
        headers = {"user-agent": f"cacheblend-rag/{__version__}"}
        if self.api_key is not None:
            headers["authorization"] = f"Bearer {self.api_key}"
        timeout = httpx.Timeout(self.timeout, connect=min(_CONNECT_S, self.timeout))
        return {"base_url": self.url, "headers": headers, "timeout": timeout}

    def _send(self, request: httpx.Request, *, safe: bool, stream: bool) -> httpx.Response:
        attempt = 0
        while True:
            wait, response = self._try(request, attempt, safe, stream)
            if wait is None:
                assert response is not None
                return response
            time.sleep(wait)
            attempt += 1

    def _try(
        self, request: httpx.Request, attempt: int, safe: bool, stream: bool
    ) -> tuple[float | None, httpx.Response | None]:
        """Seconds until the next try, or the response."""
        try:
            response = self._http().send(request, stream=stream)
        except httpx.TransportError as error:
            if (wait := pause(attempt, error, safe, self.retries)) is None:
                raise self.broke(error) from error
            return wait, None
        if response.is_success or (wait := pause(attempt, response, safe, self.retries)) is None:
            return None, response
        response.close()
        return wait, None

    async def _asend(self, client: httpx.AsyncClient, request: httpx.Request) -> httpx.Response:
        attempt = 0
        while True:
            try:
                response = await client.send(request, stream=True)
            except httpx.TransportError as error:
                if (wait := pause(attempt, error, False, self.retries)) is None:
                    raise self.broke(error) from error
            else:
                if response.is_success:
                    return response
                if (wait := pause(attempt, response, False, self.retries)) is None:
                    return response
                await response.aclose()
            await asyncio.sleep(wait)
            attempt += 1


def base_url(url: str) -> str:
    """``url`` without a final slash or ``/v1``, which OpenAI's clients want.

    Raises:
        ConfigError: no URL of a server.
    """
    try:
        parsed = httpx.URL(url)
    except (httpx.InvalidURL, TypeError) as error:
        raise ConfigError(f"{url!r} is no URL; pass one such as http://localhost:8000") from error
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise ConfigError(
            f"{url!r} is no URL of a server; it begins with http:// or https://, such as "
            "http://localhost:8000"
        )
    if parsed.userinfo or parsed.query or parsed.fragment:
        raise ConfigError(
            "the server's URL holds more than host, port and path; pass a key as api_key"
        )
    return str(parsed).rstrip("/").removesuffix("/v1").rstrip("/")


def checked_timeout(seconds: object) -> float:
    """``seconds`` themselves.

    Raises:
        ConfigError: no positive number.
    """
    is_number = isinstance(seconds, int | float) and not isinstance(seconds, bool)
    if not is_number or not math.isfinite(seconds) or seconds <= 0:  # type: ignore[arg-type,operator]
        raise ConfigError(f"timeout is {seconds!r}; it must be a number of seconds above 0")
    return float(seconds)  # type: ignore[arg-type]


def checked_retries(number: object) -> int:
    """``number`` itself.

    Raises:
        ConfigError: no whole number of 0 or more.
    """
    if isinstance(number, bool) or not isinstance(number, int) or number < 0:
        raise ConfigError(f"max_retries is {number!r}; it must be a whole number of 0 or more")
    return number


def _content(body: Any) -> bytes | None:
    """``body`` as JSON in ASCII: half a character, say, can't break it.

    Raises:
        ConfigError: something in it is no JSON.
    """
    if body is None:
        return None
    try:
        return json.dumps(body, allow_nan=False, separators=(",", ":")).encode()
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"a value can't be sent to a server: {error}. Pass numbers, texts, lists and dicts"
        ) from error


def _endpoint(body: Mapping[str, Any]) -> str:
    """The one of vLLM's that an answer is asked of."""
    return CHAT if "messages" in body else COMPLETIONS


def _json(response: httpx.Response, url: str) -> Any:
    try:
        return response.json()
    except ValueError as error:
        begin = response.text[:80]
        raise ServerError(
            f"{url} answered something that is no JSON ({begin!r}). Is it cacheblend serve, or "
            "something before it?"
        ) from error


def _tls(url: str) -> ssl.SSLContext | bool:
    """The certificates that servers are checked by. They are loaded once, which takes time."""
    return _certificates() if url.startswith("https:") else False


@cache
def _certificates() -> ssl.SSLContext:
    return httpx.create_ssl_context()
