"""Answers: whole, and piece by piece."""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import NamedTuple

from cacheblend_rag.engine.base import EngineOutput, Read
from cacheblend_rag.errors import CacheBlendError
from cacheblend_rag.report import BlendReport
from cacheblend_rag.tools import ToolCall, joined

Finish = Callable[[Sequence[EngineOutput], float], "BlendResult"]


def unread(piece: EngineOutput) -> EngineOutput:
    """``piece`` as it came."""
    return piece


class Begun(NamedTuple):
    """A request that is ready to run, and the seconds that this took."""

    pieces: AsyncIterator[EngineOutput]
    finish: Finish
    prepared_s: float
    read: Read = unread


@dataclass(frozen=True, kw_only=True)
class BlendResult:
    """An answer.

    Attributes:
        text, token_ids: the answer. Where vLLM's parsers read it, ``text`` leaves out what is in
            ``reasoning`` and ``tool_calls``.
        reasoning: what the model thought before; empty without a reasoning parser.
        tool_calls: the calls of tools, in order; empty without tools.
        report: how its prompt was served.
        prompt_token_ids: the prompt as it was computed.
        finish_reason: ``stop``, ``length`` or ``tool_calls``; ``stop_reason``: the stop string or
            token, if any.
        logprobs: where asked for, a dict (token id -> log-probability) a token of the answer.
        request_id: names the request towards the engine.
    """

    text: str
    token_ids: tuple[int, ...]
    report: BlendReport
    prompt_token_ids: tuple[int, ...]
    finish_reason: str | None
    stop_reason: int | str | None
    logprobs: list[dict[int, float]] | None
    request_id: str
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()


def make_result(
    prompt_token_ids: tuple[int, ...],
    pieces: Sequence[EngineOutput],
    report: BlendReport,
    request_id: str,
) -> BlendResult:
    """Join the pieces of one answer."""
    logprobs = [at for p in pieces if p.logprobs for at in p.logprobs]
    return BlendResult(
        text="".join(p.text for p in pieces),
        token_ids=tuple(t for p in pieces for t in p.token_ids),
        report=report,
        prompt_token_ids=prompt_token_ids,
        finish_reason=pieces[-1].finish_reason,
        stop_reason=pieces[-1].stop_reason,
        logprobs=logprobs or None,
        request_id=request_id,
        reasoning="".join(p.reasoning for p in pieces),
        tool_calls=joined(call for p in pieces for call in p.tool_calls),
    )


class _Stream(ABC):
    """What both kinds of stream share: the pieces so far, and the result at the end."""

    def __init__(self) -> None:
        self._pieces: list[EngineOutput] = []
        self._result: BlendResult | None = None

    @property
    def result(self) -> BlendResult:
        """The whole answer and its report.

        Raises:
            CacheBlendError: the stream was not read to its end.
        """
        if not self.has_ended:
            raise CacheBlendError("the result is there once the stream was read to its end")
        if self._result is None:
            self._result = self._make_result()
        return self._result

    @property
    def has_ended(self) -> bool:
        """Whether the last piece came. The result is made when it is asked for, or with the call
        after: the engine may have to be asked for the report, for which the piece would wait.
        """
        return bool(self._pieces) and self._pieces[-1].finish_reason is not None

    @abstractmethod
    def _make_result(self) -> BlendResult:
        """Of all pieces."""

    @property
    def pieces(self) -> Sequence[EngineOutput]:
        """What came so far, with token ids, log-probabilities, reasoning and calls of tools."""
        return self._pieces


class BlendStream(_Stream, Iterator[str]):
    """Pieces of text as they come; then ``result``. Close it, or use ``with``, to stop early."""

    def __init__(self, pieces: Iterator[EngineOutput], finish: Finish, read: Read = unread) -> None:
        super().__init__()
        self._source, self._finish, self._start = pieces, finish, time.perf_counter()
        self._read = read

    def __next__(self) -> str:
        piece = next(self._source, None)
        if piece is None:
            if self.has_ended:
                _ = self.result
            raise StopIteration
        piece = self._read(piece)
        self._pieces.append(piece)
        return piece.text

    def _make_result(self) -> BlendResult:
        return self._finish(self._pieces, self._start)

    def close(self) -> None:
        """Abort the request if it still runs."""
        close = getattr(self._source, "close", None)
        if close is not None:
            close()

    def __enter__(self) -> BlendStream:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class AsyncBlendStream(_Stream, AsyncIterator[str]):
    """``BlendStream`` for an event loop: ``async for``, ``aclose``, ``async with``. The prompt is
    prepared when the first piece is asked for.
    """

    def __init__(self, begin: Callable[[], Awaitable[Begun]]) -> None:
        super().__init__()
        self._begin = begin
        self._begun: Begun | None = None
        self._start = 0.0
        self._closed = False

    async def __anext__(self) -> str:
        if not (self._closed or self._begun):
            asked = time.perf_counter()
            self._begun = await self._begin()
            self._start = asked + self._begun.prepared_s
        if self._closed or self._begun is None:  # maybe while the prompt was prepared
            raise StopAsyncIteration
        piece = await anext(self._begun.pieces, None)
        if piece is None:
            if self.has_ended:  # may ask the engine once more, so not on this loop
                await asyncio.to_thread(lambda: self.result)
            raise StopAsyncIteration
        piece = self._begun.read(piece)
        self._pieces.append(piece)
        return piece.text

    def _make_result(self) -> BlendResult:
        assert self._begun is not None
        return self._begun.finish(self._pieces, self._start)

    async def aclose(self) -> None:
        """Abort the request if it still runs."""
        self._closed = True
        close = getattr(self._begun and self._begun.pieces, "aclose", None)
        if close is not None:
            await close()

    async def __aenter__(self) -> AsyncBlendStream:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.aclose()
