"""Sorted runs of anchors and rungs, in which a query looks hashes up.

Shape legend: U distinct hashes, A anchors and rungs.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cacheblend_rag.locate.arrays import Bools, Hashes, Ids, Ints, ranges
from cacheblend_rag.locate.hashes import Entries

# The entries of a group are [first, end), those before of discarded chunks left out. In one record,
# since a query spends its time on waiting for memory.
_SLOT = np.dtype([("hash", np.uint64), ("first", np.int32), ("end", np.int32)])


class Run(NamedTuple):
    """Entries in groups of equal hashes, found by a hash table.

    The table is in the order of the hashes: a group's slot is the one that the top bits of its
    hash name, or the next that is free. Free slots have hash 0, and the last slot the largest.
    """

    table: NDArray[np.void]  # of _SLOT
    marks: NDArray[np.uint8]  # which of eight kinds of hashes there are for each slot to begin at
    rows_A: NDArray[np.int32]  # in a group, the oldest chunk comes first
    offsets_A: NDArray[np.int32]
    longest: int  # tokens of the longest of its chunks


class Snapshot(NamedTuple):
    """An index as one query sees it; see ``ChunkIndex``, which has the same by the same names."""

    tokens: Ids
    starts: Ints
    lengths: Ints
    alive: Bools
    keys: list[str]
    runs: tuple[Run, ...]
    longest: int


class Found(NamedTuple):
    """Which of some hashes are in a run, and their entries of live chunks, oldest first."""

    at: Ints  # index into the hashes
    slots: Ints
    firsts: Ints  # the entries of at[i] are [firsts[i], ends[i])
    ends: Ints


def new_run(entries: Entries, lengths: Ints) -> Run:
    """These entries, sorted into a run; ``lengths`` are those of all chunks, by row."""
    order = np.argsort(entries.hashes_A, kind="stable")
    hashes_A = entries.hashes_A[order]
    firsts_U = np.flatnonzero(np.diff(hashes_A, prepend=~hashes_A[:1]))
    ends_U = np.append(firsts_U[1:], len(order))
    bits = len(firsts_U).bit_length() + 1
    home_U, mark_U = _home(hashes_A[firsts_U], bits)
    nth_U = np.arange(len(firsts_U))
    slots_U = np.maximum.accumulate(home_U - nth_U) + nth_U
    table = np.zeros(max(1 << bits, int(slots_U[-1]) + 1) + 1, _SLOT)
    table["hash"][-1] = ~np.uint64(0)
    table["hash"][slots_U] = hashes_A[firsts_U]
    table["first"][slots_U], table["end"][slots_U] = firsts_U, ends_U
    marks = np.zeros(1 << bits, np.uint8)
    np.bitwise_or.at(marks, home_U, mark_U)
    longest = int(lengths[entries.rows_A].max())
    return Run(table, marks, entries.rows_A[order], entries.offsets_A[order], longest)


def live_entries(run: Run, alive: Bools) -> Entries:
    """A run's entries of chunks that were not discarded; ``alive`` says which are, by row."""
    groups = run.table[run.table["first"] < run.table["end"]]
    counts = (groups["end"] - groups["first"]).astype(np.int64)
    at = ranges(groups["first"].astype(np.int64), counts)
    live = alive[run.rows_A[at]]
    at, hashes_A = at[live], np.repeat(groups["hash"], counts)[live]
    return Entries(hashes_A, run.rows_A[at], run.offsets_A[at])


def _home(hashes: Hashes, bits: int) -> tuple[Ints, NDArray[np.uint8]]:
    """The slot that the top bits of each hash name, and the next three bits as one bit of eight."""
    slots = (hashes >> np.uint64(64 - bits)).astype(np.int64)
    next_three = (hashes >> np.uint64(61 - bits)).astype(np.uint8) & 7
    return slots, np.left_shift(1, next_three, dtype=np.uint8)


def find(run: Run, hashes: Hashes) -> Found:
    """Look many hashes up in a run at once."""
    slots, mark = _home(hashes, len(run.marks).bit_length() - 1)
    likely = np.flatnonzero(run.marks.take(slots) & mark != 0)  # quick for booleans only
    wanted, slots = hashes[likely], slots[likely]
    held = run.table["hash"]
    behind = np.flatnonzero(held[slots] < wanted)
    at, sought = slots[behind], wanted[behind]
    while (further := held[at] < sought).any():
        at += further
    slots[behind] = at
    groups = run.table[slots]
    here = np.flatnonzero((groups["hash"] == wanted) & (groups["first"] < groups["end"]))
    firsts, ends = (groups[name][here].astype(np.int64) for name in ("first", "end"))
    return Found(likely[here], slots[here], firsts, ends)
