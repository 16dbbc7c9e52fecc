"""What an evaluation is made of: questions over passages, and the readers that bring them."""

from __future__ import annotations

import hashlib
import itertools
import random
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, get_args

from cacheblend_rag.errors import DataError

Kind = Literal["qa", "summary", "fewshot"]
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True, kw_only=True)
class Question:
    """One question, over passages that are a chunk each.

    Attributes:
        set: name of the data set; id: of the question in it.
        question: what is asked: of kind ``fewshot`` the input that follows the examples.
        answers: any of them is right; empty where none is known.
        passages: in the order of the prompt.
        left_context: of each passage, what stands before it in its own document, or None; empty
            where every passage is a document.
    """

    set: str
    id: str
    question: str
    answers: tuple[str, ...]
    passages: tuple[str, ...]
    kind: Kind = "qa"
    left_context: tuple[str | None, ...] = ()

    def cut(self, words: int, *, scatter: bool = False) -> Question:
        """The same over pieces of so many words, the passage that they are of being their document.
        A rest of less than half of that stays with the piece before it.

        ``scatter`` leaves half of the pieces out and mixes the others, as a retriever would: what a
        piece was computed behind is then seldom what stands before it in the prompt.
        """
        pieces = [piece for passage in self.passages for piece in _pieces(passage, words)]
        if scatter:
            pieces = random.Random(self.id).sample(pieces, (len(pieces) + 1) // 2)
        texts, left_context = zip(*pieces, strict=True)
        return replace(self, passages=texts, left_context=left_context)

    @property
    def half(self) -> str:
        """``tune`` or ``report``: by a hash of the id alone, so it never changes."""
        return "tune" if hashlib.sha256(self.id.encode()).digest()[0] % 2 else "report"


def _pieces(passage: str, words: int) -> Iterator[tuple[str, str | None]]:
    """Each piece of a passage, and what stands before it."""
    starts = [word.start() for word in re.finditer(r"\S+", passage)]
    last = len(starts) - max(1, words // 2)
    cuts = [starts[i] for i in range(words, last + 1, words)]
    for start, end in itertools.pairwise([0, *cuts, len(passage)]):
        yield passage[start:end].strip(), passage[:start] or None


class Reader(ABC):
    """Reads one published format. A frozen value without state: all is in the records."""

    name: ClassVar[str]

    @abstractmethod
    def fits(self, record: Mapping[str, Any]) -> bool:
        """Whether the first record of a file has this format."""

    @abstractmethod
    def read(
        self, records: Sequence[Mapping[str, Any]], set_name: str, seed: int
    ) -> Iterator[Question]:
        """The questions of one file, in its order; ``seed`` is for readers that draw examples.

        Raises:
            KeyError, TypeError, ValueError: a record is not of this format.
        """


def passage(title: str, text: str) -> str:
    """One chunk's text.

    Raises:
        ValueError: it is empty.
    """
    joined = f"{title}\n{text}".strip()
    if not joined:
        raise ValueError("a passage is empty")
    return joined


def texts(value: object) -> tuple[str, ...]:
    """Answers as published: a text, or a list of texts, or lists of them; repeated ones once."""
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, Sequence):
        raise ValueError(f"answers must be texts, not {type(value).__name__}")
    return tuple(dict.fromkeys(text for part in value for text in texts(part)))


def checked_kind(value: object) -> Kind:
    """``value`` as a kind.

    Raises:
        DataError: there is no such kind.
    """
    for kind in KINDS:
        if value == kind:
            return kind
    raise DataError(f"kind is {value!r}; it must be one of {', '.join(KINDS)}")
