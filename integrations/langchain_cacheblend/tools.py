"""LangChain's tools, calls and reasoning in OpenAI's form, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from langchain_core.messages import (
    AIMessage,
    BaseMessage,
    InvalidToolCall,
    ToolCall,
    ToolCallChunk,
    convert_to_openai_messages,
)
from langchain_core.messages.tool import invalid_tool_call, tool_call, tool_call_chunk
from langchain_core.utils.function_calling import convert_to_openai_tool

from cacheblend_rag import ConfigError
from cacheblend_rag.prompt import Prompt
from cacheblend_rag.tools import ToolCall as WrittenCall
from cacheblend_rag.tools import ToolCallPiece, choice_by_name

REASONING = "reasoning_content"  # of additional_kwargs: LangChain makes a content block of it
# blocks of LangChain's own, whose content is in tool_calls, or is reasoning
_APART = ("tool_call", "tool_call_chunk", "invalid_tool_call", "reasoning")


def openai_tools(tools: Sequence[Any], *, strict: bool | None = None) -> list[dict[str, Any]]:
    """Tools in OpenAI's form.

    Raises:
        ConfigError: something that LangChain takes for no tool.
    """
    try:
        return [convert_to_openai_tool(tool, strict=strict) for tool in tools]
    except (TypeError, ValueError, KeyError) as error:
        raise ConfigError(f"something in tools is no tool: {error}") from error


def tool_options(call: Mapping[str, Any]) -> dict[str, Any]:
    """A call's options, with tools and choice in OpenAI's form.

    Raises:
        ConfigError: a choice of a tool that is not there.
    """
    options = dict(call)
    if options.get("tools") is not None:
        options["tools"] = openai_tools(options["tools"])
    choice = options.pop("tool_choice", None)
    if isinstance(choice, bool):
        choice = "required" if choice else "none"
    if choice is not None:
        options["tool_choice"] = choice_by_name(choice)
    return options


def to_prompt(messages: Sequence[BaseMessage]) -> Prompt:
    """Messages as chat templates take them: calls, what tools said, and reasoning included."""
    found = list[dict[str, Any]]()
    for message in messages:
        plain = convert_to_openai_messages([_without_blocks(message)])
        assert isinstance(plain, list)
        if thought := _thought_of(message):
            plain[-1]["reasoning"] = thought
        found += plain
    return found


def _without_blocks(message: BaseMessage) -> BaseMessage:
    """A message whose content has no block for what OpenAI's form has apart."""
    if not isinstance(message, AIMessage) or isinstance(message.content, str):
        return message
    kept = [b for b in message.content if isinstance(b, str) or b.get("type") not in _APART]
    return message.model_copy(update={"content": kept or ""})


def _thought_of(message: BaseMessage) -> str:
    """What an answer of before thought, wherever LangChain has put it."""
    if not isinstance(message, AIMessage):
        return ""
    apart = message.additional_kwargs.get(REASONING)
    if isinstance(apart, str):
        return apart
    blocks = [b for b in message.content if isinstance(b, dict) and b.get("type") == "reasoning"]
    return "".join(str(block.get("reasoning") or "") for block in blocks)


def of_message(calls: Sequence[WrittenCall], reasoning: str) -> dict[str, Any]:
    """What a message carries beside its text. A call whose arguments are no JSON is invalid."""
    good, bad = list[ToolCall](), list[InvalidToolCall]()
    for call in calls:
        if (kwargs := call.kwargs()) is None:
            why = "the arguments are no JSON object"
            bad.append(
                invalid_tool_call(name=call.name, args=call.arguments, id=call.id, error=why)
            )
        else:
            good.append(tool_call(name=call.name, args=kwargs, id=call.id))
    return {"tool_calls": good, "invalid_tool_calls": bad, **_thought(reasoning)}


def of_chunk(calls: Sequence[ToolCallPiece], reasoning: str) -> dict[str, Any]:
    """The same for a piece of a message."""
    return {"tool_call_chunks": list(map(_chunk, calls)), **_thought(reasoning)}


def _chunk(call: ToolCallPiece) -> ToolCallChunk:
    return tool_call_chunk(name=call.name, args=call.arguments, id=call.id, index=call.number)


def _thought(reasoning: str) -> dict[str, Any]:
    return {"additional_kwargs": {REASONING: reasoning}} if reasoning else {}
