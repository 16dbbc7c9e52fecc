"""What requests may say, and how they are told that they may not."""

from __future__ import annotations

import sqlite3
from typing import Any

import pytest

from cacheblend_rag.errors import (
    ClosedError,
    ConfigError,
    EmptyTextError,
    EngineDeadError,
    EngineError,
    UnavailableError,
)
from cacheblend_rag.server import bodies
from cacheblend_rag.server.bodies import Given, Page
from cacheblend_rag.server.errors import HttpError, answer, as_http, not_found

KEY = "ab" * 32


def told(call: Any) -> tuple[str | None, str]:
    with pytest.raises(HttpError) as error:
        call()
    assert error.value.status == 400
    body = error.value.body()["error"]
    assert body["type"] == "BadRequestError" and body["code"] == 400
    return body["param"], body["message"]


@pytest.mark.parametrize("raw", [b"", b"{", b"[1]", b"null", b"\xff", b'{"a":' * 5000, b"nan x"])
def test_what_is_no_object(raw: bytes) -> None:
    told(lambda: bodies.parsed(raw))


@pytest.mark.parametrize(
    ("chunk", "at"),
    [
        (5, "chunks[1]"),
        ("", "chunks[1]"),
        (" \n", "chunks[1]"),
        ("half \ud800", "chunks[1]"),
        ([], "chunks[1]"),
        ([1, "2"], "chunks[1]"),
        ([True], "chunks[1]"),
        ([-1], "chunks[1]"),
        ([1.0], "chunks[1]"),
        ([1 << 31], "chunks[1]"),
        (None, "chunks[1]"),
        ({}, "chunks[1].text"),
        ({"text": {}}, "chunks[1].text"),
        ({"text": "a", "left_context": 3}, "chunks[1].left_context"),
        ({"text": "a", "document": ""}, "chunks[1].document"),
        ({"text": "a", "document": "d" * 5000}, "chunks[1].document"),
        ({"text": "a", "document": 7}, "chunks[1].document"),
        ({"text": "a", "documnet": "d"}, "documnet"),
    ],
    ids=str,
)
def test_what_is_wrong_with_a_chunk_is_told_by_its_place(chunk: object, at: str) -> None:
    param, message = told(lambda: bodies.chunks({"chunks": ["a", chunk]}, documents=True))
    assert param == at and at.partition("[")[0] in message


def test_chunks() -> None:
    given = ["a", [1, 2], {"text": "b", "left_context": "", "document": "d"}, {"text": [3]}]
    found = bodies.chunks({"chunks": given}, documents=True)
    assert found == [Given("a"), Given([1, 2]), Given("b", "", "d"), Given([3])]
    assert told(lambda: bodies.chunks({"chunks": given}, documents=False))[0] == "document"
    for nothing in ({}, {"chunks": []}, {"chunks": "a"}, {"chunks": {"a": 1}}):
        assert told(lambda n=nothing: bodies.chunks(n, documents=True))[0] == "chunks"
    assert bodies.chunks({"chunks": []}, documents=False, may_be_empty=True) == []


def test_a_field_that_is_unknown_is_told_with_one_that_is_near() -> None:
    assert "Did you mean 'wait'" in told(lambda: bodies.only({"wiat": 1}, ("wait",)))[1]


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: bodies.only(bodies.parsed(b'{"\\ud800": 1}'), ("wait",)),
        lambda: bodies.chunks({"chunks": [{"text": "a", "\udfff": 1}]}, documents=True),
        lambda: bodies.keys(["\udfff"], "ids"),
        lambda: bodies.registrations({"documents": {"\udfff": [KEY]}}),
    ],
)
def test_half_a_character_is_told_as_it_was_written(wrong: Any) -> None:
    """An answer that quotes it can't be sent."""
    with pytest.raises(HttpError) as error:
        wrong()
    sent = answer(error.value)
    assert sent.status_code == 400
    assert any(half in bytes(sent.body).decode() for half in ("\\ud800", "\\udfff"))


def test_flags_keys_documents() -> None:
    assert bodies.flag({}, "wait") is False and bodies.flag({"wait": True}, "wait") is True
    assert told(lambda: bodies.flag({"wait": 1}, "wait"))[0] == "wait"
    assert bodies.keys([KEY], "ids") == [KEY]
    for wrong in ([KEY[1:]], [KEY.upper()], [3], KEY, None):
        assert told(lambda w=wrong: bodies.keys(w, "ids"))
    assert bodies.registrations({"documents": {"d": [KEY]}}) == {"d": [KEY]}
    for wrong_table in ([], {"d": KEY}, {"": [KEY]}):
        assert told(lambda w=wrong_table: bodies.registrations({"documents": w}))
    assert bodies.one_of({"ids": [], "texts": None}, ("ids", "texts")) == "ids"
    assert told(lambda: bodies.one_of({}, ("ids", "texts")))
    assert told(lambda: bodies.one_of({"ids": [], "texts": []}, ("ids", "texts")))


def test_pages() -> None:
    assert Page([("after", "")]).after is Page([]).after is None, "the first page"
    page = Page([("limit", "2"), ("after", "x")])
    rows = [{"id": n} for n in "abc"]
    assert page.of(rows) == {
        "object": "list",
        "data": rows[:2],
        "has_more": True,
        "first_id": "a",
        "last_id": "b",
    }
    assert page.of([])["last_id"] is None and not page.of(rows[:2])["has_more"]
    long = ("0" * 8 + "10000", "0" * 8 + "1" + "0" * 5000, "9" * 5000, "-1", "1.0", "²")
    for number in ("0", "101", "٣", "", *long):
        assert told(lambda n=number: Page([("limit", n)]))[0] == "limit"
    assert Page([("limit", "0" * 5000 + "7")]).limit == 7
    told(lambda: Page([("limt", "3")]))
    told(lambda: Page([("order", "up")], ("order",)))


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ConfigError("x"), 400),
        (EmptyTextError("x"), 400),
        (UnavailableError("x"), 503),
        (EngineDeadError("x"), 503),
        (ClosedError("x"), 503),
        (EngineError("x"), 500),
        (not_found("chunk", "x"), 404),
        (ZeroDivisionError("secret"), 500),
        (sqlite3.OperationalError("disk full"), 503),
    ],
)
def test_errors(error: Exception, status: int) -> None:
    known = as_http(error)
    body = known.body()["error"]
    assert known.status == status and body.keys() == {"message", "type", "param", "code"}
    assert "secret" not in body["message"]
