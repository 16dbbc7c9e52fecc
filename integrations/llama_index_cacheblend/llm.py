"""``CacheBlendLLM``: LlamaIndex's LLM over an embedded vLLM that reuses the KV of chunks."""

from __future__ import annotations

import pickle
from collections.abc import AsyncGenerator, Callable, Generator, Mapping, Sequence
from contextlib import aclosing, closing
from typing import Any, TypeVar

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
from llama_index.core.bridge.pydantic import Field
from llama_index.core.llms.callbacks import llm_chat_callback, llm_completion_callback
from llama_index.core.llms.llm import LLM, default_completion_to_prompt
from llama_index.core.prompts.chat_prompts import TEXT_QA_SYSTEM_PROMPT

from cacheblend_rag import AsyncBlendStream, BlendConfig, BlendResult, BlendStream, CacheBlend
from cacheblend_rag.errors import PromptError
from cacheblend_rag.prompt import Prompt
from cacheblend_rag.shared import SharedEngine
from llama_index_cacheblend import responses
from llama_index_cacheblend.prompts import to_messages

_Response = TypeVar("_Response", CompletionResponse, ChatResponse)
_Make = Callable[[str, str | None, Mapping[str, Any]], _Response]


class CacheBlendLLM(LLM):
    """A LlamaIndex LLM whose prompts start sooner: KV of chunks that were ingested is reused.

    The engine starts when first needed, and is shared by all objects that name the same model.
    Prompts are what they are with any other LLM: the model's chat template is applied to chat
    messages, text goes in as it is. ``messages_to_prompt`` and ``completion_to_prompt``, where
    given, take the template's place.

    Args:
        model: hub name or folder; left out only with ``engine``.
        blend_config: how to blend. Without one, chunks are computed behind the system prompt that
            this LLM uses: its own ``system_prompt``, or that of LlamaIndex's question prompt.
        engine_args: vLLM's engine arguments by their own names.
        engine: the shared engine itself; see ``from_engine``.
        **fields: the fields below, and those of LlamaIndex's ``LLM``.

    Raises:
        ConfigError: the model is in use in this process with other settings.
    """

    model: str = Field(description="Hub name or folder of the model.")
    temperature: float = Field(default=0.0, ge=0, description="0 takes the likeliest token.")
    max_tokens: int = Field(default=256, gt=0, description="Most tokens of an answer.")
    stop: list[str] | None = Field(default=None, description="Texts that end an answer.")
    sampling: dict[str, Any] = Field(
        default_factory=dict,
        description="More of vLLM's sampling parameters, and CacheBlend's options of a call, by "
        "their own names.",
    )
    is_chat_model: bool | None = Field(
        default=None, description="Whether to use chat messages; None: if there is a template."
    )
    engine: SharedEngine = Field(exclude=True, description="The engine, shared.")

    def __init__(
        self,
        model: str | None = None,
        *,
        blend_config: BlendConfig | None = None,
        engine_args: Mapping[str, Any] | None = None,
        engine: SharedEngine | None = None,
        **fields: Any,
    ) -> None:
        if engine is None:
            if model is None:
                raise ValueError("name a model, or pass a running engine to from_engine()")
            system_prompt = fields.get("system_prompt") or TEXT_QA_SYSTEM_PROMPT.content
            engine = SharedEngine.of(
                str(model),
                blend_config,
                engine_args,
                default=lambda: BlendConfig(system_prompt=system_prompt),
            )
        super().__init__(**{"model": str(model or engine.model), "engine": engine, **fields})

    @classmethod
    def from_engine(cls, blend: CacheBlend, **fields: Any) -> CacheBlendLLM:
        """An LLM over an engine that runs already, which it does not own but may close."""
        return cls(engine=SharedEngine.around(blend), **fields)

    @classmethod
    def class_name(cls) -> str:
        return "CacheBlendLLM"

    @property
    def blend(self) -> CacheBlend:
        """The engine underneath; starts it."""
        return self.engine.blend()

    @property
    def metadata(self) -> LLMMetadata:
        blend = self.blend
        return LLMMetadata(
            context_window=blend.info.max_model_len,
            num_output=self.max_tokens,
            is_chat_model=self._is_chat(blend),
            is_function_calling_model=False,
            model_name=self.model,
        )

    def encode(self, text: str) -> list[int]:
        """The model's own token ids of ``text``, for ``Settings.tokenizer = llm.encode``: then
        LlamaIndex splits too long contexts by this model's tokens and not by another's.
        """
        return list(self.blend.tokenizer.encode(text, add_special_tokens=False))

    def close(self) -> None:
        """Stop the engine, for all objects that share it."""
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
    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        blend = self.blend
        asked = self._from_text(blend, prompt, formatted)
        return _whole(blend, blend.generate(asked, **self._options(kwargs)), responses.completion)

    @llm_completion_callback()
    def stream_complete(
        self, prompt: str, formatted: bool = False, **kwargs: Any
    ) -> CompletionResponseGen:
        blend = self.blend
        asked = self._from_text(blend, prompt, formatted)
        stream = blend.stream(asked, **self._options(kwargs))
        return _pieces(blend, stream, responses.completion)

    @llm_completion_callback()
    async def acomplete(
        self, prompt: str, formatted: bool = False, **kwargs: Any
    ) -> CompletionResponse:
        blend = await self.engine.ablend()
        asked = self._from_text(blend, prompt, formatted)
        result = await blend.agenerate(asked, **self._options(kwargs))
        return _whole(blend, result, responses.completion)

    @llm_completion_callback()
    async def astream_complete(
        self, prompt: str, formatted: bool = False, **kwargs: Any
    ) -> CompletionResponseAsyncGen:
        blend = await self.engine.ablend()
        asked = self._from_text(blend, prompt, formatted)
        stream = blend.astream(asked, **self._options(kwargs))
        return _apieces(blend, stream, responses.completion)

    # ---- chat ----------------------------------------------------------------------------------

    @llm_chat_callback()
    def chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        blend = self.blend
        asked = self._from_messages(blend, messages)
        return _whole(blend, blend.generate(asked, **self._options(kwargs)), responses.chat)

    @llm_chat_callback()
    def stream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseGen:
        blend = self.blend
        asked = self._from_messages(blend, messages)
        return _pieces(blend, blend.stream(asked, **self._options(kwargs)), responses.chat)

    @llm_chat_callback()
    async def achat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        blend = await self.engine.ablend()
        asked = self._from_messages(blend, messages)
        result = await blend.agenerate(asked, **self._options(kwargs))
        return _whole(blend, result, responses.chat)

    @llm_chat_callback()
    async def astream_chat(
        self, messages: Sequence[ChatMessage], **kwargs: Any
    ) -> ChatResponseAsyncGen:
        blend = await self.engine.ablend()
        asked = self._from_messages(blend, messages)
        return _apieces(blend, blend.astream(asked, **self._options(kwargs)), responses.chat)

    # ---- prompts and options -------------------------------------------------------------------

    def _is_chat(self, blend: CacheBlend) -> bool:
        if self.is_chat_model is not None:
            return self.is_chat_model
        own = self.messages_to_prompt is not generic_messages_to_prompt
        return own or bool(getattr(blend.tokenizer, "chat_template", None))

    def _from_text(self, blend: CacheBlend, prompt: str, formatted: bool) -> Prompt:
        """Text that is formatted already goes in as it is. Other text becomes, for a chat model,
        what a user says.
        """
        if formatted:
            return prompt
        assert self.completion_to_prompt is not None
        if self.completion_to_prompt is default_completion_to_prompt and self._is_chat(blend):
            return self._from_messages(blend, [ChatMessage(content=prompt)])
        return self.completion_to_prompt(prompt)

    def _from_messages(self, blend: CacheBlend, messages: Sequence[ChatMessage]) -> Prompt:
        if not messages:
            raise PromptError("there are no messages; pass at least one")
        own = self.messages_to_prompt is not generic_messages_to_prompt
        if own or not getattr(blend.tokenizer, "chat_template", None):
            assert self.messages_to_prompt is not None
            return self.messages_to_prompt(messages)
        return to_messages(messages)

    def _options(self, call: Mapping[str, Any]) -> dict[str, Any]:
        own: dict[str, Any] = {"temperature": self.temperature, "max_tokens": self.max_tokens}
        if self.stop:
            own["stop"] = self.stop
        return {**own, **self.sampling, **call}


def _whole(blend: CacheBlend, result: BlendResult, make: _Make[_Response]) -> _Response:
    return make(result.text, None, responses.tail(result, blend.tokenizer))


def _pieces(
    blend: CacheBlend, stream: BlendStream, make: _Make[_Response]
) -> Generator[_Response, None, None]:
    text = ""
    with closing(stream):
        for delta in stream:
            text += delta
            yield make(text, delta, _tail(blend, stream))


async def _apieces(
    blend: CacheBlend, stream: AsyncBlendStream, make: _Make[_Response]
) -> AsyncGenerator[_Response, None]:
    text = ""
    async with aclosing(stream):
        async for delta in stream:
            text += delta
            yield make(text, delta, _tail(blend, stream))


def _tail(blend: CacheBlend, stream: BlendStream | AsyncBlendStream) -> dict[str, Any]:
    if stream.pieces[-1].finish_reason is None:
        return {}
    return responses.tail(stream.result, blend.tokenizer)
