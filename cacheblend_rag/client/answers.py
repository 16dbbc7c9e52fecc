"""One answer as it comes from the server, for threads and for event loops."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Any

import httpx

from cacheblend_rag.client.events import aevents, events
from cacheblend_rag.client.failures import reported_error
from cacheblend_rag.client.http import Connection
from cacheblend_rag.client.replies import piece, prompt_ids
from cacheblend_rag.engine.base import EngineOutput
from cacheblend_rag.errors import ServerError
from cacheblend_rag.undo import on_failure


class _Answer:
    """What both kinds share: the answer's id, and whether it came whole."""

    def __init__(self, connection: Connection, body: Mapping[str, Any]) -> None:
        self._connection, self._body = connection, body
        self.id = ""  # by which the server knows it
        self.prompt_ids: tuple[int, ...] | None = None  # where the server made them of messages
        self._whole = False

    def _take(self, event: Mapping[str, Any]) -> EngineOutput | None:
        if "error" in event:
            raise reported_error(event["error"], self._connection.url)
        self.id = event.get("id") or self.id
        if "messages" in self._body:
            self.prompt_ids = prompt_ids(event) or self.prompt_ids
        found = piece(event)
        self._whole |= found is not None and found.finish_reason is not None
        return found

    def _check_whole(self) -> None:
        if not self._whole:
            raise ServerError(
                f"{self._connection.url} ended an answer without saying why. Look at the server's "
                "log: it may have been stopped"
            )


class Answer(_Answer, Iterator[EngineOutput]):
    """Asks at once; ``close`` ends the connection, and with it the request."""

    def __init__(self, connection: Connection, body: Mapping[str, Any]) -> None:
        super().__init__(connection, body)
        self._response = connection.open(body)
        self._events = events(self._response.iter_bytes())
        self._closed = False

    def __next__(self) -> EngineOutput:
        if self._closed:
            raise StopIteration
        with on_failure(self.close):
            try:
                for event in self._events:
                    if (found := self._take(event)) is not None:
                        return found
            except httpx.TransportError as error:
                raise self._connection.broke(error) from error
            self._check_whole()
        self.close()
        raise StopIteration

    def close(self) -> None:
        """End the connection if the answer is not whole."""
        self._closed = True
        self._response.close()

    def __del__(self) -> None:
        if response := getattr(self, "_response", None):
            response.close()


class AsyncAnswer(_Answer):
    """For an event loop; asks when the first piece is asked for."""

    async def pieces(self) -> AsyncIterator[EngineOutput]:
        """The answer; leaving it early ends the connection, and with it the request."""
        try:
            async with self._connection.aopen(self._body) as response:
                async for event in aevents(response.aiter_bytes()):
                    if (found := self._take(event)) is not None:
                        yield found
        except httpx.TransportError as error:
            raise self._connection.broke(error) from error
        self._check_whole()
