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
import struct
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

from cacheblend_rag.store.database import Database, new_birth
from cacheblend_rag.store.evict import GDSF, POLICIES, Policy, Usage, age_step, warmed

_SCHEMA = (
    "CREATE TABLE chunks (id INTEGER PRIMARY KEY AUTOINCREMENT, namespace TEXT NOT NULL, "
    "key BLOB NOT NULL, nbytes INTEGER NOT NULL, cost REAL NOT NULL, heat REAL NOT NULL, "
    "tick INTEGER NOT NULL, priority REAL NOT NULL, putter INTEGER NOT NULL DEFAULT 0, "
    "put_at REAL NOT NULL DEFAULT 0, UNIQUE (namespace, key)) STRICT",
    "CREATE INDEX by_priority ON chunks (priority, namespace, key, nbytes)",
    "CREATE INDEX by_namespace ON chunks (namespace, priority, key, nbytes)",
    "CREATE TABLE contents (id INTEGER PRIMARY KEY, base INTEGER NOT NULL, "
    "kv_bytes INTEGER NOT NULL, tokens BLOB NOT NULL, seal INTEGER NOT NULL) STRICT",
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
_PUTTING_S = 60.0  # between a put and its label
_PAGE = 1000  # rows read at once
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

    None of its methods fails because of the file: see ``database``.

    Args:
        folder: an existing folder.
        policy: what ranks the chunks from now on, in all processes; None leaves it as it is.
        fill: called when the index may lack anything, to enter what is there.
    """

    def __init__(self, folder: Path, policy: Policy | None, fill: Callable[[], object]) -> None:
        self._asked, self.policy = policy, policy or GDSF()
        self._name = secrets.randbelow(1 << 62) + 1
        self._database = Database(folder, self._prepare, fill)

    @property
    def rebuilt(self) -> bool:
        """Whether it was damaged and made anew, which lost the notes on use and on documents."""
        return self._database.rebuilt

    # ---- chunks --------------------------------------------------------------------------------

    def add_many(self, namespace: str, chunks: Collection[tuple[Content, int, float]]) -> None:
        """Note that chunks are there, as used now, in one transaction; replaces older notes."""

        def add(db: sqlite3.Connection) -> None:
            for content, nbytes, cost in chunks:
                self._add(db, namespace, content, nbytes, cost)

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

        Until it is labelled, for a while, it is not dropped with a document of another process.
        """

        def put(db: sqlite3.Connection) -> bool:
            if gone(content.key):
                return False
            if is_new or not self._use(db, namespace, content.key):
                self._add(db, namespace, content, nbytes, cost)
            query = "UPDATE chunks SET putter = ?, put_at = ? WHERE namespace = ? AND key = ?"
            db.execute(query, (self._name, time.time(), namespace, content.key))
            return True

        return self._database.write(put)

    def remove_if(
        self, namespace: str, keys: Collection[bytes], gone: Callable[[bytes], bool]
    ) -> int:
        """Remove those of ``keys`` that are gone, asked while no other process can add any."""

        def remove(db: sqlite3.Connection) -> int:
            confirmed = [key for key in keys if gone(key)]
            self._forget(db, namespace, confirmed)
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
                        self._forget(db, namespace, [key])
                    else:
                        self._use(db, namespace, key)

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
            usage = self._next_usage(db, namespace, key, cost, nbytes)  # counted by ``put``
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
            limit is not None and self._database.read(lambda db, of=of: self._used(db, of)) > limit  # type: ignore[misc]
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
                self._forget(db, victim.namespace, [victim.key])
            return victims

        victims = self._database.write(surplus) if limit is not None else []
        for victim in victims:
            del sizes[victim.namespace, victim.key]
        return victims

    # ---- what is there -------------------------------------------------------------------------

    def keys(self, namespace: str) -> set[bytes]:
        """The keys of a namespace."""
        query = "SELECT key FROM chunks WHERE namespace = ?"
        return {key for (key,) in self._all(query, namespace) if _is_key(key)}

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
                if seal == _seal_of(namespace, found := Content(*content)):
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
            is_cut = (oldest or 0) > since.heat + 1 and now.heat - since.heat > _FEWEST_REMEMBERED
            if now.birth != since.birth or is_cut:
                return None
            return {key for (key,) in db.execute(query, (namespace, since.heat)) if _is_key(key)}

        return self._database.read(gone)

    def totals(self, namespace: str) -> tuple[int, int]:
        """Chunks and bytes of a namespace."""
        rows = self._all("SELECT chunks, nbytes FROM totals WHERE namespace = ?", namespace)
        chunks, nbytes = rows[0] if rows else (0, 0)
        return chunks, nbytes

    # ---- documents -----------------------------------------------------------------------------

    def label(self, namespace: str, document: bytes, keys: Iterable[bytes]) -> None:
        """Note that ``document`` consists of these chunks."""
        rows = [(namespace, document, key) for key in keys]

        def label(db: sqlite3.Connection) -> None:
            db.executemany("INSERT OR IGNORE INTO documents VALUES (?, ?, ?)", rows)
            query = "UPDATE chunks SET putter = 0 WHERE namespace = ? AND key = ?"
            db.executemany(query, [(namespace, key) for _, _, key in rows])

        self._database.write(label, owed=label)

    def documents(self, namespace: str) -> set[bytes]:
        """The documents noted."""
        query = "SELECT DISTINCT document FROM documents WHERE namespace = ?"
        return {name for (name,) in self._all(query, namespace) if isinstance(name, bytes)}

    def document_keys(self, namespace: str, document: bytes) -> list[bytes]:
        """The keys noted for a document, in order."""
        query = "SELECT key FROM documents WHERE namespace = ? AND document = ? ORDER BY key"
        return [key for (key,) in self._all(query, namespace, document) if _is_key(key)]

    def unlabel(
        self,
        namespace: str,
        documents: Collection[bytes],
        only: Collection[bytes] | None = None,
    ) -> list[bytes]:
        """Drop documents, or of their keys these; returns the keys dropped that none has now."""

        def unlabel(db: sqlite3.Connection) -> list[bytes]:
            return self._unlabel(db, namespace, documents, only)

        return self._database.write(unlabel, owed=unlabel)

    def drop(
        self, namespace: str, documents: Collection[bytes], erase: Callable[[bytes], None]
    ) -> list[bytes]:
        """Drop documents, and erase the chunks that none has now while no other process can note
        anything of them; returns their keys. What another process put just now stays: it will say
        for which document.
        """

        def unlabel(db: sqlite3.Connection) -> list[bytes]:
            return self._unlabel(db, namespace, documents, None)

        def drop(db: sqlite3.Connection) -> list[bytes]:
            orphans = [key for key in unlabel(db) if not self._is_being_put(db, namespace, key)]
            for key in orphans:
                erase(key)
            self._forget(db, namespace, orphans)
            return orphans

        dropped = self._database.write(drop, owed=unlabel)
        self._database.clean()
        return dropped

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
            db.execute(f"PRAGMA user_version = {new_birth()}")
        elif _schema(db) != _our_schema():
            raise sqlite3.DatabaseError("the schema is not ours")
        elif db.execute(_CHECK, _LARGEST).fetchone() != (0, 1):
            raise sqlite3.DatabaseError("there are rows that are not ours")
        (name,) = db.execute("SELECT policy FROM state").fetchone()
        self.policy = self._asked or POLICIES.get(name, GDSF())
        if self.policy.name != name:
            self._rank_anew(db)
        _sum_up(db)  # a wrong sum would stop all eviction

    def _all(self, query: str, *values: object) -> list[Any]:
        return self._database.read(lambda db: db.execute(query, values).fetchall())

    def _unlabel(
        self,
        db: sqlite3.Connection,
        namespace: str,
        documents: Collection[bytes],
        only: Collection[bytes] | None,
    ) -> list[bytes]:
        orphans: list[bytes] = []
        for document in documents:
            query = "SELECT key FROM documents WHERE namespace = ? AND document = ?"
            keys = [key for (key,) in db.execute(query, (namespace, document))]
            keys = [key for key in keys if only is None or key in only]
            query = "DELETE FROM documents WHERE namespace = ? AND document = ? AND key = ?"
            db.executemany(query, [(namespace, document, key) for key in keys])
            query = "SELECT 1 FROM documents WHERE namespace = ? AND key = ?"
            orphans += [k for k in keys if db.execute(query, (namespace, k)).fetchone() is None]
        return [key for key in orphans if _is_key(key)]

    def _is_being_put(self, db: sqlite3.Connection, namespace: str, key: bytes) -> bool:
        query = "SELECT putter, put_at FROM chunks WHERE namespace = ? AND key = ?"
        putter, put_at = db.execute(query, (namespace, key)).fetchone() or (0, 0.0)
        return putter not in (0, self._name) and abs(time.time() - put_at) < _PUTTING_S

    def _use(self, db: sqlite3.Connection, namespace: str, key: bytes) -> bool:
        found = db.execute(
            "SELECT id, cost, nbytes FROM chunks WHERE namespace = ? AND key = ?", (namespace, key)
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

    def _rank(self, usage: Usage) -> float:
        return self.policy.priority(usage)

    def _add(
        self, db: sqlite3.Connection, namespace: str, content: Content, nbytes: int, cost: float
    ) -> None:
        seal = _seal_of(namespace, content)
        usage = self._count(db, namespace, content.key, cost, nbytes)
        self._forget(db, namespace, [content.key])
        row = db.execute(
            "INSERT INTO chunks (namespace, key, nbytes, cost, heat, tick, priority) "
            "VALUES (?, ?, ?, ?, ?, ?, ?)",
            (namespace, content.key, nbytes, cost, usage.heat, usage.tick, self._rank(usage)),
        )
        db.execute(
            "INSERT OR REPLACE INTO contents VALUES (?, ?, ?, ?, ?)",
            (row.lastrowid, content.base, content.kv_bytes, content.tokens, seal),
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
        if missing > 0 and not (pinned or chosen or self.policy.refuses):
            raise sqlite3.DatabaseError("the sums are not those of the rows")
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


def _is_key(key: object) -> bool:
    return isinstance(key, bytes) and len(key) == 32


def _seal_of(namespace: str, content: Content) -> int | None:
    """Tells whether ``content`` is what was noted; None where no store notes such a thing."""
    try:
        numbers = struct.pack("<32sqq", *content[:3])
        digest = xxhash.xxh3_64(numbers + namespace.encode())
        digest.update(content.tokens)
    except (struct.error, TypeError):  # SQLite holds whatever was written to it
        return None
    return digest.intdigest() - (1 << 63)


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
