"""Chunks that stay in GPU memory: a hit needs no transfer."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, replace
from threading import RLock

import torch

from cacheblend_rag.store.base import ChunkKV


@dataclass
class CachedChunk:
    """A chunk whose KV is on the GPU; ``is_complete`` once all of it is on its way there."""

    chunk: ChunkKV
    is_complete: bool = False

    @property
    def kv(self) -> torch.Tensor:
        """[L, 2, N, H, D]."""
        return self.chunk.kv_L2NHD


class DeviceCache:
    """A bounded LRU of whole chunks, filled by the transfers of the requests that use them. Any
    thread may discard a chunk.
    """

    def __init__(self, capacity: int, device: torch.device) -> None:
        self.capacity, self.nbytes = capacity, 0
        self._device = device
        self._held: OrderedDict[str, CachedChunk] = OrderedDict()
        self._lock = RLock()

    def get(self, key: str, chunk: ChunkKV) -> CachedChunk | None:
        """The copy of ``chunk`` under ``key``; also one that another request is still filling."""
        with self._lock:
            held = self._held.get(key)
            # Other tokens' KV would be a wrong answer that nothing else notices.
            if held is None or not _same(held.chunk, chunk):
                return None
            self._held.move_to_end(key)
            return held

    def complete(self, key: str) -> ChunkKV | None:
        """The chunk under ``key`` if no other needs to be read for it; from any thread."""
        # Without the lock, which a transfer may hold while it evicts: one look-up in a dictionary
        # is atomic.
        held = self._held.get(key)
        return held.chunk if held is not None and held.is_complete else None

    def room(self, key: str, chunk: ChunkKV) -> CachedChunk | None:
        """Memory to fill with ``chunk``, in place of what was unused for longest; None where it is
        larger than the whole cache, or has no key. Who fills it sets ``is_complete``.
        """
        if not key or chunk.nbytes > self.capacity:
            return None
        with self._lock:
            self.discard(key)  # of other tokens
            # Also chunks that a request still reads. Their tensors live as long as that request
            # holds them, so the memory is over ``capacity`` for a moment, and never wrong.
            while self.nbytes + chunk.nbytes > self.capacity:
                self.discard(next(iter(self._held)))
            there = torch.empty_like(chunk.kv_L2NHD, device=self._device)
            self._held[key] = CachedChunk(replace(chunk, kv_L2NHD=there))
            self.nbytes += chunk.nbytes
            return self._held[key]

    def give_up(self, key: str, filled: CachedChunk) -> None:
        """``filled`` will never be whole, if it is not yet."""
        if not filled.is_complete and self._held.get(key) is filled:
            self.discard(key)

    def discard(self, key: str) -> None:
        """Forget ``key``. Requests that read it keep its memory until they are done."""
        with self._lock:
            old = self._held.pop(key, None)
            if old is not None:
                self.nbytes -= old.chunk.nbytes


def _same(held: ChunkKV, chunk: ChunkKV) -> bool:
    """Whether both are the KV of the same tokens at the same positions."""
    return (held.token_ids, held.base) == (chunk.token_ids, chunk.base)
