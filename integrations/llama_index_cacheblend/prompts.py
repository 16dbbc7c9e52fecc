"""LlamaIndex's messages as the prompts that our engine takes. No text is changed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from llama_index.core.base.llms.types import (
    ChatMessage,
    MessageRole,
    TextBlock,
    ThinkingBlock,
    ToolCallBlock,
)

from cacheblend_rag import PromptError

# names that chat templates know, for those that only LlamaIndex uses
_ROLES = {
    MessageRole.CHATBOT: "assistant",
    MessageRole.MODEL: "assistant",
    MessageRole.FUNCTION: "tool",
}


def to_messages(messages: Sequence[ChatMessage]) -> list[dict[str, Any]]:
    """For the model's chat template: roles, texts, reasoning, calls of tools, what these said.

    Raises:
        PromptError: a message holds something else, or calls that another LLM wrote in its own way.
    """
    return list(map(_message, messages))


def _message(message: ChatMessage) -> dict[str, Any]:
    found: dict[str, Any] = {"role": _ROLES.get(message.role, message.role.value)}
    found["content"] = _text(message)
    thoughts = [b.content for b in message.blocks if isinstance(b, ThinkingBlock) and b.content]
    if thoughts:
        found["reasoning"] = "\n".join(thoughts)
    if calls := [_call(b) for b in message.blocks if isinstance(b, ToolCallBlock)]:
        found["tool_calls"] = calls
    elif message.additional_kwargs.get("tool_calls"):
        raise PromptError(
            "a message has tool calls in additional_kwargs, in the form of another LLM; put them "
            "into its blocks, as ToolCallBlock"
        )
    if found["role"] == "tool" and "tool_call_id" in message.additional_kwargs:
        found["tool_call_id"] = message.additional_kwargs["tool_call_id"]
    return found


def _call(block: ToolCallBlock) -> dict[str, Any]:
    given = block.tool_kwargs
    arguments = given if isinstance(given, str) else json.dumps(given, ensure_ascii=False)
    function = {"name": block.tool_name, "arguments": arguments}
    return {"type": "function", "id": block.tool_call_id or "", "function": function}


def _text(message: ChatMessage) -> str:
    for block in message.blocks:
        if not isinstance(block, TextBlock | ThinkingBlock | ToolCallBlock):
            raise PromptError(
                f"a message has a {type(block).__name__}, and only text can be served here; "
                "for images or audio use another LLM"
            )
    return message.content or ""
