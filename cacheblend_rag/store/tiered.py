"""A store made of two stores: look in the fast one first, write through to the slow one."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager

from cacheblend_rag.errors import StoreError
from cacheblend_rag.store.base import ChunkInfo, ChunkKV, KVStore, StoreStats
from cacheblend_rag.store.parallel import Readers

_PREFETCHERS = 4


class TieredStore(KVStore):
    """``fast`` holds copies of what ``slow`` holds; a hit in ``slow`` is promoted to ``fast``.

    Nest it for more than two tiers. ``stats()`` describes the pair as one store:

    * hits: found in either tier; misses: found in neither.
    * corrupt: of both tiers; evictions: of ``slow``, since a chunk that only leaves ``fast`` is
      not forgotten.
    * chunks and nbytes: of the tier that holds more, because the other one holds copies.

    Ask ``store.fast.stats()`` and ``store.slow.stats()`` for one tier.
    """

    def __init__(self, fast: KVStore, slow: KVStore) -> None:
        self.fast = fast
        self.slow = slow
        self._prefetching = Readers(_PREFETCHERS)

    def contains(self, key: str) -> bool:
        return self.fast.contains(key) or self.slow.contains(key)

    def get(self, key: str) -> ChunkKV | None:
        chunk = self.fast.get(key)
        if chunk is not None:
            self.slow.touch(key)  # or the most wanted chunks would be the first to leave it
            return chunk
        chunk = self.slow.get(key)
        if chunk is not None:
            self._promote(key, chunk)
        return chunk

    def get_many(self, keys: Sequence[str]) -> list[ChunkKV | None]:
        found = {}
        for key in keys:
            found[key] = self.fast.get(key)
            if found[key] is not None:
                self.slow.touch(key)
        missing = [key for key, chunk in found.items() if chunk is None]
        for key, chunk in zip(missing, self.slow.get_many(missing), strict=True):
            if chunk is not None:
                found[key] = chunk
                self._promote(key, chunk)
        return [found[key] for key in keys]

    def prefetch(self, keys: Iterable[str]) -> None:
        self._prefetching.start(self._bring, [key for key in keys if not self.fast.contains(key)])

    @property
    def bandwidth(self) -> float | None:
        return self.slow.bandwidth

    def put(self, key: str, chunk: ChunkKV) -> None:
        # Fast first: a chunk that the slow tier cannot write is still served from the fast one.
        self.fast.put(key, chunk)
        self.slow.put(key, chunk)

    def discard(self, key: str) -> None:
        # Slow first: otherwise a reader could promote the chunk again between the two.
        self.slow.discard(key)
        self.fast.discard(key)

    def touch(self, key: str) -> None:
        self.fast.touch(key)
        self.slow.touch(key)

    @contextmanager
    def pinned(self, keys: Iterable[str]) -> Iterator[None]:
        keys = list(keys)
        with self.fast.pinned(keys), self.slow.pinned(keys):
            yield

    @property
    def keeps_documents(self) -> bool:
        return self.fast.keeps_documents or self.slow.keeps_documents

    @property
    def _notes(self) -> KVStore:
        """The tier that lives longest of those that keep notes on documents."""
        return self.slow if self.slow.keeps_documents else self.fast

    def label(self, document: str, keys: Iterable[str]) -> None:
        self._notes.label(document, keys)

    def documents(self) -> set[str]:
        return self._notes.documents()

    def unlabel(self, documents: Iterable[str], only: Collection[str] | None = None) -> list[str]:
        return self._notes.unlabel(documents, only)

    def scan(self) -> Iterator[ChunkInfo]:
        seen: set[str] = set()
        for tier in (self.fast, self.slow):
            for info in tier.scan():
                if info.key not in seen:
                    seen.add(info.key)
                    yield info

    def stats(self) -> StoreStats:
        fast, slow = self.fast.stats(), self.slow.stats()
        return StoreStats(
            chunks=max(fast.chunks, slow.chunks),
            nbytes=max(fast.nbytes, slow.nbytes),
            hits=fast.hits + slow.hits,
            misses=slow.misses,
            evictions=slow.evictions,
            corrupt=fast.corrupt + slow.corrupt,
        )

    def close(self) -> None:
        self._prefetching.close()
        self.fast.close()
        self.slow.close()

    def _bring(self, key: str) -> None:
        if not self.fast.contains(key) and (chunk := self.slow.get(key)) is not None:
            self._promote(key, chunk)

    def _promote(self, key: str, chunk: ChunkKV) -> None:
        try:
            self.fast.put(key, chunk)
        except StoreError as error:
            # The chunk was read: serve it, and say that the fast tier is out of order.
            warnings.warn(f"Not promoted to the fast tier: {error}", RuntimeWarning, stacklevel=3)
