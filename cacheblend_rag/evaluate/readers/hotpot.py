"""HotpotQA and 2WikiMultihopQA, which share a format."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from cacheblend_rag.evaluate.base import Question, Reader, passage, texts


class HotpotReader(Reader):
    """``{"_id", "question", "answer", "context": [[title, [sentence, ...]], ...]}``; the hub's
    column form (``context: {title: [...], sentences: [[...]]}``) as well.
    """

    name = "hotpot"

    def fits(self, record: Mapping[str, Any]) -> bool:
        return {"question", "answer", "context"} <= record.keys() and not isinstance(
            record["context"], str
        )

    def read(
        self, records: Sequence[Mapping[str, Any]], set_name: str, seed: int
    ) -> Iterator[Question]:
        for record in records:
            yield Question(
                set=set_name,
                id=str(record["_id"] if "_id" in record else record["id"]),
                question=record["question"],
                answers=texts(record["answer"]),
                passages=tuple(_passages(record["context"])),
            )


def _passages(context: Any) -> Iterator[str]:
    if isinstance(context, Mapping):
        sentences = context["sentences"] if "sentences" in context else context["content"]
        context = zip(context["title"], sentences, strict=True)
    for title, sentences in context:
        # HotpotQA's sentences carry their own spaces, 2Wiki's don't
        spaced = any(s.startswith(" ") for s in sentences)
        yield passage(title, ("" if spaced else " ").join(sentences))
