"""How the proxy works."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ProxyOptions:
    """Attributes:
    check_s: seconds between two checks of a replica.
    check_timeout_s: that a check may take.
    checks: in a row that fail until a replica is left out.
    connect_timeout_s: until a replica that does not answer the call counts as away.
    timeout_s: without a byte from a replica until an answer is given up; None: for ever.
    max_body: bytes of a request, which is kept until it is answered.
    api_key: sent with checks, to learn which models a replica has; clients send their own.
    admin_key: for the endpoints below ``/route``; None: they are closed.
    """

    check_s: float = 2.0
    check_timeout_s: float = 5.0
    checks: int = 2
    connect_timeout_s: float = 5.0
    timeout_s: float | None = None
    max_body: int = 256 << 20
    api_key: str | None = None
    admin_key: str | None = None
