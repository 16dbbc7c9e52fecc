"""Where the bytes of a stored chunk are read from: a file, memory, or either of them sealed."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import stat
from typing import Protocol

PAGE = 4096  # what a disk is read in directly: where in the file, where in memory, how much
_LARGE = 1 << 20  # less is not worth it
_DENSEST = 64  # times that a file system may have compressed KV
_STEP = 1 << 20  # of one call: the system prepares memory for the next while the disk fills this
_IS_LINUX = hasattr(os, "O_DIRECT") and hasattr(os, "RWF_NOWAIT")
_UNABLE = {errno.EAGAIN, errno.EINVAL, errno.EOPNOTSUPP}
_DAMAGE = {errno.EIO, errno.EISDIR}  # other failures to read are not the file's fault


class DamagedFileError(Exception):
    """It is not the chunk that was written under this key."""


class CutShortError(DamagedFileError):
    """There are fewer bytes than were asked for: of a part, the whole may be intact."""


class Source(Protocol):
    """A stream of known length."""

    @property
    def size(self) -> int:
        """Bytes from the start to the end."""

    def read_into(self, target: memoryview) -> None:
        """Fill ``target`` with the next bytes.

        Raises:
            DamagedFileError: there are fewer, or they cannot be what was written.
            OSError: they cannot be read now.
        """


class FileSource:
    """An open file, read from where it stands. Much at once comes from the page cache as far as it
    is there, and then straight from the disk, where the target lies as the file does: at the same
    distance from a multiple of ``PAGE``.
    """

    def __init__(self, descriptor: int) -> None:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise DamagedFileError("not a file")
        # A sparse file may declare terabytes and take one block of the disk.
        if found.st_size > _LARGE and found.st_blocks * 512 * _DENSEST < found.st_size:
            raise DamagedFileError("holes")  # as long as one likes, at no cost
        self.size = found.st_size
        self._descriptor = descriptor

    def read_into(self, target: memoryview) -> None:
        try:
            if _IS_LINUX and len(target) >= _LARGE:
                target = self._read_quickly(target)
            self._read(target)
        except OSError as error:
            if error.errno in _DAMAGE:
                raise DamagedFileError("unreadable") from error
            raise

    def _read(self, target: memoryview) -> None:
        while target:
            count = os.readv(self._descriptor, [target])
            if count == 0:
                raise DamagedFileError("too short")
            target = target[count:]

    def _read_quickly(self, target: memoryview) -> memoryview:
        """Read what can be read so; returns what is left of ``target``."""
        # What is in the page cache comes from there, without asking the disk at all.
        target = self._read_at(target, len(target), os.RWF_NOWAIT)
        at = os.lseek(self._descriptor, 0, os.SEEK_CUR)
        if len(target) < _LARGE or (_address(target) - at) % PAGE:
            return target
        # To the next page of the file, from where direct reading is possible.
        edge = -at % PAGE
        self._read(target[:edge])
        target = target[edge:]
        flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)
        try:
            fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags | os.O_DIRECT)
        except OSError:  # not on this file system
            return target
        try:
            return self._read_at(target, len(target) // PAGE * PAGE, 0)
        # A flag of the open file, which other code may read as well.
        finally:
            fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags)

    def _read_at(self, target: memoryview, nbytes: int, flags: int) -> memoryview:
        """Read up to ``nbytes`` as long as it can be done that way; returns what is left."""
        at = os.lseek(self._descriptor, 0, os.SEEK_CUR)
        while nbytes > 0:
            try:
                # ``preadv`` does not move the file's position, so it is set behind what was read
                # below.
                count = os.preadv(self._descriptor, [target[: min(nbytes, _STEP)]], at, flags)
            except OSError as error:
                if error.errno in _UNABLE:
                    break
                raise
            if count == 0:
                break
            target, at, nbytes = target[count:], at + count, nbytes - count
        os.lseek(self._descriptor, at, os.SEEK_SET)
        return target


def _address(target: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(target))


class BytesSource:
    """Bytes in memory, or the first of ``size`` bytes."""

    def __init__(self, data: bytes, size: int | None = None) -> None:
        self.size = len(data) if size is None else size
        self._left = memoryview(data)

    def read_into(self, target: memoryview) -> None:
        if len(target) > len(self._left):
            raise CutShortError("too short")
        target[:] = self._left[: len(target)]
        self._left = self._left[len(target) :]
