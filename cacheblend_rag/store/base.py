"""The contract of a chunk store: where precomputed KV lives between ingestion and a query.

Shape legend: L layers, N tokens, H KV heads of this rank, D head size.
"""

from __future__ import annotations

import functools
import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Container, Iterable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple, Self, TypeVar

from cacheblend_rag.errors import StoreError, UnavailableError
from cacheblend_rag.store.parallel import TimedOut
from cacheblend_rag.undo import try_all

if TYPE_CHECKING:
    import torch

_KEY = re.compile("[0-9a-f]{64}")
_Answer = TypeVar("_Answer")

NO_ROOM = "it is too large, or less worth keeping than what it would push out"
NOT_FINITE = "its KV is not finite"


@dataclass(frozen=True, eq=False)
class ChunkKV:
    """The KV cache of one chunk, as one rank of the engine computed it.

    Attributes:
        token_ids: the N token ids of the chunk, without the ingest prefix.
        base: position of the first token when it was computed (the ingest prefix's length).
        kv_L2NHD: keys (index 0, rotated at ``base .. base+N-1``) and values (index 1), contiguous,
            on the CPU, so that one layer is one contiguous block. Of latent attention (MLA), its
            rows of latents alone (index 0). Its dtype is the model's. Read only: a store may hand
            out the same tensor again.
    """

    token_ids: tuple[int, ...]
    base: int
    kv_L2NHD: torch.Tensor

    @functools.cached_property
    def is_finite(self) -> bool:
        """Whether its KV is numbers, none so large that a rotation could make it infinite. One
        that is not would spoil every answer that reads it, so no store takes it or hands it out.
        """
        import torch

        low, high = self.kv_L2NHD.aminmax()  # NaN, where there is one: no comparison holds then
        most = torch.finfo(self.kv_L2NHD.dtype).max / 2
        return bool(low >= -most) and bool(high <= most)

    @property
    def nbytes(self) -> int:
        """Bytes of KV."""
        return self.kv_L2NHD.numel() * self.kv_L2NHD.element_size()


class ChunkInfo(NamedTuple):
    """What an index needs to know of a stored chunk, read without its KV."""

    key: str
    token_ids: tuple[int, ...]
    base: int
    nbytes: int

    @classmethod
    def of(cls, key: str, chunk: ChunkKV) -> ChunkInfo:
        """That of the chunk under ``key``."""
        return cls(key, chunk.token_ids, chunk.base, chunk.nbytes)


class StoreStats(NamedTuple):
    """Counts since the store was opened, and what it holds now."""

    chunks: int  # held now
    nbytes: int  # held now
    hits: int
    misses: int
    evictions: int
    corrupt: int  # entries that failed their check and were set aside
    timed_out: int = 0  # loads that did not end in time
    unavailable: int = 0  # loads for which the store could not be asked


class Found(NamedTuple):
    """What a store had in time."""

    chunks: list[ChunkKV | None]  # in the order asked for; None: absent, or one of the following
    timed_out: AbstractSet[str] = frozenset()  # keys of those that did not come in time
    unavailable: AbstractSet[str] = frozenset()  # keys for which the store could not be asked

    @classmethod
    def of(
        cls, keys: Sequence[str], answers: Sequence[ChunkKV | UnavailableError | TimedOut | None]
    ) -> Found:
        """From an answer for each key."""
        both = list(zip(keys, answers, strict=True))
        return cls(
            [answer if isinstance(answer, ChunkKV) else None for answer in answers],
            {key for key, answer in both if isinstance(answer, TimedOut)},
            {key for key, answer in both if isinstance(answer, UnavailableError)},
        )


class Changes(NamedTuple):
    """What came and went since a cursor: what was ``removed`` first, then what was ``added``."""

    cursor: object  # where to go on from
    added: Sequence[ChunkInfo] = ()  # may name chunks again
    removed: Sequence[str] = ()  # may name keys that were never there
    whole: bool = False  # the cursor was unknown or too old: only ``scan`` tells the rest


class KVStore(ABC):
    """Chunk KV by content key. A store may forget at any time; it never returns wrong KV.

    Promises:
        * ``get`` returns what ``put`` was given under that key, or None where the store knows that
          it has nothing intact: absent, evicted or damaged. A damaged entry is counted and set
          aside so it can be put again. Where the store can't be asked (a network or a disk fails),
          ``get`` and ``contains`` raise UnavailableError: that says nothing of the chunk.
        * KV that is not finite is damaged: ``put`` does not keep it, ``get`` does not return it.
        * ``put`` is idempotent and atomic: a reader or a crash sees the whole chunk or nothing.
        * All methods may be called from several threads.
        * A key is 64 lowercase hexadecimal digits (see ``keys.py``); others raise ValueError.
    """

    @abstractmethod
    def contains(self, key: str) -> bool:
        """Whether ``get`` would probably succeed; cheap, and never reads the KV. Of tiers, whether
        the last one has it: what only a faster one has will not last.

        Raises:
            UnavailableError: the store cannot be asked.
        """

    @abstractmethod
    def get(self, key: str) -> ChunkKV | None:
        """The chunk under ``key``, checked; None when there is none that is intact.

        Raises:
            UnavailableError: the store cannot be asked.
        """

    def get_many(self, keys: Sequence[str]) -> Found:
        """``get`` of each key, in order; at once where waiting for one need not hold up others."""
        # One that cannot be asked for does not keep the others from being found.
        return Found.of(keys, [ask(self.get, key) for key in keys])

    def get_in_time(self, keys: Sequence[str], within_s: float) -> Found:
        """``get_many`` that returns after ``within_s`` seconds whatever a disk or a network does.

        While a load that missed its deadline is still under way, no other is begun.
        """
        return self.get_many(keys)  # those that can wait override it

    def in_memory(self, key: str) -> bool:
        """Whether ``get`` would wait for no disk and no network. Waits for none itself."""
        return False

    def prefetch(self, keys: Iterable[str]) -> None:  # noqa: B027 - only tiers have what to move
        """Start bringing chunks nearer that will be wanted soon; returns at once, never raises."""

    @property
    def bandwidth(self) -> float | None:
        """Bytes a second that recent hits came with, several at once taken together, but for those
        that were in memory; None where nothing was loaded within the last minute.
        """
        return None

    @abstractmethod
    def put(self, key: str, chunk: ChunkKV) -> str:
        """Keep ``chunk`` under ``key``; may evict others. Returns why it is not kept, or "".

        Raises:
            StoreError: it cannot be written (disk full, permission), with the fix in the message.
        """

    @abstractmethod
    def discard(self, key: str) -> None:
        """Forget ``key``; does nothing where it is absent.

        Raises:
            StoreError: it cannot be done now; the chunk may still be there.
        """

    @abstractmethod
    def scan(self) -> Iterator[ChunkInfo]:
        """Every chunk held, for building an index at start. Skips entries it cannot read.

        Raises:
            UnavailableError: the store cannot be asked, or no further.
        """

    def scan_others(self, known: Container[str]) -> Iterator[ChunkInfo]:
        """``scan`` but for the chunks of these keys, where that spares a remote store work."""
        return (info for info in self.scan() if info.key not in known)

    def changes(self, cursor: object) -> Changes:
        """What was put and what went since ``cursor``, by any process; cheap where that is little.
        Tiers drop their copies of what went. What a remote evicts by itself is not among them.

        Args:
            cursor: of the call before; None at first.

        Raises:
            UnavailableError: the store cannot be asked; ask again with the same cursor.
        """
        return Changes(cursor=0, whole=cursor is None)  # nobody else can change it

    @abstractmethod
    def stats(self) -> StoreStats:
        """Counts and sizes now."""

    def touch(self, key: str) -> None:  # noqa: B027 - nothing to note where nothing is evicted
        """Note that ``key`` was used, as a hit does: a store in front of this one served it."""

    @contextmanager
    def pinned(self, keys: Iterable[str]) -> Iterator[None]:
        """While the block runs, this store object evicts none of ``keys``. Another process may:
        what it evicts is recomputed, and what is being read stays readable.
        """
        yield

    # ---- documents: which chunks were put for whose sake ----------------------------------------

    @property
    def keeps_documents(self) -> bool:
        """Whether what follows does anything; a store that doesn't keep notes forgets nothing."""
        return False

    def register(self, document: str, keys: Iterable[str]) -> None:  # noqa: B027 - see above
        """Note that ``document`` (any text) consists of these chunks, and of those noted before."""

    def documents(self) -> set[str]:
        """The ``document_id`` of each document noted."""
        return set()

    def document_keys(self, document: str) -> list[str]:
        """The keys of the chunks that ``document`` (any text) consists of, in order."""
        return []

    def unregister(
        self,
        documents: Iterable[str],
        only: Collection[str] | None = None,
        forgotten: Collection[str] | None = None,
    ) -> list[str]:
        """Drop the notes on these ids, or of those notes only that on the keys ``only``; returns
        the keys that no document consists of any more, without those ``forgotten``.

        Args:
            forgotten: keep the notes on what is returned. Whoever forgets these chunks first, and
                asks again with their keys, can do so again where that fails. None: keep none.
        """
        return []

    def forget(self, document: str) -> int:
        """Discard the chunks of ``document`` but for those other documents share; how many."""
        return len(self.drop([document_id(document)]))

    def gc(self, live: Iterable[str]) -> int:
        """Forget every document that is not among ``live``; returns the chunks discarded. Chunks
        that no document was ever noted for stay.
        """
        return len(self.drop(self.documents() - {document_id(document) for document in live}))

    def drop(self, documents: Iterable[str], only: Collection[str] | None = None) -> list[str]:
        """Drop the documents of these ids, or what they have of the keys ``only``, and the chunks
        that no other one consists of; returns the keys of these. What failed can be done again.

        Raises:
            StoreError: not all could be discarded.
        """
        documents, forgotten = list(documents), list[str]()
        while True:
            # One that somebody stored again meanwhile keeps its notes.
            gone = [key for key in forgotten if not self.contains(key)]
            left = [key for key in self.unregister(documents, only, gone) if key not in forgotten]
            if not left:
                return sorted(forgotten)
            discard_all(self, left)
            forgotten += left

    def close(self) -> None:  # noqa: B027 - most stores hold nothing open
        """Release what is held open; does nothing on the second call."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def ask(question: Callable[[str], _Answer], key: str) -> _Answer | UnavailableError:
    """The answer of a store's method, or that it cannot be asked."""
    try:
        return question(key)
    except UnavailableError as error:
        return error


def discard_all(store: KVStore, keys: Iterable[str]) -> None:
    """Discard every key, whichever fails.

    Raises:
        StoreError: the first failure, when all were tried.
    """
    try_all(store.discard, keys, StoreError)


def document_id(document: str) -> str:
    """What stores call a document: its name may be private."""
    # with lone surrogates too: the name may be that of a file
    return hashlib.sha256(document.encode(errors="surrogatepass")).hexdigest()


def is_key(text: str) -> bool:
    """Whether ``text`` is of a key's form."""
    return _KEY.fullmatch(text) is not None


def check_key(key: str) -> None:
    """Refuse what cannot be a key.

    Raises:
        ValueError: ``key`` is not 64 lowercase hexadecimal digits.
    """
    if not is_key(key):
        raise ValueError(f"A chunk key is 64 lowercase hexadecimal digits, not {key!r}")
