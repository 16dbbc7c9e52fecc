"""Calls that come while the serving engine closes end too: none waits for a loop that stopped."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from cacheblend_rag.engine.base import EngineRequest
from cacheblend_rag.engine.serving import ServingEngine
from cacheblend_rag.errors import ClosedError

REQUEST = EngineRequest(token_ids=(1, 2, 3), sampling={})
USES: dict[str, Callable[[ServingEngine], object]] = {
    "rpc": lambda engine: engine.rpc("anything"),
    "generate": lambda engine: engine.generate([REQUEST]),
    "stream": lambda engine: list(engine.stream(REQUEST)),
}


class Silent:
    """In place of vLLM's engine: answers nothing."""

    errored = False

    async def collective_rpc(self, *_: Any, **__: Any) -> Any:
        await asyncio.Event().wait()

    async def generate(self, *_: Any, **__: Any) -> Any:
        await asyncio.Event().wait()
        yield None

    def shutdown(self) -> None: ...


@pytest.fixture
def engine() -> Iterator[ServingEngine]:
    """One whose vLLM was never started."""
    made = ServingEngine.__new__(ServingEngine)
    made._run_loop()
    made._engine = Silent()
    yield made
    made.close()


class Call(threading.Thread):
    """Uses the engine in a thread that no test waits for in vain."""

    def __init__(self, use: Callable[[ServingEngine], object], engine: ServingEngine) -> None:
        super().__init__(daemon=True)
        self.use, self.engine, self.error = use, engine, None
        self.start()

    error: BaseException | None

    def run(self) -> None:
        try:
            self.use(self.engine)
        except BaseException as error:
            self.error = error

    def end(self) -> BaseException | None:
        """What it raised, given some seconds."""
        self.join(5)
        assert not self.is_alive(), "it waits for ever"
        return self.error


@pytest.mark.parametrize("name", USES)
def test_a_call_that_is_just_beginning(
    name: str, engine: ServingEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has seen an open engine, and gets to the loop when that has stopped."""
    seen, stopped, asked = threading.Event(), threading.Event(), threading.Event()
    open_, close_loop = engine._open, engine._loop.close

    def open_slowly() -> Any:
        found = open_()
        seen.set()
        stopped.wait(5)
        asked.set()
        return found

    def close_slowly() -> None:
        stopped.set()
        asked.wait(5)
        time.sleep(0.2)  # so that the call gets this far before the loop is gone
        close_loop()

    monkeypatch.setattr(engine, "_open", open_slowly)
    monkeypatch.setattr(engine._loop, "close", close_slowly)
    call = Call(USES[name], engine)
    assert seen.wait(60)  # vLLM is imported first
    engine.close()
    assert isinstance(call.end(), ClosedError)


@pytest.mark.parametrize("name", USES)
def test_calls_under_way(name: str, engine: ServingEngine) -> None:
    calls = [Call(USES[name], engine) for _ in range(4)]
    time.sleep(0.2)
    engine.close()
    assert {type(call.end()) for call in calls} == {ClosedError}
    assert isinstance(Call(USES[name], engine).end(), ClosedError)
