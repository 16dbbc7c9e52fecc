"""Several reads at once, in threads: disks and networks answer many requests sooner than one."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from threading import Lock
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


class Readers:
    """A pool of at most ``count`` threads, started when first needed. Survives a fork."""

    def __init__(self, count: int) -> None:
        self._count, self._lock = count, Lock()
        self._pool: ThreadPoolExecutor | None = None
        self._pid = 0

    def map(self, work: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
        """``work`` of each item, in order."""
        items = list(items)
        if len(items) < 2:
            return [work(item) for item in items]
        return list(self._started().map(work, items))

    def start(self, work: Callable[[Item], object], items: Iterable[Item]) -> None:
        """Begin ``work`` of each item and return; its result does not matter."""
        for item in items:
            self._started().submit(work, item)

    def close(self, *, wait: bool = False) -> None:
        """End the threads, which start again when needed; what has not begun is dropped, unless it
        is waited for.
        """
        with self._lock:
            if self._pool is not None and self._pid == os.getpid():
                self._pool.shutdown(cancel_futures=not wait)
            self._pool = None

    def _started(self) -> ThreadPoolExecutor:
        with self._lock:
            if self._pool is None or self._pid != os.getpid():
                self._pool = ThreadPoolExecutor(self._count, thread_name_prefix="cacheblend-read")
                self._pid = os.getpid()
            return self._pool
