"""A replica of Ray Serve LLM whose engine blends. Imported where there is Ray."""

from __future__ import annotations

from typing import Any

from ray.serve.llm.deployment import LLMServer

from cacheblend_rag.server.relay import Answered, Asked, answered, endpoints


class CacheBlendServer(LLMServer):
    """Ray's own, and our endpoints, which the ingress asks."""

    async def start(self) -> None:
        """Start the engine, then the endpoints over it."""
        await super().start()
        engine: Any = self.engine
        self._endpoints = await endpoints(
            engine._engine_client, engine._app_state, engine._vllm_args
        )

    async def relay(self, asked: tuple[Any, ...]) -> Answered:
        """What the endpoints of this replica answer."""
        return await answered(self._endpoints, Asked(*asked))
