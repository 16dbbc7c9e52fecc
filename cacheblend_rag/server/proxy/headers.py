"""Which headers pass a proxy. Pure."""

from __future__ import annotations

from collections.abc import Iterable

Pairs = list[tuple[bytes, bytes]]

REPLICA = b"x-cacheblend-replica"  # in a response: who answered; in a request: who is to answer
# They are about one connection (RFC 9110, 7.6.1), not about the message.
_HOP = {
    b"connection",
    b"keep-alive",
    b"proxy-authenticate",
    b"proxy-authorization",
    b"proxy-connection",
    b"te",
    b"trailer",
    b"transfer-encoding",
    b"upgrade",
}
# The body is sent whole, to another host; nobody waits to be asked for it.
_OF_REQUESTS = {b"host", b"content-length", b"expect", REPLICA}
_FORWARDED = b"x-forwarded-for"


def request_headers(given: Iterable[tuple[bytes, bytes]], client: str | None) -> Pairs:
    """What a replica gets.

    Args:
        client: its address.
    """
    pairs = _passed(given, _OF_REQUESTS | {_FORWARDED})
    came_by = [value for name, value in _lower(given) if name == _FORWARDED]
    came_by += [client.encode()] if client else []
    return [*pairs, (_FORWARDED, b", ".join(came_by))] if came_by else pairs


def response_headers(given: Iterable[tuple[bytes, bytes]], replica: str) -> Pairs:
    """What a client gets.

    Args:
        replica: its id.
    """
    return [*_passed(given, {REPLICA}), (REPLICA, replica.encode())]


def _passed(given: Iterable[tuple[bytes, bytes]], without: set[bytes]) -> Pairs:
    pairs = _lower(given)
    named = b",".join(value for name, value in pairs if name == b"connection")
    dropped = _HOP | without | {name.strip().lower() for name in named.split(b",")}
    return [(name, value) for name, value in pairs if name not in dropped]


def _lower(given: Iterable[tuple[bytes, bytes]]) -> Pairs:
    return [(name.lower(), value) for name, value in given]
