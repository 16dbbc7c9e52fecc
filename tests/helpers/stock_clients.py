"""OpenAI classes of frameworks, as they are: one greedy answer of 8 tokens of each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

MODULES = {
    "LangChain": "langchain_openai",
    "LlamaIndex": "llama_index.llms.openai_like",
    "Haystack": "haystack.components.generators.chat",
}
_COMMON: dict[str, Any] = {"model": "m", "temperature": 0.0, "max_tokens": 8}
Answer = tuple[str, int]  # the text, and how many of the prompt's tokens were cached


def _langchain(url: str, prompt: str, extra: Mapping[str, Any]) -> Answer:
    from langchain_openai import ChatOpenAI

    chat = ChatOpenAI(base_url=url, api_key="unused", extra_body=dict(extra), **_COMMON)
    message = chat.invoke(prompt)
    details = (message.usage_metadata or {}).get("input_token_details", {})
    return str(message.content), int(details.get("cache_read") or 0)


def _llama_index(url: str, prompt: str, extra: Mapping[str, Any]) -> Answer:
    from llama_index.core.llms import ChatMessage
    from llama_index.llms.openai_like import OpenAILike

    more = {"extra_body": dict(extra)}
    llm = OpenAILike(
        api_base=url, api_key="unused", is_chat_model=True, additional_kwargs=more, **_COMMON
    )
    found = llm.chat([ChatMessage(role="user", content=prompt)])
    details: Any = found.raw.usage.prompt_tokens_details
    return str(found.message.content), int((details and details.cached_tokens) or 0)


def _haystack(url: str, prompt: str, extra: Mapping[str, Any]) -> Answer:
    from haystack.components.generators.chat import OpenAIChatGenerator
    from haystack.dataclasses import ChatMessage
    from haystack.utils import Secret

    settings = {name: value for name, value in _COMMON.items() if name != "model"}
    generator = OpenAIChatGenerator(
        model="m",
        api_base_url=url,
        api_key=Secret.from_token("unused"),
        generation_kwargs={**settings, "extra_body": dict(extra)},
    )
    [reply] = generator.run([ChatMessage.from_user(prompt)])["replies"]
    details = reply.meta["usage"].get("prompt_tokens_details") or {}
    return str(reply.text), int(details.get("cached_tokens") or 0)


ASK: dict[str, Callable[[str, str, Mapping[str, Any]], Answer]] = {
    "LangChain": _langchain,
    "LlamaIndex": _llama_index,
    "Haystack": _haystack,
}
