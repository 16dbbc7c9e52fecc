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
_AT_ONCE = 8  # requests whose chunks are fetched


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

    def waits(self, request_id: str, plan: Plan) -> bool:
        """Whether a blend should not begin yet.

        Raises:
            RefusedError: it is not worth it.
        """
        blender = self._blender
        if blender is None:
            return False
        fetched = self._fetching.get(request_id)
        if fetched is not None and not fetched.is_set():
            return True
        # Asked once a request: ``consider`` also has chunks brought nearer, and is not for every
        # step.
        why_not = blender.refusal(request_id) if fetched else blender.consider(plan)[0]
        if why_not:
            raise RefusedError(*why_not)
        if fetched:
            return False
        # vLLM asks again for this request with every step, and serves others meanwhile.
        if not blender.is_fast(plan):
            self._fetching[request_id] = Event()
            self._readers.start(lambda name: self._fetch(name, plan), [request_id])
            return True
        self._announce(blender, request_id, plan)
        return False

    def end_of_step(self) -> None:
        """The step was built."""
        self._announced = False

    def begin(self, task: BlendTask) -> None:
        """A blend got its blocks: it begins while the rest of its step is prepared."""
        if (rows := self._link.rows) is not None:
            rows.begin_ahead(task)

    def forget(self, request_id: str) -> None:
        """A request ended."""
        self._fetching.pop(request_id, None)
        if (blender := self._blender) is not None:
            blender.forget(request_id)

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
        self._announced = True
        # It comes later then; what is wrong shows where the worker reports it.
        with logging_failures(logger, "the KV of %s was not brought ahead", request_id):
            blender.stage(request_id, plan)
