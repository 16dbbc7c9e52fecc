"""Selectors: which reused tokens are recomputed. One class a file, made by ``create_selector``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from cacheblend_rag.errors import ConfigError
from cacheblend_rag.select.all import AllSelector
from cacheblend_rag.select.base import Evidence, KVDeviation, QuestionAttention, Selector
from cacheblend_rag.select.first_k import FirstKSelector
from cacheblend_rag.select.hkvd import HKVDSelector
from cacheblend_rag.select.none import NoneSelector
from cacheblend_rag.select.query import QuerySelector
from cacheblend_rag.select.random import RandomSelector

__all__ = [
    "SELECTORS",
    "Evidence",
    "KVDeviation",
    "QuestionAttention",
    "Selector",
    "create_selector",
]

SELECTORS: dict[str, type[Selector]] = {
    kind.name: kind
    for kind in (
        QuerySelector,
        HKVDSelector,
        FirstKSelector,
        RandomSelector,
        AllSelector,
        NoneSelector,
    )
}


def create_selector(name: str, options: Mapping[str, Any] | None = None) -> Selector:
    """The selector ``name`` with its own ``options``.

    Raises:
        ConfigError: unknown name or option, or a value that makes no sense.
    """
    options = options or {}
    if name not in SELECTORS:
        raise ConfigError(f"selector is {name!r}; it must be one of {', '.join(SELECTORS)}")
    kind = SELECTORS[name]
    known = {f.name for f in fields(kind)}
    if unknown := set(options) - known:
        raise ConfigError(
            f"selector {name!r} has no option {', '.join(sorted(unknown))}; "
            f"it has {', '.join(sorted(known)) or 'none'}"
        )
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}
    selector = kind(**values)
    try:
        selector.validate()
    except (TypeError, ValueError) as error:
        raise ConfigError(f"selector {name!r}: {error}") from error
    return selector
