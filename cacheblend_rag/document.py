"""What stands before each piece of a document, from what a framework knows of the pieces. Pure."""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Sequence
from typing import NamedTuple

from cacheblend_rag.prefix import BEFORE_CHARS


class Piece(NamedTuple):
    """A piece of a document.

    Attributes:
        text: as it stands there.
        document: what it is a piece of; None where that is unknown.
        start: characters before it there; None where that is unknown.
    """

    text: str
    document: Hashable | None
    start: int | None = None


def texts_before(pieces: Sequence[Piece]) -> list[str | None]:
    """Of each piece, the end of what stands before it in its document, as far as the others tell;
    None where nothing does.

    Pieces of a document are ordered by their starts where all have one, else as they are given. By
    their starts, text that neighbours share stands once; without, that isn't known.
    """
    documents: dict[Hashable, list[int]] = {}
    for number, piece in enumerate(pieces):
        if piece.document is not None:
            documents.setdefault(piece.document, []).append(number)
    left_context: list[str | None] = [None] * len(pieces)
    for numbers in documents.values():
        known = ""
        for number, following in itertools.pairwise(_in_order(pieces, numbers)):
            own = _until(pieces[number], pieces[following])
            known = (known + own)[-BEFORE_CHARS:]
            left_context[following] = known or None
    return left_context


def _in_order(pieces: Sequence[Piece], numbers: Sequence[int]) -> Sequence[int]:
    starts = {n: start for n in numbers if (start := pieces[n].start) is not None}
    return sorted(numbers, key=starts.__getitem__) if len(starts) == len(numbers) else numbers


def _until(piece: Piece, following: Piece) -> str:
    """The document's text from one piece's start to another's."""
    if piece.start is None or following.start is None:
        return piece.text + "\n\n"
    length = following.start - piece.start
    # what a splitter leaves out between two pieces is white space
    return piece.text[:length] if length <= len(piece.text) else piece.text + "\n"
