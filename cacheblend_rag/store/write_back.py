"""A store that is written to later, so that who puts does not wait for it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Container, Iterator, Sequence
from threading import Lock

from cacheblend_rag.errors import StoreError
from cacheblend_rag.store.around import StoreAround
from cacheblend_rag.store.base import ChunkInfo, ChunkKV, Found, KVStore
from cacheblend_rag.store.parallel import Readers


class WriteBackStore(StoreAround):
    """``store``, written to by one thread. Chunks not written yet are served from memory, and are
    lost if the process dies; ``close`` waits until all are written. A failure to write warns.

    Args:
        store: what to write to; closed with this one.
        waiting_bytes: of chunks that may wait. When there are more, ``put`` writes itself.
    """

    def __init__(self, store: KVStore, waiting_bytes: int = 1 << 30) -> None:
        super().__init__(store)
        self._most = waiting_bytes
        self._lock, self._writing = Lock(), Lock()
        self._waiting: dict[str, ChunkKV] = {}
        self._writer = Readers(1)

    def contains(self, key: str) -> bool:
        return self._not_yet_written(key) is not None or self.store.contains(key)

    def get(self, key: str) -> ChunkKV | None:
        waiting = self._not_yet_written(key)
        return self.store.get(key) if waiting is None else waiting

    def get_many(self, keys: Sequence[str]) -> Found:
        return self._with_waiting(keys, self.store.get_many)

    def get_in_time(self, keys: Sequence[str], within_s: float) -> Found:
        return self._with_waiting(keys, lambda others: self.store.get_in_time(others, within_s))

    def in_memory(self, key: str) -> bool:
        return self._not_yet_written(key) is not None or self.store.in_memory(key)

    def put(self, key: str, chunk: ChunkKV) -> str:
        if not chunk.is_finite:
            return self.store.put(key, chunk)  # which does not keep it, and counts it
        with self._lock:
            # Where the remote is slower than ingestion, ``put`` slows down with it instead of
            # filling memory.
            waiting = sum(other.nbytes for other in self._waiting.values())
            has_room = waiting + chunk.nbytes <= self._most
            if has_room:
                self._waiting[key] = chunk
        if not has_room:
            return self.store.put(key, chunk)
        self._writer.start(self._write, [key])
        return ""

    def discard(self, key: str) -> None:
        with self._lock:
            self._waiting.pop(key, None)
        with self._writing:  # or what is being written just now would stay
            self.store.discard(key)

    def scan(self) -> Iterator[ChunkInfo]:
        return self.scan_others(())

    def scan_others(self, known: Container[str]) -> Iterator[ChunkInfo]:
        # What waits is noted first: a chunk that is written while the store is listed would else be
        # in neither list.
        with self._lock:
            waiting = dict(self._waiting)
        for key, chunk in waiting.items():
            if key not in known:
                yield ChunkInfo.of(key, chunk)
        for info in self.store.scan_others(known):
            if info.key not in waiting:
                yield info

    def close(self) -> None:
        self._writer.close(wait_for_all=True)
        super().close()

    def _with_waiting(self, keys: Sequence[str], get: Callable[[list[str]], Found]) -> Found:
        waiting = {key: self._not_yet_written(key) for key in keys}
        others = [key for key, chunk in waiting.items() if chunk is None]
        found = get(others)
        chunks = waiting | dict(zip(others, found.chunks, strict=True))
        return found._replace(chunks=[chunks[key] for key in keys])

    def _not_yet_written(self, key: str) -> ChunkKV | None:
        with self._lock:
            return self._waiting.get(key)

    def _write(self, key: str) -> None:
        with self._writing:
            chunk = self._not_yet_written(key)
            if chunk is None:
                return  # discarded meanwhile, or put twice
            try:
                problem = self.store.put(key, chunk)
            except StoreError as error:
                problem = str(error)
            finally:
                # not sooner: until the store has it, reads find it here
                with self._lock:
                    self._waiting.pop(key, None)
            if problem:
                warnings.warn(f"Not written: {problem}", RuntimeWarning, stacklevel=2)
