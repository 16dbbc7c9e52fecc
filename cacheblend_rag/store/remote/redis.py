"""Values in Redis or Valkey, through redis-py."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

from cacheblend_rag.errors import MissingExtraError, StoreError
from cacheblend_rag.store.remote.base import AnswerError, Backend, BackendError, News, ValuePrefix

_PAGE = 500
_RETRIES = 2
_PING_S = 1.0
_KEPT_S = 10 * 365 * 86400  # a chunk, unless the server evicts it
_REMEMBERED = 10_000  # changes, for those who follow them
_EMPTY = "empty"  # the cursor of a stream that does not exist


class RedisBackend(Backend):
    """One connection pool.

    Args:
        url: ``redis://user:password@host:port/database``, or ``rediss://`` for TLS.
        timeout_s: for connecting, and for each answer.
    """

    largest = 512 << 20  # what a server takes unless it is told otherwise (proto-max-bulk-len)

    def __init__(self, url: str, timeout_s: float) -> None:
        try:
            import redis
            from redis.backoff import ExponentialWithJitterBackoff
            from redis.retry import Retry
        except ImportError as error:
            raise MissingExtraError("redis", "redis") from error
        backoff = ExponentialWithJitterBackoff(cap=timeout_s / 4, base=0.02)

        def client(seconds: float, retries: int) -> redis.Redis:
            return redis.Redis.from_url(
                url,
                socket_timeout=seconds,
                socket_connect_timeout=seconds,
                retry=Retry(backoff, retries),
                # What old servers and proxies of Redis speak as well.
                protocol=2,
            )

        try:
            self._client = client(timeout_s, _RETRIES)
            self._pinging = client(min(timeout_s, _PING_S), 0)
        except ValueError:  # which may quote a password
            raise StoreError("That is no Redis URL. Use redis://host:6379/0.") from None
        self._has_noted = False
        self._refusals = (redis.ResponseError,)
        self._errors = (redis.RedisError, OSError, ValueError, TypeError, AttributeError)

    def get(self, name: str, limit: int) -> bytes | None:
        with self._failing():
            # Asked first: a value of gigabytes that somebody put there must not be fetched to find
            # out.
            size = self._size(name)
            if size == 0:
                return None
            if size > limit:
                raise BackendError(f"a value of {size} bytes")
            return _as_bytes(self._client.get(name))

    def put(self, name: str, value: bytes, feed: str = "") -> None:
        with self._failing(), self._client.pipeline(transaction=bool(feed)) as pipeline:
            # With an end, and only chunks have one: so a server can be told to evict chunks only
            # (volatile-lfu), and never what is noted of documents.
            pipeline.set(name, value, ex=_KEPT_S)
            self._record_event(pipeline, feed, "put", name)
            pipeline.execute()

    def exists(self, name: str) -> bool:
        with self._failing():
            return self._size(name) > 0

    def delete(self, name: str, feed: str = "") -> None:
        with self._failing(), self._client.pipeline(transaction=bool(feed)) as pipeline:
            pipeline.unlink(name)
            self._record_event(pipeline, feed, "deleted", name)
            pipeline.execute()

    def news(self, feed: str, cursor: object) -> News:
        """``feed`` is a stream of bounded length, the cursor its last entry. Where that is gone, so
        may be others: the stream was cut, or evicted and begun again.
        """
        # From the last entry on, itself included: whether that is still there shows that nothing
        # was cut off.
        since = cursor if isinstance(cursor, bytes) else b"-"
        with self._failing():
            try:
                found: Any = self._client.xrange(feed, min=since)
            except self._refusals as error:
                if not _is_of_another_type(error):
                    raise
                # It only says what to list anew, and nobody could be told of changes otherwise.
                self._client.unlink(feed)
                return News(_EMPTY, [], whole=True)
            entries = [
                (_as_text(key), _as_text(what) == "put")
                for _, fields in found
                for what, key in fields.items()
            ]
        if since != b"-" and found and found[0][0] == since:
            return News(found[-1][0], entries[1:])
        if cursor == _EMPTY and not found:
            return News(_EMPTY, [])
        return News(found[-1][0] if found else _EMPTY, entries, whole=True)

    def _size(self, name: str) -> int:
        """Bytes of a value; 0 where there is none, or what is no text: ``put`` replaces that."""
        try:
            return int(self._client.strlen(name))
        except self._refusals as error:
            if _is_of_another_type(error):
                return 0
            raise

    def _record_event(self, pipeline: Any, feed: str, what: str, name: str) -> None:
        if feed:
            pipeline.xadd(
                feed, {what: name.rpartition("/")[2]}, maxlen=_REMEMBERED, approximate=True
            )

    def pages(self, prefix: str) -> Iterator[list[tuple[str, int]]]:
        cursor = 0
        while True:
            with self._failing():
                cursor, found = self._client.scan(cursor, match=f"{prefix}*", count=_PAGE)
                # Sizes of a page in one round trip.
                names = [_as_text(name) for name in found]
                with self._client.pipeline(transaction=False) as pipeline:
                    for name in names:
                        pipeline.strlen(name)
                    sizes = pipeline.execute(raise_on_error=False)
            # another's value under such a name is an error of its own
            yield [(n, s) for n, s in zip(names, sizes, strict=True) if isinstance(s, int) and s]
            if cursor == 0:
                return

    def heads(self, names: Sequence[str], nbytes: int) -> list[ValuePrefix]:
        with self._failing():
            with self._client.pipeline(transaction=False) as pipeline:
                for name in names:
                    pipeline.getrange(name, 0, nbytes - 1)
                    pipeline.strlen(name)
                answers = pipeline.execute(raise_on_error=False)
            rows = zip(names, answers[::2], answers[1::2], strict=True)
            return [ValuePrefix(*row) for row in rows if isinstance(row[1], bytes) and row[2]]

    def note(self, notes: str, document: str, keys: Sequence[str]) -> None:
        with self._failing(), self._client.pipeline(transaction=True) as pipeline:
            pipeline.sadd(_keys_of(notes, document), *keys)
            for key in keys:
                pipeline.sadd(_holders_of(notes, key), document)
            pipeline.execute()
        if not self._has_noted:
            self._has_noted = True
            # It is noted by now: a user who may not ask for this, or a proxy that does not know it,
            # is no failure.
            with contextlib.suppress(*self._errors):
                self._check_policy()

    def noted(self, notes: str, document: str) -> Iterator[list[str]]:
        with self._failing():
            found: Any = self._client.smembers(_keys_of(notes, document))
        yield [_as_text(key) for key in found]

    def documents(self, notes: str) -> Iterator[list[str]]:
        cursor = 0
        while True:
            with self._failing():
                match = _keys_of(notes, "*")
                cursor, found = self._client.scan(cursor, match=match, count=_PAGE)
            yield [_as_text(name).rpartition("/")[2] for name in found]
            if cursor == 0:
                return

    def release(self, notes: str, pairs: Sequence[tuple[str, str]]) -> list[str]:
        keys = list(dict.fromkeys(key for _, key in pairs))
        with self._failing(), self._client.pipeline(transaction=True) as pipeline:
            for document, key in pairs:
                pipeline.srem(_holders_of(notes, key), document)
            for key in keys:
                pipeline.smembers(_holders_of(notes, key))
            left = pipeline.execute()[len(pairs) :]
            # Only who has it noted counts: who noted it again between a ``release`` and its
            # ``unnote`` would hold it for ever.
            others = [
                (_as_text(document), key)
                for key, holders in zip(keys, left, strict=True)
                for document in holders
            ]
            for document, key in others:
                pipeline.sismember(_keys_of(notes, document), key)
            both = zip(others, pipeline.execute(), strict=True)
            held = {key for (_, key), is_noted in both if is_noted}
        return [key for key in keys if key not in held]

    def unnote(self, notes: str, pairs: Sequence[tuple[str, str]]) -> None:
        with self._failing(), self._client.pipeline(transaction=True) as pipeline:
            for document, key in pairs:
                pipeline.srem(_keys_of(notes, document), key)
            pipeline.execute()

    def _check_policy(self) -> None:
        info: Any = self._client.info("memory")
        policy = str(info.get("maxmemory_policy", ""))
        if policy.startswith("allkeys"):
            warnings.warn(
                f"With maxmemory-policy {policy}, Redis may evict what documents consist of, and "
                "their chunks can't be forgotten then. Set it to volatile-lfu.",
                RuntimeWarning,
                stacklevel=3,
            )

    def ping(self) -> None:
        with self._failing():
            self._pinging.ping()

    def abort(self) -> None:
        with contextlib.suppress(*self._errors):
            # Connections of calls that hang: their threads get an error now, and new calls a new
            # connection.
            self._client.connection_pool.disconnect(inuse_connections=True)

    def close(self) -> None:
        with contextlib.suppress(*self._errors):
            self._client.close()
            self._pinging.close()

    @contextlib.contextmanager
    def _failing(self) -> Iterator[None]:
        try:
            yield
        except self._refusals as error:
            raise AnswerError(f"{type(error).__name__}: {error}") from error
        except self._errors as error:  # garbage for an answer ends in the last three
            raise BackendError(f"{type(error).__name__}: {error}") from error


def _keys_of(notes: str, document: str) -> str:
    return f"{notes}/of/{document}"


def _holders_of(notes: str, key: str) -> str:
    return f"{notes}/in/{key}"


def _is_of_another_type(error: Exception) -> bool:
    return str(error).startswith("WRONGTYPE")


def _as_text(name: bytes | str) -> str:
    return name if isinstance(name, str) else name.decode(errors="replace")


def _as_bytes(value: object) -> bytes | None:
    if value is None or isinstance(value, bytes):
        return value
    raise BackendError(f"an answer of type {type(value).__name__}")
