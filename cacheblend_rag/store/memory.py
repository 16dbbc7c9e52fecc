"""Chunks in this process's memory."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from threading import Lock

from cacheblend_rag.store.base import (
    NO_ROOM,
    NOT_FINITE,
    Changes,
    ChunkInfo,
    ChunkKV,
    KVStore,
    StoreStats,
    check_key,
)
from cacheblend_rag.store.counts import EventCounts
from cacheblend_rag.store.evict import GDSF, Policy, Ranking, recompute_cost
from cacheblend_rag.store.host import pinned
from cacheblend_rag.store.part import Heads
from cacheblend_rag.store.registry import DocumentRegistry

_REMEMBERED = 10_000  # changes, for those who follow them


class MemoryStore(KVStore):
    """At most ``capacity_bytes`` of KV in memory, evicted by ``policy``.

    It keeps the chunks themselves and hands out the same tensors each time; where this process uses
    a GPU, it keeps copies in page-locked memory, which the GPU reads several times faster. A chunk
    that does not get in (larger than the capacity, or colder than all it would push out) counts as
    an eviction. Of whole chunks it keeps only ``heads``, where these are given.
    """

    def __init__(
        self, capacity_bytes: int, *, policy: Policy | None = None, heads: Heads | None = None
    ) -> None:
        if capacity_bytes <= 0:
            raise ValueError(f"capacity_bytes must be positive, not {capacity_bytes}")
        self._lock, self._capacity, self._heads = Lock(), capacity_bytes, heads
        self._chunks: dict[str, ChunkKV] = {}
        self._ranking = Ranking(policy or GDSF(), capacity_bytes)
        self._pins: Counter[str] = Counter()
        self._registry = DocumentRegistry()
        self._changed = deque[str](maxlen=_REMEMBERED)
        self._changes = 0  # of all times
        self._counts = EventCounts("memory")

    def contains(self, key: str) -> bool:
        check_key(key)
        with self._lock:
            return key in self._chunks

    def get(self, key: str) -> ChunkKV | None:
        check_key(key)
        with self._counts.loading() as load, self._lock:
            load.chunk = self._chunks.get(key)
            if load.chunk is not None:
                self._ranking.use(key)
        return load.chunk

    def in_memory(self, key: str) -> bool:
        return self.contains(key)

    def put(self, key: str, chunk: ChunkKV) -> str:
        check_key(key)
        if self._heads is not None:
            chunk = self._heads.of(chunk) or chunk  # it may be ours alone already
        if not chunk.is_finite:
            self._counts.add("corrupt")
            return NOT_FINITE
        cost = recompute_cost(len(chunk.token_ids))
        # Copied before the lock is taken: page-locking takes milliseconds, and readers wait for the
        # lock.
        if chunk.nbytes <= self._capacity and not self.contains(key):
            chunk = pinned(chunk)
        with self._lock:
            evicted = self._ranking.add(key, chunk.nbytes, cost, self._pins)
            if evicted is not None:
                # Not replaced: whoever holds the first one's tensor should be the last to need two.
                self._chunks.setdefault(key, chunk)
                self._note(key)
                for victim in evicted:
                    del self._chunks[victim]
                    self._note(victim)
        self._counts.add("evictions", 1 if evicted is None else len(evicted))
        self._counts.wrote(chunk.nbytes)
        return NO_ROOM if evicted is None else ""

    def discard(self, key: str) -> None:
        check_key(key)
        with self._lock:
            if self._chunks.pop(key, None) is not None:
                self._ranking.remove(key)
                self._note(key)

    def touch(self, key: str) -> None:
        check_key(key)
        with self._lock:
            self._ranking.use(key)

    @contextmanager
    def pinned(self, keys: Iterable[str]) -> Iterator[None]:
        keys = list(keys)
        with self._lock:
            self._pins.update(keys)
        try:
            yield
        finally:
            with self._lock:
                self._pins -= Counter(keys)  # drops what reaches zero

    @property
    def keeps_documents(self) -> bool:
        return True

    def register(self, document: str, keys: Iterable[str]) -> None:
        self._registry.register(document, keys)

    def documents(self) -> set[str]:
        return self._registry.documents()

    def document_keys(self, document: str) -> list[str]:
        return self._registry.document_keys(document)

    def unregister(
        self,
        documents: Iterable[str],
        only: Collection[str] | None = None,
        forgotten: Collection[str] | None = None,
    ) -> list[str]:
        return self._registry.unregister(documents, only, forgotten)

    def scan(self) -> Iterator[ChunkInfo]:
        with self._lock:
            held = list(self._chunks.items())
        for key, chunk in held:
            yield ChunkInfo.of(key, chunk)

    def changes(self, cursor: object) -> Changes:
        with self._lock:
            # A number of changes, so the distance to now says how many to look back.
            since = self._changes - cursor if isinstance(cursor, int) else -1
            if not 0 <= since <= len(self._changed):
                return Changes(self._changes, whole=True)
            keys = dict.fromkeys(islice(reversed(self._changed), since))
            added = [ChunkInfo.of(key, self._chunks[key]) for key in keys if key in self._chunks]
            removed = [key for key in keys if key not in self._chunks]
            return Changes(self._changes, added, removed)

    def clear(self) -> None:
        """Drop every chunk."""
        for info in list(self.scan()):
            self.discard(info.key)

    def stats(self) -> StoreStats:
        with self._lock:
            chunks, nbytes = len(self._chunks), self._ranking.nbytes
        return self._counts.stats(chunks=chunks, nbytes=nbytes)

    def _note(self, key: str) -> None:
        self._changed.append(key)
        self._changes += 1
