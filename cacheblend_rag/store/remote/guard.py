"""Calls that end in time, and are not made while the other side is known to be out of order."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import TimeoutError as FutureTimeoutError
from threading import Event, Lock, Thread
from typing import TypeVar

from cacheblend_rag.daemons import DaemonPool
from cacheblend_rag.store.remote.base import AnswerError, Backend, BackendError

Result = TypeVar("Result")

_FAILURES = 3  # in a row, until nothing is asked any more
_PAUSE_S = 0.5  # until it is asked again whether it answers
_THREADS = 8


class PausedError(BackendError):
    """Not asked, as the message says."""


class Guard:
    """Runs a backend's calls in threads of its own, so that none holds up the caller. After some
    failures in a row it refuses them, and a thread asks whether the other side answers again.
    """

    def __init__(self, backend: Backend, timeout_s: float) -> None:
        self.failures = 0
        self._backend, self._timeout_s = backend, timeout_s
        self._pool = DaemonPool(_THREADS, "cacheblend-remote")
        self._lock, self._closed = Lock(), Event()
        self._in_a_row, self._is_probing = 0, False

    @property
    def is_paused(self) -> bool:
        """Whether calls are refused just now."""
        return self._in_a_row >= _FAILURES

    def call(self, work: Callable[[], Result]) -> Result:
        """What ``work`` returns, within the timeout.

        Raises:
            BackendError: it failed, took too long, or was not tried.
        """
        if self._closed.is_set():
            raise PausedError("this store was closed")
        if self.is_paused:
            raise PausedError("the last calls failed")
        # In a thread, because clients' timeouts are for one packet: a server that sends a byte now
        # and then would hold up its caller for ever.
        future = self._pool.submit(work)
        try:
            result = future.result(self._timeout_s)
        except FutureTimeoutError as error:
            future.cancel()
            # Or the thread would hang on, and after some such calls all threads would.
            self._backend.abort()
            self._count_failure()
            raise BackendError(f"no answer within {self._timeout_s:g} s") from error
        except BackendError as error:
            # A refusal is an answer: the other side is there, and calls for other keys go on.
            if not isinstance(error, AnswerError):
                self._count_failure()
            raise
        # One answer is enough, whatever failed before.
        self._in_a_row = 0
        return result

    def close(self) -> None:
        """End the threads; what hangs is cut off."""
        self._closed.set()
        self._backend.abort()
        self._pool.close(drop=True)
        self._backend.close()

    def _count_failure(self) -> None:
        with self._lock:
            self.failures += 1
            self._in_a_row += 1
            if self.is_paused and not self._is_probing:
                self._is_probing = True
                Thread(target=self._probe, name="cacheblend-probe", daemon=True).start()

    def _probe(self) -> None:
        """Ask until there is an answer; no caller waits for it."""
        while not self._closed.wait(_PAUSE_S):
            if self.is_paused and not self._answers():
                continue
            with self._lock:
                self._in_a_row, self._is_probing = 0, False
                return

    def _answers(self) -> bool:
        try:
            self._backend.ping()
        except BackendError:
            return False
        return True
