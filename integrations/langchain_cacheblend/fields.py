"""The fields of the models here as types: an IDE lists them, a type checker knows them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, TypedDict

from langchain_core.caches import BaseCache
from langchain_core.callbacks import Callbacks
from langchain_core.language_models import ModelProfile
from langchain_core.rate_limiters import BaseRateLimiter
from pydantic import SecretStr

from cacheblend_rag import BlendConfig
from cacheblend_rag.options import CallOptions
from cacheblend_rag.shared import SharedEngine


class ModelFields(TypedDict, total=False):
    """What the models take by name besides model and engine; ``EngineSettings`` explains them."""

    temperature: float
    max_tokens: int | None
    stop: list[str] | None
    sampling: CallOptions
    chat_template_kwargs: dict[str, Any]
    timeout: float | None
    streaming: bool
    url: str | None
    max_retries: int | None
    api_key: SecretStr | str | None
    # OpenAI's names for the same things
    max_completion_tokens: int | None
    extra_body: dict[str, Any] | None
    stream_usage: Literal[True] | None
    stream_options: dict[str, Any] | None
    # LangChain's own
    cache: BaseCache | bool | None
    callbacks: Callbacks
    custom_get_token_ids: Callable[[str], list[int]] | None
    metadata: dict[str, Any] | None
    name: str | None
    tags: list[str] | None
    verbose: bool
    # and those that only its chat models have
    disable_streaming: bool | Literal["tool_calling"]
    output_version: str | None
    profile: ModelProfile | None
    rate_limiter: BaseRateLimiter | None


class ModelArguments(ModelFields, total=False):
    """All that the models take by name."""

    blend_config: BlendConfig | None
    engine_args: Mapping[str, Any] | None
    engine: SharedEngine | None
