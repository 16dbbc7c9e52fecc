"""Large bodies are read as small ones are, without keeping other threads from their turn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cacheblend_rag.server import bodies, pieces
from cacheblend_rag.server.bodies import Given
from cacheblend_rag.server.errors import HttpError
from cacheblend_rag.server.jobs import Jobs

SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
VALUES = st.recursive(
    SCALARS, lambda some: st.lists(some) | st.dictionaries(st.text(), some), max_leaves=30
)


@pytest.fixture(autouse=True)
def _all_are_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "_SMALL", 0)


def read(load: Any, raw: bytes) -> Any:
    """What it is, or what it is refused with."""
    try:
        return load(raw)
    except ValueError as error:
        return type(error), str(error)


@given(value=VALUES, indent=st.none() | st.integers(0, 2))
def test_as_json(value: Any, indent: int | None) -> None:
    raw = json.dumps(value, indent=indent).encode()
    assert pieces.loads(raw) == value
    assert pieces.loads(b" \r\n" + raw + b"\t ") == value


@given(value=VALUES, data=st.data())
def test_what_is_no_json_is_refused_as_json_refuses_it(value: Any, data: st.DataObject) -> None:
    raw = json.dumps(value).encode()
    at = data.draw(st.integers(0, len(raw)))
    for broken in (
        raw[:at],
        raw[:at] + data.draw(st.sampled_from([b",", b"]", b"}", b'"', b"1 "])),
    ):
        assert read(pieces.loads, broken) == read(json.loads, broken), broken


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_encodings(encoding: str) -> None:
    raw = json.dumps({"chunks": ["ü", "🙂"]}, ensure_ascii=False).encode(encoding)
    assert pieces.loads(raw) == json.loads(raw)


@given(values=st.lists(VALUES))
def test_a_list_is_written_as_json_writes_it(values: list[Any]) -> None:
    assert pieces.dumps(iter(values)) == json.dumps(values)


def test_nothing_large_is_read_or_written_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither a body, nor a job's chunks when they are noted and begun."""
    longest = 0

    def noted(text: str) -> None:
        nonlocal longest
        longest = max(longest, len(text))

    decode, encode = json.JSONDecoder.raw_decode, json.dumps

    def raw_decode(self: json.JSONDecoder, text: str, idx: int = 0) -> tuple[Any, int]:
        found, end = decode(self, text, idx)
        noted(text[idx:end])
        return found, end

    def dumps(value: Any, **options: Any) -> str:
        text = encode(value, **options)
        noted(text)
        return text

    monkeypatch.setattr(json.JSONDecoder, "raw_decode", raw_decode)
    monkeypatch.setattr(json, "dumps", dumps)
    chunks = [{"text": f"{n} " + "word " * 100, "document": "d"} for n in range(500)]
    raw = encode({"chunks": chunks, "wait": True}).encode()
    found = bodies.chunks(bodies.parsed(raw), documents=True)
    jobs = Jobs(tmp_path / "jobs.sqlite", 10**9)
    jobs.create("", found)
    begun = jobs.begin()
    assert begun is not None and begun[1] == found == [Given(c["text"], None, "d") for c in chunks]
    assert longest < 2000
    keys = [f"{n:064x}" for n in range(500)]
    assert bodies.registrations(bodies.parsed(encode({"documents": {"a": keys}}).encode()))
    with pytest.raises(HttpError, match="must be an object"):
        bodies.parsed(encode(keys).encode())
    jobs.close()
