"""Results on disk: a line a result, appended as it comes, so that nothing finished is lost.

The first line of a file says what was run. Files of shards of the same run are read together.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from cacheblend_rag.errors import DataError
from cacheblend_rag.evaluate.base import Question

FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One row's answer to one question.

    Attributes:
        set, id, row: of what.
        text: the answer; tokens: how many it has, the end included.
        kl: KL(full prefill || row) in nats at each of the full prefill's first tokens.
        same: at how many of them both have the same most likely token.
        tokens_total, tokens_reused, tokens_recomputed, tokens_cached: of the prompt; None where the
            engine found an identical plan's KV and did not say.
        blended: whether stored KV was used; reason: why not.
        ttft_s: seconds to the first token; None where questions ran side by side.
        chunks: of every reused segment but the prompt prefix, [tokens, recomputed tokens],
            in the prompt's order.
        selected: recomputed positions, where asked for.
    """

    set: str
    id: str
    row: str
    text: str
    tokens: int
    tokens_total: int
    kl: list[float] = field(default_factory=list)
    same: int = 0
    tokens_reused: int | None = None
    tokens_recomputed: int | None = None
    tokens_cached: int = 0
    blended: bool = False
    reason: str = ""
    ttft_s: float | None = None
    chunks: list[list[int]] = field(default_factory=list)
    selected: list[int] | None = None


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What is known of a question besides its passages: scores need no data file again."""

    set: str
    id: str
    question: str
    answers: tuple[str, ...]
    kind: str
    half: str

    @classmethod
    def of(cls, question: Question) -> Asked:
        """The part of ``question`` that is kept."""
        return cls(
            set=question.set,
            id=question.id,
            question=question.question,
            answers=question.answers,
            kind=question.kind,
            half=question.half,
        )


@dataclass
class Results:
    """What one or several files hold; ``skipped``: reasons by (set, id)."""

    settings: dict[str, Any] = field(default_factory=dict)
    asked: dict[tuple[str, str], Asked] = field(default_factory=dict)
    answers: dict[tuple[str, str], dict[str, Answer]] = field(default_factory=dict)
    skipped: dict[tuple[str, str], str] = field(default_factory=dict)
    tokens: dict[tuple[str, str], list[str]] = field(default_factory=dict)

    def has(self, question: Question, row: str) -> bool:
        """Whether this row's answer is there."""
        return row in self.answers.get((question.set, question.id), {})


def read_results(paths: Sequence[Path]) -> Results:
    """Read and join result files. A last line cut short by an interruption is passed over.

    Raises:
        DataError: a file is no result file, or was run with other settings than the first.
    """
    results = Results()
    for path in paths:
        for number, line in enumerate(_whole_lines(path)):
            try:
                _take(results, json.loads(line), path, first=number == 0)
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise DataError(f"{path}, line {number + 1}: not a result ({error!r})") from error
    return results


def _whole_lines(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"results {path} cannot be read: {error}") from error
    return text.split("\n")[:-1]


def _take(results: Results, record: Mapping[str, Any], path: Path, *, first: bool) -> None:
    values = dict(record)
    kind = values.pop("type")
    if first != (kind == "settings"):
        raise DataError(f"{path} is not a result file: settings come first, and once")
    if kind == "settings":
        differing = changed(results.settings, values) if results.settings else []
        if differing:
            raise DataError(
                f"{path} was run with other settings ({'; '.join(differing)}): compare it alone"
            )
        results.settings = values
        return
    key = (values["set"], values["id"])
    if kind == "question":
        results.asked[key] = Asked(**{**values, "answers": tuple(values["answers"])})
    elif kind == "answer":
        results.answers.setdefault(key, {})[values["row"]] = Answer(**values)
    elif kind == "skipped":
        results.skipped[key] = values["reason"]
    elif kind == "tokens":
        results.tokens[key] = values["tokens"]
    else:
        raise DataError(f"{path} has a line of unknown type {kind!r}")


def changed(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Settings that differ, in words."""
    return [
        f"{name} is {new.get(name)!r}, was {old.get(name)!r}"
        for name in sorted({*old, *new})
        if old.get(name) != new.get(name)
    ]


class ResultFile:
    """A file of results that grows; opened again, it goes on where it ended."""

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        """
        Raises:
            DataError: the file was begun with other settings, or can't be written.
        """
        self.path = path
        own: dict[str, Any] = json.loads(json.dumps({"format": FORMAT, **settings}))
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            known = path.exists() and path.stat().st_size > 0
            self.results = read_results([path]) if known else Results(settings=own)
            if not self.results.settings:  # interrupted within its first line
                self.results, known = Results(settings=own), False
            differing = changed(self.results.settings, own)
            if differing:
                raise DataError(
                    f"{path} was begun with other settings ({'; '.join(differing)}). Give another "
                    "--out, or delete it to begin anew"
                )
            _cut_last_line(path)
            self._file = path.open("a", encoding="utf-8")
        except OSError as error:
            raise DataError(f"results {path} cannot be written: {error}") from error
        if not known:
            self._file.truncate(0)
            self._write("settings", own)

    def add_question(self, question: Question) -> None:
        """Note a question, once."""
        key = (question.set, question.id)
        if key not in self.results.asked:
            self.results.asked[key] = Asked.of(question)
            self._write("question", asdict(self.results.asked[key]))

    def add_skipped(self, question: Question, reason: str) -> None:
        """Note why a question is not asked, once."""
        key = (question.set, question.id)
        if key not in self.results.skipped:
            self.results.skipped[key] = reason
            self._write("skipped", {"set": question.set, "id": question.id, "reason": reason})

    def add_tokens(self, question: Question, tokens: Sequence[str]) -> None:
        """Note a prompt's tokens as text, for pages that show which were recomputed."""
        key = (question.set, question.id)
        if key not in self.results.tokens:
            self.results.tokens[key] = list(tokens)
            self._write("tokens", {"set": question.set, "id": question.id, "tokens": tokens})

    def add(self, answers: Iterable[Answer]) -> None:
        """Append, unless there already."""
        for answer in answers:
            rows = self.results.answers.setdefault((answer.set, answer.id), {})
            if answer.row not in rows:
                rows[answer.row] = answer
                self._write("answer", asdict(answer))
        self._file.flush()

    def _write(self, kind: str, values: Mapping[str, Any]) -> None:
        self._file.write(json.dumps({"type": kind, **values}, ensure_ascii=False) + "\n")

    def __enter__(self) -> ResultFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()


def _cut_last_line(path: Path) -> None:
    """Drop what an interruption left of a line."""
    if not path.exists():
        return
    with path.open("rb+") as file:
        whole = file.read()
        end = whole.rfind(b"\n") + 1
        if end < len(whole):
            file.truncate(end)
            os.fsync(file.fileno())
