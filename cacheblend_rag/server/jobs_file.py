"""The file of SQLite's that ingestions are kept in: several threads and processes write it, and its
disk may be full.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from cacheblend_rag.undo import on_failure

_WAITS_S, _CLEANING_WAITS_S = 30.0, 0.5  # for other processes
_SET_ASIDE = 1 << 18  # bytes of disk, in which the end of a job can be noted
_ABOUT = "CREATE TABLE IF NOT EXISTS about (name TEXT PRIMARY KEY, value TEXT NOT NULL);"


def is_full(error: sqlite3.Error) -> bool:
    """Whether it is the disk that has no room."""
    return str(error) == "database or disk is full"  # SQLite's words; others quote the file's name


class JobsFile:
    """Safe to use from several threads and processes.

    Args:
        file: made where it is not there yet.
        schema: what it has, besides notes about the server.
    """

    def __init__(self, file: Path, schema: str) -> None:
        self._lock = threading.RLock()
        os.close(os.open(file, os.O_CREAT | os.O_RDWR, 0o600))  # it has texts, and a secret
        self._file, self._inode = file, file.stat().st_ino
        self._db = sqlite3.connect(
            file, timeout=_WAITS_S, check_same_thread=False, isolation_level=None
        )
        with on_failure(self._db.close):
            # What is deleted may be secret: it is overwritten.
            self._db.execute("PRAGMA secure_delete = ON")
            self._db.execute("PRAGMA journal_mode = WAL")
            # A job that was acknowledged survives a power cut: its texts are nowhere else.
            self._db.execute("PRAGMA synchronous = FULL")
            self._db.executescript(schema + _ABOUT)
        self._aside = file.with_name(f"{file.name}.aside")
        self._set_aside()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            self._check_file()
            # Several API processes share the file. A transaction that began as a reader could not
            # become a writer while another one writes.
            self._db.execute("BEGIN IMMEDIATE")
            with on_failure(self._roll_back):
                yield self._db
                self._db.execute("COMMIT")

    def _roll_back(self) -> None:
        # A full disk may have ended the transaction. Where it has not, one that could not be
        # committed would be in the way of all later ones.
        if self._db.in_transaction:
            self._db.execute("ROLLBACK")

    def _check_file(self) -> None:
        """SQLite goes on writing to a file that has no name any more. No later start would find
        what was acknowledged.
        """
        try:
            there = self._file.stat().st_ino == self._inode
        except FileNotFoundError:
            there = False
        if not there:
            raise sqlite3.OperationalError(
                f"{self._file} was removed or replaced while the server ran. Put it back, or start "
                "the server anew"
            )

    def _rows(self, query: str, *values: object) -> list[Any]:
        with self._lock:
            return self._db.execute(query, values).fetchall()

    def _clean(self) -> bool:
        """Leave nothing in the log of what was deleted; returns whether nobody was in the way."""
        with self._lock:
            self._db.execute(f"PRAGMA busy_timeout = {int(_CLEANING_WAITS_S * 1000)}")
            try:
                (busy, *_) = self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
            finally:
                self._db.execute(f"PRAGMA busy_timeout = {int(_WAITS_S * 1000)}")
            return not busy

    def about(self, name: str, value: str) -> str:
        """What was noted under ``name`` first: ``value`` where it is this."""
        with self._writing() as db:
            db.execute("INSERT OR IGNORE INTO about VALUES (?, ?)", (name, value))
            return str(db.execute("SELECT value FROM about WHERE name = ?", (name,)).fetchone()[0])

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._db.close()

    def _write_though_full(self, work: Callable[[sqlite3.Connection], object]) -> None:
        """Have ``work`` write a little, on a full disk as well."""
        try:
            with self._writing() as db:
                work(db)
        except sqlite3.OperationalError as full:
            if not is_full(full) or not self._aside.exists():
                raise
            self._aside.unlink(missing_ok=True)
            with self._writing() as db:
                work(db)
        finally:
            self._set_aside()

    def _set_aside(self) -> None:
        """Take as much disk as there is, up to what the end of a job needs by far."""
        size = _SET_ASIDE
        if self._aside.exists():
            return
        with contextlib.suppress(OSError), self._aside.open("wb") as file:
            while size >= 1 << 12:
                try:
                    os.posix_fallocate(file.fileno(), 0, size)
                    return
                except OSError:  # full but for less
                    size //= 2
            self._aside.unlink()  # or an empty one would pass for room
