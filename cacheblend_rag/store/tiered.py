"""A store made of two stores: look in the fast one first, write through to the slow one."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

from cacheblend_rag.errors import StoreError, UnavailableError
from cacheblend_rag.store.base import Changes, ChunkInfo, ChunkKV, Found, KVStore, StoreStats, ask
from cacheblend_rag.store.counts import EventCounts, Meter, found_within
from cacheblend_rag.store.memory import MemoryStore
from cacheblend_rag.store.parallel import Readers

_READERS = 8
_PREFETCHERS = 4
_Answer = TypeVar("_Answer")
_BACKLOG = 1000  # chunks to promote, and uses to report to the slow tier


class TieredStore(KVStore):
    """``fast`` holds copies of what ``slow`` holds; a hit in ``slow`` is promoted to ``fast``.

    Nest it for more than two tiers. ``stats()`` describes the pair as one store:

    * hits: found in either tier; misses: found in neither.
    * corrupt, timed_out: of both tiers; unavailable: of ``slow``.
    * evictions: of ``slow``, since a chunk that only leaves ``fast`` is not forgotten.
    * chunks and nbytes: of the tier that holds more, because the other one holds copies.

    Ask ``store.fast.stats()`` and ``store.slow.stats()`` for one tier.
    """

    def __init__(self, fast: KVStore, slow: KVStore) -> None:
        self.fast = fast
        self.slow = slow
        self._reading, self._prefetching = Readers(_READERS), Readers(_PREFETCHERS)
        self._reporting, self._unreported = Readers(1), deque[str](maxlen=_BACKLOG)
        self._meter, self._counts = Meter(), EventCounts("tiers")
        self._owed: list[str] = []  # forgotten by others, and not dropped here yet

    def contains(self, key: str) -> bool:
        there = ask(self.slow.contains, key)
        if isinstance(there, UnavailableError) and self.fast.contains(key):
            return True
        return _answered(there)

    def get(self, key: str) -> ChunkKV | None:
        near = ask(self.fast.get, key)
        if isinstance(near, ChunkKV):
            self.slow.touch(key)  # or the most wanted chunks would be the first to leave it
            return near
        # A fast tier that could not be asked leaves the answer open only where the slow one has
        # nothing.
        return self._load(key) or _answered(near)

    def get_many(self, keys: Sequence[str]) -> Found:
        return self._with_near(
            keys, lambda far: Found.of(far, self._reading.map(partial(ask, self._load), far))
        )

    def get_in_time(self, keys: Sequence[str], within_s: float) -> Found:
        # what misses the deadline is promoted all the same: the next one who asks has it at once
        return self._with_near(
            keys,
            lambda far: found_within(self._reading, self._load, far, within_s, self._counts),
        )

    def in_memory(self, key: str) -> bool:
        return self.fast.in_memory(key) or self.slow.in_memory(key)

    def prefetch(self, keys: Iterable[str]) -> None:
        if self._prefetching.backlog < _BACKLOG:  # else the slow tier is much behind already
            missing = [key for key in keys if not self.fast.in_memory(key)]
            self._prefetching.start(self._fetch, missing)

    @property
    def bandwidth(self) -> float | None:
        return self._meter.bandwidth

    def put(self, key: str, chunk: ChunkKV) -> str:
        # Fast first: a chunk that the slow tier cannot write is still served from the fast one.
        self._put_near(key, chunk)
        return self.slow.put(key, chunk)

    def discard(self, key: str) -> None:
        # Slow first: otherwise a reader could promote the chunk again between the two.
        try:
            self.slow.discard(key)
        finally:
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
    def _registry(self) -> KVStore:
        """The tier that lives longest of those that keep notes on documents."""
        return self.slow if self.slow.keeps_documents else self.fast

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

    def drop(self, documents: Iterable[str], only: Collection[str] | None = None) -> list[str]:
        # A copy may be refused where it is not in memory: the notes must outlast that.
        if self._registry is self.fast or not isinstance(self.fast, MemoryStore):
            return super().drop(documents, only)
        keys = self.slow.drop(documents, only)
        for key in keys:
            self.fast.discard(key)
        return keys

    def scan(self) -> Iterator[ChunkInfo]:
        seen: set[str] = set()
        for info in self.fast.scan():
            seen.add(info.key)
            yield info
        # A remote is asked for each chunk's head, so those that are known here are left out.
        yield from self.slow.scan_others(seen)

    def changes(self, cursor: object) -> Changes:
        found = self.slow.changes(cursor)
        # A copy that cannot be dropped now is tried again, and keeps nobody from being told.
        owed = [*dict.fromkeys([*self._owed, *found.removed])]
        self._owed = [key for key in owed if self._refuses_to_drop(key)]
        if found.whole and isinstance(self.fast, MemoryStore):
            self.fast.clear()  # what went is not known; what is still there is read again
        return found

    def stats(self) -> StoreStats:
        fast, slow = self.fast.stats(), self.slow.stats()
        return StoreStats(
            chunks=max(fast.chunks, slow.chunks),
            nbytes=max(fast.nbytes, slow.nbytes),
            hits=fast.hits + slow.hits,
            misses=slow.misses,
            evictions=slow.evictions,
            corrupt=fast.corrupt + slow.corrupt,
            timed_out=fast.timed_out
            + slow.timed_out
            + self._counts.stats(chunks=0, nbytes=0).timed_out,
            unavailable=slow.unavailable,
        )

    def close(self) -> None:
        for readers in (self._reporting, self._prefetching, self._reading):
            readers.close()
        self.fast.close()
        self.slow.close()

    def _with_near(self, keys: Sequence[str], get: Callable[[list[str]], Found]) -> Found:
        """What the fast tier has, and what ``get`` finds of the rest."""
        near = {key: ask(self.fast.get, key) for key in keys}
        hits = {key: chunk for key, chunk in near.items() if isinstance(chunk, ChunkKV)}
        # Told by a thread of its own, or a disk that hangs would hold up hits in memory.
        self._unreported.extend(hits)
        if hits and not self._reporting.backlog:
            self._reporting.start(self._report_uses, [None])
        far = [key for key in near if key not in hits]
        found = get(far)
        chunks = {**hits, **dict(zip(far, found.chunks, strict=True))}
        unasked = {
            key
            for key, answer in near.items()
            if isinstance(answer, UnavailableError) and chunks[key] is None
        }
        return Found(
            [chunks[key] for key in keys],
            found.timed_out,
            (found.unavailable | unasked) - found.timed_out,
        )

    def _report_uses(self, _: None) -> None:
        while self._unreported:
            self.slow.touch(self._unreported.popleft())

    def _refuses_to_drop(self, key: str) -> bool:
        try:
            self.fast.discard(key)
        except StoreError as error:
            warnings.warn(f"Not dropped from the fast tier: {error}", RuntimeWarning, stacklevel=3)
            return True
        return False

    def _load(self, key: str) -> ChunkKV | None:
        with self._meter.loading() as load:
            load.chunk = self.slow.get(key)
        if load.chunk is not None:
            self._put_near(key, load.chunk)
        return load.chunk

    def _fetch(self, key: str) -> None:
        # It may have come meanwhile, by a request or an earlier prefetch.
        if ask(self.fast.contains, key) is not True:
            ask(self._load, key)

    def _put_near(self, key: str, chunk: ChunkKV) -> None:
        try:
            self.fast.put(key, chunk)
        except StoreError as error:
            # It holds copies only: say that it is out of order, and go on without.
            warnings.warn(f"Not kept in the fast tier: {error}", RuntimeWarning, stacklevel=3)


def _answered(answer: _Answer | UnavailableError) -> _Answer:
    if isinstance(answer, UnavailableError):
        raise answer
    return answer
