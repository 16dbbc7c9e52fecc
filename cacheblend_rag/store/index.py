"""What a store folder holds, in SQLite: which chunks, how much they are used, for which documents.

The files are the truth and this is its catalogue. It makes opening quick (no file is read), lets
several processes agree on what leaves first, and is made anew from the files where it is damaged.
Only the notes on documents and on use are lost then.

It is data from elsewhere like the chunks: a schema that is not ours is thrown away, nothing in it
is run, and what it says of a chunk is checked again when the chunk is used.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import sqlite3
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from threading import RLock
from typing import NamedTuple

from cacheblend_rag.store.evict import GDSF, POLICIES, Policy, Usage, age_step, warmed

NAME = "index.sqlite"
_GOODBYE_S = 1.0
TIMEOUT_S = 5.0  # how long to wait for another process; a transaction takes milliseconds

_SCHEMA = (
    "CREATE TABLE chunks (id INTEGER PRIMARY KEY AUTOINCREMENT, namespace TEXT NOT NULL, "
    "key BLOB NOT NULL, nbytes INTEGER NOT NULL, cost REAL NOT NULL, heat REAL NOT NULL, "
    "tick INTEGER NOT NULL, priority REAL NOT NULL, UNIQUE (namespace, key)) STRICT",
    "CREATE INDEX by_priority ON chunks (priority, namespace, key, nbytes)",
    "CREATE INDEX by_namespace ON chunks (namespace, priority, key, nbytes)",
    "CREATE TABLE contents (id INTEGER PRIMARY KEY, base INTEGER NOT NULL, "
    "kv_bytes INTEGER NOT NULL, tokens BLOB NOT NULL) STRICT",
    # sums kept beside the rows: counting 100,000 of them at every use would take longer than it
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
_PAGE = 1000  # rows read at once
_LARGEST_VALUE = 64 << 20
_REMEMBERED = 4  # heats kept of chunks that left, times the number of chunks held
_FEWEST_REMEMBERED = 1000


class Content(NamedTuple):
    """What is known of a chunk without reading it; ``tokens`` as the store wrote them."""

    key: bytes
    base: int
    kv_bytes: int
    tokens: bytes


class Mark(NamedTuple):
    """The numbers of an index's latest entries: what has higher ones came later."""

    birth: int  # tells it from one made anew
    chunk: int
    heat: int


class Victim(NamedTuple):
    """A chunk to remove."""

    namespace: str
    key: bytes
    nbytes: int


class Limits(NamedTuple):
    """Bytes at most; None is no limit."""

    folder: int | None
    namespace: int | None


class Index:
    """The catalogue in ``folder``. May be used from several threads and by several processes.

    Args:
        folder: an existing folder.
        policy: what ranks the chunks from now on, in all processes; None leaves it as it is.

    Raises:
        sqlite3.Error: from every method, where the disk or another process refuses.
    """

    def __init__(self, folder: Path, policy: Policy | None) -> None:
        self._path = folder / NAME
        self._lock = RLock()
        self._pid = os.getpid()
        self.rebuilt = False
        try:
            self._db = self._open()
        except (sqlite3.DatabaseError, OverflowError) as error:
            if _is_refusal(error):
                raise
            self.rebuilt = True
            self._remove()
            self._db = self._open()
        with self._writing() as db:
            (name,) = db.execute("SELECT policy FROM state").fetchone()
            self.policy = policy or POLICIES.get(name, GDSF())
            if self.policy.name != name:
                self._rank_anew(db)
            db.execute("DELETE FROM totals")  # counted again: a wrong sum would stop all eviction
            db.execute(
                "INSERT INTO totals SELECT namespace, count(*), sum(max(nbytes, 0)) FROM chunks "
                "GROUP BY namespace"
            )

    # ---- chunks --------------------------------------------------------------------------------

    def add(self, namespace: str, content: Content, nbytes: int, cost: float) -> None:
        """Note that a chunk is there, as used now; replaces an older note."""
        self.add_many(namespace, [(content, nbytes, cost)])

    def add_many(self, namespace: str, chunks: Iterable[tuple[Content, int, float]]) -> None:
        """``add`` of each, in one transaction."""
        with self._writing() as db:
            for content, nbytes, cost in chunks:
                self._add(db, namespace, content, nbytes, cost)

    def use(self, namespace: str, key: bytes, patience_s: float | None = None) -> bool:
        """Note a use; False where the chunk is not known. Waits for others no longer than told."""
        with self._writing(patience_s) as db:
            found = db.execute(
                "SELECT id, cost, nbytes FROM chunks WHERE namespace = ? AND key = ?",
                (namespace, key),
            ).fetchone()
            if found is None:
                return False
            number, cost, nbytes = found
            usage = self._count(db, namespace, key, cost, nbytes)
            db.execute(
                "UPDATE chunks SET heat = ?, tick = ?, priority = ? WHERE id = ?",
                (usage.heat, usage.tick, self._rank(usage), number),
            )
        return True

    def remove(self, namespace: str, keys: Iterable[bytes]) -> None:
        """Note that chunks are gone."""
        with self._writing() as db:
            self._forget(db, namespace, keys)

    def remove_if(
        self, namespace: str, keys: Iterable[bytes], gone: Callable[[bytes], bool]
    ) -> int:
        """Remove those of ``keys`` that are gone, asked while no other process can add any."""
        with self._writing() as db:
            confirmed = [key for key in keys if gone(key)]
            self._forget(db, namespace, confirmed)
        return len(confirmed)

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
        with self._writing() as db:
            usage = self._next_usage(db, namespace, key, cost, nbytes)  # counted by ``add``
            victims: dict[tuple[str, bytes], Victim] = {}
            for scope, limit in ((namespace, limits.namespace), (None, limits.folder)):
                if limit is None:
                    continue
                freed = sum(v.nbytes for v in victims.values())
                missing = self._used(db, scope) - freed + nbytes - limit
                found = self._victims(db, scope, missing, self._rank(usage), pinned, victims)
                if found is None:
                    self._count(db, namespace, key, cost, nbytes)
                    self._remember(db, namespace, key, usage.heat)
                    return None
                victims |= found
            for victim in victims.values():
                self._forget(db, victim.namespace, [victim.key])
        return list(victims.values())

    def surplus(self, limits: Limits, namespace: str | None = None) -> list[Victim]:
        """Forget what is over the limits (lowered since), and say what."""
        with self._writing() as db:
            scope, limit = (namespace, limits.namespace) if namespace else (None, limits.folder)
            missing = 0 if limit is None else self._used(db, scope) - limit
            found = self._victims(db, scope, missing, float("inf"), (), {}) or {}
            for victim in found.values():
                self._forget(db, victim.namespace, [victim.key])
        return list(found.values())

    # ---- what is there -------------------------------------------------------------------------

    def keys(self, namespace: str) -> set[bytes]:
        """The keys of a namespace."""
        with self._reading() as db:
            rows = db.execute("SELECT key FROM chunks WHERE namespace = ?", (namespace,))
            return {key for (key,) in rows}

    def contents(self, namespace: str, after: int = 0) -> Iterator[tuple[int, Content]]:
        """Chunks with their number, those put later having a higher one; only from ``after`` on.

        Read in pages, so that chunks may come and go meanwhile.
        """
        # The plus keeps SQLite from looking namespaces up and sorting all they hold for each page.
        query = (
            "SELECT id, key, base, kv_bytes, tokens FROM chunks JOIN contents USING (id) "
            "WHERE +namespace = ? AND id > ? ORDER BY id LIMIT ?"
        )
        while True:
            with self._reading() as db:
                rows = db.execute(query, (namespace, after, _PAGE)).fetchall()
            for number, *content in rows:
                if _is_possible(found := Content(*content)):
                    yield number, found
            if len(rows) < _PAGE:
                return
            after = rows[-1][0]

    def mark(self) -> Mark:
        """Where ``gone`` and ``contents`` are to go on from now."""
        query = "SELECT (SELECT seq FROM sqlite_sequence WHERE name = ?)"
        with self._reading() as db:
            (birth,) = db.execute("PRAGMA user_version").fetchone()
            last = [db.execute(query, (name,)).fetchone()[0] or 0 for name in ("chunks", "heats")]
        return Mark(birth, *last)

    def gone(self, namespace: str, since: Mark) -> set[bytes] | None:
        """Keys of chunks that left since then and did not come back; None where more may have left
        than is remembered.
        """
        query = (
            "SELECT key FROM heats WHERE namespace = ? AND id > ? AND NOT EXISTS "
            "(SELECT 1 FROM chunks WHERE namespace = heats.namespace AND key = heats.key)"
        )
        with self._reading() as db:
            now, oldest = self.mark(), db.execute("SELECT min(id) FROM heats").fetchone()[0]
            rows = db.execute(query, (namespace, since.heat)).fetchall()
        is_cut = (oldest or 0) > since.heat + 1 and now.heat - since.heat > _FEWEST_REMEMBERED
        if now.birth != since.birth or is_cut:
            return None
        return {key for (key,) in rows}

    def totals(self, namespace: str) -> tuple[int, int]:
        """Chunks and bytes of a namespace."""
        query = "SELECT chunks, nbytes FROM totals WHERE namespace = ?"
        with self._reading() as db:
            chunks, nbytes = db.execute(query, (namespace,)).fetchone() or (0, 0)
        return chunks, nbytes

    # ---- documents -----------------------------------------------------------------------------

    def label(self, namespace: str, document: bytes, keys: Iterable[bytes]) -> None:
        """Note that ``document`` consists of these chunks."""
        rows = [(namespace, document, key) for key in keys]
        with self._writing() as db:
            db.executemany("INSERT OR IGNORE INTO documents VALUES (?, ?, ?)", rows)

    def documents(self, namespace: str) -> set[bytes]:
        """The documents noted."""
        query = "SELECT DISTINCT document FROM documents WHERE namespace = ?"
        with self._reading() as db:
            return {document for (document,) in db.execute(query, (namespace,))}

    def unlabel(
        self,
        namespace: str,
        documents: Iterable[bytes],
        only: Collection[bytes] | None = None,
    ) -> list[bytes]:
        """Drop documents, or of their keys these; returns the keys dropped that none has now."""
        orphans: list[bytes] = []
        with self._writing() as db:
            for document in documents:
                query = "SELECT key FROM documents WHERE namespace = ? AND document = ?"
                keys = [key for (key,) in db.execute(query, (namespace, document))]
                keys = [key for key in keys if only is None or key in only]
                query = "DELETE FROM documents WHERE namespace = ? AND document = ? AND key = ?"
                db.executemany(query, [(namespace, document, key) for key in keys])
                query = "SELECT 1 FROM documents WHERE namespace = ? AND key = ?"
                orphans += [k for k in keys if db.execute(query, (namespace, k)).fetchone() is None]
        return orphans

    def close(self) -> None:
        """Close the file; a second call does nothing, nor one while another thread hangs in it."""
        if self._lock.acquire(timeout=_GOODBYE_S):
            try:
                if self._pid == os.getpid():
                    self._db.close()
            finally:
                self._lock.release()

    def __del__(self) -> None:
        if hasattr(self, "_db"):
            self.close()

    # ---- inside --------------------------------------------------------------------------------

    def _open(self) -> sqlite3.Connection:
        db = sqlite3.connect(
            self._path, timeout=TIMEOUT_S, isolation_level=None, check_same_thread=False
        )
        try:
            db.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, _LARGEST_VALUE)
            for pragma in ("trusted_schema=OFF", "cell_size_check=ON", "mmap_size=0"):
                db.execute(f"PRAGMA {pragma}")
            _write_ahead(db)
            db.execute("PRAGMA synchronous=NORMAL")  # after a power cut the last uses may be lost
            db.execute("BEGIN IMMEDIATE")
            if not _schema(db):
                for statement in _SCHEMA:
                    db.execute(statement)
                db.execute("INSERT INTO state VALUES (1, ?, 0, 0)", (GDSF.name,))
                db.execute(f"PRAGMA user_version = {secrets.randbelow(1 << 31)}")
            elif _schema(db) != _our_schema():
                raise sqlite3.DatabaseError("the schema is not ours")
            db.execute("COMMIT")
        except BaseException:
            db.close()
            raise
        return db

    def _remove(self) -> None:
        for suffix in ("", "-wal", "-shm", "-journal"):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(f"{self._path}{suffix}")

    @contextlib.contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            if self._pid != os.getpid():  # SQLite's connections do not survive a fork
                self._db, self._pid = self._open(), os.getpid()
            yield self._db

    @contextlib.contextmanager
    def _writing(self, patience_s: float | None = None) -> Iterator[sqlite3.Connection]:
        with self._reading() as db:
            wait_s = TIMEOUT_S if patience_s is None else patience_s
            db.execute(f"PRAGMA busy_timeout={int(wait_s * 1000)}")
            db.execute("BEGIN IMMEDIATE")
            try:
                yield db
                db.execute("COMMIT")
            except BaseException:
                if db.in_transaction:
                    db.execute("ROLLBACK")
                raise

    def _rank(self, usage: Usage) -> float:
        return self.policy.priority(usage)

    def _add(
        self, db: sqlite3.Connection, namespace: str, content: Content, nbytes: int, cost: float
    ) -> None:
        usage = self._count(db, namespace, content.key, cost, nbytes)
        self._forget(db, namespace, [content.key])
        row = db.execute(
            "INSERT INTO chunks (namespace, key, nbytes, cost, heat, tick, priority) "
            "VALUES (?, ?, ?, ?, ?, ?, ?)",
            (namespace, content.key, nbytes, cost, usage.heat, usage.tick, self._rank(usage)),
        )
        db.execute(
            "INSERT OR REPLACE INTO contents VALUES (?, ?, ?, ?)",
            (row.lastrowid, content.base, content.kv_bytes, content.tokens),
        )

    def _count(
        self, db: sqlite3.Connection, namespace: str, key: bytes, cost: float, nbytes: int
    ) -> Usage:
        """Count a use of ``key``, which may have been here before."""
        usage = self._next_usage(db, namespace, key, cost, nbytes)
        step = age_step(self._held(db))
        db.execute("UPDATE state SET age = age + ?, tick = tick + 1", (step,))
        return usage

    def _next_usage(
        self, db: sqlite3.Connection, namespace: str, key: bytes, cost: float, nbytes: int
    ) -> Usage:
        """What a use of ``key`` would make of it."""
        age, tick = db.execute("SELECT age, tick FROM state").fetchone()
        where = (namespace, key)
        query = "SELECT heat FROM {} WHERE namespace = ? AND key = ?"
        found = db.execute(query.format("chunks"), where).fetchone()
        found = found or db.execute(query.format("heats"), where).fetchone()
        heat = warmed(found[0] if found else None, age + age_step(self._held(db)))
        return Usage(heat, cost, nbytes, tick + 1)

    def _held(self, db: sqlite3.Connection) -> int:
        return int(db.execute("SELECT coalesce(sum(chunks), 0) FROM totals").fetchone()[0])

    def _used(self, db: sqlite3.Connection, namespace: str | None) -> int:
        query = "SELECT coalesce(sum(nbytes), 0) FROM totals"
        if namespace is None:
            return int(db.execute(query).fetchone()[0])
        return int(db.execute(f"{query} WHERE namespace = ?", (namespace,)).fetchone()[0])

    def _victims(
        self,
        db: sqlite3.Connection,
        namespace: str | None,
        missing: int,
        priority: float,
        pinned: Collection[bytes],
        chosen: dict[tuple[str, bytes], Victim],
    ) -> dict[tuple[str, bytes], Victim] | None:
        query = "SELECT namespace, key, nbytes, priority FROM chunks"
        if namespace is None:
            rows = db.execute(f"{query} ORDER BY priority")
        else:
            rows = db.execute(f"{query} WHERE namespace = ? ORDER BY priority", (namespace,))
        victims: dict[tuple[str, bytes], Victim] = {}
        while missing > 0 and (row := rows.fetchone()) is not None:
            victim, rank = Victim(*row[:3]), row[3]
            if victim.key in pinned or victim[:2] in chosen:
                continue
            if self.policy.refuses and rank > priority:
                break
            victims[victim[:2]] = victim
            missing -= victim.nbytes
        rows.close()
        return None if missing > 0 else victims

    def _forget(self, db: sqlite3.Connection, namespace: str, keys: Iterable[bytes]) -> None:
        for key in keys:
            where = (namespace, key)
            gone = db.execute(
                "DELETE FROM chunks WHERE namespace = ? AND key = ? RETURNING id, heat", where
            ).fetchone()
            if gone is not None:
                db.execute("DELETE FROM contents WHERE id = ?", (gone[0],))
                self._remember(db, namespace, key, gone[1])

    def _remember(self, db: sqlite3.Connection, namespace: str, key: bytes, heat: float) -> None:
        db.execute(
            "INSERT OR REPLACE INTO heats (namespace, key, heat) VALUES (?, ?, ?)",
            (namespace, key, heat),
        )
        (kept,) = db.execute("SELECT max(id) - min(id) FROM heats").fetchone()
        if kept > 2 * _FEWEST_REMEMBERED and kept % 100 == 0:  # now and then: it costs a count
            keep = _REMEMBERED * self._held(db) + _FEWEST_REMEMBERED
            db.execute("DELETE FROM heats WHERE id <= (SELECT max(id) FROM heats) - ?", (keep,))

    def _rank_anew(self, db: sqlite3.Connection) -> None:
        """Another policy than so far."""
        db.execute("UPDATE state SET policy = ?", (self.policy.name,))
        rows = db.execute("SELECT heat, cost, nbytes, tick, id FROM chunks").fetchall()
        ranks = [(self._rank(Usage(*row[:4])), row[4]) for row in rows]
        db.executemany("UPDATE chunks SET priority = ? WHERE id = ?", ranks)


def _write_ahead(db: sqlite3.Connection) -> None:
    """Switch to a write-ahead log. SQLite does not wait here for another that does so as well."""
    last = time.monotonic() + TIMEOUT_S
    while True:
        try:
            db.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > last:
                raise
        time.sleep(0.01)


def _is_possible(content: Content) -> bool:
    """SQLite holds whatever was written to it."""
    is_typed = isinstance(content.key, bytes) and isinstance(content.tokens, bytes)
    return is_typed and type(content.base) is type(content.kv_bytes) is int


def _is_refusal(error: Exception) -> bool:
    """Whether the disk or another process refuses, rather than the file being damaged."""
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT) & 0xFF
    damage = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR)
    return code not in (*damage, sqlite3.SQLITE_TOOBIG)


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
