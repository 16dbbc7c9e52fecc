"""SQuAD 1.1 and 2.0 as published."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from cacheblend_rag.evaluate.base import Question, Reader, passage, texts

BLOCK = 10  # paragraphs an item


class SquadReader(Reader):
    """``{"data": [{"title", "paragraphs": [{"context", "qas": [...]}]}]}``. A question's passages
    are the ``BLOCK`` consecutive paragraphs of its article among which its own is; a short rest
    joins the block before it. Unanswerable questions are left out.
    """

    name = "squad"

    def fits(self, record: Mapping[str, Any]) -> bool:
        return isinstance(record.get("data"), list)

    def read(
        self, records: Sequence[Mapping[str, Any]], set_name: str, seed: int
    ) -> Iterator[Question]:
        for article in (a for record in records for a in record["data"]):
            for block in _blocks(article["paragraphs"]):
                passages = tuple(passage(article.get("title", ""), p["context"]) for p in block)
                for qa in (qa for p in block for qa in p["qas"]):
                    if not qa.get("is_impossible", False):
                        yield Question(
                            set=set_name,
                            id=str(qa["id"]),
                            question=qa["question"],
                            answers=texts([a["text"] for a in qa["answers"]]),
                            passages=passages,
                        )


def _blocks(paragraphs: Sequence[Any]) -> list[Sequence[Any]]:
    blocks = [paragraphs[i : i + BLOCK] for i in range(0, len(paragraphs), BLOCK)]
    if len(blocks) > 1 and len(blocks[-1]) < BLOCK // 2:
        blocks[-2:] = [[*blocks[-2], *blocks[-1]]]
    return blocks
