"""Tiers together: several chunks at once, ahead of time, and what they count."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from chunks import chunk_of, key_of, same

from cacheblend_rag.errors import StoreError, UnavailableError
from cacheblend_rag.store import (
    ChunkKV,
    DiskStore,
    KVStore,
    MemoryStore,
    NullStore,
    TieredStore,
    WriteBackStore,
)
from cacheblend_rag.store.base import ask
from cacheblend_rag.store.parallel import Readers


def tiers(folder: Path) -> TieredStore:
    return TieredStore(MemoryStore(1 << 20), DiskStore(folder, namespace="tiny-r0"))


def opened(kind: str, folder: Path) -> KVStore:
    if kind == "memory":
        return MemoryStore(1 << 20)
    return DiskStore(folder, namespace="tiny-r0") if kind == "disk" else tiers(folder)


@pytest.mark.parametrize("kind", ["memory", "disk", "tiers"])
def test_many_at_once_in_order(tmp_path: Path, kind: str) -> None:
    with opened(kind, tmp_path) as store:
        for seed in range(20):
            store.put(key_of(seed), chunk_of(seed))
        if isinstance(store, TieredStore):
            for seed in range(0, 20, 2):
                store.fast.discard(key_of(seed))
        asked = [3, 99, 0, 7, 3, 12]
        found = store.get_many([key_of(seed) for seed in asked]).chunks
        for seed, chunk in zip(asked, found, strict=True):
            assert chunk is None if seed == 99 else same(chunk, chunk_of(seed))
        assert store.get_many([]).chunks == []
        assert store.stats().misses == 1
        if isinstance(store, TieredStore):
            assert store.fast.contains(key_of(12))


def test_readers_work_at_once_and_after_closing() -> None:
    readers = Readers(4)
    meet = threading.Barrier(4, timeout=10)
    for _ in range(2):
        assert len(readers.map(lambda _: meet.wait(), range(4))) == 4
        readers.close()


def test_an_error_in_a_reader_reaches_the_caller() -> None:
    readers = Readers(2)
    with pytest.raises(ZeroDivisionError):
        readers.map(lambda n: 1 // n, [1, 0])
    readers.close()


class SlowStore(MemoryStore):
    """Waits until it may answer."""

    gate = threading.Event()

    def get(self, key: str) -> ChunkKV | None:
        assert self.gate.wait(10)
        return super().get(key)


def test_prefetching_does_not_wait_and_fills_the_fast_tier() -> None:
    slow = SlowStore(1 << 20)
    SlowStore.gate = threading.Event()
    with TieredStore(MemoryStore(1 << 20), slow) as store:
        for seed in range(3):
            slow.put(key_of(seed), chunk_of(seed))
        started = time.monotonic()
        store.prefetch([key_of(0), key_of(1), key_of("absent")])
        assert time.monotonic() - started < 1
        assert not store.fast.contains(key_of(0))
        slow.gate.set()
        until = time.monotonic() + 10
        while not all(store.fast.contains(key_of(seed)) for seed in (0, 1)):
            assert time.monotonic() < until
            time.sleep(0.01)
        assert not store.fast.contains(key_of(2))
        assert same(store.get(key_of(1)), chunk_of(1))
    NullStore().prefetch([key_of(0)])


def test_bandwidth_is_measured_where_something_was_loaded(tmp_path: Path) -> None:
    with tiers(tmp_path) as store:
        assert store.bandwidth is None
        store.slow.put(key_of(1), chunk_of(1, num_tokens=1000))
        store.get(key_of(1))
        assert store.bandwidth is not None
        assert 1e4 < store.bandwidth < 1e12


# --- tiers that cannot be asked -------------------------------------------------------------------


class Moody(MemoryStore):
    """Answers, or cannot be asked."""

    is_away = False

    def get(self, key: str) -> ChunkKV | None:
        if self.is_away:
            raise UnavailableError("away")
        return super().get(key)

    def contains(self, key: str) -> bool:
        if self.is_away:
            raise UnavailableError("away")
        return super().contains(key)

    def in_memory(self, key: str) -> bool:
        return False


HAS, LACKS, AWAY = "has", "lacks", "away"


@pytest.mark.parametrize(
    ("fast", "slow", "answer", "contains"),
    [
        (HAS, HAS, HAS, HAS),
        (HAS, LACKS, HAS, LACKS),  # it will not last
        (HAS, AWAY, HAS, HAS),
        (LACKS, HAS, HAS, HAS),
        (LACKS, LACKS, LACKS, LACKS),
        (LACKS, AWAY, AWAY, AWAY),
        (AWAY, HAS, HAS, HAS),
        (AWAY, LACKS, AWAY, LACKS),
        (AWAY, AWAY, AWAY, AWAY),
    ],
)
@pytest.mark.filterwarnings("ignore:Not kept in the fast tier")
def test_two_tiers_answer_as_one(fast: str, slow: str, answer: str, contains: str) -> None:
    tiers = [Moody(1 << 20), Moody(1 << 20)]
    for tier, state in zip(tiers, (fast, slow), strict=True):
        if state == HAS:
            tier.put(key_of(1), chunk_of(1))
        tier.is_away = state == AWAY

    def said(answer: object) -> str:
        return AWAY if isinstance(answer, UnavailableError) else HAS if answer else LACKS

    for nested in (False, True):
        store = TieredStore(tiers[0], tiers[1])
        if nested:
            store = TieredStore(MemoryStore(1), store)
        assert said(ask(store.contains, key_of(1))) == contains
        for found in (store.get_many([key_of(1)]), store.get_in_time([key_of(1)], 10)):
            assert said(found.chunks[0]) == (HAS if answer == HAS else LACKS)
            assert found.unavailable == ({key_of(1)} if answer == AWAY else set())
        assert said(ask(store.get, key_of(1))) == answer
        store.prefetch([key_of(1)])
        store._prefetching.close()


# --- write back -----------------------------------------------------------------------------------


class SlowToWrite(MemoryStore):
    """Writes when it is told to."""

    def __init__(self) -> None:
        super().__init__(1 << 20)
        self.gate = threading.Event()
        self.fails = False

    def put(self, key: str, chunk: ChunkKV) -> None:
        assert self.gate.wait(10)
        if self.fails:
            raise StoreError("disk full")
        super().put(key, chunk)


def test_writing_back_does_not_wait_and_serves_meanwhile() -> None:
    slow = SlowToWrite()
    store = WriteBackStore(slow, waiting_bytes=3 * chunk_of(0).nbytes)
    started = time.monotonic()
    for seed in (0, 0, 1, 2):
        store.put(key_of(seed), chunk_of(seed))
    assert time.monotonic() - started < 1
    assert slow.stats().chunks == 0
    assert store.contains(key_of(1))
    assert same(store.get(key_of(1)), chunk_of(1))
    assert {info.key for info in store.scan()} == {key_of(seed) for seed in (0, 1, 2)}
    assert same(store.get_many([key_of(2), key_of(0)]).chunks[0], chunk_of(2))
    slow.gate.set()
    store.close()
    assert slow.stats().chunks == 3
    assert same(store.get(key_of(1)), chunk_of(1))


def test_what_is_discarded_before_it_is_written_stays_away() -> None:
    slow = SlowToWrite()
    store = WriteBackStore(slow)
    for seed in (0, 1, 2):
        store.put(key_of(seed), chunk_of(seed))
    discarding = threading.Thread(target=lambda: [store.discard(key_of(n)) for n in (2, 0)])
    discarding.start()
    time.sleep(0.05)
    slow.gate.set()
    discarding.join(10)
    store.close()
    assert [info.token_ids[0] for info in slow.scan()] == [1000]


def test_too_much_waiting_is_written_at_once() -> None:
    slow = SlowToWrite()
    slow.gate.set()
    with WriteBackStore(slow, waiting_bytes=1) as store:
        store.put(key_of(1), chunk_of(1))
        assert slow.contains(key_of(1))


def test_a_failure_to_write_back_warns() -> None:
    slow = SlowToWrite()
    slow.fails = True
    store = WriteBackStore(slow)
    store.put(key_of(1), chunk_of(1))
    threading.Timer(0.1, slow.gate.set).start()
    with pytest.warns(RuntimeWarning, match="Not written: disk full"):
        store.close()
    assert store.get(key_of(1)) is None


# --- metrics --------------------------------------------------------------------------------------


def test_prometheus_counts_each_tier(tmp_path: Path) -> None:
    prometheus = pytest.importorskip("prometheus_client")

    def value(name: str, **labels: str) -> float:
        found = prometheus.REGISTRY.get_sample_value(f"cacheblend_store_{name}", labels)
        return float(found or 0)

    def values() -> list[float]:
        return [
            value("events_total", tier="disk", event="hits"),
            value("events_total", tier="disk", event="misses"),
            value("events_total", tier="memory", event="hits"),
            value("events_total", tier="disk", event="corrupt"),
            value("read_bytes_total", tier="disk"),
            value("written_bytes_total", tier="disk"),
            value("load_seconds_count", tier="disk"),
        ]

    before = values()
    nbytes = chunk_of(1).nbytes
    with tiers(tmp_path) as store:
        store.slow.put(key_of(1), chunk_of(1))
        for _ in range(3):
            store.get(key_of(1))
        store.get(key_of(2))
        for path in tmp_path.rglob("*.safetensors"):
            path.write_bytes(b"x")
        store.slow.get(key_of(1))
    grown = [after - was for after, was in zip(values(), before, strict=True)]
    assert grown == [1, 2, 2, 1, nbytes, nbytes, 1]


def test_a_look_up_is_a_span() -> None:
    sdk = pytest.importorskip("opentelemetry.sdk.trace")
    code = """
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
spans = InMemorySpanExporter()
provider = TracerProvider()
provider.add_span_processor(SimpleSpanProcessor(spans))
trace.set_tracer_provider(provider)
from cacheblend_rag.store import MemoryStore
MemoryStore(100).get("0" * 64)
(span,) = spans.get_finished_spans()
assert span.name == "cacheblend.store.get", span.name
expected = {"cacheblend.tier": "memory", "cacheblend.hit": False, "cacheblend.bytes": 0}
assert dict(span.attributes) == expected, span.attributes
"""
    assert sdk
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_neither_package_is_needed() -> None:
    code = """
import sys
sys.modules.update(dict.fromkeys(("prometheus_client", "opentelemetry", "redis", "obstore")))
from cacheblend_rag.store import MemoryStore
store = MemoryStore(100)
assert store.get("0" * 64) is None
assert store.stats().misses == 1
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
