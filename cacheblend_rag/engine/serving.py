"""The engine for serving: vLLM's ``AsyncLLM`` on an event loop of its own thread.

Any number of threads and event loops may use it at once; their streams interleave.
"""

from __future__ import annotations

import asyncio
import itertools
import queue
import threading
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Future
from typing import Any, TypeVar

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
from cacheblend_rag.undo import on_failure

_T = TypeVar("_T")
_Event = EngineOutput | BaseException | None  # None: the stream ended


class ServingEngine(Engine):
    """``AsyncLLM`` with our connector inside."""

    _engine: Any = None
    serves_many = True

    def __init__(self, model: str, options: Mapping[str, Any]) -> None:
        prepared = prepare("AsyncEngineArgs", model, options)
        self._run_loop()
        with on_failure(self.close):
            with naming_failures(model):
                self._engine = self._call(_start(prepared.engine_args))
            self.sampling_names = sampling_names()
            config = self._engine.vllm_config
            skip = config.model_config.skip_tokenizer_init
            self.tokenizer = None if skip else self._call(tokenizer_of(self._engine))
            self.chat = VllmChat(self._engine.renderer, prepared.parsers, prepared.template)
            self.info = make_info(prepared, config, lambda: self.rpc("cacheblend_inspect"))

    def _run_loop(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="cacheblend-engine", daemon=True
        )
        self._thread.start()
        self._numbers, self._session = itertools.count(), uuid.uuid4().hex[:8]
        # Between a check and a submission the engine may be closed by another thread, and a loop
        # that has stopped never answers. So both happen under this lock.
        self._entry, self._closing = threading.Lock(), False
        self._home = Home()

    def rpc(self, method: str, *args: Any) -> list[Any]:
        with naming_death():
            return unwrap(awaited(self._ranks, method, *args))

    def _ranks(self, method: str, *args: Any) -> list[Any]:
        return list(self._call(rpc(self._open(), method, args)))

    def generate(self, requests: Sequence[EngineRequest]) -> list[list[EngineOutput]]:
        async def collect(request: EngineRequest) -> list[EngineOutput]:
            return [piece async for piece in self._pieces(request)]

        async def collect_all() -> list[list[EngineOutput]]:
            tasks = [asyncio.ensure_future(collect(request)) for request in requests]
            try:
                return list(await asyncio.gather(*tasks))
            finally:
                for task in tasks:
                    task.cancel()

        self._open()
        return self._call(collect_all())

    def stream(self, request: EngineRequest) -> Iterator[EngineOutput]:
        events: queue.SimpleQueue[_Event] = queue.SimpleQueue()
        task = self._forward(request, events.put)
        try:
            while (event := self._next(events)) is not None:
                if isinstance(event, BaseException):
                    raise event
                yield event
        finally:
            # The reader left: vLLM aborts the request when the task that reads its output is
            # cancelled.
            task.cancel()

    def _next(self, events: queue.SimpleQueue[_Event]) -> _Event:
        self._home.check()  # nothing would ever come
        return events.get()

    async def astream(self, request: EngineRequest) -> AsyncIterator[EngineOutput]:
        here = asyncio.get_running_loop()
        events: asyncio.Queue[_Event] = asyncio.Queue()
        task = self._forward(
            request, lambda event: here.call_soon_threadsafe(events.put_nowait, event)
        )
        try:
            while (event := await events.get()) is not None:
                if isinstance(event, BaseException):
                    raise event
                yield event
        finally:
            task.cancel()

    def close(self) -> None:
        if not self._home.is_here:
            return
        with self._entry:  # what was submitted before is cancelled below; nothing comes after
            if self._closing:
                return
            self._closing = True
        engine, self._engine = self._engine, None
        if engine is not None:
            self._loop.call_soon_threadsafe(engine.shutdown)
        # Their callers wait in other threads, and get ``ClosedError``.
        asyncio.run_coroutine_threadsafe(_cancel_others(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _forward(self, request: EngineRequest, put: Callable[[_Event], object]) -> Future[None]:
        """Run a request on the engine's loop; its pieces, its end or its error go to ``put``."""

        async def run() -> None:
            try:
                async for piece in self._pieces(request):
                    put(piece)
                put(None)
            except Exception as error:  # raised again where the stream is read
                put(error)
            # By ``close``; a reader that left takes nothing from ``put`` any more.
            except asyncio.CancelledError:
                put(ClosedError("the engine was closed while this request ran"))
                raise

        self._open()
        return self._submit(run())

    async def _pieces(self, request: EngineRequest) -> AsyncIterator[EngineOutput]:
        name = f"{self._session}-{next(self._numbers)}"
        params = sampling_params(request.sampling, request.params)
        with naming_death(), naming_refusals():
            outputs = self._open().generate(
                to_prompt(request),
                params,
                name,
                lora_request=request.lora_request,
                **request.reasoning,
            )
            async for output in outputs:
                if failed(output):
                    raise failure(await self._causes(request))
                yield to_output(output)

    async def _causes(self, request: EngineRequest) -> list[str]:
        """Why a request could not be computed, by what each rank says."""
        name = plan_name(request)
        return list(await rpc(self._open(), "cacheblend_cause", (name,))) if name else []

    def _call(self, work: Coroutine[Any, Any, _T]) -> _T:
        future = self._submit(work)
        try:
            return future.result()
        except CancelledError as error:
            raise ClosedError("the engine was closed while this call ran") from error
        finally:
            future.cancel()  # where the caller was interrupted: nobody waits for it any more

    def _submit(self, work: Coroutine[Any, Any, _T]) -> Future[_T]:
        """Run ``work`` on the engine's loop: a loop that has stopped would never answer."""
        try:
            self._home.check()
        except EngineError:
            work.close()
            raise
        with self._entry:
            if not self._closing:
                return asyncio.run_coroutine_threadsafe(work, self._loop)
        work.close()
        raise ClosedError("the engine was closed before this call began")

    def _open(self) -> Any:
        self._home.check()
        if self._engine is None:
            raise ClosedError("this engine was closed; make a new CacheBlend")
        return self._engine


async def _start(engine_args: Any) -> Any:
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.engine.async_llm import AsyncLLM

    # vLLM's own limits for a server. With the smaller ones of an unnamed use, the rows of a long
    # prompt's blend would not fit one step.
    server = UsageContext.OPENAI_API_SERVER
    return AsyncLLM.from_engine_args(engine_args, usage_context=server)


async def rpc(engine: Any, method: str, args: tuple[Any, ...]) -> Any:
    """Call ``method`` of every rank's worker. vLLM never answers a call that was under way when its
    process was killed.
    """
    call = asyncio.ensure_future(engine.collective_rpc(method, args=args))
    try:
        # Asked twice a second, as nothing tells a call that waits.
        while not (await asyncio.wait([call], timeout=0.5))[0]:
            if engine.errored:
                raise engine.dead_error
        return call.result()
    finally:
        call.cancel()


async def tokenizer_of(engine: Any) -> Any:
    """The engine's own."""
    found = engine.get_tokenizer()
    return await found if asyncio.iscoroutine(found) else found


async def _cancel_others() -> None:
    others = [t for t in asyncio.all_tasks() if t is not asyncio.current_task()]
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
