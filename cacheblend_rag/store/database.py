"""The SQLite file of a store folder, which may fail at any time without failing the store.

The chunks' files are the truth, so there is always a next best database: the file as it is, the
file made anew where it is damaged, a copy of it in memory where it cannot be written (locked, full,
read only), and an empty one in memory. What uses it does not see which one that is.

SQLite keeps in a process's memory which locks that process has on a file, and a fork copies this
note but not the locks. A child that then opens the same file, by whatever connection, relies on
locks that it has not. So no file is open while the process forks: see ``_before_fork``.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import sqlite3
import time
import warnings
import weakref
from collections.abc import Callable, Iterator
from enum import IntEnum
from functools import partial
from pathlib import Path
from threading import Lock, RLock
from typing import TypeVar

from cacheblend_rag.errors import StoreError
from cacheblend_rag.store.files import allow, fix_of
from cacheblend_rag.store.marker import claim
from cacheblend_rag.undo import on_failure

Result = TypeVar("Result")

NAME = "index.sqlite"
TIMEOUT_S = 5.0  # how long a write waits for another process; a transaction takes milliseconds
_OPENING_S = 1.0  # how long opening waits
_RETURNING_S = 0.05  # and coming back to a file that could not be used
_SOON_S = 0.05
_PAUSE_S = 0.005  # between two tries while another process writes
_AWAY_S = 5.0  # until a file that could not be used is tried again
_GOODBYE_S = 1.0
_LARGEST_VALUE = 64 << 20
_REFUSALS = {
    sqlite3.SQLITE_BUSY,
    sqlite3.SQLITE_LOCKED,
    sqlite3.SQLITE_PERM,
    sqlite3.SQLITE_NOMEM,
    sqlite3.SQLITE_READONLY,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_PROTOCOL,
    sqlite3.SQLITE_NOLFS,
    sqlite3.SQLITE_AUTH,
}


class BusyError(Exception):
    """Another process or thread writes, and the caller does not want to wait."""


class _Rung(IntEnum):
    FOUND = 0  # the file as it is
    ANEW = 1  # the file, made anew
    COPY = 2  # a copy of it in memory
    EMPTY = 3  # in memory, filled from the chunks' files


class Database:
    """Runs work on the best database there is. May be used from several threads and processes.

    Args:
        folder: an existing folder.
        prepare: run in a transaction on what was opened: makes the tables, or raises
            sqlite3.DatabaseError where they are not as they should be.
        fill: called when another database was taken, which may lack anything.
    """

    def __init__(
        self,
        folder: Path,
        prepare: Callable[[sqlite3.Connection], None],
        fill: Callable[[], object],
    ) -> None:
        self._folder, self._path = folder, folder.absolute() / NAME
        self._prepare, self._fill = prepare, fill
        self._lock = RLock()
        self._owed: list[Callable[[sqlite3.Connection], object]] = []
        self._rung, self._retry_at = _Rung.FOUND, 0.0
        self.rebuilt = self._is_closed = False
        self._inode: tuple[int, int] | None = None  # of the file in use
        # By device and inode, not by name: another process may have made the file anew meanwhile,
        # and that one must not be deleted.
        self._damaged: tuple[int, int] | None = None
        self._schema = 0  # SQLite's own number of it, which every change raises
        self._pid = 0  # that opened what follows
        self._db: sqlite3.Connection | None = None
        self._is_paused = False
        _check_forks(self._path)
        _databases.add(self)
        with self._lock:
            if (error := self._why_not(_Rung.FOUND)) is not None:
                self._step_down(error)

    def read(self, work: Callable[[sqlite3.Connection], Result]) -> Result:
        """``work`` of the database, which it only reads; may be called twice."""
        return self._run(work, TIMEOUT_S, must=True)

    def write(
        self,
        work: Callable[[sqlite3.Connection], Result],
        *,
        owed: Callable[[sqlite3.Connection], object] | None = None,
    ) -> Result:
        """``work`` of the database as one transaction; may be called twice.

        Args:
            owed: what is to be done once the file can be written, where it cannot be now.
        """

        def run(db: sqlite3.Connection) -> Result:
            result = _in_transaction(work, db)
            # Done in the copy, which goes with this process: what must last is done again in the
            # file.
            if owed is not None and self._rung >= _Rung.COPY:
                self._owed.append(owed)
            return result

        return self._run(run, TIMEOUT_S, must=True)

    def write_soon(self, work: Callable[[sqlite3.Connection], Result]) -> Result:
        """As ``write``, waiting for others hardly at all.

        Raises:
            BusyError: another process or thread writes.
        """
        return self._run(partial(_in_transaction, work), _SOON_S, must=False)

    def clean(self) -> None:
        """Leave nothing on the disk of what was deleted, if nobody reads it just now."""
        with contextlib.suppress(sqlite3.Error):
            self.read(lambda db: db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone())

    def close(self) -> None:
        """Close the file; a second call does nothing, nor one while another thread hangs in it."""
        self._is_closed = True
        if self._lock.acquire(timeout=_GOODBYE_S):
            try:
                self._leave()
            finally:
                self._lock.release()

    # ---- forks ---------------------------------------------------------------------------------

    def pause(self) -> None:
        """Close the file once no thread uses it, and let none begin; the next use after ``resume``
        opens it again.
        """
        # Bounded: a thread may hang in a disk that hangs, and a fork must not wait for that. The
        # child is then told that it can't use this file.
        self._is_paused = self._lock.acquire(timeout=TIMEOUT_S)
        if self._is_paused and self._inode is not None and self._db is not None:
            self._db.close()
            self._db = None

    def resume(self, *, in_child: bool) -> None:
        """The other half of ``pause``, in both processes."""
        if self._is_paused:
            self._is_paused = False
            self._lock.release()
        # The lock was copied as it was held, by a thread that the child does not have.
        elif in_child:  # the thread that hangs in it is not here
            self._lock = RLock()
            _open_at_fork[self._path] = self._db  # kept: closing it might wait for that thread

    # ---- one piece of work ---------------------------------------------------------------------

    def _run(
        self, work: Callable[[sqlite3.Connection], Result], patience_s: float, *, must: bool
    ) -> Result:
        until = time.monotonic() + patience_s
        while True:
            # The lock is let go between two tries: who reads does not wait for who writes.
            left_s = max(until - time.monotonic(), 0)
            if not self._lock.acquire(timeout=-1 if must else left_s):
                raise BusyError
            try:
                return self._try(work, gives_up=must and not left_s)
            except BusyError:
                if not must and not left_s:
                    raise
            finally:
                self._lock.release()
            time.sleep(_PAUSE_S)

    def _try(self, work: Callable[[sqlite3.Connection], Result], *, gives_up: bool) -> Result:
        if self._is_closed:
            raise StoreError(f"The chunk store {self._folder} is closed. Open it again.")
        _check_forks(self._path)
        self._follow()
        while True:
            try:
                assert self._db is not None
                # One integer of the file's first page: cheap enough to ask before each piece of
                # work.
                if _schema_number(self._db) != self._schema:  # changed by something else
                    self._make_ready(self._db)
                result = work(self._db)
            except (OSError, StoreError):
                raise  # of a chunk's file
            # Whatever else it is came of this file: sqlite3's errors, and Python's own over values
            # of unexpected types or encodings in it. A fault of ours comes again in the next best
            # database, and is raised from the last one.
            except Exception as error:
                if _code(error) == sqlite3.SQLITE_BUSY and not gives_up:
                    raise BusyError from error
                self._step_down(error)
                self._fill()
            else:
                if self._rung is _Rung.ANEW:
                    self._rung = _Rung.FOUND
                return result

    def _follow(self) -> None:
        """Open the file again where it is another one by now, or may be used again."""
        left = self._rung if self._rung >= _Rung.COPY else None
        # A file that was deleted or replaced goes on to work for whoever has it open, unseen by all
        # others.
        is_same = self._pid == os.getpid() and self._inode == self._found_inode()
        if self._pid == os.getpid():
            if left is None and is_same and self._db is not None:
                return
            if left is not None and time.monotonic() < self._retry_at:
                return
        self._rung, self._retry_at = _Rung.FOUND, time.monotonic() + _AWAY_S
        error = self._why_not(_Rung.FOUND, _OPENING_S if left is None else _RETURNING_S)
        if error is not None:
            if left is not None and _is_refusal(error):  # the copy in memory goes on to serve
                self._rung = left
                return
            self._step_down(error)
        # Another file may lack what the chunks' files have.
        if not (is_same and left is None and self._rung is _Rung.FOUND):  # else it was paused
            self._fill()
        owed, self._owed = self._owed, []
        for work in owed:
            self.write(work, owed=work)

    # ---- which database ------------------------------------------------------------------------

    def _step_down(self, error: Exception) -> None:
        """Take the next best database, since this one raised ``error``."""
        reason = error
        while self._rung is not _Rung.EMPTY:
            self._rung = _below(self._rung, error)
            # The empty one in memory raises nothing but what no database could help.
            if (worse := self._why_not(self._rung)) is not None:
                error = worse
                continue
            self.rebuilt |= self._rung is not _Rung.COPY
            if self._rung >= _Rung.COPY:
                self._warn(reason)
            else:
                self._warn_of_damage(reason)
            return
        raise error

    def _why_not(self, rung: _Rung, patience_s: float = _OPENING_S) -> Exception | None:
        """Take this database, or say why it is of no use now. Whatever that is, there is a next
        best one, which warns, or says that it was rebuilt.
        """
        try:
            self._take(rung, patience_s)
        except Exception as error:
            return error
        return None

    def _take(self, rung: _Rung, patience_s: float) -> None:
        if self._inode is not None:
            # Before another one is opened: SQLite lets go what a process has locked and mapped of
            # a file where it opens two of one name.
            self._leave()
        if rung >= _Rung.COPY:
            db = _in_memory(self._path if rung is _Rung.COPY else None)
            self._make_ready(db)
            # Not all at once again: a disk that refused will refuse for a while, and each try costs
            # time.
            self._retry_at = time.monotonic() + _AWAY_S
        elif rung is _Rung.FOUND and self._found_inode() is not None:
            db = self._opened(patience_s)
        else:
            db = self._made_anew(patience_s)
        self._leave()  # what was in memory
        self._db, self._pid = db, os.getpid()
        self._inode = self._found_inode() if rung < _Rung.COPY else None

    def _leave(self) -> None:
        if self._db is not None and self._pid == os.getpid():
            self._db.close()
        self._db, self._inode = None, None

    def _opened(self, patience_s: float) -> sqlite3.Connection:
        self._damaged = self._found_inode()
        db = _connect(str(self._path), patience_s)
        with on_failure(db.close):
            allow(self._path, self._folder)
            _write_ahead(db, patience_s)
            db.execute("PRAGMA synchronous=NORMAL")  # after a power cut the last uses may be lost
            self._make_ready(db)
        return db

    def _made_anew(self, patience_s: float) -> sqlite3.Connection:
        claim(self._folder, again=True)
        # Two processes that find the same damage must not delete one another's new file.
        with _alone_in(self._folder):
            if self._found_inode() in (None, self._damaged):  # else another process was quicker
                # The log first: left behind, it would be replayed into the new file.
                for suffix in ("-journal", "-wal", "-shm", ""):
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(f"{self._path}{suffix}")
                os.close(os.open(self._path, os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
            return self._opened(patience_s)

    def _make_ready(self, db: sqlite3.Connection) -> None:
        with on_failure(db.close):
            _in_transaction(self._prepare, db)
            self._schema = _schema_number(db)
        # From here on ``_run`` waits. SQLite's own waiting would hold the connection, and all
        # readers of this process with it.
        db.execute("PRAGMA busy_timeout=0")

    def _found_inode(self) -> tuple[int, int] | None:
        try:
            found = os.stat(self._path)
        except OSError:
            return None
        return found.st_dev, found.st_ino

    def _warn(self, error: Exception) -> None:
        warnings.warn(
            f"The index of the chunk store {self._folder} cannot be used: {error}. The "
            f"store works without it and keeps notes on documents in memory. {fix_of(error)}",
            RuntimeWarning,
            stacklevel=2,
        )

    def _warn_of_damage(self, error: Exception) -> None:
        warnings.warn(
            f"The index of the chunk store {self._folder} was damaged ({error}) and is made anew "
            "from the chunks' files. Lost are how often chunks were used, and which documents they "
            "belong to: ingest these again before you forget them.",
            RuntimeWarning,
            stacklevel=2,
        )


_databases: weakref.WeakSet[Database] = weakref.WeakSet()
_open_at_fork: dict[Path, object] = {}  # in this process's parent: files that must not be used
_fork = Lock()  # one at a time
_paused: list[Database] = []


# Registered with ``os``, so it runs in whichever thread forks, for code of anybody.
def _before_fork() -> None:
    _fork.acquire()
    while new := set(_databases).difference(_paused):  # a thread may have opened another meanwhile
        for database in new:
            database.pause()
            _paused.append(database)


def _after_fork(*, in_child: bool) -> None:
    while _paused:
        _paused.pop().resume(in_child=in_child)
    _fork.release()


os.register_at_fork(
    before=_before_fork,
    after_in_parent=partial(_after_fork, in_child=False),
    after_in_child=partial(_after_fork, in_child=True),
)


def _check_forks(path: Path) -> None:
    if path in _open_at_fork:
        raise StoreError(
            f"{path} can't be used in this process: the process that forked it was using the file "
            f"for longer than {TIMEOUT_S:g} s, as on a disk that hangs. Start this process with "
            "multiprocessing.get_context('spawn'), or fork before the store is opened"
        )


def new_birth() -> int:
    """Tells an index from every other."""
    return secrets.randbelow(1 << 31)


def _below(rung: _Rung, error: Exception) -> _Rung:
    if rung < _Rung.COPY and _is_refusal(error):
        return _Rung.COPY
    return _Rung.ANEW if rung is _Rung.FOUND else _Rung.EMPTY


def _connect(name: str, patience_s: float, *, uri: bool = False) -> sqlite3.Connection:
    db = sqlite3.connect(
        name, timeout=patience_s, isolation_level=None, check_same_thread=False, uri=uri
    )
    # The file may be anybody's: a row that claims gigabytes must not take the process's memory, and
    # no view or trigger in it may run functions.
    db.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, _LARGEST_VALUE)
    for pragma in ("trusted_schema=OFF", "cell_size_check=ON", "mmap_size=0", "secure_delete=ON"):
        db.execute(f"PRAGMA {pragma}")
    return db


def _in_memory(copied: Path | None) -> sqlite3.Connection:
    db = _connect(":memory:", 0)
    if copied is None:
        return db
    for option in ("mode=ro", "immutable=1"):  # the second where not even a lock may be written
        try:
            source = _connect(f"{copied.as_uri()}?{option}", 0, uri=True)
            with contextlib.closing(source):
                source.backup(db)
            db.execute(f"PRAGMA user_version = {new_birth()}")  # its entries get numbers of its own
            return db
        except sqlite3.Error as error:
            reason = error
    db.close()
    raise reason


def _in_transaction(work: Callable[[sqlite3.Connection], Result], db: sqlite3.Connection) -> Result:
    # A transaction that begins as a reader cannot become a writer while another one writes: SQLite
    # refuses at once then, without waiting.
    db.execute("BEGIN IMMEDIATE")
    with on_failure(lambda: db.execute("ROLLBACK") if db.in_transaction else None):
        result = work(db)
        db.execute("COMMIT")
    return result


def _write_ahead(db: sqlite3.Connection, patience_s: float) -> None:
    """Switch to a write-ahead log. SQLite does not wait here for another that does so as well."""
    last = time.monotonic() + patience_s
    while True:
        try:
            db.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError as error:
            if _code(error) != sqlite3.SQLITE_BUSY or time.monotonic() > last:
                raise
        time.sleep(0.01)


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Keep others from making the index anew at the same time, where the file system has locks."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _schema_number(db: sqlite3.Connection) -> int:
    (number,) = db.execute("PRAGMA schema_version").fetchone()
    return int(number)


def _code(error: Exception) -> int:
    return getattr(error, "sqlite_errorcode", 0) & 0xFF


def _is_refusal(error: Exception) -> bool:
    """Whether the disk or another process refuses, rather than the file being damaged."""
    return isinstance(error, (OSError, StoreError, MemoryError)) or _code(error) in _REFUSALS
