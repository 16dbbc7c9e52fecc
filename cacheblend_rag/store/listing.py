"""Which chunks of a key space a store has, in the order of their keys, without asking it anew."""

from __future__ import annotations

import time
from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable, Iterable, Iterator, Sequence
from heapq import merge
from itertools import islice
from threading import Lock

from cacheblend_rag.keys import KeySpace
from cacheblend_rag.known import Row, chunks_of

_AT_ONCE, _REST_S = 16, 0.0005  # rows, and how long other threads are let in behind them
_RUN = 4096  # keys sorted at once: sorting lets no other thread in
_LONGEST_S = 600.0  # a store that is remote does not say what it evicts


class Listing:
    """Made of all that a store has when a key space is first asked for, which takes seconds where
    that is much. From then on it is told what comes and goes. Safe to use from several threads.

    Args:
        scan: all that the store has.
        clock: seconds, forward only.
    """

    def __init__(
        self, scan: Callable[[], Iterable[Row]], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._scan, self._clock = scan, clock
        self._making, self._lock = Lock(), Lock()
        self._keys: dict[KeySpace, list[str]] = {}
        self._made_at: dict[KeySpace, float] = {}
        self._meanwhile: list[tuple[Sequence[Row], Sequence[str]]] | None = None
        self._is_void = False  # what is being listed is not all

    def page(
        self, space: KeySpace, after: str, limit: int, among: Iterable[str] | None = None
    ) -> list[str]:
        """At most ``limit`` keys behind ``after``, of those ``among`` where that is given."""
        keys = self._of(space)
        with self._lock:
            if among is not None:
                known = sorted(key for key in among if key > after and _has(keys, key))
                return known[:limit]
            begin = bisect_right(keys, after)
            return keys[begin : begin + limit]

    def among(self, space: KeySpace, keys: Iterable[str]) -> list[str]:
        """Those of ``keys`` that are there, in order."""
        there = self._of(space)
        with self._lock:
            return sorted(key for key in set(keys) if _has(there, key))

    def count(self, space: KeySpace) -> int:
        """How many there are."""
        keys = self._of(space)
        with self._lock:
            return len(keys)

    def see(self, added: Sequence[Row], removed: Sequence[str]) -> None:
        """Chunks went, and others came."""
        with self._lock:
            if self._meanwhile is not None:
                self._meanwhile.append((added, removed))
            for space, keys in self._keys.items():
                _change(space, keys, added, removed)

    def void(self) -> None:
        """Only the store knows what it has: list anew."""
        with self._lock:
            self._keys.clear()
            self._is_void = True

    def _of(self, space: KeySpace) -> list[str]:
        with self._making:
            keys = self._keys.get(space)
            if keys is not None and self._clock() < self._made_at[space] + _LONGEST_S:
                return keys
            return self._made(space)

    def _made(self, space: KeySpace) -> list[str]:
        with self._lock:
            self._meanwhile, self._is_void = [], False
        try:
            made_at = self._clock()
            keys = _sorted(key for key, _ in chunks_of(space, _gently(self._scan())))
            with self._lock:
                for change in self._meanwhile:
                    _change(space, keys, *change)
                if not self._is_void:
                    self._keys[space], self._made_at[space] = keys, made_at
        finally:
            self._meanwhile = None
        return keys


def _change(space: KeySpace, keys: list[str], added: Iterable[Row], removed: Iterable[str]) -> None:
    for key in removed:
        if _has(keys, key):
            del keys[bisect_left(keys, key)]
    for key, _ in chunks_of(space, added):
        if not _has(keys, key):
            insort(keys, key)


def _has(keys: Sequence[str], key: str) -> bool:
    at = bisect_left(keys, key)
    return at < len(keys) and keys[at] == key


def _sorted(keys: Iterator[str]) -> list[str]:
    return list(merge(*iter(lambda: sorted(islice(keys, _RUN)), [])))


def _gently(rows: Iterable[Row]) -> Iterator[Row]:
    """So that an engine's steps in this process do not wait for the interpreter again and again."""
    for number, row in enumerate(rows):
        if not number % _AT_ONCE:
            time.sleep(_REST_S)
        yield row
