"""Which questions the demo asks: chosen by what a full prefill answers, and by nothing else."""

from __future__ import annotations

import json
from typing import Any

import pytest
from benchmark import ROOT, script

from cacheblend_rag import demo


@pytest.fixture(scope="module")
def chooser() -> Any:
    return script("demo_questions")


def asked(chooser: Any, name: str, document: str, lead: float, *, correct: bool = True) -> Any:
    return chooser.Asked({"question": name, "documents": [document]}, "", correct, lead)


def test_the_surest_right_answers_are_taken_two_of_a_document(chooser: Any) -> None:
    candidates = [
        asked(chooser, "unsure", "a.md", 0.1),
        asked(chooser, "third of a", "a.md", 2.0),
        asked(chooser, "first of a", "a.md", 4.0),
        asked(chooser, "second of a", "a.md", 3.0),
        asked(chooser, "wrong", "b.md", 9.0, correct=False),
        asked(chooser, "of b", "b.md", 1.0),
        asked(chooser, "of c", "c.md", 0.5),
    ]
    names = [row["question"] for row in chooser.choose(candidates, 3)]
    assert names == ["first of a", "second of a", "of b"]


def test_all_questions_are_candidates_and_their_answers_stand_in_the_documents(
    chooser: Any,
) -> None:
    folder = ROOT / "examples" / "data"
    candidates = {question.text: question for question in demo.load_questions(folder)}
    assert len(candidates) == chooser.CHOSEN

    rows = json.loads((folder / "candidates.json").read_text(encoding="utf-8"))
    assert candidates.keys() <= {row["question"] for row in rows}
    for row in rows:
        text = demo.words(" ".join((folder / name).read_text() for name in row["documents"]))
        gold = demo.words(row["answer"])
        assert any(text[i : i + len(gold)] == gold for i in range(len(text))), row
