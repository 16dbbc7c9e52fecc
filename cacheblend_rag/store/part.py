"""A store of whole chunks, as a process sees it that computes with some of the KV heads.

Shape legend: L layers, N tokens, H KV heads, D head size.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

from cacheblend_rag.store.around import StoreAround
from cacheblend_rag.store.base import ChunkKV, Found, KVStore
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
        # Copied, or a view would hold the whole chunk in memory.
        part = chunk.kv_L2NHD[:, :, :, self.first : self.first + self.some]
        return ChunkKV(chunk.token_ids, chunk.base, empty(part.shape, part.dtype).copy_(part))


class PartStore(StoreAround):
    """Hands out this rank's heads of what ``store`` holds; the leading rank puts whole chunks.

    Every rank reads whole chunks, checks them and keeps its heads. What others put is seen where
    ``store`` is shared, as folders and remote stores are.
    """

    def __init__(self, store: KVStore, heads: Heads) -> None:
        super().__init__(store)
        self._heads = heads

    def get(self, key: str) -> ChunkKV | None:
        return self._part(self.store.get(key))

    def get_many(self, keys: Sequence[str]) -> Found:
        return self._parts(self.store.get_many(keys))

    def get_in_time(self, keys: Sequence[str], within_s: float) -> Found:
        return self._parts(self.store.get_in_time(keys, within_s))

    @property
    def bandwidth(self) -> float | None:
        whole = self.store.bandwidth
        # Whole chunks are read for some heads of them: so a rank's KV comes at a part of the speed.
        return None if whole is None else whole * self._heads.some / self._heads.all

    def put(self, key: str, chunk: ChunkKV) -> str:
        return self.store.put(key, chunk) if self._heads.leads else ""

    def touch(self, key: str) -> None:
        if self._heads.leads:  # or one use would count once a rank
            self.store.touch(key)

    def register(self, document: str, keys: Iterable[str]) -> None:
        if self._heads.leads:
            self.store.register(document, keys)

    def unregister(
        self,
        documents: Iterable[str],
        only: Collection[str] | None = None,
        forgotten: Collection[str] | None = None,
    ) -> list[str]:
        # One that comes later than the leading rank would undo what was registered in between.
        if not self._heads.leads:
            return []
        return self.store.unregister(documents, only, forgotten)

    def drop(self, documents: Iterable[str], only: Collection[str] | None = None) -> list[str]:
        return self.store.drop(documents, only)

    def _parts(self, found: Found) -> Found:
        return found._replace(chunks=[self._part(chunk) for chunk in found.chunks])

    def _part(self, chunk: ChunkKV | None) -> ChunkKV | None:
        return None if chunk is None else self._heads.of(chunk)
