"""Which documents the chunks of a remote store belong to: noted there, for all machines."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from typing import TypeVar

from cacheblend_rag.store.base import KVStore, check_key, document_id, is_key
from cacheblend_rag.store.remote.base import Backend

_Answer = TypeVar("_Answer")
_Item = TypeVar("_Item")


class RemoteDocuments(KVStore):
    """The part of ``RemoteStore`` that is about documents. Notes say of a document which keys it
    has, and of a key which documents have it; the backend keeps the two together.
    """

    _backend: Backend
    _notes: str  # the folder of this namespace's notes

    @property
    def keeps_documents(self) -> bool:
        return True

    def register(self, document: str, keys: Iterable[str]) -> None:
        keys = list(keys)
        for key in keys:
            check_key(key)
        name = document_id(document)
        for part in self._parts(dict.fromkeys(keys)):
            self._asked(partial(self._backend.note, self._notes, name, part))

    def documents(self) -> set[str]:
        # a document's name has the form of a key
        return self._keys_in(self._backend.documents(self._notes))

    def document_keys(self, document: str) -> list[str]:
        return self._noted(document_id(document))

    def unregister(
        self,
        documents: Iterable[str],
        only: Collection[str] | None = None,
        forgotten: Collection[str] | None = None,
    ) -> list[str]:
        some = None if only is None else set(only)
        pairs = [
            (document, key)
            for document in dict.fromkeys(documents)
            for key in self._noted(document)
            if some is None or key in some
        ]
        # All are released before the first note goes: where that fails, it can be done again, and
        # says the same. Without the note, nobody would know that the chunk is to be forgotten.
        orphans = set[str]()
        for part in self._parts(pairs):
            orphans.update(self._asked(partial(self._backend.release, self._notes, part)))
        orphans.difference_update(forgotten or ())
        kept = set() if forgotten is None else orphans
        for part in self._parts(pair for pair in pairs if pair[1] not in kept):
            self._asked(partial(self._backend.unnote, self._notes, part))
        return sorted(orphans)

    @abstractmethod
    def _asked(self, question: Callable[[], _Answer]) -> _Answer:
        """The backend's answer, in time.

        Raises:
            UnavailableError: there is none.
        """

    def _noted(self, document: str) -> list[str]:
        return sorted(self._keys_in(self._backend.noted(self._notes, document)))

    def _keys_in(self, pages: Iterator[list[str]]) -> set[str]:
        # Page by page, each with its own deadline.
        found = set[str]()
        while (page := self._asked(lambda: next(pages, None))) is not None:
            found.update(filter(is_key, page))
        return found

    def _parts(self, items: Iterable[_Item]) -> Iterator[Sequence[_Item]]:
        rest = iter(items)
        while part := list(islice(rest, self._backend.at_once)):
            yield part
