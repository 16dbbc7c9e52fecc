"""What any process stores or forgets reaches the indexes, memory and GPU of a running engine."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from chunks import chunk_of, key_of
from servers import RedisServer, s3_bucket

from cacheblend_rag import BlendConfig, CacheBlend
from cacheblend_rag.engine.base import TICKET, awaited
from cacheblend_rag.errors import StoreError, UnavailableError
from cacheblend_rag.known import News
from cacheblend_rag.store import Changes, ChunkKV, KVStore, MemoryStore
from cacheblend_rag.store.follow import Follower

pytest.importorskip("vllm")
import storing_engine
from fake_engine import MODEL
from storing_engine import StoringEngine

from cacheblend_rag.engine.stored import RankStore

SOON_S = 10  # of 3 promised; this machine may be busy
TEXTS = [f"Chapter {n}. The quick brown fox jumps over the lazy dog. " * 6 for n in range(4)]


def until(condition: Callable[[], bool], seconds: float = SOON_S) -> float:
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < seconds
        time.sleep(0.02)
    return time.monotonic() - started


@pytest.fixture(params=["disk", "redis", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "disk":
        yield f"{tmp_path}/kv?memory=1GiB"
    elif request.param == "redis":
        pytest.importorskip("redis")
        server = RedisServer(tmp_path)
        yield f"{server.url}?timeout=20s&memory=1GiB"
        server.kill()
    else:
        with s3_bucket() as bucket:
            yield f"{bucket}&timeout=20s&memory=1GiB"


def start(url: str, **options: Any) -> CacheBlend:
    return CacheBlend(MODEL, config=BlendConfig(store=url, **options))


def reuses(blend: CacheBlend, text: str) -> bool:
    return blend.generate(text + "Who jumps?").report.blended


def test_what_another_engine_stores_and_forgets(
    url: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    storing_engine.install(monkeypatch)
    with start(url) as here, start(url) as there:
        engine: Any = here._engine
        beside = here.with_config(BlendConfig(store=url, ingest_prefix="bos"))
        assert there.ingest(TEXTS[0], progress=False).computed == 1
        learnt = until(lambda: reuses(here, TEXTS[0]))
        assert not reuses(beside, TEXTS[0]), "its keys are others"
        here.ingest(TEXTS[1], progress=False)
        until(lambda: reuses(there, TEXTS[1]))

        key = here.key(TEXTS[0])
        engine.near.add(key)
        assert engine.ranks[0].store.get(key) is not None
        assert engine.ranks[0].store.in_memory(key)
        there.forget(TEXTS[0])
        lost = until(lambda: not engine.ranks[0].store.in_memory(key) and key not in engine.near)
        until(lambda: not reuses(here, TEXTS[0]))
        assert reuses(here, TEXTS[1])

        late = here.with_config(here.config)
        assert reuses(late, TEXTS[1]), "what is stored already is known at once"
        there.ingest(TEXTS[2], progress=False)
        until(lambda: reuses(late, TEXTS[2]) and reuses(here, TEXTS[2]))
    request.node.user_properties += [("learnt_s", round(learnt, 2)), ("lost_s", round(lost, 2))]


def test_a_document_of_an_engine_is_forgotten_by_another_and_by_a_later_one(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    storing_engine.install(monkeypatch)
    with start(url) as here, start(url) as there:
        keys = here.ingest(TEXTS[:3], progress=False).keys
        here.register_documents({"d": keys[:2], "e": keys[1:]})
        assert there.registered_documents(["d", "e", "f"]) == {"d", "e"}
        assert there.forget_documents("d") == 1
        assert here.registered_documents(["d", "e"]) == {"e"}
        until(lambda: keys[0] not in here.stored())  # it leaves its memory tier, too
        assert set(keys[1:]) <= here.stored()
    with start(url) as later:
        assert later.forget_documents("e") == 2
        assert not later.stored() & set(keys)


def test_what_one_front_ingests_the_others_find(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storing_engine.install(monkeypatch)
    with start("memory://") as one:
        two = one.with_config(one.config)
        one.ingest(TEXTS[0], progress=False)
        until(lambda: reuses(two, TEXTS[0]))
        two.forget(TEXTS[0])
        assert not reuses(two, TEXTS[0])
        until(lambda: not reuses(one, TEXTS[0]))


def test_a_chunk_is_known_where_every_rank_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storing_engine.install(monkeypatch, num_ranks=2)
    url = str(tmp_path / "kv")
    with start(url) as here, start(url) as there:
        engine: Any = there._engine
        there.ingest(TEXTS[0], progress=False)
        until(lambda: reuses(here, TEXTS[0]))
        key = there.key(TEXTS[0])
        second: KVStore = engine.ranks[1].store
        chunk = second.get(key)
        assert chunk is not None
        second.discard(key)
        until(lambda: not reuses(here, TEXTS[0]))
        second.put(key, chunk)
        until(lambda: reuses(here, TEXTS[0]))


def test_an_engine_that_starts_while_the_store_is_away_learns_of_it_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("redis")
    storing_engine.install(monkeypatch)
    server = RedisServer(tmp_path)
    url = f"{server.url}?timeout=0.3s"
    with start(url) as there:
        there.ingest(TEXTS[0], progress=False)
    server.process.send_signal(19)
    with pytest.warns(RuntimeWarning, match="remote store fails"):
        here = start(url)
    with here:
        assert not reuses(here, TEXTS[0])
        with pytest.raises(StoreError):
            here.forget(TEXTS[1])
        server.process.send_signal(18)
        until(lambda: reuses(here, TEXTS[0]))
    server.kill()


# --- the follower ---------------------------------------------------------------------------------


class Told(MemoryStore):
    """Tells of changes what the test has it tell."""

    def __init__(self) -> None:
        super().__init__(1 << 20)
        self.asked, self.errors = 0, list[Exception]()
        self.gate = threading.Event()
        self.gate.set()

    def changes(self, cursor: object) -> Changes:
        self.asked += 1
        found = super().changes(cursor)
        assert self.gate.wait(30)
        if self.errors:
            raise self.errors.pop()
        return found


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Told:
    monkeypatch.setattr("cacheblend_rag.store.follow._EVERY_S", 0.01)
    return Told()


def following(store: KVStore, forgotten: list[str] | None = None) -> Follower:
    follower = Follower(store, ([] if forgotten is None else forgotten).append)
    follower.start(lambda: None)
    return follower


def taken(follower: Follower) -> News:
    return follower.take() or News([])


def test_a_follower_outlives_any_failure(told: Told) -> None:
    follower, found = following(told), list[str]()
    told.errors += [UnavailableError("away"), RuntimeError("odd"), RuntimeError("odd")]
    told.put(key_of(1), chunk_of(1))

    def is_learnt() -> bool:
        found.extend(row[0] for row in taken(follower).added)
        return found == [key_of(1)]

    with pytest.warns(RuntimeWarning, match="cannot be followed .RuntimeError: odd"):
        until(is_learnt)
    follower.close()
    until(lambda: not follower._thread.is_alive())


def test_what_this_process_did_last_is_what_is_told(told: Told) -> None:
    """However old the store's answer is that comes afterwards."""
    forgotten: list[str] = []
    told.put(key_of(1), chunk_of(1))
    follower = following(told, forgotten)
    told.discard(key_of(1))
    told.gate.clear()
    asked = told.asked
    until(lambda: told.asked > asked)  # it is told that the chunk went, and not yet heard
    told.put(key_of(1), chunk_of(1))
    follower.note(list(told.scan()))
    told.gate.set()
    until(lambda: told.asked > asked + 2)
    news = taken(follower)
    assert [row[0] for row in news.added] == [key_of(1)] and not news.removed
    told.discard(key_of(1))
    follower.note(removed=[key_of(1)])
    assert taken(follower).removed == [key_of(1)]
    follower.close()


def test_too_much_news_is_a_listing(told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cacheblend_rag.store.follow._MOST_NEWS", 3)
    follower = following(told)
    for seed in range(5):
        told.put(key_of(seed), chunk_of(seed))
    known, listings = set[str](), 0

    def is_all_known() -> bool:
        nonlocal listings
        news = taken(follower)
        if news.whole:
            known.clear()
            listings += 1
        known.update(row[0] for row in news.added)
        return listings > 0 and known == {key_of(seed) for seed in range(5)}

    until(is_all_known)
    follower.close()


# --- the store's thread ---------------------------------------------------------------------------


class Slow(MemoryStore):
    """Its writes wait."""

    def __init__(self) -> None:
        super().__init__(1 << 20)
        self.gate, self.fails = threading.Event(), ""

    def put(self, key: str, chunk: ChunkKV) -> str:
        assert self.gate.wait(30)
        if self.fails:
            raise StoreError(self.fails)
        return super().put(key, chunk)


def test_no_call_waits_for_the_store_and_results_come_in_order() -> None:
    store = Slow()
    rank = RankStore(store, lambda key: None)
    keys = [key_of(1), key_of(2)]
    started = time.monotonic()
    first = rank.thread.start(lambda: rank.put(keys, [chunk_of(1), chunk_of(2)]))[TICKET]
    second = rank.thread.start(lambda: rank.missing([*keys, key_of(3)]))[TICKET]
    assert rank.thread.take(first) == rank.thread.take(second) == []
    assert time.monotonic() - started < 1
    store.gate.set()
    results: list[Any] = []
    until(lambda: bool(results.extend(rank.thread.take(second)) or results))
    assert results == [[key_of(3)]]
    assert rank.thread.take(first) == [(2 * chunk_of(1).nbytes, {})]
    assert rank.thread.take(first) == [], "once"
    rank.close()


def test_what_fails_in_the_thread_reaches_the_caller() -> None:
    store = Slow()
    store.gate.set()
    store.fails = "disk full"
    rank = RankStore(store, lambda key: None)

    def ranks(method: str, *args: Any) -> list[Any]:
        if method == "cacheblend_taken":
            return [rank.thread.take(args[0][0])]
        if method == "put":
            return [rank.thread.start(lambda: rank.put([key_of(1)], [chunk_of(1)]))]
        return [rank.thread.start(lambda: 1 // 0)]

    from cacheblend_rag.engine.start import unwrap
    from cacheblend_rag.errors import EngineError

    with pytest.raises(StoreError, match="disk full"):
        unwrap(awaited(ranks, "put"))
    with pytest.raises(EngineError, match="ZeroDivisionError"):
        unwrap(awaited(ranks, "odd"))
    rank.close()


def test_a_forgotten_chunk_leaves_every_tier_whatever_fails() -> None:
    class Away(MemoryStore):
        def discard(self, key: str) -> None:
            if key == key_of(1):
                raise UnavailableError("away")
            super().discard(key)

    store, near = Away(1 << 20), {key_of(1), key_of(2)}
    rank = RankStore(store, near.discard)
    for seed in (1, 2):
        store.put(key_of(seed), chunk_of(seed))
    with pytest.raises(UnavailableError):
        rank.forget([key_of(1), key_of(2)])
    assert not near and [info.key for info in store.scan()] == [key_of(1)]
    rank.close()


def test_a_closed_engine_follows_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storing_engine.install(monkeypatch)
    with start(str(tmp_path / "kv")) as blend:
        assert isinstance(blend._engine, StoringEngine)
        threads = {thread.name for thread in threading.enumerate()}
        assert {"cacheblend-follow", "cacheblend-store"} <= threads
        follower = blend._engine.ranks[0].follower
    until(lambda: not follower._thread.is_alive())


def test_a_store_that_is_closed_while_it_is_asked_says_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What was under way fails, which is no news of the store."""
    monkeypatch.setattr("cacheblend_rag.store.follow._EVERY_S", 0.01)

    class Closing(MemoryStore):
        def changes(self, cursor: object) -> Any:
            if threading.current_thread() is threading.main_thread():
                return super().changes(cursor)
            follower.close()
            asked.set()
            raise ValueError("I/O operation on closed file")

    asked, said = threading.Event(), list[str]()
    monkeypatch.setattr("warnings.warn", lambda text, *args, **kwargs: said.append(str(text)))
    follower = Follower(Closing(1 << 20), lambda key: None)
    follower.start(lambda: None)
    assert asked.wait(10)
    until(lambda: not any(t.name == "cacheblend-follow" for t in threading.enumerate()))
    assert said == []
