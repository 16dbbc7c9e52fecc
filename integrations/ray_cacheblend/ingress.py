"""Ray's own OpenAI ingress, and our endpoints beside it. Imported where there is Ray."""

from __future__ import annotations

from typing import Any

from ray import serve
from ray.llm._internal.serve.core.ingress.ingress import init
from ray.llm._internal.serve.utils.broadcast import broadcast
from ray.serve.llm.ingress import OpenAiIngress, make_fastapi_ingress

from cacheblend_rag.server.relay import Answered, Asked, add_relay, first_found


class CacheBlendIngress(OpenAiIngress):
    """Asks a replica, or where only one of them knows, all."""

    async def relay(self, asked: Asked) -> Answered:
        """What the fleet answers to a request to our endpoints."""
        [handle] = self._default_serve_handles.values()

        async def ask_any(asked: Asked) -> Answered:
            reply = await handle.relay.remote(tuple(asked))
            return Answered(*reply)

        def ask_all(asked: Asked) -> list[Answered]:
            return [Answered(*reply) for reply in broadcast(handle, "relay", (tuple(asked),))]

        return await first_found(asked, ask_any, ask_all)


async def _of_this_replica(asked: Asked) -> Answered:
    ingress: CacheBlendIngress = serve.get_replica_context().servable_object
    return await ingress.relay(asked)


def ingress_class(max_body: int) -> Any:
    """What ``serve.deployment`` takes."""
    app = init()
    add_relay(app, _of_this_replica, max_body)
    return make_fastapi_ingress(CacheBlendIngress, app=app)
