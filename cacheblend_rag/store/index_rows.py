"""The rows of a store's index, inside a transaction: how much is used, and what leaves first."""

from __future__ import annotations

import sqlite3
import struct
import time
from collections.abc import Collection, Iterable
from typing import NamedTuple

import xxhash

from cacheblend_rag.store.evict import Policy, Usage, age_step, warmed

_PUTTING_S = 60.0  # between a put and its registration
_REMEMBERED = 4  # heats kept of chunks that left, times the number of chunks held
FEWEST_REMEMBERED = 1000  # heats kept in any case


class Content(NamedTuple):
    """What is known of a chunk without reading it; ``tokens`` as the store wrote them."""

    key: bytes
    base: int
    kv_bytes: int
    tokens: bytes


class Victim(NamedTuple):
    """A chunk to remove."""

    namespace: str
    key: bytes
    nbytes: int


class Rows:
    """Reads and writes rows by the connection of a transaction that its caller holds.

    Args:
        policy: what ranks the chunks.
        putter: a number that tells this process's puts from those of others.
    """

    def __init__(self, policy: Policy, putter: int) -> None:
        self.policy, self.putter = policy, putter

    def unregister(
        self,
        db: sqlite3.Connection,
        namespace: str,
        documents: Collection[bytes],
        only: Collection[bytes] | None,
        forgotten: Collection[bytes] | None = None,
    ) -> list[bytes]:
        orphans: dict[bytes, bytes] = {}  # with the last document that had each
        for document in documents:
            query = "SELECT key FROM documents WHERE namespace = ? AND document = ?"
            keys = [key for (key,) in db.execute(query, (namespace, document))]
            keys = [key for key in keys if only is None or key in only]
            query = "DELETE FROM documents WHERE namespace = ? AND document = ? AND key = ?"
            db.executemany(query, [(namespace, document, key) for key in keys])
            query = "SELECT 1 FROM documents WHERE namespace = ? AND key = ?"
            left = [k for k in keys if db.execute(query, (namespace, k)).fetchone() is None]
            orphans.update(dict.fromkeys(filter(is_key, left), document))
        for key in forgotten or ():
            orphans.pop(key, None)
        if forgotten is not None:
            rows = [(namespace, document, key) for key, document in orphans.items()]
            db.executemany("INSERT INTO documents VALUES (?, ?, ?)", rows)
        return list(orphans)

    def is_being_put(self, db: sqlite3.Connection, namespace: str, key: bytes) -> bool:
        query = "SELECT putter, put_at FROM chunks WHERE namespace = ? AND key = ?"
        putter, put_at = db.execute(query, (namespace, key)).fetchone() or (0, 0.0)
        # Both directions, since clocks jump; one that jumps far only makes a chunk go or stay too
        # early.
        return putter not in (0, self.putter) and abs(time.time() - put_at) < _PUTTING_S

    def use(self, db: sqlite3.Connection, namespace: str, key: bytes) -> bool:
        found = db.execute(
            "SELECT id, cost, nbytes FROM chunks WHERE namespace = ? AND key = ?", (namespace, key)
        ).fetchone()
        if found is None:
            return False
        number, cost, nbytes = found
        usage = self.count(db, namespace, key, cost, nbytes)
        db.execute(
            "UPDATE chunks SET heat = ?, tick = ?, priority = ? WHERE id = ?",
            (usage.heat, usage.tick, self.rank(usage), number),
        )
        return True

    def rank(self, usage: Usage) -> float:
        return self.policy.priority(usage)

    def add(
        self, db: sqlite3.Connection, namespace: str, content: Content, nbytes: int, cost: float
    ) -> None:
        seal = seal_of(namespace, content)
        usage = self.count(db, namespace, content.key, cost, nbytes)
        # A new row instead of an update: its number is higher than all before, which is how other
        # processes see that it came.
        self.forget(db, namespace, [content.key])
        row = db.execute(
            "INSERT INTO chunks (namespace, key, nbytes, cost, heat, tick, priority) "
            "VALUES (?, ?, ?, ?, ?, ?, ?)",
            (namespace, content.key, nbytes, cost, usage.heat, usage.tick, self.rank(usage)),
        )
        db.execute(
            "INSERT OR REPLACE INTO contents VALUES (?, ?, ?, ?, ?)",
            (row.lastrowid, content.base, content.kv_bytes, content.tokens, seal),
        )

    def count(
        self, db: sqlite3.Connection, namespace: str, key: bytes, cost: float, nbytes: int
    ) -> Usage:
        """Count a use of ``key``, which may have been here before."""
        usage = self.next_usage(db, namespace, key, cost, nbytes)
        step = age_step(self.held(db))
        db.execute("UPDATE state SET age = age + ?, tick = tick + 1", (step,))
        return usage

    def next_usage(
        self, db: sqlite3.Connection, namespace: str, key: bytes, cost: float, nbytes: int
    ) -> Usage:
        """What a use of ``key`` would make of it."""
        age, tick = db.execute("SELECT age, tick FROM state").fetchone()
        where = (namespace, key)
        query = "SELECT heat FROM {} WHERE namespace = ? AND key = ?"
        found = db.execute(query.format("chunks"), where).fetchone()
        found = found or db.execute(query.format("heats"), where).fetchone()
        heat = warmed(found[0] if found else None, age + age_step(self.held(db)))
        return Usage(heat, cost, nbytes, tick + 1)

    def held(self, db: sqlite3.Connection) -> int:
        return int(db.execute("SELECT coalesce(sum(chunks), 0) FROM totals").fetchone()[0])

    def used(self, db: sqlite3.Connection, namespace: str | None) -> int:
        query = "SELECT coalesce(sum(nbytes), 0) FROM totals"
        if namespace is None:
            return int(db.execute(query).fetchone()[0])
        return int(db.execute(f"{query} WHERE namespace = ?", (namespace,)).fetchone()[0])

    def victims(
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
        # Even without all rows the sums would be too large, so they are wrong. This error has the
        # index made anew from the files.
        if missing > 0 and not (pinned or chosen or self.policy.refuses):
            raise sqlite3.DatabaseError("the sums are not those of the rows")
        return None if missing > 0 else victims

    def forget(self, db: sqlite3.Connection, namespace: str, keys: Iterable[bytes]) -> None:
        for key in keys:
            where = (namespace, key)
            # The heat is kept beyond the chunk: one that comes back ranks by all its uses.
            gone = db.execute(
                "DELETE FROM chunks WHERE namespace = ? AND key = ? RETURNING id, heat", where
            ).fetchone()
            if gone is not None:
                db.execute("DELETE FROM contents WHERE id = ?", (gone[0],))
                self.remember(db, namespace, key, gone[1])

    def remember(self, db: sqlite3.Connection, namespace: str, key: bytes, heat: float) -> None:
        db.execute(
            "INSERT OR REPLACE INTO heats (namespace, key, heat) VALUES (?, ?, ?)",
            (namespace, key, heat),
        )
        # Ids only grow, so their span is an upper bound for the number of rows that costs no count.
        (kept,) = db.execute("SELECT max(id) - min(id) FROM heats").fetchone()
        if kept > 2 * FEWEST_REMEMBERED and kept % 100 == 0:  # now and then: it costs a count
            keep = _REMEMBERED * self.held(db) + FEWEST_REMEMBERED
            db.execute("DELETE FROM heats WHERE id <= (SELECT max(id) FROM heats) - ?", (keep,))

    def rank_anew(self, db: sqlite3.Connection) -> None:
        """Another policy than so far."""
        db.execute("UPDATE state SET policy = ?", (self.policy.name,))
        rows = db.execute("SELECT heat, cost, nbytes, tick, id FROM chunks").fetchall()
        ranks = [(self.rank(Usage(*row[:4])), row[4]) for row in rows]
        db.executemany("UPDATE chunks SET priority = ? WHERE id = ?", ranks)


def is_key(key: object) -> bool:
    """Whether it is a chunk's key: SQLite holds whatever was written to it."""
    return isinstance(key, bytes) and len(key) == 32


def seal_of(namespace: str, content: Content) -> int | None:
    """Tells whether ``content`` is what was noted; None where no store notes such a thing."""
    try:
        numbers = struct.pack("<32sqq", *content[:3])
        digest = xxhash.xxh3_64(numbers + namespace.encode())
        digest.update(content.tokens)
    except (struct.error, TypeError):  # SQLite holds whatever was written to it
        return None
    return digest.intdigest() - (1 << 63)
