"""What the scheduler's side learns from the requests that it sees.

A thread of its own looks for what comes again, so that no request waits for it. What is to be
computed leaves by the link where the worker is in this process, and with a step else. An API
process fetches it from the worker, and has it computed beside answers: ``front/learning.py``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from threading import Semaphore
from typing import Any

from vllm.logger import init_logger

from cacheblend_rag.daemons import DaemonPool
from cacheblend_rag.engine.link import Link
from cacheblend_rag.learn import Learner, Span
from cacheblend_rag.plan import NoPlan
from cacheblend_rag.planner import Expected, Message, Planned, Planner
from cacheblend_rag.reason import Reason
from cacheblend_rag.undo import logging_failures

_MOST_WAITING = 64  # prompts; more are not learnt from
_BLENDABLE = {
    Reason.NO_CHUNK_FOUND,
    Reason.NO_WHOLE_BLOCK,
    Reason.PREFILL_AS_QUICK,
    Reason.SLIDING_WINDOW,
}

logger = init_logger("vllm.cacheblend_rag")


class Observer:
    """Shows the prompts of a planner's requests to a learner.

    Args:
        tell: takes messages for the planner; called in another thread.
    """

    def __init__(
        self, planner: Planner, link: Link, tell: Callable[[Sequence[Message]], object]
    ) -> None:
        self._planner, self._link, self._tell = planner, link, tell
        self._learner: Learner | None = None
        self._thread: DaemonPool | None = None
        self._room = Semaphore(_MOST_WAITING)

    def see(
        self,
        token_ids: Sequence[int],
        options: Mapping[str, Any],
        salt: str | None,
        planned: Planned,
    ) -> None:
        """A request was planned. Those that ask for no blend teach nothing."""
        learning = self._planner.learning
        if learning is None or planned.matches is None:
            return
        # A text that no request may blend would be computed in vain.
        if isinstance(planned.plan, NoPlan) and planned.plan.reason not in _BLENDABLE:
            return
        # What comes again comes often. To miss a prompt now and then costs less than a queue that
        # grows.
        if not self._room.acquire(blocking=False):
            return
        if self._thread is None:
            self._learner = Learner(learning.options)
            self._thread = DaemonPool(1, "cacheblend-learn")
        self._thread.submit(self._look, token_ids, options, salt, planned.matches)

    def take(self) -> Sequence[Span]:
        """What is to be told with a step."""
        return () if self._link.has_worker else self._link.take_spans()

    def close(self) -> None:
        """End the thread."""
        if self._thread is not None:
            self._thread.close(drop=True)

    def _look(
        self,
        token_ids: Sequence[int],
        options: Mapping[str, Any],
        salt: str | None,
        matches: Sequence[Any],
    ) -> None:
        assert self._learner is not None
        self._room.release()
        with logging_failures(logger, "a prompt can't be learnt from"):  # the others count
            prompt = self._planner.prompt(token_ids, options, salt, matches)
            spans = self._learner.observe(prompt, time.monotonic())
            # Chunks of a salt are in no listing of the store, so the planner has to be told to
            # expect them.
            if prompt.is_salted and spans:
                self._tell([Expected(prompt.owner, [span.key for span in spans])])
            self._link.add_spans(spans)
