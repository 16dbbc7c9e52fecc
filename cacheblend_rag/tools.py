"""Tools that a model may call, and its calls as they come. Pure."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from cacheblend_rag.errors import ConfigError
from cacheblend_rag.options import TOOL_OPTIONS

_CHOICES = ("none", "auto", "required")
_FORM = '{"type": "function", "function": {"name": ..., "description": ..., "parameters": ...}}'


class ToolCall(NamedTuple):
    """A call that a model wrote.

    Attributes:
        id: names the call towards the message with its result.
        name: of the tool.
        arguments: JSON, as the model wrote it: it may be cut off, or no JSON at all.
    """

    id: str
    name: str
    arguments: str

    def kwargs(self) -> dict[str, Any] | None:
        """The arguments by name; None where they are no JSON object."""
        try:
            found = json.loads(self.arguments or "{}")
        except ValueError:
            return None
        return found if isinstance(found, dict) else None


class ToolCallPiece(NamedTuple):
    """What is new of a call: id and name come first, then arguments bit by bit.

    Attributes:
        number: which call of the answer this is, from 0.
    """

    number: int
    id: str | None
    name: str | None
    arguments: str


def joined(pieces: Iterable[ToolCallPiece]) -> tuple[ToolCall, ...]:
    """The calls that pieces make up, in the order of their numbers."""
    rows: dict[int, list[ToolCallPiece]] = {}
    for piece in pieces:
        rows.setdefault(piece.number, []).append(piece)
    return tuple(_one(rows[number]) for number in sorted(rows))


def _one(pieces: Sequence[ToolCallPiece]) -> ToolCall:
    return ToolCall(
        id=next((p.id for p in pieces if p.id), ""),
        name="".join(p.name for p in pieces if p.name),
        arguments="".join(p.arguments for p in pieces),
    )


@dataclass(frozen=True, kw_only=True)
class ToolUse:
    """Which tools a request offers.

    Attributes:
        tools: in OpenAI's form.
        choice: ``none``, ``auto``, ``required``, or a tool in OpenAI's form; None: vLLM's own,
            which is ``auto``.
        parallel: whether one answer may have several calls.
    """

    tools: tuple[Mapping[str, Any], ...]
    choice: str | Mapping[str, Any] | None = None
    parallel: bool = True

    @property
    def may_call(self) -> bool:
        """Whether the answer may be a call."""
        return self.choice != "none"

    def body(self) -> dict[str, Any]:
        """As a request of OpenAI's chat completions has it."""
        found: dict[str, Any] = {"tools": [dict(tool) for tool in self.tools]}
        if self.choice is not None:
            found["tool_choice"] = self.choice
        if not self.parallel:
            found["parallel_tool_calls"] = False
        return found


def tool_use(options: Mapping[str, Any]) -> ToolUse | None:
    """The tools that a call's options name; None where there are none. Later changes to them do not
    reach it.

    Raises:
        ConfigError: something in them is malformed, or they contradict one another.
    """
    given = {name: options[name] for name in TOOL_OPTIONS if options.get(name) is not None}
    tools = given.get("tools", ())
    if not isinstance(tools, Sequence) or isinstance(tools, str):
        raise ConfigError(f"tools is {tools!r}; it must be a list of tools, each {_FORM}")
    if not tools:
        if given.get("tool_choice", "none") != "none":
            raise ConfigError("tool_choice was given without tools; pass tools as well, or neither")
        return None
    names = [_name(tool, number) for number, tool in enumerate(tools, 1)]
    parallel = given.get("parallel_tool_calls", True)
    if not isinstance(parallel, bool):
        raise ConfigError(f"parallel_tool_calls is {parallel!r}; it must be True or False")
    return ToolUse(
        tools=tuple(copy.deepcopy(dict(tool)) for tool in tools),
        choice=_choice(given.get("tool_choice"), names),
        parallel=parallel,
    )


def choice_by_name(choice: object) -> object:
    """A choice in OpenAI's form, from a framework's: ``any`` is ``required``, and a text that is no
    choice names a tool.
    """
    if choice == "any":
        return "required"
    if isinstance(choice, str) and choice not in _CHOICES:
        return {"type": "function", "function": {"name": choice}}
    return choice


def _name(tool: object, number: int) -> str:
    function = tool.get("function") if isinstance(tool, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    is_function = isinstance(tool, Mapping) and tool.get("type", "function") == "function"
    if not is_function or not isinstance(name, str) or not name:
        raise ConfigError(f"tool {number} is {tool!r:.200}; it must have the form {_FORM}")
    return name


def _choice(choice: object, names: Sequence[str]) -> str | dict[str, Any] | None:
    if choice is None or choice in _CHOICES:
        return choice
    function = choice.get("function") if isinstance(choice, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str):
        raise ConfigError(
            f"tool_choice is {choice!r}; it must be one of {', '.join(_CHOICES)}, or a tool: "
            '{"type": "function", "function": {"name": ...}}'
        )
    if name not in names:
        raise ConfigError(f"tool_choice names {name!r}, and the tools are {', '.join(names)}")
    return {"type": "function", "function": {"name": name}}
