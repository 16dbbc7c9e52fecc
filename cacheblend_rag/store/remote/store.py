"""A store on other machines, behind a client of Redis or object storage."""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Callable, Container, Iterator, Sequence
from functools import partial
from typing import TypeVar

from cacheblend_rag.errors import UnavailableError
from cacheblend_rag.store.base import (
    NOT_FINITE,
    Changes,
    ChunkInfo,
    ChunkKV,
    Found,
    StoreStats,
    ask,
    check_key,
    is_key,
)
from cacheblend_rag.store.chunk_file import Encoding, decode, decode_info, encode, possible_sizes
from cacheblend_rag.store.counts import EventCounts, Held, LastCount, found_within
from cacheblend_rag.store.marker import VERSION
from cacheblend_rag.store.parallel import Readers
from cacheblend_rag.store.remote.base import REFUSED, Backend, BackendError
from cacheblend_rag.store.remote.documents import RemoteDocuments
from cacheblend_rag.store.remote.guard import Guard, PausedError
from cacheblend_rag.store.source import BytesSource, CutShortError, DamagedFileError

_NAME = re.compile(r".*/([0-9a-f]{64})")
_HEAD_BYTES = 16 << 10  # the header and 3,900 tokens; of longer chunks more is read then
_LONGER = 8  # times
_MOST_BYTES = 8 << 20  # of heads in one call
_LARGEST = 1 << 30  # a larger value is not ours
_PLAIN = Encoding()
_READERS = 8
_Answer = TypeVar("_Answer")


class RemoteStore(RemoteDocuments):
    """Values are the files that ``DiskStore`` writes, named ``cacheblend/v3/<namespace>/<key>``,
    and pass the same checks. A value that fails them is dropped.

    The other side decides what it evicts. Where it is gone, slow or talks nonsense, ``put`` says
    that it keeps nothing and other calls raise UnavailableError, each within ``timeout_s``. After
    three failures in a row they do so at once, until the other side answers again. The first
    failure warns.

    What is held is counted name by name. Where that takes long, ``stats`` tells an earlier count.

    Args:
        backend: the client; closed with the store.
        namespace: keeps what differs by model apart.
        encoding: eight bits, encryption. What is encoded differently is kept apart.
        timeout_s: what a call may take, a whole value included.
        largest_bytes: values beyond are not read.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        namespace: str,
        encoding: Encoding = _PLAIN,
        timeout_s: float = 5.0,
        largest_bytes: int = _LARGEST,
    ) -> None:
        self._backend, self._encoding = backend, encoding
        self._prefix = f"cacheblend/{VERSION}/{namespace}{encoding.folder_suffix}/"
        self._feed = f"cacheblend/changes/{namespace}{encoding.folder_suffix}"
        self._notes = f"cacheblend/documents/{VERSION}/{namespace}{encoding.folder_suffix}"
        self._guard = Guard(backend, timeout_s)
        self._largest = min(largest_bytes, backend.largest)
        self._counts, self._readers = EventCounts("remote"), Readers(_READERS)
        self._held = LastCount(self._count)
        self._warned: set[str] = set()
        self._closed = False

    @property
    def failures(self) -> int:
        """Calls that failed or took too long, since the store was opened."""
        return self._guard.failures

    @property
    def is_paused(self) -> bool:
        """Whether the other side is not asked just now, because it failed."""
        return self._guard.is_paused

    def contains(self, key: str) -> bool:
        name = self._name(key)
        return self._asked(lambda: self._backend.exists(name))

    def get(self, key: str) -> ChunkKV | None:
        name = self._name(key)
        with self._counts.loading() as load:
            load.chunk = self._get(key, name)
        return load.chunk

    def get_many(self, keys: Sequence[str]) -> Found:
        return Found.of(keys, self._readers.map(partial(ask, self.get), keys))

    def get_in_time(self, keys: Sequence[str], within_s: float) -> Found:
        return found_within(self._readers, self.get, keys, within_s, self._counts)

    def put(self, key: str, chunk: ChunkKV) -> str:
        name = self._name(key)
        if max(possible_sizes(key, chunk, self._encoding)) > self._largest:
            self._counts.add("evictions")
            reason = f"Chunks over {self._largest >> 20} MiB are not kept remotely"
            self._warn("large", reason)
            return reason
        if not chunk.is_finite:
            self._counts.add("corrupt")
            return NOT_FINITE
        try:
            # Names are hashes of the content: what is there is the same chunk, and need not be sent
            # again.
            if not self._asked(lambda: self._backend.exists(name)):
                value = b"".join(encode(key, chunk, self._encoding))
                self._asked(lambda: self._backend.put(name, value, self._feed))
                self._counts.wrote(chunk.nbytes)
        except UnavailableError as error:
            return str(error)
        return ""

    @property
    def bandwidth(self) -> float | None:
        return self._counts.bandwidth

    def discard(self, key: str) -> None:
        name = self._name(key)
        self._asked(lambda: self._backend.delete(name, self._feed))

    def scan(self) -> Iterator[ChunkInfo]:
        return self.scan_others(())

    def scan_others(self, known: Container[str]) -> Iterator[ChunkInfo]:
        for page in self._pages():
            keys = ((name, self._key(name)) for name, _ in page)
            names = [name for name, key in keys if key and key not in known]
            if names:
                yield from self._infos(names)

    def changes(self, cursor: object) -> Changes:
        news = self._asked(lambda: self._backend.news(self._feed, cursor))
        # The latest of each: a chunk that came, went and came again has come.
        last = {key: is_there for key, is_there in news.entries if is_key(key)}
        removed = [key for key, is_there in last.items() if not is_there]
        there = (
            [] if news.whole else [self._name(key) for key, is_there in last.items() if is_there]
        )
        added = list[ChunkInfo]()
        try:
            added.extend(self._infos(there))
        except UnavailableError:
            # What went is told whatever the rest does. All of it is told again the next time.
            if not removed:
                raise
            return Changes(cursor, (), removed)
        return Changes(news.cursor, added, removed, news.whole)

    def stats(self) -> StoreStats:
        held = Held(0, 0)
        with contextlib.suppress(UnavailableError):  # the counts of what was done are here
            held = self._held.now()
        return self._counts.stats(chunks=held.chunks, nbytes=held.nbytes)

    def close(self) -> None:
        self._closed = True
        self._readers.close()
        self._guard.close()

    def _count(self) -> Held:
        sizes = [size for page in self._pages() for name, size in page if self._key(name)]
        return Held(len(sizes), sum(sizes))

    def _get(self, key: str, name: str) -> ChunkKV | None:
        value = self._asked(lambda: self._backend.get(name, self._largest))
        if value is None:
            return None
        try:
            return decode(BytesSource(value), key, self._encoding.cipher)
        except DamagedFileError:
            self._counts.add("corrupt")
            with contextlib.suppress(UnavailableError):  # it fails its check again then
                self.discard(key)
            return None

    def _pages(self) -> Iterator[list[tuple[str, int]]]:
        # Page by page, each with its own deadline: a store of any size can be listed.
        pages = self._backend.pages(self._prefix)
        while (page := self._asked(lambda: next(pages, None))) is not None:
            yield page

    def _infos(self, names: Sequence[str], nbytes: int = _HEAD_BYTES) -> Iterator[ChunkInfo]:
        at_once = max(1, min(self._backend.at_once, _MOST_BYTES // nbytes))
        longer = list[str]()  # than what was read of them
        read = refused = 0
        for start in range(0, len(names), at_once):
            part = names[start : start + at_once]
            for head in self._asked(partial(self._backend.heads, part, nbytes)):
                if head.size == REFUSED:
                    refused += 1
                    continue
                read += 1
                source = BytesSource(head.data, head.size)
                try:
                    yield decode_info(source, self._key(head.name), self._encoding.cipher)
                except CutShortError:
                    if len(head.data) < min(head.size, self._largest):
                        longer.append(head.name)
                except DamagedFileError:
                    continue  # whoever asks for it gets it dropped
        # Where nothing can be read, it is no fault of a few values: such a store is not empty.
        if refused and not read:
            raise UnavailableError(
                f"The remote store hands out none of the {refused} chunks asked for. Check what "
                "its credentials may read."
            )
        if longer:
            yield from self._infos(longer, nbytes * _LONGER)

    def _name(self, key: str) -> str:
        check_key(key)
        return self._prefix + key

    def _key(self, name: str) -> str:
        match = _NAME.fullmatch(name)
        return match[1] if match else ""

    def _asked(self, question: Callable[[], _Answer]) -> _Answer:
        try:
            return self._guard.call(question)
        except PausedError as error:
            raise UnavailableError(f"The remote store does not answer: {error}.") from error
        except BackendError as error:
            self._warn("failed", f"The remote store fails ({error}); its chunks are recomputed")
            raise UnavailableError(f"The remote store fails: {error}. Check the server.") from error

    def _warn(self, kind: str, text: str) -> None:
        if kind not in self._warned and not self._closed:  # what is under way then fails
            self._warned.add(kind)
            warnings.warn(f"{text}.", RuntimeWarning, stacklevel=4)
