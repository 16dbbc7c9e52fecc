"""Every exception the library raises; each message says how to fix the cause.

CacheBlendError
├── ConfigError            an option has a wrong name or value
├── PromptError            a prompt cannot be served as it is
│   ├── EmptyTextError     nothing to tokenise
│   └── PromptTooLongError prompt or chunk longer than the model's context
├── ModelError             model folder missing, hub not reachable, architecture unsupported
├── DataError              evaluation data or results cannot be used
├── StoreError             the store folder or URL cannot be used
│   └── UnavailableError   it cannot be asked just now: what it holds may still be there
├── EngineError            the engine failed
│   ├── EngineMissingError vLLM is absent or of an unsupported version
│   ├── EngineDeadError    the engine process ended; start a new one
│   ├── ServerError        a server cannot be reached, is busy, or failed
│   └── ClosedError        used after close()
└── MissingExtraError      an optional dependency is not installed

None of them is also a builtin exception: frameworks take a model's ValueError for an answer that
can't be parsed, and go on without it.

A missing or corrupt cache entry is never an error: its tokens are recomputed, as the report says.
"""

from __future__ import annotations


class CacheBlendError(Exception):
    """Base of every exception this library raises."""


class ConfigError(CacheBlendError):
    """An option has a wrong name or value."""


class PromptError(CacheBlendError):
    """A prompt or chunk cannot be served as it is."""


class EmptyTextError(PromptError):
    """There is nothing to tokenise."""


class PromptTooLongError(PromptError):
    """A prompt or chunk does not fit the model's context."""


class ModelError(CacheBlendError):
    """The model cannot be found or loaded."""


class DataError(CacheBlendError):
    """A file of questions or of results is not what it should be."""


class StoreError(CacheBlendError):
    """The chunk store cannot be opened or written."""


class UnavailableError(StoreError):
    """The chunk store cannot be asked just now; what it holds may still be there."""


class EngineError(CacheBlendError):
    """The engine failed."""


class EngineMissingError(EngineError):
    """vLLM is absent or of a version we do not support."""


class EngineDeadError(EngineError):
    """The engine process ended."""


class ServerError(EngineError):
    """A server cannot be reached, is busy, or failed."""


class ClosedError(EngineError):
    """The object was used after close()."""


class MissingExtraError(CacheBlendError):
    """An optional dependency is not installed."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(
            f"{package} is not installed. Install it with: pip install 'cacheblend-rag[{extra}]'"
        )
