"""What a model that calls tools might write, for fake engines whose answers real parsers read."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from fake_engine import FakeEngine

from cacheblend_rag import CacheBlend
from cacheblend_rag.engine import EngineRequest

NAMES = {"tool_call_parser": "hermes", "reasoning_parser": "qwen3"}
TIMETABLE: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "timetable",
        "description": "Departures from a pier.",
        "parameters": {
            "type": "object",
            "properties": {"pier": {"type": "string"}, "day": {"type": "integer"}},
            "required": ["pier"],
        },
    },
}
# with the mark that Qwen3's template puts between what it thinks and what it says
THOUGHT = "<think>\nThe user wants a time.\n</think>\n\n"


def call(name: str = "timetable", **arguments: Any) -> str:
    """A call as Hermes and Qwen write it."""
    body = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)
    return f"<tool_call>\n{body}\n</tool_call>"


def says(blend: CacheBlend, text: str) -> None:
    """From here on the fake engine below writes ``text``, a token at a time."""
    script(blend, lambda prompt: text)


def script(blend: CacheBlend, answer: Callable[[str], str | None]) -> None:
    """From here on the fake engine below writes what ``answer`` makes of a prompt's text."""
    engine: Any = blend.engine
    assert isinstance(engine, FakeEngine)

    def of(request: EngineRequest) -> str | None:
        return answer(str(engine.tokenizer.decode(list(request.token_ids))))

    engine.script = of


def by_words(answers: Mapping[str, str]) -> Callable[[str], str | None]:
    """The answer whose words stand in the prompt; the first that fits."""
    return lambda prompt: next((told for words, told in answers.items() if words in prompt), None)
