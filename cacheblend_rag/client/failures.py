"""What a failed call means: which error of ours it is, and whether it is tried again. Pure."""

from __future__ import annotations

import email.utils
import json
import random
import time
from collections.abc import Mapping
from typing import Any

import httpx

from cacheblend_rag.errors import (
    CacheBlendError,
    ConfigError,
    EmptyTextError,
    EngineDeadError,
    EngineError,
    PromptError,
    PromptTooLongError,
    ServerError,
    StoreError,
    UnavailableError,
)

STATE = "/v1/cacheblend"  # what every server of ours answers
RETRIES = 2
LONGEST_WAIT_S = 30.0  # that a server may ask for with Retry-After
_FIRST_WAIT_S = 0.25
_NOT_SENT = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout)
_GATEWAY = (502, 503, 504)
# fields of a request that hold text or token ids, or are counted in tokens
_TEXT = ("prompt", "messages", "input", "input_tokens", "chunks", "texts", "text", "left_context")

_BY_CODE: Mapping[str, type[CacheBlendError]] = {  # those of our endpoints
    "empty_text": EmptyTextError,
    "engine_failed": EngineError,
    "engine_unavailable": EngineDeadError,
    "ingestion_failed": StoreError,
    "invalid_chunk": PromptError,
    "invalid_option": ConfigError,
    "invalid_text": PromptError,
    "prompt_too_long": PromptTooLongError,
    "state_unavailable": ServerError,
    "store_unavailable": UnavailableError,
}


def pause(
    attempt: int,
    failed: httpx.Response | httpx.TransportError,
    safe: bool,
    retries: int = RETRIES,
) -> float | None:
    """Seconds until a call is tried again; None: not at all.

    A call that never reached the server, or that it declined for now (429), did nothing. Any other
    may have done something, and only what does no harm when done twice is tried again.

    Args:
        attempt: 0 for the first.
        failed: how it failed.
        safe: whether doing it twice does no harm.
        retries: how often it is tried again at most.
    """
    if attempt >= retries or not _may_retry(failed, safe):
        return None
    wait = min(_FIRST_WAIT_S * 3**attempt * random.uniform(0.8, 1.2), LONGEST_WAIT_S)
    if isinstance(failed, httpx.Response):
        asked = retry_after(failed.headers.get("retry-after"), time.time())
        wait = wait if asked is None else asked
    return wait if wait <= LONGEST_WAIT_S else None


def _may_retry(failed: httpx.Response | httpx.TransportError, safe: bool) -> bool:
    if isinstance(failed, httpx.Response):
        return failed.status_code == 429 or (safe and failed.status_code in _GATEWAY)
    broken = safe and not isinstance(failed, httpx.TimeoutException)
    return isinstance(failed, _NOT_SENT) or broken


def retry_after(header: str | None, now: float) -> float | None:
    """Seconds from a Retry-After header, which has seconds or a date; None where it has neither."""
    if header is None:
        return None
    if header.strip().isdigit():
        return float(header)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(header).timestamp() - now)
    except ValueError:
        return None


def unreachable(url: str, error: httpx.TransportError, timeout: float) -> ServerError:
    """The error for a call that brought no response."""
    if isinstance(error, _NOT_SENT):
        return ServerError(
            f"no server answers at {url} ({error}). Start one with: cacheblend serve MODEL; or "
            "check host and port"
        )
    if isinstance(error, httpx.TimeoutException):
        return ServerError(
            f"{url} said nothing for {timeout:g} s. It may be busy or stuck: look at its log, or "
            "connect with a longer timeout"
        )
    why = str(error) or type(error).__name__
    return ServerError(f"the connection to {url} broke ({why}). Look at the server's log")


def refusal(response: httpx.Response, url: str, path: str, has_key: bool) -> CacheBlendError:
    """The error for a response, read to its end, whose status is none of success."""
    status, error = response.status_code, _error_of(response.text)
    message = str(error.get("message") or response.text[:300] or response.reason_phrase)
    if status == 401:
        given = "the API key that was given" if has_key else "calls without an API key"
        return ConfigError(f"{url} refuses {given} (401). Pass one of its keys as api_key")
    if status == 404 and path == STATE:
        return ServerError(
            f"{url} has no {STATE}: it is another server, or a plain vLLM. Start ours, which takes "
            "the same options as vllm serve: cacheblend serve MODEL"
        )
    if 300 <= status < 400:
        to = response.headers.get("location", "another place")
        return ServerError(f"{url} redirects to {to}; connect to that URL")
    if status == 429:
        return ServerError(f"{url} is busy (429): {message}. Send fewer requests at once, or later")
    return _by_kind(status, error, path)(f"{url} ({status}): {message}")


def reported_error(error: Mapping[str, Any], url: str) -> CacheBlendError:
    """The error for one that came within a stream, or with a job."""
    code = str(error.get("code"))
    status = int(code) if code.isdigit() else 500
    message = str(error.get("message") or "no reason was given")
    return _by_kind(status, error, "")(f"{url}: {message}")


def _by_kind(status: int, error: Mapping[str, Any], path: str) -> type[CacheBlendError]:
    """The class of an error by what the server says of it."""
    if (kind := _BY_CODE.get(str(error.get("code")))) is not None:
        return kind
    if status == 503 and path.startswith(STATE):
        return UnavailableError
    if status >= 500 or status in (404, 408, 409):
        return ServerError
    if "maximum context length" in str(error.get("message")):
        return PromptTooLongError
    of_text = status == 413 or str(error.get("param")).partition("[")[0] in _TEXT
    return PromptError if of_text else ConfigError


def _error_of(text: str) -> Mapping[str, Any]:
    """OpenAI's error object in a body, or what stands in its place."""
    try:
        body = json.loads(text)
    except ValueError:
        return {}
    if not isinstance(body, Mapping):
        return {}
    error = body.get("error", body)
    if isinstance(error, Mapping):
        return {"message": error.get("detail"), **error}
    return {"message": error}
