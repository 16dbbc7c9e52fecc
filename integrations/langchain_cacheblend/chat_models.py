"""``ChatCacheBlend``: LangChain's chat model over an embedded vLLM that reuses KV of chunks."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import aclosing, closing
from functools import partial
from pathlib import Path
from typing import Any, Unpack

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import LangSmithParams, LanguageModelInput
from langchain_core.language_models.chat_models import BaseChatModel
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_core.runnables import Runnable
from langchain_core.tools import BaseTool
from pydantic import ConfigDict

from cacheblend_rag import (
    AsyncBlendStream,
    BlendResult,
    BlendStream,
    CacheBlend,
)
from langchain_cacheblend.fields import ModelArguments
from langchain_cacheblend.retrieval import not_found, text_of
from langchain_cacheblend.settings import EngineSettings, details, off_the_loop, usage
from langchain_cacheblend.structured import structured
from langchain_cacheblend.tools import of_chunk, of_message, openai_tools, to_prompt


class ChatCacheBlend(EngineSettings, BaseChatModel):
    """A chat model whose prompts start sooner: KV of chunks that were ingested is reused.

    Messages go through the model's own chat template, unchanged.

    Args:
        model: hub name or folder; may be left out with ``url`` and ``from_engine``.
        blend_config: how to blend; set its ``system_prompt`` to that of your chains.
        engine_args: vLLM's engine arguments by their own names.
        **fields: those of ``EngineSettings``, and LangChain's own.

    Raises:
        ConfigError: the model is in use in this process with other settings.
        ServerError: no server answers at ``url``, and no ``model`` was named.
    """

    model_config = ConfigDict(extra="forbid")

    # its own, else type checkers make one of the fields alone
    def __init__(
        self, model: str | Path | None = None, **arguments: Unpack[ModelArguments]
    ) -> None:
        super().__init__(model, **arguments)

    @property
    def _llm_type(self) -> str:
        return "cacheblend-chat"

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        params = super()._get_ls_params(stop=stop, **kwargs)
        params["ls_provider"] = "cacheblend"
        params["ls_temperature"] = kwargs.get("temperature", self.temperature)
        params["ls_max_tokens"] = kwargs.get("max_tokens", self.max_tokens)
        if stops := stop or self.stop:
            params["ls_stop"] = stops
        return params

    def get_token_ids(self, text: str) -> list[int]:
        return list(self.blend.tokenizer.encode(text, add_special_tokens=False))

    # ---- answers -------------------------------------------------------------------------------

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        blend, clock = self.blend, self.deadline()
        missing = not_found(text_of(messages))
        with blend.stream(to_prompt(messages), **self.options(stop, kwargs)) as stream:
            for _ in stream:
                clock.check()
        return self._whole(blend, stream.result, missing)

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        blend, clock = await self.engine.ablend(), self.deadline()
        missing = not_found(text_of(messages))
        async with blend.astream(to_prompt(messages), **self.options(stop, kwargs)) as stream:
            async for _ in stream:
                clock.check()
        return await asyncio.to_thread(self._whole, blend, stream.result, missing)

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        blend, clock = self.blend, self.deadline()
        missing = not_found(text_of(messages))
        with closing(blend.stream(to_prompt(messages), **self.options(stop, kwargs))) as stream:
            for delta in stream:
                clock.check()
                chunk = self._chunk(blend, delta, stream, missing)
                if run_manager is not None:
                    run_manager.on_llm_new_token(delta, chunk=chunk)
                yield chunk

    async def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:
        blend, clock = await self.engine.ablend(), self.deadline()
        missing = not_found(text_of(messages))
        asked = blend.astream(to_prompt(messages), **self.options(stop, kwargs))
        async with aclosing(asked) as stream:
            async for delta in stream:
                clock.check()
                make = partial(self._chunk, blend, delta, stream, missing)
                chunk = await off_the_loop(stream, make)
                if run_manager is not None:
                    await run_manager.on_llm_new_token(delta, chunk=chunk)
                yield chunk

    def _whole(
        self, blend: CacheBlend, result: BlendResult, missing: list[str] | None
    ) -> ChatResult:
        message = AIMessage(
            content=result.text,
            usage_metadata=usage(result),
            response_metadata=details(result, self.model, blend.tokenizer, missing),
            **of_message(result.tool_calls, result.reasoning),
        )
        return ChatResult(generations=[ChatGeneration(message=message)])

    def _chunk(
        self,
        blend: CacheBlend,
        delta: str,
        stream: BlendStream | AsyncBlendStream,
        missing: list[str] | None,
    ) -> ChatGenerationChunk:
        """A piece of an answer; the last one carries counts and report."""
        piece = stream.pieces[-1]
        tail = of_chunk(piece.tool_calls, piece.reasoning)
        if stream.has_ended:
            tail |= {
                "usage_metadata": usage(stream.result),
                "response_metadata": details(stream.result, self.model, blend.tokenizer, missing),
                "chunk_position": "last",
            }
        return ChatGenerationChunk(message=AIMessageChunk(content=delta, **tail))

    # ---- structured output and tools -----------------------------------------------------------

    def with_structured_output(
        self,
        schema: dict[str, Any] | type,
        *,
        include_raw: bool = False,
        method: str = "json_schema",
        strict: bool | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, Any]:
        """Answers of a given form: the engine lets the model write nothing else.

        The prompt does not mention the schema, so say in words what you want. An answer that
        ``max_tokens`` cuts off is no whole JSON, and is reported as such.

        Args:
            schema: a pydantic class, a TypedDict or a JSON schema; see LangChain.
            include_raw: also return the message, and a parsing error instead of raising it.
            method: ``json_schema``, ``function_calling`` and ``json_mode`` are the same here:
                decoding is held to the schema.
            strict: makes no difference: decoding is held to the schema in any case.
            **kwargs: options of the call.

        Raises:
            ConfigError: an unknown method.
        """
        return structured(self, schema, include_raw=include_raw, method=method, call=kwargs)

    def bind_tools(
        self,
        tools: Sequence[dict[str, Any] | type | Callable[..., Any] | BaseTool],
        *,
        tool_choice: str | bool | dict[str, Any] | None = None,
        strict: bool | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, AIMessage]:
        """A model that may call tools: the chat template describes them, and vLLM's parser reads
        the calls. Name it among the engine's arguments,
        ``engine_args={"tool_call_parser": "hermes"}``; a server has its own.

        The first call says so if there is no parser, with a ``ConfigError``.

        Args:
            tools: functions, pydantic classes, tools of LangChain, or OpenAI's form.
            tool_choice: ``auto``, ``none``, ``any`` (also ``required`` or True: one at least), or a
                tool's name: decoding is then held to calls. None: ``auto``.
            strict: whether a call's arguments are held to the tool's schema. None: as vLLM's
                parser does it; that for Hermes leaves them free, whatever ``tool_choice`` is.
            **kwargs: options of the call, such as ``parallel_tool_calls``.

        Raises:
            ConfigError: something in ``tools`` is no tool.
        """
        bound: dict[str, Any] = {"tools": openai_tools(tools, strict=strict), **kwargs}
        if tool_choice is not None:
            bound["tool_choice"] = tool_choice
        return self.bind(**bound)
