"""Following what becomes of a store, by whichever process or machine, for as long as it is open."""

from __future__ import annotations

import warnings
from array import array
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from threading import Event, Lock, Thread

from cacheblend_rag.errors import UnavailableError
from cacheblend_rag.known import News, Row
from cacheblend_rag.store.base import ChunkInfo, KVStore
from cacheblend_rag.store.listing import Listing

_EVERY_S = 1.0
_MOST_NEWS = 10_000  # chunks that wait to be taken; more are listed anew


class Follower:
    """Asks a store for its changes once a second, in a thread. What went is dropped by ``forget``
    as well; the latest news of each chunk waits for ``take``. It outlives any failure.

    Args:
        store: is asked, never closed.
        forget: drops copies of a chunk outside the store; called in the thread.

    Attributes:
        listing: what the store has, told of every change.
    """

    def __init__(self, store: KVStore, forget: Callable[[str], object]) -> None:
        self._store, self._forget = store, forget
        self.listing = Listing(lambda: map(row_of, store.scan()))
        self._wake: Callable[[], object] | None = None
        self._asking = Lock()  # held while the store is asked
        self._lock, self._closed = Lock(), Event()
        self._cursor: object = None
        self._news: dict[str, Row | None] = {}  # None: it went
        self._whole = False  # the news is all that is stored
        # Its own changes reach the store's feed too, later. What was asked before them would undo
        # them.
        self._own: set[str] = set()  # changed by this process while the store is being asked
        self._stale, self._warned = False, False  # stale: only a listing tells what is stored
        self._thread = Thread(target=self._run, name="cacheblend-follow", daemon=True)

    def start(self, wake: Callable[[], object] | None) -> None:
        """Begin.

        Args:
            wake: called, from any thread, when there is news; None where nobody takes it: then none
                is kept.
        """
        self._wake = wake
        try:
            self._cursor = self._store.changes(None).cursor
        except UnavailableError:
            self._stale = True
        self._thread.start()

    def list(self) -> None:
        """Have the next news be all that is stored. Where the store cannot be asked, it is tried
        again for as long as it takes.
        """
        with suppress(UnavailableError), self._asking:
            self._list()
        self._wake_reader()

    def note(self, infos: Iterable[ChunkInfo] = (), removed: Iterable[str] = ()) -> None:
        """This process put or discarded chunks just now: older news of them is void."""
        added, removed = list(map(row_of, infos)), list(removed)
        with self._lock:
            self._own.update(row[0] for row in added)
            self._own.update(removed)
            self._see(added, removed)
        self._wake_reader()

    @property
    def has_news(self) -> bool:
        """Whether ``take`` would return some."""
        return bool(self._news) or self._whole

    def take(self) -> News | None:
        """The news since the call before; waits for nothing."""
        with self._lock:
            if not self.has_news:
                return None
            news, self._news = self._news, {}
            whole, self._whole = self._whole, False
        added = [row for row in news.values() if row is not None]
        removed = [] if whole else [key for key, row in news.items() if row is None]
        return News(added, removed, whole)

    def close(self) -> None:
        """End the thread; what hangs is left behind."""
        self._closed.set()

    def _run(self) -> None:
        while not self._closed.wait(_EVERY_S):
            try:
                with self._asking:
                    self._ask()
                    # In this thread, again and again, for as long as the store can't be asked.
                    if self._stale and self._wake is not None:
                        self._list()
                self._wake_reader()
            # Expected, and reported by the store itself: the next second asks again.
            except UnavailableError:
                continue
            except Exception as error:  # one that died would leave the engine behind for good
                if not self._closed.is_set():  # or the store was closed while it was asked
                    self._warn(error)

    def _ask(self) -> None:
        with self._lock:
            self._own.clear()
        changes = self._store.changes(self._cursor)
        self._cursor = changes.cursor
        with self._lock:
            removed = [key for key in changes.removed if key not in self._own]
            added = [row_of(info) for info in changes.added if info.key not in self._own]
            self._see(added, removed)
            self._stale |= changes.whole
            if changes.whole:
                self.listing.void()
        # Outside of the lock: it may wait for a GPU's cache or a disk.
        for key in removed:
            self._forget(key)

    def _list(self) -> None:
        with self._lock:
            self._own.clear()
            self._stale = False
        listed: dict[str, Row | None] | None = None
        try:
            # What comes or goes while it is listed is told by the next changes: the cursor is older
            # than the listing.
            listed = {i.key: row_of(i) for i in self._store.scan()}
        finally:
            self._stale |= listed is None  # whatever failed: it is tried again
        with self._lock:
            own = {key: self._news[key] for key in self._own if key in self._news}
            self._news, self._whole = listed | own, True

    def _wake_reader(self) -> None:
        if self._wake is not None and self.has_news:
            self._wake()

    def _see(self, added: Sequence[Row], removed: Sequence[str]) -> None:
        for key in removed:
            self._keep(key, None)
        for row in added:
            self._keep(row[0], row)
        self.listing.see(added, removed)

    def _keep(self, key: str, row: Row | None) -> None:
        if self._wake is None:
            return
        self._news.pop(key, None)  # the latest comes last
        self._news[key] = row
        # A scheduler's side that is not asked takes no news. A listing later costs less than a
        # queue for ever.
        if len(self._news) > _MOST_NEWS and not self._whole:
            self._news.clear()
            self._stale = True

    def _warn(self, error: Exception) -> None:
        if not self._warned:
            self._warned = True
            text = f"The store's changes cannot be followed ({type(error).__name__}: {error})"
            warnings.warn(f"{text}; it is tried again.", RuntimeWarning, stacklevel=2)


def row_of(info: ChunkInfo) -> Row:
    """What an index has to know of a chunk."""
    return info.key, array("i", info.token_ids).tobytes(), info.base
