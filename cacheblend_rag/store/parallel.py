"""Several reads at once, in threads: disks and networks answer many requests sooner than one."""

from __future__ import annotations

import atexit
import os
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, wait
from threading import Lock
from typing import Any, TypeVar
from weakref import WeakSet

from cacheblend_rag.daemons import DaemonPool

Item = TypeVar("Item")
Result = TypeVar("Result")

_GOODBYE_S = 1.0  # what still runs at the end may hang


class TimedOut:
    """In the place of a result that did not come in time."""


TIMED_OUT = TimedOut()


_all: WeakSet[Readers] = WeakSet()


class Readers:
    """A pool of at most ``count`` threads, started when first needed. Survives a fork."""

    def __init__(self, count: int) -> None:
        self._count, self._lock = count, Lock()
        self._pool: DaemonPool | None = None
        self._pid = 0
        self._under_way: set[Future[Any]] = set()
        self._overdue: set[Future[Any]] = set()
        _all.add(self)

    @property
    def is_behind(self) -> bool:
        """Whether something that missed its deadline is still under way."""
        with self._lock:
            self._overdue = {future for future in self._overdue if not future.done()}
            return bool(self._overdue) and self._pid == os.getpid()

    @property
    def backlog(self) -> int:
        """How much is under way or waits."""
        with self._lock:
            return len(self._under_way) if self._pid == os.getpid() else 0

    def map(self, work: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
        """``work`` of each item, in order."""
        items = list(items)
        if len(items) < 2:
            return [work(item) for item in items]
        return [future.result() for future in [self._submit(work, item) for item in items]]

    def map_within(
        self, work: Callable[[Item], Result], items: Iterable[Item], seconds: float
    ) -> list[Result | TimedOut]:
        """As ``map``, but ``TIMED_OUT`` for what takes longer. Until that has ended, which it may
        never, nothing more is begun: all has timed out, so nobody waits twice for a disk that
        hangs.
        """
        items = list(items)
        # Threads that hang are not given more to do: they would all hang in the end, and memory
        # with them.
        if self.is_behind:
            return [TIMED_OUT] * len(items)
        until = time.monotonic() + seconds
        futures = [self._submit(work, item) for item in items]
        wait(futures, timeout=until - time.monotonic())
        # One that had not begun is cancelled, and not overdue: it holds up nobody.
        timed_out = {future for future in futures if not future.done() and not future.cancel()}
        with self._lock:
            self._overdue |= timed_out
        return [
            TIMED_OUT if future in timed_out or future.cancelled() else future.result()
            for future in futures
        ]

    def start(self, work: Callable[[Item], object], items: Iterable[Item]) -> None:
        """Begin ``work`` of each item and return; its result does not matter."""
        for item in items:
            self._submit(work, item)

    def close(self, *, wait_for_all: bool = False) -> None:
        """End the threads, which start again when needed; what has not begun is dropped, unless it
        is waited for. What hangs is left behind.
        """
        with self._lock:
            pool, self._pool = self._pool, None
            under_way = set(self._under_way)
        if pool is not None and self._pid == os.getpid():
            pool.close(drop=not wait_for_all)
            wait(under_way, timeout=None if wait_for_all else _GOODBYE_S)

    def leave(self, until: float) -> None:
        """Give what is under way until then, by ``time.monotonic()``; it may be writes."""
        with self._lock:
            under_way = set(self._under_way) if self._pid == os.getpid() else set()
        wait(under_way, timeout=max(0.0, until - time.monotonic()))

    def _submit(self, work: Callable[[Item], Result], item: Item) -> Future[Result]:
        with self._lock:
            # A fork copies this object and none of its threads.
            if self._pool is None or self._pid != os.getpid():
                self._pool = DaemonPool(self._count, "cacheblend-read")
                self._pid = os.getpid()
                self._under_way, self._overdue = set(), set()
            future = self._pool.submit(work, item)
            self._under_way.add(future)
        # Outside of the lock: where the future is done already, this calls back at once.
        future.add_done_callback(self._ended)
        return future

    def _ended(self, future: Future[Any]) -> None:
        with self._lock:
            self._under_way.discard(future)


def _leave_all() -> None:
    until = time.monotonic() + _GOODBYE_S
    for readers in list(_all):
        readers.leave(until)


atexit.register(_leave_all)
