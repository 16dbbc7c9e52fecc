"""Requests are planned where they are scheduled, without holding up the engine's steps."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from threading import Lock
from typing import Any

from vllm.logger import init_logger

from cacheblend_rag.daemons import DaemonPool
from cacheblend_rag.engine.learning import Observer
from cacheblend_rag.engine.link import Link
from cacheblend_rag.known import News
from cacheblend_rag.plan import NoPlan
from cacheblend_rag.planner import Lost, Message, Planned, Planner, Space
from cacheblend_rag.reason import Reason
from cacheblend_rag.undo import logging_failures

# What takes a millisecond or two is done between two steps; a thread that has to wait for its turn
# behind a busy one would take longer.
_AT_ONCE_TOKENS = 8192
_AT_ONCE_CHUNKS = 2

logger = init_logger("vllm.cacheblend_rag")


class Planning:
    """A planner, and a thread for what takes long: prompts of many tokens, many new chunks.

    Args:
        link: by which messages of a worker in this process come.
        planner: is called by one thread at a time.
    """

    def __init__(self, link: Link, planner: Planner) -> None:
        self.planner = planner
        self._link = link
        self._mail: deque[tuple[int, Message]] = deque()
        self._thread = DaemonPool(1, "cacheblend-plan")
        self._collecting, self._learning = Lock(), Lock()
        self.observer = Observer(planner, link, lambda messages: self.deliver(0, messages))
        self._busy: Future[Any] | None = None  # the last that the thread was given
        self.opened: Callable[[], object] | None = None  # lists a store that this side follows
        link.on_message(self._wake)

    def deliver(self, rank: int, messages: Sequence[Message]) -> None:
        """Messages of a worker in another process."""
        self._mail.extend((rank, message) for message in messages)
        if messages:
            self._wake()

    def begin(
        self,
        token_ids: Sequence[int],
        options: Mapping[str, Any],
        adapter: str = "",
        salt: str | None = None,
    ) -> Future[Planned]:
        """Plan a request behind all earlier messages; done already, where that is quick. The
        arguments are ``Planner.plan``'s.
        """
        # A busy thread has the planner, which is for one thread at a time. Rather than the engine's
        # step, the request waits.
        busy = self._busy is not None and not self._busy.done()
        self._collect()
        if busy or len(token_ids) > _AT_ONCE_TOKENS or self._is_much():
            return self._later(token_ids, options, adapter, salt)
        done: Future[Planned] = Future()
        done.set_result(self._plan(token_ids, options, adapter, salt))
        return done

    def lose(self, keys: Sequence[str]) -> None:
        """These chunks turned out to be missing."""
        if keys:
            self.deliver(0, [Lost(keys)])

    def close(self) -> None:
        """End the thread."""
        self._thread.close(drop=True)
        self.observer.close()

    def _later(
        self, token_ids: Sequence[int], options: Mapping[str, Any], adapter: str, salt: str | None
    ) -> Future[Planned]:
        planned = self._thread.submit(self._plan, token_ids, options, adapter, salt)
        self._busy = planned
        return planned

    def _plan(
        self, token_ids: Sequence[int], options: Mapping[str, Any], adapter: str, salt: str | None
    ) -> Planned:
        try:
            self._learn()
            planned = self.planner.plan(token_ids, options, adapter, salt)
            # Before the request is scheduled, and in a thread of its own: it may teach, and never
            # waits.
            if not adapter:  # its chunks are computed with it, and these are not
                self.observer.see(token_ids, options, salt, planned)
            return planned
        # Any fault of ours: the request is computed plainly, and its report has the cause.
        except Exception as error:  # a request is never lost over its plan
            logger.exception("a request can't be planned")
            why_not = f"planning failed: {type(error).__name__}: {error}"
            return Planned(NoPlan(Reason.PLANNING_FAILED, why_not), "blend", {})

    def _wake(self) -> None:
        """There is something to learn; done before anybody asks."""
        # One job takes all of the mail, so a second one would find nothing.
        if self._busy is None or self._busy.done():
            with suppress(RuntimeError):  # the engine ends
                self._busy = self._thread.submit(self._learn)

    def _collect(self) -> None:
        with self._collecting:  # or the first message may come last
            self._mail.extend((0, message) for message in self._link.take())

    def _is_much(self) -> bool:
        chunks = 0
        for _, message in list(self._mail):
            if isinstance(message, News):
                # a whole listing also compares with all that is known, however little it adds
                chunks += len(message.added) + len(message.removed) + message.whole * 10
        return chunks > _AT_ONCE_CHUNKS

    def _learn(self) -> None:
        with self._learning:
            self._collect()
            while self._mail:
                rank, message = self._mail.popleft()
                with logging_failures(logger, "the scheduler could not take in a worker's message"):
                    self.planner.learn(rank, message)
                    if isinstance(message, Space) and self.opened is not None:
                        self.opened()  # its chunks of before come with a whole listing
                        self._collect()
