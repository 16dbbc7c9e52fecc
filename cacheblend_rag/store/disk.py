"""Chunks on disk, one file each, shared by processes and kept across restarts.

::

    <folder>/cacheblend-store.json                        marks the folder as ours
    <folder>/v1/<namespace>/<key[:2]>/<key>.safetensors   one chunk
    <folder>/v1/<namespace>/<key[:2]>/<key>.corrupt-<n>   one that failed its check
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import stat
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from threading import Lock

from cacheblend_rag.errors import StoreError
from cacheblend_rag.store.base import ChunkInfo, ChunkKV, KVStore, StoreStats, check_key
from cacheblend_rag.store.chunk_file import (
    DamagedFileError,
    header_of,
    read_chunk,
    read_info,
    write_chunk,
)
from cacheblend_rag.store.counts import EventCounts
from cacheblend_rag.store.files import (
    TEMPORARY_SUFFIX,
    atomic_file,
    entries,
    explained,
    make_folder,
    remove_abandoned,
    write_all,
)
from cacheblend_rag.store.quota import Quota

MARKER = "cacheblend-store.json"
SUFFIX = ".safetensors"

_MARK = {"format": 1, "made_by": "cacheblend-rag"}
_NAMESPACE = re.compile("[a-z0-9-]{1,100}")
_CHUNK_NAME = re.compile(rf"([0-9a-f]{{64}}){re.escape(SUFFIX)}")


class DiskStore(KVStore):
    """One safetensors file per chunk below ``folder``.

    Several stores, also of several processes, may share a folder. ``namespace`` keeps what differs
    by model or rank apart; ``capacity_bytes`` is for the whole folder, so that chunks of a model no
    longer used leave first. Where a file stands that has the right size, ``put`` trusts it; a
    damaged one is found by the next ``get``. ``stats()`` lists the namespace.

    Raises:
        StoreError: the folder cannot be used, with the fix in the message.
    """

    def __init__(self, folder: Path, *, namespace: str, capacity_bytes: int | None = None) -> None:
        if not _NAMESPACE.fullmatch(namespace):
            raise ValueError(f"A namespace is 1 to 100 of a-z, 0-9 and -, not {namespace!r}")
        self._folder = folder
        self._home = folder / "v1" / namespace
        self._quota = None if capacity_bytes is None else Quota(folder / "v1", capacity_bytes)
        self._counts = EventCounts()
        self._setting_aside = Lock()
        with explained(folder):
            _claim(folder)
            make_folder(self._home)
            _check_writable(self._home)
            _clean_up(folder)

    def contains(self, key: str) -> bool:
        return os.path.isfile(self._path(key))

    def get(self, key: str) -> ChunkKV | None:
        chunk = self._read(self._path(key))
        self._counts.add("misses" if chunk is None else "hits")
        return chunk

    def put(self, key: str, chunk: ChunkKV) -> None:
        path = self._path(key)
        nbytes = header_of(key, chunk).file_bytes
        with explained(self._folder):
            if not self._is_kept(path, nbytes) and self._has_room(nbytes):
                make_folder(path.parent)
                with atomic_file(path) as descriptor:
                    write_chunk(descriptor, key, chunk)
                    _mark_used(descriptor)

    def discard(self, key: str) -> None:
        path = self._path(key)
        with explained(self._folder):
            path.unlink(missing_ok=True)

    def touch(self, key: str) -> None:
        _mark_used(self._path(key))

    def scan(self) -> Iterator[ChunkInfo]:
        for entry in self._chunk_entries():
            try:
                with _opened(entry.path) as descriptor:
                    info = read_info(descriptor, entry.name.removesuffix(SUFFIX))
            except (OSError, DamagedFileError):
                continue
            yield info

    def stats(self) -> StoreStats:
        sizes: list[int] = []
        for entry in self._chunk_entries():
            with contextlib.suppress(FileNotFoundError):  # gone since it was listed
                sizes.append(entry.stat().st_size)
        return self._counts.stats(chunks=len(sizes), nbytes=sum(sizes))

    def _path(self, key: str) -> Path:
        check_key(key)
        return self._home / key[:2] / f"{key}{SUFFIX}"

    def _chunk_entries(self) -> Iterator[os.DirEntry[str]]:
        for shard in entries(self._home):
            for entry in entries(shard.path):
                if _CHUNK_NAME.fullmatch(entry.name) and entry.is_file():
                    yield entry

    def _read(self, path: Path) -> ChunkKV | None:
        try:
            with _opened(path) as descriptor:
                return self._read_open(path, descriptor)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            # Not the chunk's fault (permission, open files), so it stays where it is.
            problem = f"Chunks in {self._folder} cannot be read ({error.strerror})"
            warnings.warn(f"{problem}; they are recomputed.", RuntimeWarning, stacklevel=3)
            return None

    def _read_open(self, path: Path, descriptor: int) -> ChunkKV | None:
        try:
            chunk = read_chunk(descriptor, path.stem)
        except DamagedFileError:
            # Where we may not rename it, it stays and fails its check again.
            with contextlib.suppress(OSError):
                self._set_aside(path, os.fstat(descriptor))
            return None
        _mark_used(descriptor)
        return chunk

    def _is_kept(self, path: Path, nbytes: int) -> bool:
        """Whether the file can be left as it is; what cannot be the chunk is set aside."""
        try:
            with _opened(path) as descriptor:
                found = os.fstat(descriptor)
                if stat.S_ISREG(found.st_mode) and found.st_size == nbytes:
                    _mark_used(descriptor)
                    return True
                self._set_aside(path, found)
        except FileNotFoundError:
            pass
        return False

    def _has_room(self, nbytes: int) -> bool:
        if self._quota is None:
            return True
        if nbytes > self._quota.capacity:
            self._counts.add("evictions")
            return False
        self._counts.add("evictions", self._quota.make_room(nbytes))
        return True

    def _set_aside(self, path: Path, damaged: os.stat_result) -> None:
        with self._setting_aside:
            # Another reader may have set it aside and a writer put an intact one in its place.
            if os.path.samestat(os.stat(path), damaged):
                self._counts.add("corrupt")
                os.rename(path, _free_name(path))


def _claim(folder: Path) -> None:
    """Mark an empty folder as ours, or check that it is.

    Raises:
        StoreError: it holds something else, or another format.
    """
    make_folder(folder)
    marker = folder / MARKER
    if not marker.exists():
        # Listed first, then asked again: another process may be claiming the folder just now.
        if any(_is_foreign(name) for name in os.listdir(folder)) and not marker.exists():
            raise StoreError(
                f"{folder} holds files but no {MARKER}, so it is not a chunk store. "
                "Choose an empty or a new folder."
            )
        with atomic_file(marker) as descriptor:
            write_all(descriptor, json.dumps(_MARK).encode())
    if _read_marker(marker) != _MARK:
        raise StoreError(
            f"{marker} is damaged or of another version of cacheblend-rag (expected "
            f"{json.dumps(_MARK)}). Choose another folder, or delete this one: it is only a cache."
        )


def _is_foreign(name: str) -> bool:
    return name != "lost+found" and not name.endswith(TEMPORARY_SUFFIX)


def _read_marker(marker: Path) -> object:
    try:
        mark: object = json.loads(marker.read_bytes())
    except (ValueError, RecursionError):
        return None
    return mark


def _check_writable(folder: Path) -> None:
    with tempfile.TemporaryFile(dir=folder):
        pass


def _clean_up(folder: Path) -> None:
    for namespace in entries(folder / "v1"):
        for shard in entries(namespace.path):
            remove_abandoned(shard.path)


@contextlib.contextmanager
def _opened(path: str | Path) -> Iterator[int]:
    # O_NONBLOCK: a named pipe in the place of a file must not hang us.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _mark_used(file: int | Path) -> None:
    now = time.time_ns()  # the kernel's own stamp is too coarse to order two uses
    with contextlib.suppress(OSError):  # gone, or another user's: it keeps its place
        os.utime(file, ns=(now, now))


def _free_name(path: Path) -> Path:
    names = (path.with_name(f"{path.stem}.corrupt-{n}") for n in itertools.count(1))
    return next(name for name in names if not os.path.lexists(name))
