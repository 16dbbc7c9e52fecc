"""Which documents the chunks of a store on disk belong to: in the index of its folder."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path

from cacheblend_rag.store.base import KVStore, document_id
from cacheblend_rag.store.catalog import Catalog
from cacheblend_rag.store.files import explained


class DiskDocuments(KVStore):
    """The part of ``DiskStore`` that is about documents."""

    namespace: str
    _folder: Path
    _catalog: Catalog

    @property
    def keeps_documents(self) -> bool:
        return True

    def register(self, document: str, keys: Iterable[str]) -> None:
        with explained(self._folder):
            raw = [bytes.fromhex(key) for key in keys]
            self._catalog.index.register(self.namespace, bytes.fromhex(document_id(document)), raw)

    def documents(self) -> set[str]:
        with explained(self._folder):
            return {document.hex() for document in self._catalog.index.documents(self.namespace)}

    def document_keys(self, document: str) -> list[str]:
        with explained(self._folder):
            raw = bytes.fromhex(document_id(document))
            return [key.hex() for key in self._catalog.index.document_keys(self.namespace, raw)]

    def unregister(
        self,
        documents: Iterable[str],
        only: Collection[str] | None = None,
        forgotten: Collection[str] | None = None,
    ) -> list[str]:
        with explained(self._folder):
            raw = [bytes.fromhex(document) for document in documents]
            keys = None if only is None else {bytes.fromhex(key) for key in only}
            gone = None if forgotten is None else {bytes.fromhex(key) for key in forgotten}
            found = self._catalog.index.unregister(self.namespace, raw, keys, gone)
            return [key.hex() for key in found]

    def drop(self, documents: Iterable[str], only: Collection[str] | None = None) -> list[str]:
        with explained(self._folder):
            raw = [bytes.fromhex(document) for document in documents]
            return self._catalog.drop(
                raw, None if only is None else {bytes.fromhex(key) for key in only}
            )
