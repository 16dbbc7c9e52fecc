"""Which chunks the fronts of one engine find in prompts, in step with the engine's store."""

from __future__ import annotations

import time
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from threading import Event, Lock, Thread
from typing import Any
from weakref import WeakKeyDictionary

from cacheblend_rag.engine import Engine
from cacheblend_rag.engine.base import spoken
from cacheblend_rag.errors import ClosedError, EngineDeadError, StoreError
from cacheblend_rag.keys import KeySpace
from cacheblend_rag.locate import ChunkIndex

_EVERY_S = 0.5

Row = Sequence[Any]  # key, token ids as int32 bytes, base


class KnownChunks:
    """Brings what any process stored or forgot into the indexes of an engine's fronts. A chunk is
    known where every rank's store has it.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine, self._lock, self._closed = engine, Lock(), Event()
        self._fronts: WeakKeyDictionary[ChunkIndex, KeySpace] = WeakKeyDictionary()
        self._held: list[set[str]] = []  # keys, by rank
        self._due = 0.0

    def begin(self, index: ChunkIndex, space: KeySpace, ranks: Sequence[Sequence[Row]]) -> None:
        """Keep the first front's ``index`` in step from now on; ``ranks`` lists what each has."""
        with self._lock:
            self._fronts[index] = space
            self._list(ranks)

    def join(self, index: ChunkIndex, space: KeySpace) -> None:
        """Keep another front's ``index`` in step from now on."""
        with self._lock, suppress(StoreError):  # it is away: the news will say when it is not
            self._fronts[index] = space
            self._list(spoken(self._engine.rpc("cacheblend_list")))

    def follow(self) -> None:
        """Learn in a thread, twice a second, until ``close``."""
        Thread(target=self._run, name="cacheblend-known", daemon=True).start()

    def learn_if_due(self) -> None:
        """``learn``, twice a second at most: for engines that serve one call at a time. Where what
        is stored can't be listed, the next call tries again.
        """
        if time.monotonic() < self._due or not self._lock.acquire(blocking=False):
            return  # who holds the lock may wait for this very thread's stream to end
        try:
            self._due = time.monotonic() + _EVERY_S
            with suppress(StoreError):
                self._learn()
        finally:
            self._lock.release()

    def learn(self) -> None:
        """Take what the workers learnt since the call before; waits for no store, but for a listing
        where that is needed.

        Raises:
            StoreError: what is stored could not be listed; the next call tries again.
        """
        with self._lock:
            self._learn()

    def close(self) -> None:
        """End the thread."""
        self._closed.set()

    def _run(self) -> None:
        while not self._closed.wait(_EVERY_S):
            try:
                self.learn()
            except StoreError:
                continue  # it is away
            except (ClosedError, EngineDeadError):
                return

    def _learn(self) -> None:
        news = spoken(self._engine.rpc("cacheblend_news"))
        for held, (_, removed, _) in zip(self._held, news, strict=True):
            held.difference_update(removed)
            self._drop(removed)
        for held, (added, _, _) in zip(self._held, news, strict=True):
            held.update(row[0] for row in added)
        for added, _, _ in news:
            self._add(added)
        if any(whole for _, _, whole in news):
            self._list(spoken(self._engine.rpc("cacheblend_list")))

    def _list(self, ranks: Sequence[Sequence[Row]]) -> None:
        self._held = [{row[0] for row in rank} for rank in ranks]
        for index in self._fronts:
            for key in index.keys() - self._everywhere():
                index.discard(key)
        self._add(ranks[0])

    def _everywhere(self) -> set[str]:
        return set.intersection(*self._held)

    def _drop(self, keys: Iterable[str]) -> None:
        for key in keys:
            for index in self._fronts:
                index.discard(key)

    def _add(self, rows: Iterable[Row]) -> None:
        there = [row for row in rows if all(row[0] in held for held in self._held)]
        for index, space in self._fronts.items():
            index.add_many(ours(space, there))


def ours(space: KeySpace, rows: Iterable[Row]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Keys and token ids of the chunks of this key space."""
    for key, raw, base in rows:
        if base == len(space.prefix_ids):
            ids = tuple(array("i", raw))
            if space.key(ids) == key:
                yield key, ids
