"""How what was learnt is computed: in batches, and within a budget of the engine's time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest

from cacheblend_rag.errors import StoreError
from cacheblend_rag.front.learning import LearntIngestion
from cacheblend_rag.learn import LearnOptions
from cacheblend_rag.pacing import Pace

TOKEN_S = 0.001


class Engine:
    """Its clock goes forward while it computes."""

    def __init__(self) -> None:
        self.pace, self.now, self.steps, self.asked, self.told = Pace(), 0.0, 0, 0, 0
        self.said: list[Any] = []
        self.ingested: list[tuple[list[str], list[int], bool]] = []
        self.fails, self.is_slicing, self.synced = False, False, 0

    def rpc(self, method: str, *args: Any) -> list[Any]:
        if method == "cacheblend_learnt":
            said, self.said, self.told = self.said, [], self.told + 1
            return [{"spans": said, "steps": self.steps, "step_s": 0.02}]
        assert method == "cacheblend_ingest" and self.is_slicing
        if self.fails:
            raise StoreError("full")
        keys, chunks, prefix, contexts, learnt = args
        assert contexts == [[] for _ in keys]
        seconds = TOKEN_S * sum(map(len, chunks))
        self.now += seconds
        if self.pace.is_busy(self.now - seconds):
            self.pace.busy_s += seconds
        self.ingested.append((keys, prefix, learnt))
        return [None]

    @contextlib.contextmanager
    def slicing(self, idle_s: float) -> Iterator[None]:
        assert idle_s <= 0.01
        self.is_slicing = True
        try:
            yield
        finally:
            self.is_slicing = False

    def learn(
        self, key: str, tokens: int = 100, prefix: int = 5, *, to_store: bool = False
    ) -> None:
        self.said.append([key, list(range(tokens)), list(range(prefix)), to_store])

    def sync(self) -> None:
        self.synced += 1


@pytest.fixture
def engine() -> Engine:
    return Engine()


def made(engine: Engine, **options: Any) -> LearntIngestion:
    given = LearnOptions(**options)
    return LearntIngestion(engine, given, 1000, 8192, engine.sync, clock=lambda: engine.now)


def test_where_nobody_asks_all_is_computed_the_newest_first(engine: Engine) -> None:
    learnt = made(engine, share=0.0)
    assert not learnt.once()
    engine.now = 1.0  # long after the last step
    for n in range(12):
        engine.learn(f"k{n}")
    while learnt.once():
        pass
    keys = [key for batch, _, _ in engine.ingested for key in batch]
    assert keys == [f"k{n}" for n in reversed(range(12))]
    assert all(len(batch) <= 5 for batch, _, _ in engine.ingested), "of 512 tokens at the most"
    assert learnt.tokens == 1200 and engine.synced == len(engine.ingested)


def test_beside_answers_it_takes_its_share(engine: Engine) -> None:
    learnt = made(engine, share=0.1)
    for n in range(2000):
        engine.steps, engine.now = n, engine.now + 0.02
        engine.learn(f"k{n}", 60)
        learnt.once()
    assert engine.pace.busy_s <= 0.1 * engine.now + 0.5
    assert engine.pace.busy_s >= 0.09 * engine.now
    assert learnt.dropped == 0


def test_too_many_that_wait_are_dropped(engine: Engine) -> None:
    learnt = made(engine, share=0.0)
    learnt.once()
    for n in range(1, 1001):
        engine.steps, engine.now = n, engine.now + 0.02
        engine.learn(f"k{n}", 300)
        assert not learnt.once()
    assert learnt.dropped == 1000 - 200_000 // 300 and not engine.ingested


def test_what_goes_together(engine: Engine) -> None:
    learnt = made(engine)
    engine.now = 9.0
    engine.learn("memory")
    engine.learn("store", to_store=True)
    engine.learn("long", 990, 11)
    engine.learn("fits", 990, 10)
    while learnt.once():
        pass
    assert [(keys, len(prefix), learnt) for keys, prefix, learnt in engine.ingested] == [
        (["fits"], 10, True),
        (["store"], 5, False),
        (["memory"], 5, True),
    ]


def test_a_batch_that_fails_is_left(engine: Engine) -> None:
    learnt = made(engine)
    engine.now, engine.fails = 9.0, True
    engine.learn("a")
    with pytest.raises(StoreError):
        learnt.once()
    engine.fails = False
    engine.learn("b")
    assert learnt.once() and not learnt.once()
    assert [keys for keys, _, _ in engine.ingested] == [["b"]]


def test_an_engine_that_nobody_asks_may_rest(engine: Engine) -> None:
    learnt = made(engine)

    def looks(seconds: float) -> int:
        before, until = engine.told, engine.now + seconds
        while engine.now < until:
            learnt.once()
            engine.now += 0.5
        return engine.told - before

    looks(10.0)
    assert looks(600.0) <= 31
    engine.asked += 1
    assert 3 <= looks(3.0) <= 5
    engine.steps += 1  # of a request that waited for long: it was asked by another process
    engine.now += 60.0
    assert looks(2.0) == 4
    engine.learn("k")
    engine.asked += 1
    learnt.once()
    assert engine.ingested
