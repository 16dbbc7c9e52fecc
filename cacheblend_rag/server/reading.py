"""A request's body, of bounded size."""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.types import Receive

from cacheblend_rag.server.errors import HttpError


async def read(receive: Receive, headers: Headers, most: int) -> bytes:
    """A request's body.

    Raises:
        HttpError: 413: it has more than ``most`` bytes; 400: the client left.
    """
    length = headers.get("content-length", "0")
    if length.isdigit() and int(length) > most:
        raise _too_large(most)
    parts, size = list[bytes](), 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise HttpError(400, "the client left before its request was whole")
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > most:
            raise _too_large(most)
        if not message.get("more_body", False):
            return b"".join(parts)


def _too_large(most: int) -> HttpError:
    return HttpError(413, f"the body has more than {most} bytes; send it in several requests")
