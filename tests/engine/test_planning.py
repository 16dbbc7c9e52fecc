"""Planning beside the engine's steps: what is quick at once, the rest in a thread, in order."""

from __future__ import annotations

import threading
import time
from array import array
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, cast

import pytest
from tiny import Words

pytest.importorskip("vllm")
from cacheblend_rag.engine.ahead import Ahead
from cacheblend_rag.engine.link import Link
from cacheblend_rag.engine.planning import Planning
from cacheblend_rag.engine.rows import StepRows
from cacheblend_rag.errors import StoreError
from cacheblend_rag.keys import KeySpace
from cacheblend_rag.known import News
from cacheblend_rag.plan import NoPlan, Plan
from cacheblend_rag.planner import Limits, Planned, Planner, Space
from cacheblend_rag.reason import Reason, RefusedError, Why
from cacheblend_rag.store import MemoryStore
from cacheblend_rag.store.base import ChunkInfo
from cacheblend_rag.store.follow import Follower

words = Words(4)
CHUNK = words(64)
KEYS = KeySpace("f", ())
SPACE = Space(name="here", keys=KEYS)
PROMPT = (*words(5), *CHUNK, *words(12))
OPTIONS = {"space": "here"}
INFO = ChunkInfo(KEYS.key(CHUNK), CHUNK, 0, 100)


class Gated(Planner):
    """Waits, where its thread learns something."""

    def __init__(self) -> None:
        super().__init__(16)
        self.gate, self.threads = threading.Event(), list[str]()
        self.gate.set()

    def learn(self, rank: int, message: Any) -> None:
        assert self.gate.wait(30)
        self.threads.append(threading.current_thread().name)
        super().learn(rank, message)


@pytest.fixture
def link() -> Link:
    return Link()


@pytest.fixture
def planner() -> Gated:
    return Gated()


@pytest.fixture
def planning(link: Link, planner: Gated) -> Planning:
    made = Planning(link, planner)
    for message in (SPACE, Limits()):
        link.send(message)
    made.begin(PROMPT, OPTIONS).result(30)
    return made


def until(condition: Callable[[], bool]) -> None:
    for _ in range(1000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError


def news(chunks: Sequence[tuple[int, ...]]) -> News:
    return News([(KEYS.key(c), array("i", c).tobytes(), 0) for c in chunks])


def is_blended(planned: Planned) -> bool:
    return isinstance(planned.plan, Plan)


def test_what_was_said_before_a_request_counts_for_it(planning: Planning, link: Link) -> None:
    assert not is_blended(planning.begin(PROMPT, OPTIONS).result(30))
    link.send(news([CHUNK]))
    assert is_blended(planning.begin(PROMPT, OPTIONS).result(30))


def test_a_store_s_news_are_heard(planning: Planning, link: Link) -> None:
    follower = Follower(MemoryStore(1 << 20), lambda key: None)
    link.follow(follower)
    follower.note([INFO])
    assert is_blended(planning.begin(PROMPT, OPTIONS).result(30))
    follower.note(removed=[INFO.key])
    assert not is_blended(planning.begin(PROMPT, OPTIONS).result(30))
    follower.close()


def test_what_was_fetched_for_a_request_that_left_is_dropped() -> None:
    """Nobody else would ask for it: it would stay in memory for ever."""
    gate, held = threading.Event(), set[str]()

    class Slow:
        def consider(self, plan: Any) -> tuple[None, set[str]]:
            return None, set()

        def is_fast(self, plan: Any) -> bool:
            return False

        def fetch(self, name: str, plan: Any) -> None:
            assert gate.wait(30)
            held.add(name)

        def forget(self, name: str) -> None:
            held.discard(name)

        def refusal(self, name: str) -> None:
            return None

    link: Any = SimpleNamespace(rows=SimpleNamespace(blender=Slow()))
    ahead, plan = Ahead(link), cast(Plan, None)
    assert ahead.waits("stays", plan) and ahead.waits("leaves", plan)
    ahead.forget("leaves")
    gate.set()
    until(lambda: not ahead.waits("stays", plan))
    until(lambda: held == {"stays"})
    time.sleep(0.05)
    assert held == {"stays"}


class Disk:
    """Stands for a worker's rows and blender; plans are words here."""

    def __init__(self) -> None:
        self.blender, self.held, self.looked = self, set[str](), 0

    def consider(self, plan: Any) -> tuple[Any, set[str]]:
        self.looked += 1
        return (Why(Reason.PREFILL_AS_QUICK, "slow") if plan == "poor" else None), set()

    def is_fast(self, plan: Any) -> bool:
        return bool(plan == "fast")

    def fetch(self, name: str, plan: Any) -> None:
        self.held.add(name)

    def forget(self, name: str) -> None:
        self.held.discard(name)

    def refusal(self, name: str) -> None:
        return None

    def stage(self, name: str, plan: Any) -> bool:
        return True

    def unstage(self) -> None:
        pass

    def begin_ahead(self, task: Any) -> None:
        self.held.discard(task.request_id)


def test_what_is_fetched_for_blends_to_come_is_bounded() -> None:
    """It is beside the store's own memory: of a long queue it would fill the host's."""
    disk, slow = Disk(), cast(Plan, "slow")
    ahead = Ahead(cast(Any, SimpleNamespace(rows=disk)))
    for name in map(str, range(10)):
        ahead.look_ahead(name, slow)  # these have no room yet
    for _ in range(3):
        for name in map(str, range(10, 100)):
            assert ahead.waits(name, slow)
    until(lambda: len(disk.held) == 8)
    time.sleep(0.05)
    assert disk.held == set(map(str, range(8))), "no more, whoever asks"
    assert disk.looked == 8 + 90, "each is looked at once"
    assert not ahead.waits("quick", cast(Plan, "fast")), "what is in memory need not wait"
    assert not ahead.waits("0", slow)
    ahead.begin(cast(Any, SimpleNamespace(request_id="0")))
    ahead.forget("1")
    assert ahead.waits("98", slow) and ahead.waits("99", slow)
    until(lambda: disk.held == {*map(str, range(2, 8)), "98", "99"})
    with pytest.raises(RefusedError):
        ahead.waits("poor", cast(Plan, "poor"))
    ahead.forget("2")
    with pytest.raises(RefusedError):
        ahead.look_ahead("no room", cast(Plan, "poor"))


def test_a_listing_that_failed_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where it was no outage: too many open files, say."""
    store = MemoryStore(1 << 20)
    follower = Follower(store, lambda key: None)
    scan, failed = store.scan, list[str]()

    def fails(*args: Any) -> Any:
        if not failed:
            failed.append("once")
            raise StoreError("too many open files")
        return scan()

    monkeypatch.setattr(store, "scan", fails)
    with pytest.raises(StoreError):
        follower._list()
    assert follower._stale
    follower._list()
    assert not follower._stale and follower.take() is not None
    follower.close()


def test_short_prompts_are_planned_at_once_and_long_ones_in_a_thread(
    planning: Planning, link: Link, planner: Gated
) -> None:
    link.send(news([CHUNK]))
    until(lambda: planner.threads[-1] == "cacheblend-plan" and not link.waits)
    until(lambda: planning._busy is None or planning._busy.done())
    assert planning.begin(PROMPT, OPTIONS).done()
    planner.gate.clear()
    link.send(news([words(40)]))
    long = planning.begin(words(9000) + PROMPT, OPTIONS)
    behind = planning.begin(PROMPT, OPTIONS)
    assert not long.done() and not behind.done()
    planner.gate.set()
    assert is_blended(long.result(30)) and is_blended(behind.result(30))


def test_many_new_chunks_hold_up_no_step(planning: Planning, link: Link, planner: Gated) -> None:
    planner.gate.clear()
    link.send(news([CHUNK, words(50), words(60)]))
    asked = time.monotonic()
    planned = planning.begin(PROMPT, OPTIONS)
    assert time.monotonic() - asked < 5 and not planned.done()
    planner.gate.set()
    assert is_blended(planned.result(30))


def test_what_another_process_says_is_heard_by_rank(planning: Planning) -> None:
    planning.deliver(1, [news([CHUNK])])
    assert is_blended(planning.begin(PROMPT, OPTIONS).result(30))
    planning.deliver(0, [News([], whole=True)])
    assert not is_blended(planning.begin(PROMPT, OPTIONS).result(30))


def test_a_request_outlives_what_fails(
    planning: Planning, planner: Gated, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any) -> Any:
        raise RuntimeError("broken on purpose")

    with monkeypatch.context() as patch:
        patch.setattr(Planner, "plan", broken)
        plan = planning.begin(PROMPT, OPTIONS).result(30).plan
    assert isinstance(plan, NoPlan) and plan.reason is Reason.PLANNING_FAILED
    with monkeypatch.context() as patch:
        patch.setattr(Planner, "learn", broken)
        planning.deliver(0, [news([CHUNK])])
        assert not is_blended(planning.begin(PROMPT, OPTIONS).result(30))
    planning.deliver(0, [news([CHUNK])])
    assert is_blended(planning.begin(PROMPT, OPTIONS).result(30))
    planning.close()


def test_one_link_an_engine(link: Link) -> None:
    one, other = Link.of("one"), Link.of("other")
    assert Link.of("one") is one is not other
    assert not one.has_scheduler
    one.send(Limits())
    assert one.waits and one.take() == [Limits()] and not one.waits


@pytest.mark.parametrize("errors", [[1.0, 0.0], [0.0, 1.0]], ids=["fails first", "fails last"])
def test_one_proof_that_fails_outweighs_those_that_hold(errors: list[float]) -> None:
    """They may be under way together."""
    said: list[Any] = []
    rows: Any = StepRows.__new__(StepRows)
    rows._finished = [
        SimpleNamespace(proof=SimpleNamespace(error=lambda e=e: e), why_not=None) for e in errors
    ]
    rows._dtype, rows.proved = "float32", said.append
    rows.handle = SimpleNamespace(ranks=SimpleNamespace(any=lambda flags: flags))
    rows._lose = lambda blend, detail: None
    rows._is_disproved = False
    rows.prove()
    assert said[-1] is not None and said[-1].reason is Reason.ROWS_DIFFER
