"""An API process knows that somebody asks before the engine makes a step for it."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest

from cacheblend_rag.engine import client
from cacheblend_rag.engine.client import ClientEngine
from cacheblend_rag.pacing import Pace

pytestmark = pytest.mark.vllm


@pytest.fixture
def engine() -> ClientEngine:
    """Of no server."""
    made = object.__new__(ClientEngine)
    made._may_sleep = False
    made.pace, made.asked, made._slicing = Pace(), 0, threading.local()
    return made


def test_a_request_is_noted_as_it_is_passed_on(engine: ClientEngine) -> None:
    passed: list[str] = []
    vllms: Any = SimpleNamespace(generate=lambda prompt, params, name: passed.append(name))
    engine._see_requests(vllms)
    params = SimpleNamespace(extra_args={})
    vllms.generate("x", params, "cacheblend-1")  # a step for what travels with it
    assert not engine.pace.is_busy(time.monotonic())
    vllms.generate("x", params, "cmpl-1")
    assert engine.pace.is_busy(time.monotonic()) and engine.asked == 2
    deep = SimpleNamespace(extra_args={"kv_transfer_params": {"a": [[[]]] * 2 + ["\ud800"]}})
    with pytest.raises(ValueError, match="half a character"):
        vllms.generate("x", deep, "cmpl-2")
    assert passed == ["cacheblend-1", "cmpl-1"]


def test_an_ingestion_lets_a_step_be_alone_now_and_then(
    engine: ClientEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[float] = []
    monkeypatch.setattr(client.time, "sleep", slept.append)
    slices = iter(range(1, 41))

    def ranks(method: str, *args: Any) -> list[Any]:
        if method == "cacheblend_ingest_begin":
            return [None]
        if (steps := next(slices)) == 40:
            return [[100, {}]]
        return [{"seconds": 0.01, "steps": steps, "step_s": 0.04, "interleaved_s": 0.05}]

    monkeypatch.setattr(engine, "_ranks", ranks)
    with engine.slicing():
        assert engine.rpc("cacheblend_ingest", ["k"], [[1] * 50], [], [[]]) == [[100, {}]]
    assert slept == pytest.approx([0.125] * 3)
