"""Which chunks the prompts of an engine are searched for, in step with its stores."""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from cacheblend_rag.keys import KeySpace
from cacheblend_rag.locate import ChunkIndex

_MOST_EXPECTED = 10_000  # chunks with a salt that were named and did not come yet

Row = Sequence[Any]  # key, token ids as int32 bytes, base: tokens that stood before the chunk


class News(NamedTuple):
    """What became of a rank's store since the news before.

    Attributes:
        added, removed: chunks, and keys of chunks.
        whole: ``added`` is all that is stored.
    """

    added: Sequence[Row]
    removed: Sequence[str] = ()
    whole: bool = False


class KnownChunks:
    """An index for each key space. A chunk is known where every known rank has it. Not
    safe to be changed by two threads at once; ``locate`` may run during a change.

    Chunks that were learnt from requests with a salt have an index for each salt: no key space
    has them, so they are announced by ``expect``.
    """

    def __init__(self) -> None:
        self._salted: dict[str, ChunkIndex] = {}  # by owner
        self._owners: dict[str, str] = {}  # of chunks in these, by key
        self._expected: OrderedDict[str, str] = OrderedDict()  # owners, by key
        self._spaces: dict[str, tuple[KeySpace, ChunkIndex]] = {}
        self._held: dict[int, set[str]] = {}  # keys, by rank

    def open(self, name: str, space: KeySpace) -> None:
        """From the next news on, know the chunks of ``space``; those from before come with a
        ``whole`` one.
        """
        self._spaces.setdefault(name, (space, ChunkIndex()))

    def index(self, name: str) -> ChunkIndex:
        """The chunks of a space."""
        return self._spaces[name][1]

    def salted(self, owner: str) -> ChunkIndex | None:
        """The chunks that were learnt from requests with one salt; None where there are none."""
        return self._salted.get(owner)

    def expect(self, owner: str, keys: Iterable[str]) -> None:
        """Chunks of these keys are this owner's, once they are stored."""
        for key in keys:
            self._expected[key] = owner
        while len(self._expected) > _MOST_EXPECTED:
            self._expected.popitem(last=False)

    def learn(self, rank: int, news: News) -> None:
        """Take what became of the store of ``rank``."""
        held = self._held.setdefault(rank, set())
        if news.whole:
            held.clear()
            held.update(row[0] for row in news.added)
            everywhere = self._everywhere()
            for _, index in self._spaces.values():
                for key in index.keys() - everywhere:
                    index.discard(key)
            self._lose_salted(self._owners.keys() - everywhere)
        # Removed first, as news has it: a chunk that went and came again is in both.
        held.difference_update(news.removed)
        self.lose(news.removed)
        held.update(row[0] for row in news.added)
        # A chunk that one rank lacks is missing for all, so prompts are not searched for it.
        there = [row for row in news.added if all(row[0] in held for held in self._held.values())]
        for space, index in self._spaces.values():
            index.add_many(chunks_of(space, there))
        for row in there:
            self._take_salted(row)

    def lose(self, keys: Iterable[str]) -> None:
        """These chunks could not be had: prompts are not searched for them until they are stored
        again.
        """
        keys = list(keys)
        for key in keys:
            for _, index in self._spaces.values():
                index.discard(key)
        self._lose_salted(keys)

    def _take_salted(self, row: Row) -> None:
        owner = self._expected.pop(row[0], None)
        if owner is not None:
            self._owners[row[0]] = owner
            self._salted.setdefault(owner, ChunkIndex()).add(row[0], tuple(array("i", row[1])))

    def _lose_salted(self, keys: Iterable[str]) -> None:
        for key in keys:
            if (owner := self._owners.pop(key, None)) is not None:
                index = self._salted[owner]
                index.discard(key)
                if not index:
                    del self._salted[owner]

    def _everywhere(self) -> set[str]:
        return set.intersection(*self._held.values())


def chunks_of(space: KeySpace, rows: Iterable[Row]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Keys and token ids of the chunks of this key space."""
    for key, raw, base in rows:
        if base == len(space.prefix_ids):
            ids = tuple(array("i", raw))
            # A prefix of the same length is not the same prefix. Only the key tells, and it is made
            # anew rather than believed: a damaged row would put a wrong chunk into prompts.
            if space.key(ids) == key:
                yield key, ids
