"""How much a store folder may hold, and which files leave first."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from threading import Lock
from typing import NamedTuple

from cacheblend_rag.store.files import TEMPORARY_SUFFIX, entries


class StoredFile(NamedTuple):
    """A file below the folder."""

    used_ns: int  # first, so that sorting puts the least recently used first
    path: str
    nbytes: int


class Quota:
    """Keeps ``<folder>/<namespace>/<shard>/<file>`` under ``capacity_bytes`` in all.

    The time of last use is the modification time, which the store sets on every hit: the access
    time also changes when a backup or a scan reads the file. Listing the folder is the slow part,
    so a full folder is emptied to 95 %, and listed again only after 5 % more was written. Other
    processes on the same folder do likewise: together they may exceed it by 5 % each for a while.
    """

    def __init__(self, folder: Path, capacity_bytes: int) -> None:
        if capacity_bytes <= 0:
            raise ValueError(f"capacity_bytes must be positive, not {capacity_bytes}")
        self.capacity = capacity_bytes
        self._folder = folder
        self._slack = capacity_bytes // 20
        self._unlisted = 0  # bytes that may be written before the folder is listed again
        self._lock = Lock()

    def make_room(self, nbytes: int) -> int:
        """Make room for ``nbytes`` more, at most the capacity; the number of files evicted."""
        with self._lock:
            if nbytes <= self._unlisted:
                self._unlisted -= nbytes
                return 0
            return self._evict(nbytes)

    def _evict(self, nbytes: int) -> int:
        files = sorted(_files(self._folder))
        used = sum(file.nbytes for file in files)
        goal = used if used + nbytes <= self.capacity else self.capacity - self._slack - nbytes
        num_evicted = 0
        for file in files:
            if used <= goal:
                break
            if not file.path.endswith(TEMPORARY_SUFFIX):
                _unlink(file.path)
                used -= file.nbytes
                num_evicted += 1
        self._unlisted = min(self._slack, self.capacity - used - nbytes)
        return num_evicted


def _files(folder: Path) -> Iterator[StoredFile]:
    for namespace in entries(folder):
        for shard in entries(namespace.path):
            for entry in entries(shard.path):
                with contextlib.suppress(FileNotFoundError):  # gone since it was listed
                    if entry.is_file(follow_symlinks=False):
                        found = entry.stat(follow_symlinks=False)
                        yield StoredFile(found.st_mtime_ns, entry.path, found.st_size)


def _unlink(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):  # another process was quicker
        os.unlink(path)
