"""Find the indexed chunks inside a prompt by their token ids, in any order and at any position.

Every chunk is represented by a few *anchors*: hashes of 16 consecutive tokens at tokens 8, 72,
136, ... and, last, 24 tokens before its end. A query hashes every 16-token window of the prompt,
looks the hashes up, and compares whole chunks with the prompt wherever an anchor was seen. A hash
only proposes; equal token ids decide.

Legend of array names: U distinct hashes in the prompt, A anchors, D diagonals (one chunk laid on
the prompt with one shift), S spans.
"""

from __future__ import annotations

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
Hashes = NDArray[np.uint64]
ScalarT = TypeVar("ScalarT", bound=np.generic)

ANCHOR_WIDTH = 16  # tokens hashed into one anchor
ANCHOR_MARGIN = 8  # tokens that may differ at either end of a chunk without touching an anchor
ANCHOR_STRIDE = 64
MAX_CHUNKS_PER_ANCHOR = 32
MAX_PLACES_PER_ANCHOR = 256

_BATCH_TOKENS = 1 << 18  # work arrays of a batch stay within a few MB, near the CPU's cache
_RUN_RATIO = 4  # each sorted run of anchors is at least this many times the next
_FILTER_BITS_PER_ANCHOR = 16
_SHIFT_BIAS = 1 << 31  # makes a shift non-negative, so that row and shift pack into one int64
_TOKEN_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
_MULTIPLIERS = tuple(
    np.uint64(odd)
    for odd in (0xD6E8FEB86659FD93, 0xA0761D6478BD642F, 0xE7037ED1A0B428DB, 0x8EBC6AF09C88C6E3)
)


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
          tokens; a shorter one of n >= 32 tokens in about (n - 15) / 64 of the cases.
    Spans below 32 tokens (a smaller ``min_tokens``, which may go down to 16): whole chunks from 16
    tokens on, heads and tails from 24 tokens on.

    Two limits keep the cost of repeated text linear. An anchor shared by many chunks proposes the
    32 oldest of them only; the others are found by anchors they share with fewer chunks. An anchor
    that occurs more than 256 times in one prompt is followed at its first 256 places only.

    Overlaps: the longest span wins, then the leftmost, the smallest offset, the shortest chunk, the
    chunk added first. The loser is trimmed to what remains, if that is still ``min_tokens``.

    All methods may be called from several threads. Writers take a lock; ``locate`` takes none and
    answers for the state at its start. The same sequence of calls gives the same answers.
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
        self._runs: list[_Run] = []  # oldest and longest first
        self._filter_bits = _new_filter(0)
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
        """Bytes of the arrays in use: token ids, anchors, filter and chunk table."""
        view = self._snapshot
        chunks = (view.tokens, view.starts, view.lengths, view.alive, view.filter_bits)
        return sum(
            part.nbytes for part in (*chunks, *(column for run in view.runs for column in run))
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
        places = _find_places(prompt, view.filter_bits)
        anchors = _find_anchors(view, places.hashes_U)
        overlaps = _lay_out(view, len(prompt), anchors, places)
        spans = _equal_spans(view, prompt, overlaps, min_tokens)
        return _resolve_overlaps(view, spans, min_tokens)

    def _publish(self) -> None:
        # What a snapshot covers never changes: arrays and keys only grow behind it, and the filter
        # only gains bits, which at worst propose a window in vain.
        self._snapshot = _Snapshot(
            self._tokens.values,
            self._starts.values,
            self._lengths.values,
            self._alive.values,
            self._keys,
            tuple(self._runs),
            self._filter_bits,
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
        self._add_run(_anchor_run(tokens, starts, lengths, first_row))
        self._publish()
        self._rows.update(zip(fresh, range(first_row, len(self._keys)), strict=True))

    def _add_run(self, run: _Run) -> None:
        merged = [run]
        num_anchors = len(run.hashes_A)
        while self._runs and len(self._runs[-1].hashes_A) < _RUN_RATIO * num_anchors:
            merged.insert(0, self._runs.pop())
            num_anchors += len(merged[0].hashes_A)
        self._runs.append(_merge_runs(merged))
        if _filter_is_full(self._filter_bits, self._runs):
            self._rebuild_filter()
        else:
            _mark(self._filter_bits, run.hashes_A)

    def _rebuild_filter(self) -> None:
        self._filter_bits = _new_filter(sum(len(run.hashes_A) for run in self._runs))
        for run in self._runs:
            _mark(self._filter_bits, run.hashes_A)

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
        self._runs = [_renumber(run, alive) for run in self._runs]
        self._rebuild_filter()


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


class _Run(NamedTuple):
    """Anchors sorted by hash; equal hashes in the order their chunks were added."""

    hashes_A: Hashes
    rows_A: NDArray[np.int32]
    offsets_A: NDArray[np.int32]  # where in its chunk the anchor begins


class _Snapshot(NamedTuple):
    tokens: Ids
    starts: Ints
    lengths: Ints
    alive: NDArray[np.bool_]
    keys: list[str]
    runs: tuple[_Run, ...]
    filter_bits: NDArray[np.uint8]


class _Places(NamedTuple):
    """Where in the prompt each hash occurs: ``positions[firsts_U : firsts_U + counts_U]``."""

    hashes_U: Hashes
    firsts_U: Ints
    counts_U: Ints
    positions: Ints


class _Anchors(NamedTuple):
    """Indexed anchors whose hash occurs in the prompt."""

    uniques_A: Ints  # index into hashes_U
    rows_A: Ints
    offsets_A: Ints


_NO_ANCHORS = _Anchors(*(np.empty(0, np.int64) for _ in _Anchors._fields))


class _Overlaps(NamedTuple):
    """What each diagonal has on the prompt: ``[first, first + length)`` against the chunk."""

    rows_D: Ints
    first_D: Ints
    offsets_D: Ints  # the chunk's token that lies on prompt token ``first``
    lengths_D: Ints


class _Spans(NamedTuple):
    """Maximal stretches of equal ids."""

    starts_S: Ints  # in the prompt
    lengths_S: Ints
    rows_S: Ints
    offsets_S: Ints  # in the chunk


_NO_SPANS = _Spans(*(np.empty(0, np.int64) for _ in _Spans._fields))


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


# --- anchors ---------------------------------------------------------------------------------


def _as_ids(token_ids: Sequence[int] | Ids) -> Ids:
    return np.asarray(token_ids, np.int32)


def _hash_windows(ids: Ids) -> Hashes:
    """Hash of ``ids[i : i + ANCHOR_WIDTH]`` for every i, by doubling the width four times."""
    hashes = ids.astype(np.uint64) * _TOKEN_MULTIPLIER
    hashes ^= hashes >> np.uint64(29)
    width = 1
    for multiplier in _MULTIPLIERS:
        if len(hashes) <= width:
            return np.empty(0, np.uint64)
        hashes = hashes[:-width] * multiplier + hashes[width:]
        width *= 2
    return hashes


def _anchor_run(tokens: Ids, starts: Ints, lengths: Ints, first_row: int) -> _Run:
    # Anchor k of a chunk of n tokens begins at min(8 + 64 k, n - 24), or at 0 if n < 24, and the
    # last k is the first to reach n - 24. So two neighbours are at most 64 apart, and none touches
    # the last 8 tokens.
    last = np.maximum(lengths - ANCHOR_WIDTH - ANCHOR_MARGIN, 0)
    counts = np.maximum(last - ANCHOR_MARGIN + ANCHOR_STRIDE - 1, 0) // ANCHOR_STRIDE + 1
    counts[lengths < ANCHOR_WIDTH] = 0
    chunks_A = np.repeat(np.arange(len(lengths)), counts)
    regular_A = ANCHOR_MARGIN + ANCHOR_STRIDE * _ranges(np.zeros_like(counts), counts)
    offsets_A = np.minimum(regular_A, last[chunks_A])
    hashes_A = _hash_windows(tokens)[starts[chunks_A] + offsets_A]
    rows_A = (chunks_A + first_row).astype(np.int32)
    return _sorted_run(_Run(hashes_A, rows_A, offsets_A.astype(np.int32)))


def _sorted_run(run: _Run) -> _Run:
    order = np.argsort(run.hashes_A, kind="stable")
    return _Run(run.hashes_A[order], run.rows_A[order], run.offsets_A[order])


def _merge_runs(runs: list[_Run]) -> _Run:
    if len(runs) == 1:
        return runs[0]
    hashes, rows, offsets = zip(*runs, strict=True)
    return _sorted_run(_Run(np.concatenate(hashes), np.concatenate(rows), np.concatenate(offsets)))


def _renumber(run: _Run, alive: NDArray[np.bool_]) -> _Run:
    """The run without dead chunks, its rows counted among the live ones."""
    new_row = (np.cumsum(alive) - 1).astype(np.int32)
    keep = alive[run.rows_A]
    return _Run(run.hashes_A[keep], new_row[run.rows_A[keep]], run.offsets_A[keep])


# --- filter: one bit for each of the 2^n possible top n bits of a hash -------------------------


def _new_filter(num_anchors: int) -> NDArray[np.uint8]:
    num_bits = 1 << max(16, (num_anchors * _FILTER_BITS_PER_ANCHOR).bit_length())
    return np.zeros(num_bits // 8, np.uint8)


def _filter_is_full(bits: NDArray[np.uint8], runs: list[_Run]) -> bool:
    num_anchors = sum(len(run.hashes_A) for run in runs)
    return num_anchors * _FILTER_BITS_PER_ANCHOR > 8 * len(bits)


def _slots(bits: NDArray[np.uint8], hashes: Hashes) -> tuple[Ints, NDArray[np.uint8]]:
    slots = (hashes >> np.uint64(65 - (8 * len(bits)).bit_length())).astype(np.int64)
    return slots >> 3, np.left_shift(1, slots & 7).astype(np.uint8)


def _mark(bits: NDArray[np.uint8], hashes: Hashes) -> None:
    index, mask = _slots(bits, hashes)
    np.bitwise_or.at(bits, index, mask)


def _is_marked(bits: NDArray[np.uint8], hashes: Hashes) -> NDArray[np.bool_]:
    index, mask = _slots(bits, hashes)
    marked: NDArray[np.bool_] = (bits[index] & mask) != 0
    return marked


# --- the steps of a query ----------------------------------------------------------------------


def _find_places(prompt: Ids, filter_bits: NDArray[np.uint8]) -> _Places:
    hashes = _hash_windows(prompt)
    positions = np.flatnonzero(_is_marked(filter_bits, hashes))
    hashes = hashes[positions]
    order = np.argsort(hashes, kind="stable")
    hashes_U, firsts_U, counts_U = np.unique(hashes[order], return_index=True, return_counts=True)
    return _Places(
        hashes_U, firsts_U, np.minimum(counts_U, MAX_PLACES_PER_ANCHOR), positions[order]
    )


def _find_anchors(view: _Snapshot, hashes_U: Hashes) -> _Anchors:
    found = [_find_in_run(run, view.alive, hashes_U) for run in view.runs]
    anchors = _Anchors(*map(np.concatenate, zip(_NO_ANCHORS, *found, strict=True)))
    order = np.argsort(anchors.uniques_A, kind="stable")  # oldest first, as the runs are
    uniques_A = anchors.uniques_A[order]
    rank_A = np.arange(len(order)) - np.searchsorted(uniques_A, uniques_A)
    chosen = order[rank_A < MAX_CHUNKS_PER_ANCHOR]
    return _Anchors(*(column[chosen] for column in anchors))


def _find_in_run(run: _Run, alive: NDArray[np.bool_], hashes_U: Hashes) -> _Anchors:
    low = np.searchsorted(run.hashes_A, hashes_U, "left")
    counts = np.searchsorted(run.hashes_A, hashes_U, "right") - low
    entries = _ranges(low, counts)
    keep = alive[run.rows_A[entries]]
    uniques = np.repeat(np.arange(len(hashes_U)), counts)[keep]
    entries = entries[keep]
    rows, offsets = run.rows_A[entries], run.offsets_A[entries]
    return _Anchors(uniques, rows.astype(np.int64), offsets.astype(np.int64))


def _lay_out(view: _Snapshot, prompt_len: int, anchors: _Anchors, places: _Places) -> _Overlaps:
    """Every chunk laid on every place where one of its anchors may be, each shift once."""
    counts_A = places.counts_U[anchors.uniques_A]
    positions = places.positions[_ranges(places.firsts_U[anchors.uniques_A], counts_A)]
    shifts = positions - np.repeat(anchors.offsets_A, counts_A)
    packed_D = np.unique(np.repeat(anchors.rows_A, counts_A) << 32 | shifts + _SHIFT_BIAS)
    rows_D, shifts_D = packed_D >> 32, (packed_D & 0xFFFFFFFF) - _SHIFT_BIAS
    # Token t of the chunk lies on prompt token t + shift.
    first_D = np.maximum(shifts_D, 0)
    last_D = np.minimum(shifts_D + view.lengths[rows_D], prompt_len)
    return _Overlaps(rows_D, first_D, first_D - shifts_D, last_D - first_D)


def _equal_spans(view: _Snapshot, prompt: Ids, overlaps: _Overlaps, min_tokens: int) -> _Spans:
    spans = [_compare(view, prompt, part, min_tokens) for part in _split(overlaps)]
    return _Spans(*map(np.concatenate, zip(_NO_SPANS, *spans, strict=True)))


def _split(overlaps: _Overlaps) -> Iterator[_Overlaps]:
    """Parts of about _BATCH_TOKENS tokens, so that memory stays bounded whatever the prompt."""
    part_D = np.cumsum(overlaps.lengths_D) // _BATCH_TOKENS
    cuts = np.flatnonzero(np.diff(part_D)) + 1
    columns = (np.split(column, cuts) for column in overlaps)
    return (_Overlaps(*part) for part in zip(*columns, strict=True))


def _compare(view: _Snapshot, prompt: Ids, overlaps: _Overlaps, min_tokens: int) -> _Spans:
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
    keep = lengths >= min_tokens
    begins_S, lengths_S = begins[keep], lengths[keep]
    diagonal_S = np.searchsorted(ends_D, begins_S)
    within_S = begins_S - begins_D[diagonal_S]
    return _Spans(
        first_D[diagonal_S] + within_S,
        lengths_S,
        rows_D[diagonal_S],
        offsets_D[diagonal_S] + within_S,
    )


def _resolve_overlaps(view: _Snapshot, spans: _Spans, min_tokens: int) -> list[Match]:
    queue = _ranked(view, spans)
    taken: list[Match] = []  # disjoint, sorted by start
    while queue:
        span = heappop(queue)
        # No taken span is shorter than this one, so only the two neighbours can overlap it.
        at = bisect_right(taken, span.start, key=_start)
        begin = max(span.start, taken[at - 1].end) if at else span.start
        end = min(span.end, taken[at].start) if at < len(taken) else span.end
        if (begin, end) == (span.start, span.end):
            taken.insert(at, span.match(view))
        elif end - begin >= min_tokens:
            heappush(queue, span.trimmed(begin, end))
    return taken


def _ranked(view: _Snapshot, spans: _Spans) -> list[_Ranked]:
    """The spans as a heap, of those on the same prompt tokens only the one that wins."""
    starts_S, lengths_S, rows_S, offsets_S = spans
    chunks_S = view.lengths[rows_S]
    order = np.lexsort((rows_S, chunks_S, offsets_S, lengths_S, starts_S))
    # The first of each place: lexsort put the winner there.
    moved = np.diff(starts_S[order], prepend=-1) | np.diff(lengths_S[order], prepend=-1)
    winners = order[moved != 0]
    columns = (-lengths_S, starts_S, offsets_S, chunks_S, rows_S)
    queue = [_Ranked(*span) for span in zip(*(c[winners].tolist() for c in columns), strict=True)]
    heapify(queue)
    return queue


def _start(match: Match) -> int:
    return match.start


# --- arrays ------------------------------------------------------------------------------------


def _exclusive_sum(counts: Ints) -> Ints:
    return np.cumsum(counts) - counts


def _ranges(starts: Ints, counts: Ints) -> Ints:
    """``starts[i], starts[i] + 1, ...`` (``counts[i]`` of them) for every i, end to end."""
    shift = np.repeat(starts - _exclusive_sum(counts), counts)
    return np.arange(len(shift)) + shift
