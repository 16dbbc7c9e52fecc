"""The replicas behind a proxy: which may be asked, and who is. No I/O; for one event loop."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from xxhash import xxh32_intdigest

from cacheblend_rag.client.http import base_url
from cacheblend_rag.errors import ConfigError
from cacheblend_rag.router import Sketch, WarmRouter


@dataclass
class Replica:
    """Attributes:
    url: without a final slash or ``/v1``.
    models: names it answers to; None: not known, it is asked for any.
    up: it answers.
    draining: it gets no new requests.
    failed_checks: in a row.
    reason: why it is not up.
    sent, broken: counts of requests; broken ones were sent and not answered whole.
    """

    url: str
    models: frozenset[str] | None = None
    up: bool = False
    draining: bool = False
    failed_checks: int = 0
    reason: str | None = "not checked yet"
    sent: int = 0
    broken: int = 0

    @property
    def name(self) -> str:
        """Host, port and path."""
        return self.url.partition("://")[2]

    @property
    def id(self) -> str:
        """What clients get to see: no address."""
        return f"{xxh32_intdigest(self.url.encode()):08x}"


class Fleet:
    """Replicas by name, in the order in which they were added.

    Args:
        router: is kept in step with them.
        checks: that fail in a row until a replica is left out.
    """

    def __init__(self, router: WarmRouter, checks: int = 2) -> None:
        self._router, self._checks = router, checks
        self.replicas = dict[str, Replica]()

    def add(self, url: str) -> Replica:
        """There is a replica, which has to be checked first.

        Raises:
            ConfigError: the URL is none, or its host, port and path are another one's.
        """
        replica = Replica(base_url(url))
        if replica.name in self.replicas:
            raise ConfigError(f"the replica {replica.name} is given twice; leave one out")
        self.replicas[replica.name] = replica
        self._router.add(replica.name)
        return replica

    def remove(self, name: str) -> None:
        """It gets no new requests; those in flight go on."""
        del self.replicas[name]
        self._router.remove(name)

    def pinned(self, id_: str) -> Replica | None:
        """That of an id, draining or not; None where there is none."""
        return next((r for r in self.replicas.values() if r.id == id_), None)

    def fit(self, model: str | None, without: Iterable[str] = ()) -> list[str]:
        """Names of those that may be asked for a model, in order. None where all that have it are
        away; where nobody has it, any may say so.
        """
        left_out = set(without)
        able = [
            r for r in self.replicas.values() if r.up and not r.draining and r.name not in left_out
        ]
        if model is None:
            return [r.name for r in able]
        having = [r.name for r in able if r.models is None or model in r.models]
        is_known = any(r.models and model in r.models for r in self.replicas.values())
        return having if having or is_known else [r.name for r in able]

    def take(self, request: Sketch, among: Iterable[str]) -> Replica | None:
        """The replica to send a request to, which is in flight from now on; None: there is none."""
        name = self._router.choose(request, among)
        if name is None:
            return None
        self._router.sent(name, request)
        replica = self.replicas[name]
        replica.sent += 1
        return replica

    def done(self, replica: Replica) -> None:
        """A request that was taken has ended."""
        if self.replicas.get(replica.name) is replica:
            self._router.done(replica.name)

    def passed(self, replica: Replica, models: frozenset[str] | None) -> None:
        """A check went well."""
        replica.up, replica.failed_checks, replica.reason = True, 0, None
        replica.models = models

    def failed(self, replica: Replica, reason: str, *, surely: bool = False) -> None:
        """A check failed, or a call (``surely``): nobody answers at all. A replica that is left out
        may have been started anew when it comes back, so it counts as cold.
        """
        replica.failed_checks += 1
        replica.reason = reason
        if replica.up and not surely and replica.failed_checks < self._checks:
            return
        replica.up = False
        if self.replicas.get(replica.name) is replica:
            self._router.forget(replica.name)

    def state(self) -> list[dict[str, Any]]:
        """For people and programs."""
        counts = self._router.state()
        return [
            {
                "id": r.id,
                "name": r.name,
                "url": r.url,
                "state": ("draining" if r.draining else "up") if r.up else "down",
                "reason": r.reason,
                "models": None if r.models is None else sorted(r.models),
                "in_flight": counts[r.name].in_flight,
                "recent": counts[r.name].recent,
                "windows": counts[r.name].windows,
                "sent": r.sent,
                "broken": r.broken,
            }
            for r in self.replicas.values()
        ]
