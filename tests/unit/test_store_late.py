"""Loads with deadlines: what a disk or a network does not bring in time is late, never a stall."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from chunks import chunk_of, key_of, same

from cacheblend_rag.store import (
    ChunkKV,
    DiskStore,
    KVStore,
    MemoryStore,
    NullStore,
    TieredStore,
    WriteBackStore,
)
from cacheblend_rag.store.counts import Meter
from cacheblend_rag.store.parallel import TIMED_OUT, Readers
from cacheblend_rag.store.source import FileSource

SOON_S = 1.0  # less than any hang here, more than a busy machine takes for nothing


class Hang:
    """Reads of files wait for ``model_check``; but for the first ``free`` of them."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.gate, self.free, self.waiting = threading.Event(), 0, 0
        self._patch, self._read = patch, FileSource.read_into

    def start(self, free: int = 0) -> None:
        self.gate.clear()
        self.free = free
        self._patch.setattr(FileSource, "read_into", lambda *args: self._wait(*args))

    def _wait(self, source: FileSource, target: memoryview) -> None:
        if self.free > 0:
            self.free -= 1
        else:
            self.waiting += 1
            assert self.gate.wait(30)
        self._read(source, target)


@pytest.fixture
def hang(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hang]:
    made = Hang(monkeypatch)
    yield made
    made.gate.set()


def soon(work: Callable[[], object]) -> float:
    started = time.monotonic()
    work()
    return time.monotonic() - started


def until(condition: Callable[[], bool]) -> None:
    give_up = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < give_up
        time.sleep(0.01)


KEYS = [key_of(seed) for seed in range(4)]


@pytest.fixture
def disk(tmp_path: Path) -> DiskStore:
    store = DiskStore(tmp_path / "kv", namespace="tiny-r0")
    for seed in range(4):
        store.put(key_of(seed), chunk_of(seed))
    return store


@pytest.mark.parametrize("kind", ["disk", "tiers", "nested", "write back"])
def test_a_disk_that_hangs_is_late_and_is_not_waited_for_again(
    disk: DiskStore, hang: Hang, kind: str
) -> None:
    store: KVStore = disk
    if kind != "disk":
        store = TieredStore(MemoryStore(1 << 20), disk)
    if kind == "nested":
        store = TieredStore(MemoryStore(1 << 20), TieredStore(disk, MemoryStore(1 << 20)))
    if kind == "write back":
        store = WriteBackStore(store)
    assert all(store.get_in_time(KEYS[:1], 10).chunks)
    hang.start()
    absent = key_of("absent")
    started = time.monotonic()
    found = store.get_in_time([*KEYS[1:], absent], 0.1)
    assert 0.09 < time.monotonic() - started < SOON_S
    assert found.chunks[:3] == [None] * 3
    assert found.timed_out >= set(KEYS[1:])
    reads = hang.waiting
    for _ in range(20):  # nobody waits twice, and nothing piles up
        assert soon(lambda: store.get_in_time(KEYS[2:], 5)) < SOON_S
    assert hang.waiting == reads
    assert store.stats().timed_out >= 3 + 20 * 2
    if kind != "disk":  # what is in memory is served as ever
        assert soon(lambda: store.get_in_time(KEYS[:1], 5)) < SOON_S
        assert same(store.get_in_time(KEYS[:1], 5).chunks[0], chunk_of(0))
    hang.gate.set()
    until(lambda: not store.get_in_time(KEYS, 10).timed_out)
    for seed, chunk in enumerate(store.get_in_time(KEYS, 10).chunks):
        assert same(chunk, chunk_of(seed))
    store.close()


def test_what_comes_in_time_is_used(disk: DiskStore, hang: Hang) -> None:
    hang.start(free=3 * 3)  # a file is read in three or four pieces
    found = disk.get_in_time(KEYS, 0.5)
    came = [seed for seed, chunk in enumerate(found.chunks) if chunk is not None]
    assert found.timed_out == {KEYS[seed] for seed in range(4) if seed not in came}
    assert found.timed_out
    assert all(same(found.chunks[seed], chunk_of(seed)) for seed in came)


def test_what_comes_too_late_is_promoted_for_the_next_one(disk: DiskStore, hang: Hang) -> None:
    with TieredStore(MemoryStore(1 << 20), disk) as store:
        hang.start()
        assert store.get_in_time(KEYS[:2], 0.05).timed_out == set(KEYS[:2])
        hang.gate.set()
        until(lambda: all(store.in_memory(key) for key in KEYS[:2]))
        hang.start()
        assert not store.get_in_time(KEYS[:2], 5).timed_out


def test_hits_in_memory_do_not_wait_for_a_disk_that_cannot_count_them(disk: DiskStore) -> None:
    gate = threading.Event()

    class Stuck(MemoryStore):
        touched = 0

        def touch(self, key: str) -> None:
            assert gate.wait(30)
            self.touched += 1

    slow = Stuck(1 << 20)
    store = TieredStore(MemoryStore(1 << 20), slow)
    for seed in range(4):
        store.put(key_of(seed), chunk_of(seed))
    for _ in range(1000):
        assert soon(lambda: store.get_in_time(KEYS, 5)) < SOON_S
    gate.set()
    store.get_in_time(KEYS, 5)
    until(lambda: slow.touched >= 500)  # the latest uses; not all, for nothing piles up
    assert slow.touched < 1500
    store.close()


def test_a_store_closes_over_a_read_that_hangs(disk: DiskStore, hang: Hang) -> None:
    store = TieredStore(MemoryStore(1 << 20), disk)
    hang.start()
    store.get_in_time(KEYS[:1], 0.05)
    store.prefetch(KEYS[1:])
    until(lambda: hang.waiting >= 2)
    assert soon(store.close) < 8
    assert store.fast.stats().chunks == 0


def test_prefetching_from_a_disk_that_hangs_does_not_pile_up(disk: DiskStore, hang: Hang) -> None:
    store = TieredStore(MemoryStore(1 << 20), disk)
    hang.start()
    for _ in range(2000):
        store.prefetch(KEYS)
    assert store._prefetching.backlog <= 1000 + len(KEYS)
    hang.gate.set()
    store.close()


def test_stores_that_wait_for_nothing(disk: DiskStore) -> None:
    memory = MemoryStore(1 << 20)
    memory.put(KEYS[0], chunk_of(0))
    found = memory.get_in_time(KEYS[:2], 0.0)
    assert same(found.chunks[0], chunk_of(0)) and found.chunks[1] is None and not found.timed_out
    assert memory.in_memory(KEYS[0]) and not memory.in_memory(KEYS[1])
    assert NullStore().get_in_time(KEYS, 0.0).chunks == [None] * 4
    assert not disk.in_memory(KEYS[0])


def test_what_waits_to_be_written_is_in_memory() -> None:
    gate = threading.Event()

    class Slow(MemoryStore):
        def put(self, key: str, chunk: ChunkKV) -> None:
            assert gate.wait(30)
            super().put(key, chunk)

        def in_memory(self, key: str) -> bool:
            return False

    store = WriteBackStore(Slow(1 << 20))
    store.put(KEYS[0], chunk_of(0))
    assert store.in_memory(KEYS[0]) and not store.in_memory(KEYS[1])
    assert same(store.get_in_time(KEYS[:2], 5).chunks[0], chunk_of(0))
    gate.set()
    store.close()


def test_readers_know_what_is_behind() -> None:
    gate = threading.Event()
    readers = Readers(2)
    assert readers.map_within(lambda n: n, [1, 2, 3], 10) == [1, 2, 3]
    timed_out = readers.map_within(lambda n: gate.wait(30), [1, 2, 3, 4], 0.05)
    assert timed_out == [TIMED_OUT] * 4 and readers.is_behind
    assert readers.backlog == 2  # what had not begun never will
    gate.set()
    until(lambda: not readers.is_behind)
    assert readers.map_within(lambda n: n, [1], 10) == [1]
    with pytest.raises(ZeroDivisionError):
        readers.map_within(lambda n: 1 // n, [1, 0], 10)
    readers.close()


# --- how fast a tier is ---------------------------------------------------------------------------


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_loads_at_once_count_together() -> None:
    clock = Clock()
    meter, chunk = Meter(clock), chunk_of(1)
    with meter.loading() as one, meter.loading() as two:
        clock.now += 0.5
        one.chunk = two.chunk = chunk
    assert meter.bandwidth == 2 * chunk.nbytes / 0.5


def test_idle_times_and_misses_do_not_count() -> None:
    clock = Clock()
    meter, chunk = Meter(clock), chunk_of(1)
    with meter.loading():
        clock.now += 5
    assert meter.bandwidth is None
    for _ in range(2):
        clock.now += 10
        with meter.loading() as load:
            clock.now += 0.25
            load.chunk = chunk
    assert meter.bandwidth == pytest.approx(chunk.nbytes / 0.25)


def test_a_measurement_is_forgotten_after_a_minute() -> None:
    clock = Clock()
    meter, chunk = Meter(clock), chunk_of(1)
    for seconds in (1.0, 0.001):
        with meter.loading() as load:
            clock.now += seconds
            load.chunk = chunk
        assert meter.bandwidth is not None
        clock.now += 61
        assert meter.bandwidth is None
    with meter.loading() as load:
        clock.now += 0.5
        load.chunk = chunk
    assert meter.bandwidth == pytest.approx(chunk.nbytes / 0.5)  # nothing of the old ones


def test_there_is_a_measurement_while_loads_never_cease() -> None:
    clock = Clock()
    meter, chunk = Meter(clock), chunk_of(1)
    with meter.loading():
        for _ in range(3):
            with meter.loading() as load:
                clock.now += 1.0
                load.chunk = chunk
        assert meter.bandwidth == pytest.approx(chunk.nbytes)
