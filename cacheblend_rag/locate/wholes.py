"""Whole chunks in a prompt, proposed by rungs.

Shape legend: P places in the prompt, S spans.
"""

from __future__ import annotations

import numpy as np

from cacheblend_rag.locate.arrays import Hashes, Ids, Ints
from cacheblend_rag.locate.hashes import ANCHOR_MARGIN, ANCHOR_WIDTH, SECRET, mix
from cacheblend_rag.locate.runs import Found, Snapshot, find
from cacheblend_rag.locate.spans import Spans, best_of_each_stretch, joined

_MOST_EQUAL = ANCHOR_MARGIN + ANCHOR_WIDTH + ANCHOR_MARGIN  # tokens from a chunk's end to its rungs


def whole_chunks(
    view: Snapshot, prompt: Ids, levels: list[Hashes], found: list[Found], min_tokens: int
) -> Spans:
    """Chunks that stand in the prompt whole, but for fewer than 32 tokens at either end.

    Args:
        levels: hashes of the prompt.
        found: what each run has of its windows.
    """
    is_found = np.zeros(len(levels[0]), np.bool_)
    for part in found:
        is_found[part.at] = True
    spans = _climb(view, levels, np.flatnonzero(is_found))
    # What may become long enough by what is equal beside it has to be compared for that.
    short = spans.only(spans.lengths_S < min_tokens)
    best = best_of_each_stretch(view, spans, min_tokens)
    return _widened(view, prompt, joined(best, short))


def _climb(view: Snapshot, levels: list[Hashes], positions: Ints) -> Spans:
    """At each of these places the oldest chunk of those whose longest known part stands there."""
    hashes_P, equal_P = np.full(len(positions), SECRET), np.zeros_like(positions)
    runs_P, entries_P = np.zeros_like(positions), np.zeros_like(positions)
    for level in reversed(range(len(levels))):
        fits = np.flatnonzero(positions + equal_P < len(levels[level]))
        longer = equal_P[fits] + (ANCHOR_WIDTH << level)
        hashes = mix(hashes_P[fits], levels[level][(positions + equal_P)[fits]])
        for number, run in enumerate(view.runs):  # what an older one has, no other is asked for
            if run.longest < ANCHOR_WIDTH << level or not len(fits):
                continue
            at, _, firsts, _ = find(run, hashes)
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
    spans = Spans(positions, equal_P, rows_P, offsets_P)
    return spans.only(equal_P > 0)


def _widened(view: Snapshot, prompt: Ids, spans: Spans) -> Spans:
    """The spans with what is equal beside them, as far as a chunk's end may be from its rungs."""
    starts_S, lengths_S, rows_S, offsets_S = spans
    begins_S = view.starts[rows_S] + offsets_S
    left_S = np.minimum(starts_S, offsets_S)
    right_S = np.minimum(len(prompt) - starts_S, view.lengths[rows_S] - offsets_S) - lengths_S
    before = _equal_tokens(view, prompt, starts_S - 1, begins_S - 1, left_S, -1)
    after = _equal_tokens(view, prompt, starts_S + lengths_S, begins_S + lengths_S, right_S, 1)
    return Spans(starts_S - before, before + lengths_S + after, rows_S, offsets_S - before)


def _equal_tokens(
    view: Snapshot, prompt: Ids, at_S: Ints, begins_S: Ints, limits_S: Ints, step: int
) -> Ints:
    """How many tokens are equal from here on in one direction, up to 32 and the given limits."""
    # all at once: a loop over the tokens costs more than what it saves by ending early
    ahead = np.arange(_MOST_EQUAL)
    in_prompt, in_chunks = (x[:, None] + step * ahead for x in (at_S, begins_S))
    equal = prompt.take(in_prompt, mode="clip") == view.tokens.take(in_chunks, mode="clip")
    equal &= ahead < limits_S[:, None]
    count_S: Ints = np.where(equal.all(axis=1), _MOST_EQUAL, equal.argmin(axis=1))
    return count_S
