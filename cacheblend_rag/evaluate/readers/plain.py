"""Our own simple format, for anyone's questions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from cacheblend_rag.evaluate.base import Question, Reader, checked_kind, passage, texts


class PlainReader(Reader):
    """One object a line: ``{"question": "...", "passages": ["...", {"title", "text"}, ...]}``,
    and, where they are known, ``id``, ``answers`` (or ``answer``) and ``kind``.
    """

    name = "plain"

    def fits(self, record: Mapping[str, Any]) -> bool:
        return "question" in record and "passages" in record

    def read(
        self, records: Sequence[Mapping[str, Any]], set_name: str, seed: int
    ) -> Iterator[Question]:
        for number, record in enumerate(records, 1):
            yield Question(
                set=set_name,
                id=str(record.get("id", number)),
                question=str(record["question"]),
                answers=texts(record.get("answers", record.get("answer")) or ()),
                passages=tuple(_passage(p) for p in record["passages"]),
                kind=checked_kind(record.get("kind", "qa")),
            )


def _passage(value: str | Mapping[str, str]) -> str:
    if isinstance(value, str):
        return passage("", value)
    return passage(value.get("title", ""), value["text"])
