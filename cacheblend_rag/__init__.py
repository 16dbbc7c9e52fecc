"""cacheblend-rag: RAG prompts several times sooner to their first token, inside a stock vLLM."""

from cacheblend_rag._version import __version__
from cacheblend_rag.blend import CacheBlend
from cacheblend_rag.config import BlendConfig
from cacheblend_rag.engine.base import ModelCheck
from cacheblend_rag.errors import (
    CacheBlendError,
    ClosedError,
    ConfigError,
    EmptyTextError,
    EngineDeadError,
    EngineError,
    EngineMissingError,
    MissingExtraError,
    ModelError,
    PromptError,
    PromptTooLongError,
    ServerError,
    StoreError,
)
from cacheblend_rag.ingest import IngestReport
from cacheblend_rag.reason import Reason
from cacheblend_rag.report import BlendReport, SegmentReport
from cacheblend_rag.result import AsyncBlendStream, BlendResult, BlendStream
from cacheblend_rag.shadow.report import ShadowReport

__all__ = [
    "AsyncBlendStream",
    "BlendConfig",
    "BlendReport",
    "BlendResult",
    "BlendStream",
    "CacheBlend",
    "CacheBlendError",
    "ClosedError",
    "ConfigError",
    "EmptyTextError",
    "EngineDeadError",
    "EngineError",
    "EngineMissingError",
    "IngestReport",
    "MissingExtraError",
    "ModelCheck",
    "ModelError",
    "PromptError",
    "PromptTooLongError",
    "Reason",
    "SegmentReport",
    "ServerError",
    "ShadowReport",
    "StoreError",
    "__version__",
]
