"""What a store tells of its changes: those of other processes and machines, and of its own."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from chunks import chunk_of, key_of, same
from servers import RedisServer, s3_bucket

from cacheblend_rag.errors import UnavailableError
from cacheblend_rag.store import (
    Changes,
    DiskStore,
    KVStore,
    MemoryStore,
    NullStore,
    TieredStore,
    WriteBackStore,
    open_store,
)
from cacheblend_rag.store.base import ask
from cacheblend_rag.store.index import Index
from cacheblend_rag.store.remote import RemoteStore, objects, redis

Open = Callable[[], KVStore]


@pytest.fixture(scope="module")
def s3_url() -> Iterator[str]:
    with s3_bucket() as url:
        yield f"{url}&timeout=20s"


@pytest.fixture(params=["disk", "redis", "s3"])
def opening(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Open]:
    """Opens the same store again and again, as processes and machines do."""
    if request.param == "disk":
        url = str(tmp_path / "kv")
    elif request.param == "redis":
        url = f"{request.getfixturevalue('redis_server').url}?timeout=20s"
    else:
        url = request.getfixturevalue("s3_url")
    opened: list[KVStore] = []

    def again() -> KVStore:
        opened.append(open_store(url, namespace=key_of(request.node.name)[:16]))
        return opened[-1]

    yield again
    for store in opened:
        store.close()


def told(changes: Changes) -> tuple[list[str], list[str]]:
    assert not changes.whole
    return sorted(info.key for info in changes.added), sorted(changes.removed)


def keys(*seeds: object) -> list[str]:
    return sorted(key_of(seed) for seed in seeds)


def test_what_another_puts_and_forgets_is_told(opening: Open) -> None:
    here, there = opening(), opening()
    there.put(key_of(0), chunk_of(0))
    first = here.changes(None)
    assert first.whole and not first.added
    assert told(here.changes(first.cursor)) in (([], []), (keys(0), []))

    cursor = here.changes(first.cursor).cursor
    assert told(here.changes(cursor)) == ([], []), "nothing is told twice"
    there.put(key_of(1), chunk_of(1))
    there.put(key_of(2), chunk_of(2))
    there.discard(key_of(0))
    changes = here.changes(cursor)
    assert told(changes) == (keys(1, 2), keys(0))
    assert {info.token_ids for info in changes.added} == {chunk_of(n).token_ids for n in (1, 2)}
    assert {info.nbytes for info in changes.added} == {chunk_of(1).nbytes}

    here.discard(key_of(1))  # its own are told as well: others may follow it
    there.put(key_of(1), chunk_of(1))
    there.discard(key_of(2))
    there.discard(key_of("never there"))
    added, removed = told(here.changes(changes.cursor))
    assert added == keys(1) and set(removed) - set(keys("never there")) == set(keys(2))


@pytest.mark.parametrize("opening", ["disk"], indirect=True)  # servers are processes apart
def test_a_process_apart_is_followed(opening: Open, request: pytest.FixtureRequest) -> None:
    here = opening()
    cursor = here.changes(None).cursor
    assert isinstance(here, DiskStore)
    code = (
        "import sys; sys.path.insert(0, 'tests/helpers')\n"
        "from pathlib import Path\n"
        "from chunks import chunk_of, key_of\n"
        "from cacheblend_rag.store import DiskStore\n"
        f"with DiskStore(Path({str(here._folder)!r}), namespace={here.namespace!r}) as store:\n"
        "    for seed in (1, 2, 3): store.put(key_of(seed), chunk_of(seed))\n"
        "    store.discard(key_of(2))\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    added, removed = told(here.changes(cursor))
    assert added == keys(1, 3) and set(removed) <= {key_of(2)}


def test_a_cursor_that_is_not_known_asks_for_a_listing(opening: Open) -> None:
    store = opening()
    store.put(key_of(1), chunk_of(1))
    for cursor in (None, 7, "x", b"1-1", (1, 2, 3)):
        assert store.changes(cursor).whole
    assert not store.changes(store.changes("x").cursor).whole


def test_memory_tells_what_came_and_went() -> None:
    store = MemoryStore(3 * chunk_of(0).nbytes)
    cursor = store.changes(None).cursor
    for seed in range(4):
        store.put(key_of(seed), chunk_of(seed))
    changes = store.changes(cursor)
    assert len(changes.added) == 3 and len(changes.removed) == 1, "one was pushed out"
    store.discard(changes.added[0].key)
    assert told(store.changes(changes.cursor)) == ([], [changes.added[0].key])
    for _ in range(6000):  # more than is remembered
        store.put(key_of(5), chunk_of(5))
        store.discard(key_of(5))
    assert store.changes(changes.cursor).whole
    assert store.changes(10**9).whole
    assert NullStore().changes(None).whole
    assert told(NullStore().changes(NullStore().changes(None).cursor)) == ([], [])


def test_tiers_drop_their_copies_of_what_another_forgot(opening: Open, tmp_path: Path) -> None:
    there, behind = opening(), opening()
    near, far = MemoryStore(1 << 20), DiskStore(tmp_path / "near", namespace="tiny")
    here = TieredStore(near, TieredStore(far, WriteBackStore(behind)))
    for seed in range(3):
        there.put(key_of(seed), chunk_of(seed))
    cursor = here.changes(None).cursor
    assert all(here.get(key_of(seed)) for seed in range(3))
    there.discard(key_of(1))
    changes = here.changes(cursor)
    assert key_of(1) in changes.removed
    assert here.get(key_of(1)) is None
    assert not near.contains(key_of(1)) and not far.contains(key_of(1))
    assert same(near.get(key_of(0)), chunk_of(0))
    assert here.changes("unknown").whole
    assert near.stats().chunks == 0, "what went meanwhile is not known"
    assert far.contains(key_of(0)) and same(here.get(key_of(0)), chunk_of(0))


def test_an_index_made_anew_voids_the_cursor(tmp_path: Path) -> None:
    with DiskStore(tmp_path, namespace="tiny") as store:
        store.put(key_of(1), chunk_of(1))
        cursor = store.changes(None).cursor
    for path in tmp_path.glob("index.sqlite*"):
        path.unlink()
    with DiskStore(tmp_path, namespace="tiny") as store:
        assert store.changes(cursor).whole


def remember(index: Index, keys: list[bytes]) -> None:
    index._database.write(lambda db: [index._rows.remember(db, "tiny", key, 1.0) for key in keys])


def test_more_removals_than_are_remembered_void_the_cursor(tmp_path: Path) -> None:
    with DiskStore(tmp_path, namespace="tiny") as store:
        cursor = store.changes(None).cursor
        index, gone = store._catalog.index, [key_of(seed) for seed in range(5000)]
        for start in range(0, 5000, 100):
            part = [bytes.fromhex(key) for key in gone[start : start + 100]]
            remember(index, part)
        assert store.changes(cursor).whole
        cursor = store.changes(None).cursor
        remember(index, [bytes.fromhex(gone[0])])
        assert told(store.changes(cursor)) == ([], [gone[0]])


@pytest.mark.filterwarnings("ignore:The remote store fails")
def test_a_stream_that_redis_cut_or_evicted_voids_the_cursor(
    redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis, "_REMEMBERED", 10)
    with open_store(f"{redis_server.url}?timeout=20s", namespace="cut") as store:
        assert isinstance(store, RemoteStore)
        client = store._backend._client  # type: ignore[attr-defined]
        cursor = store.changes(None).cursor
        assert told(store.changes(cursor)) == ([], [])
        store.put(key_of(1), chunk_of(1))
        assert store.changes(cursor).whole, "there was no stream before"
        cursor = store.changes(cursor).cursor
        for _ in range(300):  # redis cuts by the hundred
            store.discard(key_of(2))
        assert client.xlen(store._feed) < 300
        changes = store.changes(cursor)
        assert changes.whole and changes.removed == [key_of(2)]
        cursor = changes.cursor
        client.delete(store._feed)
        assert store.changes(cursor).whole
        store.put(key_of(3), chunk_of(3))
        assert store.changes(cursor).whole
        client.delete(store._feed)
        client.set(store._feed, "foreign")
        assert store.changes(cursor).whole, "what somebody put there says nothing"
        assert not client.exists(store._feed)


def test_changes_in_a_bucket_are_pruned_and_clocks_may_differ(
    s3_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1e9
    monkeypatch.setattr(objects.time, "time", lambda: now)
    monkeypatch.setattr(objects, "_PRUNE_EVERY", 10)
    with (
        open_store(s3_url, namespace="pruned") as here,
        open_store(s3_url, namespace="pruned") as there,
    ):
        assert isinstance(here, RemoteStore)
        cursor = here.changes(None).cursor
        for seconds in (-50, 50, 0):  # a machine whose clock is slow, one whose clock is fast
            now += seconds
            there.put(key_of(seconds), chunk_of(1))
            now -= seconds
            changes = here.changes(cursor)
            assert told(changes) == ([key_of(seconds)], [])
            cursor = changes.cursor
        now += 40_000
        assert not here.changes(cursor).whole
        now += 10_000
        assert here.changes(cursor).whole, "older ones may have been pruned"
        now += 90_000
        cursor = here.changes(None).cursor
        for seed in range(12):
            there.discard(key_of(seed))
        told_now = list(here._backend._events(here._feed, 0.0))  # type: ignore[attr-defined]
        assert len(told_now) == 12
        assert told(here.changes(cursor)) == ([], keys(*range(12)))


def test_a_store_that_is_away_keeps_the_cursor(tmp_path: Path) -> None:
    pytest.importorskip("redis")
    server = RedisServer(tmp_path)
    with open_store(f"{server.url}?timeout=0.5", namespace="away") as store:
        store.put(key_of(0), chunk_of(0))
        cursor = store.changes(None).cursor
        server.process.send_signal(19)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert isinstance(ask(store.changes, cursor), UnavailableError)  # type: ignore[arg-type]
        server.process.send_signal(18)
        while ask(lambda _: store.put(key_of(1), chunk_of(1)), ""):
            pass
        assert told(store.changes(cursor)) == (keys(1), [])
    server.kill()
