"""SAMSum as published: dialogues to summarise, behind examples from the same file."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from cacheblend_rag.evaluate.base import Question, Reader, passage, texts

EXAMPLES = 12


class SamsumReader(Reader):
    """``{"id", "dialogue", "summary"}``. Examples are drawn from a fixed half of the file, so that
    they recur in other orders; the other half is asked.
    """

    name = "samsum"

    def fits(self, record: Mapping[str, Any]) -> bool:
        return {"dialogue", "summary"} <= record.keys()

    def read(
        self, records: Sequence[Mapping[str, Any]], set_name: str, seed: int
    ) -> Iterator[Question]:
        draw = random.Random(seed)
        whole = [r for r in records if r["dialogue"].strip()]
        examples = [_example(r) for r in whole[::2][: 4 * EXAMPLES]]
        for record in whole[1::2]:
            yield Question(
                set=set_name,
                id=str(record["id"]),
                question=record["dialogue"],
                answers=texts(record["summary"]),
                passages=tuple(draw.sample(examples, min(EXAMPLES, len(examples)))),
                kind="fewshot",
            )


def _example(record: Mapping[str, Any]) -> str:
    return passage("", f"Dialogue: {record['dialogue']}\nSummary: {record['summary']}")
