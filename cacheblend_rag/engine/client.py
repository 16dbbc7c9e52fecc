"""The engine of a server that vLLM started, as its API process reaches it: by RPCs of the workers.

Answers are vLLM's own endpoints. So ``generate`` is for what has to travel with a step, and
streams are not served here.
"""

from __future__ import annotations

import asyncio
import functools
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from vllm import envs

from cacheblend_rag.engine import compat
from cacheblend_rag.engine.base import (
    NO_PARSERS,
    Engine,
    EngineOutput,
    EngineRequest,
    ModelCheck,
    ParserNames,
    awaited,
)
from cacheblend_rag.engine.output import to_output, to_prompt
from cacheblend_rag.engine.params import check_params
from cacheblend_rag.engine.served_chat import ServedChat
from cacheblend_rag.engine.serving import rpc, tokenizer_of
from cacheblend_rag.engine.start import (
    WORKER,
    EngineSetup,
    make_info,
    naming_death,
    sampling_names,
    sampling_params,
    unwrap,
)
from cacheblend_rag.errors import ClosedError, EngineError
from cacheblend_rag.pacing import IDLE_S, Pace, Progress
from cacheblend_rag.planner import Space
from cacheblend_rag.reason import Reason

_T = TypeVar("_T")
_COMPUTES = ("cacheblend_ingest", "cacheblend_shadow")  # by the model, outside of a step
_ASLEEP_S = 0.2  # between two looks
_OWN = "cacheblend-"  # what requests that are no client's are named by
_NOT_HERE = "answers are asked of the server's own endpoints, such as /v1/chat/completions"


class ClientEngine(Engine):
    """Of one API process. Its methods are for other threads than the event loop's.

    Args:
        client: vLLM's engine client, on the event loop ``loop``.
        online: vLLM's ``OnlineRenderer``, which its endpoints share.
        parsers: vLLM's that read answers.

    Attributes:
        state: what the first rank reports of itself, see ``WorkerExtension.cacheblend_state``.
        pace: of ingestions that ``slicing`` is on for.
        asked: requests for answers that this process passed on.
    """

    serves_many = True

    def __init__(
        self,
        client: Any,
        loop: asyncio.AbstractEventLoop,
        online: Any,
        parsers: ParserNames = NO_PARSERS,
    ) -> None:
        self._client, self._loop = client, loop
        # By thread: the job that runs in slices and a look-up of an endpoint share this object.
        self._slicing, self._closed = threading.local(), False
        self.pace, self.asked = Pace(), 0
        config = client.vllm_config
        refusal = compat.model_refusal(config.model_config)
        # Asked of the configuration, as a worker without our extension answers each RPC with an
        # error that names a method.
        if config.parallel_config.worker_extension_cls != WORKER:
            if refusal is not None:
                raise EngineError(f"this model is served without blending: {refusal.detail}")
            raise EngineError(
                "this server was started without the worker extension, which its endpoints under "
                "/v1/cacheblend need. Start it by `cacheblend serve`, or add "
                f"--worker-extension-cls {WORKER}"
            )
        # Asked of the engine between two steps: so only where somebody can put it to sleep.
        self._may_sleep = bool(config.model_config.enable_sleep_mode or envs.VLLM_SERVER_DEV_MODE)
        states = self.rpc("cacheblend_state")
        self.state: dict[str, Any] = states[0]
        self.sampling_names = sampling_names()
        skip = config.model_config.skip_tokenizer_init
        self.tokenizer = None if skip else self._call(tokenizer_of(client))
        self.chat = ServedChat(online, self._call, parsers)
        prepared = EngineSetup(None, refusal, compat.installed_version())
        facts = [{"fingerprint": "", **state["facts"]} for state in states]
        self.info = make_info(prepared, config, lambda: facts)
        self._see_requests(client)

    def _see_requests(self, client: Any) -> None:
        """Have ``asked`` go up with each call of the client's ``generate``, and refuse those that
        would end the engine.
        """
        generate = client.generate

        @functools.wraps(generate)
        def seen(
            prompt: Any, sampling_params: Any, request_id: str, *args: Any, **options: Any
        ) -> Any:
            extra = getattr(sampling_params, "extra_args", None) or {}
            check_params(extra.get("kv_transfer_params"))
            self.asked += 1
            if not request_id.startswith(_OWN):
                # Not only when its steps are seen: a slice would be long until then.
                self.pace.asked(time.monotonic())
            return generate(prompt, sampling_params, request_id, *args, **options)

        client.generate = seen

    @property
    def space(self) -> Space | None:
        """That of requests that name none, as the workers report it."""
        space = self.state["space"]
        return None if space is None else Space.from_plain(space)

    def model_check(self) -> ModelCheck:
        """Whether the engine blends now. Asks it."""
        self.state = self.rpc("cacheblend_state")[0]
        if self.state["why_not"] is None and self.state["is_open"]:
            return ModelCheck(passed=True, max_tokens=self.state["longest"])
        reason, detail = self.state["why_not"] or (Reason.NOT_READY, "no store is open")
        return ModelCheck(passed=False, reason=Reason(reason), detail=detail)

    def rpc(self, method: str, *args: Any) -> list[Any]:
        with naming_death():
            if method in _COMPUTES:
                self._wait_until_awake()
            if method == "cacheblend_ingest" and getattr(self._slicing, "on", False):
                return self._ingest(*args)
            return unwrap(awaited(self._ranks, method, *args))

    @contextmanager
    def slicing(self, idle_s: float = IDLE_S) -> Iterator[None]:
        """What this thread ingests meanwhile is computed between the engine's steps, bit by bit.

        ``idle_s``: seconds of a bit while nobody asks.
        """
        self._slicing.on, self._slicing.idle_s = True, idle_s
        try:
            yield
        finally:
            self._slicing.on = False

    def _ingest(
        self,
        keys: list[str],
        chunks: list[list[int]],
        prefix_ids: list[int],
        contexts: list[list[int]],
        learnt: bool = False,
    ) -> list[Any]:
        name, tokens = uuid.uuid4().hex, sum(map(len, chunks)) + sum(map(len, contexts))
        what = (name, keys, chunks, prefix_ids, contexts, learnt)
        unwrap(self._ranks("cacheblend_ingest_begin", *what))
        self.pace.begin()
        while True:
            if pause := self.pace.pause(time.monotonic()):
                time.sleep(pause)
            self._wait_until_awake()
            parts = self.pace.parts(tokens, time.monotonic(), self._slicing.idle_s)
            results = unwrap(awaited(self._ranks, "cacheblend_ingest_go_on", name, parts))
            if not isinstance(results[0], dict):
                self.pace.ended(parts, tokens, time.monotonic())
                return results
            progress = Progress(**results[0])
            self.pace.learn(progress, parts, tokens, time.monotonic())

    def _wait_until_awake(self) -> None:
        """An engine that sleeps has no weights, and one that is paused may have them changed: what
        computes by the model would end it, or store chunks of no model.
        """
        while self._may_sleep and self._call(self._client.is_sleeping()):
            time.sleep(_ASLEEP_S)

    def generate(self, requests: Sequence[EngineRequest]) -> list[list[EngineOutput]]:
        self.pace.own_steps += len(requests)
        with naming_death():
            return [self._call(self._pieces(request)) for request in requests]

    async def _pieces(self, request: EngineRequest) -> list[EngineOutput]:
        # What travels with a step is a message. Its answer is dropped, so it is computed by the
        # shortest way.
        params = sampling_params(request.sampling, {"cacheblend": {"mode": "off"}})
        name = f"{_OWN}{uuid.uuid4().hex}"
        outputs = self._client.generate(to_prompt(request), params, name)
        return [to_output(output) async for output in outputs]

    def stream(self, request: EngineRequest) -> Iterator[EngineOutput]:
        raise EngineError(_NOT_HERE)

    def astream(self, request: EngineRequest) -> AsyncIterator[EngineOutput]:
        raise EngineError(_NOT_HERE)

    def before_end(self, work: Callable[[], object]) -> None:
        """Have ``work`` done when the server has to end, before its engine does. vLLM's own
        signal handlers begin with that, and leave no other place. Streams that are open then end
        with an error, for which vLLM's server would wait as long as their clients do.
        """
        end = self._client.shutdown

        @functools.wraps(end)
        def shutdown(*args: Any, **options: Any) -> Any:
            work()
            try:
                return end(*args, **options)
            finally:
                self._loop.call_soon_threadsafe(compat.end_streams, self._client)

        # vLLM's signal handlers call this attribute, and nothing before it.
        self._client.shutdown = shutdown

    @property
    def is_dead(self) -> bool:
        """Whether it will answer no call any more."""
        return self._closed or bool(self._client.errored)

    def close(self) -> None:
        self._closed = True

    def _ranks(self, method: str, *args: Any) -> list[Any]:
        return list(self._call(rpc(self._client, method, args)))

    def _call(self, work: Coroutine[Any, Any, _T]) -> _T:
        if self._closed or self._loop.is_closed():
            work.close()
            raise ClosedError("the server is shutting down")
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        finally:
            future.cancel()
