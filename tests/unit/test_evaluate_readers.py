"""Published formats of evaluation data, each in a file of a few lines."""

from __future__ import annotations

import gzip
import json
import lzma
from pathlib import Path
from typing import Any

import pytest

from cacheblend_rag.errors import DataError
from cacheblend_rag.evaluate.base import Question
from cacheblend_rag.evaluate.prompts import answer_text, messages
from cacheblend_rag.evaluate.readers import load, read_file

PARIS, ROME = {"title": "Paris", "text": "A city."}, {"title": "", "text": "Another city."}


def write(path: Path, *records: Any, whole: bool = False) -> Path:
    lines = json.dumps(records[0]) if whole else "\n".join(json.dumps(r) for r in records) + "\n"
    path.write_text(lines, encoding="utf-8")
    return path


def only(path: Path) -> Question:
    [question] = read_file(path)
    return question


def test_plain_with_all_and_with_little(tmp_path: Path) -> None:
    whole = {"id": "a", "question": "Where?", "answers": ["x", "y"], "passages": [PARIS, ROME]}
    little = {"question": "Who?", "passages": ["Just a text."]}
    path = write(tmp_path / "own.jsonl", whole, little)
    first, second = read_file(path)
    assert (first.set, first.id, first.answers, first.kind) == ("own", "a", ("x", "y"), "qa")
    assert first.passages == ("Paris\nA city.", "Another city.")
    assert (second.id, second.answers, second.passages) == ("2", (), ("Just a text.",))


@pytest.mark.parametrize(("ending", "opener"), [("xz", lzma.open), ("gz", gzip.open)])
def test_compressed(tmp_path: Path, ending: str, opener: Any) -> None:
    path = tmp_path / f"own.jsonl.{ending}"
    with opener(path, "wt", encoding="utf-8") as file:
        file.write(json.dumps({"question": "Who?", "passages": ["a\u2028b"]}) + "\n")
    assert only(path).set == "own"


def test_hotpot_and_2wiki(tmp_path: Path) -> None:
    record = {
        "_id": "5a", "question": "Q?", "answer": "yes", "type": "bridge",
        "supporting_facts": [["T", 0]], "context": [["T", ["One.", " Two."]], ["U", ["A.", "B."]]],
    }  # fmt: skip
    question = only(write(tmp_path / "hotpot.json", [record], whole=True))
    assert question.passages == ("T\nOne. Two.", "U\nA. B.")
    assert (question.id, question.answers) == ("5a", ("yes",))


def test_hotpot_in_columns(tmp_path: Path) -> None:
    record = {
        "id": "5b", "question": "Q?", "answer": "no",
        "context": {"title": ["T"], "sentences": [["One.", " Two."]]},
    }  # fmt: skip
    assert only(write(tmp_path / "h.jsonl", record)).passages == ("T\nOne. Two.",)


def test_musique_leaves_out_the_unanswerable(tmp_path: Path) -> None:
    record = {
        "id": "2hop__1_2", "question": "Q?", "answer": "A", "answer_aliases": ["B", "A"],
        "answerable": True, "paragraphs": [{"idx": 0, "title": "T", "paragraph_text": "P."}],
    }  # fmt: skip
    path = write(tmp_path / "m.jsonl", record, {**record, "id": "x", "answerable": False})
    assert only(path).answers == ("A", "B")
    assert only(path).passages == ("T\nP.",)


def test_squad_takes_blocks_of_paragraphs(tmp_path: Path) -> None:
    def paragraph(i: int) -> dict[str, Any]:
        answer = {"id": f"q{i}", "question": f"Q{i}?", "answers": [{"text": "A"}, {"text": "A"}]}
        impossible = {"id": f"x{i}", "question": "?", "answers": [], "is_impossible": True}
        return {"context": f"Text {i}.", "qas": [answer, impossible]}

    article = {"title": "T", "paragraphs": [paragraph(i) for i in range(23)]}
    data = {"version": "v2.0", "data": [article]}
    questions = read_file(write(tmp_path / "dev.json", data, whole=True))
    assert [q.id for q in questions] == [f"q{i}" for i in range(23)]
    assert questions[0].passages[0] == "T\nText 0."
    assert [len(q.passages) for q in questions] == [10] * 10 + [13] * 13
    assert questions[0].answers == ("A",)


def test_samsum_draws_examples_from_the_other_half(tmp_path: Path) -> None:
    records = [
        {"id": str(i), "dialogue": f"A: hello {i:03}", "summary": f"A greets {i}."}
        for i in range(40)
    ]
    path = write(tmp_path / "test.json", records, whole=True)
    questions = read_file(path, seed=1)
    assert [q.id for q in questions] == [str(i) for i in range(1, 40, 2)]
    assert {len(q.passages) for q in questions} == {12}
    asked = {q.question for q in questions}
    assert not any(text in p for q in questions for p in q.passages for text in asked)
    assert questions == read_file(path, seed=1)
    assert questions != read_file(path, seed=2)


def test_multi_news(tmp_path: Path) -> None:
    record = {"document": "One.\n ||||| Two. |||||", "summary": "– Both."}
    question = only(write(tmp_path / "mn.jsonl", record))
    assert (question.passages, question.answers, question.kind) == (
        ("One.", "Two."),
        ("Both.",),
        "summary",
    )


def test_longbench(tmp_path: Path) -> None:
    common = {"length": 5, "language": "en", "all_classes": None}
    wiki = {
        "input": "Where?", "context": "Passage 1:\nT\nOne.\n\nPassage 2:\nU\nTwo.",
        "answers": ["Rome"], "dataset": "2wikimqa", "_id": "w", **common,
    }  # fmt: skip
    samsum = {
        "input": "Dialogue: A: hi\nSummary: ", "answers": ["A greets."], "dataset": "samsum",
        "context": "Dialogue: B: yo\nSummary: B.\nDialogue: C: yes\nSummary: C.",
        "_id": "s", **common,
    }  # fmt: skip
    long = {
        "input": "Why?", "answers": ["so"], "dataset": "qasper", "_id": "l",
        "context": "\n".join(["word " * 150] * 5), **common,
    }  # fmt: skip
    a, b, c = read_file(write(tmp_path / "lb.jsonl", wiki, samsum, long))
    assert a.passages == ("T\nOne.", "U\nTwo.")
    assert (b.kind, b.question) == ("fewshot", "A: hi")
    assert b.passages == ("Dialogue: B: yo\nSummary: B.", "Dialogue: C: yes\nSummary: C.")
    assert len(c.passages) == 3


def test_cacheblend_inputs(tmp_path: Path) -> None:
    record = {"question": "Q?", "answers": [["A"], ["B"]], "ctxs": [PARIS, ROME]}
    question = only(write(tmp_path / "musique_s.json", [record], whole=True))
    assert (question.id, question.answers) == ("musique_s-000", ("A", "B"))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "is empty"),
        ("[]", "is empty"),
        ('{"question": "Q?"}', "format that is not known"),
        ("[1, 2]", "no JSON object"),
        ('{"question": "Q?", "passages": ["a"]}\n{"broken', "line 2: not JSON"),
        ('{"question": "Q?", "passages": [3]}', "looks like plain data"),
        ('{"question": "Q?", "passages": []}', "no question with passages"),
        ('{"question": "Q?", "passages": ["a"], "kind": "poem"}', "kind is 'poem'"),
        ('{"id": "1", "question": "Q?", "passages": ["a"]}\n' * 2, "the same id"),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, content: str, says: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match=says):
        read_file(path)


def test_folders_files_and_absent_ones(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no"):
        load([tmp_path])
    with pytest.raises(DataError, match="there is no file"):
        load([tmp_path / "absent.json"])
    for name in ("b", "a"):
        write(tmp_path / f"{name}.jsonl", {"question": "Q?", "passages": ["text"]})
    (tmp_path / "README.md").write_text("not data")
    assert [q.set for q in load([tmp_path])] == ["a", "b"]
    (tmp_path / "not.xz").write_text("not compressed")
    with pytest.raises(DataError, match="cannot be read"):
        load([tmp_path / "not.xz"])


def test_halves_shards_and_limit(tmp_path: Path) -> None:
    records = [{"id": str(i), "question": "Q?", "passages": ["text"]} for i in range(200)]
    path = write(tmp_path / "own.jsonl", *records)
    every = {q.id for q in load([path])}
    tune, report = ({q.id for q in load([path], split=s)} for s in ("tune", "report"))
    assert tune | report == every and not tune & report
    assert 60 < len(tune) < 140
    # of the id alone: this must never change, or tuned and reported questions would mix
    assert sorted(tune, key=int)[:5] == ["0", "1", "4", "5", "6"]
    shards = [{q.id for q in load([path], shard=(i, 3))} for i in (1, 2, 3)]
    assert set.union(*shards) == every and sum(map(len, shards)) == 200
    assert len(load([path], limit=7)) == 7
    assert [q.id for q in load([path], seed=1)] != [q.id for q in load([path], seed=2)]


def test_prompts_and_answers() -> None:
    question = Question(set="s", id="1", question="Who?", answers=(), passages=("P\nx", "Q\ny"))
    system, user = messages(question)
    assert system["role"] == "system"
    assert "P\nx\n\nQ\ny\n\nQuestion: Who?\n" in user["content"]
    assert answer_text("qa", " Rome\nbecause") == "Rome"
    assert answer_text("summary", " One.\nTwo. ") == "One.\nTwo."
