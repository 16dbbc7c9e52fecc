"""A store of whole chunks, as a process sees it that computes with some of the KV heads.

Shape legend: L layers, N tokens, H KV heads, D head size.
"""

from __future__ import annotations

from collections.abc import Collection, Container, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from cacheblend_rag.store.base import Changes, ChunkInfo, ChunkKV, Found, KVStore, StoreStats
from cacheblend_rag.store.host import empty


class Heads(NamedTuple):
    """KV heads ``first`` and following, ``some`` of ``all``: what a rank computes with.

    Attributes:
        leads: of the ranks, which share a store, this one writes what all of them read.
    """

    first: int
    some: int
    all: int
    leads: bool = True

    def of(self, chunk: ChunkKV) -> ChunkKV | None:
        """These heads of a whole chunk, in memory of their own; None where it is not whole."""
        if chunk.kv_L2NHD.shape[3] != self.all:
            return None
        if self.some == self.all:
            return chunk
        part = chunk.kv_L2NHD[:, :, :, self.first : self.first + self.some]
        return ChunkKV(chunk.token_ids, chunk.base, empty(part.shape, part.dtype).copy_(part))


class PartStore(KVStore):
    """Hands out this rank's heads of what ``whole`` holds; the leading rank puts whole chunks.

    Every rank reads whole chunks, checks them and keeps its heads. What others put is seen where
    ``whole`` is shared, as folders and remote stores are.
    """

    def __init__(self, whole: KVStore, heads: Heads) -> None:
        self.whole, self._heads = whole, heads

    def contains(self, key: str) -> bool:
        return self.whole.contains(key)

    def get(self, key: str) -> ChunkKV | None:
        return self._part(self.whole.get(key))

    def get_many(self, keys: Sequence[str]) -> Found:
        return self._parts(self.whole.get_many(keys))

    def get_in_time(self, keys: Sequence[str], within_s: float) -> Found:
        return self._parts(self.whole.get_in_time(keys, within_s))

    def in_memory(self, key: str) -> bool:
        return self.whole.in_memory(key)

    def prefetch(self, keys: Iterable[str]) -> None:
        self.whole.prefetch(keys)

    @property
    def bandwidth(self) -> float | None:
        whole = self.whole.bandwidth
        return None if whole is None else whole * self._heads.some / self._heads.all

    def put(self, key: str, chunk: ChunkKV) -> str:
        return self.whole.put(key, chunk) if self._heads.leads else ""

    def discard(self, key: str) -> None:
        self.whole.discard(key)

    def scan(self) -> Iterator[ChunkInfo]:
        return self.whole.scan()

    def scan_others(self, known: Container[str]) -> Iterator[ChunkInfo]:
        return self.whole.scan_others(known)

    def changes(self, cursor: object) -> Changes:
        return self.whole.changes(cursor)

    def stats(self) -> StoreStats:
        return self.whole.stats()

    def touch(self, key: str) -> None:
        if self._heads.leads:  # or one use would count once a rank
            self.whole.touch(key)

    @contextmanager
    def pinned(self, keys: Iterable[str]) -> Iterator[None]:
        with self.whole.pinned(keys):
            yield

    @property
    def keeps_documents(self) -> bool:
        return self.whole.keeps_documents

    def label(self, document: str, keys: Iterable[str]) -> None:
        self.whole.label(document, keys)

    def documents(self) -> set[str]:
        return self.whole.documents()

    def document_keys(self, document: str) -> list[str]:
        return self.whole.document_keys(document)

    def unlabel(self, documents: Iterable[str], only: Collection[str] | None = None) -> list[str]:
        return self.whole.unlabel(documents, only)

    def drop(self, documents: Iterable[str]) -> list[str]:
        return self.whole.drop(documents)

    def close(self) -> None:
        self.whole.close()

    def _parts(self, found: Found) -> Found:
        return found._replace(chunks=[self._part(chunk) for chunk in found.chunks])

    def _part(self, chunk: ChunkKV | None) -> ChunkKV | None:
        return None if chunk is None else self._heads.of(chunk)
