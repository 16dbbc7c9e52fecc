"""What is done for a blend before its step, where scheduler and worker share a process, as vLLM has
it for one GPU: slow chunks are fetched while other requests run; those in memory are on their way
to the GPU, and what chooses the rows runs, while vLLM prepares the step.
"""

from __future__ import annotations

from threading import Event
from typing import TYPE_CHECKING

from vllm.logger import init_logger

from cacheblend_rag.engine.link import Link
from cacheblend_rag.plan import Plan
from cacheblend_rag.reason import RefusedError
from cacheblend_rag.store.parallel import Readers
from cacheblend_rag.undo import logging_failures

if TYPE_CHECKING:
    from cacheblend_rag.engine.blend import Blender
    from cacheblend_rag.engine.outcome import BlendTask

logger = init_logger("vllm.cacheblend_rag")
_AT_ONCE = 8  # requests whose chunks are fetched, or wait in memory for their blend


class Ahead:
    """One for an engine.

    Args:
        link: has the only worker's rows, where that is in this process.
    """

    def __init__(self, link: Link) -> None:
        self._link = link
        self._fetching: dict[str, Event] = {}  # set when all is there that will be
        self._readers = Readers(_AT_ONCE)
        self._announced = False  # a blend of the step being built
        self._staged: str | None = None  # the request whose KV was told to come last
        # What is fetched is beside the store's own memory, which has a bound. This is its bound.
        self._held: set[str] = set()  # requests of which something is fetched, and nothing begun
        self._slow: set[str] = set()  # requests that wait for others to be fetched
        self._asked: set[str] = set()  # requests that waited for room

    def waits(self, request_id: str, plan: Plan) -> bool:
        """Whether a blend should not begin yet.

        Raises:
            RefusedError: it is not worth it.
        """
        blender = self._blender
        if blender is None or request_id == self._staged:
            return False
        if self.is_fetching(request_id):
            return True
        fetched = request_id in self._fetching
        # Asked once a request: ``consider`` also has chunks brought nearer, and is not for every
        # step.
        why_not = blender.refusal(request_id) if fetched else blender.consider(plan)[0]
        if why_not:  # the scheduler's side then forgets it
            raise RefusedError(*why_not)
        if fetched:
            return False
        # vLLM asks again for this request with every step, and serves others meanwhile.
        if not blender.is_fast(plan):
            if self._is_full:
                self._slow.add(request_id)
            else:
                self._start(request_id, plan)
            return True
        self._announce(blender, request_id, plan)
        return False

    def expect(self, request_id: str, plan: Plan) -> None:
        """A blend comes with the next step, and nothing runs beside it: what is in memory is on its
        way from now on.
        """
        if (blender := self._blender) is not None:
            self._announce(blender, request_id, plan)

    def is_fetching(self, request_id: str) -> bool:
        """Whether its chunks are on their way, or wait for those of others."""
        fetched = self._fetching.get(request_id)
        if fetched is None:
            return self._is_full and request_id in self._slow
        return not fetched.is_set()

    @property
    def _is_full(self) -> bool:
        return len(self._held) >= _AT_ONCE

    def look_ahead(self, request_id: str, plan: Plan) -> None:
        """Have slow chunks fetched of a blend that has no room yet. Asked with every step, it looks
        at each blend once.

        Raises:
            RefusedError: it is not worth it.
        """
        if request_id in self._asked or self._is_full:
            return
        self._asked.add(request_id)
        if (blender := self._blender) is None or request_id in self._fetching:
            return
        if why_not := blender.consider(plan)[0]:
            raise RefusedError(*why_not)
        if not blender.is_fast(plan):
            self._start(request_id, plan)

    def _start(self, request_id: str, plan: Plan) -> None:
        self._slow.discard(request_id)
        self._held.add(request_id)
        self._fetching[request_id] = Event()
        self._readers.start(lambda name: self._fetch(name, plan), [request_id])

    def _let_go(self, request_id: str) -> None:
        for names in (self._held, self._slow, self._asked):
            names.discard(request_id)

    def end_of_step(self) -> None:
        """The step was built."""
        self._announced = False

    def begin(self, task: BlendTask) -> None:
        """A blend got its blocks: it begins while the rest of its step is prepared."""
        self._let_go(task.request_id)
        self._staged = None  # it is this one's, or given up
        if (rows := self._link.rows) is not None:
            rows.begin_ahead(task)

    def forget(self, request_id: str) -> None:
        """A request ended, or will not be blended."""
        self._fetching.pop(request_id, None)
        self._let_go(request_id)
        if (blender := self._blender) is not None:
            blender.forget(request_id)
            if request_id == self._staged:
                blender.unstage()
                self._staged, self._announced = None, False

    @property
    def _blender(self) -> Blender | None:
        rows = self._link.rows
        return rows.blender if rows is not None else None

    def _fetch(self, request_id: str, plan: Plan) -> None:
        there = self._fetching.get(request_id)
        try:
            if (blender := self._blender) is not None and there is not None:
                blender.fetch(request_id, plan)
                if self._fetching.get(request_id) is not there:  # it ended meanwhile
                    blender.forget(request_id)
        finally:  # what could not be fetched is asked for again by the worker, which reports why
            if there is not None:
                there.set()

    def _announce(self, blender: Blender, request_id: str, plan: Plan) -> None:
        """Have the KV of a step's first blend come before the blend has blocks."""
        # One transfer is expected at a time. That of a second blend would push out the first one's.
        if self._announced:
            return
        self._staged = None
        # It comes later then; what is wrong shows where the worker reports it.
        with logging_failures(logger, "the KV of %s was not brought ahead", request_id):
            if blender.stage(request_id, plan):
                self._announced, self._staged = True, request_id
