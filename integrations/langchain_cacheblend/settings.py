"""What the chat model and the LLM have in common: their fields, and how they reach the engine."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self, TypeVar, Unpack, cast

from pydantic import BaseModel, ConfigDict, Field, SecretStr

from cacheblend_rag import AsyncBlendStream, BlendConfig, BlendResult, CacheBlend, ConfigError
from cacheblend_rag.client import SharedServer
from cacheblend_rag.config import template_arguments
from cacheblend_rag.options import CallOptions
from cacheblend_rag.shared import SharedEngine
from langchain_cacheblend.fields import ModelFields
from langchain_cacheblend.tools import tool_options

Made = TypeVar("Made")


class EngineSettings(BaseModel):
    """The fields of every model here, declared once.

    The engine starts when first needed, and is shared by all objects that name the same model. With
    ``url`` it is that of a server, ``cacheblend serve``, and nothing starts here.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True)

    model: str
    """Hub name or folder."""
    temperature: float = Field(default=0.0, ge=0)
    """0 takes the likeliest token."""
    max_tokens: int | None = Field(default=256, gt=0)
    """Most tokens of an answer; None: all there is room for. ``max_completion_tokens`` is the
    same."""
    stop: list[str] | None = None
    """Texts that end an answer."""
    sampling: dict[str, Any] = Field(default_factory=dict)
    """More of vLLM's sampling parameters and CacheBlend's options of a call, by their own names."""
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """More arguments of the chat template, such as ``enable_thinking``."""
    timeout: float | None = None
    """Seconds an answer may take, looked at whenever a token comes; None: any time."""
    streaming: bool = False
    """Whether ``invoke`` streams inside, for callbacks that want tokens."""
    url: str | None = None
    """Of a server, in place of an engine in this process."""
    max_retries: int | None = Field(default=None, ge=0)
    """How often a call that the server did not take is tried again; None: twice. Refused without
    ``url``."""
    api_key: SecretStr | None = None
    """For the server. Refused without ``url``: nothing is sent anywhere."""
    engine: SharedEngine = Field(exclude=True, repr=False)
    """The engine, shared."""

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        blend_config: BlendConfig | None = None,
        engine_args: Mapping[str, Any] | None = None,
        engine: SharedEngine | None = None,
        **named: Unpack[ModelFields],
    ) -> None:
        fields = _fields(named)
        engine = SharedServer.chosen(
            fields.get("url"),
            engine,
            model,
            blend_config,
            engine_args,
            default=lambda: BlendConfig(
                chat_template_kwargs=fields.get("chat_template_kwargs", {})
            ),
            api_key=_revealed(fields.get("api_key")),
            timeout=fields.get("timeout"),
            max_retries=fields.get("max_retries"),
        )
        super().__init__(**{"model": str(model or engine.model), "engine": engine, **fields})

    @classmethod
    def from_engine(cls, blend: CacheBlend, **fields: Unpack[ModelFields]) -> Self:
        """One over an engine that runs already, which it does not own but may close."""
        return cls(engine=SharedEngine.from_running(blend), **fields)

    @property
    def blend(self) -> CacheBlend:
        """The engine underneath; starts it, or connects to the server."""
        return self.engine.blend()

    def close(self) -> None:
        """Stop the engine, or leave the server, for all objects that share it."""
        self.engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def _identifying_params(self) -> Mapping[str, Any]:
        """What answers depend on: LangChain's caches key by it."""
        return {
            "model": self.model,
            "temperature": self.temperature,
            "max_tokens": self.max_tokens,
            "stop": self.stop,
            "sampling": self.sampling,
            "chat_template_kwargs": self.chat_template_kwargs,
            "config": self.engine.config.digest(),  # this goes to tracers and into caches
        }

    def options(self, stop: list[str] | None, call: Mapping[str, Any]) -> CallOptions:
        """The options of one call.

        Raises:
            ConfigError: what only another engine, or nothing here, can do.
        """
        call = _by_our_names(call)
        for name, why in _REFUSED.items():
            if call.get(name) is not None:
                raise ConfigError(f"{name} can't be set for a call: {why}")
            call.pop(name, None)
        own: CallOptions = {"temperature": self.temperature, "max_tokens": self.max_tokens}
        if self.stop:
            own["stop"] = self.stop
        options = cast(CallOptions, {**own, **self.sampling, **tool_options(call)})
        if stop is not None:  # LangChain passes a call's apart from its other options
            options.pop("stop", None)
        if stop:
            options["stop"] = stop
        given = (self.chat_template_kwargs, options.get("chat_template_kwargs"))
        options["chat_template_kwargs"] = template_arguments(*given)
        return options

    def deadline(self) -> Deadline:
        """Starts the clock of one answer."""
        return Deadline(self.timeout)


_OLD = "it is what OpenAI's API had before tools; use bind_tools()"
_REFUSED = {
    "model": "another model is another engine; make another object",
    "functions": _OLD,
    "function_call": _OLD,
}


def _revealed(key: SecretStr | str | None) -> str | None:
    return key.get_secret_value() if isinstance(key, SecretStr) else key


# with every stream comes its usage
_USAGE = {"stream_usage": True, "stream_options": {"include_usage": True}}


def _fields(given: Mapping[str, Any]) -> dict[str, Any]:
    """An object's settings; of ``extra_body`` what is no field of ours is sampling."""
    found = _renamed(given)
    extra = dict(found.pop("extra_body", None) or {})
    if "chat_template_kwargs" in extra:
        found.setdefault("chat_template_kwargs", extra.pop("chat_template_kwargs"))
    if extra:
        found["sampling"] = {**extra, **(found.get("sampling") or {})}
    return found


def _by_our_names(call: Mapping[str, Any]) -> dict[str, Any]:
    """A call's options; ``extra_body`` holds more of them."""
    found = _renamed({**(call.get("extra_body") or {}), **call})
    for name in ("extra_body", "stream"):  # how it is asked for is no option of the engine
        found.pop(name, None)
    return found


def _renamed(given: Mapping[str, Any]) -> dict[str, Any]:
    """LangChain's and OpenAI's names for the same things as ours.

    Raises:
        ConfigError: one that says something else than ours, or that can't be done.
    """
    found = dict(given)
    if "max_completion_tokens" in found:
        tokens = found.pop("max_completion_tokens")
        if found.setdefault("max_tokens", tokens) != tokens:
            raise ConfigError(
                "max_tokens and max_completion_tokens are the same thing, and were given with two "
                "values; give one of them"
            )
    for name, has in _USAGE.items():
        if found.pop(name, None) not in (None, has):
            raise ConfigError(
                f"{name} can only be {has!r}: a stream's last piece has its usage. Leave {name} out"
            )
    return found


async def off_the_loop(stream: AsyncBlendStream, make: Callable[[], Made]) -> Made:
    """What ``make`` makes of a stream's newest piece. At its end a server is asked for the report,
    and everything else on the event loop would wait for that.
    """
    return await asyncio.to_thread(make) if stream.has_ended else make()


class Deadline:
    """Raises TimeoutError once an answer has taken too long."""

    def __init__(self, seconds: float | None) -> None:
        self._seconds, self._start = seconds, time.monotonic()

    def check(self) -> None:
        """Called whenever a token came."""
        if self._seconds is not None and time.monotonic() - self._start > self._seconds:
            raise TimeoutError(
                f"the answer took longer than timeout={self._seconds} s; raise it, or lower "
                "max_tokens"
            )


def usage(result: BlendResult) -> dict[str, Any]:
    """Token counts by LangChain's names. ``cache_read``: prompt tokens that were not computed."""
    report, answer = result.report, len(result.token_ids)
    return {
        "input_tokens": report.tokens_total,
        "output_tokens": answer,
        "total_tokens": report.tokens_total + answer,
        "input_token_details": {
            "cache_read": report.tokens_reused + report.tokens_prefix_cached,
        },
    }


def details(
    result: BlendResult, model: str, tokenizer: Any, not_found: list[str] | None
) -> dict[str, Any]:
    """How an answer came about: the report, why it ended, log-probabilities if asked for.

    Args:
        result: the answer.
        model, tokenizer: its model.
        not_found: retrieved documents that are not in the prompt, if that is known.
    """
    report = result.report.to_dict()
    if not_found is not None:
        report["retrieved_not_found"] = not_found
    found: dict[str, Any] = {
        "model_name": model,
        "model_provider": "cacheblend",
        "finish_reason": result.finish_reason,
        "stop_reason": result.stop_reason,
        "cacheblend": report,
    }
    if result.logprobs is not None:
        rows = zip(result.token_ids, result.logprobs, strict=True)
        found["logprobs"] = {"content": [_logprob(t, row, tokenizer) for t, row in rows]}
    return found


def _logprob(token: int, row: Mapping[int, float], tokenizer: Any) -> dict[str, Any]:
    top = [
        {"token": tokenizer.decode([other]), "logprob": value}
        for other, value in sorted(row.items(), key=lambda item: -item[1])
    ]
    return {"token": tokenizer.decode([token]), "logprob": row[token], "top_logprobs": top}
