"""The engine for batch work: vLLM's ``LLM``, stepped in the caller's thread.

One call at a time; others wait for a lock. For streams side by side use the serving engine.
"""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections.abc import AsyncIterator, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from typing import Any

import torch

from cacheblend_rag.engine.base import Engine, EngineOutput, EngineRequest, awaited
from cacheblend_rag.engine.chat import VllmChat
from cacheblend_rag.engine.output import to_output, to_prompt
from cacheblend_rag.engine.start import (
    failed,
    failure,
    make_info,
    naming_death,
    naming_failures,
    naming_refusals,
    plan_name,
    prepare,
    sampling_names,
    sampling_params,
    unwrap,
)
from cacheblend_rag.errors import ClosedError, EngineError
from cacheblend_rag.process import Home


class _CallLock:
    """One call at a time. A stream that is read from several threads may hold it, so it belongs to
    no thread; but a thread that would wait for its own unfinished stream is told so.
    """

    def __init__(self) -> None:
        # No ``RLock``: that would let a thread enter a second call while its stream is open, and
        # the two would step the same engine.
        self._lock, self._holder = threading.Lock(), 0

    def __enter__(self) -> None:
        if not self._lock.acquire(blocking=False):
            if self._holder == threading.get_ident():
                raise EngineError(
                    "the batch engine serves one call at a time, and this thread has a stream "
                    "open: read it to its end or close() it, or use engine='serving'"
                )
            self._lock.acquire()
        self._holder = threading.get_ident()

    def __exit__(self, *error: object) -> None:
        self._holder = 0
        self._lock.release()


class BatchEngine(Engine):
    """``LLM`` with our connector inside."""

    def __init__(self, model: str, options: Mapping[str, Any]) -> None:
        from vllm import LLM

        prepared = prepare("EngineArgs", model, options)
        with naming_failures(model):
            self._llm: Any = LLM.from_engine_args(prepared.engine_args)
        _watch(self._llm.llm_engine.engine_core)
        self._call_lock, self._home = _CallLock(), Home()
        self._numbers = itertools.count()
        self.sampling_names = sampling_names()
        config = self._llm.llm_engine.vllm_config
        skip = config.model_config.skip_tokenizer_init
        self.tokenizer = None if skip else self._llm.get_tokenizer()
        self.chat = VllmChat(self._llm.llm_engine.renderer, prepared.parsers, prepared.template)
        self.info = make_info(prepared, config, lambda: self.rpc("cacheblend_inspect"))

    def rpc(self, method: str, *args: Any) -> list[Any]:
        return unwrap(awaited(self._ranks, method, *args))

    def _ranks(self, method: str, *args: Any) -> list[Any]:
        self._home.check()
        with self._call_lock, naming_death():
            _take_thread_count()
            return list(self._open().collective_rpc(method, args=args))

    def generate(self, requests: Sequence[EngineRequest]) -> list[list[EngineOutput]]:
        pieces: list[list[EngineOutput]] = [[] for _ in requests]
        for number, piece in self._run(requests):
            pieces[number].append(piece)
        return pieces

    def stream(self, request: EngineRequest) -> Iterator[EngineOutput]:
        # A generator that is closed need not let go of one that it reads (Python 3.12.3).
        with closing(self._run([request])) as pieces:
            for _, piece in pieces:
                yield piece

    async def astream(self, request: EngineRequest) -> AsyncIterator[EngineOutput]:
        here, left = asyncio.get_running_loop(), threading.Event()
        events: asyncio.Queue[EngineOutput | BaseException | None] = asyncio.Queue()

        def tell(event: EngineOutput | BaseException | None) -> None:
            with suppress(RuntimeError):  # the loop was closed
                here.call_soon_threadsafe(events.put_nowait, event)

        def run() -> None:
            with closing(self._run([request], left)) as pieces:
                for _, piece in pieces:
                    tell(piece)

        # One of its own: those of the loop are few, and who waits for a turn would keep one from
        # whose turn it is. Its end, or its error, is the last event.
        pool = ThreadPoolExecutor(1, "cacheblend-stream")
        pool.submit(run).add_done_callback(lambda done: tell(done.exception()))
        pool.shutdown(wait=False)
        try:
            while (event := await events.get()) is not None:
                if isinstance(event, BaseException):
                    raise event
                yield event
        finally:
            left.set()

    def _run(
        self, requests: Sequence[EngineRequest], left: threading.Event | None = None
    ) -> Generator[tuple[int, EngineOutput], None, None]:
        """``left``: set once nobody reads any more."""
        self._home.check()
        with self._call_lock, naming_death():
            if left and left.is_set():  # while it waited for its turn
                return
            engine = self._open().llm_engine
            numbers: dict[str, int] = {}
            unfinished: set[str] = set()
            try:
                for i, request in enumerate(requests):
                    name = f"batch-{next(self._numbers)}"
                    self._add(engine, name, request)
                    numbers[name] = i
                    unfinished.add(name)
                while unfinished and not (left and left.is_set()):
                    self._home.check()
                    _take_thread_count()
                    for output in engine.step():
                        if output.finished:
                            unfinished.discard(output.request_id)
                        number = numbers[output.request_id]
                        if failed(output):
                            raise failure(self._causes(requests[number]))
                        yield number, to_output(output)
            # Left early by a reader, an error or an interrupt: the engine must not go on with it.
            finally:
                if unfinished and self._home.is_here:
                    engine.abort_request(list(unfinished))

    def _causes(self, request: EngineRequest) -> list[str]:
        """Why a request could not be computed, by what each rank says."""
        name = plan_name(request)
        return self._open().collective_rpc("cacheblend_cause", args=(name,)) if name else []

    def _add(self, engine: Any, name: str, request: EngineRequest) -> None:
        params = sampling_params(request.sampling, request.params)
        with naming_refusals():
            engine.add_request(name, to_prompt(request), params, lora_request=request.lora_request)

    def close(self) -> None:
        if not self._home.is_here:
            return
        with self._call_lock:
            llm, self._llm = self._llm, None
            if llm is not None:
                llm.llm_engine.engine_core.shutdown()

    def _open(self) -> Any:
        if self._llm is None:
            raise ClosedError("this engine was closed; make a new CacheBlend")
        return self._llm


def _take_thread_count() -> None:
    """A thread takes the number of OpenMP threads that the program has set at the first operation
    which needs it. vLLM plans attention before, with the default, and then fails.
    """
    torch.get_num_threads()


def _watch(core: Any) -> None:
    """Have callers fail when the engine process dies: vLLM's blocking client lets them wait on."""
    if hasattr(core, "outputs_queue"):  # not where the engine runs in this process
        name = "cacheblend-watch"
        threading.Thread(target=_fail_when_dead, args=[core], name=name, daemon=True).start()


def _fail_when_dead(core: Any) -> None:
    from vllm.v1.engine.exceptions import EngineDeadError

    while not core.resources.engine_dead:  # also set by an ordinary shutdown
        time.sleep(0.5)
    # Into the queue that the blocking client reads, which raises what it finds there.
    core.outputs_queue.put_nowait(EngineDeadError())
    for waiting in list(core.utility_results.values()):
        if not waiting.done():
            waiting.set_exception(EngineDeadError())
