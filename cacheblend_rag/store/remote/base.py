"""The contract of what values are kept in, on other machines: names in, bytes out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import NamedTuple


class BackendError(Exception):
    """The other side is gone, slow, refuses or answers what cannot be understood."""


class AnswerError(BackendError):
    """The other side answers that it does not do this: it is there, and others may ask it."""


REFUSED = -1


class ValuePrefix(NamedTuple):
    """The start of a value."""

    name: str
    data: bytes
    size: int  # of the whole value; REFUSED: it can't be read


class News(NamedTuple):
    """Values that were put (True) or deleted (False) since a cursor, oldest first, by the last part
    of their names.
    """

    cursor: object
    entries: list[tuple[str, bool]]
    whole: bool = False  # the cursor was unknown or too old: there was more


class Backend(ABC):
    """A client. Methods block, may be called from several threads, and raise ``BackendError`` only.

    Values are replaced as a whole: a reader sees the old one or the new one.
    """

    largest: int  # bytes that a value may have
    at_once = 500  # names that one call is given: it has a deadline

    @abstractmethod
    def get(self, name: str, limit: int) -> bytes | None:
        """The value; None where there is none.

        Raises:
            BackendError: also where it is larger than ``limit`` bytes: it is not even fetched.
        """

    @abstractmethod
    def put(self, name: str, value: bytes, feed: str = "") -> None:
        """Set a value, and tell who follows ``feed``, if it is named."""

    @abstractmethod
    def exists(self, name: str) -> bool:
        """Whether there is a value."""

    @abstractmethod
    def delete(self, name: str, feed: str = "") -> None:
        """Drop a value, if there is one, and tell who follows ``feed``, if it is named."""

    @abstractmethod
    def news(self, feed: str, cursor: object) -> News:
        """What ``feed`` recorded since ``cursor``, of the call before; all that is remembered where
        that is not known. Entries may come twice.
        """

    @abstractmethod
    def pages(self, prefix: str) -> Iterator[list[tuple[str, int]]]:
        """Names that start so, some at a time, with the sizes of their values."""

    @abstractmethod
    def heads(self, names: Sequence[str], nbytes: int) -> list[ValuePrefix]:
        """The first bytes of values, without those that are gone. One that cannot be read by itself
        is ``REFUSED``: it must not hide the others.
        """

    # Notes on documents: of each which keys it has, and of each key which documents have it. They
    # are below a folder ``notes``; documents and keys are names without a slash.

    @abstractmethod
    def note(self, notes: str, document: str, keys: Sequence[str]) -> None:
        """Note that a document has these keys as well."""

    @abstractmethod
    def noted(self, notes: str, document: str) -> Iterator[list[str]]:
        """The keys noted for a document, some at a time and in any order."""

    @abstractmethod
    def documents(self, notes: str) -> Iterator[list[str]]:
        """The documents that keys are noted for, some at a time, and maybe more than once."""

    @abstractmethod
    def release(self, notes: str, pairs: Sequence[tuple[str, str]]) -> list[str]:
        """No longer count these documents among those that have the key beside them; returns the
        keys that no document has then. What a document has stays noted, for ``unnote``. Done again,
        it answers the same; of several who release a key, the last one is told that.
        """

    @abstractmethod
    def unnote(self, notes: str, pairs: Sequence[tuple[str, str]]) -> None:
        """Drop the notes that these documents have the key beside them."""

    @abstractmethod
    def ping(self) -> None:
        """Ask whether the other side answers at all. Takes no longer than about a second, where the
        client can be told so.
        """

    def abort(self) -> None:  # noqa: B027 - for clients that could wait for ever
        """Make calls that hang in other threads fail soon."""

    @abstractmethod
    def close(self) -> None:
        """Release connections; does nothing on the second call."""
