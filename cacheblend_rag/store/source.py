"""Where the bytes of a stored chunk are read from: a file, memory, or either of them sealed."""

from __future__ import annotations

import errno
import os
import stat
from typing import Protocol

_DAMAGE = {errno.EIO, errno.EISDIR}  # other failures to read are not the file's fault


class DamagedFileError(Exception):
    """It is not the chunk that was written under this key."""


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
    """An open file, read from where it stands."""

    def __init__(self, descriptor: int) -> None:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise DamagedFileError("not a file")
        self.size = found.st_size
        self._descriptor = descriptor

    def read_into(self, target: memoryview) -> None:
        while target:
            try:
                count = os.readv(self._descriptor, [target])
            except OSError as error:
                if error.errno in _DAMAGE:
                    raise DamagedFileError("unreadable") from error
                raise
            if count == 0:
                raise DamagedFileError("too short")
            target = target[count:]


class BytesSource:
    """Bytes in memory, or the first of ``size`` bytes."""

    def __init__(self, data: bytes, size: int | None = None) -> None:
        self.size = len(data) if size is None else size
        self._left = memoryview(data)

    def read_into(self, target: memoryview) -> None:
        if len(target) > len(self._left):
            raise DamagedFileError("too short")
        target[:] = self._left[: len(target)]
        self._left = self._left[len(target) :]
