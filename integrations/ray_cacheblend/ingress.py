"""Ray's own OpenAI ingress, and our endpoints beside it. Imported where there is Ray."""

from __future__ import annotations

import asyncio
import pickle
import time
import uuid
from collections.abc import Awaitable
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayActorError
from ray.llm._internal.serve.core.ingress.ingress import init
from ray.serve._private.common import RequestMetadata
from ray.serve.llm.ingress import OpenAiIngress, make_fastapi_ingress

from cacheblend_rag.errors import EngineDeadError
from cacheblend_rag.server.relay import Answered, Asked, Replica, add_relay, first_found

_KNOWN_S = 30  # until an ingress that was started just now knows of replicas


class Replicas:
    """Those of one deployment: see ``cacheblend_rag.server.relay.Fleet``.

    Args:
        handle: Ray's, of the deployment.
    """

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    async def replicas(self) -> list[Replica]:
        """With the machines that they run on."""
        handle = self._handle.relay  # starts Ray's router, in this thread only
        return await asyncio.to_thread(_running, handle)

    async def ask_any(self, asked: Asked) -> Answered:
        """The one that Ray's router chooses."""
        return await _reply(self._handle.relay.remote(tuple(asked)))

    async def ask(self, replica: Replica, asked: Asked) -> Answered:
        """Past Ray's router."""
        try:
            actor = await asyncio.to_thread(ray.get_actor, replica.name, namespace="serve")
        except ValueError as error:
            raise EngineDeadError(f"there is no {replica.name} any more") from error
        id_ = f"cacheblend-{uuid.uuid4()}"
        metadata = RequestMetadata(request_id=id_, internal_request_id=id_, call_method="relay")
        return await _reply(actor.handle_request.remote(pickle.dumps(metadata), tuple(asked)))


async def _reply(work: Awaitable[Any]) -> Answered:
    try:
        return Answered(*await work)
    except RayActorError as error:
        raise EngineDeadError(f"the replica was lost: {error}") from error


def _running(handle: Any) -> list[Replica]:
    """Waits until Ray has told of them. As Ray's own ``broadcast`` does, which asks all at once and
    fails where one is dead.
    """
    end = time.monotonic() + _KNOWN_S
    while not (handle.running_replicas_populated() and _router(handle)):
        if time.monotonic() > end:
            raise EngineDeadError(f"no replica was there in {_KNOWN_S} s; ask again")
        time.sleep(0.1)
    running = _router(handle).curr_replicas.values()
    return [Replica(r.node_id or "", r.replica_id.to_full_id_str()) for r in list(running)]


def _router(handle: Any) -> Any:
    router = getattr(handle._router, "_asyncio_router", handle._router)
    return router.request_router


class CacheBlendIngress(OpenAiIngress):
    """Asks a replica, or where only one of them knows, all."""

    async def relay(self, asked: Asked) -> Answered:
        """What the fleet answers to a request to our endpoints."""
        [handle] = self._default_serve_handles.values()
        return await first_found(asked, Replicas(handle))


async def _of_this_replica(asked: Asked) -> Answered:
    ingress: CacheBlendIngress = serve.get_replica_context().servable_object
    return await ingress.relay(asked)


def ingress_class(max_body: int) -> Any:
    """What ``serve.deployment`` takes."""
    app = init()
    add_relay(app, _of_this_replica, max_body)
    return make_fastapi_ingress(CacheBlendIngress, app=app)
