"""Which chunks each document consists of, so that forgetting one leaves what others share."""

from __future__ import annotations

import threading
from collections.abc import Iterable


class Ledger:
    """Documents and the keys of their chunks, in memory. Safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._keys: dict[str, set[str]] = {}

    def note(self, document: str, keys: Iterable[str]) -> None:
        """``document`` consists of these chunks, beside those noted before."""
        with self._lock:
            self._keys.setdefault(document, set()).update(keys)

    def documents(self) -> set[str]:
        """All documents noted and not dropped."""
        with self._lock:
            return set(self._keys)

    def drop(self, documents: Iterable[str]) -> set[str]:
        """Strike documents out; returns the keys that no other document consists of."""
        with self._lock:
            gone = set().union(*(self._keys.pop(name, set()) for name in set(documents)))
            return gone.difference(*self._keys.values())
