"""What requests may say, checked by hand: an error names the place."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cacheblend_rag.errors import PromptError
from cacheblend_rag.options import unknown_option
from cacheblend_rag.prompt import checked
from cacheblend_rag.server import pieces
from cacheblend_rag.server.errors import HttpError
from cacheblend_rag.store.base import is_key

Text = str | list[int]
_CHUNK = ("text", "left_context", "document")
_MOST_DOCUMENT = 4096  # characters of a document's id
_TOKENS_A_CHARACTER = 0.4  # more than most texts have
_MOST_LISTED, _MOST_DIGITS = 100, 9


@dataclass(frozen=True)
class Given:
    """A chunk as a client gave it."""

    text: Text
    left_context: Text | None = None
    document: str | None = None

    @property
    def tokens(self) -> int:
        """About."""
        both = [self.text, self.left_context or ""]
        sizes = [len(t) * _TOKENS_A_CHARACTER if isinstance(t, str) else len(t) for t in both]
        return int(sum(sizes)) + 1


def parsed(raw: bytes) -> dict[str, Any]:
    """A body that is a JSON object.

    Raises:
        HttpError: it is not.
    """
    try:
        found = pieces.loads(raw)
    except (ValueError, RecursionError) as error:
        raise HttpError(400, f"the body is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise HttpError(400, f"the body is a {_kind(found)}; it must be an object")
    return found


def only(body: Mapping[str, Any], known: Sequence[str], where: str = "the body") -> None:
    """Refuse fields that nobody would read."""
    for name in body:
        if name not in known:
            raise _wrong(str(unknown_option(name, known, where)), name)


def flag(body: Mapping[str, Any], name: str) -> bool:
    """A field that is true or false; false where it is absent."""
    value = body.get(name, False)
    if not isinstance(value, bool):
        raise _wrong(f"{name} is a {_kind(value)}; it must be true or false", name)
    return value


def chunks(body: Mapping[str, Any], *, documents: bool, may_be_empty: bool = False) -> list[Given]:
    """Those of an ingestion.

    Args:
        documents: each may name its document.
    """
    given = _listed(body, "chunks", may_be_empty=may_be_empty)
    return [_chunk(chunk, f"chunks[{i}]", documents) for i, chunk in enumerate(given)]


def texts(body: Mapping[str, Any], name: str = "texts") -> list[Text]:
    """A list of texts or of token ids."""
    return [_text(text, f"{name}[{i}]") for i, text in enumerate(_listed(body, name))]


def keys(given: object, where: str) -> list[str]:
    """A list of keys of chunks."""
    if not isinstance(given, list):
        raise _wrong(f"{where} is a {_kind(given)}; it must be a list of keys", where)
    for i, key in enumerate(given):
        if not (isinstance(key, str) and is_key(key)):
            at = f"{where}[{i}]"
            raise _wrong(f"{at} is {key!r}; a key is 64 lowercase hexadecimal digits", at)
    return given


def documents(body: Mapping[str, Any]) -> list[str]:
    """A list of ids of documents."""
    given = _listed(body, "documents")
    return [document(name, f"documents[{i}]") for i, name in enumerate(given)]


def registrations(body: Mapping[str, Any]) -> dict[str, list[str]]:
    """Keys by the id of their document."""
    given = body.get("documents")
    if not isinstance(given, dict):
        raise _wrong(f"documents is a {_kind(given)}; it must be keys by document", "documents")
    return {document(n, "documents"): keys(k, f"documents[{n!r}]") for n, k in given.items()}


def document(name: object, where: str) -> str:
    """The id of a document: any text that is not empty."""
    if not isinstance(name, str) or not 0 < len(name) <= _MOST_DOCUMENT:
        what = f"{where} is {name!r:.80}; it must be a text of 1 to {_MOST_DOCUMENT} characters"
        raise _wrong(what, where)
    return _encodable(name, where)


def one_of(body: Mapping[str, Any], names: Sequence[str]) -> str:
    """The one of these fields that is there."""
    found = [name for name in names if body.get(name) is not None]
    if len(found) != 1:
        raise _wrong(f"give one of {', '.join(names)}; {len(found)} are there", names[0])
    return found[0]


class Page:
    """Which part of a list is asked for."""

    def __init__(self, query: Iterable[tuple[str, str]], known: Sequence[str] = ()) -> None:
        given = dict(query)
        only(given, ("after", "limit", *known), "the query")
        self.after = given.get("after") or None  # an empty one asks for the first page
        limit = whole_number(given.get("limit", "20"))
        if limit is None or not 1 <= limit <= _MOST_LISTED:
            what = f"limit is {given['limit']!r:.80}; it must be a whole number from 1 to 100"
            raise _wrong(what, "limit")
        self.limit = limit
        self.order = given.get("order", "desc")
        self.document = given.get("document")
        if self.order not in ("asc", "desc"):
            raise _wrong(f"order is {self.order!r}; it must be asc or desc", "order")

    def of(self, found: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """A list that has one more than asked for, where there are more."""
        data = list(found[: self.limit])
        return {
            "object": "list",
            "data": data,
            "has_more": len(found) > self.limit,
            "first_id": data[0]["id"] if data else None,
            "last_id": data[-1]["id"] if data else None,
        }


def whole_number(text: str) -> int | None:
    """What a query says in digits; None: it says something else, or more than is ever meant."""
    if not (text.isascii() and text.isdigit()):
        return None
    digits = text.lstrip("0") or "0"
    return int(digits) if len(digits) <= _MOST_DIGITS else None


def _listed(body: Mapping[str, Any], name: str, *, may_be_empty: bool = False) -> list[Any]:
    given = body.get(name)
    if not isinstance(given, list):
        raise _wrong(f"{name} is a {_kind(given)}; it must be a list", name)
    if not given and not may_be_empty:
        raise _wrong(f"{name} is empty", name)
    return given


def _chunk(chunk: object, where: str, with_documents: bool) -> Given:
    if not isinstance(chunk, dict):
        return Given(_text(chunk, where))
    only(chunk, _CHUNK if with_documents else _CHUNK[:2], where)
    context, name = chunk.get("left_context"), chunk.get("document")
    return Given(
        _text(chunk.get("text"), f"{where}.text"),
        None if context is None else _text(context, f"{where}.left_context", may_be_empty=True),
        None if name is None else document(name, f"{where}.document"),
    )


def _text(text: object, where: str, *, may_be_empty: bool = False) -> Text:
    if isinstance(text, str):
        if not (text.strip() or may_be_empty):
            raise _wrong(f"{where} is empty; leave it out", where)
        return _encodable(text, where)
    if not isinstance(text, list) or not (text or may_be_empty):
        kind = "empty" if text == [] else f"a {_kind(text)}"
        raise _wrong(f"{where} is {kind}; it must be a text or a list of token ids", where)
    if any(type(token) is not int or not 0 <= token < 1 << 31 for token in text):
        raise _wrong(f"{where} has something that is no token id", where)
    return text


def _encodable(text: str, where: str) -> str:
    try:
        return checked(text, where)
    except PromptError as error:
        raise _wrong(str(error), where) from error


def _wrong(message: str, param: str) -> HttpError:
    return HttpError(400, message, param=param)


def _kind(value: object) -> str:
    names = {dict: "object", list: "list", str: "text", bool: "truth value", type(None): "null"}
    return names.get(type(value), "number")
