"""A server's tokenizer, as far as frameworks use one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

from cacheblend_rag.client.http import Connection
from cacheblend_rag.prompt import checked

_KEPT = 65_536  # decoded texts


class RemoteTokenizer:
    """Encodes and decodes with the server's own tokenizer: a call each, but for what it knows."""

    def __init__(self, connection: Connection, encode: Callable[[str], Sequence[int]]) -> None:
        self._connection, self._encode = connection, encode
        self._decode = lru_cache(_KEPT)(self._ask)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of ``text``, by default with those that begin or end a prompt."""
        if not text:
            return []
        if add_special_tokens:
            return list(self._encode(text))
        body = {"prompt": checked(text), "add_special_tokens": False}
        found = self._connection.call("POST", "/tokenize", body, safe=True)
        return [int(token) for token in found["tokens"]]

    def decode(self, ids: int | Sequence[int], **_: Any) -> str:
        """The text of token ids."""
        rows = (ids,) if isinstance(ids, int) else tuple(map(int, ids))
        return self._decode(rows) if rows else ""

    def _ask(self, ids: tuple[int, ...]) -> str:
        found = self._connection.call("POST", "/detokenize", {"tokens": list(ids)}, safe=True)
        return str(found["prompt"])
