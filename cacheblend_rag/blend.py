"""The front door: ``CacheBlend`` over an embedded engine and a chunk store."""

from __future__ import annotations

import copy
import itertools
import uuid
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from cacheblend_rag import calibration
from cacheblend_rag.config import BlendConfig, config_of
from cacheblend_rag.daemons import DaemonPool
from cacheblend_rag.engine import Engine, ModelCheck, create_engine
from cacheblend_rag.engine.base import plain_adapter
from cacheblend_rag.errors import (
    ConfigError,
    EngineError,
    ModelError,
)
from cacheblend_rag.front.shadowing import ShadowThread
from cacheblend_rag.front.startup import Startup
from cacheblend_rag.keys import KeySpace
from cacheblend_rag.models import resolve_model
from cacheblend_rag.planner import Space
from cacheblend_rag.process import Home
from cacheblend_rag.store.tenants import documents_of
from cacheblend_rag.store.url import parse_url
from cacheblend_rag.undo import on_failure

# Threads that prepare prompts for event loops. With two, a loop waits for its turn behind both.
_PREPARING = 1


class CacheBlend(Startup):
    """RAG prompts several times sooner to their first token.

    Chunks are computed once by ``ingest``. Any later prompt that contains them, in any order, is
    served from their stored KV: keys are re-rotated, a small share of tokens is recomputed, and
    vLLM computes the rest. Prompts, ids and sampling stay what they are.

    Args:
        model: a hub name or a folder.
        config: how to blend; see ``BlendConfig``.
        engine: ``serving`` (vLLM's AsyncLLM: all methods, streams side by side) or ``batch``
            (vLLM's LLM: in the caller's thread, one call at a time).
        **engine_args: vLLM's engine arguments by their own names.

    Raises:
        EngineMissingError, ConfigError, ModelError, StoreError, EngineError.

    Safe to use from several threads and event loops.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        config: BlendConfig | None = None,
        engine: str = "serving",
        **engine_args: Any,
    ) -> None:
        config = config_of(config)
        _check_learn(config, "off")
        parse_url(config.store)  # a wrong one is told before the model is loaded
        self._take(create_engine(engine, resolve_model(_named(model)), engine_args), config)
        with on_failure(self._engine.close):
            self.calibration = calibration.find(self.info.fingerprint, self.config.calibration)
            self.model_check: ModelCheck = self._check_model()
            if self.model_check.passed:
                self._limit(self._measure_costs())
                if config.shadow:
                    self._check_shadow()
                    self._open_space()
                    self._shadows = ShadowThread(self._engine.rpc)

    @staticmethod
    def connect(
        url: str,
        *,
        api_key: str | None = None,
        timeout: float = 600.0,
        max_retries: int = 2,
        config: BlendConfig | None = None,
    ) -> CacheBlend:
        """The same front door to an engine in another process: that of ``cacheblend serve``.

        Args:
            url: of the server, for instance ``http://localhost:8000``.
            api_key: one of those that the server was started with.
            timeout: seconds without a word from the server until a call fails.
            max_retries: how often a call is tried again that the server did not take, or that does
                no harm when done twice.
            config: what requests ask for where a call says nothing; None: what the server's
                configuration says. Fields that only the server can set must be left out, or equal
                the server's.

        Raises:
            ServerError: no server answers there, or one that is not ours.
            ConfigError: a refused ``url``, key or ``config``.
        """
        from cacheblend_rag.client import RemoteCacheBlend

        return RemoteCacheBlend(
            url, api_key=api_key, timeout=timeout, max_retries=max_retries, config=config
        )

    @classmethod
    def from_engine(
        cls,
        engine: Engine,
        config: BlendConfig,
        model_check: ModelCheck,
        space: Space | None,
        *,
        has_scheduler: bool = True,
    ) -> Self:
        """A front to an engine that others started and bound: nothing is checked or opened.

        Args:
            model_check: what was found when it was started.
            space: of the requests that it plans; None where it plans none.
            has_scheduler: its scheduler's side learns at once what its workers do.
        """
        front = object.__new__(cls)
        front._take(engine, config)
        front.calibration = space.calibration if space is not None else None
        front.model_check, front._longest = model_check, model_check.max_tokens
        front._has_scheduler = has_scheduler
        if space is not None:
            front._name, front._space = space.name, space.keys
        return front

    def _take(self, engine: Engine, config: BlendConfig) -> None:
        self.config, self._engine, self.info = config, engine, engine.info
        self._numbers, self._session = itertools.count(), uuid.uuid4().hex[:8]
        self._closed, self._home = False, Home()
        self._preparing = DaemonPool(_PREPARING, "cacheblend-prepare")
        self._shadows: ShadowThread | None = None
        self._lora: Any = None  # of this front's requests
        self._adapter = ""  # digest of it
        self._namespaces = {config.namespace}  # of all fronts to this engine
        self._first_namespace = config.namespace
        self._name = uuid.uuid4().hex  # of the space that this front's requests are planned in
        self._has_scheduler, self._synced_at = True, 0.0
        self._tokenizer: Any = engine.tokenizer  # never handed out
        self._space = KeySpace(self.info.fingerprint, (), config.namespace)

    def with_config(
        self, config: BlendConfig, lora_request: Any = None, *, space: str | None = None
    ) -> Self:
        """A second front to the same engine and store, with a configuration of its own: another
        ingest prefix, say. Each knows what is stored by its own configuration, through whichever
        front or process. Where ``config`` names another store, that is passed over; close only the
        first front. One of another namespace is another tenant's: it reads none of the KV of the
        first, vLLM's prefix cache included.

        Args:
            config: of the second front.
            lora_request: vLLM's LoRARequest, of an adapter in a local folder. The front's chunks
                are computed with it, its answers are given with it, and what other adapters' chunks
                hold is none of its own. None: the model alone.
            space: by which name its requests are known to the engine; one of its own where None.

        Raises:
            ConfigError: no adapter is in that folder, or the engine serves none.
        """
        self._check_open()
        _check_learn(config, self.config.learn)
        if config.shadow and not self.config.shadow:
            raise ConfigError(
                "shadow is set when an engine starts: give it to the first CacheBlend, too"
            )
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other.config, other._name = config, space or uuid.uuid4().hex
        other.__dict__.pop("tokenizer", None)  # each has a copy of its own
        other._namespaces.add(config.namespace)
        # The store tells apart the documents of engines, not of an engine's fronts.
        is_other = config.namespace != self._first_namespace
        other._documents = documents_of(config.namespace) if is_other else ""
        other._lora, other._adapter = lora_request, ""
        if lora_request is not None and self.model_check.passed:
            other._adapter = self._engine.rpc("cacheblend_adapter", plain_adapter(lora_request))[0]
        other._space = other._key_space(config)
        if self.model_check.passed:
            other._open_space()
        return other

    @cached_property
    def tokenizer(self) -> Any:
        """A copy of the model's tokenizer, None where the engine has none. What is set on it, such
        as truncation, does not reach the prompts.
        """
        return copy.deepcopy(self._tokenizer)

    @property
    def engine(self) -> Engine:
        """The engine below, for what measures it."""
        return self._engine

    @property
    def key_space(self) -> KeySpace:
        """What the keys of this engine's chunks depend on, besides their tokens."""
        return self._space

    def _check_shadow(self) -> None:
        if refusal := next(filter(None, self._engine.rpc("cacheblend_shadow_refusal")), ""):
            raise ConfigError(f"shadow={self.config.shadow} can't be had: {refusal}. Leave it out")

    def stats(self) -> list[dict[str, int]]:
        """Counts of the chunk store; of ``memory://``, which each rank has for itself, one dict a
        rank. Empty where blending is off. Where several namespaces share the engine, only the
        number of chunks that this one has.
        """
        self._check_open()
        if len(self._namespaces) > 1:
            return [{"chunks": len(self.stored())}]
        return self._ask_stores("cacheblend_store_stats") if self.model_check.passed else []

    def close(self) -> None:
        """Stop the engine; does nothing on the second call."""
        if not self._closed and self._home.is_here:
            self._closed = True
            self._preparing.close(drop=True)
            if self._shadows is not None:
                self._shadows.close()
            self._engine.close()

    def __reduce__(self) -> Any:
        raise EngineError(
            "a CacheBlend can't be pickled or copied: it holds a running engine. Make one in each "
            "process, or pass on the LLM of LlamaIndex or LangChain, which starts one when needed"
        )

    def __enter__(self) -> CacheBlend:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _named(model: object) -> str:
    if not isinstance(model, str | Path):
        raise ModelError(f"model is {model!r}; name a folder, or one of the hub such as org/name")
    return str(model)


def _check_learn(config: BlendConfig, engine_learns: str) -> None:
    if config.learn not in ("off", engine_learns):
        raise ConfigError(
            f"learn={config.learn!r} is for a server: start `cacheblend serve --learn "
            f"{config.learn}`, and ask it by CacheBlend.connect(); here, leave it out and ingest()"
        )
