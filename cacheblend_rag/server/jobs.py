"""Ingestions as jobs in a file of SQLite's: every API process sees them, and what was acknowledged
outlives a ``kill -9``. A job's texts are kept until it ends.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import sqlite3
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from cacheblend_rag.ingest import IngestReport
from cacheblend_rag.server import pieces
from cacheblend_rag.server.bodies import Given
from cacheblend_rag.server.errors import HttpError
from cacheblend_rag.server.jobs_file import JobsFile

QUEUED, RUNNING = "queued", "in_progress"
COMPLETED, FAILED, CANCELLED = "completed", "failed", "cancelled"
NOT_STORED = "not_stored"  # code of the error of a job whose every new chunk the store refused
KEPT = 10_000  # jobs that ended
_PAST_CANCEL = 2  # a job that a cancel can no longer end; 1 says that it is to end
_COUNTED = ("computed", "present", "repeated", "too_short", "too_long")
_SCHEMA = """
CREATE TABLE IF NOT EXISTS jobs (
    number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE NOT NULL, tenant TEXT NOT NULL,
    status TEXT NOT NULL, created_at INTEGER NOT NULL, completed_at INTEGER, document TEXT,
    replaces INTEGER NOT NULL, total INTEGER NOT NULL, waiting INTEGER NOT NULL,
    done TEXT NOT NULL, cancel INTEGER NOT NULL DEFAULT 0, error TEXT, idempotency TEXT,
    digest TEXT NOT NULL, UNIQUE (tenant, idempotency));
CREATE INDEX IF NOT EXISTS open_jobs ON jobs (status, number);
CREATE TABLE IF NOT EXISTS texts (job INTEGER PRIMARY KEY, chunks TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS keys (
    job INTEGER NOT NULL, place INTEGER NOT NULL, key TEXT NOT NULL, PRIMARY KEY (job, place)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS deleted (
    tenant TEXT NOT NULL, document TEXT NOT NULL, job INTEGER NOT NULL,
    PRIMARY KEY (tenant, document)
) WITHOUT ROWID;
"""


@dataclass
class Done:
    """What of a job was done.

    Attributes:
        place: how many of its chunks were taken.
        deleted: of these, left out as their document was deleted.
        reason, detail: why nothing is computed, where nothing is blended.
    """

    place: int = 0
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(_COUNTED, 0))
    not_stored: int = 0
    tokens: int = 0
    bytes: int = 0
    reason: str | None = None
    detail: str = ""
    deleted: int = 0

    @property
    def kept_nothing(self) -> bool:
        """Whether the store refused every chunk, and had none of them before."""
        return self.not_stored >= max(1, self.counts["computed"]) and not self.counts["present"]

    def add(self, report: IngestReport, before: set[str]) -> None:
        """Another batch; ``before``: the keys of those before it."""
        self.place += report.chunks
        again = min(len(before.intersection(report.keys) - {""}), report.present)
        for name in _COUNTED:
            self.counts[name] += getattr(report, name)
        self.counts["present"] -= again
        self.counts["repeated"] += again
        self.not_stored += len(report.not_stored)
        self.tokens += report.tokens
        self.bytes += report.bytes
        if report.reason is not None:
            self.reason, self.detail = str(report.reason), report.detail
        elif report.not_stored and not self.detail:
            self.detail = f"not stored: {next(iter(report.not_stored.values()))}"


@dataclass
class Job:
    """One ingestion.

    Attributes:
        number: in the order of arrival.
        tenant: namespace.
        document: that all its chunks belong to.
        replaces: the document is to consist of nothing else.
        waiting: tokens, about, that are still to be computed.
        cancel: somebody asked for its end.
    """

    number: int
    id: str
    tenant: str
    status: str
    created_at: int
    completed_at: int | None
    document: str | None
    replaces: bool
    total: int
    waiting: int
    done: Done
    cancel: bool
    error: dict[str, str] | None

    @property
    def has_keys(self) -> bool:
        """Whether the key of each of its chunks is known."""
        refused = self.error is not None and self.error["code"] == NOT_STORED
        return (self.status == COMPLETED or refused) and self.done.reason is None

    @property
    def has_ended(self) -> bool:
        """Whether nothing will change any more."""
        return self.status in (COMPLETED, FAILED, CANCELLED)


class UnderWay(NamedTuple):
    """How far a job is: its number, and how many of its chunks were taken."""

    job: int
    place: int


_FIELDS = (
    "number, id, tenant, status, created_at, completed_at, document, replaces, total, waiting, "
    "done, cancel, error"
)


def _job(row: Sequence[Any]) -> Job:
    job = Job(*row)
    job.replaces, job.cancel = bool(job.replaces), bool(job.cancel)
    job.done = Done(**json.loads(str(job.done)))
    job.error = json.loads(str(job.error)) if job.error else None
    return job


class Jobs(JobsFile):
    """Safe to use from several threads and processes.

    Args:
        file: made where it is not there yet.
        most_waiting: tokens, about, that may wait.
    """

    def __init__(self, file: Path, most_waiting: int) -> None:
        super().__init__(file, _SCHEMA)
        self._most_waiting = most_waiting
        self._has_texts = True  # of jobs that ended, as far as is known

    def forget_ended(self, engine: str) -> None:
        """Where the KV lived in an engine that is not ``engine``: what ended there is void, and
        what did not end begins anew.
        """
        if self.about("engine", engine) == engine:
            return
        with self._writing() as db:
            db.execute("UPDATE about SET value = ? WHERE name = 'engine'", (engine,))
            db.execute("DELETE FROM jobs WHERE status NOT IN (?, ?)", (QUEUED, RUNNING))
            db.execute("DELETE FROM keys")
            db.execute("UPDATE jobs SET done = ?", (json.dumps(asdict(Done())),))
        self.erase(anew=True)

    # ---- clients -------------------------------------------------------------------------------

    def create(
        self,
        tenant: str,
        chunks: Sequence[Given],
        *,
        document: str | None = None,
        replaces: bool = False,
        idempotency: str | None = None,
    ) -> Job:
        """A new job; that of before where it was asked for by the same ``idempotency`` key.

        Raises:
            HttpError: 409 where the key was used for something else; 429 where too much waits.
        """
        texts = pieces.dumps(map(asdict, chunks))
        content = f"{document!r}/{replaces}/{texts}"
        digest = hashlib.sha256(content.encode()).hexdigest()
        tokens = sum(chunk.tokens for chunk in chunks)
        common = document or _common([chunk.document for chunk in chunks])
        with self._writing() as db:
            if idempotency is not None and (old := self._same(db, tenant, idempotency, digest)):
                return old
            self._check_room(db, tokens)
            name = f"ing_{uuid.uuid4().hex}"
            values = (name, tenant, QUEUED, int(time.time()), common, replaces)
            rest = (len(chunks), tokens, json.dumps(asdict(Done())), idempotency, digest)
            made = db.execute(
                "INSERT INTO jobs (id, tenant, status, created_at, document, replaces, total, "
                "waiting, done, idempotency, digest) VALUES (?,?,?,?,?,?,?,?,?,?,?)",
                (*values, *rest),
            )
            # Apart: SQLite writes a row as a whole, with each batch that is noted.
            db.execute("INSERT INTO texts VALUES (?, ?)", (made.lastrowid, texts))
            self._prune(db)
            return self._one(db, tenant, name)

    def get(self, tenant: str, name: str) -> Job:
        """A tenant's job.

        Raises:
            HttpError: 404: there is none.
        """
        with self._lock:
            return self._one(self._db, tenant, name)

    def page(self, tenant: str, after: str | None, limit: int, order: str) -> list[Job]:
        """A tenant's jobs, by their age.

        Raises:
            HttpError: 404: there is no job ``after``.
        """
        less, way = ("<", "DESC") if order == "desc" else (">", "ASC")
        last = None if after is None else self.get(tenant, after).number
        query = (
            f"SELECT {_FIELDS} FROM jobs WHERE tenant = ? AND (? IS NULL OR number {less} ?) "
            f"ORDER BY number {way} LIMIT ?"
        )
        return [_job(row) for row in self._rows(query, tenant, last, last, limit)]

    def cancel(self, tenant: str, name: str) -> Job:
        """End a job; one that is under way ends behind its batch.

        Raises:
            HttpError: 404: there is none; 409: it has ended otherwise.
        """
        with self._writing() as db:
            job = self._one(db, tenant, name)
            if job.status in (COMPLETED, FAILED):
                raise HttpError(409, f"{name} has {job.status} already", param="id")
            if job.status == QUEUED:
                self._end(db, job, CANCELLED, None)
            elif job.status == RUNNING:
                if self._cancelled(db, job) == _PAST_CANCEL:
                    raise HttpError(409, f"{name} is about to complete", param="id")
                db.execute("UPDATE jobs SET cancel = 1 WHERE number = ?", (job.number,))
            job = self._one(db, tenant, name)
        self.erase(anew=job.status == CANCELLED)
        return job

    def delete_documents(self, tenant: str, documents: Iterable[str]) -> UnderWay | None:
        """A tenant's documents were deleted: what waits to be computed of them is left out. Returns
        what is being computed: a batch of it may still be stored.
        """
        with self._writing() as db:
            query = "SELECT MIN(number), MAX(number) FROM jobs WHERE status IN (?, ?)"
            first, last = db.execute(query, (QUEUED, RUNNING)).fetchone()
            if last is None:
                return None
            db.execute("DELETE FROM deleted WHERE job < ?", (first,))
            for document in documents:
                self._delete(db, tenant, document, last)
            under_way = self.under_way(tenant)
        self.erase(anew=True)
        return under_way

    def _delete(self, db: sqlite3.Connection, tenant: str, document: str, last: int) -> None:
        """Have what is known of a document up to the job ``last`` left out."""
        db.execute("INSERT OR REPLACE INTO deleted VALUES (?, ?, ?)", (tenant, document, last))
        query = f"SELECT {_FIELDS} FROM jobs WHERE tenant = ? AND document = ? AND status = ?"
        for row in db.execute(query, (tenant, document, QUEUED)).fetchall():
            self._end(db, _job(row), CANCELLED, None)
        query = "UPDATE jobs SET cancel = 1 WHERE tenant = ? AND document = ? AND status = ?"
        db.execute(query, (tenant, document, RUNNING))

    def under_way(self, tenant: str) -> UnderWay | None:
        """Where the tenant's job is that is being computed; None where none is."""
        query = f"SELECT {_FIELDS} FROM jobs WHERE tenant = ? AND status = ?"
        rows = self._rows(query, tenant, RUNNING)
        return UnderWay(_job(rows[0]).number, _job(rows[0]).done.place) if rows else None

    def deleted(self, job: Job) -> set[str]:
        """The documents that were deleted since a job was made."""
        query = "SELECT document FROM deleted WHERE tenant = ? AND job >= ?"
        return {str(document) for (document,) in self._rows(query, job.tenant, job.number)}

    def keys(self, job: Job) -> Sequence[str]:
        """Those of its chunks, so far."""
        query = "SELECT key FROM keys WHERE job = ? ORDER BY place"
        return [str(key) for (key,) in self._rows(query, job.number)]

    # ---- who runs them -------------------------------------------------------------------------

    def resume(self) -> None:
        """What another process had begun is to be begun again: it has ended."""
        with self._writing() as db:
            db.execute("UPDATE jobs SET status = ? WHERE status = ?", (QUEUED, RUNNING))
        self.erase(anew=True)

    def begin(self) -> tuple[Job, list[Given]] | None:
        """The oldest job that waits, and its chunks; None where there is none."""
        with self._writing() as db:
            query = (
                f"SELECT {_FIELDS}, chunks FROM jobs JOIN texts ON job = number WHERE status = ? "
                "ORDER BY number LIMIT 1"
            )
            row = db.execute(query, (QUEUED,)).fetchone()
            if row is None:
                return None
            job, chunks = _job(row[:-1]), pieces.loads(str(row[-1]).encode())
            query = "UPDATE jobs SET status = ?, cancel = cancel % ? WHERE number = ?"
            db.execute(query, (RUNNING, _PAST_CANCEL, job.number))  # a crash came before its end
            job.status = RUNNING
        return job, [Given(**chunk) for chunk in chunks]

    def progress(self, job: Job, keys: Sequence[str], waiting: int) -> bool:
        """Note what was done, and the keys of the last batch; returns whether to go on."""
        place = job.done.place - len(keys)
        # Keys and progress in one transaction: after a crash the next start goes on right behind
        # them.
        rows = [(job.number, place + i, key) for i, key in enumerate(keys)]
        done = json.dumps(asdict(job.done))
        with self._writing() as db:
            db.executemany("INSERT OR REPLACE INTO keys VALUES (?, ?, ?)", rows)
            query = "UPDATE jobs SET done = ?, waiting = ? WHERE number = ?"
            db.execute(query, (done, waiting, job.number))
            return not self._cancelled(db, job)

    def completes(self, job: Job) -> bool:
        """Whether a job was not cancelled until now; from here on it can't be."""
        with self._writing() as db:
            if self._cancelled(db, job):
                return False
            query = "UPDATE jobs SET cancel = ? WHERE number = ?"
            db.execute(query, (_PAST_CANCEL, job.number))
            return True

    def end(self, job: Job, status: str, error: Mapping[str, str] | None = None) -> None:
        """A job has ended. This is noted on a full disk as well, where clients wait for it."""
        self._write_though_full(lambda db: self._end(db, job, status, error))
        self.erase(anew=True)

    def erase(self, *, anew: bool = False) -> None:
        """Leave nothing on the disk of the texts of jobs that ended.

        Args:
            anew: a job has ended. Else only what could not be erased before is.
        """
        self._has_texts = self._has_texts or anew
        if not self._has_texts:
            return
        # Not in the transaction that ends a job: to overwrite its texts takes as much disk as they
        # do, and an end must be noted on a full one. What can't be done now is done another time:
        # every process that has the file asks for it again and again, and so does a later start.
        self._has_texts = False  # first: other threads may note an end meanwhile
        with contextlib.suppress(sqlite3.Error):
            if self._erase():
                return
        self._has_texts = True

    def _erase(self) -> bool:
        """Returns whether nobody was in the way."""
        self._clean()  # for room: the log has a page as often as it was written
        with self._writing() as db:
            query = (
                "DELETE FROM texts WHERE job NOT IN "
                "(SELECT number FROM jobs WHERE status IN (?, ?))"
            )
            db.execute(query, (QUEUED, RUNNING))
        return self._clean()

    def put_back(self, job: Job) -> None:
        """A job was interrupted: it goes on another time."""
        with self._writing() as db:
            db.execute("UPDATE jobs SET status = ? WHERE number = ?", (QUEUED, job.number))

    # ---- inside --------------------------------------------------------------------------------

    def _cancelled(self, db: sqlite3.Connection, job: Job) -> int:
        query = "SELECT cancel FROM jobs WHERE number = ?"
        return int(db.execute(query, (job.number,)).fetchone()[0])

    def _one(self, db: sqlite3.Connection, tenant: str, name: str) -> Job:
        query = f"SELECT {_FIELDS} FROM jobs WHERE tenant = ? AND id = ?"
        row = db.execute(query, (tenant, name)).fetchone()
        if row is None:
            raise HttpError(404, f"there is no ingestion {name!r}", param="id")
        return _job(row)

    def _same(
        self, db: sqlite3.Connection, tenant: str, idempotency: str, digest: str
    ) -> Job | None:
        query = "SELECT id, digest FROM jobs WHERE tenant = ? AND idempotency = ?"
        row = db.execute(query, (tenant, idempotency)).fetchone()
        if row is None:
            return None
        if row[1] != digest:
            message = "this Idempotency-Key was used with another body; use a new one"
            raise HttpError(409, message, param="Idempotency-Key")
        return self._one(db, tenant, row[0])

    def _check_room(self, db: sqlite3.Connection, tokens: int) -> None:
        query = "SELECT COALESCE(SUM(waiting), 0) FROM jobs WHERE status IN (?, ?)"
        (waiting,) = db.execute(query, (QUEUED, RUNNING)).fetchone()
        # One that is larger than all that may wait is taken where nothing waits, or it never could
        # be.
        if waiting and waiting + tokens > self._most_waiting:
            raise HttpError(
                429,
                f"about {waiting} tokens wait to be ingested, and {self._most_waiting} may; try "
                "again when some of the ingestions have ended",
                code="ingestion_queue_full",
                retry_after_s=10,
            )

    def _end(
        self, db: sqlite3.Connection, job: Job, status: str, error: Mapping[str, str] | None
    ) -> None:
        db.execute(
            "UPDATE jobs SET status = ?, completed_at = ?, error = ?, waiting = 0 WHERE number = ?",
            (status, int(time.time()), json.dumps(dict(error)) if error else None, job.number),
        )

    def _prune(self, db: sqlite3.Connection) -> None:
        query = (
            "SELECT number FROM jobs WHERE status NOT IN (?, ?) ORDER BY number DESC LIMIT 100 "
            "OFFSET ?"
        )
        for row in db.execute(query, (QUEUED, RUNNING, KEPT)).fetchall():
            db.execute("DELETE FROM keys WHERE job = ?", row)
            db.execute("DELETE FROM jobs WHERE number = ?", row)


def _common(documents: Sequence[str | None]) -> str | None:
    return documents[0] if len(set(documents)) == 1 else None


def shown(job: Job, keys: Sequence[str] | None = None) -> dict[str, Any]:
    """A job as clients see it; without its keys where these are not given."""
    done = job.done
    return {
        "id": job.id,
        "object": "cacheblend.ingestion",
        "status": job.status,
        "created_at": job.created_at,
        "completed_at": job.completed_at,
        "document": job.document,
        "counts": {
            "total": job.total,
            **done.counts,
            "not_stored": done.not_stored,
            "deleted": done.deleted,
            "remaining": job.total - done.place,
        },
        "tokens": done.tokens,
        "bytes": done.bytes,
        "keys": list(keys) if keys is not None and job.has_keys else None,
        "error": job.error,
        "reason": done.reason,
        "detail": done.detail,
    }
