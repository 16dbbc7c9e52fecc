"""Which chunks were put for the sake of which document, in memory."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from threading import Lock

from cacheblend_rag.store.base import document_id


class DocumentRegistry:
    """The methods on documents of ``KVStore``, for as long as this object lives."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._keys: dict[str, set[str]] = {}

    def register(self, document: str, keys: Iterable[str]) -> None:
        """As ``KVStore.register``."""
        with self._lock:
            if keys := set(keys):
                self._keys.setdefault(document_id(document), set()).update(keys)

    def documents(self) -> set[str]:
        """As ``KVStore.documents``."""
        with self._lock:
            return set(self._keys)

    def document_keys(self, document: str) -> list[str]:
        """As ``KVStore.document_keys``."""
        with self._lock:
            return sorted(self._keys.get(document_id(document), ()))

    def unregister(
        self,
        documents: Iterable[str],
        only: Collection[str] | None = None,
        forgotten: Collection[str] | None = None,
    ) -> list[str]:
        """As ``KVStore.unregister``."""
        dropped: dict[str, set[str]] = {}
        with self._lock:
            for document in dict.fromkeys(documents):
                held = self._keys.pop(document, set())
                dropped[document] = held if only is None else held.intersection(only)
                if kept := held - dropped[document]:
                    self._keys[document] = kept
            orphans = set().union(*dropped.values()).difference(*self._keys.values())
            orphans.difference_update(forgotten or ())
            for document, keys in dropped.items():
                if forgotten is not None and (kept := keys & orphans):
                    self._keys.setdefault(document, set()).update(kept)
            return sorted(orphans)
