"""The inputs in CacheBlend's repository (``inputs/musique_s.json``, ``wikimqa_s.json``)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from cacheblend_rag.evaluate.base import Question, Reader, passage, texts


class CacheBlendReader(Reader):
    """``{"question", "answers", "ctxs": [{"title", "text"}, ...]}``; an id is the position in the
    file where there is none.
    """

    name = "cacheblend"

    def fits(self, record: Mapping[str, Any]) -> bool:
        return {"question", "answers", "ctxs"} <= record.keys()

    def read(
        self, records: Sequence[Mapping[str, Any]], set_name: str, seed: int
    ) -> Iterator[Question]:
        for number, record in enumerate(records):
            yield Question(
                set=set_name,
                id=str(record.get("id", f"{set_name}-{number:03}")),
                question=record["question"],
                answers=texts(record["answers"]),
                passages=tuple(passage(c.get("title", ""), c["text"]) for c in record["ctxs"]),
            )
