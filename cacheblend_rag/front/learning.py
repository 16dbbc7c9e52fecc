"""Has computed what the engine learnt from its requests, beside answers and within a budget."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

from cacheblend_rag.learn import Budget, LearnOptions, Span
from cacheblend_rag.pacing import Pace

_MOST_WAITING = 200_000  # tokens
_QUIET_S = 2.0  # without a step of the engine; then it is not asked before somebody asks
_OTHERS_S = 20.0  # after which it is asked all the same: another process may have been asked
_IDLE_S = 0.01  # that who asks may have to wait for what nobody asked for


class Slicing(Protocol):
    """What is asked of an engine that ingests beside answers."""

    pace: Pace
    asked: int  # requests that came by this process

    def rpc(self, method: str, *args: Any) -> list[Any]:
        """Of every rank."""

    def slicing(self, idle_s: float) -> AbstractContextManager[None]:
        """While the block runs, ingestions are computed between the engine's steps."""


class LearntIngestion:
    """Chunks that wait to be computed. One thread uses it.

    Args:
        engine: says what was learnt, and computes it.
        longest: tokens that prefix and chunk may have together.
        most_tokens: of chunks that are computed together.
        sync: lets the engine's scheduler know what its workers stored.
        clock: seconds, forward only.

    Attributes:
        tokens: of chunks that were computed.
        dropped: chunks that were too many to wait.
    """

    def __init__(
        self,
        engine: Slicing,
        options: LearnOptions,
        longest: int,
        most_tokens: int,
        sync: Callable[[], object],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._engine, self._longest, self._most_tokens = engine, longest, most_tokens
        self._sync, self._clock = sync, clock
        self._budget = Budget(options.share, clock())
        self._waiting: deque[Span] = deque()
        self._asked, self._asked_at, self._step_at = -1, clock(), clock()
        self._steps = -1
        self.tokens, self.dropped = 0, 0

    def once(self) -> bool:
        """Ask what was learnt, and compute some of it. Returns whether something was computed: not
        where nothing waits, or the budget is spent and somebody asks.
        """
        if self._is_due():
            self._ask()
        if not self._waiting:
            return False
        pace, now = self._engine.pace, self._clock()
        may = self._budget.allows(now)  # in any case: what goes by is counted
        if pace.is_busy(now) and not may:
            return False
        batch = self._batch(pace.tokens(self._most_tokens))
        before = pace.busy_s
        with self._engine.slicing(_IDLE_S):
            self._engine.rpc(
                "cacheblend_ingest",
                [span.key for span in batch],
                [list(span.token_ids) for span in batch],
                list(batch[0].prefix_ids),
                [[] for _ in batch],
                not batch[0].to_store,
            )
        self._budget.spend(pace.busy_s - before)
        self.tokens += sum(len(span.token_ids) for span in batch)
        self._sync()
        return True

    def _is_due(self) -> bool:
        """Whether there may be something new. An engine that is asked all the time never rests: it
        waits busily for a while behind each call.
        """
        now, asked = self._clock(), self._engine.asked
        if asked != self._asked:
            self._asked, self._step_at = asked, now
        is_quiet = now >= self._step_at + _QUIET_S and not self._waiting
        return not is_quiet or now >= self._asked_at + _OTHERS_S

    def _ask(self) -> None:
        news, now = self._engine.rpc("cacheblend_learnt")[0], self._clock()
        if news["steps"] != self._steps:
            self._steps, self._step_at = news["steps"], now
        self._asked_at = now
        self._engine.pace.see(news["steps"], news["step_s"], now)
        for plain in news["spans"]:
            span = Span(*plain)
            if len(span.prefix_ids) + len(span.token_ids) <= self._longest:
                self._waiting.append(span)
        waiting = sum(len(span.token_ids) for span in self._waiting)
        while waiting > _MOST_WAITING:  # the oldest are asked for the least
            waiting -= len(self._waiting.popleft().token_ids)
            self.dropped += 1

    def _batch(self, most: int) -> list[Span]:
        """The newest that go together, of so many tokens: what was asked last is likely to be asked
        next.
        """
        found, tokens = list[Span](), 0
        while self._waiting:
            span = self._waiting[-1]
            tokens += len(span.token_ids)
            if found and (tokens > most or span[2:] != found[0][2:]):
                break
            found.append(self._waiting.pop())
        return found
