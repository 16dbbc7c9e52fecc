"""Files that appear whole or not at all, and what to do when the disk refuses."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import sqlite3
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

from cacheblend_rag.errors import StoreError

TEMPORARY_SUFFIX = ".tmp"

_OTHER_FOLDER = "or choose another folder for the store"
_FIXES = {
    errno.ENOSPC: f"Free disk space, lower the store's capacity, {_OTHER_FOLDER}.",
    errno.EDQUOT: f"Raise the disk quota, lower the store's capacity, {_OTHER_FOLDER}.",
    errno.EFBIG: f"Raise the file size limit (ulimit -f), {_OTHER_FOLDER}.",
    errno.EACCES: f"Give this user read and write permission there, {_OTHER_FOLDER}.",
    errno.EPERM: f"Give this user read and write permission there, {_OTHER_FOLDER}.",
    errno.EROFS: f"Mount it writable, {_OTHER_FOLDER}.",
    errno.EEXIST: f"A file stands where a folder belongs: remove it, {_OTHER_FOLDER}.",
    errno.ENOTDIR: f"A file stands where a folder belongs: remove it, {_OTHER_FOLDER}.",
    errno.EBUSY: "Another process holds it: end that one if it hangs, and try again.",
    errno.EMFILE: "Raise the limit on open files (ulimit -n).",
}

_ERRNO_OF_SQLITE = {
    sqlite3.SQLITE_BUSY: errno.EBUSY,
    sqlite3.SQLITE_FULL: errno.ENOSPC,
    sqlite3.SQLITE_READONLY: errno.EACCES,
    sqlite3.SQLITE_PERM: errno.EACCES,
    sqlite3.SQLITE_CANTOPEN: errno.EACCES,
}

# What stands there, if anything, can't be opened and never held a chunk: nothing, a socket, a
# device, a link to itself.
_NO_FILE = {errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENXIO, errno.ENODEV}

# modes of a file and of a folder; a shared folder hands its group on
_OF_OWNER = (0o600, 0o700)
_OF_GROUP = (0o660, 0o2770)

# An abandoned temporary is unlocked. The grace covers the moment between creating and locking one;
# the long limit is for filesystems that cannot lock.
_GRACE_SECONDS = 60
_UNLOCKABLE_SECONDS = 3600


@contextlib.contextmanager
def explained(folder: Path) -> Iterator[None]:
    """Turn a failure of the disk inside the block into a StoreError about ``folder`` that says how
    to fix it.

    Raises:
        StoreError: the block raised an OSError.
    """
    try:
        yield
    except OSError as error:
        problem = f"Cannot use the chunk store {folder}: {error.strerror or error}."
        raise StoreError(f"{problem} {fix_of(error)}") from error


def fix_of(error: Exception) -> str:
    """What to do about a failure of the disk or of SQLite."""
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    number = error.errno if isinstance(error, OSError) else _ERRNO_OF_SQLITE.get(code)
    return _FIXES.get(number or 0, f"Check the disk, {_OTHER_FOLDER}.")


def is_no_file(error: OSError) -> bool:
    """Whether what could not be opened is no file, rather than one that cannot be had just now."""
    return error.errno in _NO_FILE


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[int]:
    """Descriptor of a new file that takes the name ``path``, durably, when the block succeeds.

    Until then it has a temporary name in the same folder, locked so that ``remove_abandoned``
    knows its writer lives. When the block raises, nothing is left.
    """
    temporary = path.with_name(f".{path.stem}.{uuid4().hex}{TEMPORARY_SUFFIX}")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    descriptor = os.open(temporary, flags, stat.S_IRUSR | stat.S_IWUSR)
    try:
        allow(descriptor, path.parent)
        with contextlib.suppress(OSError):  # no locks on this filesystem: age decides there
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Locked for as long as the writer lives: the kernel lets go of a lock with the process,
        # whatever ends it, so others can tell an unfinished file from an abandoned one.
        yield descriptor
        # Content before name, name before folder: after a power cut the name stands for all of it
        # or nothing.
        os.fsync(descriptor)
        os.replace(temporary, path)
    finally:
        os.close(descriptor)
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def write_all(descriptor: int, data: bytes | memoryview) -> None:
    """Write every byte; one ``os.write`` stops at 2 GiB or earlier."""
    left = memoryview(data)
    while left:
        left = left[os.write(descriptor, left) :]


def make_folder(folder: Path) -> None:
    """Create ``folder`` and its parents durably; does nothing where it exists."""
    if folder.is_dir():
        return
    make_folder(folder.parent)
    folder.mkdir(mode=stat.S_IRWXU, exist_ok=True)
    allow(folder, folder.parent)
    sync_folder(folder.parent)


def allow(made: int | Path, folder: Path) -> None:
    """Let the group use what was made in a ``folder`` that is the group's; else only its owner."""
    try:
        about, mode = os.stat(made), os.stat(folder).st_mode
        is_shared = mode & stat.S_ISGID and mode & stat.S_IWGRP
        allowed = _OF_GROUP if is_shared else _OF_OWNER
        if stat.S_IMODE(about.st_mode) != (wanted := allowed[stat.S_ISDIR(about.st_mode)]):
            os.chmod(made, wanted)
    except OSError:  # another user's, who decides, or cannot be changed
        pass


def sync_folder(folder: Path) -> None:
    """Make the names in ``folder`` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def entries(folder: str | Path) -> list[os.DirEntry[str]]:
    """What ``folder`` holds now; nothing where it vanished, is no folder or is closed to us."""
    try:
        with os.scandir(folder) as found:
            return list(found)
    except PermissionError:
        return []
    except OSError as error:
        if is_no_file(error):
            return []
        raise


def remove_abandoned(folder: str | Path) -> int:
    """Remove the temporaries that dead writers left in ``folder``: how many."""
    count = 0
    for entry in entries(folder):
        if entry.name.endswith(TEMPORARY_SUFFIX) and is_abandoned(entry.path):
            with contextlib.suppress(OSError):  # gone, not ours, or read only
                os.unlink(entry.path)
                count += 1
    return count


def is_abandoned(path: str) -> bool:
    """Whether the writer of this temporary is dead."""
    try:
        # A named pipe in its place must not hang us.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return False  # finished meanwhile, or not ours to judge
    try:
        found = os.fstat(descriptor)
        # In both directions of a clock that jumps: a file from the future is not old, and stays a
        # while.
        age = time.time() - found.st_mtime
        is_old = stat.S_ISREG(found.st_mode) and age > _GRACE_SECONDS
        return is_old and _is_unlocked(descriptor, age)
    finally:
        os.close(descriptor)


def _is_unlocked(descriptor: int, age: float) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False  # its writer lives
    except OSError:
        return age > _UNLOCKABLE_SECONDS
    return True
