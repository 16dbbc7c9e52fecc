"""Remote stores against a real Redis and a real S3 API, and against servers that misbehave."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from chunks import chunk_of, key_of, same
from servers import RedisServer, answering, free_port, s3_bucket

from cacheblend_rag.errors import UnavailableError
from cacheblend_rag.store import ChunkInfo, ChunkKV, Encoding, MemoryStore, TieredStore, open_store
from cacheblend_rag.store.base import ask, document_id
from cacheblend_rag.store.chunk_file import encode
from cacheblend_rag.store.counts import Held, LastCount
from cacheblend_rag.store.remote import Backend, BackendError, RemoteStore
from cacheblend_rag.store.remote.base import News, ValuePrefix
from cacheblend_rag.store.seal import Cipher

TIMEOUT = 0.5
Open = Callable[..., RemoteStore]


@pytest.fixture(scope="module")
def s3_url() -> Iterator[str]:
    with s3_bucket() as url:
        yield url


@pytest.fixture(params=["redis", "s3"])
def url(request: pytest.FixtureRequest) -> str:
    if request.param == "redis":
        server: RedisServer = request.getfixturevalue("redis_server")
        return f"{server.url}?timeout=20s"  # the machine may be busy
    return f"{request.getfixturevalue('s3_url')}&timeout=20s"


@pytest.fixture
def store(url: str, request: pytest.FixtureRequest) -> Iterator[RemoteStore]:
    namespace = key_of(request.node.name)[:16]
    with open_store(url, namespace=namespace) as opened:
        assert isinstance(opened, RemoteStore)
        yield opened


# --- the contract ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_get_returns_what_was_put_bit_for_bit(store: RemoteStore, dtype: torch.dtype) -> None:
    store.put(key_of(1), chunk_of(1, dtype))
    assert store.contains(key_of(1))
    assert same(store.get(key_of(1)), chunk_of(1, dtype))
    assert store.failures == 0


def test_absent_key(store: RemoteStore) -> None:
    assert store.get(key_of("absent")) is None
    assert not store.contains(key_of("absent"))
    store.discard(key_of("absent"))
    assert store.stats() == (0, 0, 0, 1, 0, 0, 0, 0)
    assert store.failures == 0


def test_put_twice_and_discard(store: RemoteStore) -> None:
    for _ in range(2):
        store.put(key_of(1), chunk_of(1))
    assert store.stats().chunks == 1
    assert store.stats().nbytes > chunk_of(1).nbytes
    store.discard(key_of(1))
    assert store.get(key_of(1)) is None
    assert store.stats().chunks == 0


def test_what_takes_long_to_count_is_counted_seldom() -> None:
    """Or a dashboard that asks each second would have a large store listed without end."""
    now, takes, counts = 0.0, 0.1, 0

    def count() -> Held:
        nonlocal now, counts
        now, counts = now + takes, counts + 1
        return Held(counts, 10 * counts)

    last = LastCount(count, lambda: now)
    assert [last.now().chunks for _ in range(3)] == [1, 2, 3], "quick: always anew"
    takes = 5.0
    assert last.now() == Held(4, 40)
    spent = now
    while now < spent + 99:
        assert last.now() == Held(4, 40)
        now += 1.0
    now += 1.0
    assert last.now().chunks == 5


def test_scan_tells_every_chunk_once(store: RemoteStore) -> None:
    chunks = {key_of(seed): chunk_of(seed, num_tokens=1 + seed) for seed in range(6)}
    chunks[key_of("long")] = chunk_of(7, num_tokens=5000)  # its header is longer than what is read
    for key, chunk in chunks.items():
        store.put(key, chunk)
    told = {ChunkInfo(key, c.token_ids, c.base, c.nbytes) for key, c in chunks.items()}
    found = list(store.scan())
    assert len(found) == len(told)
    assert set(found) == told


def test_listing_asks_the_remote_only_for_what_is_not_here(
    url: str, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    namespace = key_of(request.node.name)[:16]
    asked: list[str] = []
    with open_store(f"{url}&disk={tmp_path}/kv", namespace=namespace) as store:
        assert isinstance(store, TieredStore) and isinstance(store.slow, RemoteStore)
        backend = store.slow._backend
        heads = backend.heads
        monkeypatch.setattr(
            backend, "heads", lambda names, nbytes: asked.extend(names) or heads(names, nbytes)
        )
        for seed in range(4):
            store.put(key_of(seed), chunk_of(seed))
        assert len(list(store.scan())) == 4
        assert asked == []
        store.fast.discard(key_of(2))
        assert {info.key for info in store.scan()} == {key_of(seed) for seed in range(4)}
        assert [name.rpartition("/")[2] for name in asked] == [key_of(2)]


def test_namespaces_are_apart(store: RemoteStore, url: str) -> None:
    store.put(key_of(1), chunk_of(1))
    with open_store(url, namespace="other") as other:
        assert other.get(key_of(1)) is None
        assert list(other.scan()) == []
    with open_store(url, namespace="other", tenant="b") as tenant:
        assert tenant.stats().chunks == 0


def test_a_second_machine_finds_what_the_first_ingested(
    store: RemoteStore, url: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    store.put(key_of(1), chunk_of(1))
    tiers = f"{url}&disk={tmp_path}/kv&memory=1MiB"
    namespace = key_of(request.node.name)[:16]
    with open_store(tiers, namespace=namespace) as second:
        assert isinstance(second, TieredStore)
        assert [info.key for info in second.scan()] == [key_of(1)]
        assert same(second.get(key_of(1)), chunk_of(1))
        store.discard(key_of(1))
        assert same(second.get(key_of(1)), chunk_of(1))  # from memory
    with open_store(tiers, namespace=namespace) as again:
        assert same(again.get(key_of(1)), chunk_of(1))  # from disk


def test_writing_back(store: RemoteStore, url: str, request: pytest.FixtureRequest) -> None:
    namespace = key_of(request.node.name)[:16]
    with open_store(f"{url}&write=back", namespace=namespace) as later:
        for seed in range(5):
            later.put(key_of(seed), chunk_of(seed))
            assert same(later.get(key_of(seed)), chunk_of(seed))
    assert all(same(store.get(key_of(seed)), chunk_of(seed)) for seed in range(5))


@pytest.mark.parametrize("encoding", [Encoding(fp8=True), Encoding(cipher=Cipher(bytes(32)))])
def test_encodings(url: str, encoding: Encoding, request: pytest.FixtureRequest) -> None:
    with open_store(url, namespace=key_of(request.node.name)[:16]) as plain:
        assert isinstance(plain, RemoteStore)
        store = RemoteStore(
            plain._backend, namespace=key_of(request.node.name)[:16], encoding=encoding
        )
        store.put(key_of(1), chunk_of(1))
        found = store.get(key_of(1))
        assert found is not None
        assert found.token_ids == chunk_of(1).token_ids
        assert plain.get(key_of(1)) is None
        assert [info.key for info in store.scan()] == [key_of(1)]


# --- values that are not what they should be ------------------------------------------------------


def file_of(key: str, chunk: ChunkKV) -> bytes:
    return b"".join(encode(key, chunk, Encoding()))


@pytest.mark.parametrize(
    "value",
    [
        b"x",
        b"\xff" * 8,
        bytes(100),
        file_of(key_of(2), chunk_of(2)),
        file_of(key_of(1), chunk_of(1))[:-1],
        file_of(key_of(1), chunk_of(1)) + b"x",
        b"\x80\x04cos\nsystem\n(S'touch /nowhere'\ntR.",
    ],
    ids=["short", "length", "zeros", "another's", "cut", "longer", "pickle"],
)
def test_foreign_values_are_dropped(store: RemoteStore, value: bytes) -> None:
    store._backend.put(store._name(key_of(1)), value)
    assert store.get(key_of(1)) is None
    assert store.stats() == (0, 0, 0, 1, 0, 1, 0, 0)
    store.put(key_of(1), chunk_of(1))
    assert same(store.get(key_of(1)), chunk_of(1))


def test_every_byte_position_class_is_checked(store: RemoteStore) -> None:
    value = file_of(key_of(1), chunk_of(1))
    flipped = 0
    for position in range(0, len(value), 7):
        changed = bytearray(value)
        changed[position] ^= 1 << position % 8
        store._backend.put(store._name(key_of(1)), bytes(changed))
        assert store.get(key_of(1)) is None
        flipped += 1
    assert store.stats().corrupt == flipped > 100


def test_a_value_over_the_limit_is_not_fetched(store: RemoteStore) -> None:
    small = RemoteStore(store._backend, namespace="small", largest_bytes=1000)
    small._backend.put(small._name(key_of(1)), bytes(2000))
    with pytest.warns(RuntimeWarning, match="2000 bytes"):
        unavailable(lambda: small.get(key_of(1)))
    with pytest.warns(RuntimeWarning, match="not kept remotely"):
        assert small.put(key_of(2), chunk_of(2, num_tokens=100))
    assert not small.contains(key_of(2))


# --- servers that misbehave -----------------------------------------------------------------------


@pytest.fixture
def own_server(tmp_path: Path) -> Iterator[RedisServer]:
    pytest.importorskip("redis")
    server = RedisServer(tmp_path)
    yield server
    server.process.send_signal(signal.SIGCONT)
    server.kill()


def open_redis(port: int, **options: Any) -> RemoteStore:
    pytest.importorskip("redis")
    url = f"redis://127.0.0.1:{port}/0?timeout={options.get('timeout', TIMEOUT)}"
    store = open_store(url, namespace="tiny-r0")
    assert isinstance(store, RemoteStore)
    return store


def until(condition: Callable[[], bool]) -> None:
    give_up = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < give_up
        time.sleep(0.01)


def unavailable(work: Callable[[], object]) -> None:
    with pytest.raises(UnavailableError):
        work()


def took(work: Callable[[], object]) -> float:
    started = time.monotonic()
    work()
    return time.monotonic() - started


@pytest.mark.filterwarnings("ignore:The remote store fails")
def test_redis_killed_and_restarted_in_the_middle_of_loads(
    own_server: RedisServer, request: pytest.FixtureRequest
) -> None:
    """No error, no wrong chunk, no long wait; and it is used again once it is back."""
    chunks = {key_of(seed): chunk_of(seed) for seed in range(20)}
    found = missed = wrong = 0
    slowest = 0.0
    stop = threading.Event()

    def hurt() -> None:
        for _ in range(3):
            time.sleep(0.3)
            own_server.kill()
            time.sleep(0.3)
            own_server.start()
        stop.set()

    with open_redis(own_server.port) as store:
        saboteur = threading.Thread(target=hurt)
        saboteur.start()
        while not stop.is_set():
            for key, chunk in chunks.items():
                started = time.monotonic()
                got = ask(store.get, key)
                slowest = max(slowest, time.monotonic() - started)
                if isinstance(got, ChunkKV):
                    found += 1
                    wrong += not same(got, chunk)
                else:
                    missed += 1
                    store.put(key, chunk)
        saboteur.join()
        until(lambda: not store.is_paused)
        assert not store.put(key_of(1), chunk_of(1))
        assert same(store.get(key_of(1)), chunk_of(1))
        assert store.failures > 0
    request.node.user_properties += [
        ("found", found),
        ("missed", missed),
        ("wrong", wrong),
        ("slowest_s", round(slowest, 2)),
    ]
    assert wrong == 0
    assert found > 0
    assert missed > 0
    assert slowest < 4 * TIMEOUT


def test_a_redis_that_hangs_costs_a_recompute_and_then_nothing(own_server: RedisServer) -> None:
    with open_redis(own_server.port) as store:
        store.put(key_of(1), chunk_of(1))
        own_server.process.send_signal(signal.SIGSTOP)
        with pytest.warns(RuntimeWarning, match="remote store fails"):
            assert took(lambda: ask(store.get, key_of(1))) < 4 * TIMEOUT
        for _ in range(2):
            unavailable(lambda: store.get(key_of(1)))
        assert store.is_paused
        assert took(lambda: [ask(store.get, key_of(1)) for _ in range(100)]) < TIMEOUT / 2
        assert took(lambda: store.put(key_of(2), chunk_of(2))) < TIMEOUT / 2
        unavailable(lambda: list(store.scan()))
        unavailable(lambda: store.discard(key_of(1)))
        own_server.process.send_signal(signal.SIGCONT)
        until(lambda: not store.is_paused)
        assert same(store.get(key_of(1)), chunk_of(1))
        assert not store.is_paused


def test_nothing_listens() -> None:
    with open_redis(free_port()) as store:
        with pytest.warns(RuntimeWarning, match="recomputed"):
            unavailable(lambda: store.get(key_of(1)))
        assert "fails" in store.put(key_of(1), chunk_of(1))
        assert store.stats() == (0, 0, 0, 0, 0, 0, 0, 1)


@pytest.mark.parametrize(
    ("answer", "pause", "times"),
    [
        (b"\x00garbage\r\n", 0, 1),
        (b"+OK\r\n", 0, 1),
        (b"-ERR no\r\n", 0, 1),
        (b":99999999999999999999\r\n", 0, 1),
        (b"$9999999999\r\nxxxxxxxx", 0, 1),
        (b"*1000000000\r\n", 0, 1),
        (b"$100000\r\n", 0.05, 100),
        (b":-5\r\n", 0, 1),
        (b"", 0, 1),
    ],
    ids=["bytes", "ok", "error", "number", "huge", "nested", "drip", "negative", "silence"],
)
@pytest.mark.filterwarnings("ignore:The remote store fails")
def test_a_server_that_answers_garbage(answer: bytes, pause: float, times: int) -> None:
    with answering(answer, pause, times) as port, open_redis(port) as store:
        for call in (store.get, store.contains, store.discard):
            assert took(lambda call=call: ask(call, key_of(1))) < 4 * TIMEOUT  # type: ignore[misc]
        assert not isinstance(ask(store.get, key_of(1)), ChunkKV)
        assert took(lambda: store.put(key_of(1), chunk_of(1))) < 4 * TIMEOUT
        assert not isinstance(ask(lambda _: list(store.scan()), ""), list)


def test_a_fast_tier_serves_while_the_remote_is_gone(own_server: RedisServer) -> None:
    remote = open_redis(own_server.port)
    with TieredStore(MemoryStore(1 << 20), remote) as store:
        store.put(key_of(1), chunk_of(1))
        own_server.kill()
        assert same(store.get(key_of(1)), chunk_of(1))
        with pytest.warns(RuntimeWarning, match="remote store fails"):
            assert store.put(key_of(2), chunk_of(2)), "it will not last"
        assert same(store.get(key_of(2)), chunk_of(2))
        unavailable(lambda: store.get(key_of(3)))
        unavailable(lambda: store.contains(key_of(3)))


@pytest.mark.filterwarnings("ignore:The remote store fails")
def test_a_bucket_that_is_gone() -> None:
    pytest.importorskip("obstore")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        url = f"s3://kv?endpoint=http://127.0.0.1:{free_port()}&region=x&timeout={TIMEOUT}"
        with open_store(url, namespace="tiny-r0") as store:
            assert isinstance(store, RemoteStore)
            assert took(lambda: ask(store.get, key_of(1))) < 4 * TIMEOUT
            unavailable(lambda: list(store.scan()))
            assert store.failures > 0


class Stuck(Backend):
    """Never answers."""

    largest = 1 << 20

    def __init__(self) -> None:
        self.released = threading.Event()

    def get(self, name: str, limit: int) -> bytes | None:
        self.released.wait(30)
        return None

    def put(self, name: str, value: bytes, feed: str = "") -> None:
        self.released.wait(30)

    def exists(self, name: str) -> bool:
        raise BackendError("no")

    def delete(self, name: str, feed: str = "") -> None: ...

    def news(self, feed: str, cursor: object) -> News:
        raise BackendError("no")

    def pages(self, prefix: str) -> Iterator[list[tuple[str, int]]]:
        return iter(())

    def heads(self, names: object, nbytes: int) -> list[Any]:
        return []

    def note(self, notes: str, document: str, keys: object) -> None: ...

    def noted(self, notes: str, document: str) -> Iterator[list[str]]:
        return iter(())

    def documents(self, notes: str) -> Iterator[list[str]]:
        return iter(())

    def release(self, notes: str, pairs: object) -> list[str]:
        raise BackendError("no")

    def unnote(self, notes: str, pairs: object) -> None: ...

    def ping(self) -> None:
        raise BackendError("no")

    def close(self) -> None:
        self.released.set()


@pytest.mark.filterwarnings("ignore:The remote store fails")
def test_calls_that_never_end_do_not_hold_up_the_caller() -> None:
    store = RemoteStore(Stuck(), namespace="tiny-r0", timeout_s=0.1)
    waited = took(lambda: [ask(store.get, key_of(n)) for n in range(20)])
    assert waited < 1.5  # three time-outs, then pauses
    assert store.failures == 3
    store.close()
    assert store.stats().unavailable == 20


@pytest.mark.filterwarnings("ignore:The remote store fails")
def test_a_deadline_is_kept_that_is_shorter_than_the_timeout() -> None:
    store = RemoteStore(Stuck(), namespace="tiny-r0", timeout_s=3)
    keys = [key_of(n) for n in range(20)]
    found = []
    assert took(lambda: found.append(store.get_in_time(keys, 0.1))) < 1.5
    assert found[0].timed_out == set(keys) and found[0].chunks == [None] * 20
    assert took(lambda: store.get_in_time(keys, 5)) < 1  # one that hangs is not asked again
    assert store.stats().timed_out == 40
    assert took(store.close) < 8


# --- a remote that is away for a while ------------------------------------------------------------


class Away(Stuck):
    """Fails as long as it is told to."""

    is_away = True
    pings = 0

    def get(self, name: str, limit: int) -> bytes | None:
        if self.is_away:
            raise BackendError("connection refused")
        return None

    def ping(self) -> None:
        self.pings += 1
        self.get("", 0)


@pytest.mark.filterwarnings("ignore:The remote store fails")
def test_only_a_thread_asks_while_the_remote_is_away() -> None:
    backend = Away()
    with RemoteStore(backend, namespace="tiny-r0") as store:
        for _ in range(2):
            assert isinstance(ask(store.get, key_of(1)), UnavailableError)
        assert not store.is_paused
        backend.is_away = False
        assert store.get(key_of(1)) is None  # failures count in a row only
        backend.is_away = True
        for _ in range(30):
            assert isinstance(ask(store.get, key_of(1)), UnavailableError)
        assert store.is_paused
        assert store.failures == 5, "the others were not tried"
        until(lambda: backend.pings > 1)
        assert store.is_paused
        backend.is_away = False
        until(lambda: not store.is_paused)
        assert store.get(key_of(1)) is None
        pings = backend.pings
        time.sleep(1.2)
        assert backend.pings == pings, "nobody asks where all is well"
    assert store.stats().unavailable == 32


@pytest.mark.filterwarnings("ignore:The remote store fails")
@pytest.mark.parametrize("seconds", [3, pytest.param(30, marks=pytest.mark.slow)])
@pytest.mark.parametrize("how", ["stopped", "killed"])
def test_a_remote_that_was_away_is_used_again_within_two_seconds(
    own_server: RedisServer, seconds: float, how: str, request: pytest.FixtureRequest
) -> None:
    away = 0
    with open_redis(own_server.port) as store:
        store.put(key_of(1), chunk_of(1))
        if how == "stopped":
            own_server.process.send_signal(signal.SIGSTOP)
        else:
            own_server.kill()
        back = time.monotonic() + seconds
        while time.monotonic() < back:
            assert isinstance(ask(store.get, key_of(1)), UnavailableError)
            assert isinstance(ask(store.contains, key_of(1)), UnavailableError)
            found = store.get_in_time([key_of(1)], 0.1)
            assert found.chunks == [None] and found.timed_out | found.unavailable == {key_of(1)}
            assert store.put(key_of(2), chunk_of(2)), "it says why it is not kept"
            away += 1
            time.sleep(0.05)
        if how == "stopped":
            own_server.process.send_signal(signal.SIGCONT)
        else:
            own_server.start()
        returned = time.monotonic()
        until(lambda: not isinstance(ask(store.contains, key_of(1)), UnavailableError))
        waited = time.monotonic() - returned
        assert waited < 4  # of 2 promised; this machine may be busy
        assert not store.put(key_of(2), chunk_of(2))
        assert same(store.get(key_of(2)), chunk_of(2))
        assert (store.get(key_of(1)) is None) == (how == "killed")
    request.node.user_properties += [("asked", away), ("waited_s", round(waited, 2))]


def test_one_foreign_value_hides_no_chunk(redis_server: RedisServer) -> None:
    with open_store(f"{redis_server.url}?timeout=20s", namespace="foreign") as store:
        assert isinstance(store, RemoteStore)
        store.put(key_of(1), chunk_of(1))
        for seed, kind in ((2, "lpush"), (3, "sadd")):
            getattr(store._backend._client, kind)(store._name(key_of(seed)), "x")  # type: ignore[attr-defined]
        assert [info.key for info in store.scan()] == [key_of(1)]
        assert store.stats().chunks == 1
        assert same(store.get(key_of(1)), chunk_of(1))


@pytest.mark.parametrize("kind", ["lpush", "sadd", "xadd"])
def test_a_value_of_another_type_is_no_chunk(redis_server: RedisServer, kind: str) -> None:
    with open_store(f"{redis_server.url}?timeout=20s", namespace=f"other-{kind}") as store:
        assert isinstance(store, RemoteStore)
        client = store._backend._client  # type: ignore[attr-defined]
        value: Any = {"a": "b"} if kind == "xadd" else "x"
        getattr(client, kind)(store._name(key_of(1)), value)
        assert not store.contains(key_of(1))
        assert store.get(key_of(1)) is None
        assert store.put(key_of(1), chunk_of(1)) == ""
        assert same(store.get(key_of(1)), chunk_of(1))


def test_changes_begin_anew_where_something_else_has_their_name(redis_server: RedisServer) -> None:
    with open_store(f"{redis_server.url}?timeout=20s", namespace="feed") as store:
        assert isinstance(store, RemoteStore)
        store.put(key_of(1), chunk_of(1))
        cursor = store.changes(None).cursor
        store._backend._client.set(store._feed, "x")  # type: ignore[attr-defined]
        changes = store.changes(cursor)
        assert changes.whole
        store.put(key_of(2), chunk_of(2))
        store.discard(key_of(1))
        told = store.changes(changes.cursor)
        assert told.whole  # an empty stream has no entry to go on from
        assert [info.key for info in store.scan()] == [key_of(2)]
        store.put(key_of(3), chunk_of(3))
        assert [info.key for info in store.changes(told.cursor).added] == [key_of(3)]


class Shelf(Stuck):
    """Values in a dict, of which the store may read no whole one."""

    def __init__(self, values: dict[str, bytes]) -> None:
        super().__init__()
        self.values, self.is_readable = values, True
        self.entries: list[tuple[str, bool]] = []

    def get(self, name: str, limit: int) -> bytes | None:
        raise BackendError("whole values are not to be read")

    def news(self, feed: str, cursor: object) -> News:
        return News(1, self.entries)

    def pages(self, prefix: str) -> Iterator[list[tuple[str, int]]]:
        yield [(name, len(value)) for name, value in self.values.items()]

    def heads(self, names: Any, nbytes: int) -> list[Any]:
        if not self.is_readable:
            raise BackendError("connection reset")
        rows = [(name, self.values[name]) for name in names]
        return [ValuePrefix(name, value[:nbytes], len(value)) for name, value in rows]


LONG = ChunkKV(tuple(range(40_000)), 2, torch.zeros(1, 2, 40_000, 1, 1))


@pytest.mark.parametrize(
    "encoding", [Encoding(), Encoding(cipher=Cipher(b"k" * 32))], ids=["plain", "sealed"]
)
def test_no_listing_reads_a_whole_value(encoding: Encoding) -> None:
    """A foreign one and one of many tokens have longer heads than are read at first."""
    shelf = Shelf({})
    with RemoteStore(shelf, namespace="tiny-r0", encoding=encoding) as store:
        for seed, chunk in ((1, chunk_of(1)), (2, LONG)):
            value = b"".join(bytes(part) for part in encode(key_of(seed), chunk, encoding))
            shelf.values[store._name(key_of(seed))] = value
        shelf.values[store._name(key_of(3))] = b"\xff" * 100_000
        infos = {info.key: info for info in store.scan()}
        assert set(infos) == {key_of(1), key_of(2)}
        assert infos[key_of(2)] == ChunkInfo.of(key_of(2), LONG)
        shelf.entries = [(key_of(n), True) for n in (1, 2, 3)]
        assert [info.key for info in store.changes(0).added] == [key_of(1), key_of(2)]
        assert store.failures == 0


@pytest.mark.filterwarnings("ignore:The remote store fails")
def test_what_went_is_told_whatever_came() -> None:
    shelf = Shelf({})
    shelf.is_readable = False
    with RemoteStore(shelf, namespace="tiny-r0") as store:
        shelf.values[store._name(key_of(1))] = file_of(key_of(1), chunk_of(1))
        shelf.entries = [(key_of(1), True), (key_of(2), False)]
        changes = store.changes("before")
        assert (changes.removed, changes.added, changes.cursor) == ([key_of(2)], (), "before")
        shelf.is_readable = True
        changes = store.changes(changes.cursor)
        assert [info.key for info in changes.added] == [key_of(1)] and changes.cursor == 1
        shelf.is_readable, shelf.entries = False, [(key_of(1), True)]
        unavailable(lambda: store.changes("before"))


@pytest.mark.filterwarnings("ignore:The remote store fails")
def test_objects_that_cannot_be_read_hide_no_others(s3_url: str) -> None:
    """One that is archived or of another key is refused; an empty one has no range."""
    from obstore.exceptions import PermissionDeniedError

    with open_store(f"{s3_url}&timeout=20s", namespace="unreadable") as store:
        assert isinstance(store, RemoteStore)
        backend: Any = store._backend
        obstore, cursor = backend._obstore, store.changes(None).cursor
        for seed in (1, 2, 3):
            store.put(key_of(seed), chunk_of(seed))
        refused, empty = store._name(key_of(2)), store._name(key_of(3))
        obstore.put(backend._bucket, empty, b"")

        class Archived:
            def get(self, bucket: object, name: str, **options: object) -> Any:
                if name == refused:
                    raise PermissionDeniedError("InvalidObjectState")
                return obstore.get(bucket, name, **options)

            def __getattr__(self, name: str) -> Any:
                return getattr(obstore, name)

        backend._obstore = Archived()
        with pytest.warns(RuntimeWarning, match="cannot be read"):
            assert [info.key for info in store.scan()] == [key_of(1)]
        store.discard(key_of(1))  # what refuses everything is not empty
        unavailable(lambda: list(store.scan()))
        store.put(key_of(1), chunk_of(1))
        assert [info.key for info in store.changes(cursor).added] == [key_of(1)]
        for _ in range(5):
            assert isinstance(ask(store.get, key_of(2)), UnavailableError)
        assert store.failures == 0 and not store.is_paused, "the other side is there"
        assert same(store.get(key_of(1)), chunk_of(1))


def test_a_document_of_many_chunks_is_forgotten_in_small_parts(s3_url: str) -> None:
    """Each call has a deadline: with several rounds of requests it may miss it every time."""
    with open_store(f"{s3_url}&timeout=60s", namespace="many") as store:
        assert isinstance(store, RemoteStore)
        backend: Any = store._backend
        backend._obstore = Names()
        at_once, calls = list[int](), list[int]()
        for method in ("note", "release", "unnote"):
            setattr(backend, method, counting(getattr(backend, method), calls))
        backend._for_all = counting(backend._for_all, at_once)
        many = [key_of(n) for n in range(300)]
        store.register("d", many)
        assert store.document_keys("d") == sorted(many)
        assert store.unregister([document_id("d")]) == sorted(many)
        assert store.documents() == set()
        assert max(at_once) <= 64 and sum(calls) == 3 * 300


def counting(method: Any, sizes: list[int]) -> Any:
    """``method``, whose last argument is the names that it is given."""

    def counted(*args: Any) -> Any:
        sizes.append(len(args[-1]))
        return method(*args)

    return counted


class Names:
    """An obstore that does nothing but remember names."""

    def __init__(self) -> None:
        self.names: set[str] = set()

    def put(self, bucket: object, name: str, value: bytes, **options: object) -> None:
        self.names.add(name)

    def head(self, bucket: object, name: str) -> None:
        if name not in self.names:
            raise FileNotFoundError(name)

    def delete(self, bucket: object, name: str) -> None:
        self.names.discard(name)

    def list(self, bucket: object, folder: str, **options: object) -> Iterator[list[Any]]:
        found = sorted(name for name in self.names if name.startswith(f"{folder}/"))
        for start in range(0, max(len(found), 1), 20):
            yield [{"path": name, "size": 0} for name in found[start : start + 20]]


def test_a_user_who_may_not_ask_about_the_server_registers(redis_server: RedisServer) -> None:
    with open_store(f"{redis_server.url}?timeout=20s", namespace="acl") as store:
        assert isinstance(store, RemoteStore)
        client: Any = store._backend._client  # type: ignore[attr-defined]
        client.execute_command("ACL", "SETUSER", "small", "on", ">pw", "~*", "+@all", "-info")
    url = redis_server.url.replace("redis://", "redis://small:pw@")
    with open_store(f"{url}?timeout=20s", namespace="acl") as store:
        store.register("d", [key_of(1)])
        assert store.document_keys("d") == [key_of(1)]


def test_clients_that_are_not_installed_say_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import sys

    from cacheblend_rag.errors import MissingExtraError

    for module, url, extra in (("redis", "redis://h", "redis"), ("obstore", "s3://b", "s3")):
        for name in [n for n in sys.modules if n.split(".")[0] == module]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(MissingExtraError, match=rf"cacheblend-rag\[{extra}\]"):
            open_store(url, namespace="tiny-r0")
