"""What a process leaves when it forks, is interrupted, or ends."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")
from fake_engine import fake_blend

from cacheblend_rag import EngineError
from cacheblend_rag.daemons import DaemonPool
from cacheblend_rag.engine.base import EngineRequest
from cacheblend_rag.engine.batch import BatchEngine, _CallLock
from cacheblend_rag.engine.serving import ServingEngine
from cacheblend_rag.process import Home
from cacheblend_rag.shared import SharedEngine

REQUEST = EngineRequest(token_ids=(1, 2, 3), sampling={})


class Endless:
    """In place of vLLM's engine: answers without end, and interrupts the main thread meanwhile."""

    errored = False

    def __init__(self) -> None:
        self.interrupts = 0  # so often at most
        self.left = threading.Event()

    async def generate(self, *_: Any, **__: Any) -> Any:
        piece = SimpleNamespace(
            text="a", token_ids=[1], finish_reason=None, stop_reason=None, logprobs=None
        )
        try:
            while True:
                await self._goes_on()
                yield SimpleNamespace(outputs=[piece], finished=False)
        finally:
            self.left.set()

    async def collective_rpc(self, *_: Any, **__: Any) -> Any:
        try:
            while True:
                await self._goes_on()
        finally:
            self.left.set()

    async def _goes_on(self) -> None:
        if self.interrupts and _waits(threading.main_thread()):
            self.interrupts -= 1
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
            # One that comes before the thread sleeps is noticed only when it wakes: so once more.
            await asyncio.sleep(1)
        await asyncio.sleep(0.01)

    def shutdown(self) -> None: ...


def _waits(thread: threading.Thread) -> bool:
    """Whether a thread waits for a result."""
    return sys._current_frames()[thread.ident or 0].f_code.co_name == "wait"


@pytest.fixture
def vllm() -> Endless:
    return Endless()


@pytest.fixture
def serving(vllm: Endless) -> Iterator[ServingEngine]:
    made = ServingEngine.__new__(ServingEngine)
    made._run_loop()
    made._engine = vllm
    yield made
    made.close()


@pytest.fixture
def batch() -> BatchEngine:
    made = BatchEngine.__new__(BatchEngine)
    made._llm, made._call_lock, made._home = Endless(), _CallLock(), Home()
    return made


def in_child(work: Callable[[], None]) -> int:
    """The exit status of a forked process: 0, or 1 where ``work`` raised; negative if it hung."""
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def refuses(use: Callable[[], object]) -> None:
    with pytest.raises(EngineError, match="forked"):
        use()


fork = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


@fork
def test_a_forked_child_is_told_and_leaves_the_parent_alone(serving: ServingEngine) -> None:
    stream = serving.stream(REQUEST)
    next(stream)

    def child() -> None:
        refuses(lambda: serving.rpc("anything"))
        refuses(lambda: serving.generate([REQUEST]))
        refuses(lambda: list(serving.stream(REQUEST)))
        refuses(lambda: list(stream))
        serving.close()

    assert in_child(child) == 0
    assert next(stream).text == "a"
    stream.close()  # type: ignore[attr-defined]


@fork
def test_a_fork_while_others_hold_the_locks(
    serving: ServingEngine, batch: BatchEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = SharedEngine.from_running(blend := fake_blend(monkeypatch))

    def child() -> None:
        refuses(lambda: serving.rpc("anything"))
        refuses(lambda: batch.rpc("anything"))
        refuses(lambda: list(batch.stream(REQUEST)))
        refuses(lambda: batch.generate([REQUEST]))
        refuses(lambda: shared.blend().generate("a text"))
        refuses(lambda: blend.ingest("a text"))
        refuses(blend.stats)
        serving.close()
        batch.close()
        blend.close()
        SharedEngine.close_all()  # as at the interpreter's end

    with serving._entry, batch._call_lock, shared._lock:
        assert in_child(child) == 0
    assert blend.generate("a text").text and not blend.engine.closed  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "use",
    [lambda engine: engine.generate([REQUEST, REQUEST]), lambda engine: engine.rpc("anything")],
    ids=["generate", "rpc"],
)
def test_an_interrupt_ends_the_request(
    serving: ServingEngine, vllm: Endless, use: Callable[[ServingEngine], object]
) -> None:
    vllm.interrupts = 5
    # a program that a shell starts in the background ignores it
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            use(serving)
    finally:
        signal.signal(signal.SIGINT, before)
    assert vllm.left.wait(10), "it goes on for nobody"


ENDS = """
import threading, time
from cacheblend_rag.store.parallel import Readers
began = threading.Event()
def hang(_):
    began.set()
    threading.Event().wait()
readers = Readers(2)
{use}
began.wait(10)
"""


@pytest.mark.parametrize(
    "use",
    [
        "readers.start(hang, [1, 2, 3])",
        "readers.map_within(hang, [1, 2], 0.01)",
        "readers.start(hang, [1]); began.wait(10); readers.close()",
    ],
)
def test_the_end_of_a_process_waits_for_no_disk_that_hangs(use: str) -> None:
    subprocess.run([sys.executable, "-c", ENDS.format(use=use)], check=True, timeout=60)


def test_the_end_of_a_process_gives_writes_their_time(tmp_path: Any) -> None:
    code = f"""
import time
from pathlib import Path
from cacheblend_rag.store.parallel import Readers
def write(number):
    time.sleep(.02)
    Path({str(tmp_path)!r}, str(number)).touch()
Readers(1).start(write, range(5))
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    assert len(list(tmp_path.iterdir())) == 5


def test_a_pool_has_no_more_threads_than_it_may() -> None:
    pool, at_work = DaemonPool(3, "a-pool"), set[int]()
    go = threading.Event()

    def work(number: int) -> int:
        at_work.add(threading.get_ident())
        go.wait(10)
        if number == 5:
            raise KeyError(number)
        return number

    futures = [pool.submit(work, number) for number in range(6)]
    go.set()
    assert [f.result(10) for f in futures[:5]] == [0, 1, 2, 3, 4]
    assert isinstance(futures[5].exception(10), KeyError)
    assert 0 < len(at_work) <= 3


def test_a_pool_that_closes_drops_what_has_not_begun_if_asked() -> None:
    for drop in (True, False):
        pool, go, begun = DaemonPool(1, "a-pool"), threading.Event(), threading.Event()
        first = pool.submit(lambda begun=begun, go=go: (begun.set(), go.wait(10)))
        second = pool.submit(time.monotonic)
        begun.wait(10)
        pool.close(drop=drop)
        go.set()
        assert first.result(10)
        assert second.cancelled() if drop else second.result(10)
        with pytest.raises(RuntimeError, match="closed"):
            pool.submit(time.monotonic)
