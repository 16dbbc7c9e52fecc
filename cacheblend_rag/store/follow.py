"""Following what other processes and machines do to a store, for as long as it is open."""

from __future__ import annotations

import warnings
from array import array
from collections.abc import Callable, Iterable
from threading import Event, Lock, Thread
from typing import NamedTuple

from cacheblend_rag.errors import UnavailableError
from cacheblend_rag.store.base import ChunkInfo, KVStore

_EVERY_S = 1.0
_MOST_NEWS = 10_000  # chunks that wait to be taken

Row = tuple[str, bytes, int]  # key, token ids as int32, base: what an index needs to know


class News(NamedTuple):
    """What an index does not know yet."""

    added: list[Row]
    removed: list[str]
    whole: bool  # there was more: only a listing tells


class Follower:
    """Asks a store for its changes once a second, in a thread. What went is dropped by ``forget``
    as well; the latest news of each chunk waits for ``take``. It outlives any failure.

    Args:
        store: is asked, never closed.
        forget: drops what is kept of a chunk beside the store; called in the thread.
    """

    def __init__(self, store: KVStore, forget: Callable[[str], object]) -> None:
        self._store, self._forget = store, forget
        self._lock, self._closed = Lock(), Event()
        self._cursor: object = None
        self._news: dict[str, Row | None] = {}  # None: it went
        self._own: set[str] = set()  # changed by this process while the store is being asked
        self._whole, self._said = False, False
        self._thread = Thread(target=self._run, name="cacheblend-follow", daemon=True)

    def start(self, *, listed: bool = True) -> list[Row] | None:
        """Begin; returns what is stored, where that is to be ``listed``: nothing where the store
        cannot be asked yet.
        """
        try:
            self._cursor = self._store.changes(None).cursor
            return self.list() if listed else None
        except UnavailableError:
            self._whole = True
            return []
        finally:
            self._thread.start()

    def list(self) -> list[Row]:
        """Everything stored, which answers ``News.whole``.

        Raises:
            UnavailableError: the store cannot be asked; the news goes on saying that it is to be.
        """
        with self._lock:
            self._whole = False
        try:
            return [_row(info) for info in self._store.scan()]
        except UnavailableError:
            with self._lock:
                self._whole = True
            raise

    def note(self, infos: Iterable[ChunkInfo] = (), removed: Iterable[str] = ()) -> None:
        """This process put or discarded chunks just now: older news of them is void."""
        with self._lock:
            for key, row in [*((i.key, _row(i)) for i in infos), *((k, None) for k in removed)]:
                self._own.add(key)
                self._keep(key, row)

    def take(self) -> News:
        """The news since the call before; waits for nothing."""
        with self._lock:
            news, self._news = self._news, {}
            whole = self._whole
        added = [row for row in news.values() if row is not None]
        return News(added, [key for key, row in news.items() if row is None], whole)

    def close(self) -> None:
        """End the thread; what hangs is left behind."""
        self._closed.set()

    def _run(self) -> None:
        while not self._closed.wait(_EVERY_S):
            try:
                self._ask()
            except UnavailableError:
                continue
            except Exception as error:  # one that died would leave the engine behind for good
                self._say(error)

    def _ask(self) -> None:
        with self._lock:
            self._own.clear()
        changes = self._store.changes(self._cursor)
        self._cursor = changes.cursor
        with self._lock:
            removed = [key for key in changes.removed if key not in self._own]
            for key in removed:
                self._keep(key, None)
            for info in changes.added:
                if info.key not in self._own:
                    self._keep(info.key, _row(info))
            self._whole |= changes.whole
        for key in removed:
            self._forget(key)

    def _keep(self, key: str, row: Row | None) -> None:
        self._news.pop(key, None)  # the latest comes last
        self._news[key] = row
        if len(self._news) > _MOST_NEWS:
            self._news.clear()
            self._whole = True

    def _say(self, error: Exception) -> None:
        if not self._said:
            self._said = True
            text = f"The store's changes cannot be followed ({type(error).__name__}: {error})"
            warnings.warn(f"{text}; it is tried again.", RuntimeWarning, stacklevel=2)


def _row(info: ChunkInfo) -> Row:
    return info.key, array("i", info.token_ids).tobytes(), info.base
