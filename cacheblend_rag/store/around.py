"""A store around another one. What a subclass does not change, the other one does."""

from __future__ import annotations

from collections.abc import Collection, Container, Iterable, Iterator, Sequence
from contextlib import contextmanager

from cacheblend_rag.store.base import Changes, ChunkInfo, ChunkKV, Found, KVStore, StoreStats


class StoreAround(KVStore):
    """Hands everything on to ``store``, which is closed with this one.

    But for ``forget``, ``gc`` and ``drop``: these are made of ``unregister`` and ``discard``, and a
    subclass may have changed ``discard``.
    """

    def __init__(self, store: KVStore) -> None:
        self.store = store

    def contains(self, key: str) -> bool:
        return self.store.contains(key)

    def get(self, key: str) -> ChunkKV | None:
        return self.store.get(key)

    def get_many(self, keys: Sequence[str]) -> Found:
        return self.store.get_many(keys)

    def get_in_time(self, keys: Sequence[str], within_s: float) -> Found:
        return self.store.get_in_time(keys, within_s)

    def in_memory(self, key: str) -> bool:
        return self.store.in_memory(key)

    def prefetch(self, keys: Iterable[str]) -> None:
        self.store.prefetch(keys)

    @property
    def bandwidth(self) -> float | None:
        return self.store.bandwidth

    def put(self, key: str, chunk: ChunkKV) -> str:
        return self.store.put(key, chunk)

    def discard(self, key: str) -> None:
        self.store.discard(key)

    def scan(self) -> Iterator[ChunkInfo]:
        return self.store.scan()

    def scan_others(self, known: Container[str]) -> Iterator[ChunkInfo]:
        return self.store.scan_others(known)

    def changes(self, cursor: object) -> Changes:
        return self.store.changes(cursor)

    def stats(self) -> StoreStats:
        return self.store.stats()

    def touch(self, key: str) -> None:
        self.store.touch(key)

    @contextmanager
    def pinned(self, keys: Iterable[str]) -> Iterator[None]:
        with self.store.pinned(keys):
            yield

    @property
    def keeps_documents(self) -> bool:
        return self.store.keeps_documents

    def register(self, document: str, keys: Iterable[str]) -> None:
        self.store.register(document, keys)

    def documents(self) -> set[str]:
        return self.store.documents()

    def document_keys(self, document: str) -> list[str]:
        return self.store.document_keys(document)

    def unregister(
        self,
        documents: Iterable[str],
        only: Collection[str] | None = None,
        forgotten: Collection[str] | None = None,
    ) -> list[str]:
        return self.store.unregister(documents, only, forgotten)

    def close(self) -> None:
        self.store.close()
