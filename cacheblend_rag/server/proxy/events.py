"""Streams of server-sent events, cut between two events only."""

from __future__ import annotations

import json
import re
from typing import Any

_END = re.compile(rb"\r\n\r\n|\n\n|\r\r")
_MOST = 1 << 20  # bytes of an event that are held; a longer one is handed on in parts


class WholeEvents:
    """Hands on whole events. So a stream that breaks off can go on with one that says so: the half
    one before it was never sent.
    """

    def __init__(self) -> None:
        self._held = bytearray()

    def take(self, data: bytes) -> bytes:
        """What can be sent after ``data`` has come."""
        # An end may have begun with what is held: two bytes and more are looked at again.
        searched = max(0, len(self._held) - 3)
        self._held += data
        ends = [found.end() for found in _END.finditer(self._held, searched)]
        cut = ends[-1] if ends else len(self._held) if len(self._held) > _MOST else 0
        ready = bytes(self._held[:cut])
        del self._held[:cut]
        return ready

    def rest(self) -> bytes:
        """What is left when the stream has ended as it should."""
        ready = bytes(self._held)
        self._held.clear()
        return ready


def error_event(body: dict[str, Any]) -> bytes:
    """An event that OpenAI's clients raise as an error."""
    return b"data: " + json.dumps(body).encode() + b"\n\n"
