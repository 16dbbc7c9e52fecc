"""The worker's side of the chunk store: what no step of the engine waits for."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

from cacheblend_rag.daemons import DaemonPool
from cacheblend_rag.engine.base import TICKET, as_result
from cacheblend_rag.errors import CacheBlendError
from cacheblend_rag.keys import KeySpace
from cacheblend_rag.store.base import ChunkInfo, ChunkKV, KVStore, ask, discard_all, document_id
from cacheblend_rag.store.follow import Follower
from cacheblend_rag.store.learnt import LearningStore
from cacheblend_rag.store.registry import DocumentRegistry

Work = Callable[[], Any]
logger = logging.getLogger("vllm.cacheblend_rag")
_MOST_RESULTS = 10_000  # that wait to be taken


class StoreThread:
    """One thread that does what it is given, in order, and one for what may take long and changes
    nothing; results wait until they are taken.
    """

    def __init__(self) -> None:
        self._numbers, self._results = itertools.count(), dict[int, Future[Any]]()
        self._pool, self._aside = (DaemonPool(1, f"cacheblend-{n}") for n in ("store", "list"))

    def start(self, work: Work, *, aside: bool = False) -> dict[str, int]:
        """Have ``work`` done; returns the ticket for its result. ``aside``: by the other thread."""
        number = next(self._numbers)
        pool = self._aside if aside else self._pool
        self._results[number] = pool.submit(work)
        if len(self._results) > _MOST_RESULTS:  # of callers that were interrupted
            self._results.pop(next(iter(self._results)))
        return {TICKET: number}

    def take(self, number: int) -> list[Any]:
        """The result, once; empty while there is none. An error is one, too: raised in a worker, it
        would arrive nameless.
        """
        result = self._results.get(number)
        if result is None or not result.done():
            return []
        del self._results[number]
        error = result.exception()
        if error is None:
            return [result.result()]
        if not isinstance(error, CacheBlendError):
            logger.error("the store failed", exc_info=error)
        return [as_result(error, "the store failed")]

    def close(self) -> None:
        """End the thread when it is done with what it was given; waits for nothing."""
        self._pool.close(drop=False)
        self._aside.close(drop=False)


class RankStore:
    """A rank's store, its notes on documents, and who follows its changes.

    Args:
        store: closed with this.
        forget: drops copies of a chunk outside the store; from any thread.
        leads: what it stores is what all ranks read, and is counted.
    """

    def __init__(
        self, store: KVStore, forget: Callable[[str], object], *, leads: bool = True
    ) -> None:
        self.store, self._forget, self._leads = store, forget, leads
        # A store that keeps no chunks keeps no notes. On each rank: all are asked, and one without
        # notes would answer otherwise.
        self._registry = store if store.keeps_documents else DocumentRegistry()
        self.follower = Follower(store, forget)
        self._listing = self.follower.listing
        self.thread = StoreThread()

    def missing(self, keys: Sequence[str]) -> list[str]:
        """Those that are not stored, as far as the store can be asked."""
        return [key for key in keys if ask(self.store.contains, key) is not True]

    def put(
        self, keys: Sequence[str], chunks: Sequence[ChunkKV], *, learnt: bool = False
    ) -> tuple[int, dict[str, str]]:
        """The bytes stored, and why what key was not. What is ``learnt`` stays in memory."""
        stored, refused = 0, dict[str, str]()
        keep = self.store.put
        if learnt:
            assert isinstance(self.store, LearningStore)
            keep = self.store.put_learnt
        for key, chunk in zip(keys, chunks, strict=True):
            if problem := keep(key, chunk):
                refused[key] = problem
                continue
            stored += chunk.nbytes if self._leads else 0
            self.follower.note([ChunkInfo.of(key, chunk)])
        return stored, refused

    def forget(self, keys: Sequence[str]) -> None:
        """Drop chunks, and the copies of them outside the store."""
        try:
            discard_all(self.store, keys)
        # The copies go in any case: what must be forgotten may not be served from memory because
        # the disk refused.
        finally:
            for key in keys:
                self._forget(key)
            # Told at once, and not only with the next look at the store: a plan made now must not
            # count on them.
            self.follower.note(removed=keys)

    def register(self, documents: Sequence[tuple[str, Sequence[str]]]) -> None:
        """Note which keys each document consists of."""
        for document, keys in documents:
            self._registry.register(document, keys)

    def registered(self, documents: Sequence[str]) -> list[str]:
        """Those that something is noted for."""
        return [document for document in documents if self._registry.document_keys(document)]

    def document_keys(self, document: str) -> list[str]:
        """As ``KVStore.document_keys``."""
        return self._registry.document_keys(document)

    def unregister(
        self,
        documents: Sequence[str],
        only: Sequence[str] | None,
        forgotten: Sequence[str] | None = None,
    ) -> list[str]:
        """As ``KVStore.unregister``, of documents by name. A chunk that somebody stored again
        meanwhile keeps its notes.
        """
        gone = forgotten and [key for key in forgotten if ask(self.store.contains, key) is False]
        return self._registry.unregister(map(document_id, documents), only, gone)

    def stats(self) -> dict[str, int]:
        """The store's counts."""
        found = dict(self.store.stats()._asdict())
        if isinstance(self.store, LearningStore):
            learnt = self.store.learnt.stats()
            found |= {"learnt_chunks": learnt.chunks, "learnt_bytes": learnt.nbytes}
        return found

    def page(
        self,
        space: KeySpace,
        after: str,
        limit: int,
        document: str | None = None,
        *,
        fresh: bool = False,
    ) -> list[str]:
        """Keys of stored chunks of a key space in order, or those of a document, at most ``limit``
        that come behind ``after``. ``fresh``: as the store says now, else as far as is known.
        """
        if fresh:
            self._listing.void()
        among = None if document is None else self.document_keys(document)
        return self._listing.page(space, after, limit, among)

    def owned(self, space: KeySpace, keys: Sequence[str]) -> list[str]:
        """Those of ``keys`` that are of a key space."""
        return self._listing.among(space, keys)

    def count(self, space: KeySpace) -> int:
        """How many chunks of a key space are stored."""
        return self._listing.count(space)

    def close(self) -> None:
        """End the threads and close the store."""
        self.follower.close()
        self.thread.close()
        self.store.close()
