"""Server-sent events: bytes of a stream to the JSON objects in it. Pure."""

from __future__ import annotations

import json
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator
from typing import Any

DONE = b"[DONE]"


class EventDecoder:
    """Takes bytes as they come, cut anywhere.

    Lines end in line feeds only: answers may hold other characters that Python takes for the end
    of a line, and JSON leaves them as they are.
    """

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> Iterator[dict[str, Any]]:
        """The events that ``data`` completes."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                payload = line[5:].strip()
                if payload != DONE:
                    yield json.loads(payload)


def events(source: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    """All events of a stream up to its end."""
    decoder = EventDecoder()
    for data in source:
        yield from decoder.feed(data)


async def aevents(source: AsyncIterable[bytes]) -> AsyncIterator[dict[str, Any]]:
    """``events`` for an event loop."""
    decoder = EventDecoder()
    async for data in source:
        for event in decoder.feed(data):
            yield event
