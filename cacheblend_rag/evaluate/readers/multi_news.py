"""Multi-News as published on the hub."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from cacheblend_rag.evaluate.base import Question, Reader, passage, texts

BETWEEN = "|||||"
TASK = "Write a one-page summary of all the news articles."


class MultiNewsReader(Reader):
    """``{"document": "article ||||| article ...", "summary"}``. There are no ids in it: a hash of
    the document is one.
    """

    name = "multi_news"

    def fits(self, record: Mapping[str, Any]) -> bool:
        return {"document", "summary"} <= record.keys()

    def read(
        self, records: Sequence[Mapping[str, Any]], set_name: str, seed: int
    ) -> Iterator[Question]:
        for record in records:
            articles = [a.strip() for a in record["document"].split(BETWEEN)]
            yield Question(
                set=set_name,
                id=hashlib.sha256(record["document"].encode()).hexdigest()[:16],
                question=TASK,
                answers=texts(record["summary"].removeprefix("– ").strip()),
                passages=tuple(passage("", a) for a in articles if a),
                kind="summary",
            )
