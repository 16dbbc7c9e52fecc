"""``CacheBlendLLM``: LlamaIndex's LLM over an embedded vLLM that reuses the KV of chunks."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import AsyncGenerator, Callable, Generator, Mapping, Sequence
from contextlib import aclosing, closing
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, Unpack, cast

from llama_index.core.base.llms.generic_utils import (
    messages_to_prompt as generic_messages_to_prompt,
)
from llama_index.core.base.llms.types import (
    ChatMessage,
    ChatResponse,
    ChatResponseAsyncGen,
    ChatResponseGen,
    CompletionResponse,
    CompletionResponseAsyncGen,
    CompletionResponseGen,
    LLMMetadata,
)
from llama_index.core.bridge.pydantic import ConfigDict, Field
from llama_index.core.llms.callbacks import llm_chat_callback, llm_completion_callback
from llama_index.core.llms.llm import default_completion_to_prompt
from llama_index.core.prompts.chat_prompts import TEXT_QA_SYSTEM_PROMPT

from cacheblend_rag import AsyncBlendStream, BlendConfig, BlendResult, BlendStream, CacheBlend
from cacheblend_rag.client import SharedServer
from cacheblend_rag.config import template_arguments
from cacheblend_rag.errors import ConfigError, PromptError
from cacheblend_rag.options import CallOptions
from cacheblend_rag.prompt import Prompt
from cacheblend_rag.shared import SharedEngine
from llama_index_cacheblend import responses
from llama_index_cacheblend.calling import CallingLLM
from llama_index_cacheblend.fields import LLMFields
from llama_index_cacheblend.prompts import to_messages
from llama_index_cacheblend.responses import PartialAnswer
from llama_index_cacheblend.retrieval import not_found

_Response = TypeVar("_Response", CompletionResponse, ChatResponse)
_Make = Callable[[PartialAnswer, Mapping[str, Any]], _Response]


class _PreparedCall(NamedTuple):
    """A call, ready for the engine."""

    blend: CacheBlend
    prompt: Prompt
    options: CallOptions
    not_found: list[str] | None  # retrieved, and not in the prompt

    def tail(self, result: BlendResult) -> dict[str, Any]:
        return responses.tail(result, self.blend.tokenizer, self.not_found)


class CacheBlendLLM(CallingLLM):
    """A LlamaIndex LLM whose prompts start sooner: KV of chunks that were ingested is reused.

    The engine starts when first needed, and is shared by all objects that name the same model. With
    ``url`` it is that of a server, ``cacheblend serve``, and nothing starts here.
    Prompts are what they are with any other LLM: the model's chat template is applied to chat
    messages, text goes in as it is. ``messages_to_prompt`` and ``completion_to_prompt``, where
    given, take the template's place.
    It calls tools where one of vLLM's parsers is named for the model:
    ``engine_args={"tool_call_parser": "hermes"}``; a server has its own.

    Args:
        model: hub name or folder; may be left out with ``url`` and ``engine``.
        blend_config: how to blend. Without one, chunks are computed behind the system prompt that
            this LLM uses: its own ``system_prompt``, or that of LlamaIndex's question prompt.
        engine_args: vLLM's engine arguments by their own names.
        engine: the shared engine itself; see ``from_engine``.
        url: of a server, in place of an engine in this process.
        api_key, timeout, max_retries: for the server; see ``CacheBlend.connect``.
        **fields: the fields below, and those of LlamaIndex's ``LLM``.

    Raises:
        ConfigError: the model is in use in this process with other settings.
        ServerError: no server answers at ``url``, and no ``model`` was named.
    """

    # an option with a wrong name is an error, not nothing
    model_config = ConfigDict(extra="forbid")

    model: str = Field(description="Hub name or folder of the model.")
    temperature: float = Field(default=0.0, ge=0, description="0 takes the likeliest token.")
    max_tokens: int = Field(default=256, gt=0, description="Most tokens of an answer.")
    stop: list[str] | None = Field(default=None, description="Texts that end an answer.")
    sampling: dict[str, Any] = Field(
        default_factory=dict,
        description="More of vLLM's sampling parameters, and CacheBlend's options of a call, by "
        "their own names.",
    )
    chat_template_kwargs: dict[str, Any] = Field(
        default_factory=dict,
        description="More arguments of the chat template, such as enable_thinking.",
    )
    is_chat_model: bool | None = Field(
        default=None, description="Whether to use chat messages; None: if there is a template."
    )
    engine: SharedEngine = Field(exclude=True, description="The engine, shared.")

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        blend_config: BlendConfig | None = None,
        engine_args: Mapping[str, Any] | None = None,
        engine: SharedEngine | None = None,
        url: str | None = None,
        api_key: str | None = None,
        timeout: float | None = None,
        max_retries: int | None = None,
        **fields: Unpack[LLMFields],
    ) -> None:
        if url is None and timeout is not None:
            raise ConfigError("timeout is for a server: name it as url, or leave timeout out")
        engine = SharedServer.chosen(
            url,
            engine,
            model,
            blend_config,
            engine_args,
            default=lambda: BlendConfig(
                system_prompt=fields.get("system_prompt"),
                likely_system_prompt=TEXT_QA_SYSTEM_PROMPT.content,
                chat_template_kwargs=fields.get("chat_template_kwargs", {}),
            ),
            api_key=api_key,
            timeout=timeout,
            max_retries=max_retries,
        )
        own: dict[str, Any] = {"model": str(model or engine.model), "engine": engine, **fields}
        super().__init__(**own)

    @classmethod
    def from_engine(cls, blend: CacheBlend, **fields: Unpack[LLMFields]) -> CacheBlendLLM:
        """An LLM over an engine that runs already, which it does not own but may close."""
        return cls(engine=SharedEngine.from_running(blend), **fields)

    @classmethod
    def class_name(cls) -> str:
        return "CacheBlendLLM"

    @property
    def blend(self) -> CacheBlend:
        """The engine underneath; starts it, or connects to the server."""
        return self.engine.blend()

    @property
    def metadata(self) -> LLMMetadata:
        blend = self.blend
        return LLMMetadata(
            context_window=blend.info.max_model_len,
            num_output=self.max_tokens,
            is_chat_model=self._is_chat(blend),
            is_function_calling_model=bool(blend.parsers.tool) and self._uses_template(blend),
            model_name=self.model,
        )

    def encode(self, text: str) -> list[int]:
        """The model's own token ids of ``text``, for ``Settings.tokenizer = llm.encode``: then
        LlamaIndex splits too long contexts by this model's tokens and not by another's.
        """
        return list(self.blend.tokenizer.encode(text, add_special_tokens=False))

    def close(self) -> None:
        """Stop the engine, or leave the server, for all objects that share it."""
        self.engine.close()

    def __enter__(self) -> CacheBlendLLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        # LlamaIndex would leave them out, and the copy would ask other prompts.
        for name in ("messages_to_prompt", "completion_to_prompt"):
            try:
                pickle.dumps(getattr(self, name))
            except (pickle.PicklingError, AttributeError, TypeError) as error:
                raise pickle.PicklingError(
                    f"{name} can't be pickled; use a function defined in a module instead of a "
                    "lambda or a nested one"
                ) from error
        return super().__getstate__()

    # ---- completions ---------------------------------------------------------------------------

    @llm_completion_callback()
    def complete(
        self, prompt: str, formatted: bool = False, **kwargs: Unpack[CallOptions]
    ) -> CompletionResponse:
        asked = self._ask_text(self.blend, prompt, formatted, kwargs)
        return _whole(asked, responses.completion)

    @llm_completion_callback()
    def stream_complete(
        self, prompt: str, formatted: bool = False, **kwargs: Unpack[CallOptions]
    ) -> CompletionResponseGen:
        asked = self._ask_text(self.blend, prompt, formatted, kwargs)
        return _pieces(asked, responses.completion)

    @llm_completion_callback()
    async def acomplete(
        self, prompt: str, formatted: bool = False, **kwargs: Unpack[CallOptions]
    ) -> CompletionResponse:
        asked = self._ask_text(await self.engine.ablend(), prompt, formatted, kwargs)
        return await _awhole(asked, responses.completion)

    @llm_completion_callback()
    async def astream_complete(
        self, prompt: str, formatted: bool = False, **kwargs: Unpack[CallOptions]
    ) -> CompletionResponseAsyncGen:
        asked = self._ask_text(await self.engine.ablend(), prompt, formatted, kwargs)
        return _apieces(asked, responses.completion)

    # ---- chat ----------------------------------------------------------------------------------

    @llm_chat_callback()
    def chat(self, messages: Sequence[ChatMessage], **kwargs: Unpack[CallOptions]) -> ChatResponse:
        return _whole(self._ask(self.blend, messages, kwargs), responses.chat)

    @llm_chat_callback()
    def stream_chat(
        self, messages: Sequence[ChatMessage], **kwargs: Unpack[CallOptions]
    ) -> ChatResponseGen:
        return _pieces(self._ask(self.blend, messages, kwargs), responses.chat)

    @llm_chat_callback()
    async def achat(
        self, messages: Sequence[ChatMessage], **kwargs: Unpack[CallOptions]
    ) -> ChatResponse:
        asked = self._ask(await self.engine.ablend(), messages, kwargs)
        return await _awhole(asked, responses.chat)

    @llm_chat_callback()
    async def astream_chat(
        self, messages: Sequence[ChatMessage], **kwargs: Unpack[CallOptions]
    ) -> ChatResponseAsyncGen:
        asked = self._ask(await self.engine.ablend(), messages, kwargs)
        return _apieces(asked, responses.chat)

    # ---- prompts and options -------------------------------------------------------------------

    def _is_chat(self, blend: CacheBlend) -> bool:
        if self.is_chat_model is not None:
            return self.is_chat_model
        return self._is_own_form or blend.takes_messages

    @property
    def _is_own_form(self) -> bool:
        """Whether the user's function makes prompts of messages."""
        return self.messages_to_prompt is not generic_messages_to_prompt

    def _uses_template(self, blend: CacheBlend) -> bool:
        return blend.takes_messages and not self._is_own_form

    def _ask_text(
        self, blend: CacheBlend, text: str, formatted: bool, call: Mapping[str, Any]
    ) -> _PreparedCall:
        """Text that is formatted already goes in as it is. Other text becomes, for a chat model,
        what a user says.
        """
        assert self.completion_to_prompt is not None
        own = self.completion_to_prompt is not default_completion_to_prompt
        if not formatted and not own and self._is_chat(blend):
            return self._ask(blend, [ChatMessage(content=text)], call)
        prompt = text if formatted else self.completion_to_prompt(text)
        return _PreparedCall(blend, prompt, self._options(call), not_found(prompt))

    def _ask(
        self, blend: CacheBlend, messages: Sequence[ChatMessage], call: Mapping[str, Any]
    ) -> _PreparedCall:
        if not messages:
            raise PromptError("there are no messages; pass at least one")
        assert self.messages_to_prompt is not None
        prompt: str | list[dict[str, Any]]
        if not self._uses_template(blend):
            prompt = text = self.messages_to_prompt(messages)
        else:
            prompt = to_messages(messages)
            text = "\n".join(message["content"] for message in prompt)
        return _PreparedCall(blend, prompt, self._options(call), not_found(text))

    def _options(self, call: Mapping[str, Any]) -> CallOptions:
        own: CallOptions = {"temperature": self.temperature, "max_tokens": self.max_tokens}
        if self.stop:
            own["stop"] = self.stop
        options = cast(CallOptions, {**own, **self.sampling, **call})
        given = (self.chat_template_kwargs, options.get("chat_template_kwargs"))
        options["chat_template_kwargs"] = template_arguments(*given)
        return options


def _whole(asked: _PreparedCall, make: _Make[_Response]) -> _Response:
    result = asked.blend.generate(asked.prompt, **asked.options)
    return make(responses.whole(result), asked.tail(result))


async def _awhole(asked: _PreparedCall, make: _Make[_Response]) -> _Response:
    result = await asked.blend.agenerate(asked.prompt, **asked.options)
    tail = await asyncio.to_thread(asked.tail, result)  # a server's tokenizer is asked over HTTP
    return make(responses.whole(result), tail)


def _pieces(asked: _PreparedCall, make: _Make[_Response]) -> Generator[_Response, None, None]:
    answer = PartialAnswer()
    with closing(asked.blend.stream(asked.prompt, **asked.options)) as stream:
        for _ in stream:
            answer = answer.then(stream.pieces[-1])
            yield make(answer, _tail(asked, stream))


async def _apieces(asked: _PreparedCall, make: _Make[_Response]) -> AsyncGenerator[_Response, None]:
    answer = PartialAnswer()
    async with aclosing(asked.blend.astream(asked.prompt, **asked.options)) as stream:
        async for _ in stream:
            answer = answer.then(stream.pieces[-1])
            # not on the event loop: a server is asked for the report
            tail = await asyncio.to_thread(_tail, asked, stream) if stream.has_ended else {}
            yield make(answer, tail)


def _tail(asked: _PreparedCall, stream: BlendStream | AsyncBlendStream) -> dict[str, Any]:
    """Counts and report, for the last piece."""
    return asked.tail(stream.result) if stream.has_ended else {}
