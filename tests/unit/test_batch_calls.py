"""Who holds the batch engine, and when it is let go: its calls take turns."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from cacheblend_rag.engine.base import EngineRequest
from cacheblend_rag.engine.batch import BatchEngine, _CallLock
from cacheblend_rag.errors import EngineError
from cacheblend_rag.process import Home

REQUEST = EngineRequest(token_ids=(1, 2, 3), sampling={"max_tokens": 4})
ENDLESS = EngineRequest(token_ids=(1, 2, 3), sampling={"max_tokens": 1 << 30})


class Vllm:
    """In place of vLLM's ``LLM``: a step gives each request a token."""

    def __init__(self) -> None:
        self.llm_engine, self.engine_core = self, self
        self.errored = False
        self.running: dict[str, int] = {}  # tokens to come
        self.met: Counter[str] = Counter()

    def add_request(self, name: str, _: Any, params: Any, **__: Any) -> None:
        self.running[name] = params.max_tokens
        self.met["added"] += 1

    def step(self) -> list[Any]:
        time.sleep(0.002)
        outputs = []
        for name, left in list(self.running.items()):
            piece = SimpleNamespace(
                text="a",
                token_ids=[1],
                finish_reason="length" if left == 1 else None,
                stop_reason=None,
                logprobs=None,
            )
            outputs.append(
                SimpleNamespace(
                    request_id=name,
                    outputs=[piece],
                    finished=left == 1,
                    kv_transfer_params=None,
                    num_cached_tokens=0,
                )
            )
            self.running[name] -= 1
            if left == 1:
                del self.running[name]
        return outputs

    def abort_request(self, names: list[str]) -> None:
        self.met["aborted"] += len(names)
        for name in names:
            del self.running[name]

    def collective_rpc(self, *_: Any, **__: Any) -> list[None]:
        return [None]

    def shutdown(self) -> None: ...


@pytest.fixture
def vllm() -> Vllm:
    return Vllm()


@pytest.fixture
def engine(vllm: Vllm) -> Iterator[BatchEngine]:
    made = BatchEngine.__new__(BatchEngine)
    made._llm, made._call_lock, made._home = vllm, _CallLock(), Home()
    made._numbers = iter(range(1 << 30))  # type: ignore[assignment]
    yield made
    made.close()


def is_free(engine: BatchEngine) -> bool:
    if free := engine._call_lock._lock.acquire(timeout=10):
        engine._call_lock._lock.release()
    return free


def test_a_closed_stream_is_closed_whoever_else_knows_of_it(
    engine: BatchEngine, vllm: Vllm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python 3.12.3 keeps the frame of a closed generator, and with it the generators therein."""
    run, known = engine._run, list[object]()

    def noted(*args: Any) -> Any:
        known.append(running := run(*args))
        return running

    monkeypatch.setattr(engine, "_run", noted)
    stream = engine.stream(ENDLESS)
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert not vllm.running and known
    assert len(engine.generate([REQUEST])[0]) == 4


async def all_of(engine: BatchEngine, request: EngineRequest) -> list[str]:
    return [piece.text async for piece in engine.astream(request)]


async def test_one_that_is_cancelled_lets_go_before_its_error_is_gone(
    engine: BatchEngine, vllm: Vllm
) -> None:
    with pytest.raises(TimeoutError) as error:
        await asyncio.wait_for(all_of(engine, ENDLESS), 0.1)
    assert error.value.__cause__ is not None  # whose traceback knows the frames of the stream
    assert await asyncio.to_thread(is_free, engine)
    assert not vllm.running


async def test_more_at_once_than_an_event_loop_has_threads(engine: BatchEngine) -> None:
    answers = await asyncio.wait_for(
        asyncio.gather(*(all_of(engine, REQUEST) for _ in range(50))), 20
    )
    assert answers == [["a"] * 4] * 50


async def test_one_that_waits_for_its_turn_is_cancelled(engine: BatchEngine, vllm: Vllm) -> None:
    stream = engine.stream(ENDLESS)
    next(stream)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(all_of(engine, ENDLESS), 0.1)
    stream.close()  # type: ignore[attr-defined]
    assert await asyncio.to_thread(is_free, engine)
    assert not vllm.running and vllm.met["added"] == 1


@pytest.mark.parametrize("leave", [True, False], ids=["closed", "forgotten"])
async def test_leaving_an_async_stream_aborts_it(
    engine: BatchEngine, vllm: Vllm, leave: bool
) -> None:
    stream = engine.astream(ENDLESS)
    async for _ in stream:
        break
    if leave:
        await stream.aclose()  # type: ignore[attr-defined]
    del stream
    await asyncio.sleep(0.1)
    assert not vllm.running and vllm.met["aborted"] == 1


async def test_what_a_step_raises_is_raised_to_who_reads(
    engine: BatchEngine, vllm: Vllm, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails() -> Any:
        raise RuntimeError("no step")

    with monkeypatch.context() as patch:
        patch.setattr(vllm, "step", fails)
        with pytest.raises(RuntimeError, match="no step"):
            await all_of(engine, ENDLESS)
    assert not vllm.running
    assert await all_of(engine, REQUEST) == ["a"] * 4


def test_a_thread_that_would_wait_for_its_own_stream_is_told(engine: BatchEngine) -> None:
    uses: list[Callable[[], object]] = [
        lambda: engine.generate([REQUEST]),
        lambda: next(engine.stream(REQUEST)),
    ]
    stream = engine.stream(ENDLESS)
    next(stream)
    for use in uses:
        with pytest.raises(EngineError, match="one call at a time"):
            use()
    stream.close()  # type: ignore[attr-defined]
    assert len(engine.generate([REQUEST])[0]) == 4
