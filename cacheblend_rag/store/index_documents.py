"""Which documents the chunks of a store's index belong to."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Collection, Iterable

from cacheblend_rag.store.database import Database
from cacheblend_rag.store.index_rows import Rows, is_key
from cacheblend_rag.undo import try_all


class Documents:
    """The part of ``Index`` that is about documents."""

    _database: Database
    _rows: Rows

    def register(self, namespace: str, document: bytes, keys: Iterable[bytes]) -> None:
        """Note that ``document`` consists of these chunks."""
        rows = [(namespace, document, key) for key in keys]

        def register(db: sqlite3.Connection) -> None:
            db.executemany("INSERT OR IGNORE INTO documents VALUES (?, ?, ?)", rows)
            # Registered: from here on it goes with its documents.
            query = "UPDATE chunks SET putter = 0 WHERE namespace = ? AND key = ?"
            db.executemany(query, [(namespace, key) for _, _, key in rows])

        self._database.write(register, owed=register)

    def documents(self, namespace: str) -> set[bytes]:
        """The documents noted."""
        query = "SELECT DISTINCT document FROM documents WHERE namespace = ?"
        rows = self._database.read(lambda db: db.execute(query, (namespace,)).fetchall())
        return {name for (name,) in rows if isinstance(name, bytes)}

    def document_keys(self, namespace: str, document: bytes) -> list[bytes]:
        """The keys noted for a document, in order."""
        query = "SELECT key FROM documents WHERE namespace = ? AND document = ? ORDER BY key"
        rows = self._database.read(lambda db: db.execute(query, (namespace, document)).fetchall())
        return [key for (key,) in rows if is_key(key)]

    def unregister(
        self,
        namespace: str,
        documents: Collection[bytes],
        only: Collection[bytes] | None = None,
        forgotten: Collection[bytes] | None = None,
    ) -> list[bytes]:
        """As ``KVStore.unregister``."""

        def unregister(db: sqlite3.Connection) -> list[bytes]:
            return self._rows.unregister(db, namespace, documents, only, forgotten)

        return self._database.write(unregister, owed=unregister)

    def drop(
        self,
        namespace: str,
        documents: Collection[bytes],
        only: Collection[bytes] | None,
        erase: Callable[[bytes], None],
    ) -> list[bytes]:
        """Drop documents, or of their keys these, and erase the chunks that none has now while no
        other process can note anything of them; returns their keys. What another process put just
        now stays: it will say for which document.
        """

        def unregister(db: sqlite3.Connection) -> list[bytes]:
            return self._rows.unregister(db, namespace, documents, only)

        def drop(db: sqlite3.Connection) -> list[bytes]:
            orphans = [
                key for key in unregister(db) if not self._rows.is_being_put(db, namespace, key)
            ]
            try_all(erase, orphans, OSError)  # where one is refused, all stay noted
            self._rows.forget(db, namespace, orphans)
            return orphans

        dropped = self._database.write(drop, owed=unregister)
        # Or what was deleted could still be read from free pages and from the log.
        self._database.clean()
        return dropped
