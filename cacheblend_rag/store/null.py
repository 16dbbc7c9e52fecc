"""A store that keeps nothing: the reference for the others, and the off switch."""

from __future__ import annotations

from collections.abc import Iterator

from cacheblend_rag.store.base import ChunkInfo, ChunkKV, KVStore, StoreStats, check_key
from cacheblend_rag.store.counts import EventCounts


class NullStore(KVStore):
    """Keeps nothing; every ``get`` is a miss."""

    def __init__(self) -> None:
        self._counts = EventCounts("null")

    def contains(self, key: str) -> bool:
        check_key(key)
        return False

    def get(self, key: str) -> ChunkKV | None:
        check_key(key)
        self._counts.add("misses")
        return None

    def put(self, key: str, chunk: ChunkKV) -> str:
        check_key(key)
        return "null:// keeps nothing"

    def discard(self, key: str) -> None:
        check_key(key)

    def scan(self) -> Iterator[ChunkInfo]:
        return iter(())

    def stats(self) -> StoreStats:
        return self._counts.stats(chunks=0, nbytes=0)
