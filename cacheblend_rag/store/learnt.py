"""A store with chunks beside it that were learnt from traffic, in memory and for a time only."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Container, Iterable, Iterator, Sequence
from contextlib import contextmanager
from threading import Lock

from cacheblend_rag.store.around import StoreAround
from cacheblend_rag.store.base import Changes, ChunkInfo, ChunkKV, Found, KVStore, ask
from cacheblend_rag.store.memory import MemoryStore


class LearningStore(StoreAround):
    """``store``, and what ``put_learnt`` was given: ``get`` and ``scan`` know both.

    A learnt chunk goes when nobody used it for ``ttl_s`` seconds. ``contains``, ``put`` and the
    notes on documents are of ``store`` alone: a chunk that is learnt may be ingested too, and then
    stays.

    Args:
        learnt: has the learnt chunks, and evicts those that do not fit.
        clock: seconds, forward only.
    """

    def __init__(
        self,
        store: KVStore,
        learnt: MemoryStore,
        ttl_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(store)
        self.learnt = learnt
        self._ttl_s, self._clock = ttl_s, clock
        self._lock = Lock()
        self._used: dict[str, float] = {}  # when a learnt chunk was used last, the oldest first

    def put_learnt(self, key: str, chunk: ChunkKV) -> str:
        """Keep a chunk in memory only. Returns why it is not kept, or ""."""
        problem = self.learnt.put(key, chunk)
        if not problem:
            self._use(key)
        return problem

    def expire(self) -> None:
        """Drop learnt chunks that were not used for too long."""
        oldest = self._clock() - self._ttl_s
        with self._lock:
            gone = [key for key, used in self._used.items() if used < oldest]
            for key in gone:
                del self._used[key]
        for key in gone:
            self.learnt.discard(key)

    def get(self, key: str) -> ChunkKV | None:
        # Memory first: a learnt chunk that is also stored is the same KV, and nearer.
        return self._near(key) or self.store.get(key)

    def get_many(self, keys: Sequence[str]) -> Found:
        return self._with_near(keys, self.store.get_many)

    def get_in_time(self, keys: Sequence[str], within_s: float) -> Found:
        return self._with_near(keys, lambda far: self.store.get_in_time(far, within_s))

    def in_memory(self, key: str) -> bool:
        return self.learnt.in_memory(key) or self.store.in_memory(key)

    def prefetch(self, keys: Iterable[str]) -> None:
        self.store.prefetch([key for key in keys if not self.learnt.in_memory(key)])

    def discard(self, key: str) -> None:
        # The oldest are first, as each use moves a key to the end.
        with self._lock:
            self._used.pop(key, None)
        self.learnt.discard(key)
        self.store.discard(key)

    def touch(self, key: str) -> None:
        if self.learnt.contains(key):
            self.learnt.touch(key)
            self._use(key)
        else:
            self.store.touch(key)

    def scan(self) -> Iterator[ChunkInfo]:
        self.expire()
        known = set[str]()
        for info in self.learnt.scan():
            known.add(info.key)
            yield info
        yield from self.store.scan_others(known)

    def scan_others(self, known: Container[str]) -> Iterator[ChunkInfo]:
        return (info for info in self.scan() if info.key not in known)

    @contextmanager
    def pinned(self, keys: Iterable[str]) -> Iterator[None]:
        keys = list(keys)
        with self.learnt.pinned(keys), self.store.pinned(keys):
            yield

    def drop(self, documents: Iterable[str], only: Collection[str] | None = None) -> list[str]:
        keys = self.store.drop(documents, only)
        for key in keys:
            self.learnt.discard(key)
        return keys

    def changes(self, cursor: object) -> Changes:
        self.expire()
        of_store, of_learnt = cursor if isinstance(cursor, tuple) else (None, None)
        there = self.store.changes(of_store)
        for key in there.removed:  # whoever forgot it meant the text
            self.learnt.discard(key)
        here = self.learnt.changes(of_learnt)
        # A text may be learnt first and ingested later: then it has not gone.
        gone = [key for key in here.removed if ask(self.store.contains, key) is not True]
        return Changes(
            (there.cursor, here.cursor),
            [*there.added, *here.added],
            [*there.removed, *gone],
            there.whole or here.whole,
        )

    def close(self) -> None:
        self.learnt.close()
        super().close()

    def _near(self, key: str) -> ChunkKV | None:
        if not self.learnt.contains(key):  # or each chunk of the store would count as a miss
            return None
        self._use(key)
        return self.learnt.get(key)

    def _use(self, key: str) -> None:
        with self._lock:
            self._used.pop(key, None)
            self._used[key] = self._clock()

    def _with_near(self, keys: Sequence[str], get: Callable[[list[str]], Found]) -> Found:
        near = {key: chunk for key in keys if (chunk := self._near(key)) is not None}
        far = [key for key in keys if key not in near]
        if not far:
            return Found([near[key] for key in keys])
        found = get(far)
        chunks = {**near, **dict(zip(far, found.chunks, strict=True))}
        return found._replace(chunks=[chunks[key] for key in keys])
