"""Threads that the interpreter does not wait for when it ends."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from threading import Lock, Semaphore, Thread
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
Result = TypeVar("Result")
_Job = Callable[[], object]


class DaemonPool:
    """Up to ``count`` threads, started when needed. As ``ThreadPoolExecutor``, which however joins
    its threads at the interpreter's end: one that waits for a disk that hangs would hold it up.
    """

    def __init__(self, count: int, name: str) -> None:
        self._count, self._name = count, name
        self._jobs: SimpleQueue[tuple[Future[Any], _Job] | None] = SimpleQueue()
        self._idle, self._lock, self._threads = Semaphore(0), Lock(), 0
        self._closed = False

    def submit(
        self, work: Callable[P, Result], /, *args: P.args, **options: P.kwargs
    ) -> Future[Result]:
        """Run ``work`` in a thread.

        Raises:
            RuntimeError: the pool was closed.
        """
        if self._closed:
            raise RuntimeError("this pool was closed")
        future: Future[Result] = Future()
        self._jobs.put((future, lambda: work(*args, **options)))
        if not self._idle.acquire(blocking=False):
            with self._lock:
                if self._threads < self._count:
                    self._threads += 1
                    Thread(target=self._serve, name=self._name, daemon=True).start()
        return future

    def close(self, *, drop: bool) -> None:
        """End the threads as soon as they are through with their work; nothing may be submitted any
        more.

        Args:
            drop: cancel what has not begun.
        """
        self._closed = True
        while drop:
            try:
                job = self._jobs.get_nowait()
            except Empty:
                break
            if job is not None:
                job[0].cancel()
        for _ in range(self._threads):
            self._jobs.put(None)

    def _serve(self) -> None:
        while (job := self._jobs.get()) is not None:
            _run(*job)
            del job  # or its result would live until the next one
            self._idle.release()


def _run(future: Future[Any], work: _Job) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        result = work()
    except BaseException as error:  # raised where the result is asked for
        future.set_exception(error)
    else:
        future.set_result(result)
