"""LongBench's JSONL files."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from cacheblend_rag.evaluate.base import Kind, Question, Reader, passage, texts
from cacheblend_rag.evaluate.readers.multi_news import TASK

_HEADING = re.compile(r"^Passage \d+:\n", re.MULTILINE)
_DIALOGUE = re.compile(r"(?=^Dialogue: )", re.MULTILINE)
_SUMMARIES = ("multi_news", "gov_report", "qmsum", "vcsum")
PIECE_WORDS = 400  # of a context that is one long text


class LongBenchReader(Reader):
    """``{"input", "context", "answers", "dataset", "_id"}``. A context of numbered passages is cut
    there, SAMSum's at its dialogues, any other into paragraphs of about ``PIECE_WORDS`` words.
    """

    name = "longbench"

    def fits(self, record: Mapping[str, Any]) -> bool:
        return {"input", "context", "answers"} <= record.keys()

    def read(
        self, records: Sequence[Mapping[str, Any]], set_name: str, seed: int
    ) -> Iterator[Question]:
        for number, record in enumerate(records):
            source = record.get("dataset", set_name)
            kind = _kind(source)
            question = record["input"] or TASK
            if kind == "fewshot":
                question = question.strip().removeprefix("Dialogue: ").removesuffix("Summary:")
                question = question.strip()
            yield Question(
                set=set_name,
                id=str(record.get("_id", f"{set_name}-{number:03}")),
                question=question,
                answers=texts(record["answers"]),
                passages=tuple(passage("", p) for p in _cut(record["context"], kind)),
                kind=kind,
            )


def _kind(source: str) -> Kind:
    if source.startswith("samsum"):
        return "fewshot"
    return "summary" if source.startswith(_SUMMARIES) else "qa"


def _cut(context: str, kind: Kind) -> list[str]:
    where = _DIALOGUE if kind == "fewshot" else _HEADING
    parts = [p.strip() for p in where.split(context) if p.strip()]
    return parts if len(parts) > 1 else list(_paragraphs(context))


def _paragraphs(text: str) -> Iterator[str]:
    piece: list[str] = []
    words = 0
    for line in text.splitlines():
        if words and words + len(line.split()) > PIECE_WORDS:
            yield "\n".join(piece)
            piece, words = [], 0
        piece.append(line)
        words += len(line.split())
    if words:
        yield "\n".join(piece)
