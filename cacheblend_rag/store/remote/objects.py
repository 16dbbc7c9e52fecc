"""Values in object storage (S3, Google, Azure), through obstore."""

from __future__ import annotations

import contextlib
import itertools
import re
import secrets
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from cacheblend_rag.errors import MissingExtraError, StoreError
from cacheblend_rag.store.remote.base import (
    REFUSED,
    AnswerError,
    Backend,
    BackendError,
    News,
    ValuePrefix,
)
from cacheblend_rag.store.url import redacted

if TYPE_CHECKING:
    from obstore.store import ObjectStore

_Answer = TypeVar("_Answer")

_RETRIES = 2
_AT_ONCE = 64  # requests
_SKEW_S = 60.0  # by which clocks of machines may differ
_REMEMBERED_S = 86400.0  # changes, for those who follow them
_PRUNE_EVERY = 1000  # changes
_NO_RANGE = re.compile(r"status code: 416\b|InvalidRange")
_EVENT = re.compile(r"[0-9]{13}-[0-9a-f]{8}-(put|deleted)-(.+)")


def open_bucket(url: str, timeout_s: float, options: Mapping[str, str]) -> ObjectStore:
    """The bucket at ``s3://``, ``gs://`` or ``az://``; credentials as the providers' own tools
    take them (``AWS_ACCESS_KEY_ID`` and so on).

    Raises:
        MissingExtraError: obstore is not installed.
        StoreError: it does not take the URL or an option.
    """
    try:
        from obstore.exceptions import BaseError
        from obstore.store import from_url
    except ImportError as error:
        raise MissingExtraError("obstore", "s3") from error
    timeout = timedelta(seconds=timeout_s)
    config: dict[str, Any] = dict(options)
    plain_http = options.get("endpoint", "").startswith("http://")
    try:
        bucket: ObjectStore = from_url(
            url,
            config=config or None,  # type: ignore[call-overload] # which keys depends on the URL
            client_options={
                "timeout": timeout,
                "connect_timeout": timeout,
                **({"allow_http": True} if plain_http else {}),
            },
            retry_config={
                "max_retries": _RETRIES,
                "retry_timeout": timeout,
                "backoff": {
                    "init_backoff": timedelta(milliseconds=50),
                    "max_backoff": timeout / 4,
                    "base": 2,
                },
            },
        )
    except (BaseError, ValueError, TypeError) as error:
        message = str(error).replace(url, redacted(url))
        raise StoreError(
            f"The object storage {redacted(url)} cannot be used: {message}. "
            "Use s3://bucket/path, gs://bucket/path or az://account/container/path."
        ) from None  # which may quote a password
    return bucket


class _Listed(NamedTuple):
    """The cursor of a feed: when it was listed, and what it told of the last moments."""

    at: float
    names: frozenset[str]


class ObjectBackend(Backend):
    """One bucket, or the part of it below the URL's path."""

    largest = 5 << 30  # one PUT
    at_once = _AT_ONCE  # one round of requests: with more, a call may miss its deadline every time

    def __init__(self, bucket: ObjectStore) -> None:
        import obstore
        from obstore.exceptions import (
            BaseError,
            NotFoundError,
            PermissionDeniedError,
            UnauthenticatedError,
        )

        self._obstore, self._bucket, self._numbers = obstore, bucket, itertools.count()
        self._not_found = (NotFoundError, FileNotFoundError)
        self._refusals = (PermissionDeniedError, UnauthenticatedError)
        self._errors = (BaseError, OSError, ValueError)
        self._has_warned = False

    def get(self, name: str, limit: int) -> bytes | None:
        with self._failing():
            try:
                # Its size comes with the answer's head, before any of the value is read.
                found = self._obstore.get(self._bucket, name)
                size = found.meta["size"]
                if size > limit:
                    raise BackendError(f"an object of {size} bytes")
                return bytes(found.bytes())
            except self._not_found:
                return None

    def put(self, name: str, value: bytes, feed: str = "") -> None:
        with self._failing():
            self._obstore.put(self._bucket, name, value, use_multipart=False)
            self._record_event(feed, "put", name)

    def exists(self, name: str) -> bool:
        with self._failing():
            try:
                self._obstore.head(self._bucket, name)
            except self._not_found:
                return False
            return True

    def delete(self, name: str, feed: str = "") -> None:
        with self._failing():
            with contextlib.suppress(*self._not_found):
                self._obstore.delete(self._bucket, name)
            self._record_event(feed, "deleted", name)

    def news(self, feed: str, cursor: object) -> News:
        """``feed`` is a folder of empty objects, whose names say when, what and which. A listing
        begins a little before the last one, since clocks of machines differ.
        """
        now = time.time()
        # Half of what is remembered, so that nothing is cut off between two calls.
        fresh = isinstance(cursor, _Listed) and now - cursor.at < _REMEMBERED_S / 2
        before = cursor if fresh and isinstance(cursor, _Listed) else None
        events = list(self._events(feed, 0.0 if before is None else before.at - _SKEW_S))
        new = [name for name in events if before is None or name not in before.names]
        entries = [
            (match[2], match[1] == "put") for name in new if (match := _EVENT.fullmatch(name))
        ]
        # The next listing begins before this one's end, so these come again and are left out then.
        recent = frozenset(name for name in events if name >= _stamp(now - _SKEW_S))
        return News(_Listed(now, recent), entries, whole=before is None)

    def _events(self, feed: str, since: float) -> Iterator[str]:
        with self._failing():
            pages = self._obstore.list(
                self._bucket, feed, offset=f"{feed}/{_stamp(since)}", chunk_size=1000
            )
            for page in pages:
                yield from (found["path"].rpartition("/")[2] for found in page)

    def _record_event(self, feed: str, what: str, name: str) -> None:
        if not feed:
            return
        now, key = time.time(), name.rpartition("/")[2]
        # Object storage has no feed and sorts names. So an event is an empty object whose name
        # begins with its time, and a number at random for those of one millisecond.
        event = f"{feed}/{_stamp(now)}-{secrets.token_hex(4)}-{what}-{key}"
        self._obstore.put(self._bucket, event, b"", use_multipart=False)
        # Whoever writes also tidies up, now and then: nobody else is sure to be there.
        if next(self._numbers) % _PRUNE_EVERY == 0:
            old = itertools.takewhile(
                lambda name: name < _stamp(now - _REMEMBERED_S), self._events(feed, 0.0)
            )
            if paths := [f"{feed}/{name}" for name in old]:
                self._obstore.delete(self._bucket, paths)

    def pages(self, prefix: str) -> Iterator[list[tuple[str, int]]]:
        with self._failing():
            for page in self._obstore.list(self._bucket, prefix.rstrip("/"), chunk_size=500):
                # no value of ours is empty
                yield [(found["path"], found["size"]) for found in page if found["size"]]

    def heads(self, names: Sequence[str], nbytes: int) -> list[ValuePrefix]:
        found = self._for_all(lambda name: self._head(name, nbytes), names)
        return [head for head in found if head is not None]

    def note(self, notes: str, document: str, keys: Sequence[str]) -> None:
        # Empty objects. First what a document has, which alone counts: whoever dies in between has
        # not said yet that it is registered, and does it again.
        self._put_all([f"{notes}/of/{document}/{key}" for key in keys])
        self._put_all([f"{notes}/in/{key}/{document}" for key in keys])

    def noted(self, notes: str, document: str) -> Iterator[list[str]]:
        for page in self._listed(f"{notes}/of/{document}"):
            yield [name.rpartition("/")[2] for name in page]

    def documents(self, notes: str) -> Iterator[list[str]]:
        for page in self._listed(f"{notes}/of"):
            yield [name.split("/")[-2] for name in page]

    def release(self, notes: str, pairs: Sequence[tuple[str, str]]) -> list[str]:
        keys = list(dict.fromkeys(key for _, key in pairs))
        self._delete_all([f"{notes}/in/{key}/{document}" for document, key in pairs])

        def is_held(key: str) -> bool:
            # Only who has it noted counts: who noted it again between a ``release`` and its
            # ``unnote`` would hold it for ever.
            holders = itertools.chain.from_iterable(self._listed(f"{notes}/in/{key}"))
            names = (name.rpartition("/")[2] for name in holders)
            return any(self.exists(f"{notes}/of/{document}/{key}") for document in names)

        held = self._for_all(is_held, keys)
        return [key for key, is_it in zip(keys, held, strict=True) if not is_it]

    def unnote(self, notes: str, pairs: Sequence[tuple[str, str]]) -> None:
        self._delete_all([f"{notes}/of/{document}/{key}" for document, key in pairs])

    def ping(self) -> None:
        with self._failing(), contextlib.suppress(*self._not_found, *self._refusals):
            self._obstore.head(self._bucket, "cacheblend/ping")  # any answer will do

    def close(self) -> None:
        pass  # obstore keeps its connections for itself

    def _put_all(self, names: Sequence[str]) -> None:
        self._for_all(lambda name: self.put(name, b""), names)

    def _delete_all(self, names: Sequence[str]) -> None:
        self._for_all(self.delete, names)

    def _for_all(self, work: Callable[[str], _Answer], names: Sequence[str]) -> list[_Answer]:
        """The answers of a request for each name, many at once."""
        with self._failing(), ThreadPoolExecutor(_AT_ONCE) as pool:
            return list(pool.map(work, names))

    def _listed(self, folder: str) -> Iterator[list[str]]:
        with self._failing():
            for page in self._obstore.list(self._bucket, folder, chunk_size=1000):
                yield [found["path"] for found in page]

    def _head(self, name: str, nbytes: int) -> ValuePrefix | None:
        try:
            found = self._obstore.get(self._bucket, name, options={"range": (0, nbytes)})
            return ValuePrefix(name, bytes(found.bytes()), found.meta["size"])
        except self._not_found:
            return None
        # One that was archived, is of another key, or is empty by now.
        except self._errors as error:
            if not (isinstance(error, self._refusals) or _NO_RANGE.search(str(error))):
                raise
            self._warn_of(name, error)
            return ValuePrefix(name, b"", REFUSED)

    def _warn_of(self, name: str, error: Exception) -> None:
        if not self._has_warned:
            self._has_warned = True
            warnings.warn(
                f"The object {name} and maybe others cannot be read ({_text(error)}); what they "
                "hold is recomputed.",
                RuntimeWarning,
                stacklevel=2,
            )

    @contextlib.contextmanager
    def _failing(self) -> Iterator[None]:
        try:
            yield
        except self._refusals as error:
            raise AnswerError(_text(error)) from error
        except self._errors as error:
            raise BackendError(_text(error)) from error


def _text(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"


def _stamp(seconds: float) -> str:
    """A time as text that sorts as times do."""
    return f"{max(int(seconds * 1000), 0):013d}"
