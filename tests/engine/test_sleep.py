"""An engine that sleeps, or is paused, computes nothing; no engine is started."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from cacheblend_rag.engine import client
from cacheblend_rag.engine.client import ClientEngine
from cacheblend_rag.pacing import Pace

pytestmark = pytest.mark.vllm

PROGRESS = {"seconds": 0.01, "steps": 1, "step_s": 0.01, "interleaved_s": 0.01}


class Asleep:
    """vLLM's engine client, as far as it is asked here."""

    def __init__(self) -> None:
        self.naps = iter([True, True, False, True, False, False])
        self.done: list[str] = []

    async def is_sleeping(self) -> bool:
        nap = next(self.naps)
        self.done.append("sleeps" if nap else "awake")
        return nap


@pytest.fixture
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    found = asyncio.new_event_loop()
    thread = threading.Thread(target=found.run_forever)
    thread.start()
    yield found
    found.call_soon_threadsafe(found.stop)
    thread.join()
    found.close()


def engine(loop: asyncio.AbstractEventLoop, asleep: Asleep, *, may_sleep: bool) -> Any:
    made: Any = ClientEngine.__new__(ClientEngine)
    made._client, made._loop, made._closed, made._may_sleep = asleep, loop, False, may_sleep
    made._slicing, made.pace = SimpleNamespace(on=True, idle_s=0.1), Pace()
    answers = {"cacheblend_ingest_go_on": iter([[PROGRESS], [[1, {}]]])}

    def ranks(method: str, *args: Any) -> list[Any]:
        asleep.done.append(method.removeprefix("cacheblend_"))
        return next(answers[method]) if method in answers else [None]

    made._ranks = ranks
    return made


@pytest.mark.parametrize("may_sleep", [True, False])
def test_nothing_is_computed_while_the_engine_sleeps(
    loop: asyncio.AbstractEventLoop, monkeypatch: pytest.MonkeyPatch, *, may_sleep: bool
) -> None:
    monkeypatch.setattr(client, "_ASLEEP_S", 0.001)
    asleep = Asleep()
    made = engine(loop, asleep, may_sleep=may_sleep)
    made.rpc("cacheblend_store_stats")
    made.rpc("cacheblend_ingest", ["k"], [[1, 2]], [], [[]])
    calls = [done for done in asleep.done if done not in ("sleeps", "awake")]
    assert calls == ["store_stats", "ingest_begin", "ingest_go_on", "ingest_go_on"]
    if not may_sleep:
        assert asleep.done == calls, "it is not asked between two slices for nothing"
        return
    before = [asleep.done[i - 1] for i, done in enumerate(asleep.done) if done.startswith("ingest")]
    assert before == ["awake"] * 3
    assert asleep.done[0] == "store_stats", "that needs no model"
