"""The path of one request, from a prompt to its answer and report."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, Unpack, overload

from cacheblend_rag import calibration, metrics
from cacheblend_rag.calibration import Calibration
from cacheblend_rag.config import BlendConfig, refuse_fields_of_start
from cacheblend_rag.daemons import DaemonPool
from cacheblend_rag.engine import EngineOutput, EngineRequest
from cacheblend_rag.engine.base import ChatTurn, ParserNames, Read
from cacheblend_rag.errors import (
    ClosedError,
    ConfigError,
    EmptyTextError,
    PromptError,
)
from cacheblend_rag.front.base import Front
from cacheblend_rag.front.shadowing import ShadowThread
from cacheblend_rag.options import (
    OURS,
    PER_REQUEST,
    TOOL_OPTIONS,
    CallOptions,
    ToolOptions,
    blend_options,
    refuse_unknown,
    sampling_options,
)
from cacheblend_rag.plan import PARAMS_KEY
from cacheblend_rag.prompt import (
    Prompt,
    are_messages,
    checked_messages,
    fitting,
    is_prompt,
    owned,
    tokenize,
)
from cacheblend_rag.reason import Reason, Why
from cacheblend_rag.report import make_report
from cacheblend_rag.result import (
    AsyncBlendStream,
    Begun,
    BlendResult,
    BlendStream,
    make_result,
    unread,
)
from cacheblend_rag.shadow.report import ShadowReport
from cacheblend_rag.tools import ToolUse, tool_use


class PreparedRequest(NamedTuple):
    """A request ready for the engine, and what its report will need.

    Attributes:
        why_not: why the engine is not asked to blend.
    """

    request: EngineRequest
    why_not: Why | None
    mode: str
    tokenize_s: float
    request_id: str
    read: Read = unread


class _Options(NamedTuple):
    """Those of one call: ours, vLLM's sampling parameters, a LoRA request, and tools."""

    config: BlendConfig
    sampling: Mapping[str, Any]
    lora_request: Any
    tools: ToolUse | None


class Answers(Front):
    """Answers prompts."""

    calibration: Calibration | None
    _name: str  # of the space that this front's requests are planned in
    _session: str
    _numbers: Iterator[int]
    _preparing: DaemonPool
    _shadows: ShadowThread | None  # None: another process has shadows computed, or nobody

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
        """Answer one prompt, or several together.

        Args:
            prompt: text, chat messages (the model's own template is applied) or token ids; a list
                of these is several prompts.
            **options: vLLM's sampling parameters by their own names; the fields of ``BlendConfig``
                that ``BlendOptions`` names; ``lora_request`` (blended only where it is that of this
                front's chunks, see ``with_config``); ``tools``, ``tool_choice`` and
                ``parallel_tool_calls`` of OpenAI's chat completions, with chat messages only.

        Raises:
            PromptError: an empty, too long or malformed prompt.
            ConfigError: an unknown option or a refused value.
            EngineError: the engine failed.
        """
        prompts: list[Prompt] = [prompt] if is_prompt(prompt) else as_prompts(prompt)
        prepared = [self._prepare(p, options) for p in prompts]
        start = time.perf_counter()
        answers = self._engine.generate([p.request for p in prepared])
        both = zip(prepared, answers, strict=True)
        results = [self._finish(p, list(map(p.read, pieces)), start) for p, pieces in both]
        return results[0] if is_prompt(prompt) else results

    def stream(self, prompt: Prompt, **options: Unpack[CallOptions]) -> BlendStream:
        """Answer one prompt piece by piece: iterate over the text; ``.result`` is there at the end.

        Leaving the iteration early (``close()``, or a ``with`` block) aborts the request.
        Arguments and errors are those of ``generate``.
        """
        prepared = self._prepare(prompt, options)
        pieces = self._engine.stream(prepared.request)
        return BlendStream(pieces, partial(self._finish, prepared), prepared.read)

    async def agenerate(self, prompt: Prompt, **options: Unpack[CallOptions]) -> BlendResult:
        """``generate`` of one prompt for an event loop; cancelling aborts the request."""
        stream = self.astream(prompt, **options)
        async for _ in stream:
            pass
        return stream.result

    def astream(self, prompt: Prompt, **options: Unpack[CallOptions]) -> AsyncBlendStream:
        """``stream`` for an event loop: ``async for piece in blend.astream(prompt)``."""
        self._check_open()
        asked = self._split(options)  # wrong ones are refused here
        return AsyncBlendStream(partial(self._begin, owned(prompt), asked))

    def tokenize(
        self,
        prompt: Prompt,
        *,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        **tools: Unpack[ToolOptions],
    ) -> tuple[int, ...]:
        """The token ids that are computed for ``prompt``, with the cache on or off.

        Args:
            prompt: text, chat messages or token ids.
            chat_template_kwargs: as for ``generate``.
            **tools: ``tools``, ``tool_choice`` and ``parallel_tool_calls``, as for ``generate``.
        """
        refuse_unknown(tools, TOOL_OPTIONS, "tokenize")
        config = self.config.for_call({"chat_template_kwargs": chat_template_kwargs or {}})
        return self._ids(prompt, config, tool_use(tools))

    def shadow(self, result: BlendResult) -> ShadowReport | None:
        """What is known by now of an answer that was drawn to be computed again (``shadow`` of the
        configuration); None where it was not drawn, or is forgotten: the last 1,024 are kept.
        """
        outcome = self._engine.rpc("cacheblend_outcome", result.request_id)[0]
        return ShadowReport.of(outcome.get("shadow"))

    @property
    def takes_messages(self) -> bool:
        """Whether prompts may be chat messages: the model has a chat template."""
        return self._engine.chat.available

    @property
    def parsers(self) -> ParserNames:
        """vLLM's parsers that read answers: calls of tools, and reasoning."""
        return self._engine.chat.parsers

    async def _begin(self, prompt: Prompt, asked: _Options) -> Begun:
        """Prepare a request outside the event loop: long prompts take a while to tokenise."""
        try:
            preparing = self._preparing.submit(self._prepare_split, prompt, asked)
        except RuntimeError as error:
            raise ClosedError("this engine was closed; make a new CacheBlend") from error
        prepared = await asyncio.wrap_future(preparing)
        return Begun(
            self._engine.astream(prepared.request),
            partial(self._finish, prepared),
            prepared.tokenize_s,
            prepared.read,
        )

    def _prepare(self, prompt: Prompt, options: Mapping[str, Any]) -> PreparedRequest:
        self._check_open()
        return self._prepare_split(prompt, self._split(options))

    def _prepare_split(self, prompt: Prompt, asked: _Options) -> PreparedRequest:
        config, lora = asked.config, asked.lora_request
        start = time.perf_counter()
        turn = self._turn(prompt, asked)
        tokenize_s = time.perf_counter() - start
        why_not = self._why_not(config)
        if why_not is None:
            self._sync_if_due()
        request_id = f"{self._session}-{next(self._numbers)}"
        request = EngineRequest(
            token_ids=turn.token_ids,
            sampling=turn.sampling,
            params=None if why_not else self._params(config, request_id),
            cache_salt=_salt(config, request_id),
            lora_request=lora,
            reasoning=turn.reasoning,
        )
        return PreparedRequest(request, why_not, config.mode, tokenize_s, request_id, turn.read)

    def _why_not(self, config: BlendConfig) -> Why | None:
        """Why the engine is not asked to blend."""
        if config.mode in ("off", "full"):
            return Why(Reason.MODE, f"mode is {config.mode!r}")
        if self.model_check.passed:
            return None
        assert self.model_check.reason is not None
        return Why(self.model_check.reason, self.model_check.detail)

    def _params(self, config: BlendConfig, request_id: str, space: str = "") -> dict[str, Any]:
        options = {n: v for n, v in config.request_defaults().items() if n in PER_REQUEST}
        names = {"space": space or self._name, "request_id": request_id}
        return {PARAMS_KEY: {**options, **names}}

    def _turn(self, prompt: Prompt, asked: _Options) -> ChatTurn:
        """The prompt's token ids, and how its answer is read."""
        chat, config = self._engine.chat, asked.config
        is_read = asked.tools is not None or chat.parsers.reasoning
        if self._tokenizer is None or not (is_read and are_messages(prompt)):
            ids = self._ids(prompt, config, asked.tools)
            return ChatTurn(ids, asked.sampling, unread, {})
        messages = checked_messages(prompt)
        turn = chat.turn(messages, config.chat_template_kwargs, asked.tools, asked.sampling)
        fitting(turn.token_ids, self.info.max_model_len)
        self._check_vocabulary(turn.token_ids)
        return turn

    def _ids(self, prompt: Prompt, config: BlendConfig, tools: ToolUse | None) -> tuple[int, ...]:
        ids = tokenize(
            prompt,
            self._tokenizer,
            self._engine.chat,
            config.chat_template_kwargs,
            max_model_len=self.info.max_model_len,
            tools=tools,
        )
        self._check_vocabulary(ids)
        return ids

    def _finish(
        self, prepared: PreparedRequest, pieces: Sequence[EngineOutput], start: float
    ) -> BlendResult:
        last, waited = pieces[-1], prepared.tokenize_s
        report = make_report(
            prepared.why_not,
            self._engine_part(prepared, pieces),
            mode=prepared.mode,
            tokens_total=len(prepared.request.token_ids),
            ttft_s=pieces[0].at - start + waited,
            total_s=last.at - start + waited,
            tokenize_s=waited,
        )
        metrics.observe(report)
        if report.shadow is not None and self._shadows is not None:
            self._shadows.wake()
        return make_result(prepared.request.token_ids, pieces, report, prepared.request_id)

    def _engine_part(
        self, prepared: PreparedRequest, pieces: Sequence[EngineOutput]
    ) -> Mapping[str, Any]:
        """What the engine says it did. The last piece does not tell where the request ended in the
        very step of its blend, and where the front end ended it, as at a stop string.
        """
        engine = pieces[-1].engine
        if prepared.why_not or "recomputed" in engine or "reason" in engine:
            return engine
        outcome: Mapping[str, Any] = self._engine.rpc("cacheblend_outcome", prepared.request_id)[0]
        return outcome

    def _split(self, options: Mapping[str, Any]) -> _Options:
        """One call's options: ours, the sampling parameters, a LoRA request, and tools."""
        sampling = sampling_options(options)
        known = self._engine.sampling_names
        refuse_fields_of_start(sampling)
        refuse_unknown(sampling, {*known, *OURS}, "generate")
        if sampling.get("n", 1) != 1:
            raise ConfigError("n must be 1: for several answers pass the prompt several times")
        if self._tokenizer is None:
            sampling.setdefault("detokenize", False)
        own = blend_options(options)
        config = calibration.sent(self.config.for_call(own), self.calibration, own)
        lora_request = options.get("lora_request", self._lora)
        return _Options(config, sampling, lora_request, tool_use(options))


def as_prompts(prompts: object) -> list[Prompt]:
    """A list of prompts as such.

    Raises:
        PromptError: it is not one, or empty.
    """
    if isinstance(prompts, Sequence) and not prompts:
        raise EmptyTextError("there is no prompt; pass text, chat messages or token ids")
    if not isinstance(prompts, Sequence) or not all(is_prompt(p) for p in prompts):
        raise PromptError("pass text, chat messages or token ids, or a list of such prompts")
    return list(prompts)


def _salt(config: BlendConfig, request_id: str) -> str | None:
    """A full prefill reads no cached block at all. Tenants read none of one another: it would tell
    what the other asked.
    """
    if config.mode == "full":
        return f"full:{request_id}"
    return f"namespace:{config.namespace}" if config.namespace else None
