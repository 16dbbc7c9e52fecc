"""What a worker has once its model is known and its store is open.

It is kept by the connector. So whoever stands for the worker sees the same: vLLM's own, into which
``WorkerExtension`` is mixed, and the one that ``binding.py`` makes when the engine starts.
"""

from __future__ import annotations

import statistics
import time
import uuid
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from cacheblend_rag.planner import Limits, Space
from cacheblend_rag.reason import Reason, Why

if TYPE_CHECKING:
    from cacheblend_rag.engine.attention import PagedCache
    from cacheblend_rag.engine.blends import Blends
    from cacheblend_rag.engine.executors import ExecutorFactory
    from cacheblend_rag.engine.forward import ModelHandle
    from cacheblend_rag.engine.ingest import Ingestor
    from cacheblend_rag.engine.link import Link
    from cacheblend_rag.engine.outcome import BlendOutcome
    from cacheblend_rag.engine.refiner import Refiner
    from cacheblend_rag.engine.rope import Rerotator
    from cacheblend_rag.engine.shadow import ShadowWorker
    from cacheblend_rag.engine.slices import SlicedIngestor
    from cacheblend_rag.engine.stored import RankStore
    from cacheblend_rag.engine.weights import Weights
    from cacheblend_rag.store.part import Heads

_LONGEST_STEP_S = 1.0  # what lies between two steps that are further apart is no step
_STEPS = 17  # of either kind, of which the median counts

_NOT_OPEN = Why(Reason.NOT_READY, "the engine's store is not open")


@dataclass
class WorkerState:
    """What one rank has.

    Attributes:
        facts: what ``cacheblend_inspect`` found.
        heads: those of the store's KV that are this rank's; None: all.
        parts: the model, its rotation and its paged cache.
        is_replica: another rank answers for the store that they share.
        sends_changes: the scheduler's side follows the store itself. It gets what this engine does
            as messages.
        instance: names this engine; one that was started before or after has another.
        limits, space: the latest ones of blends, and of requests that name no space.
    """

    # there once the model is known, and once the store is open
    parts: tuple[ModelHandle, Rerotator, PagedCache] = field(init=False)
    executors: ExecutorFactory = field(init=False)
    ingestor: Ingestor = field(init=False)
    sliced: SlicedIngestor = field(init=False)
    store: RankStore = field(init=False)

    shadow: ShadowWorker | None = None  # once the model is known
    facts: dict[str, Any] = field(default_factory=dict)
    weights: Weights | None = None  # once the model is known
    heads: Heads | None = None
    is_replica: bool = False
    is_open: bool = False
    sends_changes: bool = False
    limits: Limits = field(default_factory=lambda: Limits(_NOT_OPEN))
    space: Space | None = None
    instance: str = field(default_factory=lambda: uuid.uuid4().hex)


class WorkerSide(Protocol):
    """What whoever stands for a worker uses of the connector, which has the attributes' meaning."""

    link: Link
    rows: Blends | None
    refiner: Refiner | None
    recent: OrderedDict[str, BlendOutcome | dict[str, Any]]
    worker_state: WorkerState
    step_timer: StepTimer
    closing: Callable[[], None] | None


class StepTimer:
    """How many steps this engine made, and how long one takes: alone, and interleaved with other
    work, whose own time is not counted.
    """

    def __init__(self) -> None:
        self._count, self._last, self._between = 0, 0.0, 0.0
        self._alone: deque[float] = deque(maxlen=_STEPS)
        self._interleaved: deque[float] = deque(maxlen=_STEPS)

    def step_begins(self) -> None:
        """Called as a step begins."""
        now = time.perf_counter()
        # From one step's begin to the next one's. Ends of steps have no hook that both runners
        # call.
        took = now - self._last - self._between
        if 0 < took < _LONGEST_STEP_S:
            (self._interleaved if self._between else self._alone).append(took)
        self._count, self._last, self._between = self._count + 1, now, 0.0

    def exclude(self, seconds: float) -> None:
        """This was spent on something else than a step."""
        self._between += seconds

    def to_plain(self) -> dict[str, float]:
        """``steps`` so far, ``step_s`` of a recent one, ``interleaved_s`` of one that other work
        followed: handing that over, and what it leaves of the caches, cost time as well. 0 where
        none is known.
        """
        interleaved = statistics.median(self._interleaved) if self._interleaved else 0.0
        alone = statistics.median(self._alone) if self._alone else interleaved
        return {"steps": self._count, "step_s": alone, "interleaved_s": interleaved}
