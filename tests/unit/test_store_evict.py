"""What leaves a full store first, in memory and on disk: both rank alike."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from benchmark import benchmark
from chunks import chunk_of, key_of, same
from hypothesis import given, settings
from hypothesis import strategies as st

from cacheblend_rag.errors import StoreError
from cacheblend_rag.store import ChunkKV, DiskStore, KVStore, MemoryStore
from cacheblend_rag.store.chunk_file import header_of
from cacheblend_rag.store.evict import (
    GDSF,
    LRU,
    POLICIES,
    Policy,
    StrictGDSF,
    Usage,
    create_policy,
    ranking,
    recompute_cost,
    warmed,
)
from cacheblend_rag.store.evict.ranking import Ranking

FILE_BYTES = header_of(key_of(0), chunk_of(0)).file_bytes
Make = Callable[[float, Policy], KVStore]


def memory(_: Path, num_chunks: float, policy: Policy) -> KVStore:
    return MemoryStore(int(num_chunks * chunk_of(0).nbytes), policy=policy)


def disk(folder: Path, num_chunks: float, policy: Policy, namespace: str = "tiny-r0") -> DiskStore:
    capacity = int(num_chunks * FILE_BYTES)
    return DiskStore(folder, namespace=namespace, capacity_bytes=capacity, policy=policy)


@pytest.fixture(params=[memory, disk], ids=lambda maker: maker.__name__)
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Make:
    return partial(request.param, tmp_path)


def put(store: KVStore, *seeds: int) -> None:
    for seed in seeds:
        store.put(key_of(seed), chunk_of(seed))


def held(store: KVStore, seeds: range) -> list[int]:
    return [seed for seed in seeds if store.contains(key_of(seed))]


# --- the numbers ----------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.lists(st.floats(0, 50), min_size=1, max_size=30))
def test_heat_is_the_sum_of_uses_each_doubling_every_half_life(ages: list[float]) -> None:
    heat = None
    for age in sorted(ages):
        heat = warmed(heat, age)
    assert heat == pytest.approx(math.log2(sum(2**age for age in ages)))


def test_heat_neither_overflows_nor_forgets_what_is_new() -> None:
    heat = warmed(warmed(None, 0.0), 1e9)
    assert heat == 1e9


def test_gdsf_weighs_uses_cost_and_bytes() -> None:
    rank = GDSF().priority
    base = Usage(heat=3.0, cost=100.0, nbytes=1000, tick=5)
    assert rank(base) == 3.0 + math.log2(0.1)
    assert rank(base._replace(heat=4.0)) == pytest.approx(rank(base) + 1)
    assert rank(base._replace(cost=200.0)) == pytest.approx(rank(base) + 1)
    assert rank(base._replace(nbytes=2000)) == pytest.approx(rank(base) - 1)
    assert rank(base._replace(tick=9)) == rank(base)
    assert LRU().priority(base) == 5


def test_an_unknown_policy() -> None:
    with pytest.raises(
        StoreError, match=r"'fifo' is no eviction policy\. There are: gdsf, gdsf-strict"
    ):
        create_policy("fifo")


# --- one chunk against another --------------------------------------------------------------------


@pytest.mark.parametrize("policy", [GDSF(), StrictGDSF()], ids=lambda policy: policy.name)
def test_chunks_seen_once_do_not_flush_warm_ones(make: Make, policy: Policy) -> None:
    store = make(10.5, policy)
    put(store, *range(6))
    for _ in range(3):
        for seed in range(6):
            store.get(key_of(seed))
    put(store, *range(100, 300))
    assert held(store, range(6)) == list(range(6))
    assert 0 < len(held(store, range(100, 300))) <= 4


@pytest.mark.parametrize("policy", [GDSF(), LRU()], ids=lambda policy: policy.name)
def test_what_is_put_is_there(make: Make, policy: Policy) -> None:
    """Ingested ahead of use, or the engine's probe at start: also where all others are warm."""
    store = make(3.5, policy)
    put(store, 0, 1, 2)
    for _ in range(50):
        for seed in range(3):
            store.get(key_of(seed))
    for seed in range(10, 20):
        store.put(key_of(seed), chunk_of(seed))
        assert same(store.get(key_of(seed)), chunk_of(seed))


def test_lru_is_flushed_by_them(make: Make) -> None:
    store = make(10.5, LRU())
    put(store, *range(6))
    put(store, *range(100, 300))
    assert held(store, range(6)) == []


def test_a_chunk_asked_for_again_gets_in_though_it_was_refused(make: Make) -> None:
    store = make(4.5, StrictGDSF())
    put(store, 0, 1, 2, 3)
    for seed in range(4):
        store.get(key_of(seed))
    put(store, 9)
    assert not store.contains(key_of(9))
    evictions = store.stats().evictions
    put(store, 9, 9)
    assert store.contains(key_of(9))
    assert store.stats().evictions >= evictions + 1


def test_old_fame_fades(make: Make) -> None:
    store = make(4.5, GDSF())
    put(store, 0, 1, 2, 3)
    for _ in range(20):
        for seed in range(4):
            store.get(key_of(seed))
    for number in range(3000):  # three half-lives of a store of few chunks
        store.touch(key_of(3))
        if isinstance(store, DiskStore) and number % 100 == 0:
            store._catalog.settle()  # a store that is asked so often may drop what it is to note
    for _ in range(6):
        put(store, 7, 8, 9)
    assert held(store, range(10)) == [3, 7, 8, 9]


def test_the_costlier_of_two_equally_used_chunks_stays(tmp_path: Path) -> None:
    """Attention makes long chunks cost more per byte."""
    long, short = chunk_of(1, num_tokens=2048), chunk_of(2, num_tokens=1024)
    store = MemoryStore(long.nbytes + short.nbytes, policy=GDSF())
    store.put(key_of(1), long)
    store.put(key_of(2), short)
    store.put(key_of(3), chunk_of(3, num_tokens=1024))
    assert store.contains(key_of(1))
    assert not store.contains(key_of(2))


def test_pinned_chunks_stay(make: Make) -> None:
    store = make(3.5, LRU())
    put(store, 0, 1, 2)
    with store.pinned([key_of(0), key_of(1)]), store.pinned([key_of(0)]):
        put(store, 3, 4)
        assert held(store, range(5)) == [0, 1, 4]
        with store.pinned([key_of(4)]):
            put(store, 5)
            assert held(store, range(6)) == [0, 1, 4]
    put(store, 6, 7, 8)
    assert held(store, range(9)) == [6, 7, 8]


def test_pins_end_with_an_error_too(make: Make) -> None:
    store = make(1.5, LRU())
    put(store, 0)
    with pytest.raises(KeyError), store.pinned([key_of(0)]):
        raise KeyError
    put(store, 1)
    assert held(store, range(2)) == [1]


# --- on disk --------------------------------------------------------------------------------------


def test_a_namespace_keeps_its_quota(tmp_path: Path) -> None:
    greedy = DiskStore(
        tmp_path,
        namespace="greedy",
        capacity_bytes=int(8.5 * FILE_BYTES),
        quota_bytes=int(3.5 * FILE_BYTES),
        policy=LRU(),
    )
    other = disk(tmp_path, 8.5, LRU(), namespace="other")
    put(other, *range(4))
    put(greedy, *range(20))
    assert held(greedy, range(20)) == [17, 18, 19]
    assert held(other, range(4)) == [0, 1, 2, 3]
    assert greedy.stats()[:2] == (3, 3 * FILE_BYTES)
    with pytest.raises(ValueError, match="quota_bytes must be positive"):
        DiskStore(tmp_path, namespace="x", quota_bytes=0)


def test_a_lowered_capacity_is_kept_at_once(tmp_path: Path) -> None:
    with disk(tmp_path, 10, LRU()) as store:
        put(store, *range(8))
    with disk(tmp_path, 3, LRU()) as store:
        assert held(store, range(8)) == [5, 6, 7]
        assert store.stats().evictions == 5
        assert store.trim(FILE_BYTES) == 2
        assert held(store, range(8)) == [7]


def test_frequency_survives_reopening(tmp_path: Path) -> None:
    with disk(tmp_path, 4.5, GDSF()) as store:
        put(store, 0, 1, 2, 3)
        store.get(key_of(0))
        store.get(key_of(0))
    with disk(tmp_path, 4.5, GDSF()) as store:
        put(store, *range(10, 20))
        assert store.contains(key_of(0))


def test_another_policy_ranks_what_is_there_anew(tmp_path: Path) -> None:
    with disk(tmp_path, 3.5, GDSF()) as store:
        put(store, 0, 1, 2)
        store.get(key_of(0))
        store.get(key_of(0))
        put(store, 1, 2)
    with DiskStore(tmp_path, namespace="tiny-r0") as unasked:  # changes nothing
        assert unasked._catalog.index.policy.name == "gdsf"
    with disk(tmp_path, 3.5, LRU()) as store:
        put(store, 3)
        assert held(store, range(4)) == [1, 2, 3]


def test_memory_and_disk_rank_alike(tmp_path: Path) -> None:
    """The two implementations of one order, on the same random traffic."""
    rng = np.random.default_rng(3)
    sizes = {seed: 3 + seed % 5 for seed in range(30)}
    for policy in POLICIES.values():
        on_disk = DiskStore(
            tmp_path / policy.name, namespace="a", capacity_bytes=9000, policy=policy
        )
        in_memory = MemoryStore(9000, policy=policy)
        for seed in rng.zipf(1.3, 400) % 30:
            chunk = chunk_of(int(seed), num_tokens=sizes[int(seed)])
            file_bytes = header_of(key_of(seed), chunk).file_bytes
            sized = Sized(chunk.token_ids, chunk.base, chunk.kv_L2NHD, file_bytes)
            on_disk.put(key_of(seed), chunk)
            in_memory.put(key_of(seed), sized)
            kept = [seed for seed in range(30) if in_memory.contains(key_of(seed))]
            assert [seed for seed in range(30) if on_disk.contains(key_of(seed))] == kept
        assert on_disk.stats().evictions == in_memory.stats().evictions > 10


class Sized(ChunkKV):
    """A chunk that says it has the bytes of its file."""

    def __init__(self, *args: object) -> None:
        super().__init__(*args[:3])  # type: ignore[arg-type]
        object.__setattr__(self, "_bytes", args[3])

    @property
    def nbytes(self) -> int:
        return int(self._bytes)  # type: ignore[attr-defined]


# --- the sustained run ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    return benchmark("store_hits")


@pytest.mark.parametrize("exponent", [0.8, 1.0])
def test_a_thousand_new_queries_do_not_wear_it_out(
    bench: ModuleType, exponent: float, request: pytest.FixtureRequest
) -> None:
    """The last hundred are within 5 points of the offline optimum, and better than LRU."""
    work = bench.make_workload(4000, exponent, 1000, seed=1)
    capacity = bench.capacity_of(work, 0.2)
    best = bench.optimum(work, capacity, work.queries[-100:])
    rates = {
        policy.name: float(
            np.mean(list(bench.hits(MemoryStore(capacity, policy=policy), work))[-100:])
        )
        for policy in POLICIES.values()
    }
    request.node.user_properties += [("optimum", round(best, 3)), *rates.items()]
    assert min(rates["gdsf"], rates["gdsf-strict"]) > best - 0.05
    assert rates["gdsf"] > rates["lru"] + 0.02


# --- the ranking of a memory store, step by step --------------------------------------------------


def test_a_chunk_that_stays_out_leaves_the_others_as_they_were() -> None:
    held = Ranking(StrictGDSF(), 30)
    for key in "abc":
        assert held.add(key, 10, 100.0, ()) == []
        held.use(key)
    assert held.add("cheap", 30, 1.0, ()) is None, "it ranks below what it would push out"
    assert held.add("pinned", 30, 1e6, {"a"}) is None
    assert held.nbytes == 30
    assert held.add("dear", 10, 1e6, ()) == ["a"], "they are still ranked"
    assert held.add("dearer", 20, 1e7, ()) == ["b", "c"]
    assert held.nbytes == 30


def test_heats_of_what_left_are_kept_for_a_number_of_chunks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ranking, "_FEWEST_REMEMBERED", 3)
    held = Ranking(LRU(), 1)
    for number in range(50):
        held.add(str(number), 1, 1.0, ())
    assert list(held._heats) == [str(n) for n in range(43, 50)]  # 4 times one chunk, and 3
    held = Ranking(LRU(), 1)
    held.add("held", 1, 1.0, ())
    for number in range(50):
        held.add(str(number), 2, 1.0, ())  # too large
    assert "held" in held._heats, "a member's is never forgotten"


def test_the_work_of_a_chunk_grows_with_its_square() -> None:
    assert recompute_cost(1) == pytest.approx(1, rel=0.01)
    small, large = recompute_cost(1000), recompute_cost(100_000)
    assert 1000 < small < 2000 and large > 200 * small
