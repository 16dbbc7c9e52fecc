"""What a store folder holds, in SQLite: which chunks, how much they are used, for which documents.

The files are the truth and this is its catalogue. It makes opening quick (no file is read), lets
several processes agree on what leaves first, and is made anew from the files where it is damaged.
Only the notes on documents and on use are lost then.

It is data from elsewhere like the chunks: a schema that is not ours is thrown away, nothing in it
is run, and what it says of a chunk is checked again when the chunk is used.
"""

from __future__ import annotations

import contextlib
import secrets
import sqlite3
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from cacheblend_rag.store.database import Database, new_birth
from cacheblend_rag.store.evict import GDSF, POLICIES, Policy
from cacheblend_rag.store.index_documents import Documents
from cacheblend_rag.store.index_rows import (
    FEWEST_REMEMBERED,
    Content,
    Rows,
    Victim,
    is_key,
    seal_of,
)

_SCHEMA = (
    "CREATE TABLE chunks (id INTEGER PRIMARY KEY AUTOINCREMENT, namespace TEXT NOT NULL, "
    "key BLOB NOT NULL, nbytes INTEGER NOT NULL, cost REAL NOT NULL, heat REAL NOT NULL, "
    "tick INTEGER NOT NULL, priority REAL NOT NULL, putter INTEGER NOT NULL DEFAULT 0, "
    "put_at REAL NOT NULL DEFAULT 0, UNIQUE (namespace, key)) STRICT",
    "CREATE INDEX by_priority ON chunks (priority, namespace, key, nbytes)",
    "CREATE INDEX by_namespace ON chunks (namespace, priority, key, nbytes)",
    "CREATE TABLE contents (id INTEGER PRIMARY KEY, base INTEGER NOT NULL, "
    "kv_bytes INTEGER NOT NULL, tokens BLOB NOT NULL, seal INTEGER NOT NULL) STRICT",
    # sums kept with the rows: counting 100,000 of them at every use would take longer than it
    "CREATE TABLE totals (namespace TEXT PRIMARY KEY, chunks INTEGER NOT NULL, "
    "nbytes INTEGER NOT NULL) STRICT",
    "CREATE TRIGGER came AFTER INSERT ON chunks BEGIN "
    "INSERT INTO totals VALUES (new.namespace, 1, new.nbytes) ON CONFLICT (namespace) DO UPDATE "
    "SET chunks = chunks + 1, nbytes = nbytes + new.nbytes; END",
    "CREATE TRIGGER went AFTER DELETE ON chunks BEGIN UPDATE totals SET chunks = chunks - 1, "
    "nbytes = nbytes - old.nbytes WHERE namespace = old.namespace; END",
    "CREATE TABLE heats (id INTEGER PRIMARY KEY AUTOINCREMENT, namespace TEXT NOT NULL, "
    "key BLOB NOT NULL, heat REAL NOT NULL, UNIQUE (namespace, key)) STRICT",
    "CREATE TABLE documents (namespace TEXT NOT NULL, document BLOB NOT NULL, key BLOB NOT NULL, "
    "PRIMARY KEY (namespace, document, key)) STRICT, WITHOUT ROWID",
    "CREATE INDEX by_key ON documents (namespace, key)",
    "CREATE TABLE state (id INTEGER PRIMARY KEY CHECK (id = 1), policy TEXT NOT NULL, "
    "age REAL NOT NULL, tick INTEGER NOT NULL) STRICT",
)
# what may stand in the rows: their types alone keep neither NULL nor any number from a damaged file
_LARGEST = {"nbytes": 1 << 50, "tick": 1 << 60}
_POSSIBLE_CHUNK = (
    "typeof(namespace) = 'text' AND typeof(key) = 'blob' AND length(key) = 32 AND "
    "typeof(nbytes) = 'integer' AND nbytes BETWEEN 1 AND :nbytes AND typeof(cost) = 'real' AND "
    "typeof(heat) = 'real' AND typeof(tick) = 'integer' AND typeof(priority) = 'real'"
)
_POSSIBLE_STATE = (
    "typeof(policy) = 'text' AND age BETWEEN 0 AND 1e15 AND typeof(tick) = 'integer' AND "
    "tick BETWEEN 0 AND :tick"
)
_CHECK = (
    f"SELECT (SELECT count(*) FROM chunks WHERE NOT ifnull({_POSSIBLE_CHUNK}, 0)), "
    f"(SELECT count(*) FROM state WHERE {_POSSIBLE_STATE})"
)

_PAGE = 1000  # rows read at once


class Mark(NamedTuple):
    """The numbers of an index's latest entries: what has higher ones came later."""

    birth: int  # tells it from one made anew
    chunk: int
    heat: int


class Limits(NamedTuple):
    """Bytes at most; None is no limit."""

    folder: int | None
    namespace: int | None


class Index(Documents):
    """The catalogue in ``folder``. May be used from several threads and by several processes.

    None of its methods fails because of the file: see ``database``.

    Args:
        folder: an existing folder.
        policy: what ranks the chunks from now on, in all processes; None leaves it as it is.
        fill: called when the index may lack anything, to enter what is there.
    """

    def __init__(self, folder: Path, policy: Policy | None, fill: Callable[[], object]) -> None:
        self._asked = policy
        # Not the process's number: containers that share a folder have the same ones.
        self._rows = Rows(policy or GDSF(), secrets.randbelow(1 << 62) + 1)
        self._database = Database(folder, self._prepare, fill)

    @property
    def policy(self) -> Policy:
        """What ranks the chunks."""
        return self._rows.policy

    @property
    def rebuilt(self) -> bool:
        """Whether it was damaged and made anew, which lost the notes on use and on documents."""
        return self._database.rebuilt

    # ---- chunks --------------------------------------------------------------------------------

    def add_many(self, namespace: str, chunks: Collection[tuple[Content, int, float]]) -> None:
        """Note that chunks are there, as used now, in one transaction; replaces older notes."""

        def add(db: sqlite3.Connection) -> None:
            for content, nbytes, cost in chunks:
                self._rows.add(db, namespace, content, nbytes, cost)

        self._database.write(add)

    def put(
        self,
        namespace: str,
        content: Content,
        nbytes: int,
        cost: float,
        gone: Callable[[bytes], bool],
        *,
        is_new: bool,
    ) -> bool:
        """Note that a chunk was put just now: count a use of one that was there. False where it is
        gone, asked while no other process can forget it.

        Until it is registered, for a while, it is not dropped with a document of another process.
        """

        def put(db: sqlite3.Connection) -> bool:
            # Within the transaction: a process that forgets erases files within one as well, so
            # either it sees this entry or we see that the file is gone.
            if gone(content.key):
                return False
            if is_new or not self._rows.use(db, namespace, content.key):
                self._rows.add(db, namespace, content, nbytes, cost)
            query = "UPDATE chunks SET putter = ?, put_at = ? WHERE namespace = ? AND key = ?"
            db.execute(query, (self._rows.putter, time.time(), namespace, content.key))
            return True

        return self._database.write(put)

    def remove_if(
        self, namespace: str, keys: Collection[bytes], gone: Callable[[bytes], bool]
    ) -> int:
        """Remove those of ``keys`` that are gone, asked while no other process can add any."""

        def remove(db: sqlite3.Connection) -> int:
            confirmed = [key for key in keys if gone(key)]
            self._rows.forget(db, namespace, confirmed)
            return len(confirmed)

        return self._database.write(remove)

    def settle(
        self,
        namespace: str,
        pending: deque[bytes],
        gone: Callable[[bytes], bool],
        *,
        soon: bool = False,
    ) -> None:
        """Take keys from ``pending``: remove those that are gone, note a use of the others.

        Raises:
            BusyError: another process or thread writes, and it is to be done ``soon``.
        """

        def settle(db: sqlite3.Connection) -> None:
            with contextlib.suppress(IndexError):  # another thread took the last one
                while pending:
                    key = pending.popleft()
                    if gone(key):
                        self._rows.forget(db, namespace, [key])
                    else:
                        self._rows.use(db, namespace, key)

        (self._database.write_soon if soon else self._database.write)(settle)

    def make_room(
        self,
        namespace: str,
        key: bytes,
        nbytes: int,
        cost: float,
        limits: Limits,
        pinned: Collection[bytes],
    ) -> list[Victim] | None:
        """Forget what has to leave for a new chunk, and say what; None where the new one stays out.

        It stays out where it is too large, ranks below what it would push out (if the policy
        refuses), or all the others are pinned.
        """
        if any(limit is not None and nbytes > limit for limit in limits):
            return None

        def make_room(db: sqlite3.Connection) -> list[Victim] | None:
            usage = self._rows.next_usage(db, namespace, key, cost, nbytes)  # counted by ``put``
            victims: dict[tuple[str, bytes], Victim] = {}
            for scope, limit in ((namespace, limits.namespace), (None, limits.folder)):
                if limit is None:
                    continue
                freed = sum(v.nbytes for v in victims.values())
                missing = self._rows.used(db, scope) - freed + nbytes - limit
                found = self._rows.victims(
                    db, scope, missing, self._rows.rank(usage), pinned, victims
                )
                if found is None:
                    # It stays out, but was wanted. This use is remembered, so that it gets in once
                    # it is wanted more often than what it would push out.
                    self._rows.count(db, namespace, key, cost, nbytes)
                    self._rows.remember(db, namespace, key, usage.heat)
                    return None
                victims |= found
            for victim in victims.values():
                self._rows.forget(db, victim.namespace, [victim.key])
            return list(victims.values())

        return self._database.write(make_room)

    def measure(self, namespace: str, sizes: Mapping[bytes, int]) -> None:
        """Enter the bytes of files where others are noted."""
        query = "SELECT key, nbytes FROM chunks WHERE namespace = ?"
        wrong = [
            (sizes[key], namespace, key)
            for key, nbytes in self._all(query, namespace)
            if key in sizes and sizes[key] != nbytes
        ]

        def measure(db: sqlite3.Connection) -> None:
            db.executemany("UPDATE chunks SET nbytes = ? WHERE namespace = ? AND key = ?", wrong)
            _sum_up(db)

        if wrong:
            self._database.write(measure)

    def is_over(self, limits: Limits, namespace: str) -> bool:
        """Whether more is noted than may be held."""
        scopes = ((namespace, limits.namespace), (None, limits.folder))
        return any(
            limit is not None
            and self._database.read(lambda db, of=of: self._rows.used(db, of)) > limit  # type: ignore[misc]
            for of, limit in scopes
        )

    def surplus(
        self, limit: int | None, sizes: dict[tuple[str, bytes], int], namespace: str | None = None
    ) -> list[Victim]:
        """Forget what is over the limit (lowered since), of a namespace or of all, and say what.

        Args:
            sizes: bytes of the chunks' files, by namespace and key: what is noted may be wrong,
                and nothing may leave for that. What leaves is taken out.
        """

        def surplus(db: sqlite3.Connection) -> list[Victim]:
            mine = {of: size for of, size in sizes.items() if namespace in (None, of[0])}
            missing = 0 if limit is None else sum(mine.values()) - limit
            victims: list[Victim] = []
            for of in db.execute("SELECT namespace, key FROM chunks ORDER BY priority").fetchall():
                if missing <= 0:
                    break
                if of in mine:
                    victims.append(Victim(of[0], of[1], mine[of]))
                    missing -= mine.pop(of)
            for victim in victims:
                self._rows.forget(db, victim.namespace, [victim.key])
            return victims

        victims = self._database.write(surplus) if limit is not None else []
        for victim in victims:
            del sizes[victim.namespace, victim.key]
        return victims

    # ---- what is there -------------------------------------------------------------------------

    def keys(self, namespace: str) -> set[bytes]:
        """The keys of a namespace."""
        query = "SELECT key FROM chunks WHERE namespace = ?"
        return {key for (key,) in self._all(query, namespace) if is_key(key)}

    def contents(self, namespace: str, after: int = 0) -> Iterator[tuple[int, Content]]:
        """Chunks with their number, those put later having a higher one; only from ``after`` on.
        Passes over what is damaged.

        Read in pages, so that chunks may come and go meanwhile.
        """
        # The plus keeps SQLite from looking namespaces up and sorting all they hold for each page.
        query = (
            "SELECT id, seal, key, base, kv_bytes, tokens FROM chunks JOIN contents USING (id) "
            "WHERE +namespace = ? AND id > ? ORDER BY id LIMIT ?"
        )
        while True:
            rows = self._all(query, namespace, after, _PAGE)
            for number, seal, *content in rows:
                if seal == seal_of(namespace, found := Content(*content)):
                    yield number, found
            if len(rows) < _PAGE:
                return
            after = rows[-1][0]

    def mark(self) -> Mark:
        """Where ``gone`` and ``contents`` are to go on from now."""
        return self._database.read(_mark_of)

    def gone(self, namespace: str, since: Mark) -> set[bytes] | None:
        """Keys of chunks that left since then and did not come back; None where more may have left
        than is remembered.
        """
        query = (
            "SELECT key FROM heats WHERE namespace = ? AND id > ? AND NOT EXISTS "
            "(SELECT 1 FROM chunks WHERE namespace = heats.namespace AND key = heats.key)"
        )

        def gone(db: sqlite3.Connection) -> set[bytes] | None:
            now, oldest = _mark_of(db), db.execute("SELECT min(id) FROM heats").fetchone()[0]
            # Only so many of the latest are sure to be remembered. Where more than these came since
            # the mark, and the oldest that is left came after it, some in between may be cut off.
            is_cut = (oldest or 0) > since.heat + 1 and now.heat - since.heat > FEWEST_REMEMBERED
            if now.birth != since.birth or is_cut:
                return None
            return {key for (key,) in db.execute(query, (namespace, since.heat)) if is_key(key)}

        return self._database.read(gone)

    def totals(self, namespace: str) -> tuple[int, int]:
        """Chunks and bytes of a namespace."""
        rows = self._all("SELECT chunks, nbytes FROM totals WHERE namespace = ?", namespace)
        chunks, nbytes = rows[0] if rows else (0, 0)
        return chunks, nbytes

    def close(self) -> None:
        """Close the file; a second call does nothing, nor one while another thread hangs in it."""
        self._database.close()

    # ---- inside --------------------------------------------------------------------------------

    def _prepare(self, db: sqlite3.Connection) -> None:
        """Make the tables of a new file, or check those of one that was found.

        Raises:
            sqlite3.DatabaseError: they are not ours.
        """
        if not _schema(db):
            for statement in _SCHEMA:
                db.execute(statement)
            db.execute("INSERT INTO state VALUES (1, ?, 0, 0)", (GDSF.name,))
            # A cursor of an index that was made anew must not be taken for one of this index.
            db.execute(f"PRAGMA user_version = {new_birth()}")
        # Compared as text, with all triggers and views: nothing that somebody added may run.
        elif _schema(db) != _our_schema():
            raise sqlite3.DatabaseError("the schema is not ours")
        elif db.execute(_CHECK, _LARGEST).fetchone() != (0, 1):
            raise sqlite3.DatabaseError("there are rows that are not ours")
        (name,) = db.execute("SELECT policy FROM state").fetchone()
        self._rows.policy = self._asked or POLICIES.get(name, GDSF())
        if self._rows.policy.name != name:
            self._rows.rank_anew(db)
        _sum_up(db)  # a wrong sum would stop all eviction

    def _all(self, query: str, *values: object) -> list[Any]:
        return self._database.read(lambda db: db.execute(query, values).fetchall())


def _sum_up(db: sqlite3.Connection) -> None:
    db.execute("DELETE FROM totals")
    db.execute(
        "INSERT INTO totals SELECT namespace, count(*), sum(nbytes) FROM chunks GROUP BY namespace"
    )


def _mark_of(db: sqlite3.Connection) -> Mark:
    query = "SELECT (SELECT seq FROM sqlite_sequence WHERE name = ?)"
    (birth,) = db.execute("PRAGMA user_version").fetchone()
    last = [db.execute(query, (name,)).fetchone()[0] or 0 for name in ("chunks", "heats")]
    return Mark(birth, *map(int, last))


def _schema(db: sqlite3.Connection) -> list[tuple[str, ...]]:
    query = "SELECT type, name, tbl_name, sql FROM sqlite_master ORDER BY type, name"
    return db.execute(query).fetchall()


def _our_schema() -> list[tuple[str, ...]]:
    db = sqlite3.connect(":memory:")
    try:
        for statement in _SCHEMA:
            db.execute(statement)
        return _schema(db)
    finally:
        db.close()
