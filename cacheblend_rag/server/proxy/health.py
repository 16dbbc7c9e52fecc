"""Asks replicas again and again whether they answer, and for their models."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import httpx

from cacheblend_rag.server.proxy.fleet import Fleet, Replica
from cacheblend_rag.server.proxy.options import ProxyOptions

_PAUSE_S = 0.2  # between checks, however often they are hurried

logger = logging.getLogger("cacheblend_rag.route")


class HealthChecks:
    """Args:
    fleet: is informed.
    client: asks.
    """

    def __init__(self, fleet: Fleet, client: httpx.AsyncClient, options: ProxyOptions) -> None:
        self._fleet, self._client, self._options = fleet, client, options
        self._hurry = asyncio.Event()

    def hurry(self) -> None:
        """Check all now: something is wrong with one, or one is new."""
        self._hurry.set()

    async def run(self) -> None:
        """For ever, until it is cancelled."""
        while True:
            await self.check_all()
            try:
                await asyncio.wait_for(self._hurry.wait(), self._options.check_s)
            except TimeoutError:
                continue
            self._hurry.clear()
            await asyncio.sleep(min(_PAUSE_S, self._options.check_s))

    async def check_all(self) -> None:
        """Each once, all at once."""
        await asyncio.gather(*map(self._check, list(self._fleet.replicas.values())))

    async def _check(self, replica: Replica) -> None:
        was_up = replica.up
        try:
            async with asyncio.timeout(self._options.check_timeout_s):
                models = await self._ask(replica)
        except TimeoutError:
            seconds = self._options.check_timeout_s
            self._fleet.failed(replica, f"no answer to a check in {seconds:g} s")
        # What else may come of an address or a server that is something else is no reason to end.
        except Exception as error:
            surely = isinstance(error, httpx.ConnectError)
            self._fleet.failed(replica, f"{type(error).__name__}: {error}", surely=surely)
        else:
            self._fleet.passed(replica, models)
        if replica.up != was_up:
            state = "up" if replica.up else f"left out ({replica.reason})"
            logger.warning("replica %s is %s", replica.name, state)

    async def _ask(self, replica: Replica) -> frozenset[str] | None:
        """The models of a replica; None where it does not say.

        Raises:
            httpx.HTTPError: it does not answer, or says that it cannot.
        """
        key = self._options.api_key
        headers = {} if key is None else {"authorization": f"Bearer {key}"}
        health = await self._client.get(f"{replica.url}/health", headers=headers)
        if health.is_server_error:  # another kind of server may have no such page: that is no fault
            health.raise_for_status()
        return models_of(await self._client.get(f"{replica.url}/v1/models", headers=headers))


def models_of(response: httpx.Response) -> frozenset[str] | None:
    """The names in an OpenAI list of models; None where it is none."""
    try:
        found: Any = response.json() if response.is_success else None
        names = [entry["id"] for entry in found["data"]] if found else []
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    if not names or not all(isinstance(name, str) for name in names):
        return None
    return frozenset(names)
