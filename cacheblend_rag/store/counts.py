"""Event counts shared by the stores."""

from __future__ import annotations

from collections import Counter
from threading import Lock
from typing import Literal

from cacheblend_rag.store.base import StoreStats

Event = Literal["hits", "misses", "evictions", "corrupt"]


class EventCounts:
    """How often each event happened; may be used from several threads."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._events: Counter[Event] = Counter()

    def add(self, event: Event, times: int = 1) -> None:
        """Count ``event``."""
        with self._lock:
            self._events[event] += times

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
