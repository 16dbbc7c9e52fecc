"""Which documents chunks belong to: every store keeps that alike, remote ones for all machines."""

from __future__ import annotations

import errno
import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from chunks import chunk_of, key_of, same
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from servers import RedisServer, s3_bucket

from cacheblend_rag.engine.stored import RankStore
from cacheblend_rag.errors import StoreError, UnavailableError
from cacheblend_rag.keys import KeySpace
from cacheblend_rag.store import (
    DiskStore,
    Heads,
    KVStore,
    MemoryStore,
    TieredStore,
    open_store,
)
from cacheblend_rag.store.base import document_id
from cacheblend_rag.store.registry import DocumentRegistry
from cacheblend_rag.store.remote import BackendError, RemoteStore

Open = Callable[..., KVStore]
SHARED = ["disk", "redis", "redis memory", "redis disk", "s3", "s3 memory"]
REMOTE = ["redis", "s3"]


@pytest.fixture(scope="module")
def s3_url() -> Iterator[str]:
    with s3_bucket() as url:
        yield url


@pytest.fixture
def opening(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Open]:
    """Opens the same store again and again, as processes and machines do."""
    where, _, tier = request.param.partition(" ")
    tiers = {"": "", "memory": "&memory=1MiB", "disk": "&disk={}/tier-{}"}[tier]
    opened: list[KVStore] = []

    def again(namespace: str = "", **options: object) -> KVStore:
        url = {"memory": "memory://", "disk": f"{tmp_path}/kv"}.get(where, "")
        if where == "redis":
            url = f"{request.getfixturevalue('redis_server').url}?timeout=20s"
        elif where == "s3":
            url = f"{request.getfixturevalue('s3_url')}&timeout=20s"
        url += tiers.format(tmp_path, len(opened))  # each machine has a tier of its own
        own = key_of(request.node.name)[:16] + namespace
        opened.append(open_store(url, namespace=own, **options))  # type: ignore[arg-type]
        return opened[-1]

    yield again
    for store in opened:
        store.close()


every_store = pytest.mark.parametrize("opening", ["memory", *SHARED], indirect=True)
shared_stores = pytest.mark.parametrize("opening", SHARED, indirect=True)
remotes = pytest.mark.parametrize("opening", REMOTE, indirect=True)


def put(store: KVStore, *seeds: int) -> None:
    for seed in seeds:
        assert store.put(key_of(seed), chunk_of(seed)) == ""


def held(store: KVStore, seeds: range) -> list[int]:
    return [seed for seed in seeds if store.contains(key_of(seed))]


def keys(*seeds: int) -> list[str]:
    return sorted(map(key_of, seeds))


# --- the contract ---------------------------------------------------------------------------------


@every_store
def test_forgetting_a_document_spares_what_others_share(opening: Open) -> None:
    store = opening()
    assert store.keeps_documents
    put(store, *range(6))
    store.register("a.txt", [key_of(0), key_of(1)])
    store.register("a.txt", [key_of(2)])
    store.register("b.txt", [key_of(2), key_of(3)])
    store.register("nothing", [])
    assert store.documents() == {document_id("a.txt"), document_id("b.txt")}
    assert store.document_keys("a.txt") == keys(0, 1, 2)
    assert store.forget("a.txt") == 2
    assert held(store, range(6)) == [2, 3, 4, 5]
    assert store.forget("a.txt") == 0
    assert store.forget("b.txt") == 2
    assert held(store, range(6)) == [4, 5]
    assert store.documents() == set()


@every_store
def test_single_keys_of_a_document_are_dropped(opening: Open) -> None:
    store = opening()
    store.register("a.txt", [key_of(0), key_of(1), key_of(2)])
    store.register("b.txt", [key_of(1)])
    some = [key_of(0), key_of(1), key_of(9)]
    assert store.unregister([document_id("a.txt")], some) == [key_of(0)]  # 1 is shared, 9 unknown
    assert store.documents() == {document_id("a.txt"), document_id("b.txt")}
    assert store.unregister([document_id("a.txt")], [key_of(2)]) == [key_of(2)]
    assert store.documents() == {document_id("b.txt")}  # nothing is left of the other


@every_store
def test_gc_drops_documents_that_are_not_live(opening: Open) -> None:
    store = opening()
    put(store, *range(5))
    for seed, name in enumerate(("a", "b", "c")):
        store.register(name, [key_of(seed), key_of(3)])
    assert store.gc(live=["b", "new"]) == 2
    assert held(store, range(5)) == [1, 3, 4]  # 3 is shared, 4 was never registered
    assert store.gc(live=[]) == 2
    assert held(store, range(5)) == [4]


NAMES = ["a", "b", "c/d ä"]
WHICH = st.sets(st.sampled_from(range(5)))
CALLS = st.one_of(
    st.tuples(st.just("register"), st.sampled_from(NAMES), WHICH),
    st.tuples(
        st.sampled_from(["unregister", "to forget", "twice"]),
        st.sets(st.sampled_from(NAMES)),
        st.none() | WHICH,
    ),
    st.tuples(st.just("drop"), st.sets(st.sampled_from(NAMES)), st.none()),
)


@every_store
@settings(
    deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.lists(CALLS, max_size=12))
def test_every_store_does_what_the_plain_registry_does(opening: Open, calls: list) -> None:  # type: ignore[type-arg]
    stores, plain = [opening()], DocumentRegistry()
    stores[0].gc(live=[])  # of the example before
    if not isinstance(stores[0], MemoryStore):
        stores.append(opening())
    for number, (what, names, which) in enumerate(calls):
        store, other = stores[number % len(stores)], stores[-1 - number % len(stores)]
        some = None if which is None else set(map(key_of, which))
        if what == "register":
            store.register(names, some)
            plain.register(names, some)
        else:
            ids = [document_id(name) for name in names]
            if what == "to forget":
                gone = keys(number % 5)
                left = plain.unregister(ids, some, gone)
                assert sorted(store.unregister(ids, some, gone)) == left
                assert store.unregister(ids, some, [*gone, *left]) == []
                assert plain.unregister(ids, some, [*gone, *left]) == []
            elif what == "twice":
                assert sorted(store.unregister([*ids, *ids], some)) == plain.unregister(
                    [*ids, *ids], some
                )
            else:
                done = store.drop(ids) if what == "drop" else store.unregister(ids, some)
                assert sorted(done) == plain.unregister(ids, some)
        assert other.documents() == plain.documents()
        assert all(other.document_keys(n) == plain.document_keys(n) for n in NAMES)
    for store in stores:
        store.close()


def test_document_names_are_not_readable_on_disk(tmp_path: Path) -> None:
    with DiskStore(tmp_path, namespace="tiny-r0") as store:
        store.register("secret-merger.pdf", [key_of(0)])
    assert not any(b"secret-merger" in path.read_bytes() for path in tmp_path.glob("index*"))


@pytest.mark.parametrize("encrypt", ["no", "yes"])
def test_document_names_are_not_readable_in_redis(
    redis_server: RedisServer, encrypt: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CACHEBLEND_STORE_KEY", "A" * 43 + "=")
    url = f"{redis_server.url}?timeout=20s&encrypt={encrypt}"
    with open_store(url, namespace=f"private-{encrypt}") as store:
        assert isinstance(store, RemoteStore)
        store.register("secret-merger.pdf", [key_of(0)])
        client = store._backend._client  # type: ignore[attr-defined]
        said = b"".join(
            name + b"".join(client.smembers(name)) for name in client.scan_iter(_type="set")
        )
        assert document_id("secret-merger.pdf").encode() in said and b"secret" not in said


@shared_stores
def test_documents_of_namespaces_and_tenants_are_apart(opening: Open) -> None:
    one, others = opening(), [opening("-other"), opening(tenant="b")]
    for store in (one, *others):
        put(store, 1)
        store.register("a", [key_of(1)])
    assert one.forget("a") == 1
    for store in others:
        assert same(store.get(key_of(1)), chunk_of(1))
        assert store.document_keys("a") == keys(1)


# --- several processes ----------------------------------------------------------------------------


def rank_of(store: KVStore) -> RankStore:
    return RankStore(store, lambda key: None)


@shared_stores
def test_what_one_engine_registers_another_forgets(opening: Open) -> None:
    here, there = rank_of(opening()), rank_of(opening())
    here.put(keys(1, 2), [chunk_of(1), chunk_of(2)])
    here.register([("d", keys(1, 2)), ("e", keys(2))])
    assert there.registered(["d", "e", "f"]) == ["d", "e"]
    assert there.document_keys("d") == keys(1, 2)
    assert there.unregister(["d"], None) == keys(1)
    there.forget(keys(1))
    assert here.registered(["d", "e"]) == ["e"]
    assert here.unregister(["d"], None) == []
    assert here.missing(keys(1, 2)) == keys(1)


@shared_stores
def test_documents_outlive_the_engine(opening: Open) -> None:
    here = rank_of(opening())
    here.put(keys(1, 2), [chunk_of(1), chunk_of(2)])
    here.register([("d", keys(1, 2))])
    here.close()
    later = rank_of(opening())
    assert later.registered(["d"]) == ["d"]
    later.register([("d", keys(3))])  # a new version
    assert later.unregister(["d"], keys(1, 2)) == keys(1, 2)
    assert later.document_keys("d") == keys(3)
    later.close()


@shared_stores
def test_a_document_of_several_ranks_is_one(opening: Open) -> None:
    """A rank that is late does not undo what was registered since the first one unregistered."""
    first, second = (rank_of(opening(heads=Heads(n, 1, 2, leads=n == 0))) for n in range(2))
    for rank in (first, second):
        rank.register([("d", keys(1))])
    assert first.registered(["d"]) == second.registered(["d"]) == ["d"]
    assert first.unregister(["d"], None) == keys(1)
    first.register([("d", keys(2))])
    assert second.unregister(["d"], None) == []
    assert first.document_keys("d") == keys(2)


@every_store
def test_what_is_still_to_be_forgotten_stays_noted(opening: Open) -> None:
    store = opening()
    store.register("d", keys(1, 2, 3))
    store.register("e", keys(2))
    ids = [document_id("d")]
    for _ in range(2):  # whoever could not discard them is told again
        assert sorted(store.unregister(ids, None, [])) == keys(1, 3)
        assert store.document_keys("d") == keys(1, 3)
    assert store.unregister(ids, None, keys(1)) == keys(3)
    assert store.document_keys("d") == keys(3)
    assert store.unregister(ids, None, keys(3)) == []
    assert store.documents() == {document_id("e")}


class Refusing(MemoryStore):
    """As a disk that cannot be written, for so many times."""

    times = 1

    def discard(self, key: str) -> None:
        if self.times:
            self.times -= 1
            raise StoreError("Read-only file system")
        super().discard(key)


@pytest.mark.parametrize("tier", ["", "fast", "slow"])
def test_forgetting_that_failed_is_done_when_it_is_done_again(tier: str) -> None:
    refusing = store = Refusing(1 << 20)
    if tier == "fast":
        store = TieredStore(TieredStore(MemoryStore(1 << 20), refusing), MemoryStore(1 << 20))  # type: ignore[assignment]
    elif tier == "slow":
        store = TieredStore(MemoryStore(1 << 20), refusing)  # type: ignore[assignment]
    put(store, 1, 2, 3)
    store.register("d", keys(1, 2))
    store.register("e", keys(2, 3))
    for name, left in (("d", [2, 3]), ("e", [])):
        refusing.times = 1
        with pytest.raises(StoreError, match="Read-only"):
            store.forget(name)
        assert store.forget(name) > 0
        assert held(store, range(4)) == left
        assert [store.get(key_of(seed)) is not None for seed in (1, 2, 3)].count(True) == len(left)
    assert store.documents() == set()


def test_a_disk_that_refuses_keeps_the_document(tmp_path: Path) -> None:
    with DiskStore(tmp_path, namespace="tiny-r0") as store:
        put(store, 1, 2)
        store.register("d", keys(1, 2))
        erase, first = store._catalog.erase, keys(1, 2)[0]

        def refuse(key: str) -> None:
            if key == first:
                raise OSError(errno.EROFS, "Read-only file system")
            erase(key)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(store._catalog, "erase", refuse)
            with pytest.raises(StoreError, match="Read-only"):
                store.forget("d")
        assert [store.contains(key) for key in keys(1, 2)] == [True, False], "each was tried"
        assert store.document_keys("d") == keys(1, 2)
        assert store.forget("d") == 2 and held(store, range(3)) == []


def test_a_rank_drops_every_copy_whichever_key_the_disk_refuses() -> None:
    store, dropped = Refusing(1 << 20), list[str]()
    rank = RankStore(store, dropped.append)
    rank.put(keys(1, 2), [chunk_of(1), chunk_of(2)])
    with pytest.raises(StoreError, match="Read-only"):
        rank.forget(keys(1, 2))
    assert len(rank.missing(keys(1, 2))) == 1, "the second one was tried"
    assert dropped == keys(1, 2)
    rank.forget(keys(1, 2))
    assert rank.missing(keys(1, 2)) == keys(1, 2)


def test_ranks_with_memory_of_their_own_each_know_documents() -> None:
    space = KeySpace("f", ())
    ranks = [rank_of(open_store("memory://", namespace="n", heads=h)) for h in _HEADS]
    for rank in ranks:
        rank.register([("d", [space.key((1, 2))])])
    assert [rank.registered(["d"]) for rank in ranks] == [["d"], ["d"]]


_HEADS = [Heads(0, 1, 2), Heads(1, 1, 2, leads=False)]


@shared_stores
def test_many_writers_of_documents_that_share_chunks(opening: Open) -> None:
    """What is left is what is registered: nothing is held by a document that is gone, and nothing
    that a document holds was told to be nobody's.
    """
    stores = [opening() for _ in range(3)]
    told: list[list[str]] = [[] for _ in stores]
    kept = {f"kept {n}": keys(n, n + 1, n + 2) for n in range(3)}

    def write(number: int) -> None:
        rng, store = random.Random(number), stores[number]
        store.register(f"kept {number}", kept[f"kept {number}"])
        for _ in range(15):
            name = rng.choice(["x", "y"])
            if rng.random() < 0.5:
                store.register(name, map(key_of, rng.sample(range(9), 4)))
            else:
                told[number] += store.unregister([document_id(name)])

    for n in range(3):
        stores[n].register(f"kept {n}", kept[f"kept {n}"])
    threads = [threading.Thread(target=write, args=(n,)) for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not set().union(*told) & set().union(*kept.values())
    for name, its_keys in kept.items():
        assert stores[0].document_keys(name) == its_keys
    left = set[str]()
    for name in ("x", "y"):
        left |= set(stores[0].document_keys(name))
        left -= set(stores[1].unregister([document_id(name)]))
    assert left == left & set().union(*kept.values()), "nobody holds the others any more"
    assert sorted(stores[2].unregister(map(document_id, kept))) == keys(*range(5))
    assert stores[2].documents() == set()


@remotes
def test_two_who_forget_a_shared_chunk_at_once_do_not_leave_it(opening: Open) -> None:
    stores = [opening(), opening()]
    for turn in range(10):
        for name in ("d", "e"):
            stores[0].register(name, keys(turn))
        with ThreadPoolExecutor(2) as pool:
            ids = [[document_id("d")], [document_id("e")]]
            told = list(pool.map(lambda store, its: store.unregister(its), stores, ids))
        assert keys(turn) in told


@shared_stores
def test_two_who_drop_documents_at_once_leave_no_chunk_of_both(opening: Open) -> None:
    stores = [opening(), opening()]
    for turn in range(5):
        put(stores[0], turn)
        for name in ("d", "e"):
            stores[0].register(name, keys(turn))
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda store, name: store.forget(name), stores, ("d", "e")))
        assert held(stores[0], range(turn + 1)) == [] and stores[1].documents() == set()


@remotes
def test_who_registers_while_another_unregisters_holds_nothing_for_ever(opening: Open) -> None:
    store = opening()
    assert isinstance(store, RemoteStore)
    backend, document, key = store._backend, document_id("d"), key_of(1)
    store.register("d", [key])
    assert backend.release(store._notes, [(document, key)]) == [key]
    opening().register("d", [key])
    backend.unnote(store._notes, [(document, key)])
    store.register("e", [key])
    assert store.unregister([document_id("e")]) == [key], "no document has it noted"


# --- what may go wrong ----------------------------------------------------------------------------


@pytest.fixture
def own_server(tmp_path: Path) -> Iterator[RedisServer]:
    pytest.importorskip("redis")
    server = RedisServer(tmp_path)
    yield server
    server.kill()


@remotes
def test_a_document_may_name_chunks_that_are_gone(opening: Open) -> None:
    store = opening()
    put(store, 1, 2)
    store.register("d", keys(1, 2))
    store.discard(key_of(1))  # as what the remote evicts
    assert store.document_keys("d") == keys(1, 2)
    assert store.forget("d") == 2 and held(store, range(3)) == []


@remotes
@pytest.mark.filterwarnings("ignore:The remote store fails")
@pytest.mark.parametrize("step", ["release", "unnote"])
def test_unregistering_that_failed_is_done_when_it_is_done_again(
    opening: Open, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = opening()
    assert isinstance(store, RemoteStore)
    for name in ("d", "e"):
        store.register(name, keys(1, 2) if name == "d" else keys(2))
    work, failed = getattr(store._backend, step), list[str]()

    def half(notes: str, pairs: list[tuple[str, str]]) -> object:
        if step == "release":  # it was done, and the answer got lost
            work(notes, pairs)
        failed.append(step)
        raise BackendError("connection reset")

    with monkeypatch.context() as patch:
        patch.setattr(store._backend, step, half)
        with pytest.raises(UnavailableError, match="connection reset"):
            store.unregister([document_id("d")])
    assert failed and store.document_keys("d") == keys(1, 2)
    assert store.unregister([document_id("d")]) == keys(1)
    assert store.documents() == {document_id("e")}


@pytest.mark.filterwarnings("ignore:The remote store fails")
@pytest.mark.parametrize("tiers", ["", "&memory=1MiB", "&disk={}/kv"])
def test_a_remote_that_is_away_is_no_document_that_is_not_there(
    own_server: RedisServer, tmp_path: Path, tiers: str
) -> None:
    url = f"{own_server.url}?timeout=1s{tiers.format(tmp_path)}"
    with open_store(url, namespace="tiny-r0") as store:
        rank = rank_of(store)
        rank.register([("d", keys(1))])
        own_server.kill()
        for ask in (
            lambda: rank.registered(["d"]),
            lambda: rank.unregister(["d"], None),
            lambda: rank.register([("e", keys(1))]),
            lambda: rank.document_keys("d"),
            store.documents,
        ):
            with pytest.raises(UnavailableError, match=r"The remote store (fails|does not)"):
                ask()


def test_a_full_redis_evicts_chunks_and_no_documents(own_server: RedisServer) -> None:
    with open_store(f"{own_server.url}?timeout=20s", namespace="tiny-r0") as store:
        assert isinstance(store, RemoteStore)
        client = store._backend._client  # type: ignore[attr-defined]
        used = client.info("memory")["used_memory"]
        client.config_set("maxmemory", used + (2 << 20))
        client.config_set("maxmemory-policy", "volatile-lfu")
        for seed in range(60):
            put_large(store, seed)
            store.register(f"document {seed}", [key_of(seed)])
        assert len(store.documents()) == 60
        assert 0 < len(held(store, range(60))) < 60
        client.config_set("maxmemory-policy", "allkeys-lfu")
    with open_store(own_server.url, namespace="tiny-r0") as store:
        with pytest.warns(RuntimeWarning, match="volatile-lfu"):
            store.register("d", [key_of(1)])
        store.register("d", [key_of(2)])  # it warned


def put_large(store: KVStore, seed: int) -> None:
    assert store.put(key_of(seed), chunk_of(seed, num_tokens=1000)) == ""


@remotes
def test_what_is_no_key_is_neither_noted_nor_told(opening: Open) -> None:
    store = opening()
    assert isinstance(store, RemoteStore)
    with pytest.raises(ValueError, match="64 lowercase"):
        store.register("d", ["../x"])
    store._backend.note(store._notes, document_id("d"), ["x", key_of(1)])
    store._backend.note(store._notes, "y", [key_of(1)])
    assert store.document_keys("d") == keys(1)
    assert store.documents() == {document_id("d")}


def test_what_is_stored_again_meanwhile_keeps_its_note(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or nobody could forget it by its document any more."""
    store = MemoryStore(1 << 20)
    put(store, 1)
    store.register("d", [key_of(1)])
    discard = store.discard

    def again(key: str) -> None:
        discard(key)
        put(store, 1)
        store.register("d", [key])

    monkeypatch.setattr(store, "discard", again)
    assert store.drop([document_id("d")]) == [key_of(1)]
    assert store.document_keys("d") == [key_of(1)] and store.contains(key_of(1))
    monkeypatch.setattr(store, "discard", discard)
    rank = RankStore(store, lambda key: None)
    assert rank.unregister(["d"], None, [key_of(1)]) == [key_of(1)]
    assert rank.document_keys("d") == [key_of(1)], "it is there"
    store.discard(key_of(1))
    assert rank.unregister(["d"], None, [key_of(1)]) == []
    assert rank.document_keys("d") == []
    rank.close()
