"""The proxy as an ASGI application: its own endpoints, and all others handed on."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator, Sequence
from http.cookiejar import CookieJar, DefaultCookiePolicy

import httpx
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount, Route

from cacheblend_rag.errors import CacheBlendError, ConfigError
from cacheblend_rag.router import WarmRouter
from cacheblend_rag.server.bodies import only, parsed
from cacheblend_rag.server.errors import HttpError, answer, not_found
from cacheblend_rag.server.proxy.fleet import Fleet
from cacheblend_rag.server.proxy.forward import Forward
from cacheblend_rag.server.proxy.health import HealthChecks
from cacheblend_rag.server.proxy.options import ProxyOptions
from cacheblend_rag.server.reading import read

# vLLM closes a connection that was idle for 5 s: ours end before, and none is used while it closes
_IDLE_S = 2.0
_MOST_ADMIN = 1 << 16  # bytes of a body


def proxy_app(urls: Sequence[str], router: WarmRouter, options: ProxyOptions) -> Starlette:
    """The application.

    Args:
        urls: of the replicas.
        router: without replicas.

    Raises:
        ConfigError: there is no URL, or one is wrong.
    """
    if not urls:
        raise ConfigError("there is no replica; give one or more as --replica URL")
    fleet = Fleet(router, options.checks)
    for url in urls:
        fleet.add(url)
    client = httpx.AsyncClient(
        timeout=httpx.Timeout(options.timeout_s, connect=options.connect_timeout_s, pool=None),
        limits=httpx.Limits(keepalive_expiry=_IDLE_S, max_keepalive_connections=100),
        trust_env=False,  # replicas are reached directly
        verify=httpx.create_ssl_context(),  # SSL_CERT_FILE counts, though
        cookies=CookieJar(DefaultCookiePolicy(allowed_domains=[])),  # they are for clients
    )
    health = HealthChecks(fleet, client, options)
    admin = Admin(fleet, health, options.admin_key)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        checking = asyncio.create_task(health.run())
        with contextlib.suppress(TimeoutError):  # requests are refused until a replica is up
            await asyncio.wait_for(health.checked.wait(), options.check_timeout_s)
        try:
            yield
        finally:
            checking.cancel()
            await asyncio.gather(checking, return_exceptions=True)
            await client.aclose()

    routes = [
        Route("/health", admin.health),
        Route("/metrics", _no_metrics),
        Route("/route", admin.show),
        Route("/route/{what}", admin.change, methods=["POST"]),
        Mount("/", Forward(fleet, client, health, options)),
    ]
    handlers = {CacheBlendError: _answered}
    return Starlette(routes=routes, lifespan=lifespan, exception_handlers=handlers)


async def _answered(request: Request, error: Exception) -> Response:
    return answer(error)


async def _no_metrics(request: Request) -> Response:
    raise HttpError(404, "the proxy has no metrics of its own; ask each replica, or GET /route")


class Admin:
    """Endpoints for who runs the fleet.

    Args:
        key: that they are guarded by; None: those below ``/route`` are closed.
    """

    def __init__(self, fleet: Fleet, health: HealthChecks, key: str | None) -> None:
        self._fleet, self._health, self._key = fleet, health, key

    async def health(self, request: Request) -> Response:
        """200 where some replica can be asked, else 503; for a load balancer in front."""
        able = self._fleet.fit(None)
        return Response(status_code=200 if able else 503)

    async def show(self, request: Request) -> Response:
        """The state of all replicas."""
        self._check(request)
        return JSONResponse({"object": "cacheblend.route", "replicas": self._fleet.state()})

    async def change(self, request: Request) -> Response:
        """``add`` a ``url``; ``drain``, ``resume`` or ``remove`` a ``replica``."""
        self._check(request)
        what = request.path_params["what"]
        if what not in ("add", "drain", "resume", "remove"):
            raise not_found("endpoint", f"/route/{what}")
        body = parsed(await read(request.receive, request.headers, _MOST_ADMIN))
        named = "url" if what == "add" else "replica"
        only(body, [named])
        value = body.get(named)
        if not isinstance(value, str):
            raise HttpError(400, f"{named} must be a text", param=named)
        if what == "add":
            self._health.hurry(self._fleet.add(value))
        elif value not in self._fleet.replicas:
            raise not_found("replica", value)
        elif what == "remove":
            self._fleet.remove(value)
        else:
            self._fleet.replicas[value].draining = what == "drain"
        return await self.show(request)

    def _check(self, request: Request) -> None:
        """Raises:
        HttpError: this client may not.
        """
        if self._key is None:
            raise HttpError(
                403, "/route is closed; start the proxy with CACHEBLEND_ROUTE_KEY set to a secret"
            )
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if not secrets.compare_digest(given.encode(), self._key.encode()):
            raise HttpError(401, "/route wants the proxy's own key as a bearer token")
