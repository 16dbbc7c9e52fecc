"""What the stores count: for ``stats``, and for Prometheus and OpenTelemetry where installed."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Literal

from cacheblend_rag.store import metrics
from cacheblend_rag.store.base import ChunkKV, StoreStats

Event = Literal["hits", "misses", "evictions", "corrupt"]

_RECENT = 0.1  # weight of one load in the measured bandwidth


class Load:
    """A look-up under way."""

    chunk: ChunkKV | None = None


class EventCounts:
    """How often each event happened in one tier; may be used from several threads."""

    def __init__(self, tier: str) -> None:
        self.tier = tier
        self._lock = Lock()
        self._events: Counter[Event] = Counter()
        self._bandwidth: float | None = None

    @property
    def bandwidth(self) -> float | None:
        """Bytes a second that recent loads reached; None before the first."""
        return self._bandwidth

    def add(self, event: Event, times: int = 1) -> None:
        """Count ``event``."""
        if times:
            with self._lock:
                self._events[event] += times
            metrics.count(self.tier, event, times)

    def wrote(self, nbytes: int) -> None:
        """Count bytes of KV put."""
        metrics.wrote(self.tier, nbytes)

    @contextmanager
    def loading(self) -> Iterator[Load]:
        """Time a look-up, and count it by what it set as ``chunk``."""
        load, started = Load(), time.perf_counter()
        with metrics.span("cacheblend.store.get", tier=self.tier) as attributes:
            yield load
            nbytes = 0 if load.chunk is None else load.chunk.nbytes
            attributes |= {"hit": load.chunk is not None, "bytes": nbytes}
        self.add("misses" if load.chunk is None else "hits")
        if nbytes:
            self._loaded(nbytes, time.perf_counter() - started)

    def stats(self, *, chunks: int, nbytes: int) -> StoreStats:
        """The counts so far, together with what the store holds now."""
        with self._lock:
            events = self._events.copy()
        return StoreStats(
            chunks=chunks,
            nbytes=nbytes,
            hits=events["hits"],
            misses=events["misses"],
            evictions=events["evictions"],
            corrupt=events["corrupt"],
        )

    def _loaded(self, nbytes: int, seconds: float) -> None:
        now = nbytes / max(seconds, 1e-9)
        with self._lock:
            past = now if self._bandwidth is None else self._bandwidth
            self._bandwidth = past + _RECENT * (now - past)
        metrics.loaded(self.tier, nbytes, seconds)
