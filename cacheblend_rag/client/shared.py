"""A server in place of the engine that a process shares: for LlamaIndex and LangChain."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cacheblend_rag import shared
from cacheblend_rag.blend import CacheBlend
from cacheblend_rag.client.failures import RETRIES
from cacheblend_rag.client.http import base_url, checked_retries, checked_timeout
from cacheblend_rag.client.remote import RemoteCacheBlend, plain_config
from cacheblend_rag.config import BlendConfig
from cacheblend_rag.errors import ConfigError
from cacheblend_rag.shared import SharedEngine

_TIMEOUT_S = 600.0
_PROBE = (1, 2, 3, 4)  # a chunk that nobody has: its key names what keys depend on


class SharedServer(SharedEngine):
    """Connects when first needed. Make one with ``at``; objects of the same server share it."""

    @classmethod
    def at(
        cls,
        url: str,
        model: str | Path | None = None,
        *,
        api_key: str | None = None,
        timeout: float | None = None,
        max_retries: int | None = None,
        config: BlendConfig | None = None,
    ) -> SharedServer:
        """The server at ``url``.

        Args:
            url: of ``cacheblend serve``.
            model: that it has to serve; None asks it which one that is, at once.
            api_key, timeout, max_retries, config: see ``CacheBlend.connect``.

        Raises:
            ConfigError: a refused ``url`` or key, or another model.
            ServerError: it does not answer, and ``model`` is None.
        """
        retries = RETRIES if max_retries is None else max_retries
        named = {
            "api_key": api_key,
            "timeout": _TIMEOUT_S if timeout is None else checked_timeout(timeout),
            "max_retries": checked_retries(retries),
            "config": config,
        }
        name = _name(url, named)
        with shared._lock:
            found = shared._by_model.get(name)
            if not isinstance(found, SharedServer) or found._closed:
                found = cls(str(model or ""), _connector(url, named), {**named, "url": url})
                shared._by_model[name] = found
        if model is None:
            found.model = found.blend().info.model
        else:
            found._expect(str(model))
        return found

    @classmethod
    def chosen(
        cls,
        url: str | None,
        engine: SharedEngine | None,
        model: str | Path | None,
        config: BlendConfig | None,
        engine_args: Mapping[str, Any] | None,
        default: Callable[[], BlendConfig],
        *,
        api_key: str | None = None,
        timeout: float | None = None,
        max_retries: int | None = None,
    ) -> SharedEngine:
        """What an adapter was given: a server's URL, or what ``SharedEngine.resolve`` takes.

        Args:
            url, model, config: of the server.
            engine, engine_args: of an engine in this process.
            default: its configuration where none is given.
            api_key, max_retries: for the server; without ``url`` they are refused.
            timeout: for the server; without ``url`` it is the caller's own.

        Raises:
            ConfigError: a URL, and what only an engine in this process can have; or the reverse; or
                as there.
        """
        of_server = {"api_key": api_key, "max_retries": max_retries}
        if url is None:
            for name, value in of_server.items():
                if value is not None:
                    raise ConfigError(
                        f"{name} was given without url, and an engine in this process has no use "
                        "for it: name the server as url, or leave it out"
                    )
            return SharedEngine.resolve(engine, model, config, engine_args, default)
        if engine is not None or engine_args:
            given = "a running engine" if engine is not None else "engine_args"
            raise ConfigError(
                f"url names a server, and {given} was given too. A server's engine has the "
                "arguments that it was started with: leave one of the two out"
            )
        return cls.at(
            url,
            model,
            config=config,
            api_key=api_key,
            timeout=timeout,
            max_retries=max_retries,
        )

    @classmethod
    def holding(cls, blend: RemoteCacheBlend) -> SharedServer:
        """That of a front which is connected already; see ``SharedEngine.from_running``."""
        return cls(blend.info.model, lambda: blend, {**blend.settings, "url": blend.url})

    @property
    def config(self) -> BlendConfig:
        """How requests are blended; connects."""
        return self.blend().config

    def blend(self) -> CacheBlend:
        is_first = not self.started
        blend = super().blend()
        if is_first and self.model:
            self._check_model(blend, self.model)
        return blend

    def identity(self) -> str:
        """Names server, key space and store. Connects.

        A store in the server's memory is another one for each session of this side, as nobody says
        whether the server was started anew.
        """
        blend = self.blend()
        store = blend.config.store
        parts = [str(self._settings["url"]), blend.key(_PROBE), store]
        parts += [self._name] * store.startswith("memory:")
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()

    def _expect(self, model: str) -> None:
        if self.started:
            self._check_model(self.blend(), model)
        elif self.model not in ("", model):
            raise ConfigError(
                f"{self._settings['url']} was to serve {self.model}, and is now to serve {model}; "
                "name the one it serves, or leave the model out"
            )
        else:
            self.model = model

    def _check_model(self, blend: CacheBlend, model: str) -> None:
        assert isinstance(blend, RemoteCacheBlend)
        if model not in (names := blend.model_names()):
            raise ConfigError(
                f"{blend.url} serves {' or '.join(names)}, not {model}; name that, or leave the "
                "model out"
            )

    def __reduce__(self) -> tuple[Any, ...]:
        config = self._settings["config"]
        named = {name: self._settings[name] for name in ("api_key", "timeout", "max_retries")}
        plain = None if config is None else plain_config(config)
        return _revive, (self._settings["url"], self.model or None, named, plain)


def _revive(
    url: str, model: str | None, named: Mapping[str, Any], config: Mapping[str, Any] | None
) -> SharedServer:
    """In the same process the very same; in another one, a connection of its own when needed."""
    made = None if config is None else BlendConfig(**config)
    return SharedServer.at(url, model, config=made, **named)


def _connector(url: str, named: Mapping[str, Any]) -> Callable[[], CacheBlend]:
    base_url(url)  # a wrong one is refused here
    return lambda: CacheBlend.connect(url, **named)


def _name(url: str, named: Mapping[str, Any]) -> str:
    """Tells servers from one another, and from models, without saying the key."""
    config = named["config"]
    digest = None if config is None else config.digest()
    parts = [named["api_key"], named["timeout"], named["max_retries"], digest]
    return f"{base_url(url)}\0{hashlib.sha256(repr(parts).encode()).hexdigest()}"
