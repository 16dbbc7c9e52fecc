"""Ray Serve's request router, by what each replica was sent before. Imported where there is Ray.

The choice is ``cacheblend_rag.router``'s; here it is told of requests and replicas. Each ingress
replica has a router of its own, and learns of the load that others cause by Ray's queue lengths.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from ray.serve.request_router import (
    FIFOMixin,
    LocalityMixin,
    MultiplexMixin,
    PendingRequest,
    ReplicaID,
    RequestRouter,
    RunningReplica,
)

from cacheblend_rag.router import Sketch, WarmRouter, request_sketch

_KEPT = 1024  # sketches of requests that wait for a replica


class WarmRequestRouter(FIFOMixin, LocalityMixin, MultiplexMixin, RequestRouter):
    """For ``request_router_class``; ``request_router_kwargs`` are those of ``WarmRouter``."""

    def initialize_state(self, **options: Any) -> None:
        """Called by Ray once."""
        self._warm = WarmRouter(**options)
        self._known: set[str] = set()
        self._sketches = OrderedDict[str, Sketch]()  # by Ray's name of a request

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """Ranks of one replica each, the best first."""
        self._look_at_replicas()
        named = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        for name in named:
            self._warm.add(name)
        lengths = {
            name: length
            for name, replica in named.items()
            if (length := self._queue_length(replica)) is not None
        }
        sketch = Sketch() if pending_request is None else self._sketch(pending_request)
        order = self._warm.rank(sketch, among=named, in_flight=lengths)
        return [[named[name]] for name in order]

    def on_request_routed(
        self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any
    ) -> None:
        """A replica took it."""
        sketch = self._sketch(pending_request)
        self._sketches.pop(pending_request.metadata.internal_request_id, None)
        self._warm.sent(replica_id.unique_id, sketch)

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """It ended, however it did."""
        self._warm.done(replica_id.unique_id)

    def _look_at_replicas(self) -> None:
        """Forget those that are gone."""
        now = {replica_id.unique_id for replica_id in self.curr_replicas}
        for name in self._known - now:
            self._warm.remove(name)
        self._known = now

    def _queue_length(self, replica: RunningReplica) -> int | None:
        found: int | None = self._replica_queue_len_cache.get(replica.replica_id)
        return found

    def _sketch(self, pending: PendingRequest) -> Sketch:
        """Made once, though Ray asks again for one that waits."""
        name = pending.metadata.internal_request_id
        if name not in self._sketches:
            self._sketches[name] = request_sketch(pending.args[0] if pending.args else None)
            while len(self._sketches) > _KEPT:
                self._sketches.popitem(last=False)
        return self._sketches[name]
