"""What the stores count: for ``stats``, and for Prometheus and OpenTelemetry where installed."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from threading import Lock
from typing import Literal, NamedTuple

from cacheblend_rag.errors import UnavailableError
from cacheblend_rag.store import metrics
from cacheblend_rag.store.base import ChunkKV, Found, StoreStats, ask
from cacheblend_rag.store.parallel import Readers

Event = Literal["hits", "misses", "evictions", "corrupt", "timed_out", "unavailable"]

_RECENT = 0.2  # weight of one measurement
_STALE_S = 60.0  # an older one says nothing of the next load
_QUICK_S, _COUNT_RESTS = 0.2, 20.0  # a longer count is made again after so many times its length
_LONGEST_S = 1.0  # a measurement ends, even where there is always another load under way


class Held(NamedTuple):
    """What a store holds."""

    chunks: int
    nbytes: int


class LastCount:
    """Counts anew what a store holds, unless that takes long: then at most a twentieth of the time
    is spent on it, and an earlier count is told. May be used from several threads.
    """

    def __init__(
        self, count: Callable[[], Held], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._count, self._clock, self._lock = count, clock, Lock()
        self._last, self._until = Held(0, 0), float("-inf")

    def now(self) -> Held:
        """What is held, or was; raises what counting raises."""
        with self._lock:
            start = self._clock()
            if start >= self._until:
                self._last = self._count()
                took = self._clock() - start
                self._until = self._clock() + (_COUNT_RESTS * took if took > _QUICK_S else 0.0)
            return self._last


class Load:
    """A look-up under way."""

    chunk: ChunkKV | None = None


class Meter:
    """Bytes a second over the times in which anything was under way, several loads at once counted
    together; may be used from several threads.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._lock = clock, Lock()
        self._loads = self._bytes = 0
        self._started = self._measured = 0.0
        self._bandwidth: float | None = None

    @property
    def bandwidth(self) -> float | None:
        """Recent bytes a second; None where nothing was measured within the last minute."""
        with self._lock:
            fresh = self._clock() - self._measured < _STALE_S
            return self._bandwidth if fresh else None

    @contextmanager
    def loading(self) -> Iterator[Load]:
        """Measure a load, by what the block sets as ``chunk``."""
        with self._lock:
            # The clock runs while anything is under way. Loads side by side would each see a part
            # of the speed, and their sum would be too large if each were timed by itself.
            if not self._loads:
                self._started, self._bytes = self._clock(), 0
            self._loads += 1
        load = Load()
        try:
            yield load
        finally:
            with self._lock:
                self._loads -= 1
                self._bytes += 0 if load.chunk is None else load.chunk.nbytes
                self._measure()

    def _measure(self) -> None:
        now = self._clock()
        seconds = now - self._started
        # Misses tell nothing of the speed. With loads that never pause, a measurement ends all the
        # same.
        if not self._bytes or (self._loads and seconds < _LONGEST_S):
            return
        rate = self._bytes / max(seconds, 1e-9)
        fresh = self._bandwidth is not None and now - self._measured < _STALE_S
        past = self._bandwidth if fresh and self._bandwidth is not None else rate
        self._bandwidth = past + _RECENT * (rate - past)
        self._measured, self._started, self._bytes = now, now, 0


class EventCounts:
    """How often each event happened in one tier; may be used from several threads."""

    def __init__(self, tier: str) -> None:
        self.tier = tier
        self._lock = Lock()
        self._events: Counter[Event] = Counter()
        self._meter = Meter()

    @property
    def bandwidth(self) -> float | None:
        """Bytes a second that recent loads reached; None where there were none."""
        return self._meter.bandwidth

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
        started = time.perf_counter()
        span = metrics.span("cacheblend.store.get", tier=self.tier)
        with span as attributes, self._meter.loading() as load:
            try:
                yield load
            except UnavailableError:
                self.add("unavailable")
                raise
            nbytes = 0 if load.chunk is None else load.chunk.nbytes
            attributes |= {"hit": load.chunk is not None, "bytes": nbytes}
        self.add("misses" if load.chunk is None else "hits")
        if nbytes:
            metrics.loaded(self.tier, nbytes, time.perf_counter() - started)

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
            timed_out=events["timed_out"],
            unavailable=events["unavailable"],
        )


def found_within(
    readers: Readers,
    get: Callable[[str], ChunkKV | None],
    keys: Sequence[str],
    within_s: float,
    counts: EventCounts,
) -> Found:
    """``get`` of all keys at once, and what of it came in time."""
    answers = readers.map_within(partial(ask, get), keys, within_s)
    found = Found.of(keys, answers)
    counts.add("timed_out", len(found.timed_out))
    return found
