"""JSON of large bodies, piece by piece: ``json`` lets no other thread in while it reads or writes,
so the event loop would stand still for a second.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

_SMALL = 1 << 18  # bytes; such a body takes a millisecond or two
_ROWS = 1000  # of a list, which take a millisecond or two to write
_DEPTH = 2  # of lists and objects that are taken apart: {"chunks": [...]}
_SPACE = re.compile(r"[ \t\n\r]*")
_DECODER = json.JSONDecoder()


def loads(raw: bytes) -> Any:
    """As ``json.loads``.

    Raises:
        ValueError: it is not JSON.
    """
    if len(raw) < _SMALL:
        return json.loads(raw)
    text = raw.decode(json.detect_encoding(raw), "surrogatepass")
    found, at = _value(text, _behind(text, 0), _DEPTH)
    if at != len(text):
        raise json.JSONDecodeError("Extra data", text, at)
    return found


def dumps(values: Iterable[Any]) -> str:
    """As ``json.dumps`` of a list."""
    return f"[{', '.join(map(json.dumps, values))}]"


async def written(body: Mapping[str, Any]) -> bytes:
    """An answer's body, written on the event loop, on which others have turns between pieces."""
    fields = list[str]()
    for name, value in body.items():
        text = await _list_written(value) if isinstance(value, list) else _json(value)
        fields.append(f"{_json(name)}:{text}")
    return f"{{{','.join(fields)}}}".encode()


async def _list_written(values: list[Any]) -> str:
    rows = list[str]()
    for start in range(0, len(values), _ROWS):
        if start:
            await asyncio.sleep(0)
        rows.append(_json(values[start : start + _ROWS])[1:-1])
    return f"[{','.join(rows)}]"


def _json(value: Any) -> str:
    """As starlette writes answers."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def _value(text: str, at: int, depth: int) -> tuple[Any, int]:
    """The value that begins there, and where what comes behind it begins."""
    first = text[at : at + 1]
    if depth and first == "[":
        return _list(text, at, depth)
    if depth and first == "{":
        return _object(text, at, depth)
    found, at = _DECODER.raw_decode(text, at)
    return found, _behind(text, at)


def _list(text: str, at: int, depth: int) -> tuple[list[Any], int]:
    found = list[Any]()
    at = _behind(text, at + 1)
    if text[at : at + 1] == "]":
        return found, _behind(text, at + 1)
    while True:
        value, at = _value(text, at, depth - 1)
        found.append(value)
        if text[at : at + 1] == "]":
            return found, _behind(text, at + 1)
        at = _expect(",", text, at)


def _object(text: str, at: int, depth: int) -> tuple[dict[str, Any], int]:
    found = dict[str, Any]()
    at = _behind(text, at + 1)
    if text[at : at + 1] == "}":
        return found, _behind(text, at + 1)
    while True:
        if text[at : at + 1] != '"':
            raise json.JSONDecodeError(
                "Expecting property name enclosed in double quotes", text, at
            )
        name, at = _value(text, at, 0)
        found[name], at = _value(text, _expect(":", text, at), depth - 1)
        if text[at : at + 1] == "}":
            return found, _behind(text, at + 1)
        at = _expect(",", text, at)


def _expect(mark: str, text: str, at: int) -> int:
    if text[at : at + 1] != mark:
        raise json.JSONDecodeError(f"Expecting {mark!r} delimiter", text, at)
    return _behind(text, at + 1)


def _behind(text: str, at: int) -> int:
    space = _SPACE.match(text, at)
    assert space is not None  # it matches nothing, too
    return space.end()
