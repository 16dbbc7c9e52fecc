"""Selectors: which reused tokens are recomputed. One class a file, made by ``create_selector``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from functools import cache
from importlib.metadata import entry_points
from typing import Any, get_type_hints

from cacheblend_rag.errors import ConfigError
from cacheblend_rag.select.all import AllSelector
from cacheblend_rag.select.base import (
    AskedLayers,
    Evidence,
    KVDeviation,
    QuestionAttention,
    Selector,
)
from cacheblend_rag.select.first_k import FirstKSelector
from cacheblend_rag.select.hkvd import HKVDSelector
from cacheblend_rag.select.none import NoneSelector
from cacheblend_rag.select.query import QuerySelector
from cacheblend_rag.select.random import RandomSelector

__all__ = [
    "SELECTORS",
    "AskedLayers",
    "Evidence",
    "KVDeviation",
    "QuestionAttention",
    "Selector",
    "create_selector",
    "selectors",
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


_MOST = 1 << 31
GROUP = "cacheblend_rag.selectors"  # entry points of other packages: a selector's name and class


@cache
def selectors() -> Mapping[str, type[Selector]]:
    """All by name: ours, and those that installed packages bring. Ours can't be replaced.

    Raises:
        ConfigError: another package's can't be imported, or is none.
    """
    found: dict[str, type[Selector]] = {}
    for point in entry_points(group=GROUP):
        try:
            kind = point.load()
        # An import runs another package's code, which may raise anything.
        except Exception as error:
            raise ConfigError(f"the selector {point.value} can't be imported: {error}") from error
        if not (isinstance(kind, type) and issubclass(kind, Selector)) or kind.name != point.name:
            raise ConfigError(
                f"the entry point {point.name!r} of the group {GROUP} must be a Selector with that "
                f"name, and {point.value} is not"
            )
        found[point.name] = kind
    return {**found, **SELECTORS}


def create_selector(name: str, options: Mapping[str, Any] | None = None) -> Selector:
    """The selector ``name`` with its own ``options``.

    Raises:
        ConfigError: unknown name or option, or a value that makes no sense.
    """
    options = options or {}
    kind = SELECTORS.get(name) or selectors().get(name)
    if kind is None:
        raise ConfigError(f"selector is {name!r}; it must be one of {', '.join(selectors())}")
    known = {f.name for f in fields(kind)}
    if unknown := set(options) - known:
        raise ConfigError(
            f"selector {name!r} has no option {', '.join(sorted(unknown))}; "
            f"it has {', '.join(sorted(known)) or 'none'}"
        )
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}
    try:
        _check_numbers(kind, values)
        selector = kind(**values)
        selector.validate()
    except (TypeError, ValueError) as error:
        raise ConfigError(f"selector {name!r}: {error}") from error
    return selector


@cache  # a request makes its selector several times, and hints take longer than all the rest
def _types(kind: type[Selector]) -> dict[str, Any]:
    return get_type_hints(kind)


def _check_numbers(kind: type[Selector], values: Mapping[str, Any]) -> None:
    """Numbers are of the kind that their fields have: a worker would find that out in the middle
    of a blend.
    """
    for option, wanted in _types(kind).items():
        value = values.get(option)
        if option not in values or wanted not in (int, float):
            continue
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(f"{option} must be a number, got {value!r}")
        if wanted is int and not isinstance(value, int):
            raise TypeError(f"{option} must be a whole number, got {value!r}")
        if isinstance(value, int) and abs(value) >= _MOST:
            raise ValueError(f"{option} must be below 2**31, got {value}")
