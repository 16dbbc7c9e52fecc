"""Parts of chunks in a prompt, proposed by rare anchors.

Shape legend: A anchors, D diagonals (one chunk laid on the prompt with one shift), S spans.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from cacheblend_rag.locate.arrays import Ids, Ints, exclusive_sum, ranges
from cacheblend_rag.locate.hashes import ANCHOR_STRIDE, ANCHOR_WIDTH
from cacheblend_rag.locate.runs import Found, Run, Snapshot
from cacheblend_rag.locate.spans import Spans

# The budget of one query, several times what a prompt full of chunks needs.
MAX_ANCHORS = 8  # that are followed in a stretch of ANCHOR_STRIDE prompt tokens
FREE_TOKENS, TOKENS_PER_TOKEN = 1 << 18, 16  # tokens of chunks that are compared
_MOST_CROWDED = (1 << 24) - 1  # more chunks with one anchor are all the same
_SHIFT_BIAS = 1 << 31  # makes a shift non-negative, so that row and shift pack into one int64


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


def parts_of_chunks(view: Snapshot, prompt: Ids, found: list[Found]) -> Spans:
    """Stretches of chunks that stand in the prompt, as far as the budget goes.

    Args:
        found: what each run has of the prompt's windows.
    """
    anchors = _rare_anchors(view, found)
    overlaps = _lay_out(view, prompt, anchors, FREE_TOKENS + TOKENS_PER_TOKEN * len(prompt))
    return _equal_spans(view, prompt, overlaps)


def _rare_anchors(view: Snapshot, found: list[Found]) -> _Anchors:
    """In every stretch of 64 prompt tokens the anchors of the fewest chunks, up to 8."""
    # One number that sorts by stretch, crowd, place and run, and holds them all: NumPy sorts
    # numbers several times faster than it finds their order.
    numbers = np.concatenate([_sortable(part, run) for run, part in enumerate(found)])
    numbers.sort()
    stretches, crowds = numbers >> 38, numbers >> 14 & _MOST_CROWDED
    before = exclusive_sum(crowds)
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


def _sortable(found: Found, run: int) -> Ints:
    stretches, within = found.at // ANCHOR_STRIDE, found.at % ANCHOR_STRIDE
    crowds = np.minimum(found.ends - found.firsts, _MOST_CROWDED)
    numbers: Ints = ((stretches << 24 | crowds) << 6 | within) << 8 | run
    return numbers


def _anchors_at(run: Run, at: Ints, firsts: Ints, counts: Ints) -> _Anchors:
    entries = ranges(firsts, counts)
    shifts_A = np.repeat(at, counts) - run.offsets_A[entries]
    return _Anchors(run.rows_A[entries].astype(np.int64), shifts_A)


def _lay_out(view: Snapshot, prompt: Ids, anchors: _Anchors, budget: int) -> _Overlaps:
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


def _equal_spans(view: Snapshot, prompt: Ids, overlaps: _Overlaps) -> Spans:
    """All stretches of equal ids on these diagonals."""
    rows_D, first_D, offsets_D, lengths_D = overlaps
    # All diagonals end to end: diagonal d is [begins_D, ends_D). The place [ends_D, ends_D + 1)
    # after it counts as a mismatch, which keeps the spans of neighbouring diagonals apart.
    begins_D = exclusive_sum(lengths_D + 1)
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
    return Spans(
        first_D[diagonal_S] + within_S,
        lengths_S,
        rows_D[diagonal_S],
        offsets_D[diagonal_S] + within_S,
    )
