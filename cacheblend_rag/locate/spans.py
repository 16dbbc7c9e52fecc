"""From spans, stretches of equal ids in prompt and chunks, to matches that do not overlap.

Shape legend: S spans.
"""

from __future__ import annotations

from bisect import bisect_right
from heapq import heapify, heappop, heappush
from typing import NamedTuple

import numpy as np

from cacheblend_rag.locate.arrays import Bools, Ids, Ints
from cacheblend_rag.locate.runs import Snapshot


class Match(NamedTuple):
    """Prompt tokens ``[start, end)`` equal tokens ``[offset, offset + end - start)`` of a chunk."""

    start: int
    end: int
    key: str
    offset: int
    chunk_tokens: int  # length of the whole chunk


class Spans(NamedTuple):
    """Stretches of equal ids."""

    starts_S: Ints  # in the prompt
    lengths_S: Ints
    rows_S: Ints
    offsets_S: Ints  # in the chunk

    def only(self, chosen: Bools | Ints) -> Spans:
        return Spans(*(column[chosen] for column in self))


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

    def match(self, view: Snapshot) -> Match:
        return Match(self.start, self.end, view.keys[self.row], self.offset, self.chunk_tokens)


def best_of_each_stretch(view: Snapshot, spans: Spans, min_tokens: int) -> Spans:
    """Of the spans that begin within the same ``min_tokens`` tokens, the one that wins."""
    left = np.flatnonzero(spans.lengths_S >= min_tokens)
    stretches_S = spans.starts_S // min_tokens
    for rank_S in _ranks(view, spans):
        best = np.full(stretches_S.max(initial=0) + 1, np.iinfo(np.int64).max)
        np.minimum.at(best, stretches_S[left], rank_S[left])
        left = left[rank_S[left] == best[stretches_S[left]]]
    _, firsts = np.unique(stretches_S[left], return_index=True)  # the same span may come twice
    return spans.only(left[firsts])


def _ranks(view: Snapshot, spans: Spans) -> tuple[Ints, ...]:
    starts_S, lengths_S, rows_S, offsets_S = spans
    return -lengths_S, starts_S, offsets_S, view.lengths[rows_S], rows_S


def joined(*spans: Spans) -> Spans:
    """All of these."""
    return Spans(*map(np.concatenate, zip(*spans, strict=True)))


def resolve_overlaps(view: Snapshot, prompt: Ids, spans: Spans, min_tokens: int) -> list[Match]:
    """Disjoint matches, by the rules of ``ChunkIndex``. None is shorter than ``min_tokens``."""
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


def _is_equal(view: Snapshot, prompt: Ids, span: _Ranked) -> bool:
    # Hashes that collide also propose more tokens than a chunk or a prompt has.
    first, end = view.starts[span.row] + span.offset, span.offset - span.minus_length
    if end > span.chunk_tokens or span.end > len(prompt):
        return False
    in_chunk = view.tokens[first : first - span.minus_length]
    return bool((prompt[span.start : span.end] == in_chunk).all())
