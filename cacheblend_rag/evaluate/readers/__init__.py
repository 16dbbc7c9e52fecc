"""Readers of evaluation data. One format a file; ``load`` picks by what a file holds."""

from __future__ import annotations

import gzip
import json
import lzma
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cacheblend_rag.errors import DataError
from cacheblend_rag.evaluate.base import Question, Reader
from cacheblend_rag.evaluate.readers.cacheblend import CacheBlendReader
from cacheblend_rag.evaluate.readers.hotpot import HotpotReader
from cacheblend_rag.evaluate.readers.longbench import LongBenchReader
from cacheblend_rag.evaluate.readers.multi_news import MultiNewsReader
from cacheblend_rag.evaluate.readers.musique import MusiqueReader
from cacheblend_rag.evaluate.readers.plain import PlainReader
from cacheblend_rag.evaluate.readers.samsum import SamsumReader
from cacheblend_rag.evaluate.readers.squad import SquadReader

__all__ = ["READERS", "load", "other_passages", "read_file"]

READERS: tuple[Reader, ...] = (
    PlainReader(),
    CacheBlendReader(),
    MusiqueReader(),
    LongBenchReader(),
    HotpotReader(),
    SquadReader(),
    SamsumReader(),
    MultiNewsReader(),
)
_MOST_QUESTIONS = 20  # questions
_ENDINGS = (".json", ".jsonl")
_OPENERS: dict[str, Any] = {".xz": lzma.open, ".gz": gzip.open}


def load(
    paths: Sequence[Path],
    *,
    seed: int = 7,
    limit: int | None = None,
    split: str = "all",
    shard: tuple[int, int] = (1, 1),
) -> list[Question]:
    """The questions of files, and of all the files in folders.

    Args:
        seed: shuffles each file's questions, before any are left out.
        limit: most questions a file.
        split: ``tune`` or ``report``, see ``Question.half``, or ``all``.
        shard: (i, n): the i-th of n parts, counted from 1; parts share nothing and together are
            the whole.

    Raises:
        DataError: there is no such file, or no question in it, or it has another format.
    """
    chosen: list[Question] = []
    for file in _files(paths):
        questions = read_file(file, seed=seed)
        random.Random(seed).shuffle(questions)
        chosen += [q for q in questions if split in ("all", q.half)][:limit]
    if not chosen:
        raise DataError(f"no question is left in {', '.join(map(str, paths))} (split {split})")
    part, parts = shard
    return chosen[part - 1 :: parts]


def other_passages(paths: Sequence[Path], seed: int = 7) -> dict[str, list[str]]:
    """Of each set, passages that others of it may be computed behind: those of some questions of
    the half for tuning.
    """
    found: dict[str, list[str]] = {}
    for question in load(paths, seed=seed, limit=_MOST_QUESTIONS, split="tune"):
        found.setdefault(question.set, []).extend(question.passages)
    return {name: list(dict.fromkeys(passages)) for name, passages in found.items()}


def read_file(path: Path, *, seed: int = 7) -> list[Question]:
    """All questions of one file, whose name without endings is the set's.

    Raises:
        DataError: it can't be read, is empty, or has another format.
    """
    records = _records(path)
    reader = next(
        (r for r in READERS if isinstance(records[0], Mapping) and r.fits(records[0])), None
    )
    if reader is None:
        keys = ", ".join(records[0]) if isinstance(records[0], Mapping) else "no JSON object"
        raise DataError(
            f"{path} has a format that is not known (its first record has: {keys}). Known: "
            f"{', '.join(r.name for r in READERS)}. The simplest is one object a line: "
            '{"question": "...", "passages": ["...", "..."], "answers": ["..."]}'
        )
    try:
        questions = list(reader.read(records, path.name.split(".")[0], seed))
    except (DataError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(
            f"{path} looks like {reader.name} data, but a record is not: {error!r}"
        ) from error
    questions = [q for q in questions if q.passages and q.question.strip()]
    if not questions:
        raise DataError(f"{path} has no question with passages ({reader.name} format)")
    if len({q.id for q in questions}) < len(questions):
        raise DataError(f"{path} has questions of the same id: results could not be told apart")
    return questions


def _files(paths: Sequence[Path]) -> list[Path]:
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = sorted(f for f in path.iterdir() if _is_data(f))
            if not inside:
                raise DataError(f"{path} holds no .json or .jsonl file (.xz and .gz are fine)")
            files += inside
        elif path.exists():
            files.append(path)
        else:
            raise DataError(f"there is no file {path}")
    return files


def _is_data(path: Path) -> bool:
    name = path.with_suffix("") if path.suffix in _OPENERS else path
    return name.suffix in _ENDINGS


def _records(path: Path) -> list[Any]:
    try:
        with _OPENERS.get(path.suffix, open)(path, "rt", encoding="utf-8") as file:
            text = file.read()
    except (OSError, EOFError, UnicodeDecodeError, lzma.LZMAError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    try:
        whole = json.loads(text)
        records = whole if isinstance(whole, list) else [whole]
    except json.JSONDecodeError:
        records = _lines(path, text)
    if not records:
        raise DataError(f"{path} is empty")
    return records


def _lines(path: Path, text: str) -> list[Any]:
    records = []
    for number, line in enumerate(text.split("\n"), 1):  # splitlines would cut at U+2028
        try:
            records += [json.loads(line)] if line.strip() else []
        except json.JSONDecodeError as error:
            raise DataError(f"{path}, line {number}: not JSON ({error.msg})") from error
    return records
