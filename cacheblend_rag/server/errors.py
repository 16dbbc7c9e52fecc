"""Errors as OpenAI's clients know them: ``{"error": {"message", "type", "param", "code"}}``."""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Awaitable
from typing import Any, TypeVar

from starlette.responses import JSONResponse

from cacheblend_rag.errors import (
    CacheBlendError,
    ClosedError,
    ConfigError,
    EmptyTextError,
    EngineDeadError,
    EngineError,
    PromptError,
    PromptTooLongError,
    StoreError,
)

logger = logging.getLogger("vllm.cacheblend_rag")
_T = TypeVar("_T")

_TYPES = {
    400: "BadRequestError",
    401: "AuthenticationError",
    403: "PermissionDeniedError",
    404: "NotFoundError",
    409: "ConflictError",
    413: "RequestTooLargeError",
    429: "RateLimitError",
    500: "InternalServerError",
    503: "ServiceUnavailableError",
}


class HttpError(CacheBlendError):
    """A request that is answered with an error.

    Args:
        status: of HTTP.
        param: the part of the request that is wrong.
        code: for programs; the status where it is not given.
        retry_after_s: when it may be tried again.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code
        self.retry_after_s = retry_after_s

    def body(self) -> dict[str, Any]:
        """What is sent."""
        error = {
            "message": _encodable(str(self)),
            "type": _TYPES.get(self.status, "APIError"),
            "param": None if self.param is None else _encodable(self.param),
            "code": self.code or self.status,
        }
        return {"error": error}

    def headers(self) -> dict[str, str]:
        """Headers of the answer."""
        return {} if self.retry_after_s is None else {"Retry-After": str(self.retry_after_s)}


class NoStoreError(StoreError):
    """The store is not open, and will not be until another start."""


class StateError(StoreError):
    """The file of the ingestions can't be used."""


def _encodable(text: str) -> str:
    """``text`` with half characters written out: an error quotes what a client sent."""
    return text.encode(errors="backslashreplace").decode()


def as_http(error: Exception) -> HttpError:
    """The answer to a request that failed with ``error``."""
    if isinstance(error, HttpError):
        return error
    if isinstance(error, ConfigError | PromptError):
        return HttpError(400, str(error), code=_code(error))
    if isinstance(error, NoStoreError):
        return HttpError(503, str(error), code="not_available")
    if isinstance(error, StoreError):
        return HttpError(503, str(error), code="store_unavailable", retry_after_s=1)
    if isinstance(error, sqlite3.Error):
        message = f"the file of the ingestions can't be used: {error}"
        return HttpError(503, message, code="state_unavailable", retry_after_s=1)
    if isinstance(error, EngineDeadError | ClosedError):
        return HttpError(503, str(error), code="engine_unavailable")
    if isinstance(error, EngineError):
        return HttpError(500, str(error), code="engine_failed")
    return HttpError(500, f"the server failed: {type(error).__name__}; its log has the cause")


def answer(error: Exception) -> JSONResponse:
    """The answer to a request that failed with ``error``, which is logged where it is no fault of
    the client's.
    """
    known = as_http(error)
    if known.status == 500:
        logger.error("a request failed", exc_info=error)
    return JSONResponse(known.body(), known.status, known.headers())


async def or_answer(work: Awaitable[_T]) -> _T | JSONResponse:
    """What ``work`` gives, or the answer to what it failed with, whatever that is."""
    try:
        return await work
    except Exception as error:
        return answer(error)


def _code(error: ConfigError | PromptError) -> str:
    """For our client, which raises the same again."""
    if isinstance(error, PromptTooLongError):
        return "prompt_too_long"
    if isinstance(error, EmptyTextError):
        return "empty_text"
    return "invalid_text" if isinstance(error, PromptError) else "invalid_option"


def not_found(kind: str, name: str) -> HttpError:
    """There is no such thing, or it is another tenant's."""
    return HttpError(404, f"there is no {kind} {name!r}", param="id")
