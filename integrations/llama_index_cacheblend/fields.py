"""The fields of ``CacheBlendLLM`` as types: an IDE lists them, a type checker knows them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypedDict

from llama_index.core.base.llms.types import ChatMessage
from llama_index.core.callbacks import CallbackManager
from llama_index.core.prompts import BasePromptTemplate
from llama_index.core.types import BaseOutputParser, PydanticProgramMode

from cacheblend_rag.options import CallOptions


class LLMFields(TypedDict, total=False):
    """What ``CacheBlendLLM`` takes by name besides model and engine; it says what they are."""

    temperature: float
    max_tokens: int
    stop: list[str] | None
    sampling: CallOptions
    chat_template_kwargs: dict[str, Any]
    is_chat_model: bool | None
    # LlamaIndex's own
    callback_manager: CallbackManager
    completion_to_prompt: Callable[[str], str]
    messages_to_prompt: Callable[[Sequence[ChatMessage]], str]
    output_parser: BaseOutputParser | None
    pydantic_program_mode: PydanticProgramMode
    query_wrapper_prompt: BasePromptTemplate | None
    rate_limiter: Any
    system_prompt: str | None
