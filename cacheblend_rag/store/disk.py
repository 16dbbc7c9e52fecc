"""Chunks on disk, one file each, shared by processes and kept across restarts.

::

    <folder>/cacheblend-store.json                        marks the folder as ours
    <folder>/index.sqlite                                 what is there and how much it is used
    <folder>/v3/<namespace>/<key[:2]>/<key>.safetensors   one chunk (.sealed if encrypted)
    <folder>/v3/<namespace>/<key[:2]>/<key>.corrupt-<n>   one that failed its check
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import re
import stat
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from threading import Lock

from cacheblend_rag.errors import StoreError, UnavailableError
from cacheblend_rag.store.base import (
    NO_ROOM,
    NOT_FINITE,
    Changes,
    ChunkInfo,
    ChunkKV,
    Found,
    StoreStats,
    ask,
    check_key,
)
from cacheblend_rag.store.catalog import Catalog, opened
from cacheblend_rag.store.chunk_file import Encoding, decode, encode, possible_sizes
from cacheblend_rag.store.counts import EventCounts, found_within
from cacheblend_rag.store.disk_documents import DiskDocuments
from cacheblend_rag.store.evict import Policy, recompute_cost
from cacheblend_rag.store.files import (
    allow,
    atomic_file,
    explained,
    fix_of,
    is_no_file,
    make_folder,
    write_all,
)
from cacheblend_rag.store.index import Limits
from cacheblend_rag.store.marker import MARKER, VERSION, check_writable, claim
from cacheblend_rag.store.parallel import Readers
from cacheblend_rag.store.source import BytesSource, DamagedFileError, FileSource

__all__ = ["MARKER", "DiskStore"]

_NAMESPACE = re.compile("[a-z0-9-]{1,100}")
_PLAIN = Encoding()
_READERS = 8
_TRIES = 3
_FULL = {errno.ENOSPC, errno.EDQUOT}


class DiskStore(DiskDocuments):
    """One file per chunk below ``folder``, safetensors unless encrypted.

    Several stores, also of several processes, may share a folder. Where a file stands that has the
    right size, ``put`` trusts it; a damaged one is found by the next ``get``. ``stats()`` describes
    the namespace.

    Args:
        folder: made where it does not exist.
        namespace: keeps what differs by model apart.
        capacity_bytes: for the whole folder, so that chunks of a model no longer used leave first.
        quota_bytes: for this namespace.
        policy: what leaves first, for all processes on the folder; None: as it was (at first GDSF).
        encoding: eight bits, encryption. What is encoded differently is kept apart.

    Raises:
        StoreError: the folder cannot be used, with the fix in the message.
    """

    def __init__(
        self,
        folder: Path,
        *,
        namespace: str,
        capacity_bytes: int | None = None,
        quota_bytes: int | None = None,
        policy: Policy | None = None,
        encoding: Encoding = _PLAIN,
    ) -> None:
        if not _NAMESPACE.fullmatch(namespace):
            raise ValueError(f"A namespace is 1 to 100 of a-z, 0-9 and -, not {namespace!r}")
        for name, size in (("capacity_bytes", capacity_bytes), ("quota_bytes", quota_bytes)):
            if size is not None and size <= 0:
                raise ValueError(f"{name} must be positive, not {size}")
        self._folder, self._encoding = folder, encoding
        self.namespace = namespace + encoding.folder_suffix
        self._limits = Limits(capacity_bytes, quota_bytes)
        self._pins: Counter[bytes] = Counter()
        # Pins are of this object only, not in the index: a process that dies would leave them there
        # for ever.
        self._pins_lock, self._setting_aside = Lock(), Lock()
        self._counts, self._readers = EventCounts("disk"), Readers(_READERS)
        with explained(folder):
            claim(folder)
            home = folder / VERSION / self.namespace
            allow(folder / VERSION, folder)
            is_writable = _is_writable(self._folder, home)
            self._catalog = Catalog(folder, self.namespace, encoding, policy)
            # Of all namespaces, since their chunks count in the folder's capacity as well.
            self.recovery = self._catalog.recover()
            # A folder that can only be read, as in an image, is also opened above its capacity.
            if is_writable:
                self._counts.add("evictions", self._catalog.trim(self._limits)[self.namespace])

    def contains(self, key: str) -> bool:
        path = self._path(key)
        try:
            # By the file, not the index: one call, which waits for no other process and is right
            # after damage.
            return stat.S_ISREG(os.stat(path).st_mode)
        except OSError as error:
            if is_no_file(error):
                return False
            raise self._unreadable(error) from error

    def get(self, key: str) -> ChunkKV | None:
        path = self._path(key)
        with self._counts.loading() as load:
            load.chunk = self._read(key, path)
        return load.chunk

    def get_many(self, keys: Sequence[str]) -> Found:
        return Found.of(keys, self._readers.map(partial(ask, self.get), keys))

    def get_in_time(self, keys: Sequence[str], within_s: float) -> Found:
        return found_within(self._readers, self.get, keys, within_s, self._counts)

    def put(self, key: str, chunk: ChunkKV) -> str:
        path = self._path(key)
        sizes = possible_sizes(key, chunk, self._encoding)
        if not chunk.is_finite:
            self._counts.add("corrupt")
            return NOT_FINITE
        with explained(self._folder):
            for _ in range(_TRIES):
                # A file of the right size is trusted here: to read gigabytes at each ingestion that
                # is repeated would cost more than to find a damaged one when it is read.
                kept = self._kept_bytes(path, sizes)
                if kept is None and not self._has_room(key, chunk, max(sizes)):
                    return NO_ROOM
                nbytes = self._write(path, chunk) if kept is None else kept
                if self._catalog.note(ChunkInfo.of(key, chunk), nbytes, is_new=kept is None):
                    break  # else another process forgot it meanwhile, which came first then
        return ""

    @property
    def bandwidth(self) -> float | None:
        return self._counts.bandwidth

    def discard(self, key: str) -> None:
        path = self._path(key)
        with explained(self._folder):
            # The file goes first. An entry without a file is dropped when it is met; a file without
            # an entry would be adopted at the next opening, and forgotten text would be back.
            self._catalog.erase(path.stem)
            self._catalog.note_soon(key)

    def touch(self, key: str) -> None:
        _mark_used(self._path(key))
        self._catalog.note_later(key)

    @contextlib.contextmanager
    def pinned(self, keys: Iterable[str]) -> Iterator[None]:
        raw = [bytes.fromhex(key) for key in keys]
        with self._pins_lock:
            self._pins.update(raw)
        try:
            yield
        finally:
            with self._pins_lock:
                self._pins -= Counter(raw)  # drops what reaches zero

    def scan(self) -> Iterator[ChunkInfo]:
        for _, info in self.scan_after(0):
            yield info

    def scan_after(self, number: int) -> Iterator[tuple[int, ChunkInfo]]:
        """As ``scan``, but only what was put, by any process, after the chunk of that number; each
        with its own number. Keep the last one to ask for what is new.
        """
        with explained(self._folder):
            yield from self._catalog.infos(number)

    def changes(self, cursor: object) -> Changes:
        try:
            with explained(self._folder):
                return self._catalog.changes(cursor)
        except StoreError as error:
            raise UnavailableError(str(error)) from error

    def stats(self) -> StoreStats:
        with explained(self._folder):
            self._catalog.settle()
            chunks, nbytes = self._catalog.index.totals(self.namespace)
        return self._counts.stats(chunks=chunks, nbytes=nbytes)

    def verify(self) -> Iterator[tuple[str, bool]]:
        """Read every chunk of the namespace; whether each is intact. Damaged ones are set aside.

        Raises:
            UnavailableError: some cannot be read now, which says nothing of them; at the end.
        """
        failed: UnavailableError | None = None
        for key in self._catalog.all_keys():
            path = self._path(key)
            read = ask(lambda key, path=path: self._read(key, path, is_use=False), key)  # type: ignore[misc]
            if isinstance(read, UnavailableError):
                failed = failed or read
            elif read is not None or _is_damaged(path):
                yield key, read is not None
        if failed is not None:
            raise failed

    def files(self) -> Iterator[tuple[str, bytes]]:
        """Name and content of the file of every intact chunk of the namespace. Warns where one
        cannot be read now.
        """
        for key in self._catalog.all_keys():
            path = self._path(key)
            try:
                data = path.read_bytes()
                # Checked on the way out, or an archive would carry damage to another machine.
                decode(BytesSource(data), key, self._encoding.cipher)
            except DamagedFileError:
                continue  # ``verify`` tells and sets aside
            except OSError as error:
                if not is_no_file(error):
                    self._unreadable(error)
                continue
            yield path.name, data

    def put_file(self, key: str, data: bytes) -> bool:
        """Keep a chunk given as its file; False where that is not intact, or there is no room."""
        path = self._path(key)
        try:
            # What an archive holds is from elsewhere: it passes every check before it gets a name
            # here.
            chunk = decode(BytesSource(data), key, self._encoding.cipher)
        except DamagedFileError:
            return False
        with explained(self._folder):
            if not self._has_room(key, chunk, len(data)):
                return False
            self._make_shard(path)
            with atomic_file(path) as descriptor:
                write_all(descriptor, data)
            self._catalog.note(ChunkInfo.of(key, chunk), len(data), is_new=True)
        return True

    def discard_corrupt(self) -> int:
        """Remove what was set aside in this namespace: how many."""
        with explained(self._folder):
            return self._catalog.discard_corrupt()

    def trim(self, capacity_bytes: int) -> int:
        """Evict, whatever the namespace, until the folder holds that much; how many left."""
        with explained(self._folder):
            self._catalog.measure()
            return self._catalog.trim(Limits(capacity_bytes, None)).total()

    def close(self) -> None:
        self._readers.close()
        self._catalog.close()

    # ---- one chunk -----------------------------------------------------------------------------

    def _path(self, key: str) -> Path:
        check_key(key)
        return self._catalog.path(key)

    def _read(self, key: str, path: Path, *, is_use: bool = True) -> ChunkKV | None:
        try:
            with opened(path) as descriptor:
                chunk = self._read_open(key, path, descriptor)
                if chunk is not None and is_use:
                    _mark_used(descriptor)
        except OSError as error:
            if is_no_file(error):
                return None
            raise self._unreadable(error) from error
        if chunk is not None and is_use:
            self._catalog.note_later(key)
        return chunk

    def _unreadable(self, error: OSError) -> UnavailableError:
        """Not the chunk's fault (permission, open files), so it stays where it is."""
        problem = f"Chunks in {self._folder} cannot be read ({error.strerror})"
        warnings.warn(f"{problem}; they are recomputed.", RuntimeWarning, stacklevel=4)
        return UnavailableError(f"{problem}. Check the disk and who may read there.")

    def _read_open(self, key: str, path: Path, descriptor: int) -> ChunkKV | None:
        try:
            return decode(FileSource(descriptor), key, self._encoding.cipher)
        except DamagedFileError:
            # Where we may not rename it, it stays and fails its check again.
            with contextlib.suppress(OSError):
                self._set_aside(path, os.fstat(descriptor))
            return None

    def _write(self, path: Path, chunk: ChunkKV) -> int:
        self._make_shard(path)
        with atomic_file(path) as descriptor:
            nbytes = 0
            for part in encode(path.stem, chunk, self._encoding):
                write_all(descriptor, part)
                nbytes += len(part)
            _mark_used(descriptor)
        self._counts.wrote(chunk.nbytes)
        return nbytes

    def _make_shard(self, path: Path) -> None:
        if not (self._folder / MARKER).exists():  # it was emptied
            claim(self._folder, again=True)
        make_folder(path.parent)

    def _kept_bytes(self, path: Path, sizes: set[int]) -> int | None:
        """Size of the file that can be left as it is; what cannot be the chunk is set aside."""
        try:
            with opened(path) as descriptor:
                found = os.fstat(descriptor)
                if stat.S_ISREG(found.st_mode) and found.st_size in sizes:
                    _mark_used(descriptor)
                    return found.st_size
                self._set_aside(path, found)
        except OSError as error:
            if not is_no_file(error):
                raise
        return None

    def _has_room(self, key: str, chunk: ChunkKV, nbytes: int) -> bool:
        cost = recompute_cost(len(chunk.token_ids))
        with self._pins_lock:
            pins = set(self._pins)
        evicted = self._catalog.make_room(key, nbytes, cost, self._limits, pins)
        # what left another namespace is none of this one's business
        self._counts.add("evictions", 1 if evicted is None else evicted[self.namespace])
        return evicted is not None

    def _set_aside(self, path: Path, damaged: os.stat_result) -> None:
        with self._setting_aside:
            # Another reader may have set it aside and a writer put an intact one in its place.
            if os.path.samestat(os.stat(path), damaged):
                self._counts.add("corrupt")
                os.rename(path, _free_name(path))
                self._catalog.note_later(path.stem)
                self._catalog.bound_corrupt(self._limits)


def _is_writable(folder: Path, home: Path) -> bool:
    """Whether chunks can be put; where there may be some already, they can be read if not."""
    try:
        make_folder(home)
        check_writable(home)
    except OSError as error:
        if not (home.is_dir() or error.errno in _FULL):
            raise
        problem = f"The chunk store {folder} cannot be written ({error.strerror})"
        warnings.warn(
            f"{problem}: what it holds is read, nothing is added. {fix_of(error)}",
            RuntimeWarning,
            stacklevel=3,
        )
        return False
    return True


def _is_damaged(path: Path) -> bool:
    """Whether what could not be read is still there or was set aside, rather than evicted."""
    return path.exists() or path.with_name(f"{path.stem}.corrupt-1").exists()


def _mark_used(file: int | Path) -> None:
    # The file's own time, so that an index that is made anew knows which chunks were used last.
    now = time.time_ns()  # the kernel's own stamp is too coarse to order two uses
    with contextlib.suppress(OSError):  # gone, or another user's: it keeps its place
        os.utime(file, ns=(now, now))


def _free_name(path: Path) -> Path:
    names = (path.with_name(f"{path.stem}.corrupt-{n}") for n in itertools.count(1))
    return next(name for name in names if not os.path.lexists(name))
