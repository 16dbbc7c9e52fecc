"""Prompts to answers over HTTP: the half of ``RemoteCacheBlend`` that asks."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cached_property, partial
from typing import Any, NamedTuple, Unpack, overload

from cacheblend_rag.client import replies, requests
from cacheblend_rag.client.answers import Answer, AsyncAnswer
from cacheblend_rag.client.http import BASE, Connection
from cacheblend_rag.client.tokenizer import RemoteTokenizer
from cacheblend_rag.config import BlendConfig
from cacheblend_rag.engine import EngineInfo, EngineOutput
from cacheblend_rag.engine.base import ParserNames
from cacheblend_rag.errors import CacheBlendError, ConfigError, PromptError, ServerError
from cacheblend_rag.front.answers import as_prompts
from cacheblend_rag.options import TOOL_OPTIONS, CallOptions, ToolOptions, refuse_unknown
from cacheblend_rag.prompt import (
    Prompt,
    are_messages,
    check_takes_tools,
    checked,
    checked_messages,
    fitting,
    is_prompt,
    owned,
)
from cacheblend_rag.reason import Reason, Why
from cacheblend_rag.report import BlendReport, make_report
from cacheblend_rag.result import AsyncBlendStream, Begun, BlendResult, BlendStream, make_result
from cacheblend_rag.shadow.report import ShadowReport
from cacheblend_rag.token_ids import token_ids
from cacheblend_rag.tools import ToolUse, tool_use
from cacheblend_rag.undo import on_failure

_AT_ONCE = 64  # answers of one generate()
# a report is written when a request ends, which may be a moment after its last token came
_REPORT_WAITS_S = (0.01, 0.05, 0.25)


class _Request(NamedTuple):
    """An answer that is ready to be requested, and what its report will need."""

    ids: tuple[int, ...]
    body: Mapping[str, Any]
    mode: str
    tokenize_s: float


class RemoteAnswers:
    """Prompts become token ids at the server, and answers come from its completions endpoint."""

    config: BlendConfig
    info: EngineInfo
    _connection: Connection
    _own: frozenset[str]  # the fields of ``config`` that every request carries
    _parsers: ParserNames
    _more_sampling: frozenset[str] | None = None

    @property
    def parsers(self) -> ParserNames:
        return self._parsers

    def _call(self, method: str, path: str, body: Any = None, **more: Any) -> Any:
        return self._connection.call(method, BASE + path, body, **more)

    # ---- prompts -------------------------------------------------------------------------------

    @cached_property
    def tokenizer(self) -> Any:
        """The server's; each call of it is one over HTTP."""
        return RemoteTokenizer(self._connection, self.tokenize)

    @cached_property
    def takes_messages(self) -> bool:
        try:
            self.tokenize([{"role": "user", "content": "a"}])
        except PromptError:
            return False
        return True

    def tokenize(
        self,
        prompt: Prompt,
        *,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        **tools: Unpack[ToolOptions],
    ) -> tuple[int, ...]:
        refuse_unknown(tools, TOOL_OPTIONS, "tokenize")
        config = self.config.for_call({"chat_template_kwargs": chat_template_kwargs or {}})
        return self._ids(prompt, config, tool_use(tools))

    def _ids(
        self, prompt: Prompt, config: BlendConfig, tools: ToolUse | None = None
    ) -> tuple[int, ...]:
        check_takes_tools(prompt, tools)
        if isinstance(prompt, str):
            ids = self._rendered(checked(prompt), {}) if prompt else ()
        elif are_messages(prompt):
            messages = list(checked_messages(prompt))
            ids = self._rendered(messages, config.chat_template_kwargs, tools)
        else:
            ids = token_ids(prompt)
        return fitting(ids, self.info.max_model_len)

    def _rendered(
        self, prompt: Any, arguments: Mapping[str, Any], tools: ToolUse | None = None
    ) -> tuple[int, ...]:
        body = {
            "prompt": prompt,
            **({"chat_template_kwargs": dict(arguments)} if arguments else {}),
            **({} if tools is None else tools.body()),
        }
        return tuple(self._call("POST", "/tokenize", body, safe=True)["token_ids"])

    # ---- answers -------------------------------------------------------------------------------

    # a text is also a sequence of texts: the first one is meant
    @overload
    def generate(  # type: ignore[overload-overlap]
        self, prompt: Prompt, **options: Unpack[CallOptions]
    ) -> BlendResult: ...
    @overload
    def generate(
        self, prompt: Sequence[Prompt], **options: Unpack[CallOptions]
    ) -> list[BlendResult]: ...
    def generate(
        self, prompt: Prompt | Sequence[Prompt], **options: Unpack[CallOptions]
    ) -> BlendResult | list[BlendResult]:
        chosen = self._options(options)
        if is_prompt(prompt):
            return self._whole(self._prepare_request(prompt, chosen), threading.Event())
        return self._together([self._prepare_request(p, chosen) for p in as_prompts(prompt)])

    def _together(self, prepared: Sequence[_Request]) -> list[BlendResult]:
        """All answers at once; where one fails, the others are left."""
        left = threading.Event()
        with ThreadPoolExecutor(min(len(prepared), _AT_ONCE), "cacheblend-generate") as pool:
            answers = [pool.submit(self._whole, one, left) for one in prepared]
            with (
                on_failure(left.set),
                on_failure(partial(pool.shutdown, wait=False, cancel_futures=True)),
            ):
                return [answer.result() for answer in answers]

    def _whole(self, request: _Request, left: threading.Event) -> BlendResult:
        with self._stream(request) as stream:
            for _ in stream:
                if left.is_set():
                    raise ServerError("another prompt of this call failed")
        return stream.result

    def stream(self, prompt: Prompt, **options: Unpack[CallOptions]) -> BlendStream:
        return self._stream(self._prepare_request(prompt, self._options(options)))

    def _stream(self, request: _Request) -> BlendStream:
        start = time.perf_counter()
        answer = Answer(self._connection, request.body)
        stream = BlendStream(answer, partial(self._finish_answer, request, answer))
        stream._start = start  # the request was on its way before there was a stream
        return stream

    async def agenerate(self, prompt: Prompt, **options: Unpack[CallOptions]) -> BlendResult:
        async with self.astream(prompt, **options) as stream:
            async for _ in stream:
                pass
        return stream.result

    def astream(self, prompt: Prompt, **options: Unpack[CallOptions]) -> AsyncBlendStream:
        self._connection.check_open()
        return AsyncBlendStream(partial(self._abegin, owned(prompt), self._options(options)))

    async def _abegin(self, prompt: Prompt, options: requests.Options) -> Begun:
        request = await asyncio.to_thread(self._prepare_request, prompt, options)
        answer = AsyncAnswer(self._connection, request.body)
        finish = partial(self._finish_answer, request, answer)
        pieces: AsyncIterator[EngineOutput] = answer.pieces()
        return Begun(pieces, finish, request.tokenize_s)

    def _options(self, options: Mapping[str, Any]) -> requests.Options:
        self._connection.check_open()
        known = requests.SAMPLING
        if requests.OF_SOME_VERSIONS & options.keys():
            known |= self._sampling_of_server()
        return requests.split(options, self.config, self._own, known)

    def _sampling_of_server(self) -> frozenset[str]:
        """Which parameters that only some versions of vLLM have this server's takes."""
        if self._more_sampling is None:
            schema = self._connection.call("GET", "/openapi.json", absent=True) or {}
            body = schema.get("components", {}).get("schemas", {}).get("CompletionRequest", {})
            self._more_sampling = requests.OF_SOME_VERSIONS & body.get("properties", {}).keys()
        return self._more_sampling

    def _prepare_request(self, prompt: Prompt, options: requests.Options) -> _Request:
        tools = options.tools
        check_takes_tools(prompt, tools)
        if tools is not None and tools.may_call and not self.parsers.tool:
            raise ConfigError(
                f"{self._connection.url} has no parser for calls of tools. Start it with one that "
                "reads its model's: cacheblend serve MODEL --enable-auto-tool-choice "
                "--tool-call-parser NAME; vLLM lists their names: cacheblend serve "
                "--help=tool-call-parser"
            )
        start = time.perf_counter()
        ids = self._ids(prompt, options.config, tools)
        spent = time.perf_counter() - start
        if are_messages(prompt) and (tools is not None or self.parsers.reasoning):
            body = requests.chat(prompt, ids, options, self.info.max_model_len)
        else:
            body = requests.completion(ids, options, self.info.max_model_len)
        return _Request(ids, body, options.config.mode, spent)

    def _finish_answer(
        self,
        request: _Request,
        answer: Answer | AsyncAnswer,
        pieces: Sequence[EngineOutput],
        start: float,
    ) -> BlendResult:
        report = self._report(request, answer.id)
        stages = {**report.stages_s, "tokenize": request.tokenize_s}
        report = replace(
            report,
            ttft_s=pieces[0].at - start + request.tokenize_s,
            total_s=pieces[-1].at - start + request.tokenize_s,
            stages_s=stages,
        )
        return make_result(answer.prompt_ids or request.ids, pieces, report, answer.id)

    def _report(self, request: _Request, name: str) -> BlendReport:
        """The server's report of an answer. The answer itself is there in any case."""
        try:
            data = self._report_data(name)
            why = "the server has no report of this request (any more)"
        except CacheBlendError as error:
            data, why = None, f"the server did not say what it did: {error}"
        if data is not None:
            return replies.report(data)
        return make_report(
            Why(Reason.NOT_REPORTED, why),
            {},
            mode=request.mode,
            tokens_total=len(request.ids),
            ttft_s=0.0,
            total_s=0.0,
            tokenize_s=0.0,
        )

    def shadow(self, result: BlendResult) -> ShadowReport | None:
        data = self._report_data(result.request_id)
        return None if data is None else replies.report(data).shadow

    def _report_data(self, name: str) -> Mapping[str, Any] | None:
        for wait in (*_REPORT_WAITS_S, None):
            data: Mapping[str, Any] | None = self._call("GET", f"/requests/{name}", absent=True)
            if data is not None or wait is None:
                return data
            time.sleep(wait)
        return None
