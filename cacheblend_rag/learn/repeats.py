"""Text that comes again in prompts: maximal repeats over token ids.

Of each prompt some windows of 16 tokens go into a table: of any 16 windows in a row, the one with
the smallest hash. So two prompts that share 31 tokens share a window of the table, wherever the
tokens stand. A window that was seen before is widened to both sides, token by token, to the longest
stretch that is equal in both prompts. Between prompts that put the same texts in another order,
these stretches are the texts: no template and no splitter has to be known.

The work is bounded by a multiple of the prompt's length.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from cacheblend_rag.locate import ANCHOR_WIDTH, Ids, window_hashes

WINDOW = ANCHOR_WIDTH
OF_WINDOWS = 16  # of so many in a row, one is in the table
SHARED = WINDOW + OF_WINDOWS - 1  # tokens; equal stretches of as many share a window

_POSITION_BITS = 32
_FIRST_STEP = 64  # tokens that are compared at once; twice as many each time


class _Seen(NamedTuple):
    """An earlier prompt."""

    owner: str
    ids: Ids
    at: float  # when it came


class Repeats:
    """Remembers prompts, and finds what a new one has in common with the latest of its owner's.

    Prompts of other owners are never compared. Not safe to be used by two threads at once.

    Args:
        least: tokens of the shortest repeat that counts.
        most_tokens: of all prompts that are remembered; the oldest go first.
        ttl_s: seconds after which a prompt is forgotten.
    """

    def __init__(self, least: int, most_tokens: int, ttl_s: float) -> None:
        self._least, self._most_tokens, self._ttl_s = least, most_tokens, ttl_s
        self._prompts: OrderedDict[int, _Seen] = OrderedDict()  # by number, the oldest first
        self._table: dict[int, int] = {}  # prompt's number and position, by owner and window
        self._number, self._tokens, self._swept = 0, 0, 0

    @property
    def tokens(self) -> int:
        """Of all prompts that are remembered."""
        return self._tokens

    @property
    def windows(self) -> int:
        """Entries of the table."""
        return len(self._table)

    def feed(
        self, owner: str, ids: Ids, covered: Sequence[tuple[int, int]], now: float
    ) -> list[tuple[int, int]]:
        """What of a prompt came before, and remember the prompt.

        What begins a prompt and began the earlier one too is left out: vLLM's prefix cache has it.

        Args:
            owner: whose prompt it is.
            ids: int32 [T], its token ids.
            covered: stretches [start, end) that need not be found, disjoint and in order.
            now: the time, in seconds of any clock that goes forward.

        Returns:
            Stretches [start, end), disjoint and in order, of ``least`` tokens at the least.
        """
        self._expire(now)
        hashes = window_hashes(ids)
        places = sampled(hashes)
        # By owner, so that prompts of others are not even compared: a repeat of theirs would show
        # in the time to the first token.
        windows = (hashes[places] ^ _hashed(owner)).tolist()
        found = self._search(owner, ids, list(zip(places.tolist(), windows, strict=True)), covered)
        self._remember(_Seen(owner, ids, now), places.tolist(), windows)
        return found

    def _search(
        self,
        owner: str,
        ids: Ids,
        places: Sequence[tuple[int, int]],
        covered: Sequence[tuple[int, int]],
    ) -> list[tuple[int, int]]:
        starts, found, done = [start for start, _ in covered], list[tuple[int, int]](), 0
        heads = dict[int, int]()  # tokens with which this prompt and an earlier one begin alike
        for place, window in places:
            if place < done:
                continue
            number = bisect_right(starts, place + WINDOW - 1)  # stretches that begin in front
            low = max(done, covered[number - 1][1] if number else 0)
            if place < low or (packed := self._table.get(window)) is None:
                continue
            prompt, there = packed >> _POSITION_BITS, packed & ((1 << _POSITION_BITS) - 1)
            seen = self._prompts.get(prompt)
            if seen is None or seen.owner != owner:
                continue
            if prompt not in heads:
                heads[prompt] = _common(ids, seen.ids)
            # Both prompts begin alike up to here, which vLLM's prefix cache serves without any of
            # this.
            if place == there and place < heads[prompt]:
                done = heads[prompt]
                continue
            high = starts[number] if number < len(starts) else len(ids)
            right = place + _common(ids[place:high], seen.ids[there:])
            # Equal tokens decide, as always; the hash has only proposed.
            if right < place + WINDOW:
                continue  # other tokens with the same hash
            left = place - _common(ids[low:place][::-1], seen.ids[:there][::-1])
            done = right
            if right - left >= self._least:
                found.append((left, right))
        return found

    def _remember(self, seen: _Seen, places: Sequence[int], windows: Sequence[int]) -> None:
        self._number += 1
        self._prompts[self._number] = seen
        self._tokens += len(seen.ids)
        for place, window in zip(places, windows, strict=True):
            # The latest prompt wins: it lives longest, and only one is compared for each window.
            self._table[window] = self._number << _POSITION_BITS | place
        while self._tokens > self._most_tokens:
            self._forget_oldest()
        # Windows of prompts that were forgotten stay until then. To look for them at each prompt
        # would cost more than they take.
        if len(self._table) > 2 * self._swept + 1024:
            held = self._prompts
            table = {w: p for w, p in self._table.items() if p >> _POSITION_BITS in held}
            self._table, self._swept = table, len(table)

    def _expire(self, now: float) -> None:
        while self._prompts and next(iter(self._prompts.values())).at < now - self._ttl_s:
            self._forget_oldest()

    def _forget_oldest(self) -> None:
        _, seen = self._prompts.popitem(last=False)
        self._tokens -= len(seen.ids)


def sampled(hashes: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Which windows go into the table, by the hashes of all windows of a prompt."""
    if not len(hashes):
        return np.empty(0, np.int64)
    rows = sliding_window_view(hashes, min(OF_WINDOWS, len(hashes)))
    # By the windows' content and not by their place, so that equal stretches have the same windows
    # in the table, wherever they stand ("winnowing").
    return np.unique(rows.argmin(axis=1) + np.arange(len(rows)))


def _hashed(owner: str) -> np.uint64:
    return np.uint64(int.from_bytes(hashlib.blake2b(owner.encode(), digest_size=8).digest()))


def _common(left: Ids, right: Ids) -> int:
    """How many tokens both begin with."""
    size, at, step = min(len(left), len(right)), 0, _FIRST_STEP
    while at < size:
        end = min(at + step, size)
        differ = np.flatnonzero(left[at:end] != right[at:end])
        if len(differ):
            return at + int(differ[0])
        at, step = end, 2 * step
    return size
