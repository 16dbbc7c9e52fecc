"""Chunks in this process's memory, the least recently used leaving first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from threading import Lock

from cacheblend_rag.store.base import ChunkInfo, ChunkKV, KVStore, StoreStats, check_key
from cacheblend_rag.store.counts import EventCounts


class MemoryStore(KVStore):
    """At most ``capacity_bytes`` of KV in memory.

    It keeps the chunks themselves, not copies, and hands out the same tensors each time. A chunk
    larger than the whole capacity is not kept, which counts as an eviction.
    """

    def __init__(self, capacity_bytes: int) -> None:
        if capacity_bytes <= 0:
            raise ValueError(f"capacity_bytes must be positive, not {capacity_bytes}")
        self._capacity = capacity_bytes
        self._lock = Lock()
        self._chunks: OrderedDict[str, ChunkKV] = OrderedDict()  # least recently used first
        self._nbytes = 0
        self._counts = EventCounts()

    def contains(self, key: str) -> bool:
        check_key(key)
        with self._lock:
            return key in self._chunks

    def get(self, key: str) -> ChunkKV | None:
        check_key(key)
        with self._lock:
            chunk = self._chunks.get(key)
            if chunk is not None:
                self._chunks.move_to_end(key)
        self._counts.add("misses" if chunk is None else "hits")
        return chunk

    def put(self, key: str, chunk: ChunkKV) -> None:
        check_key(key)
        if chunk.nbytes > self._capacity:
            self._counts.add("evictions")
            return
        with self._lock:
            if key not in self._chunks:
                self._make_room(chunk.nbytes)
                self._chunks[key] = chunk
                self._nbytes += chunk.nbytes
            self._chunks.move_to_end(key)

    def discard(self, key: str) -> None:
        check_key(key)
        with self._lock:
            chunk = self._chunks.pop(key, None)
            if chunk is not None:
                self._nbytes -= chunk.nbytes

    def touch(self, key: str) -> None:
        check_key(key)
        with self._lock:
            if key in self._chunks:
                self._chunks.move_to_end(key)

    def scan(self) -> Iterator[ChunkInfo]:
        with self._lock:
            held = list(self._chunks.items())
        for key, chunk in held:
            yield ChunkInfo(key, chunk.token_ids, chunk.base, chunk.nbytes)

    def stats(self) -> StoreStats:
        with self._lock:
            chunks, nbytes = len(self._chunks), self._nbytes
        return self._counts.stats(chunks=chunks, nbytes=nbytes)

    def _make_room(self, nbytes: int) -> None:
        while self._nbytes + nbytes > self._capacity:
            _, evicted = self._chunks.popitem(last=False)
            self._nbytes -= evicted.nbytes
            self._counts.add("evictions")
