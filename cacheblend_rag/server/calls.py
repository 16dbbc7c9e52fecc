"""Threads for what the endpoints do. Those that asyncio shares are left to answers: a call of a
store that hangs would keep one, and there are few.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from threading import Semaphore
from typing import ParamSpec, TypeVar

from cacheblend_rag.daemons import DaemonPool
from cacheblend_rag.server.errors import HttpError

P = ParamSpec("P")
Result = TypeVar("Result")


class Calls:
    """What event loops have done in threads, of which there are not many.

    Args:
        what: that they wait for, in words.
        threads: calls that are done side by side.
        most: calls that are done or wait; further ones are refused.
    """

    def __init__(self, what: str, threads: int, most: int) -> None:
        self._what, self._room = what, Semaphore(most)
        self._pool = DaemonPool(threads, "cacheblend-calls")

    async def do(self, work: Callable[P, Result], /, *args: P.args, **options: P.kwargs) -> Result:
        """What ``work`` returns.

        Raises:
            HttpError: 503: too many calls wait.
        """
        if not self._room.acquire(blocking=False):
            raise HttpError(
                503,
                f"too many calls wait for {self._what}; try again later",
                code="busy",
                retry_after_s=1,
            )
        done = self._pool.submit(work, *args, **options)
        done.add_done_callback(lambda _: self._room.release())
        return await asyncio.wrap_future(done)


STORE = Calls("the engine or its store", 6, 128)
OWN = Calls("this server's own work", 2, 256)  # bodies, and the file of the ingestions
