"""Threads for what the endpoints do. Those that asyncio shares are left to answers: a call of a
store that hangs would keep one, and there are few.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from threading import Semaphore
from typing import Any, ParamSpec, TypeVar, TypeVarTuple

from cacheblend_rag.daemons import DaemonPool
from cacheblend_rag.server.errors import HttpError

BUSY = "busy"  # code of the error where too many calls wait

P = ParamSpec("P")
Args = TypeVarTuple("Args")
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
        self._shared = dict[Hashable, Future[Any]]()

    async def do(self, work: Callable[P, Result], /, *args: P.args, **options: P.kwargs) -> Result:
        """What ``work`` returns.

        Raises:
            HttpError: 503: too many calls wait.
        """
        return await asyncio.wrap_future(self._begin(work, *args, **options))

    async def do_once(self, work: Callable[[*Args], Result], /, *args: *Args) -> Result:
        """As ``do``. Whoever wants the same while it is done gets what that comes to, and takes no
        further thread: many that wait for one thing would leave none to the others.
        """
        call = (work, args)
        done = self._shared.get(call)
        if done is None:
            done = self._shared[call] = self._begin(work, *args)
            done.add_done_callback(lambda _: self._shared.pop(call))
        return await asyncio.shield(asyncio.wrap_future(done))  # one who leaves ends it for nobody

    def _begin(
        self, work: Callable[P, Result], /, *args: P.args, **options: P.kwargs
    ) -> Future[Result]:
        if not self._room.acquire(blocking=False):
            raise HttpError(
                503,
                f"too many calls wait for {self._what}; try again later",
                code=BUSY,
                retry_after_s=1,
            )
        done = self._pool.submit(work, *args, **options)
        done.add_done_callback(lambda _: self._room.release())
        return done


STORE = Calls("the engine or its store", 6, 128)
OWN = Calls("this server's own work", 2, 256)  # bodies, and the file of the ingestions
