"""Asks replicas again and again whether they answer, and for their models."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import httpx

from cacheblend_rag.server.proxy.fleet import Fleet, Replica
from cacheblend_rag.server.proxy.options import ProxyOptions

_PAUSE_S = 0.2  # between two checks of suspects
_AT_ONCE, _A_SECOND = 64, 100  # checks, at most: they take time from answers

logger = logging.getLogger("cacheblend_rag.route")


class HealthChecks:
    """Args:
        fleet: is informed.
        client: asks.

    Attributes:
        checked: whether all were checked once.
    """

    def __init__(self, fleet: Fleet, client: httpx.AsyncClient, options: ProxyOptions) -> None:
        self._fleet, self._client, self._options = fleet, client, options
        self._hurry, self._suspects = asyncio.Event(), dict[str, Replica]()
        self._turn, self.checked = asyncio.Semaphore(_AT_ONCE), asyncio.Event()

    def hurry(self, replica: Replica) -> None:
        """Check this one now: something is wrong with it, or it is new."""
        self._suspects[replica.name] = replica
        self._hurry.set()

    async def run(self) -> None:
        """For ever, until it is cancelled."""
        while True:
            await asyncio.gather(*map(self._check, list(self._fleet.replicas.values())))
            self.checked.set()
            most = len(self._fleet.replicas) / _A_SECOND
            await self._rest(max(self._options.check_s, most))

    async def _rest(self, seconds: float) -> None:
        """Until all are checked again; suspects are checked meanwhile."""
        loop = asyncio.get_running_loop()
        end = loop.time() + seconds
        while (left := end - loop.time()) > 0:
            try:
                await asyncio.wait_for(self._hurry.wait(), left)
            except TimeoutError:
                return
            self._hurry.clear()
            suspects, self._suspects = self._suspects, {}
            await asyncio.gather(*map(self._check, suspects.values()))
            await asyncio.sleep(min(_PAUSE_S, self._options.check_s))

    async def _check(self, replica: Replica) -> None:
        was_up = replica.up
        try:
            async with self._turn, asyncio.timeout(self._options.check_timeout_s):
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
