"""vLLM's endpoint plugin: found by its entry point, loaded where ``VLLM_PLUGINS`` names it."""

from __future__ import annotations

import asyncio
import logging
import os
from argparse import Namespace
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI

from cacheblend_rag.engine import compat
from cacheblend_rag.engine.base import ParserNames
from cacheblend_rag.engine.register import NAMES
from cacheblend_rag.errors import CacheBlendError, EngineError
from cacheblend_rag.server.calls import STORE
from cacheblend_rag.server.options import SERVER, ServerOptions
from cacheblend_rag.server.page import page_router
from cacheblend_rag.server.routes import add_to
from cacheblend_rag.server.service import Absent, Service
from cacheblend_rag.server.tenants import ANSWERS, MESSAGES, KeyFile, TenantMiddleware, Who

NAME = "cacheblend"

logger = logging.getLogger("vllm.cacheblend_rag")


class CacheBlendEndpoints:
    """The contract is ``vllm.plugins.endpoint_plugins.interface.EndpointPlugin``."""

    name = NAME
    required_tasks = ("generate",)

    def __init__(self) -> None:
        self._service: Service | Absent | None = None

    def attach_router(self, app: FastAPI) -> None:
        """Add the routes. Where there are tenants, a request's is found before any route."""
        add_to(app)
        options = ServerOptions.of(_extra(app.state.args.kv_transfer_config).get(SERVER, {}))
        if options.page:
            app.include_router(page_router())
        if options.has_tenants:
            keys = KeyFile(options.tenants) if options.tenants else None
            app.add_middleware(
                TenantMiddleware,
                who=Who(keys, options.tenant_header),
                ensure=self._ensure,
                max_body=options.max_body,
                answers=ANSWERS if compat.messages_have_salts() else ANSWERS - {MESSAGES},
            )

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        """The engine runs."""
        try:
            self._service = await self._made(engine_client, state, args)
        except CacheBlendError as error:
            logger.error("the endpoints under /v1/cacheblend are not available: %s", error)
            self._service = Absent(error)
        state.cacheblend = self._service

    async def _made(self, client: Any, state: Any, args: Namespace) -> Service:
        if client is None:
            raise EngineError("this server has no engine")
        extra = _extra(client.vllm_config.kv_transfer_config)
        several = (getattr(args, "api_server_count", None) or 1) > 1
        server = os.getppid() if several else os.getpid()
        loop = asyncio.get_running_loop()
        online = getattr(state, "online_renderer", None)
        parsers = _parsers(args)
        return await asyncio.to_thread(Service, client, loop, online, extra, server, parsers)

    async def _ensure(self, namespace: str) -> str:
        if self._service is None:
            raise EngineError("the server is not ready")
        if isinstance(self._service, Absent):
            raise self._service.answer()
        if self._service.found(namespace) is None:
            await STORE.do_once(self._service.front_of, namespace)
        return self._service.space_of(namespace)


def _parsers(args: Namespace) -> ParserNames:
    """Those that vLLM's own endpoints read answers by."""
    tool = getattr(args, "tool_call_parser", None)
    config = getattr(args, "structured_outputs_config", None)
    reasoning = getattr(config, "reasoning_parser", None) or getattr(args, "reasoning_parser", None)
    reads_tools = getattr(args, "enable_auto_tool_choice", False)
    return ParserNames((reads_tools and tool) or "", reasoning or "")


def _extra(config: Any) -> Mapping[str, Any]:
    """Our connector's extra config, of vLLM's object or of a plain table; also where it is one of
    several, within vLLM's MultiConnector.
    """
    name = "kv_connector_extra_config"
    is_plain = isinstance(config, Mapping)
    extra: Any = config.get(name) if is_plain else getattr(config, name, None)
    for held in (extra or {}).get("connectors", ()):
        if held.get("kv_connector") in NAMES:
            return held.get(name) or {}
    return extra or {}
