"""Hashes of windows of tokens: anchors and rungs of chunks, and the windows of a prompt.

Shape legend: A anchors and rungs.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cacheblend_rag.locate.arrays import Hashes, Ids, Ints, ranges

ANCHOR_WIDTH = 16  # tokens hashed into one anchor; the lengths of rungs are multiples of it
ANCHOR_MARGIN = 8  # tokens that may differ at either end of a chunk without touching an anchor
ANCHOR_STRIDE = 64
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
# Nobody outside this process can make two windows collide on purpose.
SECRET = np.uint64(secrets.randbits(64))


def mix(left: Hashes, right: Hashes) -> Hashes:
    """The hash of two stretches, one after the other, from those of each."""
    mixed = left * _MULTIPLIER + right
    mixed ^= mixed >> np.uint64(32)
    return mixed


def window_hashes(ids: Ids) -> Hashes:
    """The hash of the ``ANCHOR_WIDTH`` tokens from each token on, while there are as many."""
    hashes = (ids.astype(np.uint64) ^ SECRET) * _MULTIPLIER
    hashes ^= hashes >> np.uint64(32)
    width = 1
    while width < ANCHOR_WIDTH:
        hashes = mix(hashes[:-width], hashes[width:])
        width *= 2
    return hashes


def hash_levels(windows: Hashes, longest: int) -> list[Hashes]:
    """``levels[k][i]``: hash of the ``16 << k`` tokens from i on, for widths up to ``longest``.

    Args:
        windows: ``window_hashes``, the first level.
    """
    hashes, width, levels = windows, ANCHOR_WIDTH, []
    while len(hashes) and width <= max(longest, ANCHOR_WIDTH):
        levels.append(hashes)
        hashes = mix(hashes[:-width], hashes[width:])
        width *= 2
    return levels


class Entries(NamedTuple):
    """Anchors and rungs in the order their chunks were added, or sorted by hash."""

    hashes_A: Hashes
    rows_A: NDArray[np.int32]
    offsets_A: NDArray[np.int32]  # where in its chunk the hashed tokens begin


def entries_of(tokens: Ids, starts: Ints, lengths: Ints, first_row: int) -> Entries:
    """Anchors and rungs of chunks, which lie in ``tokens`` one after another.

    Args:
        starts, lengths: of each chunk there.
        first_row: the first chunk's row in the index; the others follow.
    """
    levels = hash_levels(window_hashes(tokens), int(lengths.max()))
    if not levels:
        no_rows = np.empty(0, np.int32)
        return Entries(np.empty(0, np.uint64), no_rows, no_rows)
    parts = [_anchors(levels[0], starts, lengths), *_rungs(levels, starts, lengths)]
    hashes_A, chunks_A, offsets_A = map(np.concatenate, zip(*parts, strict=True))
    order = np.argsort(chunks_A, kind="stable")
    rows_A = (chunks_A[order] + first_row).astype(np.int32)
    return Entries(hashes_A[order], rows_A, offsets_A[order].astype(np.int32))


def _anchors(hashes: Hashes, starts: Ints, lengths: Ints) -> tuple[Hashes, Ints, Ints]:
    # Anchor k of a chunk of n tokens begins at min(8 + 64 k, n - 24), or at 0 if n < 24, and the
    # last k is the first to reach n - 24. So two neighbours are at most 64 apart, and none touches
    # the last 8 tokens.
    last = np.maximum(lengths - ANCHOR_WIDTH - ANCHOR_MARGIN, 0)
    counts = np.maximum(last - ANCHOR_MARGIN + ANCHOR_STRIDE - 1, 0) // ANCHOR_STRIDE + 1
    counts[lengths < ANCHOR_WIDTH] = 0
    chunks_A = np.repeat(np.arange(len(lengths)), counts)
    regular_A = ANCHOR_MARGIN + ANCHOR_STRIDE * ranges(np.zeros_like(counts), counts)
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
    hashes, hashed_A = np.full(len(lengths), SECRET), np.zeros_like(lengths)
    for level in reversed(range(len(levels))):
        width = ANCHOR_WIDTH << level
        chunks_A = np.flatnonzero(sizes & width)
        at = starts[chunks_A] + offsets[chunks_A] + hashed_A[chunks_A]
        hashes[chunks_A] = mix(hashes[chunks_A], levels[level][at])
        hashed_A[chunks_A] += width
        yield hashes[chunks_A], chunks_A, offsets[chunks_A]
