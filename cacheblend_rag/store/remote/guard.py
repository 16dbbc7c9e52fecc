"""Calls that end in time, and are not made while the other side is known to be out of order."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from threading import Lock
from typing import TypeVar

from cacheblend_rag.store.remote.base import Backend, BackendError

Result = TypeVar("Result")

_FAILURES = 3  # in a row, until nothing is asked any more
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 60.0
_THREADS = 8


class PausedError(BackendError):
    """Not asked: the last calls failed."""


class Breaker:
    """A circuit breaker: closed, open after failures in a row, half open for one call after a pause
    that doubles each time.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._lock = clock, Lock()
        self._failures, self._pause_s, self._until = 0, _FIRST_PAUSE_S, 0.0

    @property
    def is_open(self) -> bool:
        """Whether calls are refused just now."""
        with self._lock:
            return self._failures >= _FAILURES and self._clock() < self._until

    def enter(self) -> None:
        """Ask to make a call.

        Raises:
            PausedError: it should not be made.
        """
        with self._lock:
            if self._failures < _FAILURES:
                return
            if self._clock() < self._until:
                raise PausedError("the last calls failed")
            self._until = self._clock() + self._pause_s  # this call tries, others go on waiting

    def succeeded(self) -> None:
        """The call went well."""
        with self._lock:
            self._failures, self._pause_s = 0, _FIRST_PAUSE_S

    def failed(self) -> bool:
        """The call failed; True where this one opened the circuit."""
        with self._lock:
            self._failures += 1
            if self._failures < _FAILURES:
                return False
            self._until = self._clock() + self._pause_s
            self._pause_s = min(2 * self._pause_s, _LONGEST_PAUSE_S)
            return self._failures == _FAILURES


class Guard:
    """Runs a backend's calls in threads of its own, so that none holds up the caller."""

    def __init__(self, backend: Backend, timeout_s: float) -> None:
        self.breaker = Breaker()
        self.failures = 0
        self._backend, self._timeout_s = backend, timeout_s
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="cacheblend-remote")

    def call(self, work: Callable[[], Result]) -> Result:
        """What ``work`` returns, within the timeout.

        Raises:
            BackendError: it failed, took too long, or was not tried.
        """
        self.breaker.enter()
        future = self._pool.submit(work)
        try:
            result = future.result(self._timeout_s)
        except FutureTimeoutError as error:
            future.cancel()
            self._backend.abort()
            self._count_failure()
            raise BackendError(f"no answer within {self._timeout_s:g} s") from error
        except BackendError:
            self._count_failure()
            raise
        self.breaker.succeeded()
        return result

    def close(self) -> None:
        """End the threads; what hangs is cut off."""
        self._backend.abort()
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._backend.close()

    def _count_failure(self) -> None:
        self.failures += 1
        self.breaker.failed()
