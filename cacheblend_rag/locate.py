"""Find the indexed chunks inside a prompt by their token ids, in any order and at any position.

Hashes propose where a chunk may stand, equal token ids decide. There are two kinds of proposals:

* *Anchors*, hashes of 16 consecutive tokens at tokens 8, 72, 136, ... of a chunk and, last, 24
  tokens before its end. They find heads, tails and inner parts too. Text that repeats gives far
  more of them than one can follow, so the rarest are followed first, up to a budget.
* *Rungs*, hashes of a growing part of a chunk from its token 8 on: the part's length gains one
  binary digit of the whole length at each rung, the largest first (a part of 352 tokens has the
  rungs 256, 320, 352). Climbing them at a place of the prompt leads to a chunk that stands there
  for longest, in as many steps as there are digits and however many chunks begin in the same way.

So the work is bounded for every text, and no chunk that stands in the prompt whole can be crowded
out by others.

Legend of array names: U distinct hashes, A anchors and rungs, P places in the prompt, D diagonals
(one chunk laid on the prompt with one shift), S spans.
"""

from __future__ import annotations

import secrets
import threading
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from heapq import heapify, heappop, heappush
from typing import Generic, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from cacheblend_rag.errors import ConfigError

Ids = NDArray[np.int32]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]
Hashes = NDArray[np.uint64]
ScalarT = TypeVar("ScalarT", bound=np.generic)

ANCHOR_WIDTH = 16  # tokens hashed into one anchor; the lengths of rungs are multiples of it
ANCHOR_MARGIN = 8  # tokens that may differ at either end of a chunk without touching an anchor
ANCHOR_STRIDE = 64

# The budget of one query, several times what a prompt full of chunks needs.
MAX_ANCHORS = 8  # that are followed in a stretch of ANCHOR_STRIDE prompt tokens
FREE_TOKENS, TOKENS_PER_TOKEN = 1 << 18, 16  # tokens of chunks that are compared

_BATCH_TOKENS = 1 << 18  # work arrays of a batch stay within a few MB, near the CPU's cache
_MOST_CROWDED = (1 << 24) - 1  # more chunks with one anchor are all the same
_RUN_RATIO = 8  # each run of anchors is at least this many times the next
_SMALL_RUN = 4096  # anchors of which the last run only may have fewer: each run is asked each time
_SHIFT_BIAS = 1 << 31  # makes a shift non-negative, so that row and shift pack into one int64
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
# Nobody outside this process can make two windows collide on purpose.
_SECRET = np.uint64(secrets.randbits(64))


class Match(NamedTuple):
    """Prompt tokens ``[start, end)`` equal tokens ``[offset, offset + end - start)`` of a chunk."""

    start: int
    end: int
    key: str
    offset: int
    chunk_tokens: int  # length of the whole chunk


class ChunkIndex:
    """Token ids of many chunks, searchable for all their occurrences in a prompt at once.

    What ``locate`` finds, with the default ``min_tokens`` of 32:
        * every whole chunk of at least ``min_tokens`` tokens, also when up to 8 tokens differ at
          each end as long as ``min_tokens`` tokens remain;
        * every head (the tail cut off) and every tail (the head cut off) of at least 32 tokens,
          also when up to 8 tokens differ at the chunk's own end;
        * every other stretch of a chunk that lies at or after its token 8 and has at least 79
          tokens; a shorter one of n >= 32 tokens in about (n - 15) / 64 of the cases, and always
          beside a longer one of the same chunk at the same shift.
    Spans below 32 tokens (a smaller ``min_tokens``, which may go down to 16): whole chunks from 16
    tokens on, heads and tails from 24 tokens on.

    Work is bounded by a multiple of the prompt's length. Where chunks or prompt repeat themselves
    so much that this is not enough, the parts (all but the first line) whose anchors are the most
    common are not found. Whole chunks always are: of such a chunk, fewer than 32 tokens at either
    end may be missing, or belong to a match with another chunk that stands there for longer.

    Overlaps: the longest span wins, then the leftmost, the smallest offset, the shortest chunk, the
    chunk added first. Of the spans that begin within the same ``min_tokens`` tokens of the prompt
    only the winner counts. Another loser is trimmed to what remains, if that is still
    ``min_tokens``.

    All methods may be called from several threads. Writers take a lock; ``locate`` takes none and
    answers for the state at its start, save that a chunk discarded meanwhile may be missing.
    """

    def __init__(self) -> None:
        """An empty index."""
        self._lock = threading.Lock()
        self._rows: dict[str, int] = {}  # key -> row, of live chunks
        self._keys: list[str] = []  # by row, dead ones included
        self._tokens = _Growing(np.empty(0, np.int32))
        self._starts = _Growing(np.empty(0, np.int64))  # by row: its first index in _tokens
        self._lengths = _Growing(np.empty(0, np.int64))  # by row
        self._alive = _Growing(np.empty(0, np.bool_))  # by row
        self._dead_tokens = 0
        self._longest = 0  # tokens of the longest chunk so far
        self._runs: list[_Run] = []  # oldest and longest first
        self._publish()

    def __len__(self) -> int:
        """Number of chunks."""
        return len(self._rows)

    def __contains__(self, key: object) -> bool:
        """Whether a chunk is indexed under ``key``."""
        return key in self._rows

    def keys(self) -> set[str]:
        """The keys of all chunks."""
        with self._lock:
            return set(self._rows)

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays in use: token ids, anchors and chunk table."""
        view = self._snapshot
        chunks = (view.tokens, view.starts, view.lengths, view.alive)
        return sum(
            part.nbytes for part in (*chunks, *(part for run in view.runs for part in run[:4]))
        )

    def add(self, key: str, token_ids: Sequence[int] | Ids) -> None:
        """Add a chunk. A known key is left as it is: a key stands for its token ids."""
        self.add_many([(key, token_ids)])

    def add_many(self, chunks: Iterable[tuple[str, Sequence[int] | Ids]]) -> None:
        """Add many chunks; several times faster than as many calls of ``add``."""
        for batch in self._batches(chunks):
            with self._lock:
                self._append(batch)

    def discard(self, key: str) -> None:
        """Remove a chunk, if it is there; its memory is given back after enough removals."""
        with self._lock:
            row = self._rows.pop(key, None)
            if row is None:
                return
            self._alive = self._alive.with_value(row, np.False_)
            self._dead_tokens += int(self._lengths.values[row])
            if self._is_sparse():
                self._compact()
            else:
                self._pass_over(row)
            self._publish()

    def locate(self, token_ids: Sequence[int] | Ids, *, min_tokens: int = 32) -> list[Match]:
        """All occurrences of indexed chunks in a prompt, as disjoint spans sorted by ``start``.

        Args:
            token_ids: the whole prompt.
            min_tokens: the shortest span to report, at least 16.

        Raises:
            ConfigError: ``min_tokens`` is below 16.
        """
        if min_tokens < ANCHOR_WIDTH:
            raise ConfigError(f"min_tokens is {min_tokens}; use at least {ANCHOR_WIDTH}")
        view = self._snapshot
        prompt = _as_ids(token_ids)
        if len(prompt) < ANCHOR_WIDTH or not view.runs:
            return []
        levels = _hash_levels(prompt, view.longest)
        found = [_find(run, levels[0]) for run in view.runs]
        anchors = _rare_anchors(view, found)
        overlaps = _lay_out(view, prompt, anchors, FREE_TOKENS + TOKENS_PER_TOKEN * len(prompt))
        parts = _equal_spans(view, prompt, overlaps)
        wholes = _wholes(view, prompt, levels, found, min_tokens)
        spans = _best_of_each_stretch(view, _joined(parts, wholes), min_tokens)
        return _resolve_overlaps(view, prompt, spans, min_tokens)

    def _publish(self) -> None:
        # What a snapshot covers never changes, but for _Run.live_U: arrays and keys only grow
        # behind it.
        self._snapshot = _Snapshot(
            self._tokens.values,
            self._starts.values,
            self._lengths.values,
            self._alive.values,
            self._keys,
            tuple(self._runs),
            self._longest,
        )

    def _batches(
        self, chunks: Iterable[tuple[str, Sequence[int] | Ids]]
    ) -> Iterator[dict[str, Ids]]:
        batch: dict[str, Ids] = {}
        num_tokens = 0
        for key, token_ids in chunks:
            if key in self._rows or key in batch:
                continue
            batch[key] = _as_ids(token_ids)
            num_tokens += len(token_ids)
            if num_tokens >= _BATCH_TOKENS:
                yield batch
                batch, num_tokens = {}, 0
        yield batch

    def _append(self, batch: dict[str, Ids]) -> None:
        # Another thread may have added some of these since the batch was put together.
        fresh = {key: ids for key, ids in batch.items() if key not in self._rows}
        if not fresh:
            return
        tokens = np.concatenate(list(fresh.values()))
        lengths = np.fromiter(map(len, fresh.values()), np.int64, len(fresh))
        starts = _exclusive_sum(lengths)
        first_row = len(self._keys)
        self._starts.extend(starts + len(self._tokens.values))
        self._tokens.extend(tokens)
        self._lengths.extend(lengths)
        self._alive.extend(np.ones(len(fresh), np.bool_))
        self._keys.extend(fresh)
        self._longest = max(self._longest, int(lengths.max()))
        self._add_entries(_entries(tokens, starts, lengths, first_row))
        self._publish()
        self._rows.update(zip(fresh, range(first_row, len(self._keys)), strict=True))

    def _add_entries(self, entries: _Entries) -> None:
        if not len(entries.hashes_A):
            return
        merged = [entries]
        num_entries = len(entries.hashes_A)
        while self._runs and len(self._runs[-1].rows_A) < max(_RUN_RATIO * num_entries, _SMALL_RUN):
            merged.insert(0, _live_entries(self._runs.pop(), self._alive.values))
            num_entries += len(merged[0].hashes_A)
        joined = _Entries(*map(np.concatenate, zip(*merged, strict=True)))
        self._runs.append(_new_run(joined, self._lengths.values))

    def _pass_over(self, row: int) -> None:
        """Let no group of equal hashes begin with a dead row."""
        start, length = self._starts.values[row], self._lengths.values[row]
        tokens = self._tokens.values[start : start + length]
        hashes = np.unique(_entries(tokens, np.zeros(1, np.int64), length[None], row).hashes_A)
        for run in self._runs:
            found = _find(run, hashes)
            is_dead = ~self._alive.values[run.rows_A[found.firsts]]
            for slot, first, end in zip(*(c[is_dead].tolist() for c in found[1:]), strict=True):
                live = self._alive.values[run.rows_A[first:end]]
                run.table["first"][slot] = first + live.argmax() if live.any() else end

    def _is_sparse(self) -> bool:
        num_rows, num_tokens = len(self._keys), len(self._tokens.values)
        return 2 * len(self._rows) < num_rows or 2 * self._dead_tokens > num_tokens

    def _compact(self) -> None:
        alive, lengths = self._alive.values, self._lengths.values
        keys = [key for key, keep in zip(self._keys, alive, strict=True) if keep]
        self._keys, self._rows = keys, {key: row for row, key in enumerate(keys)}
        self._tokens = _Growing(self._tokens.values[np.repeat(alive, lengths)])
        self._starts = _Growing(_exclusive_sum(lengths[alive]))
        self._lengths = _Growing(lengths[alive])
        self._alive = _Growing(np.ones(len(keys), np.bool_))
        self._dead_tokens = 0
        self._longest = int(self._lengths.values.max(initial=0))
        new_row = (np.cumsum(alive) - 1).astype(np.int32)
        kept = [_live_entries(run, alive) for run in self._runs]
        self._runs = [
            _new_run(entries._replace(rows_A=new_row[entries.rows_A]), self._lengths.values)
            for entries in kept
            if len(entries.rows_A)
        ]


class _Growing(Generic[ScalarT]):
    """An array that grows at its end; earlier ``values`` stay valid and unchanged."""

    def __init__(self, values: NDArray[ScalarT]) -> None:
        self._buffer = values
        self.values = values

    def extend(self, values: NDArray[ScalarT]) -> None:
        old, size = len(self.values), len(self.values) + len(values)
        if size > len(self._buffer):
            self._buffer = np.empty(size + size // 2, self.values.dtype)
            self._buffer[:old] = self.values
        self._buffer[old:size] = values
        self.values = self._buffer[:size]

    def with_value(self, index: int, value: ScalarT) -> _Growing[ScalarT]:
        changed = self.values.copy()
        changed[index] = value
        return _Growing(changed)


class _Entries(NamedTuple):
    """Anchors and rungs in the order their chunks were added, or sorted by hash."""

    hashes_A: Hashes
    rows_A: NDArray[np.int32]
    offsets_A: NDArray[np.int32]  # where in its chunk the hashed tokens begin


class _Run(NamedTuple):
    """Entries in groups of equal hashes, found by a hash table.

    The table is in the order of the hashes: a group's slot is the one that the top bits of its
    hash name, or the next that is free. Free slots have hash 0, and the last slot the largest.
    """

    table: NDArray[np.void]  # of _SLOT
    marks: NDArray[np.uint8]  # which of eight kinds of hashes there are for each slot to begin at
    rows_A: NDArray[np.int32]  # in a group, the oldest chunk comes first
    offsets_A: NDArray[np.int32]
    longest: int  # tokens of the longest of its chunks


# The entries of a group are [first, end), those before of discarded chunks left out. In one record,
# since a query spends its time on waiting for memory.
_SLOT = np.dtype([("hash", np.uint64), ("first", np.int32), ("end", np.int32)])


class _Snapshot(NamedTuple):
    tokens: Ids
    starts: Ints
    lengths: Ints
    alive: Bools
    keys: list[str]
    runs: tuple[_Run, ...]
    longest: int


class _Found(NamedTuple):
    """Which of some hashes are in a run, and their entries of live chunks, oldest first."""

    at: Ints  # index into the hashes
    slots: Ints
    firsts: Ints  # the entries of at[i] are [firsts[i], ends[i])
    ends: Ints


class _Anchors(NamedTuple):
    """Anchors that occur in the prompt, once for each place."""

    rows_A: Ints
    shifts_A: Ints  # token t of the chunk may lie on prompt token t + shift


class _Overlaps(NamedTuple):
    """What each diagonal has on the prompt: ``[first, first + length)`` against the chunk."""

    rows_D: Ints
    first_D: Ints
    offsets_D: Ints  # the chunk's token that lies on prompt token ``first``
    lengths_D: Ints


class _Spans(NamedTuple):
    """Stretches of equal ids."""

    starts_S: Ints  # in the prompt
    lengths_S: Ints
    rows_S: Ints
    offsets_S: Ints  # in the chunk

    def only(self, chosen: Bools | Ints) -> _Spans:
        return _Spans(*(column[chosen] for column in self))


class _Ranked(NamedTuple):
    """A span whose tuple order is the order in which spans win."""

    minus_length: int
    start: int
    offset: int
    chunk_tokens: int
    row: int

    @property
    def end(self) -> int:
        return self.start - self.minus_length

    def trimmed(self, start: int, end: int) -> _Ranked:
        offset = self.offset + start - self.start
        return _Ranked(start - end, start, offset, self.chunk_tokens, self.row)

    def match(self, view: _Snapshot) -> Match:
        return Match(self.start, self.end, view.keys[self.row], self.offset, self.chunk_tokens)


# --- hashes --------------------------------------------------------------------------------------


def _as_ids(token_ids: Sequence[int] | Ids) -> Ids:
    return np.asarray(token_ids, np.int32)


def _mix(left: Hashes, right: Hashes) -> Hashes:
    mixed = left * _MULTIPLIER + right
    mixed ^= mixed >> np.uint64(32)
    return mixed


def _hash_levels(ids: Ids, longest: int) -> list[Hashes]:
    """``levels[k][i]``: hash of the ``16 << k`` tokens from i on, for widths up to ``longest``."""
    hashes = (ids.astype(np.uint64) ^ _SECRET) * _MULTIPLIER
    hashes ^= hashes >> np.uint64(32)
    width, levels = 1, []
    while len(hashes) and width <= max(longest, ANCHOR_WIDTH):
        if width >= ANCHOR_WIDTH:
            levels.append(hashes)
        hashes = _mix(hashes[:-width], hashes[width:])
        width *= 2
    return levels


def window_hashes(ids: Ids) -> Hashes:
    """The hash of the ``ANCHOR_WIDTH`` tokens from each token on, while there are as many."""
    levels = _hash_levels(ids, ANCHOR_WIDTH)
    return levels[0] if levels else np.empty(0, np.uint64)


# --- entries of chunks ---------------------------------------------------------------------------


def _entries(tokens: Ids, starts: Ints, lengths: Ints, first_row: int) -> _Entries:
    levels = _hash_levels(tokens, int(lengths.max()))
    if not levels:
        no_rows = np.empty(0, np.int32)
        return _Entries(np.empty(0, np.uint64), no_rows, no_rows)
    parts = [_anchors(levels[0], starts, lengths), *_rungs(levels, starts, lengths)]
    hashes_A, chunks_A, offsets_A = map(np.concatenate, zip(*parts, strict=True))
    order = np.argsort(chunks_A, kind="stable")
    rows_A = (chunks_A[order] + first_row).astype(np.int32)
    return _Entries(hashes_A[order], rows_A, offsets_A[order].astype(np.int32))


def _anchors(hashes: Hashes, starts: Ints, lengths: Ints) -> tuple[Hashes, Ints, Ints]:
    # Anchor k of a chunk of n tokens begins at min(8 + 64 k, n - 24), or at 0 if n < 24, and the
    # last k is the first to reach n - 24. So two neighbours are at most 64 apart, and none touches
    # the last 8 tokens.
    last = np.maximum(lengths - ANCHOR_WIDTH - ANCHOR_MARGIN, 0)
    counts = np.maximum(last - ANCHOR_MARGIN + ANCHOR_STRIDE - 1, 0) // ANCHOR_STRIDE + 1
    counts[lengths < ANCHOR_WIDTH] = 0
    chunks_A = np.repeat(np.arange(len(lengths)), counts)
    regular_A = ANCHOR_MARGIN + ANCHOR_STRIDE * _ranges(np.zeros_like(counts), counts)
    offsets_A = np.minimum(regular_A, last[chunks_A])
    return hashes[starts[chunks_A] + offsets_A], chunks_A, offsets_A


def _rungs(
    levels: list[Hashes], starts: Ints, lengths: Ints
) -> Iterator[tuple[Hashes, Ints, Ints]]:
    # The part begins at the first anchor and ends with the last multiple of 16 tokens that leaves
    # 8 tokens at the chunk's end, too.
    offsets = np.clip(lengths - ANCHOR_WIDTH - ANCHOR_MARGIN, 0, ANCHOR_MARGIN)
    sizes = np.maximum(lengths - offsets - ANCHOR_MARGIN, ANCHOR_WIDTH)
    sizes[lengths < ANCHOR_WIDTH] = 0
    hashes, hashed_A = np.full(len(lengths), _SECRET), np.zeros_like(lengths)
    for level in reversed(range(len(levels))):
        width = ANCHOR_WIDTH << level
        chunks_A = np.flatnonzero(sizes & width)
        at = starts[chunks_A] + offsets[chunks_A] + hashed_A[chunks_A]
        hashes[chunks_A] = _mix(hashes[chunks_A], levels[level][at])
        hashed_A[chunks_A] += width
        yield hashes[chunks_A], chunks_A, offsets[chunks_A]


# --- runs ----------------------------------------------------------------------------------------


def _new_run(entries: _Entries, lengths: Ints) -> _Run:
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
    return _Run(table, marks, entries.rows_A[order], entries.offsets_A[order], longest)


def _live_entries(run: _Run, alive: Bools) -> _Entries:
    groups = run.table[run.table["first"] < run.table["end"]]
    counts = (groups["end"] - groups["first"]).astype(np.int64)
    at = _ranges(groups["first"].astype(np.int64), counts)
    live = alive[run.rows_A[at]]
    at, hashes_A = at[live], np.repeat(groups["hash"], counts)[live]
    return _Entries(hashes_A, run.rows_A[at], run.offsets_A[at])


def _home(hashes: Hashes, bits: int) -> tuple[Ints, NDArray[np.uint8]]:
    """The slot that the top bits of each hash name, and the next three bits as one bit of eight."""
    slots = (hashes >> np.uint64(64 - bits)).astype(np.int64)
    next_three = (hashes >> np.uint64(61 - bits)).astype(np.uint8) & 7
    return slots, np.left_shift(1, next_three, dtype=np.uint8)


def _find(run: _Run, hashes: Hashes) -> _Found:
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
    return _Found(likely[here], slots[here], firsts, ends)


# --- a query: parts of chunks, by rare anchors ---------------------------------------------------


def _rare_anchors(view: _Snapshot, found: list[_Found]) -> _Anchors:
    """In every stretch of 64 prompt tokens the anchors of the fewest chunks, up to 8."""
    # One number that sorts by stretch, crowd, place and run, and holds them all: NumPy sorts
    # numbers several times faster than it finds their order.
    numbers = np.concatenate([_sortable(part, run) for run, part in enumerate(found)])
    numbers.sort()
    stretches, crowds = numbers >> 38, numbers >> 14 & _MOST_CROWDED
    before = _exclusive_sum(crowds)
    begins = np.flatnonzero(np.diff(stretches, prepend=-1))
    before -= np.repeat(before[begins], np.diff(begins, append=len(stretches)))
    counts = np.clip(MAX_ANCHORS - before, 0, crowds)
    chosen = np.flatnonzero(counts)
    counts, numbers = counts[chosen], numbers[chosen]
    at, runs = (numbers >> 38) * ANCHOR_STRIDE + (numbers >> 8 & ANCHOR_STRIDE - 1), numbers & 255
    anchors = []
    for number, (run, part) in enumerate(zip(view.runs, found, strict=True)):
        mine = np.flatnonzero(runs == number)
        firsts = part.firsts[np.searchsorted(part.at, at[mine])]
        anchors.append(_anchors_at(run, at[mine], firsts, counts[mine]))
    rows_A, shifts_A = map(np.concatenate, zip(*anchors, strict=True))
    alive_A = view.alive[rows_A]
    return _Anchors(rows_A[alive_A], shifts_A[alive_A])


def _sortable(found: _Found, run: int) -> Ints:
    stretches, within = found.at // ANCHOR_STRIDE, found.at % ANCHOR_STRIDE
    crowds = np.minimum(found.ends - found.firsts, _MOST_CROWDED)
    numbers: Ints = ((stretches << 24 | crowds) << 6 | within) << 8 | run
    return numbers


def _anchors_at(run: _Run, at: Ints, firsts: Ints, counts: Ints) -> _Anchors:
    entries = _ranges(firsts, counts)
    shifts_A = np.repeat(at, counts) - run.offsets_A[entries]
    return _Anchors(run.rows_A[entries].astype(np.int64), shifts_A)


def _lay_out(view: _Snapshot, prompt: Ids, anchors: _Anchors, budget: int) -> _Overlaps:
    """Chunks laid on the prompt, each shift once: ``budget`` tokens, the likeliest chunks first."""
    packed_A = anchors.rows_A << 32 | anchors.shifts_A + _SHIFT_BIAS
    packed_D, anchors_D = np.unique(packed_A, return_counts=True)
    rows_D, shifts_D = packed_D >> 32, (packed_D & 0xFFFFFFFF) - _SHIFT_BIAS
    first_D = np.maximum(shifts_D, 0)
    last_D = np.minimum(shifts_D + view.lengths[rows_D], len(prompt))
    overlaps = _Overlaps(rows_D, first_D, first_D - shifts_D, last_D - first_D)
    order = np.argsort(-anchors_D / overlaps.lengths_D, kind="stable")
    order = order[np.cumsum(overlaps.lengths_D[order]) <= budget]
    return _Overlaps(*(column[order] for column in overlaps))


def _equal_spans(view: _Snapshot, prompt: Ids, overlaps: _Overlaps) -> _Spans:
    """All stretches of equal ids on these diagonals."""
    rows_D, first_D, offsets_D, lengths_D = overlaps
    # All diagonals end to end: diagonal d is [begins_D, ends_D). The place [ends_D, ends_D + 1)
    # after it counts as a mismatch, which keeps the spans of neighbouring diagonals apart.
    begins_D = _exclusive_sum(lengths_D + 1)
    ends_D = begins_D + lengths_D
    differs = np.ones(lengths_D.sum() + len(rows_D), np.bool_)
    columns = (begins_D, first_D, view.starts[rows_D] + offsets_D, lengths_D)
    for begin, first, token, length in zip(*(c.tolist() for c in columns), strict=True):
        in_prompt, in_chunk = prompt[first : first + length], view.tokens[token : token + length]
        np.not_equal(in_prompt, in_chunk, out=differs[begin : begin + length])
    # A span is what lies between two mismatches, the place before the first one included.
    mismatches = np.flatnonzero(differs)
    begins = np.concatenate([np.zeros(1, np.int64), mismatches + 1])[:-1]
    lengths = mismatches - begins
    long = lengths >= ANCHOR_WIDTH
    begins_S, lengths_S = begins[long], lengths[long]
    diagonal_S = np.searchsorted(ends_D, begins_S)
    within_S = begins_S - begins_D[diagonal_S]
    return _Spans(
        first_D[diagonal_S] + within_S,
        lengths_S,
        rows_D[diagonal_S],
        offsets_D[diagonal_S] + within_S,
    )


# --- a query: whole chunks, by rungs -------------------------------------------------------------


def _wholes(
    view: _Snapshot, prompt: Ids, levels: list[Hashes], found: list[_Found], min_tokens: int
) -> _Spans:
    is_found = np.zeros(len(levels[0]), np.bool_)
    for part in found:
        is_found[part.at] = True
    spans = _climb(view, levels, np.flatnonzero(is_found))
    # What may become long enough by what is equal beside it has to be compared for that.
    short = spans.only(spans.lengths_S < min_tokens)
    best = _best_of_each_stretch(view, spans, min_tokens)
    return _widened(view, prompt, _joined(best, short))


def _climb(view: _Snapshot, levels: list[Hashes], positions: Ints) -> _Spans:
    """At each of these places the oldest chunk of those whose longest known part stands there."""
    hashes_P, equal_P = np.full(len(positions), _SECRET), np.zeros_like(positions)
    runs_P, entries_P = np.zeros_like(positions), np.zeros_like(positions)
    for level in reversed(range(len(levels))):
        fits = np.flatnonzero(positions + equal_P < len(levels[level]))
        longer = equal_P[fits] + (ANCHOR_WIDTH << level)
        hashes = _mix(hashes_P[fits], levels[level][(positions + equal_P)[fits]])
        for number, run in enumerate(view.runs):  # what an older one has, no other is asked for
            if run.longest < ANCHOR_WIDTH << level or not len(fits):
                continue
            at, _, firsts, _ = _find(run, hashes)
            found = fits[at]
            hashes_P[found], equal_P[found] = hashes[at], longer[at]
            runs_P[found], entries_P[found] = number, firsts
            if len(at):
                left = np.ones(len(fits), np.bool_)
                left[at] = False
                fits, longer, hashes = fits[left], longer[left], hashes[left]
    rows_P, offsets_P = np.zeros_like(positions), np.zeros_like(positions)
    for number, run in enumerate(view.runs):
        of_run = runs_P == number
        rows_P[of_run] = run.rows_A[entries_P[of_run]]
        offsets_P[of_run] = run.offsets_A[entries_P[of_run]]
    spans = _Spans(positions, equal_P, rows_P, offsets_P)
    return spans.only(equal_P > 0)


def _widened(view: _Snapshot, prompt: Ids, spans: _Spans) -> _Spans:
    """The spans with what is equal beside them, as far as a chunk's end may be from its rungs."""
    starts_S, lengths_S, rows_S, offsets_S = spans
    begins_S = view.starts[rows_S] + offsets_S
    left_S = np.minimum(starts_S, offsets_S)
    right_S = np.minimum(len(prompt) - starts_S, view.lengths[rows_S] - offsets_S) - lengths_S
    before = _equal_tokens(view, prompt, starts_S - 1, begins_S - 1, left_S, -1)
    after = _equal_tokens(view, prompt, starts_S + lengths_S, begins_S + lengths_S, right_S, 1)
    return _Spans(starts_S - before, before + lengths_S + after, rows_S, offsets_S - before)


def _equal_tokens(
    view: _Snapshot, prompt: Ids, at_S: Ints, begins_S: Ints, limits_S: Ints, step: int
) -> Ints:
    """How many tokens are equal from here on in one direction, up to 32 and the given limits."""
    count_S = np.zeros_like(at_S)
    going: tuple[Ints, ...] = (np.arange(len(at_S)), at_S, begins_S, limits_S)
    for count in range(ANCHOR_MARGIN + ANCHOR_WIDTH + ANCHOR_MARGIN):
        going = _only(going, going[3] > count)
        _, at, begins, _ = going
        equal = prompt.take(at) == view.tokens.take(begins)
        places, at, begins, limits = _only(going, equal)
        count_S[places] = count + 1
        going = (places, at + step, begins + step, limits)
    return count_S


def _only(columns: tuple[Ints, ...], chosen: Bools) -> tuple[Ints, ...]:
    return columns if chosen.all() else tuple(column[chosen] for column in columns)


# --- a query: from spans to matches --------------------------------------------------------------


def _best_of_each_stretch(view: _Snapshot, spans: _Spans, min_tokens: int) -> _Spans:
    """Of the spans that begin within the same ``min_tokens`` tokens, the one that wins."""
    left = np.flatnonzero(spans.lengths_S >= min_tokens)
    stretches_S = spans.starts_S // min_tokens
    for rank_S in _ranks(view, spans):
        best = np.full(stretches_S.max(initial=0) + 1, np.iinfo(np.int64).max)
        np.minimum.at(best, stretches_S[left], rank_S[left])
        left = left[rank_S[left] == best[stretches_S[left]]]
    _, firsts = np.unique(stretches_S[left], return_index=True)  # the same span may come twice
    return spans.only(left[firsts])


def _ranks(view: _Snapshot, spans: _Spans) -> tuple[Ints, ...]:
    starts_S, lengths_S, rows_S, offsets_S = spans
    return -lengths_S, starts_S, offsets_S, view.lengths[rows_S], rows_S


def _joined(*spans: _Spans) -> _Spans:
    return _Spans(*map(np.concatenate, zip(*spans, strict=True)))


def _resolve_overlaps(view: _Snapshot, prompt: Ids, spans: _Spans, min_tokens: int) -> list[Match]:
    columns = (rank_S.tolist() for rank_S in _ranks(view, spans))
    queue = [_Ranked(*span) for span in zip(*columns, strict=True)]
    heapify(queue)
    starts: list[int] = []  # of the taken spans, which are disjoint and in order
    taken: list[_Ranked] = []
    while queue:
        span = heappop(queue)
        # No taken span is shorter than this one, so only the two neighbours can overlap it.
        at = bisect_right(starts, span.start)
        begin = max(span.start, taken[at - 1].end) if at else span.start
        end = min(span.end, starts[at]) if at < len(starts) else span.end
        if (begin, end) != (span.start, span.end):
            if end - begin >= min_tokens:
                heappush(queue, span.trimmed(begin, end))
        elif _is_equal(view, prompt, span):  # or it is a collision of hashes
            starts.insert(at, span.start)
            taken.insert(at, span)
    return [span.match(view) for span in taken]


def _is_equal(view: _Snapshot, prompt: Ids, span: _Ranked) -> bool:
    first = view.starts[span.row] + span.offset
    in_chunk = view.tokens[first : first - span.minus_length]
    return bool((prompt[span.start : span.end] == in_chunk).all())


# --- arrays --------------------------------------------------------------------------------------


def _exclusive_sum(counts: Ints) -> Ints:
    return np.cumsum(counts) - counts


def _ranges(starts: Ints, counts: Ints) -> Ints:
    """``starts[i], starts[i] + 1, ...`` (``counts[i]`` of them) for every i, end to end."""
    shift = np.repeat(starts - _exclusive_sum(counts), counts)
    return np.arange(len(shift)) + shift
