"""Has answers computed again while nobody asks: see ``engine/shadow.py``."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

from cacheblend_rag import metrics
from cacheblend_rag.errors import CacheBlendError
from cacheblend_rag.pacing import Pace, Progress

_QUIET_S = 0.5  # without a step: nobody asks
_OTHERS_S = 20.0  # after which it is asked all the same: another process may have been asked
_IDLE_S = 0.01  # of a slice: as long as the first one who asks may have to wait
_LOOKS_EVERY_S = 0.1  # while something waits
_END_S = 2.0


class Shadowing:
    """Asks an engine for its shadows, slice by slice. One thread uses it.

    Args:
        rpc: of the engine.
        asked: how many requests came by this process: one more is a reason to ask.
        clock: seconds, forward only.

    Attributes:
        waiting: answers that wait.
    """

    def __init__(
        self,
        rpc: Callable[..., list[Any]],
        asked: Callable[[], int],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._rpc, self._asked, self._clock = rpc, asked, clock
        self._pace = Pace()
        self._known_asked, self._tokens, self._steps = -1, 0, -1
        self._asked_at = self._step_at = clock()
        self.waiting = 0

    def once(self) -> bool:
        """Compute a slice, if something waits and nobody asks; returns whether it did."""
        now = self._clock()
        if not self._is_due(now):
            return False
        parts = self._pace.parts(self._tokens, now, _IDLE_S) if self._tokens else 1
        # Of an engine that made a step since it was asked last, nothing is computed.
        found = self._rpc("cacheblend_shadow", parts, self._steps)[0]
        self._asked_at = now
        is_same = found["steps"] == self._steps
        if not is_same:
            self._steps, self._step_at = found["steps"], now
        if is_same and self._tokens and not found["done"]:
            progress = Progress(found["seconds"], found["steps"], found["step_s"])
            self._pace.learn(progress, parts, self._tokens, now)
        self.waiting, self._tokens = found["waiting"], found["tokens"]
        metrics.observe_shadows(found["done"], found["dropped"])
        return bool(is_same and self.waiting)

    def _is_due(self, now: float) -> bool:
        """An engine that is asked all the time never rests."""
        asked = self._asked()
        if asked != self._known_asked:
            # The request is under way; what it did is asked when all is quiet.
            self._known_asked, self._step_at = asked, now
            self.waiting = max(self.waiting, 1)
        if now < self._step_at + _QUIET_S:
            return False
        return self.waiting > 0 or now >= self._asked_at + _OTHERS_S


class ShadowThread:
    """Drives a ``Shadowing`` where no server does."""

    def __init__(self, rpc: Callable[..., list[Any]]) -> None:
        self._count = 0
        self._shadowing = Shadowing(rpc, lambda: self._count)
        self._wanted, self._stopped = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="cacheblend-shadow", daemon=True)
        self._thread.start()

    def wake(self) -> None:
        """An answer that was drawn has ended."""
        self._count += 1
        self._wanted.set()

    def close(self) -> None:
        """End behind the slice that is under way."""
        self._stopped.set()
        self._wanted.set()
        # Not for ever: it may wait for a stream that is open, as the engine's own end does.
        if self._thread is not threading.current_thread():
            self._thread.join(_END_S)

    def _run(self) -> None:
        while not self._stopped.is_set():
            try:
                if self._shadowing.once():
                    continue
            except CacheBlendError:  # the engine is closed or dead: whoever asks next is told
                return
            self._wanted.wait(_LOOKS_EVERY_S if self._shadowing.waiting else _OTHERS_S)
            self._wanted.clear()
