"""A store with learnt chunks beside it."""

from __future__ import annotations

from pathlib import Path

import pytest
from chunks import chunk_of, key_of

from cacheblend_rag.store import DiskStore, KVStore, MemoryStore
from cacheblend_rag.store.learnt import LearningStore

TTL_S = 10.0
INGESTED, LEARNT, BOTH = key_of(1), key_of(2), key_of(3)


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(params=["memory", "disk"])
def own(request: pytest.FixtureRequest, tmp_path: Path) -> KVStore:
    if request.param == "memory":
        return MemoryStore(1 << 20)
    return DiskStore(tmp_path, namespace="m")


@pytest.fixture
def store(own: KVStore, clock: Clock) -> LearningStore:
    found = LearningStore(own, MemoryStore(1 << 20), TTL_S, clock)
    assert not found.put(INGESTED, chunk_of(1)) and not found.put_learnt(LEARNT, chunk_of(2))
    assert not found.put(BOTH, chunk_of(3)) and not found.put_learnt(BOTH, chunk_of(3))
    return found


def has(store: KVStore, key: str) -> bool:
    return store.get_many([key]).chunks[0] is not None


def test_both_are_found_and_only_the_ingested_are_stored(store: LearningStore) -> None:
    found = store.get_in_time([LEARNT, key_of(4), INGESTED, BOTH], 5.0).chunks
    assert [chunk is not None for chunk in found] == [True, False, True, True]
    assert store.get(LEARNT) is not None and store.get(INGESTED) is not None
    assert sorted(info.key for info in store.scan()) == sorted([INGESTED, LEARNT, BOTH])
    assert store.contains(INGESTED) and not store.contains(LEARNT)
    assert store.in_memory(LEARNT) and store.stats().chunks == 2
    assert sorted(info.key for info in store.scan_others({BOTH})) == sorted([INGESTED, LEARNT])


def test_what_nobody_uses_goes(store: LearningStore, clock: Clock) -> None:
    cursor = store.changes(None).cursor
    for clock.now in (8.0, 16.0):
        assert has(store, LEARNT)
    changed = store.changes(cursor)  # BOTH went from the memory, and is still stored
    assert not changed.removed and has(store, BOTH)
    clock.now = 27.0
    assert store.changes(changed.cursor).removed == [LEARNT]
    assert not has(store, LEARNT) and has(store, INGESTED) and store.learnt.stats().chunks == 0


def test_a_touch_is_a_use(store: LearningStore, clock: Clock) -> None:
    clock.now = 8.0
    store.touch(LEARNT)
    store.touch(INGESTED)
    clock.now = 16.0
    store.expire()
    assert has(store, LEARNT)


def test_changes_tell_of_both(store: LearningStore) -> None:
    cursor = store.changes(None).cursor
    store.put(key_of(5), chunk_of(5))
    store.put_learnt(key_of(6), chunk_of(6))
    changed = store.changes(cursor)
    assert {info.key for info in changed.added} == {key_of(5), key_of(6)}
    store.discard(key_of(6))
    store.discard(INGESTED)
    assert set(store.changes(changed.cursor).removed) == {key_of(6), INGESTED}


def test_what_is_forgotten_is_forgotten_in_both(store: LearningStore) -> None:
    store.discard(BOTH)
    assert not has(store, BOTH) and not store.contains(BOTH)
    store.register("d", [INGESTED, LEARNT])
    store.put_learnt(INGESTED, chunk_of(1))
    assert store.forget("d") == 2
    assert not has(store, INGESTED) and not has(store, LEARNT)


def test_what_another_process_forgets_is_learnt_no_more(tmp_path: Path, clock: Clock) -> None:
    here, there = (DiskStore(tmp_path, namespace="m") for _ in range(2))
    store = LearningStore(here, MemoryStore(1 << 20), TTL_S, clock)
    store.put(BOTH, chunk_of(3))
    store.put_learnt(BOTH, chunk_of(3))
    cursor = store.changes(None).cursor
    there.discard(BOTH)
    assert set(store.changes(cursor).removed) == {BOTH}
    assert not has(store, BOTH)


def test_it_holds_no_more_than_its_memory(clock: Clock) -> None:
    size = chunk_of(1).nbytes
    store = LearningStore(MemoryStore(1 << 20), MemoryStore(3 * size), TTL_S, clock)
    cursor = store.changes(None).cursor
    for n in range(10):
        store.put_learnt(key_of(n), chunk_of(n))
    held = [n for n in range(10) if has(store, key_of(n))]
    changed = store.changes(cursor)
    assert len(held) == 3 == len(changed.added)
    assert set(changed.removed) == {key_of(n) for n in range(10)} - {key_of(n) for n in held}
