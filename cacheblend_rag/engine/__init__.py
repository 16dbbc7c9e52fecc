"""The only folder that imports vLLM. ``create_engine`` starts one, heavy imports inside."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from cacheblend_rag.engine.base import (
    ChatRenderer,
    Engine,
    EngineInfo,
    EngineOutput,
    EngineRequest,
    LayerCheck,
    ModelCheck,
)
from cacheblend_rag.errors import ConfigError

__all__ = [
    "ChatRenderer",
    "Engine",
    "EngineInfo",
    "EngineOutput",
    "EngineRequest",
    "LayerCheck",
    "ModelCheck",
    "create_engine",
]


def create_engine(kind: str, model: str, options: Mapping[str, Any]) -> Engine:
    """Start vLLM with our connector: ``serving`` (AsyncLLM) or ``batch`` (LLM).

    Raises:
        EngineMissingError, ConfigError, ModelError, EngineError.
    """
    from cacheblend_rag.engine.compat import installed_version

    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")  # no telemetry, vLLM's included
    installed_version()
    if kind == "serving":
        from cacheblend_rag.engine.serving import ServingEngine

        return ServingEngine(model, options)
    if kind == "batch":
        from cacheblend_rag.engine.batch import BatchEngine

        return BatchEngine(model, options)
    raise ConfigError(f"engine is {kind!r}; it must be 'serving' or 'batch'")
