"""MuSiQue as published."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from cacheblend_rag.evaluate.base import Question, Reader, passage, texts


class MusiqueReader(Reader):
    """``{"id", "question", "answer", "answer_aliases", "paragraphs": [{"title",
    "paragraph_text"}]}``; questions marked unanswerable are left out.
    """

    name = "musique"

    def fits(self, record: Mapping[str, Any]) -> bool:
        return {"question", "answer", "paragraphs"} <= record.keys()

    def read(
        self, records: Sequence[Mapping[str, Any]], set_name: str, seed: int
    ) -> Iterator[Question]:
        for record in records:
            if record.get("answerable", True):
                yield Question(
                    set=set_name,
                    id=str(record["id"]),
                    question=record["question"],
                    answers=texts([record["answer"], record.get("answer_aliases", [])]),
                    passages=tuple(
                        passage(p["title"], p["paragraph_text"]) for p in record["paragraphs"]
                    ),
                )
