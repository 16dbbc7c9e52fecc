"""The keys of a store in order, which is scanned once and not at every question."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pytest
import torch

from cacheblend_rag.engine.stored import RankStore
from cacheblend_rag.errors import UnavailableError
from cacheblend_rag.keys import KeySpace
from cacheblend_rag.store import ChunkKV, DiskStore, MemoryStore
from cacheblend_rag.store.base import Changes, ChunkInfo
from cacheblend_rag.store.follow import row_of
from cacheblend_rag.store.listing import Listing

SPACE, OTHER = KeySpace("f", (1, 2, 3)), KeySpace("f", (1, 2, 4))
KV_L2NHD = torch.zeros(1, 2, 40, 1, 1)


def chunk(number: int) -> ChunkKV:
    return ChunkKV(tuple(range(number, number + 40)), 3, KV_L2NHD)


def key(number: int, space: KeySpace = SPACE) -> str:
    return space.key(chunk(number).token_ids)


class Counted(MemoryStore):
    """How often it was scanned; a scan may be made to wait, or to fail."""

    def __init__(self) -> None:
        super().__init__(1 << 30)
        self.scans, self.gate, self.away = 0, Event(), False
        self.gate.set()

    def scan(self) -> Iterator[ChunkInfo]:
        self.scans += 1
        if self.away:
            raise UnavailableError("away")
        yield from super().scan()
        assert self.gate.wait(30)


def ranked(store: MemoryStore | DiskStore, numbers: range) -> RankStore:
    rank = RankStore(store, lambda key: None)
    rank.put([key(n) for n in numbers], [chunk(n) for n in numbers])
    rank.put([key(n, OTHER) for n in range(3)], [chunk(n) for n in range(3)])
    return rank


def test_pages_and_counts_are_those_of_a_scan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cacheblend_rag.store.listing._RUN", 7)
    rank = ranked(Counted(), range(50))
    wanted = sorted(key(n) for n in range(50))
    assert rank.count(SPACE) == 50 and rank.count(OTHER) == 3
    assert rank.page(SPACE, "", 20) == wanted[:20]
    assert rank.page(SPACE, wanted[19], 99) == wanted[20:]
    assert rank.page(SPACE, "f" * 64, 9) == [] == rank.page(KeySpace("g", ()), "", 9)
    rank.register([("a", wanted[5:9]), ("b", [key(0, OTHER)])])
    assert rank.page(SPACE, wanted[5], 2, "a") == wanted[6:8]
    assert rank.page(SPACE, "", 9, "b") == []
    assert rank.owned(SPACE, [*wanted[3:5], key(1, OTHER), "0" * 64]) == wanted[3:5]
    rank.close()


def test_a_store_is_scanned_once_however_often_it_is_asked() -> None:
    rank = ranked(store := Counted(), range(8))
    for number in range(8, 20):
        rank.put([key(number)], [chunk(number)])
        rank.forget([key(number - 8)])
        wanted = sorted(key(n) for n in range(number - 7, number + 1))
        assert rank.page(SPACE, "", 99) == wanted and rank.count(SPACE) == 8
        assert rank.owned(SPACE, [key(number), key(number - 8)]) == [key(number)]
    assert store.scans == 1
    rank.close()


def test_what_another_process_does_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cacheblend_rag.store.follow._EVERY_S", 0.01)
    rank = ranked(DiskStore(tmp_path, namespace="n"), range(4))
    rank.follower.start(None)
    assert rank.count(SPACE) == 4
    with DiskStore(tmp_path, namespace="n") as other:
        other.put(key(7), chunk(7))
        other.discard(key(0))
        until = time.monotonic() + 20
        wanted = sorted(map(key, (1, 2, 3, 7)))
        while rank.page(SPACE, "", 9) != wanted and time.monotonic() < until:
            time.sleep(0.01)
    assert rank.page(SPACE, "", 9) == wanted
    rank.close()


def test_what_changes_while_it_is_listed_counts() -> None:
    rank = ranked(store := Counted(), range(4))
    store.gate.clear()
    found = list[list[str]]()
    asking = Thread(target=lambda: found.append(rank.page(SPACE, "", 9)))
    asking.start()
    while not store.scans:
        time.sleep(0.001)
    rank.forget([key(1)])
    rank.put([key(5)], [chunk(5)])
    store.gate.set()
    asking.join(30)
    assert found == [sorted(map(key, (0, 2, 3, 5)))] and store.scans == 1
    assert rank.page(SPACE, "", 9) == found[0] and store.scans == 1
    rank.close()


def test_it_is_listed_anew_where_changes_do_not_tell_and_after_a_time() -> None:
    now = [0.0]
    store = Counted()
    listing = Listing(lambda: map(row_of, store.scan()), lambda: now[0])
    store.put(key(0), chunk(0))
    assert listing.count(SPACE) == 1
    store.put(key(1), chunk(1))  # nobody tells
    assert listing.count(SPACE) == 1 == store.scans
    listing.void()
    assert listing.count(SPACE) == 2 == store.scans
    store.discard(key(0))
    now[0] = 599.0
    assert listing.count(SPACE) == 2 == store.scans
    now[0] = 601.0
    assert listing.count(SPACE) == 1 and store.scans == 3


def test_what_cannot_be_asked_is_asked_again() -> None:
    rank = ranked(store := Counted(), range(4))
    store.away = True
    with pytest.raises(UnavailableError):
        rank.count(SPACE)
    store.away = False
    rank.put([key(9)], [chunk(9)])
    assert rank.count(SPACE) == 5 and rank.count(SPACE) == 5 and store.scans == 2
    rank.close()


def test_a_follower_that_lost_track_has_it_listed_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    rank = ranked(store := Counted(), range(4))
    assert rank.count(SPACE) == 4
    changes: list[Any] = [Changes(1, whole=True)]
    monkeypatch.setattr(store, "changes", lambda cursor: changes[0])
    rank.follower._ask()
    store.discard(key(0))
    assert rank.count(SPACE) == 3 and store.scans == 2
    rank.close()


def test_no_ingestion_waits_for_a_listing() -> None:
    rank = ranked(store := Counted(), range(4))
    store.gate.clear()
    listed = rank.thread.start(lambda: rank.count(SPACE), aside=True)
    written = rank.thread.start(lambda: rank.put([key(5)], [chunk(5)]))
    (ticket,) = written.values()
    until = time.monotonic() + 20
    while not (done := rank.thread.take(ticket)) and time.monotonic() < until:
        time.sleep(0.001)
    assert done
    store.gate.set()
    (ticket,) = listed.values()
    while not (counted := rank.thread.take(ticket)) and time.monotonic() < until:
        time.sleep(0.001)
    assert counted == [5]
    rank.close()
