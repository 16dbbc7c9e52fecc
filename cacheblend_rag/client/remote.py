"""``RemoteCacheBlend``: the front door to an engine that runs in a server."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, Self

from cacheblend_rag.blend import CacheBlend
from cacheblend_rag.client import replies, requests
from cacheblend_rag.client.asking import RemoteAnswers
from cacheblend_rag.client.chunks import RemoteChunks
from cacheblend_rag.client.http import Connection
from cacheblend_rag.config import BlendConfig, config_of
from cacheblend_rag.engine import Engine, ModelCheck
from cacheblend_rag.errors import ConfigError, EngineError, UnavailableError
from cacheblend_rag.keys import KeySpace
from cacheblend_rag.undo import on_failure


class RemoteCacheBlend(RemoteAnswers, RemoteChunks, CacheBlend):
    """What ``CacheBlend.connect`` returns: the methods of ``CacheBlend``, over HTTP.

    Prompts become token ids at the server, and answers come from vLLM's own completions endpoint.
    So token ids and answers are those of an embedded engine.

    Safe to use from several threads, event loops and forked processes. It may be copied and
    pickled, which connects anew.
    """

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        timeout: float = 600.0,
        max_retries: int = 2,
        config: BlendConfig | None = None,
    ) -> None:
        if config is not None:
            config_of(config)
        self._connection = Connection(url, api_key, timeout, max_retries)
        self._asked_config = config
        with on_failure(self._connection.close):
            state = self._state()
            self._server_config = requests.server_config(state["config"])
            self.config, self._own = requests.merged(self._server_config, config)
        self.info, self._parsers = replies.info(state), replies.parsers(state)
        self.calibration = None  # the server's own
        self._namespace = str(state["namespace"])

    @property
    def url(self) -> str:
        """The server's, without ``/v1``."""
        return self._connection.url

    @property
    def model_check(self) -> ModelCheck:  # type: ignore[override]
        """Whether the server blends just now."""
        return replies.model_check(self._state())

    def _state(self) -> Mapping[str, Any]:
        state: Mapping[str, Any] = self._call("GET", "")
        return state

    # ---- life ----------------------------------------------------------------------------------

    def with_config(
        self, config: BlendConfig, lora_request: Any = None, *, space: str | None = None
    ) -> Self:
        """A second front to the same server, whose requests ask for what ``config`` says. Fields
        that only the server can set must have their defaults, or be the server's. Close only the
        first front.

        Raises:
            ConfigError: such a field differs, or ``space`` or ``lora_request`` is given, which only
                an engine in this process knows.
        """
        self._connection.check_open()
        if space is not None:
            raise ConfigError("space can't be chosen of a server; leave it out")
        if lora_request is not None:
            raise ConfigError("chunks of an adapter can't be made by a server; leave it out")
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other._asked_config = config
        other.config, other._own = requests.merged(self._server_config, config)
        return other

    def stats(self) -> list[dict[str, int]]:
        state = self._state()
        if error := state.get("store_error"):
            raise UnavailableError(f"{self.url}: {error}")
        return [dict(state["store"])] if state["blending"]["on"] else []

    @property
    def engine(self) -> Engine:
        """Not here.

        Raises:
            EngineError: always.
        """
        raise EngineError(f"the engine runs in the server {self.url}; there is none here")

    @property
    def key_space(self) -> KeySpace:
        """Not known here.

        Raises:
            EngineError: always.
        """
        raise EngineError(f"the keys are made by the server {self.url}; ask key() for a chunk's")

    def model_names(self) -> list[str]:
        """The names by which the server's model can be asked for, adapters left out."""
        listed = self._connection.call("GET", "/v1/models")["data"]
        own = [str(card["id"]) for card in listed if not card.get("parent")]
        return list(dict.fromkeys([self.info.model, *own]))

    def close(self) -> None:
        """Close the connections; the server goes on."""
        self._connection.close()

    def _check_open(self) -> None:
        self._connection.check_open()

    @property
    def settings(self) -> dict[str, Any]:
        """What it was made with, but for the URL."""
        made = self._connection
        named = {"api_key": made.api_key, "timeout": made.timeout, "max_retries": made.retries}
        return {**named, "config": self._asked_config}

    def __reduce__(self) -> Any:
        named = self.settings
        config = named.pop("config")
        return _connect, (self.url, named, None if config is None else plain_config(config))


def plain_config(config: BlendConfig) -> dict[str, Any]:
    """The fields of ``config`` as plain data, which can be pickled."""
    plain = {f.name: getattr(config, f.name) for f in fields(config)}
    return {n: dict(v) if isinstance(v, Mapping) else v for n, v in plain.items()}


def _connect(
    url: str, named: Mapping[str, Any], config: Mapping[str, Any] | None
) -> RemoteCacheBlend:
    return RemoteCacheBlend(url, config=BlendConfig(**config) if config else None, **named)
