"""The usual case: whole chunks, apart from one another, and nothing else that is known.

Shape legend: A anchors, D chunks laid on the prompt.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from cacheblend_rag.locate.arrays import Bools, Ids, Ints
from cacheblend_rag.locate.hashes import ANCHOR_MARGIN
from cacheblend_rag.locate.runs import Found, Snapshot
from cacheblend_rag.locate.spans import Match

_SHIFT_BIAS = 1 << 31  # makes a shift non-negative, so that row and shift pack into one int64


def plainly_there(
    view: Snapshot, prompt: Ids, found: list[Found], min_tokens: int
) -> list[Match] | None:
    """What ``ChunkIndex.locate`` returns where each anchor that is found is of one chunk only, and
    these chunks stand in the prompt whole, but for tokens before their first and behind their last
    anchor, and do not overlap. None anywhere else.
    """
    packed_D = _diagonals(view, found)
    if packed_D is None:
        return None
    rows_D, shifts_D = packed_D >> 32, (packed_D & 0xFFFFFFFF) - _SHIFT_BIAS
    lengths_D = view.lengths[rows_D]
    ends_D = shifts_D + lengths_D
    is_inside = (shifts_D >= 0).all() and (ends_D <= len(prompt)).all()
    # No more is compared than a few times the prompt's tokens, whatever is in it.
    if not is_inside or lengths_D.sum() > 2 * len(prompt):
        return None
    matches = []
    columns = (rows_D, shifts_D, ends_D, view.starts[rows_D])
    for row, start, end, first in zip(*(column.tolist() for column in columns), strict=True):
        differs = prompt[start:end] != view.tokens[first : first + end - start]
        span = _one_span(differs)
        if span is None or span.stop - span.start < min_tokens:
            return None
        low, high = start + span.start, start + span.stop
        matches.append(Match(low, high, view.keys[row], span.start, end - start))
    matches.sort()
    is_apart = all(a.end <= b.start for a, b in pairwise(matches))
    return matches if is_apart else None


def _one_span(differs: Bools) -> range | None:
    """The tokens between those that differ at the ends; None where others do."""
    at, behind = np.flatnonzero(differs), len(differs) - ANCHOR_MARGIN
    if not len(at):
        return range(len(differs))
    head, tail = at[at < ANCHOR_MARGIN], at[at >= behind]
    if len(head) + len(tail) != len(at):
        return None
    first = int(head[-1]) + 1 if len(head) else 0
    return range(first, int(tail[0]) if len(tail) else len(differs))


def _diagonals(view: Snapshot, found: list[Found]) -> Ints | None:
    """Row and shift, packed into one number, of all chunks that the anchors propose, each once;
    None where an anchor is of several chunks.
    """
    parts = []
    for run, part in zip(view.runs, found, strict=True):
        if (part.ends - part.firsts != 1).any():
            return None
        rows_A = run.rows_A[part.firsts].astype(np.int64)
        shifts_A = part.at - run.offsets_A[part.firsts]
        if not view.alive[rows_A].all():
            return None
        parts.append(rows_A << 32 | shifts_A + _SHIFT_BIAS)
    return np.unique(np.concatenate(parts))
